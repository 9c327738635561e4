//! The tree's figures.
//!
//! What happens often arrives through the observer; sizes and totals that the tree keeps anyway are
//! put in just before a scrape with [`Metrics::set_tree`].

use std::time::Duration;

use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::Metrics;
use super::observers::EngineObserver;
use super::register::Register;
use super::summary::Summary;
use super::wal::gauge;
use crate::node::space::Space;
use crate::state::engine::scrub::ScrubObserver;
use crate::state::engine::{EngineError, TreeDamage};

/// The operations the tree counts. Each has its series from the first scrape on.
const OPERATIONS: [&str; 7] = ["put", "get", "scan", "flush", "compact", "checkpoint", "open"];

/// The operations that meet damage.
const DAMAGE_OPERATIONS: [&str; 7] = ["get", "scan", "compact", "checkpoint", "open", "apply", "scrub"];

/// What is scrubbed.
const SCRUB_KINDS: [&str; 3] = ["tree", "checkpoint", "wal"];
/// The states of a disk, the good one first. Each has its series from the first scrape on.
const DISK_STATES: [&str; 3] = ["ok", "full", "failed"];

/// From a small flush-sized merge to a full compaction of a large tree, seconds.
const COMPACTION_BUCKETS: [f64; 10] = [0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0];

pub(super) struct StorageMetrics {
    operations: IntCounterVec,
    operation_errors: IntCounterVec,
    put_duration: Summary,
    lock_wait: Summary,
    write_amplification: Gauge,
    compaction_duration: Histogram,
    pending_compaction_bytes: IntGauge,
    sst_files: IntGauge,
    bytes: IntGauge,
    level0_runs: IntGauge,
    sealed_memtables: IntGauge,
    compaction_progress: Gauge,
    compaction_runs: IntCounter,
    compaction_failures: IntCounter,
    compaction_written_bytes: IntCounter,
    assertions_indexed: IntCounter,
    damage: IntCounterVec,
    scrub_bytes: IntCounter,
    scrub_damaged: IntCounterVec,
    scrub_last_complete: IntGauge,
    scrub_progress: Gauge,
    disk_free_bytes: IntGauge,
    disk_free_inodes: IntGauge,
    disk_low_water_bytes: IntGauge,
    disk_ballast_bytes: IntGauge,
    disk_state: IntGaugeVec,
}

/// What the tree knows about itself at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TreeFigures {
    /// Table files.
    pub sst_files: u64,
    /// Bytes of all table files.
    pub bytes: u64,
    /// Bytes that the compactions due now would read.
    pub pending_compaction_bytes: u64,
    /// Runs in level 0: reads look into each, and many slow writes down.
    pub level0_runs: u64,
    /// Memtables that wait to be flushed: many slow writes down.
    pub sealed_memtables: u64,
    /// Bytes that flushes wrote since the process started.
    pub flushed_bytes_total: u64,
    /// Bytes that compactions wrote since the process started.
    pub compaction_written_bytes_total: u64,
}

