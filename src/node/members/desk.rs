//! Where a change of the members is shown. What was decided is replicated; how far its step is, only the leader knows.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::book;
use crate::{
    clock,
    node::{
        core::Shared,
        rebuild::desk::{JobReport, JobState, StepReport, job_id},
    },
    state::members::{End, Ended, Intent},
};

/// Pause between looks of somebody who waits for an end.
const LOOK: Duration = Duration::from_millis(20);
/// Steps that are shown.
const STEPS_MAX: usize = 64;

/// What the leader knows of the step that it is in.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// The job.
    pub job: u128,
    /// The step.
    pub step: &'static str,
    /// What it waits for, if it waits.
    pub waits_for: Option<String>,
    /// Entries of the leader's log that the node lacks.
    pub entries_behind: Option<u64>,
    /// Bytes of the checkpoint that are there.
    pub bytes_done: u64,
    /// Bytes of the checkpoint.
    pub bytes_total: u64,
    /// Seconds that the step may still take.
    pub eta_s: Option<u64>,
    steps: Vec<StepReport>,
    step_began_ms: u64,
}

/// That this node was removed.
#[derive(Clone, Debug)]
pub struct Gone {
    /// One sentence.
    pub why: String,
    /// From when on nothing is answered any more.
    pub refuses_from: Instant,
}

/// What a process keeps of all this.
#[derive(Default)]
pub struct MembersDesk {
    live: Mutex<Option<Live>>,
    /// Wakes the leader's task.
    pub wake: Notify,
    /// Wakes the task that asks whether this node was removed.
    pub look_again: Notify,
    gone: OnceLock<Gone>,
    /// The job of a node that comes by itself, and the numbers of its ways in that this leader has let it begin.
    ways: Mutex<(u128, BTreeSet<u128>)>,
}

impl MembersDesk {
    fn live(&self) -> MutexGuard<'_, Option<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The leader is at this step of this job.
    pub fn show(&self, job: u128, step: &'static str, change: impl FnOnce(&mut Live)) {
        let mut live = self.live();
        let now_ms = clock::monotonic_ms();
        let known = live.take().filter(|live| live.job == job);
        let mut shown = known.unwrap_or_else(|| Live { job, step, step_began_ms: now_ms, ..Live::default() });
        if shown.step != step {
            let ms = now_ms.saturating_sub(shown.step_began_ms);
            if shown.steps.len() < STEPS_MAX {
                shown.steps.push(StepReport { name: shown.step, ms });
            }
            (shown.step, shown.step_began_ms, shown.waits_for) = (step, now_ms, None);
        }
        change(&mut shown);
        *live = Some(shown);
    }

    /// Why this node was removed, if it was.
    pub fn removed(&self) -> Option<&Gone> {
        self.gone.get()
    }

    /// This node was removed.
    pub fn set_removed(&self, gone: Gone) {
        // The first word stands.
        let _known_before = self.gone.set(gone);
    }

    /// Why requests are refused, if they are: not before load balancers had time to notice.
    pub fn refuses(&self) -> Option<&str> {
        self.gone.get().filter(|gone| Instant::now() >= gone.refuses_from).map(|gone| &*gone.why)
    }

    /// Lets a node that comes under `job` begin the way `node_job`, or go on with it, unless it has begun `max` others.
    /// `known`: the way that is in the replicated state; those before it are known only to the leader that has seen them.
    pub fn begins_way(&self, job: u128, node_job: u128, known: Option<u128>, max: u64) -> bool {
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        if ways.0 != job {
            *ways = (job, BTreeSet::new());
        }
        ways.1.extend(known);
        let others = ways.1.iter().filter(|way| **way != node_job).count();
        let may = u64::try_from(others).unwrap_or(u64::MAX) <= max || ways.1.contains(&node_job);
        if may {
            ways.1.insert(node_job);
        }
        may
    }

