//! What operators do in working hours: rolling drains with restarts, and failovers by command.
//!
//! Of a throw-away cluster each node is drained, stopped with SIGTERM, started and undrained; of an existing one it is
//! drained and undrained, since only whoever runs its servers can restart them. The leader is always the next to go, so
//! that leadership moves as often as it can. What a drill has drained of an existing cluster is written down before it is
//! ordered, so that it is put back whatever happens to the drill.

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::drill_load::Load;
use super::drill_report::{RoundReport, Times};
use super::drill_run::{READY_TIMEOUT, STEADY};
use super::drill_watch::{Down, POLL, check_readable, find_leader, survivor_errors, wait_until};
use super::flow_client::{self, Job};
use super::http_client::{Call, Client, Endpoint, encode_query};
use super::local_cluster::{LocalCluster, NodePlan};
use super::{CliError, output, status};
use crate::judge::longest_gap_touching;

/// Operations of clients that a node which is back must see before the next one goes.
const OPERATIONS_BETWEEN: u64 = 100;

/// The nodes' names, in the order of their endpoints.
pub struct Names(Vec<String>);

impl Names {
    /// Of a throw-away cluster.
    pub fn of_plan(plan: &[NodePlan]) -> Self {
        Self(plan.iter().map(|node| node.name.clone()).collect())
    }

    /// Asks each node of an existing cluster. All must answer, and be well: a drill is no help for an ill one.
    pub async fn ask(endpoints: &[Endpoint]) -> Result<Self, CliError> {
        let mut names = Vec::new();
        for endpoint in endpoints {
            let health = status::health(&mut Client::new(endpoint.clone()), flow_client::ASK_TIMEOUT).await;
            let health = health.map_err(CliError::Unreachable)?;
            if health.status != "ok" || names.contains(&health.name) {
                let authority = endpoint.authority();
                let what = match names.contains(&health.name) {
                    true => "was named twice".to_owned(),
                    false => format!("says {:?}", health.status),
                };
                return Err(CliError::Refused(format!(
                    "{} at {authority} {what}: nothing was drilled; name every node once, and all must be well",
                    health.name
                )));
            }
            names.push(health.name);
        }
        Ok(Self(names))
    }

    /// Of one node.
    pub fn of(&self, node: usize) -> String {
        self.0.get(node).cloned().unwrap_or_else(|| format!("node {node}"))
    }
}

/// What one node's turn showed.
#[derive(Clone, Debug, Serialize)]
pub struct DrainRound {
    /// From 1; each has one row for each node.
    pub round: usize,
    /// The node that was drained.
    pub node: String,
    /// Whether it led, so that leadership moved.
    pub led: bool,
    /// Who leads afterwards.
    pub new_leader: String,
    /// In which term.
    pub term: u64,
    /// Longest time without an acknowledged write while it was drained, microseconds.
    pub gap_us: u64,
    /// The same from then on, while it was away and came back.
    pub away_gap_us: u64,
    /// Requests that failed; without a balancer, of nodes that were not stopped.
    pub errors: u64,
    /// Writes acknowledged meanwhile.
    pub acknowledged: u64,
    /// From the order until it was drained, milliseconds.
    pub drain_ms: u64,
    /// From SIGTERM to the end of the process, milliseconds; of an existing cluster it goes on.
    pub stop_ms: Option<u64>,
    /// From its start, or the order to undrain it, until it was ready, milliseconds.
    pub back_ms: u64,
    /// When it was.
    pub times: Times,
}

impl RoundReport for DrainRound {
    const HEAD: &'static [&'static str] = &[
        "ROUND",
        "DRAINED",
        "LED",
        "GAP ms",
        "ERRORS",
        "NEW LEADER",
        "TERM",
        "WRITES",
        "DRAIN ms",
        "STOP ms",
        "BACK ms",
        "GAP AWAY ms",
    ];

    fn row(&self) -> Vec<String> {
        vec![
            self.round.to_string(),
            self.node.clone(),
            if self.led { "yes" } else { "no" }.to_owned(),
            output::ms(self.gap_us),
            self.errors.to_string(),
            self.new_leader.clone(),
            self.term.to_string(),
            output::thousands(self.acknowledged),
            self.drain_ms.to_string(),
            self.stop_ms.map_or_else(|| "-".to_owned(), |ms| ms.to_string()),
            self.back_ms.to_string(),
            output::ms(self.away_gap_us),
        ]
    }

    fn progress(&self) -> String {
        format!(
            "drained {}{} in {} ms, gap {} ms, {} errors, {} leads in term {}, back in {} ms, gap then {} ms",
            self.node,
            if self.led { ", the leader," } else { "" },
            self.drain_ms,
            output::ms(self.gap_us),
            self.errors,
            self.new_leader,
            self.term,
            self.back_ms,
            output::ms(self.away_gap_us),
        )
    }

    fn gap_us(&self) -> Option<u64> {
        self.led.then_some(self.gap_us)
    }

    fn problem(&self) -> Option<String> {
        let stays = self.led && self.new_leader == self.node;
        stays.then(|| format!("round {}: {} was drained and leads", self.round, self.node))
    }

    fn times(&self) -> &Times {
        &self.times
    }
}