impl StorageMetrics {
    pub(super) fn new(register: &mut Register) -> Self {
        let metrics = StorageMetrics {
            operations: register.counters(
                "stemedb_storage_operations_total",
                "Operations of the tree that ended, well or not. Reads are counted only when they fail.",
                &["operation"],
            ),
            operation_errors: register.counters(
                "stemedb_storage_operation_errors_total",
                "Operations of the tree that failed.",
                &["operation"],
            ),
            put_duration: register.summary(
                "stemedb_storage_put_duration_seconds",
                "Duration of writing one batch (one log entry) into the tree; quantiles of the last minute.",
            ),
            lock_wait: register.summary(
                "stemedb_lock_wait_duration_seconds",
                "Waits for the data folder's lock and for room in the tree; quantiles of the last minute.",
            ),
            write_amplification: register.ratio(
                "stemedb_storage_write_amplification",
                "Bytes the tree wrote per byte flushed, since the start; 0 before the first flush.",
            ),
            compaction_duration: register.histogram(
                "stemedb_lsm_compaction_duration_seconds",
                "Duration of a compaction.",
                &COMPACTION_BUCKETS,
            ),
            pending_compaction_bytes: register
                .gauge("stemedb_lsm_pending_compaction_bytes", "Bytes that the compactions due now would read."),
            sst_files: register.gauge("stemedb_lsm_sst_files", "Table files of the tree."),
            bytes: register.gauge("stemedb_lsm_bytes", "Bytes of the tree's table files."),
            level0_runs: register.gauge("stemedb_lsm_level0_runs", "Runs in level 0 of the tree."),
            sealed_memtables: register.gauge("stemedb_lsm_sealed_memtables", "Memtables that wait to be flushed."),
            compaction_progress: register.ratio(
                "stemedb_compaction_progress",
                "Part of the tree's bytes that no due compaction has to rewrite: 1 when all is done.",
            ),
            compaction_runs: register.counter("stemedb_compaction_runs_total", "Compactions that ended well."),
            compaction_failures: register.counter("stemedb_compaction_failures_total", "Compactions that failed."),
            compaction_written_bytes: register
                .counter("stemedb_compaction_written_bytes_total", "Bytes that compactions wrote since the start."),
            assertions_indexed: register
                .counter("stemedb_assertions_indexed_total", "Assertions in the applied state of this node."),
            damage: register.counters(
                "stemedb_storage_damage_total",
                "Times that data of the tree was not what was written, by the operation that met it.",
                &["operation"],
            ),
            scrub_bytes: register.counter("stemedb_scrub_bytes_total", "Bytes that the scrubber read."),
            scrub_damaged: register.counters(
                "stemedb_scrub_damaged_total",
                "Files that the scrubber found damaged, by what they are part of.",
                &["kind"],
            ),
            scrub_last_complete: register.gauge(
                "stemedb_scrub_last_complete_timestamp_seconds",
                "When the scrubber last came through everything, Unix seconds; 0: never.",
            ),
            scrub_progress: register.ratio(
                "stemedb_scrub_progress",
                "Part of the scrubber's pass that is done, by bytes; 1 between passes.",
            ),
            disk_free_bytes: register
                .gauge("stemedb_disk_free_bytes", "Bytes that may still be written on the disk of the data folder."),
            disk_free_inodes: register.gauge(
                "stemedb_disk_free_inodes",
                "Files that may still be made there; -1 where the file system has no such number.",
            ),
            disk_low_water_bytes: register
                .gauge("stemedb_disk_low_water_bytes", "Free bytes below which writes of clients are refused."),
            disk_ballast_bytes: register
                .gauge("stemedb_disk_ballast_bytes", "Bytes kept by the file ballast for a full disk."),
            disk_state: register.gauges(
                "stemedb_disk_state",
                "1 for the state that the disk of the data folder is in, 0 for the others.",
                &["state"],
            ),
        };
        for state in DISK_STATES {
            metrics.disk_state.with_label_values(&[state]).set(i64::from(state == DISK_STATES[0]));
        }
        for operation in OPERATIONS {
            metrics.operations.with_label_values(&[operation]).inc_by(0);
            metrics.operation_errors.with_label_values(&[operation]).inc_by(0);
        }
        for operation in DAMAGE_OPERATIONS {
            metrics.damage.with_label_values(&[operation]).inc_by(0);
        }
        for kind in SCRUB_KINDS {
            metrics.scrub_damaged.with_label_values(&[kind]).inc_by(0);
        }
        metrics.compaction_progress.set(1.0);
        metrics
    }
}

impl Metrics {
    /// What there is on the disk of the data folder.
    pub fn set_space(&self, space: &Space, ballast_bytes: u64, low_water_bytes: u64) {
        let storage = &self.storage;
        storage.disk_free_bytes.set(gauge(space.bytes_free));
        storage.disk_free_inodes.set(if space.inodes_total == 0 { -1 } else { gauge(space.inodes_free) });
        storage.disk_ballast_bytes.set(gauge(ballast_bytes));
        storage.disk_low_water_bytes.set(gauge(low_water_bytes));
    }

    /// The state of the disk, by its word in `/v1/health`.
    pub fn set_disk_state(&self, state: &str) {
        for known in DISK_STATES {
            self.storage.disk_state.with_label_values(&[known]).set(i64::from(known == state));
        }
    }

    /// What the tree knows about itself, put in before a scrape.
    pub fn set_tree(&self, tree: TreeFigures) {
        let storage = &self.storage;
        storage.sst_files.set(gauge(tree.sst_files));
        storage.bytes.set(gauge(tree.bytes));
        storage.pending_compaction_bytes.set(gauge(tree.pending_compaction_bytes));
        storage.level0_runs.set(gauge(tree.level0_runs));
        storage.sealed_memtables.set(gauge(tree.sealed_memtables));
        let done = match tree.bytes {
            0 => 1.0,
            bytes => 1.0 - tree.pending_compaction_bytes.min(bytes) as f64 / bytes as f64,
        };
        storage.compaction_progress.set(done);
        raise(&storage.compaction_written_bytes, tree.compaction_written_bytes_total);
        let written = tree.flushed_bytes_total.saturating_add(tree.compaction_written_bytes_total);
        let amplification = match tree.flushed_bytes_total {
            0 => 0.0,
            flushed => written as f64 / flushed as f64,
        };
        storage.write_amplification.set(amplification);
    }

    /// Assertions in the applied state. A smaller number than before is passed over: a counter never falls
    /// while the process lives.
    pub fn set_assertions_indexed(&self, total: u64) {
        raise(&self.storage.assertions_indexed, total);
    }

    /// The start waited this long for the data folder's lock, or a write for room in the tree.
    pub fn lock_waited(&self, took: Duration) {
        self.storage.lock_wait.observe(took);
    }
}

