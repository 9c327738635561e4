//! A Prometheus summary whose quantiles are those of the last minute.
//!
//! The alert rules read `quantile="0.99"`, so quantiles must follow the present: they come from a
//! ring of histograms, the oldest of which is emptied every ten seconds. `_sum` and `_count` run
//! from the start of the process. Recording is one uncontended lock and one increment in a table.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use prometheus::core::{Collector, Desc};
use prometheus::proto;

use crate::clock;

/// The window is this many slots of [`SLOT_MS`]: between 50 and 60 seconds of samples.
const SLOTS: usize = 6;
const SLOT_MS: u64 = 10_000;

/// The quantiles that the runbooks' greps and alert rules name.
const QUANTILES: [f64; 3] = [0.5, 0.9, 0.99];

/// Durations from a nanosecond to ten minutes with two digits: 17 KiB per slot. Longer ones count as ten minutes
/// in the quantiles, and as what they are in the sum.
const LONGEST_NS: u64 = 600_000_000_000;
const DIGITS: u8 = 2;

/// A summary of durations. Clones share the same samples.
#[derive(Clone)]
pub(super) struct Summary(Arc<Inner>);

struct Inner {
    desc: Desc,
    window: Mutex<Window>,
}

struct Window {
    /// Newest at the back.
    slots: VecDeque<Histogram<u32>>,
    newest_began_ms: u64,
    count: u64,
    sum_seconds: f64,
}

impl Summary {
    /// # Errors
    /// The name is not one that Prometheus accepts.
    pub(super) fn new(name: &str, help: &str) -> Result<Self, prometheus::Error> {
        let desc = Desc::new(name.to_owned(), help.to_owned(), Vec::new(), Default::default())?;
        let mut slots = VecDeque::with_capacity(SLOTS);
        for _ in 0..SLOTS {
            let slot = Histogram::new_with_bounds(1, LONGEST_NS, DIGITS)
                .map_err(|error| prometheus::Error::Msg(error.to_string()))?;
            slots.push_back(slot);
        }
        let window = Window { slots, newest_began_ms: clock::monotonic_ms(), count: 0, sum_seconds: 0.0 };
        Ok(Summary(Arc::new(Inner { desc, window: Mutex::new(window) })))
    }

    /// Adds one sample.
    pub(super) fn observe(&self, took: Duration) {
        self.lock().record(clock::monotonic_ms(), took);
    }

    fn lock(&self) -> MutexGuard<'_, Window> {
        // Counters stay usable whatever happened to the thread that held them.
        self.0.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Window {
    fn record(&mut self, now_ms: u64, took: Duration) {
        self.advance(now_ms);
        self.count = self.count.saturating_add(1);
        self.sum_seconds += took.as_secs_f64();
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        if let Some(newest) = self.slots.back_mut() {
            newest.saturating_record(nanos);
        }
    }

    /// Empties the slots that have left the window.
    fn advance(&mut self, now_ms: u64) {
        let passed = now_ms.saturating_sub(self.newest_began_ms) / SLOT_MS;
        for _ in 0..passed.min(SLOTS as u64) {
            if let Some(mut oldest) = self.slots.pop_front() {
                oldest.reset();
                self.slots.push_back(oldest);
            }
        }
        self.newest_began_ms = self.newest_began_ms.saturating_add(passed.saturating_mul(SLOT_MS));
    }

    /// Seconds at each of [`QUANTILES`]; not a number when the window has no sample, as Prometheus has it.
    fn quantiles(&mut self, now_ms: u64) -> Vec<(f64, f64)> {
        self.advance(now_ms);
        let mut slots = self.slots.iter();
        let mut merged = slots.next().cloned();
        for slot in slots {
            // All slots have the same bounds, so that adding cannot fail; if it did, no figure is
            // better than one that leaves samples out.
            merged = merged.and_then(|mut sum| sum.add(slot).ok().map(|()| sum));
        }
        let merged = merged.filter(|merged| !merged.is_empty());
        let seconds = |quantile| match &merged {
            Some(merged) => merged.value_at_quantile(quantile) as f64 / 1e9,
            None => f64::NAN,
        };
        QUANTILES.iter().map(|quantile| (*quantile, seconds(*quantile))).collect()
    }
}

impl Collector for Summary {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.0.desc]
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        let mut summary = proto::Summary::default();
        {
            let mut window = self.lock();
            let quantiles = window.quantiles(clock::monotonic_ms());
            summary.set_sample_count(window.count);
            summary.set_sample_sum(window.sum_seconds);
            summary.set_quantile(quantiles.into_iter().map(|(quantile, value)| shown(quantile, value)).collect());
        }
        let mut metric = proto::Metric::from_label(Vec::new());
        metric.set_summary(summary);
        let mut family = proto::MetricFamily::default();
        family.set_name(self.0.desc.fq_name.clone());
        family.set_help(self.0.desc.help.clone());
        family.set_field_type(proto::MetricType::SUMMARY);
        family.set_metric(vec![metric]);
        vec![family]
    }
}

fn shown(quantile: f64, value: f64) -> proto::Quantile {
    let mut shown = proto::Quantile::default();
    shown.set_quantile(quantile);
    shown.set_value(value);
    shown
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    fn window() -> Window {
        let summary = Summary::new("test_seconds", "A test.").unwrap();
        let inner = Arc::into_inner(summary.0).unwrap();
        Window { newest_began_ms: 0, ..inner.window.into_inner().unwrap() }
    }

    fn close(found: f64, expected: f64) -> bool {
        (found - expected).abs() <= expected * 0.02
    }

    #[test]
    fn quantiles_are_those_of_the_samples() {
        let mut window = window();
        for ms in 1..=1000 {
            window.record(0, Duration::from_millis(ms));
        }
        let quantiles = window.quantiles(0);
        for (quantile, seconds) in &quantiles {
            assert!(close(*seconds, *quantile), "{quantile}: {seconds}");
        }
        assert_eq!(window.count, 1000);
        assert!(close(window.sum_seconds, 500.5));
    }

    #[test]
    fn samples_leave_the_quantiles_but_not_the_sum() {
        let mut window = window();
        window.record(0, Duration::from_secs(9));
        for now_ms in [SLOT_MS, 2 * SLOT_MS, (SLOTS as u64) * SLOT_MS - 1] {
            assert!(close(window.quantiles(now_ms)[2].1, 9.0), "at {now_ms} ms the sample is inside");
        }
        let after = (SLOTS as u64) * SLOT_MS;
        assert!(window.quantiles(after)[2].1.is_nan(), "an empty window has no quantile");
        window.record(after, Duration::from_millis(1));
        assert!(close(window.quantiles(after)[2].1, 0.001));
        assert_eq!(window.count, 2);
    }

    #[test]
    fn a_long_silence_and_odd_durations_do_no_harm() {
        let mut window = window();
        window.record(0, Duration::ZERO);
        window.record(u64::MAX, Duration::MAX);
        assert!(close(window.quantiles(u64::MAX)[0].1, 600.0));
        window.record(5, Duration::from_nanos(1));
        assert_eq!(window.count, 3);
    }
}
