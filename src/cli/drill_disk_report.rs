//! The figures of drills of disks: one row per round.

use serde::Serialize;

use super::drill_report::{RoundReport, Times};
use super::output;

/// What one round showed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DiskRound {
    /// From 1.
    pub round: usize,
    /// The leader whose disk was broken.
    pub victim: String,
    /// Who leads at the end of the round.
    pub new_leader: String,
    /// Terms that passed.
    pub terms: u64,
    /// From the laying of the fault to the first operation of the disk that met it, milliseconds.
    pub hit_after_ms: u64,
    /// Whether writes were acknowledged again while the fault lasted.
    pub served_again: bool,
    /// Longest time without an acknowledged write around the fault, microseconds.
    pub gap_us: u64,
    /// From the laying of the fault to the beginning of that time, milliseconds; less than 0 before it.
    pub gap_after_ms: i64,
    /// The same while the node came back.
    pub rejoin_gap_us: u64,
    /// Requests that ended in anything but success; of a node that was fenced or restarted, those before it.
    pub errors: u64,
    /// Writes acknowledged in this round.
    pub acknowledged: u64,
    /// Writes begun after the failed fsync that the failed node committed as leader before it was healthy again.
    pub served_after: u64,
    /// fsync: failed fsyncs by the node's own metrics.
    pub fsync_errors: Option<u64>,
    /// Writes to the failed segment after its failed sync had returned, by the disk's log.
    pub segment_writes_after: u64,
    /// Syncs of that segment after it, by the kernel's tracepoints; absent where they cannot be had.
    pub segment_syncs_after: Option<u64>,
    /// stall: from the beginning of the hang until both listeners refused connections, milliseconds.
    pub fenced_ms: Option<u64>,
    /// stall: whether a listener accepted after that.
    pub accepts_after_fence: bool,
    /// What the node said about its disk, with each change.
    pub states: Vec<StateSeen>,
    /// How it came back.
    pub rejoined: &'static str,
    /// From the lifting of the fault until all nodes voted and were healthy, milliseconds.
    pub rejoin_ms: u64,
    /// Nodes that voted and were healthy at the end.
    pub healthy_voters: usize,
    /// Nodes that answered a linearizable read at the end of the round.
    pub readable_nodes: usize,
    /// When it was.
    pub times: Times,
}

/// A node's word about its disk.
#[derive(Clone, Debug, Serialize)]
pub struct StateSeen {
    /// Milliseconds after the fault; less than 0 before it.
    pub after_ms: i64,
    /// The state.
    pub state: String,
}

impl RoundReport for DiskRound {
    const HEAD: &'static [&'static str] = &[
        "ROUND",
        "DISK OF",
        "GAP ms",
        "FROM ms",
        "ERRORS",
        "SERVED AFTER",
        "FSYNC ERRORS",
        "WRITES/SYNCS AFTER",
        "FENCED ms",
        "NEW LEADER",
        "WRITES",
        "BACK ms",
        "HOW",
        "GAP THEN ms",
    ];

    fn row(&self) -> Vec<String> {
        let or_dash = |figure: Option<u64>| figure.map_or_else(|| "-".to_owned(), |figure| figure.to_string());
        vec![
            self.round.to_string(),
            self.victim.clone(),
            output::ms(self.gap_us),
            self.gap_after_ms.to_string(),
            self.errors.to_string(),
            self.served_after.to_string(),
            or_dash(self.fsync_errors),
            format!("{}/{}", self.segment_writes_after, or_dash(self.segment_syncs_after)),
            or_dash(self.fenced_ms),
            self.new_leader.clone(),
            output::thousands(self.acknowledged),
            self.rejoin_ms.to_string(),
            self.rejoined.to_owned(),
            output::ms(self.rejoin_gap_us),
        ]
    }

    fn progress(&self) -> String {
        let states: Vec<String> =
            self.states.iter().map(|seen| format!("{} at {} ms", seen.state, seen.after_ms)).collect();
        format!(
            "disk of {}, gap {} ms from {} ms on, {} errors, {} leads, {} in {} ms, {} healthy voters ({})",
            self.victim,
            output::ms(self.gap_us),
            self.gap_after_ms,
            self.errors,
            self.new_leader,
            self.rejoined,
            self.rejoin_ms,
            self.healthy_voters,
            states.join(", "),
        )
    }

    fn gap_us(&self) -> Option<u64> {
        Some(self.gap_us)
    }

    fn times(&self) -> &Times {
        &self.times
    }

    fn problem(&self) -> Option<String> {
        let mut found = Vec::new();
        if !self.served_again {
            found.push("no write was acknowledged while the fault lasted".to_owned());
        }
        if self.served_after > 0 {
            found.push(format!("{} writes were committed by the failed node afterwards", self.served_after));
        }
        if self.fsync_errors.is_some_and(|errors| errors != 1) {
            found.push(format!("the node counts {} failed fsyncs instead of 1", self.fsync_errors.unwrap_or(0)));
        }
        if self.segment_writes_after > 0 {
            found.push(format!("{} writes went to the failed segment after the error", self.segment_writes_after));
        }
        if let Some(syncs) = self.segment_syncs_after.filter(|syncs| *syncs > 0) {
            found.push(format!("the failed segment was synced {syncs} more times after the error"));
        }
        if self.accepts_after_fence {
            found.push("the fenced node accepted connections again".to_owned());
        }
        let is_stall = self.fsync_errors.is_none();
        if is_stall && self.fenced_ms.is_none() {
            found.push("the node whose disk hung was never fenced".to_owned());
        }
        if self.rejoined.starts_with("did not") {
            found.push("the node did not rebuild itself in time".to_owned());
        }
        if self.healthy_voters < 3 {
            found.push(format!("{} healthy voters at the end", self.healthy_voters));
        }
        (!found.is_empty()).then(|| format!("round {}: {}", self.round, found.join("; ")))
    }
}
