//! Runs drain and undrain by the steps of `admin::drain`.

use std::{sync::Arc, time::Duration};

use serde::Serialize;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    FlowError,
    board::Job,
    fail_point, failover,
    members::{self, Asked},
};
use crate::{
    admin::drain::{self, Claim, Mark, Step, Tolerance, View},
    node::{
        core::{Role, Shared},
        process::Process,
        rebuild::desk::JobState,
    },
};

/// How long a node with the smaller name waits for the other one to give way.
const CONTEST_MAX: Duration = Duration::from_secs(2);
/// Pause between its questions.
const CONTEST_PAUSE: Duration = Duration::from_millis(20);
/// How long leadership may take to move: every voter gets its chance, and an election after them.
const HAND_OVER_MAX: Duration = Duration::from_secs(5);
/// Added to the deadline of a request when requests are waited for.
const REQUESTS_MARGIN: Duration = Duration::from_secs(1);
/// How long an undrain waits for the end of a drain that it ends.
const CANCEL_MAX: Duration = Duration::from_secs(10);

/// What an operator orders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainOrder {
    /// Whoever else drains, and whatever it does to fault tolerance.
    pub forced: bool,
    /// A restart shall not end it.
    pub persist: bool,
}

/// What a drain would do.
#[derive(Clone, Debug, Serialize)]
pub struct DrainPlan {
    /// Name of the node.
    pub node: String,
    /// Always true.
    pub dry_run: bool,
    /// Whether it would be begun without `force`.
    pub allowed: bool,
    /// Why not, or what it would do to fault tolerance.
    pub detail: String,
    /// Name of the node that drains already, if one does.
    pub held_by: Option<String>,
    /// What the cluster can lose, now and without this node.
    pub tolerance: Tolerance,
    /// Whether this node leads, so that leadership would move.
    pub leads: bool,
}

/// What the members have said.
struct Survey {
    claim: Claim,
    tolerance: Tolerance,
    refusal: Option<FlowError>,
    leads: bool,
}

async fn survey(shared: &Shared) -> Survey {
    let asked: Vec<Asked> = members::ask_all(shared).await;
    let claim = drain::claim(shared.name(), members::marks(&asked));
    let tolerance = members::tolerance(shared, &asked);
    let leads = leads_others(shared);
    let mut refusal = tolerance.is_risky().then(|| FlowError::Risky(tolerance.clone(), shared.name().to_owned()));
    if let Some(core) = shared.core.get().filter(|_| leads && refusal.is_none()) {
        let others = members::candidates(shared, core, asked);
        refusal = crate::admin::failover::choose(shared.name(), &others, None).err().map(FlowError::Refused);
    }
    Survey { claim, tolerance, refusal, leads }
}

fn leads_others(shared: &Shared) -> bool {
    let view = shared.view.borrow();
    view.role == Role::Leader && view.membership.voter_ids().nth(1).is_some()
}

fn ready_for(process: &Process) -> Result<Arc<Shared>, FlowError> {
    let shared = process.current().filter(|shared| shared.core.get().is_some() || shared.silenced().is_some());
    let shared = shared
        .filter(|shared| shared.view.borrow().membership.log_id().is_some())
        .ok_or_else(|| FlowError::Impossible("this node is starting and is no working member yet".to_owned()))?;
    match shared.is_leaving() {
        true => Err(FlowError::Impossible("this node is stopping, or about to be rebuilt".to_owned())),
        false => Ok(shared),
    }
}

/// What a drain of this node would do now.
pub async fn plan_drain(process: &Process) -> Result<DrainPlan, FlowError> {
    let shared = ready_for(process)?;
    let survey = survey(&shared).await;
    let held_by = match &survey.claim {
        Claim::Free => None,
        Claim::Held { by, .. } | Claim::Contested { by } => Some(by.clone()),
    };
    let words = survey.tolerance.words(shared.name());
    let detail = match (&held_by, &survey.refusal) {
        (Some(by), _) => format!("{by} is out of traffic or on its way. {words}"),
        (None, Some(refusal @ FlowError::Refused(_))) => format!("{refusal}. {words}"),
        (None, _) => words,
    };
    Ok(DrainPlan {
        node: shared.name().to_owned(),
        dry_run: true,
        allowed: held_by.is_none() && survey.refusal.is_none(),
        detail,
        held_by,
        tolerance: survey.tolerance,
        leads: survey.leads,
    })
}

