//! A round of `--kind kill`: the leader is killed, and comes back.

use std::sync::atomic::Ordering;

use tokio::time::{Instant, sleep};

use super::CliError;
use super::drill::{READY_TIMEOUT, STEADY};
use super::drill_load::Load;
use super::drill_report::Round;
use super::drill_watch::{Down, check_readable, find_leader, survivor_errors, wait_until};
use super::local_cluster::LocalCluster;
use crate::judge::longest_gap_touching;

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
    })
}
