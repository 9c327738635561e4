//! Carries the steps of `admin::rebuild` out. One per process.
//!
//! Steps that replace files run to their end even while the process stops; it waits for them. Everything else is
//! given up then, and goes on with the next start. A step that fails is tried again after a pause, for as long as it
//! takes: the reason stands in the job, and the node serves its clients through the others meanwhile.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    Need, PLACE_WHY,
    desk::{Desk, JobState, Order, job_id},
    fail_point::{self, Stopped},
    journal::Journal,
    swap::SwapError,
    tree_steps::TreeJob,
    tree_watch,
};
use crate::{
    admin::{
        rebuild::{Phase, Step, View, next},
        tree,
    },
    clock,
    node::{core::Shared, disk::DiskState, process::Process},
    state::engine::quarantine,
};

/// How often a node without a rebuild looks whether it needs one, beside being told.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Pauses after a step that did not come to its end: short at first, because leaders change within a second.
pub(super) const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(3);
/// How long a node that has failed leaves processor and disks to the others before it begins to rebuild itself: the
/// hand-over of leadership, some tens of milliseconds, is what clients wait for.
const SETTLE: Duration = Duration::from_secs(1);
/// How often the quarantine is looked through.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(3_600);

/// Why a step did not come to its end.
pub(super) enum Halt {
    /// Again, after a pause; the reason is shown.
    Again(String),
    /// Never again in this process: a test wants it.
    Stopped(Stopped),
}

impl From<Stopped> for Halt {
    fn from(stopped: Stopped) -> Halt {
        Halt::Stopped(stopped)
    }
}

impl From<SwapError> for Halt {
    fn from(error: SwapError) -> Halt {
        match error {
            SwapError::Stopped(stopped) => Halt::Stopped(stopped),
            error => Halt::Again(error.to_string()),
        }
    }
}

pub(super) fn again(why: impl ToString) -> Halt {
    Halt::Again(why.to_string())
}

pub(super) type Done = Result<(), Halt>;

/// Runs until the process stops. `journal`: the rebuild that the process before did not finish.
pub async fn run(process: Arc<Process>, journal: Option<Journal>) {
    let mut runner = Runner {
        data_dir: process.config.node.data_dir.clone(),
        desk: Arc::clone(&process.desk),
        process,
        journal,
        operator_decides: false,
        folder_good: false,
        folder_bad_since: None,
        cluster_busy: true,
        looked_again: false,
        joined: false,
        stale: false,
        refused_since: None,
        starts_failed: 0,
        expire_at: Instant::now(),
        healthy_before: false,
        restarted: true,
        tree: None,
        settled_at: None,
        may_have_leftovers: true,
    };
    if let Some(journal) = &runner.journal {
        tracing::info!(phase = journal.phase.word(), why = journal.why, "a rebuild goes on where it was");
        runner.show("going on");
    }
    runner.run().await;
}

pub(super) struct Runner {
    pub(super) process: Arc<Process>,
    pub(super) data_dir: PathBuf,
    pub(super) desk: Arc<Desk>,
    pub(super) journal: Option<Journal>,
    pub(super) operator_decides: bool,
    pub(super) folder_good: bool,
    /// Since when every probe of the data folder has failed.
    pub(super) folder_bad_since: Option<Instant>,
    /// Whether the sender of the last checkpoint had clients to serve.
    pub(super) cluster_busy: bool,
    pub(super) looked_again: bool,
    pub(super) joined: bool,
    pub(super) stale: bool,
    pub(super) refused_since: Option<Instant>,
    pub(super) starts_failed: u32,
    pub(super) expire_at: Instant,
    /// Whether the incarnation was well when the rebuild was begun.
    pub(super) healthy_before: bool,
    /// Whether the rebuild was begun by a process before this one.
    pub(super) restarted: bool,
    /// The replacement of the tree alone, if that is under way.
    pub(super) tree: Option<TreeJob>,
    /// When a rebuild that nobody ordered may begin.
    settled_at: Option<Instant>,
    /// Whether a process before this one may have left fetched files that nobody needs any more.
    may_have_leftovers: bool,
}

/// Why the current incarnation should be rebuilt, if so.
pub(super) fn need(shared: &Shared) -> Option<Need> {
    let known = shared.need.borrow().clone();
    if matches!(known, Some(Need::Node(_) | Need::Place(_))) {
        return known;
    }
    let disk = shared.disk.health();
    if disk.state != DiskState::Failed {
        return known;
    }
    let failed = Need::Node(format!("the disk has failed: {}", disk.reason.unwrap_or_default()));
    Some(ended_by_damage(shared).map_or(failed, |damage| known.unwrap_or(Need::Tree(damage))))
}

