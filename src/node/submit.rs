//! Runs the life of one command: the rules of `submit_rules` with real waiting and sending. A leader out of reach is reached
//! through another node where one has a way (`way`).

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use uuid::Uuid;

use super::{
    core::{LeaderInfo, Shared, leader_change},
    forward::attempt_end,
    messages::ProposeAnswer,
    proposer::command_bytes,
    space::Shortage,
    submit_rules::{AttemptEnd, Event, Leader, Life, Step, Verdict},
    way::{Via, Way},
};
use crate::{
    clock, fail_points,
    state::command::{Command, CommandKey, CommandOutcome, KeySource, Operation},
};

/// What `Retry-After` says when a command was not applied: long enough for an election.
const RETRY_AFTER_S: u64 = 1;

/// A command's outcome.
#[derive(Clone, Debug, PartialEq)]
pub struct Submitted {
    /// Applied or refused, the same on every node.
    pub outcome: CommandOutcome,
    /// Name of the node that led and committed it.
    pub served_by: String,
}

/// Why there is no outcome.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Surely not applied, now or later.
    #[error("not applied: {detail}")]
    NotApplied {
        /// HTTP status: 429 (too much waits), 503 (no leader).
        status: u16,
        /// What kept it from being applied.
        detail: String,
        /// When it is worth trying again, seconds.
        retry_after_s: u64,
    },
    /// Surely not applied: too few nodes have room on their disks.
    #[error("not applied: {}", shortages_text(.0))]
    DiskFull(Vec<Shortage>),
    /// It may have been applied, or may be yet. The same key tells.
    #[error("outcome unknown: {detail}")]
    Unknown {
        /// What is known.
        detail: String,
    },
}

