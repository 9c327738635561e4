//! The figures that operators and alert rules read from `GET /metrics`.
//!
//! One [`Metrics`] per process. The log and the tree tell it about their work through observers,
//! the node puts in the rest; sizes that somebody keeps anyway are fetched by a hook just before a
//! scrape. Every name that a runbook greps for has a line from the first scrape on. Nothing here
//! decides anything, and nothing here can fail a request.

mod disk;
pub mod observers;
mod process;
mod rebuild;
mod register;
mod service;
mod storage;
mod summary;
mod wal;

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{Registry, TextEncoder};

pub use rebuild::RebuildFigures;
pub use service::{DISK_STATES, RaftFigures};
pub use storage::TreeFigures;

use disk::DiskMetrics;
use process::Process;
use rebuild::RebuildMetrics;
use register::Register;
use service::ServiceMetrics;
use storage::StorageMetrics;
use wal::WalMetrics;

/// Every figure of this process. Share it in an `Arc`.
pub struct Metrics {
    registry: Registry,
    names: Vec<&'static str>,
    wal: WalMetrics,
    storage: StorageMetrics,
    disk: DiskMetrics,
    service: ServiceMetrics,
    rebuild: RebuildMetrics,
    before_scrape: Mutex<Option<Hook>>,
}

type Hook = Arc<dyn Fn(&Metrics) + Send + Sync>;

impl Metrics {
    /// All figures at their first value, with a line each.
    pub fn new() -> Metrics {
        let mut register = Register::new();
        let wal = WalMetrics::new(&mut register);
        let storage = StorageMetrics::new(&mut register);
        let disk = DiskMetrics::new(&mut register);
        let service = ServiceMetrics::new(&mut register);
        let rebuild = RebuildMetrics::new(&mut register);
        register
            .gauges("stemedb_build_info", "Version of the program; always 1.", &["version"])
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        register.collector(Process::names(), Process::new());
        let Register { registry, names } = register;
        Metrics { registry, names, wal, storage, disk, service, rebuild, before_scrape: Mutex::new(None) }
    }

    /// Runs `hook` at the beginning of each scrape; it may call the `set_…` functions and must not
    /// block. A second hook replaces the first. Hold the node weakly in it: the node holds this.
    pub fn before_scrape(&self, hook: impl Fn(&Metrics) + Send + Sync + 'static) {
        *self.before_scrape.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(hook));
    }

    /// Asks the hook for what changes without a call. It may read the disk.
    pub fn refresh(&self) {
        let hook = self.before_scrape.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(hook) = hook {
            hook(self);
        }
    }

    /// `refresh`, then `encode`.
    pub fn render(&self) -> String {
        self.refresh();
        self.encode()
    }

    /// Prometheus text, version 0.0.4, of what is known. Never waits for the disk.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if let Err(error) = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text) {
            // What was encoded before is right; the scrape is short by the rest.
            tracing::error!(%error, "the metrics cannot be encoded completely");
        }
        text
    }

    /// The name of every metric, without the `_sum`, `_count` and `_bucket` of its lines.
    pub fn names(&self) -> &[&'static str] {
        &self.names
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::observers::WalObserver;
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    /// The value on the line with this name and these labels.
    pub(crate) fn value(metrics: &Metrics, series: &str) -> f64 {
        let text = metrics.render();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no line {series} in\n{text}")).parse().expect("a number")
    }

    #[test]
    fn every_grep_of_the_runbooks_finds_a_line_at_the_first_scrape() {
        let text = Metrics::new().render();
        for grep in [
            "wal_fsync_errors",
            "wal_fsync_duration",
            "wal_fsync_duration_seconds",
            "wal_fsync_total",
            "storage_operation_errors",
            "compaction_progress",
            "stemedb_compaction_",
            "assertions_indexed_total",
            "lock_wait_duration",
            "stemedb_storage_put_duration",
        ] {
            let found = text.lines().any(|line| !line.starts_with('#') && line.contains(grep));
            assert!(found, "{grep} finds nothing in\n{text}");
        }
    }

    #[test]
    fn every_name_of_the_surface_exists() {
        let metrics = Metrics::new();
        for name in [
            "stemedb_wal_fsync_errors_total",
            "stemedb_wal_fsync_total",
            "stemedb_wal_fsync_duration_seconds",
            "stemedb_wal_segment_rotations_total",
            "stemedb_storage_operations_total",
            "stemedb_storage_operation_errors_total",
            "stemedb_storage_put_duration_seconds",
            "stemedb_storage_write_amplification",
            "stemedb_lsm_compaction_duration_seconds",
            "stemedb_lsm_pending_compaction_bytes",
            "stemedb_compaction_progress",
            "stemedb_assertions_indexed_total",
            "stemedb_lock_wait_duration_seconds",
        ] {
            assert!(metrics.names().contains(&name), "{name}");
        }
    }

    #[test]
    fn the_fsync_summary_has_the_lines_that_the_alerts_read() {
        let metrics = Metrics::new();
        assert!(value(&metrics, "stemedb_wal_fsync_duration_seconds{quantile=\"0.99\"}").is_nan());
        metrics.fsync_done("segment.001.wal", Duration::from_millis(150));
        for quantile in ["0.5", "0.9", "0.99"] {
            let seconds = value(&metrics, &format!("stemedb_wal_fsync_duration_seconds{{quantile=\"{quantile}\"}}"));
            assert!((0.149..0.152).contains(&seconds), "{quantile}: {seconds}");
        }
        assert_eq!(value(&metrics, "stemedb_wal_fsync_duration_seconds_sum"), 0.15);
        assert_eq!(value(&metrics, "stemedb_wal_fsync_duration_seconds_count"), 1.0);
        assert_eq!(value(&metrics, "stemedb_wal_fsync_total"), 1.0);
        metrics.segment_rotated();
        assert_eq!(value(&metrics, "stemedb_wal_segment_rotations_total"), 1.0);
        assert_eq!(value(&metrics, "stemedb_build_info{version=\"0.1.0\"}"), 1.0);
    }

    #[test]
    fn the_hook_runs_before_each_scrape() {
        let metrics = Metrics::new();
        let runs = Arc::new(AtomicU64::new(0));
        let counted = runs.clone();
        metrics.before_scrape(move |metrics| metrics.set_wal(counted.fetch_add(1, Ordering::Relaxed) + 1, 3));
        assert_eq!(value(&metrics, "stemedb_wal_bytes"), 1.0);
        assert_eq!(value(&metrics, "stemedb_wal_bytes"), 2.0);
        assert_eq!(value(&metrics, "stemedb_wal_segments"), 3.0);
    }
}
