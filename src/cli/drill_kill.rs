//! A round of `--kind kill`: the leader is killed, and comes back.

use std::sync::atomic::Ordering;

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::drill_load::Load;
use super::drill_report::{RoundReport, Times};
use super::drill_run::{READY_TIMEOUT, STEADY};
use super::drill_watch::{Down, check_readable, find_leader, survivor_errors, wait_until};
use super::local_cluster::LocalCluster;
use super::{CliError, output};
use crate::judge::longest_gap_touching;

/// What one round showed.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// From 1.
    pub round: usize,
    /// The leader that was killed.
    pub killed: String,
    /// The leader after it, once clients were served again.
    pub new_leader: String,
    /// Its term.
    pub term: u64,
    /// Longest time without an acknowledged write around the kill, microseconds.
    pub gap_us: u64,
    /// Requests to surviving nodes that ended in anything but success.
    pub survivor_errors: u64,
    /// Writes of the killed node's clients that were repeated with their key on another node.
    pub retried: u64,
    /// Writes acknowledged in this round.
    pub acknowledged: u64,
    /// From the restart of the killed node until all nodes were ready, milliseconds.
    pub rejoin_ms: u64,
    /// Longest time without an acknowledged write while it came back, microseconds.
    pub rejoin_gap_us: u64,
    /// Nodes that answered a linearizable read at the end of the round.
    pub readable_nodes: usize,
    /// When it was.
    pub times: Times,
}

impl RoundReport for Round {
    const HEAD: &'static [&'static str] = &[
        "ROUND",
        "KILLED",
        "GAP ms",
        "ERRORS ON SURVIVORS",
        "RETRIED",
        "NEW LEADER",
        "TERM",
        "WRITES",
        "REJOIN ms",
        "GAP THEN ms",
    ];

    fn row(&self) -> Vec<String> {
        vec![
            self.round.to_string(),
            self.killed.clone(),
            output::ms(self.gap_us),
            self.survivor_errors.to_string(),
            self.retried.to_string(),
            self.new_leader.clone(),
            self.term.to_string(),
            output::thousands(self.acknowledged),
            self.rejoin_ms.to_string(),
            output::ms(self.rejoin_gap_us),
        ]
    }

    fn progress(&self) -> String {
        format!(
            "killed {}, gap {} ms, {} leads in term {}, {} retried, {} errors on survivors, rejoined in {} ms",
            self.killed,
            output::ms(self.gap_us),
            self.new_leader,
            self.term,
            self.retried,
            self.survivor_errors,
            self.rejoin_ms,
        )
    }

    fn gap_us(&self) -> Option<u64> {
        Some(self.gap_us)
    }

    fn problem(&self) -> Option<String> {
        None
    }

    fn times(&self) -> &Times {
        &self.times
    }
}

/// Kills the leader, waits until the others serve, starts it again and waits until it has caught up.
pub async fn kill_round(
    cluster: &mut LocalCluster,
    load: &Load,
    round: usize,
    downs: &mut Vec<Down>,
) -> Result<Round, CliError> {
    let round_start_us = load.recorder.now_us();
    let moved_before = load.moved.load(Ordering::Relaxed);
    // A drill, not a test: the kill shall meet a cluster that has been busy for a while.
    sleep(STEADY).await;
    let (leader, before) = find_leader(load, None).await?;
    let killed_us = load.recorder.now_us();
    cluster.kill(leader).await?;
    load.set_up(leader, false);
    // Acknowledgements that were under way at the kill come first; a hundred later ones are the new leader's.
    let acknowledged = load.recorder.acknowledged();
    wait_until("no write was acknowledged after the kill", || load.recorder.acknowledged() >= acknowledged + 100)
        .await?;
    let (new_leader, after) = find_leader(load, Some(before.term)).await?;
    sleep(STEADY).await;
    let restarted = Instant::now();
    let restarted_us = load.recorder.now_us();
    cluster.start(leader)?;
    cluster.wait_ready(READY_TIMEOUT).await?;
    let rejoin_ms = u64::try_from(restarted.elapsed().as_millis()).unwrap_or(u64::MAX);
    let readable_nodes = check_readable(load).await?;
    load.set_up(leader, true);
    let end_us = load.recorder.now_us();
    let mut times = Times { from_us: round_start_us, to_us: end_us, marks: Vec::new() };
    times.fault(killed_us, "killed");
    times.event(restarted_us, "restarted");
    let down = Down { node: u16::try_from(leader).unwrap_or(u16::MAX), from_us: killed_us, to_us: end_us };
    let history = load.recorder.history_since(round_start_us);
    let acknowledged_us = history.acknowledged_us();
    let errors = survivor_errors(&history, std::slice::from_ref(&down)).0;
    downs.push(down);
    let name = |node: usize| {
        let plan = cluster.plan().get(node);
        plan.map_or_else(|| format!("node {node}"), |plan| plan.name.clone())
    };
    Ok(Round {
        round,
        killed: name(leader),
        new_leader: name(new_leader),
        term: after.term,
        gap_us: longest_gap_touching(&acknowledged_us, killed_us, restarted_us).length_us(),
        rejoin_gap_us: longest_gap_touching(&acknowledged_us, restarted_us, end_us).length_us(),
        survivor_errors: errors,
        retried: load.moved.load(Ordering::Relaxed) - moved_before,
        acknowledged: acknowledged_us.len() as u64,
        rejoin_ms,
        readable_nodes,
        times,
    })
}