impl EngineObserver for Metrics {
    fn operation_done(&self, operation: &'static str, took: Duration) {
        self.storage.operations.with_label_values(&[operation]).inc();
        match operation {
            "put" => self.storage.put_duration.observe(took),
            "compact" => {
                self.storage.compaction_runs.inc();
                self.storage.compaction_duration.observe(took.as_secs_f64());
            }
            _ => {}
        }
    }

    /// Counts; the engine's caller, who handles the error, logs it.
    fn operation_failed(&self, operation: &'static str, _error: &EngineError) {
        self.storage.operations.with_label_values(&[operation]).inc();
        self.storage.operation_errors.with_label_values(&[operation]).inc();
        if operation == "compact" {
            self.storage.compaction_failures.inc();
        }
    }

    fn damage_found(&self, damage: &TreeDamage) {
        self.storage.damage.with_label_values(&[damage.operation]).inc();
    }
}

impl ScrubObserver for Metrics {
    fn bytes_read(&self, bytes: u64) {
        self.storage.scrub_bytes.inc_by(bytes);
    }

    fn damaged(&self, kind: &'static str) {
        self.storage.scrub_damaged.with_label_values(&[kind]).inc();
    }

    fn progress(&self, part: f64) {
        self.storage.scrub_progress.set(part);
    }

    fn pass_done(&self, at_unix_ms: u64) {
        self.storage.scrub_last_complete.set(gauge(at_unix_ms / 1000));
        self.storage.scrub_progress.set(1.0);
    }
}

/// Brings a counter up to a total that somebody else keeps.
fn raise(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::value;

    #[test]
    fn errors_have_their_denominator() {
        let metrics = Metrics::new();
        let error = EngineError::Damaged { operation: "get", file: None, what: "a test".into() };
        metrics.operation_done("put", Duration::from_millis(2));
        metrics.operation_failed("put", &error);
        metrics.operation_failed("get", &error);
        assert_eq!(value(&metrics, "stemedb_storage_operations_total{operation=\"put\"}"), 2.0);
        assert_eq!(value(&metrics, "stemedb_storage_operation_errors_total{operation=\"put\"}"), 1.0);
        assert_eq!(value(&metrics, "stemedb_storage_operations_total{operation=\"get\"}"), 1.0);
        assert_eq!(value(&metrics, "stemedb_storage_put_duration_seconds_count"), 1.0);
    }

    #[test]
    fn damage_and_the_scrubber_have_their_figures() {
        let metrics = Metrics::new();
        let damage = TreeDamage { file: None, what: "a test".into(), operation: "scan", tree: "kv/g1".into() };
        metrics.damage_found(&damage);
        metrics.bytes_read(4096);
        ScrubObserver::damaged(&metrics, "checkpoint");
        metrics.progress(0.25);
        assert_eq!(value(&metrics, "stemedb_storage_damage_total{operation=\"scan\"}"), 1.0);
        assert_eq!(value(&metrics, "stemedb_storage_damage_total{operation=\"get\"}"), 0.0);
        assert_eq!(value(&metrics, "stemedb_scrub_bytes_total"), 4096.0);
        assert_eq!(value(&metrics, "stemedb_scrub_damaged_total{kind=\"checkpoint\"}"), 1.0);
        assert_eq!(value(&metrics, "stemedb_scrub_progress"), 0.25);
        metrics.pass_done(1_763_727_890_123);
        assert_eq!(value(&metrics, "stemedb_scrub_last_complete_timestamp_seconds"), 1_763_727_890.0);
        assert_eq!(value(&metrics, "stemedb_scrub_progress"), 1.0);
    }

    #[test]
    fn write_amplification_is_bytes_written_per_byte_flushed() {
        let metrics = Metrics::new();
        assert_eq!(value(&metrics, "stemedb_storage_write_amplification"), 0.0);
        let tree = TreeFigures {
            flushed_bytes_total: 100,
            compaction_written_bytes_total: 150,
            bytes: 40,
            pending_compaction_bytes: 20,
            ..TreeFigures::default()
        };
        metrics.set_tree(tree);
        assert_eq!(value(&metrics, "stemedb_storage_write_amplification"), 2.5);
        assert_eq!(value(&metrics, "stemedb_compaction_progress"), 0.5);
        metrics.set_tree(TreeFigures { pending_compaction_bytes: 0, ..tree });
        assert_eq!(value(&metrics, "stemedb_compaction_progress"), 1.0);
        assert_eq!(value(&metrics, "stemedb_compaction_written_bytes_total"), 150.0);
    }

    #[test]
    fn the_number_of_assertions_never_falls() {
        let metrics = Metrics::new();
        for (given, shown) in [(7, 7.0), (5, 7.0), (9, 9.0)] {
            metrics.set_assertions_indexed(given);
            assert_eq!(value(&metrics, "stemedb_assertions_indexed_total"), shown);
        }
    }
}
