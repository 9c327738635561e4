//! Figures of the node as a whole: its place in the cluster, the commands on their way, the requests.

use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec};

use super::Metrics;
use super::register::Register;
use super::wal::gauge;

/// From a cached read to the request deadline, seconds.
const REQUEST_BUCKETS: [f64; 11] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.0, 10.0];

/// Doublings, from a lonely command to the largest entry.
const COMMANDS_BUCKETS: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0];

pub(super) struct ServiceMetrics {
    raft_term: IntGauge,
    raft_is_leader: IntGauge,
    raft_has_leader: IntGauge,
    out_of_traffic: IntGauge,
    raft_last_log_index: IntGauge,
    raft_applied_index: IntGauge,
    commands_per_entry: Histogram,
    parked_commands: IntGauge,
    parked_bytes: IntGauge,
    requests: IntCounterVec,
    request_duration: HistogramVec,
    disk_state: IntGaugeVec,
}

/// The states of a disk, as in `/v1/health`.
pub const DISK_STATES: [&str; 7] = [DISK_OK, "slow", "full", "stalled", "failed", "rebuilding", "fenced"];
const DISK_OK: &str = "ok";

/// This node's place in the cluster at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RaftFigures {
    /// The current term.
    pub term: u64,
    /// Whether this node leads.
    pub is_leader: bool,
    /// Whether this node knows a leader.
    pub has_leader: bool,
    /// Whether this node is draining or drained.
    pub out_of_traffic: bool,
    /// Index of the last entry of the local log; 0 before the first.
    pub last_log_index: u64,
    /// Log index of the last applied entry; 0 before the first.
    pub applied_index: u64,
}

impl ServiceMetrics {
    pub(super) fn new(register: &mut Register) -> Self {
        let disk_state =
            register.gauges("stemedb_disk_state", "1 for the state that the disk is in, 0 for the others.", &["state"]);
        for state in DISK_STATES {
            disk_state.with_label_values(&[state]).set(i64::from(state == DISK_OK));
        }
        ServiceMetrics {
            disk_state,
            raft_term: register.gauge("stemedb_raft_term", "The current term."),
            raft_is_leader: register.gauge("stemedb_raft_is_leader", "1 while this node leads, else 0."),
            raft_has_leader: register.gauge("stemedb_raft_has_leader", "1 while this node knows a leader, else 0."),
            out_of_traffic: register
                .gauge("stemedb_out_of_traffic", "1 while this node is draining or drained, else 0."),
            raft_last_log_index: register
                .gauge("stemedb_raft_last_log_index", "Index of the last entry of the local log."),
            raft_applied_index: register.gauge("stemedb_raft_applied_index", "Log index of the last applied entry."),
            commands_per_entry: register.histogram(
                "stemedb_proposer_commands_per_entry",
                "Commands packed into one log entry by this node as the leader.",
                &COMMANDS_BUCKETS,
            ),
            parked_commands: register
                .gauge("stemedb_parked_commands", "Commands that wait for a leader or for their commit."),
            parked_bytes: register
                .gauge("stemedb_parked_bytes", "Bytes of the commands that wait for a leader or for their commit."),
            requests: register.counters(
                "stemedb_http_requests_total",
                "HTTP requests answered, by route and status.",
                &["route", "status"],
            ),
            request_duration: register.histograms(
                "stemedb_http_request_duration_seconds",
                "Time from a request's header to its answer's, by route.",
                &REQUEST_BUCKETS,
                &["route"],
            ),
        }
    }
}

impl Metrics {
    /// This node's place in the cluster.
    pub fn set_raft(&self, raft: RaftFigures) {
        let service = &self.service;
        service.raft_term.set(gauge(raft.term));
        service.raft_is_leader.set(i64::from(raft.is_leader));
        service.raft_has_leader.set(i64::from(raft.has_leader));
        service.out_of_traffic.set(i64::from(raft.out_of_traffic));
        service.raft_last_log_index.set(gauge(raft.last_log_index));
        service.raft_applied_index.set(gauge(raft.applied_index));
    }

    /// The disk is in this state, one of [`DISK_STATES`].
    pub fn set_disk_state(&self, state: &str) {
        for known in DISK_STATES {
            self.service.disk_state.with_label_values(&[known]).set(i64::from(known == state));
        }
    }

    /// The proposer packed this many commands into one entry.
    pub fn entry_proposed(&self, commands: usize) {
        self.service.commands_per_entry.observe(commands as f64);
    }

    /// What waits for a leader or for its commit now.
    pub fn set_parked(&self, commands: usize, bytes: usize) {
        self.service.parked_commands.set(gauge(commands as u64));
        self.service.parked_bytes.set(gauge(bytes as u64));
    }

    /// A request was answered. `route` is the route's pattern, never the request's path: each
    /// distinct text stays in memory for ever.
    pub fn http_request(&self, route: &str, status: u16, took: Duration) {
        self.service.requests.with_label_values(&[route, &status.to_string()]).inc();
        self.service.request_duration.with_label_values(&[route]).observe(took.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::value;

    #[test]
    fn figures_arrive_under_their_names() {
        let metrics = Metrics::new();
        metrics.set_raft(RaftFigures {
            term: 3,
            is_leader: true,
            has_leader: true,
            out_of_traffic: true,
            last_log_index: 9,
            applied_index: 8,
        });
        metrics.set_parked(2, 300);
        assert_eq!(value(&metrics, "stemedb_disk_state{state=\"ok\"}"), 1.0);
        metrics.set_disk_state("stalled");
        metrics.entry_proposed(5);
        metrics.http_request("/v1/assertions/{id}", 404, Duration::from_millis(1));
        for (name, expected) in [
            ("stemedb_raft_term", 3.0),
            ("stemedb_raft_is_leader", 1.0),
            ("stemedb_raft_has_leader", 1.0),
            ("stemedb_out_of_traffic", 1.0),
            ("stemedb_raft_last_log_index", 9.0),
            ("stemedb_raft_applied_index", 8.0),
            ("stemedb_disk_state{state=\"ok\"}", 0.0),
            ("stemedb_disk_state{state=\"stalled\"}", 1.0),
            ("stemedb_parked_commands", 2.0),
            ("stemedb_parked_bytes", 300.0),
            ("stemedb_proposer_commands_per_entry_sum", 5.0),
            ("stemedb_http_requests_total{route=\"/v1/assertions/{id}\",status=\"404\"}", 1.0),
            ("stemedb_http_request_duration_seconds_count{route=\"/v1/assertions/{id}\"}", 1.0),
        ] {
            assert_eq!(value(&metrics, name), expected, "{name}");
        }
    }
}
