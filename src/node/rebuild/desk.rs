//! Where a rebuild is asked for, and where its progress is read.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use serde::Serialize;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use crate::clock;

/// Finished jobs that are still told about.
const FINISHED_MAX: usize = 16;

/// Steps that a job keeps.
const STEPS_MAX: usize = 64;

/// An operator's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Number of the job.
    pub job: u128,
    /// The only node to pull from, if one was named.
    pub from: Option<String>,
}

/// State of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It goes on by itself.
    #[default]
    Running,
    /// It waits for something that `detail` names.
    Waiting,
    /// It is done.
    Finished,
    /// It was given up; `detail` says why.
    Failed,
    /// An operator ended it, and what it had done was undone.
    Cancelled,
}

impl JobState {
    /// Whether nothing more comes.
    pub fn is_over(self) -> bool {
        matches!(self, JobState::Finished | JobState::Failed | JobState::Cancelled)
    }
}

/// A step of a job that was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StepReport {
    /// Its name, as `step` of the job named it.
    pub name: &'static str,
    /// How long it took, milliseconds.
    pub ms: u64,
}

/// A job as `GET /v1/admin/jobs/{id}` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct JobReport {
    /// Its id.
    pub id: String,
    /// `rebuild`, `drain`, `undrain`, `failover`, `member-add`, `member-remove` or `member-replace`.
    pub kind: &'static str,
    /// Name of the node that it runs on, or that it is about.
    pub node: String,
    /// It belongs to the whole cluster and no node runs it: every node can be asked.
    pub cluster: bool,
    /// State.
    pub state: JobState,
    /// What is being done, for example `pulling` or `handing over leadership`.
    pub step: &'static str,
    /// The steps that were done, the oldest first.
    pub steps: Vec<StepReport>,
    /// What it waits for, why it was begun, or how it ended.
    pub detail: String,
    /// Who or what began it.
    pub cause: String,
    /// Whether the node decided by itself.
    pub automatic: bool,
    /// Of a rebuild: the node is to become a member, and had nothing before.
    #[serde(skip)]
    pub comes: bool,
    /// Whether `DELETE` of it would undo it now.
    pub cancellable: bool,
    /// The node the files or leadership come from.
    pub from: Option<String>,
    /// The node that leads afterwards, once leadership has moved.
    pub to: Option<String>,
    /// The term in which it leads.
    pub term: Option<u64>,
    /// The Raft id under which it comes back, once that is known.
    pub fresh_id: Option<u64>,
    /// Bytes of the checkpoint that are here.
    pub bytes_done: u64,
    /// Bytes of the checkpoint; 0 before it is known.
    pub bytes_total: u64,
    /// Entries of the leader's log that are missing; `None` before they are counted.
    pub entries_behind: Option<u64>,
    /// Seconds until the files are here, at the pace so far.
    pub eta_s: Option<u64>,
    /// Unix milliseconds.
    pub began_unix_ms: u64,
    /// How long it took or has taken so far, milliseconds.
    pub ms: u64,
}

impl JobReport {
    /// Notes that `name` took so long. A job that goes round in circles, as one that waits does, keeps its last steps.
    pub fn step_done(&mut self, name: &'static str, ms: u64) {
        if name.is_empty() {
            return;
        }
        if self.steps.len() >= STEPS_MAX {
            self.steps.remove(0);
        }
        self.steps.push(StepReport { name, ms });
    }
}

/// How far a pull is.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    /// Bytes that were here when the pull began.
    before: AtomicU64,
    began_ms: AtomicU64,
    from: Mutex<Option<String>>,
}

impl Progress {
    /// A pull of `total` bytes begins.
    pub fn begin(&self, from: &str, total: u64) {
        self.done.store(0, Relaxed);
        self.before.store(0, Relaxed);
        self.total.store(total, Relaxed);
        self.began_ms.store(clock::monotonic_ms(), Relaxed);
        *self.from.lock().unwrap_or_else(PoisonError::into_inner) = Some(from.to_owned());
    }

    /// `bytes` more are here.
    pub fn have(&self, bytes: u64) {
        self.done.fetch_add(bytes, Relaxed);
    }

    fn eta_s(&self, now_ms: u64) -> Option<u64> {
        let (done, total) = (self.done.load(Relaxed), self.total.load(Relaxed));
        let since_ms = now_ms.saturating_sub(self.began_ms.load(Relaxed));
        eta_s(done, total, since_ms)
    }
}

fn eta_s(done: u64, total: u64, since_ms: u64) -> Option<u64> {
    if done == 0 || total == 0 {
        return None;
    }
    let left = u128::from(total.saturating_sub(done));
    u64::try_from((left * u128::from(since_ms) / u128::from(done)).div_ceil(1_000)).ok()
}

#[derive(Default)]
struct Inner {
    order: Option<Order>,
    current: Option<JobReport>,
    began_ms: u64,
    step_began_ms: u64,
    finished: VecDeque<JobReport>,
}

/// The desk of one process.
#[derive(Default)]
pub struct Desk {
    inner: Mutex<Inner>,
    /// Wakes the runner.
    pub wake: Notify,
    /// Of the pull of the moment.
    pub progress: Arc<Progress>,
    changed: watch::Sender<u64>,
}