/// What is damaged in the tree, if nothing else has ended the core: the log is as sound as before then.
fn ended_by_damage(shared: &Shared) -> Option<String> {
    let state = &shared.core.get()?.state;
    let damage = state.damage().borrow().as_ref().map(ToString::to_string)?;
    let log_latched = shared.wal().and_then(stemedb_raft::WalHandle::latched).is_some();
    let tree_failed = state.failed().is_some_and(|error| !error.is_damage());
    (!log_latched && !tree_failed).then_some(damage)
}

pub(super) fn is_open(shared: &Shared) -> bool {
    shared.retired.get().is_none() && (shared.core.get().is_some() || shared.wal().is_some())
}

pub(super) async fn blocking<T: Send + 'static, E: ToString + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Halt> {
    tokio::task::spawn_blocking(work).await.map_err(again)?.map_err(again)
}

/// A step of one of the two flows.
enum Which {
    Node(Step),
    Tree(tree::Step),
}

impl Runner {
    pub(super) fn hit(&self, point: &'static str) -> Result<(), Stopped> {
        fail_point::hit(&self.data_dir, point)
    }

    fn view(&self, shared: &Shared, order: Option<&Order>) -> View {
        View {
            phase: self.journal.as_ref().map(|j| j.phase),
            needed: matches!(need(shared), Some(Need::Node(_) | Need::Place(_))),
            ordered: order.is_some(),
            // A node that is to come has been asked for by an operator.
            automatic: self.process.config.cluster.auto_rebuild || matches!(need(shared), Some(Need::Place(_))),
            operator_decides: self.operator_decides,
            folder_good: self.folder_good,
            core_open: is_open(shared),
            looked_again: self.looked_again,
            joined: self.joined,
            // The new incarnation has failed in its turn: it is no voter yet, and starts over.
            stale: self.stale || (is_open(shared) && self.installed() && need(shared).is_some()),
        }
    }