/// Begins a drain of this node. The answer is the job's id, once nothing speaks against it any more.
pub async fn order_drain(process: &Arc<Process>, order: DrainOrder) -> Result<String, FlowError> {
    let shared = ready_for(process)?;
    let job = process.flows.board.begin("drain", shared.name(), "an operator", true).map_err(FlowError::Busy)?;
    let (begun, answer) = oneshot::channel();
    let run = Run {
        process: Arc::clone(process),
        to_persist: order.persist && !process.flows.drain.known().persists,
        order,
        survey: None,
        asked_since: None,
        handed_over: false,
        noticed: false,
        busy: true,
        begun: Some(begun),
    };
    // On a task of its own: whoever ordered it may go away at any moment.
    let stop = process.stop.clone();
    process.vital.spawn("a drain", async move {
        stop.run_until_cancelled(run.run(job)).await;
    });
    answer.await.unwrap_or_else(|_| Err(FlowError::Impossible("this node is stopping".to_owned())))
}

struct Run {
    process: Arc<Process>,
    order: DrainOrder,
    to_persist: bool,
    survey: Option<Survey>,
    asked_since: Option<Instant>,
    handed_over: bool,
    noticed: bool,
    busy: bool,
    begun: Option<oneshot::Sender<Result<String, FlowError>>>,
}

impl Run {
    fn view(&self, job: &Job) -> View {
        View {
            mark: self.process.flows.drain.mark(),
            forced: self.order.forced,
            cancelled: job.cancel().is_cancelled(),
            claim: self.survey.as_ref().map(|survey| survey.claim.answer()),
            waited_out: self.asked_since.is_some_and(|since| since.elapsed() >= CONTEST_MAX),
            risky: self.survey.as_ref().is_some_and(|survey| survey.refusal.is_some()),
            to_persist: self.to_persist,
            leads: self.process.current().is_some_and(|shared| leads_others(&shared)),
            handed_over: self.handed_over,
            noticed: self.noticed,
            busy: self.busy,
        }
    }

    async fn run(mut self, job: Job) {
        let was_out = self.process.flows.drain.mark().is_out();
        loop {
            let step = drain::next(&self.view(&job));
            job.step(step.word());
            fail_point::pass(&self.process.config.node.data_dir, fail_point::of_drain(step), &job).await;
            // It was held there, or the operator was quick: look again.
            if job.cancel().is_cancelled() && drain::next(&self.view(&job)) != step {
                continue;
            }
            if let Err(error) = self.take(step, &job).await {
                // What this job has set, and no more. A node that was out of traffic before stays there also when its disk
                // cannot note it: it may have been drained because that disk is full.
                if self.process.flows.drain.mark() == Mark::Wants || step == Step::Undo {
                    self.process.flows.drain.set(Mark::None);
                }
                let state = if error == FlowError::Cancelled { JobState::Cancelled } else { JobState::Failed };
                job.end(state, error.to_string());
                self.tell(Err(error));
                return;
            }
            if step == Step::Rest {
                break;
            }
        }
        let id = job.id().to_owned();
        let still_leads = self.process.current().is_some_and(|shared| leads_others(&shared));
        let detail = match (was_out, still_leads) {
            (true, _) => "it was drained before",
            (false, true) => "it is out of traffic, and still leads, because nobody has taken leadership over",
            (false, false) => "it is out of traffic: it votes, stores the log and passes on what still comes",
        };
        job.end(JobState::Finished, detail);
        self.tell(Ok(id));
    }

    fn tell(&mut self, outcome: Result<String, FlowError>) {
        if let Some(begun) = self.begun.take() {
            // Whoever ordered it may have gone.
            let _gone = begun.send(outcome);
        }
    }

    async fn take(&mut self, step: Step, job: &Job) -> Result<(), FlowError> {
        let flows = Arc::clone(&self.process.flows);
        match step {
            Step::RaiseFlag => flows.drain.set(Mark::Wants),
            Step::Ask => self.ask().await?,
            Step::RefuseHeld => return Err(self.held()),
            Step::RefuseRisky => {
                let refusal = self.survey.take().and_then(|survey| survey.refusal);
                return Err(refusal.unwrap_or_else(|| FlowError::Impossible("it would be unsafe".to_owned())));
            }
            Step::Persist => {
                let kept = Arc::clone(&flows);
                let written = tokio::task::spawn_blocking(move || kept.drain.persist_blocking(true)).await;
                let until = if flows.drain.mark().is_out() { "; until then it stays out of traffic" } else { "" };
                let failed = |why: String| {
                    FlowError::Impossible(format!("it cannot be made to outlast a restart: {why}{until}"))
                };
                written.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
                self.to_persist = false;
            }
            Step::Close => {
                flows.drain.set(Mark::Draining);
                if let Some(shared) = self.process.current()
                    && let Some(core) = shared.core.get()
                {
                    core.raft.runtime_config().elect(false);
                }
                let id = job.id().to_owned();
                self.tell(Ok(id));
            }
            Step::HandOver => self.hand_over(job).await,
            Step::AwaitNotice => {
                let out_since = flows.drain.known().out_since.unwrap_or_else(Instant::now);
                let notice = Duration::from_millis(self.process.config.cluster.drain_notice_ms);
                self.noticed = job.cancel().run_until_cancelled(sleep_until(out_since + notice)).await.is_some();
            }
            Step::AwaitRequests => {
                let before = flows.traffic.so_far();
                let limit = Duration::from_millis(self.process.config.cluster.request_deadline_ms) + REQUESTS_MARGIN;
                let waited = job.cancel().run_until_cancelled(timeout(limit, before.wait())).await;
                if let Some(Err(_)) = waited {
                    tracing::warn!(requests = before.count(), "requests did not end in time; the drain goes on");
                }
                self.busy = waited.is_none();
            }
            Step::Finish => {
                flows.drain.set(Mark::Drained);
                job.show(|job| job.cancellable = false);
            }
            Step::Undo => {
                open_again(&self.process).await?;
                return Err(FlowError::Cancelled);
            }
            Step::Rest => {
                if job.cancel().is_cancelled() && flows.drain.mark() == Mark::None {
                    return Err(FlowError::Cancelled);
                }
            }
        }
        Ok(())
    }

