//! Runs a failover by the steps of `admin::failover`, on the leader. Nothing here polls: the view of the cluster wakes
//! it, and the new leader answers when it takes writes.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use serde::Serialize;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{FlowError, board::Job, fail_point, members};
use crate::{
    admin::failover::{self, Other, Refusal, Step, View},
    node::{
        core::{ClusterView, Core, Role, Shared},
        process::Process,
        read,
        rebuild::desk::JobState,
    },
};

/// How long all of it may take, an election included.
const FAILOVER_MAX: Duration = Duration::from_secs(20);

/// A member as a candidate for leadership.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// Whether it could take over now.
    pub fit: bool,
    /// Why not.
    pub why_not: Option<String>,
    /// Entries of the leader's log that it has not acknowledged.
    pub lag_entries: Option<u64>,
    /// Bytes of them.
    pub lag_bytes: Option<u64>,
}

/// What a failover would do.
#[derive(Clone, Debug, Serialize)]
pub struct FailoverPlan {
    /// Name of the leader.
    pub from: String,
    /// Name of the node that would be asked first; empty when it would be refused.
    pub to: String,
    /// Always true.
    pub dry_run: bool,
    /// Whether it would be begun.
    pub allowed: bool,
    /// Why not, or what it would do.
    pub detail: String,
    /// Every other member.
    pub candidates: Vec<Candidate>,
}

/// Where leadership has gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Name of the new leader.
    pub to: String,
    /// Its term.
    pub term: u64,
}

fn leading(process: &Process) -> Result<Arc<Shared>, FlowError> {
    let Some(shared) = process.current() else {
        return Err(FlowError::Impossible("this node is starting".to_owned()));
    };
    let (leads, name) = {
        let view = shared.view.borrow();
        (
            view.role == Role::Leader,
            view.leader.as_ref().filter(|leader| !leader.here).map(|leader| leader.name.clone()),
        )
    };
    if leads && shared.core.get().is_some() { Ok(shared) } else { Err(FlowError::NotLeader(name)) }
}

async fn others(shared: &Shared) -> Result<(&Core, Vec<Other>), FlowError> {
    let core = shared.core.get().ok_or(FlowError::NotLeader(None))?;
    Ok((core, members::candidates(shared, core, members::ask_all(shared).await)))
}

/// What a failover would do now.
pub async fn plan_failover(process: &Process, target: Option<&str>) -> Result<FailoverPlan, FlowError> {
    let shared = leading(process)?;
    let (_, others) = others(&shared).await?;
    let (to, detail) = match failover::choose(shared.name(), &others, target) {
        Ok(order) => {
            let first = others.iter().find(|other| order.first() == Some(&other.id));
            let to = first.map(|other| other.name.clone()).unwrap_or_default();
            (Some(to.clone()), format!("Leadership would go from {} to {to}", shared.name()))
        }
        // There is nothing to plan with a node that does not exist.
        Err(unknown @ Refusal::Unknown { .. }) => return Err(unknown.into()),
        Err(refusal) => (None, refusal.to_string()),
    };
    let candidate = |other: &Other| Candidate {
        name: other.name.clone(),
        fit: failover::fitness(other).is_ok(),
        why_not: failover::fitness(other).err().map(|why| why.to_string()),
        lag_entries: other.lag.map(|(entries, _)| entries),
        lag_bytes: other.lag.map(|(_, bytes)| bytes),
    };
    let candidates = others.iter().map(candidate).collect();
    let (allowed, from) = (to.is_some(), shared.name().to_owned());
    Ok(FailoverPlan { from, to: to.unwrap_or_default(), dry_run: true, allowed, detail, candidates })
}

/// Begins to move leadership from this node to `target`, or to whoever lacks least. The answer is the job's id, once
/// nothing speaks against it any more.
pub async fn order_failover(process: &Arc<Process>, target: Option<String>) -> Result<String, FlowError> {
    let shared = leading(process)?;
    let job = process.flows.board.begin("failover", shared.name(), "an operator", false).map_err(FlowError::Busy)?;
    let (begun, answer) = oneshot::channel();
    // On a task of its own: whoever ordered it may go away at any moment.
    let stop = process.stop.clone();
    process.vital.spawn("a failover", async move {
        stop.run_until_cancelled(run(&shared, job, target, begun)).await;
    });
    answer.await.unwrap_or_else(|_| Err(FlowError::Impossible("this node is stopping".to_owned())))
}

