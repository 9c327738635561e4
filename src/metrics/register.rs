//! Makes metrics and enters them in the registry.
//!
//! Names and labels are constants of this module's siblings; a name that Prometheus would refuse,
//! or one given twice, is a mistake in the program that every test run finds.

use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use super::summary::Summary;

/// Collects the names on the way, so that documents can be compared with them.
pub(super) struct Register {
    pub(super) registry: Registry,
    pub(super) names: Vec<&'static str>,
}

impl Register {
    pub(super) fn new() -> Self {
        Register { registry: Registry::new(), names: Vec::new() }
    }

    pub(super) fn counter(&mut self, name: &'static str, help: &str) -> IntCounter {
        self.enter(name, IntCounter::new(name, help))
    }

    pub(super) fn counters(&mut self, name: &'static str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.enter(name, IntCounterVec::new(Opts::new(name, help), labels))
    }

    pub(super) fn gauge(&mut self, name: &'static str, help: &str) -> IntGauge {
        self.enter(name, IntGauge::new(name, help))
    }

    pub(super) fn gauges(&mut self, name: &'static str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.enter(name, IntGaugeVec::new(Opts::new(name, help), labels))
    }

    /// A gauge with a fraction.
    pub(super) fn ratio(&mut self, name: &'static str, help: &str) -> Gauge {
        self.enter(name, Gauge::new(name, help))
    }

    pub(super) fn histogram(&mut self, name: &'static str, help: &str, buckets: &[f64]) -> Histogram {
        self.enter(name, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    pub(super) fn histograms(
        &mut self,
        name: &'static str,
        help: &str,
        buckets: &[f64],
        labels: &[&str],
    ) -> HistogramVec {
        self.enter(name, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
    }

    pub(super) fn summary(&mut self, name: &'static str, help: &str) -> Summary {
        self.enter(name, Summary::new(name, help))
    }

    /// Enters a collector that reports several names.
    pub(super) fn collector<C: Collector + 'static>(
        &mut self,
        names: impl Iterator<Item = &'static str>,
        collector: Result<C, prometheus::Error>,
    ) {
        self.names.extend(names);
        self.put(Box::new(made(collector)));
    }

    fn enter<C: Collector + Clone + 'static>(&mut self, name: &'static str, made_: Result<C, prometheus::Error>) -> C {
        let metric = made(made_);
        self.names.push(name);
        self.put(Box::new(metric.clone()));
        metric
    }

    #[allow(clippy::expect_used)] // Names are constants: see the module's head.
    fn put(&self, collector: Box<dyn Collector>) {
        self.registry.register(collector).expect("each metric has a name of its own");
    }
}

#[allow(clippy::expect_used)] // Names are constants: see the module's head.
fn made<C>(metric: Result<C, prometheus::Error>) -> C {
    metric.expect("names and labels of metrics are well formed")
}