/// What one failover showed.
#[derive(Clone, Debug, Serialize)]
pub struct FailoverRound {
    /// From 1.
    pub round: usize,
    /// Who led.
    pub from: String,
    /// Who leads.
    pub new_leader: String,
    /// In which term.
    pub term: u64,
    /// Longest time without an acknowledged write around it, microseconds.
    pub gap_us: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Writes acknowledged in this round.
    pub acknowledged: u64,
    /// From the order to its answer, microseconds.
    pub answered_us: u64,
    /// When it was.
    pub times: Times,
}

impl RoundReport for FailoverRound {
    const HEAD: &'static [&'static str] = &["ROUND", "FROM", "TO", "TERM", "GAP ms", "ERRORS", "WRITES", "ANSWERED ms"];

    fn row(&self) -> Vec<String> {
        vec![
            self.round.to_string(),
            self.from.clone(),
            self.new_leader.clone(),
            self.term.to_string(),
            output::ms(self.gap_us),
            self.errors.to_string(),
            output::thousands(self.acknowledged),
            output::ms(self.answered_us),
        ]
    }

    fn progress(&self) -> String {
        format!(
            "from {} to {} in term {}, answered after {} ms, gap {} ms, {} errors",
            self.from,
            self.new_leader,
            self.term,
            output::ms(self.answered_us),
            output::ms(self.gap_us),
            self.errors
        )
    }

    fn gap_us(&self) -> Option<u64> {
        Some(self.gap_us)
    }

    fn problem(&self) -> Option<String> {
        (self.from == self.new_leader).then(|| format!("round {}: {} leads as before", self.round, self.from))
    }

    fn times(&self) -> &Times {
        &self.times
    }
}

/// What a drill of drains keeps in mind, whatever becomes of a round.
pub struct Memory<'a> {
    /// When nodes were down.
    pub downs: &'a mut Vec<Down>,
    /// Nodes of an existing cluster that were drained and are not back.
    pub drained: &'a mut Vec<usize>,
}

/// Drains every node once, whoever leads first, and adds each turn to `done` as it ends.
pub async fn rolling(
    mut cluster: Option<&mut LocalCluster>,
    names: &Names,
    load: &Load,
    round: usize,
    mut memory: Memory<'_>,
    done: &mut Vec<DrainRound>,
) -> Result<(), CliError> {
    let mut waiting: Vec<usize> = (0..load.endpoints.len()).collect();
    while !waiting.is_empty() {
        let times = Times::begun(load.recorder.now_us());
        sleep(STEADY).await;
        let (leader, _) = find_leader(load, None).await?;
        let place = waiting.iter().position(|node| *node == leader).unwrap_or(0);
        let node = waiting.remove(place);
        let whom = (round, node, node == leader);
        done.push(turn(cluster.as_deref_mut(), names, load, whom, times, &mut memory).await?);
    }
    Ok(())
}

/// Puts a node back into traffic, trying for as long as a node may take to be fit again.
pub async fn undrain(names: &Names, load: &Load, node: usize) -> Result<(), CliError> {
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        match order(load, node, &undrain_path(&names.of(node)), "").await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(error) => tracing::debug!(%error, "undrained again"),
        }
        sleep(POLL * 20).await;
    }
}

fn undrain_path(name: &str) -> String {
    format!("/v1/admin/node/undrain?node={}", encode_query(name))
}