    async fn ask(&mut self) -> Result<(), FlowError> {
        if self.survey.is_some() {
            sleep(CONTEST_PAUSE).await;
        }
        let shared = self.process.current().ok_or_else(|| FlowError::Impossible("this node is starting".to_owned()))?;
        self.asked_since.get_or_insert_with(Instant::now);
        self.survey = Some(survey(&shared).await);
        Ok(())
    }

    fn held(&mut self) -> FlowError {
        match self.survey.take().map(|survey| survey.claim) {
            Some(Claim::Held { by, mark }) => FlowError::Held { by, mark },
            Some(Claim::Contested { by }) => FlowError::Held { by, mark: Mark::Wants },
            Some(Claim::Free) | None => FlowError::Impossible("another node drains".to_owned()),
        }
    }

    async fn hand_over(&mut self, job: &Job) {
        self.handed_over = true;
        let Some(shared) = self.process.current() else { return };
        let Some(core) = shared.core.get() else { return };
        let others = members::candidates(&shared, core, members::ask_all(&shared).await);
        let order = match crate::admin::failover::choose(shared.name(), &others, None) {
            Ok(order) => order,
            Err(why) => return tracing::warn!(%why, "leadership stays for the time being"),
        };
        let deadline = Instant::now() + HAND_OVER_MAX;
        if let Some(moved) = failover::move_leadership(&shared, core, order, deadline, None).await {
            job.show(|job| {
                (job.from, job.to, job.term) = (Some(job.node.clone()), Some(moved.to), Some(moved.term));
            });
        }
    }
}

/// Takes the mark away, from the disk first.
async fn open_again(process: &Arc<Process>) -> Result<(), FlowError> {
    let flows = Arc::clone(&process.flows);
    fail_point::pass_until_stop(process, "undrain.persist").await?;
    let written = tokio::task::spawn_blocking(move || flows.drain.persist_blocking(false)).await;
    let failed =
        |why: String| FlowError::Impossible(format!("the end of the drain cannot be noted on the disk: {why}"));
    written.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
    fail_point::pass_until_stop(process, "undrain.open").await?;
    process.flows.drain.set(Mark::None);
    Ok(())
}

/// Puts this node back into traffic. A drain that goes on is cancelled first; without one there is nothing to do, and
/// that is fine. The answer is the job's id.
pub async fn order_undrain(process: &Arc<Process>) -> Result<String, FlowError> {
    let board = &process.flows.board;
    if let Some(drain) = board.current().filter(|job| job.kind == "drain")
        && board.cancel(&drain.id).is_ok()
    {
        // One that does not end in time shows in the next line.
        let _in_time = timeout(CANCEL_MAX, board.wait_ended(&drain.id)).await;
    }
    let shared = process.current().ok_or_else(|| FlowError::Impossible("this node is starting".to_owned()))?;
    if shared.is_leaving() {
        return Err(FlowError::Impossible("this node is stopping, or about to be rebuilt".to_owned()));
    }
    let job = board.begin("undrain", shared.name(), "an operator", false).map_err(FlowError::Busy)?;
    let id = job.id().to_owned();
    let known = process.flows.drain.known();
    if known.mark == Mark::None && !known.persists {
        job.end(JobState::Finished, "it was in traffic already");
        return Ok(id);
    }
    let (ended, answer) = oneshot::channel();
    let owner = Arc::clone(process);
    // On a task of its own: whoever ordered it may go away at any moment.
    process.vital.spawn("an undrain", async move {
        let opened = open_again(&owner).await;
        match &opened {
            Ok(()) => job.end(JobState::Finished, "it is in traffic again, as soon as it is ready"),
            Err(error) => job.end(JobState::Failed, error.to_string()),
        }
        let _gone = ended.send(opened);
    });
    answer.await.unwrap_or_else(|_| Err(FlowError::Impossible("this node is stopping".to_owned())))?;
    Ok(id)
}
