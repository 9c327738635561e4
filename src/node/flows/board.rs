//! The jobs of this process: the one that goes on, and the last ones that ended.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::super::rebuild::desk::{JobReport, JobState};
use crate::clock;

/// Ended jobs that are still told about.
const ENDED_MAX: usize = 64;

/// Why a job is not cancelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotCancelled {
    /// There is no such job.
    Unknown,
    /// It has ended.
    Over(Box<JobReport>),
    /// It cannot be undone.
    Unsafe(Box<JobReport>),
}

struct Current {
    report: JobReport,
    began_ms: u64,
    step_began_ms: u64,
    cancel: CancellationToken,
}

impl Current {
    fn report(&self) -> JobReport {
        JobReport { ms: clock::monotonic_ms().saturating_sub(self.began_ms), ..self.report.clone() }
    }
}

#[derive(Default)]
struct Inner {
    current: Option<Current>,
    ended: VecDeque<JobReport>,
}

/// Where flows are shown. One goes on at a time.
#[derive(Default)]
pub struct Board {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

impl Board {
    /// Without a job.
    pub fn new() -> Arc<Board> {
        Arc::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job begins, unless another one goes on: then that one is the error.
    pub fn begin(
        self: &Arc<Self>,
        kind: &'static str,
        node: &str,
        cause: &str,
        cancellable: bool,
    ) -> Result<Job, Box<JobReport>> {
        let mut inner = self.inner();
        if let Some(current) = &inner.current {
            return Err(Box::new(current.report()));
        }
        let id = Uuid::now_v7().to_string();
        let now_ms = clock::monotonic_ms();
        let report = JobReport {
            id: id.clone(),
            kind,
            node: node.to_owned(),
            cause: cause.to_owned(),
            step: "beginning",
            cancellable,
            began_unix_ms: clock::unix_ms(),
            ..JobReport::default()
        };
        let cancel = CancellationToken::new();
        let current = Current { report, began_ms: now_ms, step_began_ms: now_ms, cancel: cancel.clone() };
        inner.current = Some(current);
        Ok(Job { board: Arc::clone(self), id, cancel })
    }

    /// Every job there is to tell of, the newest first.
    pub fn all(&self) -> Vec<JobReport> {
        let inner = self.inner();
        inner.current.iter().map(Current::report).chain(inner.ended.iter().cloned()).collect()
    }

    /// The job that goes on.
    pub fn current(&self) -> Option<JobReport> {
        self.inner().current.as_ref().map(Current::report)
    }

    /// A job by its id.
    pub fn job(&self, id: &str) -> Option<JobReport> {
        self.all().into_iter().find(|job| job.id == id)
    }

    /// Tells a job to undo what it has done. It does so after the step that it is in.
    pub fn cancel(&self, id: &str) -> Result<JobReport, NotCancelled> {
        let inner = self.inner();
        if let Some(current) = inner.current.as_ref().filter(|current| current.report.id == id) {
            if !current.report.cancellable {
                return Err(NotCancelled::Unsafe(Box::new(current.report())));
            }
            current.cancel.cancel();
            return Ok(current.report());
        }
        match inner.ended.iter().find(|job| job.id == id) {
            Some(job) if job.state == JobState::Cancelled => Ok(job.clone()),
            Some(job) => Err(NotCancelled::Over(Box::new(job.clone()))),
            None => Err(NotCancelled::Unknown),
        }
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

/// A job that goes on. Dropped without an end it has failed.
pub struct Job {
    board: Arc<Board>,
    id: String,
    cancel: CancellationToken,
}

impl Job {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Cancelled when the job is to undo what it has done.
    pub fn cancel(&self) -> &CancellationToken {
        &self.cancel
    }

    fn current(&self, change: impl FnOnce(&mut Current)) {
        if let Some(current) = self.board.inner().current.as_mut().filter(|current| current.report.id == self.id) {
            change(current);
        }
    }

    /// It does this now.
    pub fn step(&self, step: &'static str) {
        self.current(|current| {
            if current.report.step != step {
                let now_ms = clock::monotonic_ms();
                let (before, ms) = (current.report.step, now_ms.saturating_sub(current.step_began_ms));
                current.report.step_done(before, ms);
                (current.report.step, current.step_began_ms) = (step, now_ms);
            }
        });
    }

    /// Shows something of it.
    pub fn show(&self, change: impl FnOnce(&mut JobReport)) {
        self.current(|current| change(&mut current.report));
    }

    /// It has ended so.
    pub fn end(self, state: JobState, detail: impl Into<String>) {
        self.close(state, detail.into());
    }

    fn close(&self, state: JobState, detail: String) {
        let mut inner = self.board.inner();
        let Some(current) = inner.current.take_if(|current| current.report.id == self.id) else { return };
        let mut report = current.report();
        let step_ms = clock::monotonic_ms().saturating_sub(current.step_began_ms);
        report.step_done(report.step, step_ms);
        if state == JobState::Finished {
            report.step = "finished";
        }
        (report.state, report.detail, report.cancellable) = (state, detail, false);
        tracing::info!(kind = report.kind, ?state, ms = report.ms, detail = report.detail, "a job has ended");
        inner.ended.push_front(report);
        inner.ended.truncate(ENDED_MAX);
        drop(inner);
        self.board.changed.send_modify(|n| *n += 1);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.close(JobState::Failed, "this node is stopping".to_owned());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    #[tokio::test]
    async fn one_goes_on_at_a_time_and_its_end_is_remembered() {
        let board = Board::new();
        let job = board.begin("drain", "node-1", "an operator", true).ok().unwrap();
        let id = job.id().to_owned();
        assert_eq!(board.begin("failover", "node-1", "", false).err().unwrap().id, id);
        job.step("asking the others");
        job.step("asking the others");
        job.step("finishing");
        let waiting = tokio::spawn({
            let (board, id) = (Arc::clone(&board), id.clone());
            async move { board.wait_ended(&id).await }
        });
        job.end(JobState::Finished, "done");
        let ended = waiting.await.unwrap().unwrap();
        let steps: Vec<&str> = ended.steps.iter().map(|step| step.name).collect();
        assert_eq!(steps, ["beginning", "asking the others", "finishing"]);
        assert_eq!((ended.state, ended.step, ended.detail.as_str()), (JobState::Finished, "finished", "done"));
        assert!(board.current().is_none() && board.all().len() == 1);
        assert!(board.wait_ended("unknown").await.is_none());
    }

    #[test]
    fn what_may_be_cancelled_is_told_and_what_was_dropped_has_failed() {
        let board = Board::new();
        let job = board.begin("drain", "a", "", true).ok().unwrap();
        assert!(board.cancel("unknown") == Err(NotCancelled::Unknown));
        board.cancel(job.id()).unwrap();
        assert!(job.cancel().is_cancelled());
        job.show(|report| report.cancellable = false);
        assert!(matches!(board.cancel(job.id()), Err(NotCancelled::Unsafe(_))));
        let id = job.id().to_owned();
        drop(job);
        assert_eq!(board.job(&id).unwrap().state, JobState::Failed);
        assert!(matches!(board.cancel(&id), Err(NotCancelled::Over(_))));
        for _ in 0..2 * ENDED_MAX {
            board.begin("drain", "a", "", true).ok().unwrap().end(JobState::Finished, "");
        }
        assert_eq!(board.all().len(), ENDED_MAX);
    }
}