/// One node's turn.
async fn turn(
    cluster: Option<&mut LocalCluster>,
    names: &Names,
    load: &Load,
    (round, node, led): (usize, usize, bool),
    mut times: Times,
    memory: &mut Memory<'_>,
) -> Result<DrainRound, CliError> {
    let name = names.of(node);
    if cluster.is_none() {
        memory.drained.push(node);
    }
    let downs = &mut *memory.downs;
    let (ordered, ordered_us) = (Instant::now(), load.recorder.now_us());
    times.fault(ordered_us, "drain");
    order(load, node, &format!("/v1/admin/node/drain?node={}", encode_query(&name)), "{}").await?;
    let (drain_ms, drained_us) = (elapsed_ms(ordered), load.recorder.now_us());
    times.event(drained_us, "drained");
    let mut stop_ms = None;
    let mut back = Instant::now();
    if let Some(cluster) = cluster {
        // What a client without a balancer begins from now on may meet the end of the process.
        load.set_up(node, false);
        downs.push(Down { node: u16::try_from(node).unwrap_or(u16::MAX), from_us: drained_us, to_us: u64::MAX });
        let told = Instant::now();
        cluster.stop(node).await?;
        stop_ms = Some(elapsed_ms(told));
        times.event(load.recorder.now_us(), "stopped");
        back = Instant::now();
        cluster.start(node)?;
        cluster.wait_ready(READY_TIMEOUT).await?;
        times.event(load.recorder.now_us(), "ready");
        load.set_up(node, true);
    }
    order(load, node, &undrain_path(&name), "").await?;
    memory.drained.retain(|drained| *drained != node);
    let back_ms = elapsed_ms(back);
    let back_us = load.recorder.now_us();
    if stop_ms.is_some()
        && let Some(down) = downs.last_mut()
    {
        down.to_us = back_us;
    }
    times.event(back_us, "undrained");
    check_readable(load).await?;
    let operations = load.recorder.values_issued();
    let enough = || load.recorder.values_issued() >= operations + OPERATIONS_BETWEEN;
    wait_until("clients did not go on after a node was back", enough).await?;
    let (leader, after) = find_leader(load, None).await?;
    times.to_us = load.recorder.now_us();
    let history = load.recorder.history_since(times.from_us);
    let acknowledged_us = history.acknowledged_us();
    Ok(DrainRound {
        round,
        node: name,
        led,
        new_leader: names.of(leader),
        term: after.term,
        gap_us: longest_gap_touching(&acknowledged_us, ordered_us, drained_us).length_us(),
        away_gap_us: longest_gap_touching(&acknowledged_us, drained_us, times.to_us).length_us(),
        errors: survivor_errors(&history, downs).0,
        acknowledged: acknowledged_us.len() as u64,
        drain_ms,
        stop_ms,
        back_ms,
        times,
    })
}

/// Moves leadership to whichever voter lacks least.
pub async fn failover(names: &Names, load: &Load, round: usize) -> Result<FailoverRound, CliError> {
    let mut times = Times::begun(load.recorder.now_us());
    sleep(STEADY).await;
    let (before, health) = find_leader(load, None).await?;
    let ordered_us = load.recorder.now_us();
    times.fault(ordered_us, "failover");
    // Asked at another node, as an operator would who does not know who leads.
    let job = order(load, before, "/v1/admin/failover", "{}").await?;
    let answered_us = load.recorder.now_us();
    times.event(answered_us, "answered");
    let (leader, after) = find_leader(load, Some(health.term)).await?;
    sleep(STEADY).await;
    times.to_us = load.recorder.now_us();
    let history = load.recorder.history_since(times.from_us);
    let acknowledged_us = history.acknowledged_us();
    Ok(FailoverRound {
        round,
        from: names.of(before),
        new_leader: job.to.unwrap_or_else(|| names.of(leader)),
        term: after.term,
        gap_us: longest_gap_touching(&acknowledged_us, ordered_us, times.to_us).length_us(),
        errors: survivor_errors(&history, &[]).0,
        acknowledged: acknowledged_us.len() as u64,
        answered_us: answered_us - ordered_us,
        times,
    })
}

/// Orders a flow about `node` from another node and waits for its end. Refused for as long as a node that was away may
/// take to be fit again, it is ordered anew.
async fn order(load: &Load, node: usize, path: &str, body: &'static str) -> Result<Job, CliError> {
    let mut endpoints = load.endpoints.clone();
    let count = endpoints.len().max(1);
    endpoints.rotate_left((node + 1) % count);
    let call = Call::post(path, body);
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        match flow_client::order(&endpoints, &call).await {
            Ok((client, answer)) => {
                let job = flow_client::follow(client, &endpoints, &answer, true).await?;
                if job.state == "finished" {
                    return Ok(job);
                }
                return Err(CliError::Found(format!("{path}: the {} {}: {}", job.kind, job.state, job.detail)));
            }
            Err(CliError::Refused(why)) if Instant::now() < deadline => {
                tracing::debug!(why, "ordered again");
                sleep(POLL * 20).await;
            }
            Err(error) => return Err(error),
        }
    }
}

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
