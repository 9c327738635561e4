//! Commands on their way to a leader on another node, or to one that passes them on to it.
//!
//! For each target one task packs all commands that wait at that moment into one message, with
//! several messages under way, in the manner of the proposer. A lost connection leaves the commands
//! of its messages unknown; commands that never went out are safe to say so. The task knows nothing
//! of deadlines: whoever waits for a command drops its receiver, and a command that nobody waits for
//! any more is not sent.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use stemedb_net::{CallError, Lane, Peer, PendingReply};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{
    kinds::Kind,
    messages::{ForwardReply, ForwardRequestRef, ProposeAnswer, pack, unpack},
    peers::Peers,
    proposer::command_bytes,
    submit_rules::AttemptEnd,
};
use crate::state::command::Command;

/// Most commands in one message: as many as in one entry.
const MESSAGE_COMMANDS_MAX: usize = super::proposer::ENTRY_COMMANDS_MAX;

/// A message is closed when its commands reach this many bytes; one larger command goes alone.
const MESSAGE_BYTES_MAX: usize = super::proposer::ENTRY_BYTES_MAX;

/// Messages under way to one leader. As many as it has entries in flight would let it idle while
/// answers travel; twice that does not.
const MESSAGES_IN_FLIGHT_MAX: usize = 2 * super::proposer::ENTRIES_IN_FLIGHT_MAX;

struct Waiting {
    command: Arc<Command>,
    end: oneshot::Sender<AttemptEnd>,
}

type Queue = mpsc::UnboundedSender<Waiting>;

/// The tasks, one for each node that was a leader. Cheap to clone.
#[derive(Clone)]
pub struct Forwarders {
    inner: Arc<Inner>,
}

struct Inner {
    peers: Peers,
    /// How long a message may go without an answer.
    reply_max: Duration,
    /// Address and queue for each Raft id, and for what it is asked. The queues are unbounded as channels: every
    /// command in them holds a place in the park of this node.
    queues: Mutex<HashMap<(u64, Kind), (String, Queue)>>,
}

impl Forwarders {
    /// No task yet. `reply_max`: longest wait for an answer, at least the deadline of a request.
    pub fn new(peers: Peers, reply_max: Duration) -> Forwarders {
        Forwarders { inner: Arc::new(Inner { peers, reply_max, queues: Mutex::default() }) }
    }

    /// Queues a command for node `id` at `addr`, which leads.
    pub fn forward(&self, id: u64, addr: &str, command: Arc<Command>) -> oneshot::Receiver<AttemptEnd> {
        self.queue(id, addr, Kind::Forward, command)
    }

    /// Queues a command for node `id` at `addr`, which is to pass it on to the leader.
    pub fn relay(&self, id: u64, addr: &str, command: Arc<Command>) -> oneshot::Receiver<AttemptEnd> {
        self.queue(id, addr, Kind::Relay, command)
    }

    fn queue(&self, id: u64, addr: &str, kind: Kind, command: Arc<Command>) -> oneshot::Receiver<AttemptEnd> {
        let (end, receiver) = oneshot::channel();
        let mut queues = self.inner.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let usable = queues.get(&(id, kind)).is_some_and(|(known, queue)| known == addr && !queue.is_closed());
        if !usable {
            let (queue, waiting) = mpsc::unbounded_channel();
            let peer = self.inner.peers.to(id, addr, Lane::Log);
            tokio::spawn(run(peer, kind, waiting, self.inner.reply_max));
            queues.insert((id, kind), (addr.to_owned(), queue));
        }
        if let Some((_, queue)) = queues.get(&(id, kind))
            && let Err(mpsc::error::SendError(back)) = queue.send(Waiting { command, end })
        {
            let _ = back.end.send(AttemptEnd::NotSent("the forwarding task has ended".into()));
        }
        receiver
    }