/// A job's number as its id.
pub fn job_id(job: u128) -> String {
    Uuid::from_u128(job).to_string()
}

impl Desk {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Orders a rebuild. The id is that of the job under way, if there is one: an order speeds up one that waits.
    pub fn order(&self, from: Option<String>) -> String {
        let mut inner = self.inner();
        let id = match (&inner.order, &inner.current) {
            (_, Some(current)) => current.id.clone(),
            (Some(order), None) => job_id(order.job),
            (None, None) => job_id(Uuid::now_v7().as_u128()),
        };
        let job = Uuid::parse_str(&id).map_or(0, |id| id.as_u128());
        inner.order = Some(Order { job, from });
        drop(inner);
        self.wake.notify_one();
        id
    }

    /// The order, if there is one.
    pub fn ordered(&self) -> Option<Order> {
        self.inner().order.clone()
    }

    /// The job under way.
    pub fn current(&self) -> Option<JobReport> {
        let inner = self.inner();
        let report = inner.current.clone()?;
        Some(self.filled(report, inner.began_ms))
    }

    /// Every job there is to tell of, the newest first.
    pub fn all(&self) -> Vec<JobReport> {
        let ended = self.inner().finished.clone();
        self.current().into_iter().chain(ended).collect()
    }

    /// A job by its id.
    pub fn job(&self, id: &str) -> Option<JobReport> {
        if let Some(current) = self.current().filter(|job| job.id == id) {
            return Some(current);
        }
        let inner = self.inner();
        if let Some(order) = inner.order.as_ref().filter(|order| job_id(order.job) == id) {
            return Some(JobReport {
                id: job_id(order.job),
                kind: "rebuild",
                step: "asked for",
                ..JobReport::default()
            });
        }
        inner.finished.iter().find(|job| job.id == id).cloned()
    }

    fn filled(&self, mut report: JobReport, began_ms: u64) -> JobReport {
        let now_ms = clock::monotonic_ms();
        report.bytes_done = self.progress.done.load(Relaxed);
        report.bytes_total = self.progress.total.load(Relaxed);
        report.from = self.progress.from.lock().unwrap_or_else(PoisonError::into_inner).clone();
        report.eta_s = (report.step == "pulling").then(|| self.progress.eta_s(now_ms)).flatten();
        report.ms = now_ms.saturating_sub(began_ms);
        report
    }

    /// The runner shows where it is.
    pub fn show(&self, change: impl FnOnce(&mut JobReport)) {
        let mut inner = self.inner();
        let now_ms = clock::monotonic_ms();
        if inner.current.is_none() {
            (inner.began_ms, inner.step_began_ms) = (now_ms, now_ms);
        }
        let step_ms = now_ms.saturating_sub(inner.step_began_ms);
        let report = inner.current.get_or_insert_default();
        let before = report.step;
        change(report);
        report.cause = if report.automatic { "the node itself" } else { "an operator" }.to_owned();
        if report.step != before {
            report.step_done(before, step_ms);
            inner.step_began_ms = now_ms;
        }
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
    }

    /// The job has ended so.
    pub fn end(&self, state: JobState, detail: Option<String>) {
        let mut inner = self.inner();
        inner.order = None;
        let began_ms = inner.began_ms;
        if let Some(report) = inner.current.take() {
            let mut report = self.filled(report, began_ms);
            report.state = state;
            report.step_done(report.step, clock::monotonic_ms().saturating_sub(inner.step_began_ms));
            report.step = if state == JobState::Finished { "finished" } else { report.step };
            report.detail = detail.unwrap_or(report.detail);
            inner.finished.push_front(report);
            inner.finished.truncate(FINISHED_MAX);
        }
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Waits until the job has ended; `None` when there is no such job.
    pub async fn wait_ended(&self, id: &str) -> Option<JobReport> {
        let mut changed = self.changed.subscribe();
        loop {
            let job = self.job(id)?;
            if job.state.is_over() {
                return Some(job);
            }
            changed.changed().await.ok()?;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_time_that_is_left_follows_the_pace() {
        assert_eq!(eta_s(0, 100, 5_000), None);
        assert_eq!(eta_s(25, 100, 5_000), Some(15));
        assert_eq!(eta_s(100, 100, 5_000), Some(0));
        assert_eq!(eta_s(1, 0, 5_000), None);
    }

    #[tokio::test]
    async fn an_order_joins_the_job_under_way_and_its_end_is_remembered() {
        let desk = Desk::default();
        let id = desk.order(None);
        assert_eq!(desk.order(Some("b".into())), id, "one at a time");
        desk.show(|job| job.id = id.clone());
        assert_eq!(desk.order(None), id);
        assert_eq!(desk.job(&id).unwrap().state, JobState::Running);
        desk.end(JobState::Finished, None);
        assert_eq!(desk.wait_ended(&id).await.unwrap().step, "finished");
        assert!(desk.current().is_none() && desk.ordered().is_none());
        assert!(desk.job("unknown").is_none());
    }
}