    fn installed(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.phase == Phase::Installed)
    }

    async fn run(&mut self) {
        let stop = self.process.stop.clone();
        let mut pause = PAUSE_MIN;
        while !stop.is_cancelled() {
            let Some(shared) = self.process.current() else { return };
            if self.process.members.removed().is_some() {
                // Nothing brings this id back.
                stop.cancelled().await;
                return;
            }
            let order = self.desk.ordered();
            let step = match self.concerns_tree(&shared, order.as_ref()) {
                true => Which::Tree(tree::next(&self.tree_view(&shared))),
                false => {
                    self.tree = None;
                    Which::Node(next(&self.view(&shared, order.as_ref())))
                }
            };
            let begins = matches!(step, Which::Node(Step::Probe | Step::Begin));
            let failed = !matches!(need(&shared), Some(Need::Place(_)));
            if begins && failed && order.is_none() && self.journal.is_none() {
                let at = *self.settled_at.get_or_insert_with(|| Instant::now() + SETTLE);
                if Instant::now() < at {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = self.desk.wake.notified() => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                    continue;
                }
            } else {
                self.settled_at = None;
            }
            let done = match step {
                Which::Node(Step::Rest) | Which::Tree(tree::Step::Rest) => {
                    self.rest(&shared).await;
                    Ok(())
                }
                Which::Node(Step::AwaitOperator) | Which::Tree(tree::Step::AwaitOperator) => {
                    self.show_waiting(&shared);
                    self.rest(&shared).await;
                    Ok(())
                }
                Which::Node(step) => {
                    let gives_way = matches!(step, Step::Probe | Step::Ask | Step::Pull | Step::Join | Step::Promote);
                    let work = self.node_step(step, &shared, order);
                    match gives_way {
                        true => stop.run_until_cancelled(work).await.unwrap_or(Ok(())),
                        // Files change hands here: never left in the middle.
                        false => work.await,
                    }
                }
                Which::Tree(step) => {
                    let gives_way = matches!(step, tree::Step::Probe | tree::Step::Pull | tree::Step::Check);
                    let work = self.tree_step(step, &shared);
                    match gives_way {
                        true => stop.run_until_cancelled(work).await.unwrap_or(Ok(())),
                        false => work.await,
                    }
                }
            };
            match done {
                Ok(()) => pause = PAUSE_MIN,
                Err(Halt::Stopped(point)) => {
                    tracing::error!("the rebuild ends here for a test: {point}");
                    stop.cancelled().await;
                }
                Err(Halt::Again(why)) => {
                    self.waits(&why);
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = self.desk.wake.notified() => {}
                        () = tokio::time::sleep(pause) => {}
                    }
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    async fn node_step(&mut self, step: Step, shared: &Arc<Shared>, order: Option<Order>) -> Done {
        match step {
            Step::Begin => self.begin(shared, order).await,
            Step::EndCore => self.end_core(shared).await,
            Step::Swap => self.swap().await,
            Step::Start => self.start().await,
            Step::StartOver => self.start_over().await,
            Step::Probe => self.probe(shared, order).await,
            Step::Ask => self.ask(shared, order).await,
            Step::Pull => self.pull(shared, order).await,
            Step::Join => self.join(shared).await,
            Step::Promote => self.promote(shared).await,
            Step::Rest | Step::AwaitOperator => Ok(()),
        }
    }

    /// Whether the tree alone is to be replaced, and nothing else is asked for or under way.
    fn concerns_tree(&self, shared: &Shared, order: Option<&Order>) -> bool {
        let whole_needed = matches!(need(shared), Some(Need::Node(_) | Need::Place(_)));
        let whole = self.journal.is_some() || order.is_some() || whole_needed;
        !whole && (self.tree.is_some() || need(shared).is_some())
    }

    async fn rest(&mut self, shared: &Shared) {
        self.process.offers.tidy();
        if self.expire_at <= Instant::now() {
            self.expire_at = Instant::now() + EXPIRE_INTERVAL;
            let (data_dir, days) = (self.data_dir.clone(), self.process.config.rebuild.quarantine_days);
            let expired = tokio::task::spawn_blocking(move || quarantine::expire(&data_dir, days, clock::unix_ms()));
            if let Ok(Err(error)) = expired.await {
                tracing::warn!(%error, "the quarantine cannot be looked through");
            }
        }
        self.remove_leftovers(shared).await;
        let (mut disk, mut need) = (shared.disk.subscribe(), shared.need.subscribe());
        disk.borrow_and_update();
        need.borrow_and_update();
        tokio::select! {
            () = self.process.stop.cancelled() => {}
            () = self.desk.wake.notified() => {}
            _ = disk.changed() => {}
            _ = need.changed() => {}
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }

    /// A damaged tree may have been replaced without this runner: by a checkpoint that Raft found when it started, or by
    /// one that the leader sent.
    async fn remove_leftovers(&mut self, shared: &Shared) {
        let is_sound = shared.core.get().is_some_and(|core| core.state.damage().borrow().is_none());
        let idle = self.journal.is_none() && self.tree.is_none() && need(shared).is_none();
        if self.may_have_leftovers && is_sound && idle {
            self.may_have_leftovers = false;
            tree_watch::forget(&self.data_dir).await;
            self.remove_fetched().await;
        }
    }

    /// Shows where the job is.
    pub(super) fn show(&self, step: &'static str) {
        let Some(journal) = &self.journal else { return };
        self.desk.show(|job| {
            job.id = job_id(journal.job);
            job.kind = "rebuild";
            job.node.clone_from(&self.process.config.node.name);
            job.state = JobState::Running;
            job.step = step;
            job.detail.clone_from(&journal.why);
            job.automatic = journal.automatic;
            job.comes = journal.why == PLACE_WHY;
            job.fresh_id = (journal.fresh_id != 0).then_some(journal.fresh_id);
            job.began_unix_ms = journal.began_unix_ms;
        });
    }

    fn show_waiting(&self, shared: &Shared) {
        if self.journal.is_some() {
            return;
        }
        let why = need(shared).map_or_else(String::new, |need| need.why().to_owned());
        let known = self.desk.current();
        if known.is_some_and(|job| job.state == JobState::Waiting) {
            return;
        }
        tracing::warn!("this node needs a rebuild and waits for an operator to start it: {why}");
        self.desk.show(|job| {
            job.id = job_id(uuid::Uuid::now_v7().as_u128());
            job.kind = "rebuild";
            job.node.clone_from(&self.process.config.node.name);
            job.state = JobState::Waiting;
            job.step = "asked for";
            job.detail = format!("{why}; an operator decides: POST /v1/admin/node/rebuild");
            job.began_unix_ms = clock::unix_ms();
        });
    }

    pub(super) fn waits(&self, why: &str) {
        let known = self.desk.current().is_some_and(|job| job.state == JobState::Waiting && job.detail == why);
        if !known {
            tracing::warn!("the rebuild waits: {why}");
        }
        if self.journal.is_some() || self.desk.current().is_some() {
            self.desk.show(|job| {
                job.state = JobState::Waiting;
                job.detail = why.to_owned();
            });
        }
    }

    pub(super) async fn save(&mut self, journal: Journal) -> Done {
        let (saved, data_dir) = (journal.clone(), self.data_dir.clone());
        blocking(move || saved.save(&data_dir)).await?;
        self.journal = Some(journal);
        Ok(())
    }

    pub(super) fn journal(&self) -> Result<Journal, Halt> {
        self.journal.clone().ok_or_else(|| again("there is no rebuild under way"))
    }
}