async fn run(shared: &Shared, job: Job, target: Option<String>, begun: oneshot::Sender<Result<String, FlowError>>) {
    job.step("looking at the candidates");
    job.show(|job| job.from = Some(shared.name().to_owned()));
    let chosen = others(shared).await.and_then(|(core, others)| {
        let order = failover::choose(shared.name(), &others, target.as_deref())?;
        Ok((core, order))
    });
    // Whoever ordered it may have gone in each case.
    let (core, order) = match chosen {
        Ok(chosen) => chosen,
        Err(error) => {
            job.end(JobState::Failed, error.to_string());
            let _gone = begun.send(Err(error));
            return;
        }
    };
    let _gone = begun.send(Ok(job.id().to_owned()));
    let moved = move_leadership(shared, core, order, Instant::now() + FAILOVER_MAX, Some(&job)).await;
    match moved {
        Some(Moved { to, term }) => {
            job.show(|job| (job.to, job.term) = (Some(to.clone()), Some(term)));
            let detail = match target.filter(|target| *target != to) {
                Some(target) => format!("{target} did not take over in time; {to} leads in term {term}"),
                None => format!("{to} leads in term {term} and takes writes"),
            };
            job.end(JobState::Finished, detail);
        }
        None => {
            let now = shared.view.borrow().leader.as_ref().map(|leader| leader.name.clone());
            let now = now.map_or_else(|| "no leader is known now".to_owned(), |name| format!("{name} leads now"));
            job.end(JobState::Failed, format!("no candidate took leadership over; {now}"));
        }
    }
}

/// Asks one candidate after the other to take over, until another node leads and has said so with a majority behind
/// it. `None` when leadership came back, or nobody led in time. `job` shows the steps, if they are all that it does.
pub async fn move_leadership(
    shared: &Shared,
    core: &Core,
    order: Vec<u64>,
    deadline: Instant,
    job: Option<&Job>,
) -> Option<Moved> {
    // What was chosen before may lead by then, or another one: the steps see it.
    let _alone = shared.flows.move_alone(deadline).await?;
    let each = Duration::from_millis(shared.config.cluster.election_max_ms.saturating_mul(2));
    let mut left = VecDeque::from(order);
    let mut changes = shared.view.subscribe();
    let term_before = changes.borrow().term;
    let mut until = Instant::now();
    let (mut triggered, mut missed, mut confirmed) = (false, false, None);
    loop {
        let now = changes.borrow_and_update().clone();
        let elsewhere = led_elsewhere(&now);
        let view = View {
            leads: now.role == Role::Leader && now.term == term_before,
            elsewhere: elsewhere.is_some(),
            confirmed: elsewhere.is_some() && confirmed == elsewhere,
            came_back: came_back(&now, term_before),
            left: left.len(),
            triggered,
            missed,
            over: Instant::now() >= deadline,
        };
        let step = failover::next(&view);
        if let Some(job) = job {
            job.step(step.word());
            fail_point::pass(&shared.config.node.data_dir, fail_point::of_failover(step), job).await;
        }
        let settled = |view: &ClusterView| led_elsewhere(view).is_some() || came_back(view, term_before);
        match step {
            Step::Trigger => {
                (triggered, missed) = (true, false);
                until = deadline.min(Instant::now() + each);
                if let Some(id) = left.pop_front()
                    && let Err(error) = core.raft.trigger().transfer_leader(id).await
                {
                    tracing::warn!(%error, id, "leadership could not be offered");
                    missed = true;
                }
            }
            Step::Await => {
                missed = !matches!(timeout_at(until, changes.wait_for(settled)).await, Ok(Ok(_)));
                if missed {
                    tracing::warn!("leadership was not taken over in time");
                }
            }
            // Ends at the deadline, which the next turn sees.
            Step::AwaitElection => drop(timeout_at(deadline, changes.wait_for(settled)).await),
            Step::Confirm => {
                let round = timeout_at(deadline, read::read_index_until(shared, deadline)).await;
                match round {
                    Ok(Ok(_)) => confirmed = led_elsewhere(&changes.borrow()),
                    // At once, so that whoever ends this task gets its turn.
                    Ok(Err(_)) if shared.stop.is_cancelled() => return None,
                    Ok(Err(_)) | Err(_) => tokio::task::yield_now().await,
                }
            }
            Step::Done => {
                let (to, term) = elsewhere?;
                tracing::info!(to, term, "leadership has moved");
                return Some(Moved { to, term });
            }
            Step::GiveUp => return None,
        }
    }
}

/// The name of the leader and its term, when it is another node.
fn led_elsewhere(view: &ClusterView) -> Option<(String, u64)> {
    view.leader.as_ref().filter(|leader| !leader.here).map(|leader| (leader.name.clone(), view.term))
}

fn came_back(view: &ClusterView, term_before: u64) -> bool {
    view.role == Role::Leader && view.term > term_before
}
