//! Figures of a rebuild.

use prometheus::{IntCounter, IntGauge};

use super::Metrics;
use super::register::Register;
use super::wal::gauge;

pub(super) struct RebuildMetrics {
    running: IntGauge,
    waiting: IntGauge,
    bytes_done: IntGauge,
    bytes_total: IntGauge,
    entries_behind: IntGauge,
    finished: IntCounter,
    tree_replaced: IntCounter,
}

/// A rebuild at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RebuildFigures {
    /// Whether one was begun.
    pub running: bool,
    /// Whether it waits for something.
    pub waiting: bool,
    /// Bytes of the checkpoint that are here.
    pub bytes_done: u64,
    /// Bytes of the checkpoint.
    pub bytes_total: u64,
    /// Entries of the leader's log that are missing.
    pub entries_behind: u64,
}

impl RebuildMetrics {
    pub(super) fn new(register: &mut Register) -> Self {
        RebuildMetrics {
            running: register.gauge("stemedb_rebuild_running", "1 while this node is being rebuilt, else 0."),
            waiting: register
                .gauge("stemedb_rebuild_waiting", "1 while the rebuild of this node waits for something, else 0."),
            bytes_done: register.gauge("stemedb_rebuild_bytes_done", "Bytes of the checkpoint that are here."),
            bytes_total: register.gauge(
                "stemedb_rebuild_bytes_total",
                "Bytes of the checkpoint that is being fetched; 0: not known yet.",
            ),
            entries_behind: register
                .gauge("stemedb_rebuild_entries_behind", "Entries of the leader's log that the rebuilt node lacks."),
            finished: register.counter("stemedb_rebuild_finished_total", "Rebuilds of this node that were finished."),
            tree_replaced: register.counter(
                "stemedb_tree_replaced_total",
                "Damaged trees that were replaced by a checkpoint of another node.",
            ),
        }
    }
}

impl Metrics {
    /// The rebuild of the moment.
    pub fn set_rebuild(&self, figures: RebuildFigures) {
        self.rebuild.running.set(i64::from(figures.running));
        self.rebuild.waiting.set(i64::from(figures.waiting));
        self.rebuild.bytes_done.set(gauge(figures.bytes_done));
        self.rebuild.bytes_total.set(gauge(figures.bytes_total));
        self.rebuild.entries_behind.set(gauge(figures.entries_behind));
    }

    /// Its damaged tree was replaced.
    pub fn tree_replaced(&self) {
        self.rebuild.tree_replaced.inc();
    }

    /// This node was rebuilt.
    pub fn rebuild_finished(&self) {
        self.rebuild.finished.inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::value;

    #[test]
    fn a_rebuild_shows_how_far_it_is() {
        let metrics = Metrics::new();
        assert_eq!(value(&metrics, "stemedb_rebuild_running"), 0.0);
        metrics.set_rebuild(RebuildFigures { running: true, bytes_done: 3, bytes_total: 9, ..Default::default() });
        metrics.rebuild_finished();
        assert_eq!(value(&metrics, "stemedb_rebuild_running"), 1.0);
        assert_eq!(value(&metrics, "stemedb_rebuild_bytes_done"), 3.0);
        assert_eq!(value(&metrics, "stemedb_rebuild_finished_total"), 1.0);
    }
}