    /// An operator has decided: what the node has begun by itself does not count any more.
    pub fn forget_ways(&self) {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner).1.clear();
    }

    fn running(&self, intent: &Intent) -> JobReport {
        let live = self.live().clone().filter(|live| live.job == intent.job).unwrap_or_default();
        let waits = live.waits_for.is_some();
        JobReport {
            state: if waits { JobState::Waiting } else { JobState::Running },
            step: match (live.step, intent.changing, intent.cancelled) {
                ("", _, true) => "undoing",
                ("", true, _) => "changing the members",
                ("", false, _) => "begun",
                (step, ..) => step,
            },
            steps: live.steps,
            detail: live.waits_for.unwrap_or_else(|| sentence(intent)),
            cancellable: !intent.changing && !intent.cancelled,
            bytes_done: live.bytes_done,
            bytes_total: live.bytes_total,
            entries_behind: live.entries_behind,
            eta_s: live.eta_s,
            ms: clock::unix_ms().saturating_sub(intent.began_unix_ms),
            ..basics(intent)
        }
    }

    fn over(&self, ended: &Ended) -> JobReport {
        let live = self.live().clone().filter(|live| live.job == ended.intent.job).unwrap_or_default();
        JobReport {
            state: match ended.end {
                End::Finished => JobState::Finished,
                End::Cancelled => JobState::Cancelled,
            },
            step: "finished",
            steps: live.steps,
            bytes_done: live.bytes_done,
            bytes_total: live.bytes_total,
            detail: ended.detail.clone(),
            ms: ended.ended_unix_ms.saturating_sub(ended.intent.began_unix_ms),
            ..basics(&ended.intent)
        }
    }

    /// The report of an intent that goes on.
    pub fn report(&self, intent: &Intent) -> JobReport {
        self.running(intent)
    }
}

fn basics(intent: &Intent) -> JobReport {
    JobReport {
        id: job_id(intent.job),
        kind: intent.change.word(),
        node: intent.name.clone(),
        cause: intent.cause.clone(),
        cluster: true,
        fresh_id: intent.place.map(|place| place.fresh_id),
        began_unix_ms: intent.began_unix_ms,
        ..JobReport::default()
    }
}

fn sentence(intent: &Intent) -> String {
    match (intent.coming(), intent.leaving()) {
        (Some(comes), Some(leaves)) => format!("{comes} at {} takes the place of {leaves}", intent.peer_addr),
        (Some(comes), None) if intent.stays_learner() => format!("{comes} at {} comes as a learner", intent.peer_addr),
        (Some(comes), None) => format!("{comes} at {} comes as a voter", intent.peer_addr),
        (None, leaves) => format!("{} leaves", leaves.unwrap_or_default()),
    }
}

/// Every change of the members that this node knows of, the newest first. A node without a state knows of none; one
/// whose state cannot be read says so.
pub async fn all(shared: &Shared) -> Result<Vec<JobReport>, String> {
    if shared.core.get().is_none() {
        return Ok(Vec::new());
    }
    let book = book(shared).await?;
    let current = book.current.iter().map(|intent| shared.members.running(intent));
    Ok(current.chain(book.ended.iter().rev().map(|ended| shared.members.over(ended))).collect())
}

/// One of them by its id.
pub async fn one(shared: &Shared, id: &str) -> Result<Option<JobReport>, String> {
    Ok(all(shared).await?.into_iter().find(|job| job.id == id))
}

/// Waits until it has ended; `None` when this node knows no such job, or cannot know any more.
pub async fn wait_ended(shared: &Shared, id: &str) -> Result<Option<JobReport>, String> {
    loop {
        let Some(job) = one(shared, id).await? else { return Ok(None) };
        if job.state.is_over() {
            return Ok(Some(job));
        }
        tokio::select! {
            () = shared.core_stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_begins_again_and_again_under_one_job_is_held() {
        let desk = MembersDesk::default();
        // The way that is known was let in by a leader before.
        assert!(desk.begins_way(1, 11, Some(10), 1), "a second one");
        assert!(!desk.begins_way(1, 12, Some(11), 1) && !desk.begins_way(1, 13, Some(11), 1), "a third one");
        assert!(desk.begins_way(1, 11, Some(11), 1), "it goes on with the one that it has");
        assert!(desk.begins_way(2, 12, None, 0), "the first one of another job");
        assert!(!desk.begins_way(2, 13, Some(12), 0));
        desk.forget_ways();
        assert!(desk.begins_way(2, 13, None, 0), "an operator has decided");
    }
}