    /// Ends the tasks; what waits is not sent.
    pub fn close(&self) {
        self.inner.queues.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

async fn run(peer: Peer, kind: Kind, mut waiting: mpsc::UnboundedReceiver<Waiting>, reply_max: Duration) {
    let slots = Arc::new(Semaphore::new(MESSAGES_IN_FLIGHT_MAX));
    let mut carry: Option<Waiting> = None;
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let first = match carry.take() {
            Some(first) => first,
            None => match waiting.recv().await {
                Some(first) => first,
                None => return,
            },
        };
        let mut bytes = command_bytes(&first.command);
        let mut packed = vec![first];
        while packed.len() < MESSAGE_COMMANDS_MAX {
            let Ok(next) = waiting.try_recv() else { break };
            let next_bytes = command_bytes(&next.command);
            if bytes.saturating_add(next_bytes) > MESSAGE_BYTES_MAX {
                carry = Some(next);
                break;
            }
            bytes += next_bytes;
            packed.push(next);
        }
        packed.retain(|w| !w.end.is_closed());
        if packed.is_empty() {
            continue;
        }
        match send(&peer, kind, &packed) {
            // Sent from this task, one after the other, so that the order is kept.
            Ok(pending) => {
                tokio::spawn(async move {
                    let answered = pending.wait(reply_max).await;
                    drop(slot);
                    finish(packed, answered.map_err(call_end).and_then(|body| read_reply(&body)));
                });
            }
            Err(end) => finish(packed, Err(end)),
        }
    }
}

fn send(peer: &Peer, kind: Kind, packed: &[Waiting]) -> Result<PendingReply, AttemptEnd> {
    let request = ForwardRequestRef { commands: packed.iter().map(|w| &*w.command).collect() };
    let body = pack(&request).map_err(|e| AttemptEnd::NotSent(e.to_string()))?;
    peer.send(kind.number(), body).map_err(call_end)
}

/// What a failed call says about its commands. Handlers of `Kind::Forward` and `Kind::Relay` refuse only before they
/// propose anything, so a refusal with their code is as good as one by the transport.
fn call_end(error: CallError) -> AttemptEnd {
    let service_refusal =
        matches!(error, CallError::Refused { code, .. } if code == super::rpc_server::REFUSED_BEFORE_EFFECT);
    match error {
        CallError::QueueFull => AttemptEnd::Busy,
        error if error.is_surely_unhandled() || service_refusal => AttemptEnd::NotSent(error.to_string()),
        error => AttemptEnd::Unknown(error.to_string()),
    }
}

fn read_reply(body: &[u8]) -> Result<Vec<ProposeAnswer>, AttemptEnd> {
    let reply: ForwardReply = unpack(body).map_err(|e| AttemptEnd::Unknown(format!("answer of the leader: {e}")))?;
    Ok(reply.answers)
}

/// An answer of a proposer as the end of an attempt.
pub fn attempt_end(answer: ProposeAnswer) -> AttemptEnd {
    match answer {
        ProposeAnswer::Outcome(outcome) => AttemptEnd::Outcome(outcome),
        ProposeAnswer::NotLeader => AttemptEnd::NotLeader,
        ProposeAnswer::Busy => AttemptEnd::Busy,
        ProposeAnswer::Expired { log_time_ms } => AttemptEnd::Expired { log_time_ms },
        ProposeAnswer::Impossible(why) => AttemptEnd::NotSent(why),
        ProposeAnswer::Unknown(why) => AttemptEnd::Unknown(why),
        ProposeAnswer::Full(shortages) => AttemptEnd::Full(shortages),
    }
}

/// The other way round: what a node that has passed a command on answers to whom it did that for.
pub fn relayed_answer(end: AttemptEnd) -> ProposeAnswer {
    match end {
        AttemptEnd::Outcome(outcome) => ProposeAnswer::Outcome(outcome),
        AttemptEnd::NotLeader => ProposeAnswer::NotLeader,
        AttemptEnd::Busy => ProposeAnswer::Busy,
        AttemptEnd::Expired { log_time_ms } => ProposeAnswer::Expired { log_time_ms },
        AttemptEnd::NotSent(why) => ProposeAnswer::Impossible(why),
        AttemptEnd::Unknown(why) => ProposeAnswer::Unknown(why),
        AttemptEnd::Full(shortages) => ProposeAnswer::Full(shortages),
    }
}

fn finish(packed: Vec<Waiting>, answers: Result<Vec<ProposeAnswer>, AttemptEnd>) {
    let ends: Vec<AttemptEnd> = match answers {
        Ok(answers) if answers.len() == packed.len() => answers.into_iter().map(attempt_end).collect(),
        Ok(answers) => {
            let why = format!("the leader answered {} of {} commands", answers.len(), packed.len());
            vec![AttemptEnd::Unknown(why); packed.len()]
        }
        Err(end) => vec![end; packed.len()],
    };
    for (waiting, end) in packed.into_iter().zip(ends) {
        // The receiver is gone when the command's life ended otherwise.
        let _ = waiting.end.send(end);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use stemedb_net::code;

    use super::*;

    #[test]
    fn what_is_known_of_a_command_stays_the_same_when_another_node_passes_it_on() {
        for end in [
            AttemptEnd::NotLeader,
            AttemptEnd::Busy,
            AttemptEnd::Full(Vec::new()),
            AttemptEnd::NotSent("no connection".into()),
            AttemptEnd::Expired { log_time_ms: 7 },
            AttemptEnd::Unknown("lost".into()),
        ] {
            assert_eq!(attempt_end(relayed_answer(end.clone())), end);
        }
    }

    #[test]
    fn only_what_no_proposer_saw_counts_as_not_sent() {
        let refused = |code| CallError::Refused { code, message: String::new() };
        assert!(matches!(call_end(CallError::NotSent { why: String::new() }), AttemptEnd::NotSent(_)));
        assert!(matches!(call_end(CallError::QueueFull), AttemptEnd::Busy));
        assert!(matches!(call_end(refused(code::WRONG_CLUSTER)), AttemptEnd::NotSent(_)));
        assert!(matches!(call_end(refused(super::super::rpc_server::REFUSED_BEFORE_EFFECT)), AttemptEnd::NotSent(_)));
        assert!(matches!(call_end(refused(code::PANICKED)), AttemptEnd::Unknown(_)));
        assert!(matches!(call_end(refused(code::ANSWER_TOO_LARGE)), AttemptEnd::Unknown(_)));
        assert!(matches!(call_end(CallError::Unknown { why: String::new() }), AttemptEnd::Unknown(_)));
    }
}