/// The shortages of all nodes in one text.
pub fn shortages_text(shortages: &[Shortage]) -> String {
    shortages.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

enum Attempt {
    Here(oneshot::Receiver<ProposeAnswer>),
    There(oneshot::Receiver<AttemptEnd>),
    Over(AttemptEnd),
}

impl Attempt {
    async fn end(&mut self) -> AttemptEnd {
        match self {
            Attempt::Here(answer) => match answer.await {
                Ok(answer) => attempt_end(answer),
                Err(_) => AttemptEnd::Unknown("the proposer has ended".into()),
            },
            Attempt::There(end) => {
                end.await.unwrap_or_else(|_| AttemptEnd::Unknown("the forwarding task has ended".into()))
            }
            Attempt::Over(end) => end.clone(),
        }
    }
}

/// Takes a command and follows it to its end or its deadline.
pub async fn submit(
    shared: &Shared,
    op: Operation,
    key: Option<CommandKey>,
    body_hash: u128,
) -> Result<Submitted, SubmitError> {
    let own_key = || CommandKey { source: KeySource::Node, id: Uuid::now_v7().as_u128() };
    let window_ms = shared.config.cluster.request_deadline_ms;
    let deadline = Instant::now() + Duration::from_millis(window_ms);
    let mut command = Arc::new(Command {
        key: key.unwrap_or_else(own_key),
        body_hash,
        resend_until_ms: 0,
        created_at_ms: clock::unix_ms(),
        op,
    });
    let not_applied = |status, detail| SubmitError::NotApplied { status, detail, retry_after_s: RETRY_AFTER_S };
    let place = shared.park.enter(command_bytes(&command)).map_err(|detail| not_applied(429, detail))?;
    let mut life = Life::new(shared.command_log_time_ms(), window_ms);
    let mut view = shared.view.subscribe();
    let mut way = shared.way.subscribe();
    let mut asked = String::new();
    let mut event = Event::Go;
    let over = tokio::time::sleep_until(deadline);
    tokio::pin!(over);
    loop {
        let leader = view.borrow_and_update().leader_key();
        let via = way.borrow_and_update().through.clone();
        let mut attempt = None;
        let mut pause = None;
        match life.next(event, known_to_somebody(leader, via.as_ref()), shared.command_log_time_ms()) {
            Step::Wait => {}
            Step::Pause { ms } => pause = Some(Duration::from_millis(ms)),
            Step::Send { to, resend_until_ms } => {
                if command.resend_until_ms != resend_until_ms {
                    Arc::make_mut(&mut command).resend_until_ms = resend_until_ms;
                }
                // The rules name the leader of the view that was read above.
                let info = shared.view.borrow().leader.clone().filter(|l| l.id == to);
                // Whoever passes it on may know a newer one.
                asked = match (&info, &via) {
                    (Some(leader), _) if leader.here => leader.name.clone(),
                    (_, Some(via)) => via.leader.name.clone(),
                    (Some(leader), None) => leader.name.clone(),
                    (None, None) => String::new(),
                };
                attempt = Some(send(shared, info.as_ref(), via.as_ref(), &command));
            }
            Step::Finish(verdict) => {
                drop(place);
                return match verdict {
                    Verdict::Outcome(outcome, _) => {
                        fail_points::committed_and_unanswered();
                        Ok(Submitted { outcome, served_by: asked })
                    }
                    Verdict::NotApplied { status, why } => Err(not_applied(status, why)),
                    Verdict::DiskFull(shortages) => Err(SubmitError::DiskFull(shortages)),
                    Verdict::Unknown { why } => Err(SubmitError::Unknown { detail: why }),
                };
            }
        }
        event = tokio::select! {
            biased;
            end = end_of(attempt.as_mut()), if attempt.is_some() => Event::Ended(end),
            () = shared.stop.cancelled() => Event::Stopping,
            () = &mut over => Event::Deadline,
            () = leader_change(&mut view, leader) => match attempt {
                Some(_) => Event::LeaderChanged,
                None => Event::Go,
            },
            // What went out on the way before may be lost: it is sent again, as to another leader.
            () = other_way(&mut way, via.as_ref()) => match attempt {
                Some(_) => Event::LeaderChanged,
                None => Event::Go,
            },
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => Event::Go,
        };
        if let Event::Ended(AttemptEnd::Expired { log_time_ms }) = &event {
            // The commands after this one shall not be late to begin with.
            shared.hear_log_time(*log_time_ms);
        }
    }
}

async fn end_of(attempt: Option<&mut Attempt>) -> AttemptEnd {
    match attempt {
        Some(attempt) => attempt.end().await,
        None => std::future::pending().await,
    }
}

/// The leader as this node knows it, else as whoever passes commands on to it does.
fn known_to_somebody(leader: Leader, via: Option<&Via>) -> Leader {
    match (leader, via) {
        (Leader::Unknown, Some(via)) => Leader::Node { id: via.leader.id, term: via.leader.term },
        (leader, _) => leader,
    }
}

/// Returns once commands go through another node than `known`. What is on its way through one when the leader is within
/// reach again is left there: its answer comes, and to send it again would leave its outcome open without need.
async fn other_way(way: &mut watch::Receiver<Way>, known: Option<&Via>) {
    if way.wait_for(|way| way.through.is_some() && way.through.as_ref() != known).await.is_err() {
        // The way ends with the node, whose `stop` ends this wait.
        std::future::pending::<()>().await;
    }
}

fn send(shared: &Shared, leader: Option<&LeaderInfo>, via: Option<&Via>, command: &Arc<Command>) -> Attempt {
    if let Some(via) = via.filter(|_| leader.is_none_or(|leader| !leader.here)) {
        return Attempt::There(shared.forwarders.relay(via.id, &via.addr, Arc::clone(command)));
    }
    match leader {
        None => Attempt::Over(AttemptEnd::NotSent("the leader has just changed".into())),
        Some(leader) if leader.here => match shared.core.get() {
            Some(core) => match core.proposer.propose(Arc::clone(command)) {
                Ok(answer) => Attempt::Here(answer),
                Err(answer) => Attempt::Over(attempt_end(answer)),
            },
            None => Attempt::Over(AttemptEnd::NotSent("this node is still starting".into())),
        },
        Some(leader) => Attempt::There(shared.forwarders.forward(leader.id, &leader.addr, Arc::clone(command))),
    }
}
