//! Memory, file descriptors and start time of this process, read from `/proc` at each scrape, and the lines left out of
//! its log.
//!
//! A value that cannot be read is left out of that scrape rather than reported as 0.

use std::collections::HashMap;

use prometheus::Opts;
use prometheus::core::{Collector, Desc};
use prometheus::proto;

use crate::{clock, logging};

/// Name, help, and how it is read.
type Gauge = (&'static str, &'static str, fn(&Process) -> Option<f64>);

/// What is reported.
const GAUGES: [Gauge; 4] = [
    ("process_resident_memory_bytes", "Resident memory of the process.", |_| resident_bytes()),
    ("process_open_fds", "Open file descriptors.", |_| open_descriptors()),
    ("process_max_fds", "Most file descriptors the process may open.", |_| descriptors_max()),
    ("process_start_time_seconds", "When the process started, in seconds since 1970.", |process| {
        Some(process.started_unix_ms as f64 / 1e3)
    }),
];

/// Name and help of the lines that were left out.
const SUPPRESSED: (&str, &str) = (
    "stemedb_log_lines_suppressed_total",
    "Log lines of libraries that were left out because the same place had just said as much.",
);

/// The collector.
pub(super) struct Process {
    descs: Vec<Desc>,
    started_unix_ms: u64,
}

impl Process {
    /// # Errors
    /// Never in practice: the names are constants.
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let desc = |(name, help)| {
            let opts = Opts::new(name, help);
            Desc::new(opts.fq_name(), opts.help, Vec::new(), HashMap::new())
        };
        let gauges = GAUGES.iter().map(|(name, help, _)| (*name, *help));
        let descs = gauges.chain([SUPPRESSED]).map(desc).collect::<Result<_, _>>()?;
        Ok(Process { descs, started_unix_ms: clock::unix_ms() })
    }

    /// The names it reports.
    pub(super) fn names() -> impl Iterator<Item = &'static str> {
        GAUGES.iter().map(|(name, _, _)| *name).chain([SUPPRESSED.0])
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<proto::MetricFamily> {
        let gauge = |(name, help, read): &Gauge| {
            let mut gauge = proto::Gauge::default();
            gauge.set_value(read(self)?);
            let mut metric = proto::Metric::from_label(Vec::new());
            metric.set_gauge(gauge);
            Some(family(name, help, proto::MetricType::GAUGE, metric))
        };
        let mut families: Vec<_> = GAUGES.iter().filter_map(gauge).collect();
        let mut counter = proto::Counter::default();
        counter.set_value(logging::suppressed_total() as f64);
        let mut metric = proto::Metric::from_label(Vec::new());
        metric.set_counter(counter);
        families.push(family(SUPPRESSED.0, SUPPRESSED.1, proto::MetricType::COUNTER, metric));
        families
    }
}

fn family(name: &str, help: &str, kind: proto::MetricType, metric: proto::Metric) -> proto::MetricFamily {
    let mut family = proto::MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(vec![metric]);
    family
}

fn resident_bytes() -> Option<f64> {
    resident_in(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// `VmRSS:     1234 kB` of `/proc/self/status`, in bytes.
fn resident_in(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib.saturating_mul(1024) as f64)
}

fn open_descriptors() -> Option<f64> {
    // The listing itself holds one descriptor open.
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as f64)
}

fn descriptors_max() -> Option<f64> {
    limit_in(&std::fs::read_to_string("/proc/self/limits").ok()?)
}

/// The soft limit in `Max open files            1024                 4096                 files`.
fn limit_in(limits: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|limit| limit as f64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_kernels_files_are_understood() {
        assert_eq!(resident_in("Name:\tx\nVmRSS:\t    1234 kB\n"), Some(1_263_616.0));
        assert_eq!(
            limit_in("Max open files            1024                 4096                 files\n"),
            Some(1024.0)
        );
        assert_eq!(limit_in("Max open files            unlimited            unlimited            files\n"), None);
        for odd in ["", "VmRSS:", "VmRSS: many kB", "VmRSS: 1 MB"] {
            assert_eq!(resident_in(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn this_process_has_all_of_them() {
        let families = Process::new().unwrap().collect();
        assert_eq!(families.len(), GAUGES.len() + 1);
        assert!(families.iter().take(GAUGES.len()).all(|family| family.get_metric()[0].get_gauge().get_value() > 0.0));
    }
}
