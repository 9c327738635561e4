//! Where commands become log entries: one task packs all that wait into one entry.
//!
//! Packing is where throughput comes from: under load an entry carries many commands, so one sync and
//! one round of messages serve them all, while a lone command is proposed at once. A few entries are
//! in flight, so that the next is packed while the last is being committed. Each command is answered
//! with its own outcome, and an answer says exactly whether the command may have been appended. The
//! task runs on every node and is answered "not the leader" where it does not lead.

use std::sync::Arc;

use bytes::Bytes;
use openraft::{errors::ClientWriteError, impls::ProgressResponder, raft::ClientWriteResult};
use serde::Serialize;
use stemedb_raft::{
    codec,
    types::{EntryData, TypeConfig},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{
    core::RaftNode,
    log_time::Stamper,
    messages::ProposeAnswer,
    park::{Park, Place},
    room::{Admission, Need},
    vital::Vital,
};
use crate::state::{
    command::{Command, CommandOutcome, ENTRY_FORMAT},
    level,
};

/// Most commands in one entry. At 150 bytes each this is well below the bound on bytes; it keeps the
/// time for which apply holds back readers of one entry in the milliseconds.
pub const ENTRY_COMMANDS_MAX: usize = 4_096;

/// An entry is closed when its commands reach this many bytes. A single larger command goes alone.
/// Small enough that an append of it never delays the entries behind it noticeably.
pub const ENTRY_BYTES_MAX: usize = 1024 * 1024;

/// Entries on their way at once. Two: while one is being synced and acknowledged, the next is on its way,
/// and whatever arrives meanwhile waits to be packed together. More entries are smaller entries, with more
/// fsyncs for the same writes and no more speed; one alone leaves the network idle during a sync.
pub const ENTRIES_IN_FLIGHT_MAX: usize = 2;

/// Commands that wait for the proposer: what three nodes may park at once.
const QUEUE_COMMANDS_MAX: usize = 30_000;

/// Their bytes: what one node may park at once. More than that waits at the nodes that took it.
const QUEUE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A command that waits, with what it holds.
struct Waiting {
    command: Arc<Command>,
    bytes: usize,
    reply: oneshot::Sender<ProposeAnswer>,
    _place: Place,
}

/// The way to the task. Cheap to clone.
#[derive(Clone)]
pub struct Proposer {
    queue: mpsc::UnboundedSender<Waiting>,
    bound: Park,
    admission: watch::Receiver<Arc<Admission>>,
}

/// What the task asks the node for.
pub trait Surroundings: Send + Sync + 'static {
    /// The term, as this node knows it.
    fn term(&self) -> u64;
    /// Log time now, by this node's estimate.
    fn log_time_ms(&self) -> u64;
    /// The feature level that the cluster has reached, as far as this node has applied.
    fn feature_level(&self) -> u32;
    /// Why this node must not acknowledge anything at present, if it must not.
    fn silenced(&self) -> Option<String>;
    /// An entry with this many commands was proposed.
    fn entry_proposed(&self, commands: usize);
}

impl Proposer {
    /// Starts the task. It ends with `stop`; what waits then is left without an answer.
    /// `admission`: what may be proposed now, as far as disks have room.
    pub fn start(
        raft: RaftNode,
        around: Arc<dyn Surroundings>,
        admission: watch::Receiver<Arc<Admission>>,
        vital: &Vital,
        stop: CancellationToken,
    ) -> Proposer {
        let bound = Park::new(QUEUE_COMMANDS_MAX, QUEUE_BYTES_MAX);
        // Unbounded as a channel; each item holds a place of `bound`.
        let (queue, waiting) = mpsc::unbounded_channel();
        let asked = admission.clone();
        vital.spawn("the proposer", async move {
            stop.run_until_cancelled(run(raft, around, asked, waiting)).await;
        });
        Proposer { queue, bound, admission }
    }

    /// Queues a command. The receiver fails only if the task died, and then the outcome is unknown.
    pub fn propose(&self, command: Arc<Command>) -> Result<oneshot::Receiver<ProposeAnswer>, ProposeAnswer> {
        // Here as well as before it is proposed: what waits for a slot may wait for as long as the disks are full.
        if let Some(refusal) = self.admission.borrow().refusal(Need::of(&command.op)) {
            return Err(refusal);
        }
        let bytes = command_bytes(&command);
        let place = self.bound.enter(bytes).map_err(|_| ProposeAnswer::Busy)?;
        let (reply, answer) = oneshot::channel();
        let waiting = Waiting { command, bytes, reply, _place: place };
        self.queue.send(waiting).map_err(|_| ProposeAnswer::NotLeader)?;
        Ok(answer)
    }
}

/// About how many bytes a command takes in an entry: exact for texts, rounded up for the rest.
pub fn command_bytes(command: &Command) -> usize {
    use crate::{model::NewAssertion, state::command::Operation};
    /// Key, hash, times and lengths.
    const COMMAND: usize = 80;
    /// Ids, numbers and lengths of one assertion, vote, epoch or supersession.
    const FACT: usize = 64;
    let text = |t: &Option<String>| t.as_ref().map_or(0, String::len);
    let assertion = |a: &NewAssertion| {
        FACT + a.concept_path.len() + a.predicate.len() + a.value_json.len() + text(&a.source) + text(&a.epoch)
    };
    COMMAND
        + match &command.op {
            Operation::Assert(list) => list.iter().map(assertion).sum(),
            Operation::ImportChunk { import_id, assertions, .. } => {
                FACT + import_id.len() + assertions.iter().map(assertion).sum::<usize>()
            }
            Operation::Vote(vote) => FACT + vote.voter.len() + text(&vote.reason),
            Operation::Epoch(epoch) => FACT + epoch.name.len() + text(&epoch.description) + text(&epoch.supersedes),
            Operation::Supersede(s) => FACT + text(&s.reason),
            Operation::Rebuild(_) => 2 * FACT,
            Operation::Members(_) => 8 * FACT,
            Operation::Level(_) => FACT,
        }
}

/// `EntryBody` by reference: the same bytes without copying the commands.
#[derive(Serialize)]
struct EntryBodyRef<'a> {
    format: u16,
    log_time_ms: u64,
    commands: Vec<&'a Command>,
}

/// Takes what waits, up to the bounds of one entry. What does not fit stays in `carry`. Pure but for
/// the channel.
fn pack_entry(
    first: Waiting,
    waiting: &mut mpsc::UnboundedReceiver<Waiting>,
    carry: &mut Option<Waiting>,
) -> Vec<Waiting> {
    let mut bytes = first.bytes;
    let mut packed = vec![first];
    while packed.len() < ENTRY_COMMANDS_MAX {
        let Ok(next) = waiting.try_recv() else { break };
        if bytes.saturating_add(next.bytes) > ENTRY_BYTES_MAX {
            *carry = Some(next);
            break;
        }
        bytes += next.bytes;
        packed.push(next);
    }
    packed
}

async fn run(
    raft: RaftNode,
    around: Arc<dyn Surroundings>,
    admission: watch::Receiver<Arc<Admission>>,
    mut waiting: mpsc::UnboundedReceiver<Waiting>,
) {
    let slots = Arc::new(Semaphore::new(ENTRIES_IN_FLIGHT_MAX));
    let mut stamper = Stamper::default();
    let mut carry = None;
    loop {
        // First a slot, then the commands: whatever arrives while all slots are taken is packed together.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let first = match carry.take() {
            Some(first) => first,
            None => match waiting.recv().await {
                Some(first) => first,
                None => return,
            },
        };
        let mut packed = pack_entry(first, &mut waiting, &mut carry);
        let log_time_ms = stamper.stamp(around.term(), around.log_time_ms());
        packed.retain_mut(|w| !w.reply.is_closed());
        // A node that may not acknowledge need not append either: so its commands' end is certain.
        if around.silenced().is_some() {
            answer_all(packed, &ProposeAnswer::NotLeader);
            continue;
        }
        let packed = known_to_all(packed, around.feature_level());
        let admitted = Arc::clone(&admission.borrow());
        let (packed, refused): (Vec<_>, Vec<_>) = packed
            .into_iter()
            .map(|w| (admitted.refusal(Need::of(&w.command.op)), w))
            .partition(|(refusal, _)| refusal.is_none());
        for (refusal, waiting) in refused {
            waiting.answer(refusal.unwrap_or(ProposeAnswer::NotLeader));
        }
        let packed = packed.into_iter().map(|(_, w)| w);
        let (packed, expired): (Vec<_>, Vec<_>) = packed.partition(|w| w.command.resend_until_ms >= log_time_ms);
        for late in expired {
            late.answer(ProposeAnswer::Expired { log_time_ms });
        }
        if !packed.is_empty() {
            propose_entry(&raft, Arc::clone(&around), packed, log_time_ms, slot).await;
        }
    }
}

impl Waiting {
    fn answer(self, answer: ProposeAnswer) {
        // The receiver is gone when its client or connection is; then nobody waits for this.
        let _ = self.reply.send(answer);
    }
}

/// The rule of feature levels: what a member may not know never gets into the log. Refuses it, and returns the rest.
fn known_to_all(packed: Vec<Waiting>, level: u32) -> Vec<Waiting> {
    let (known, ahead): (Vec<_>, Vec<_>) = packed.into_iter().partition(|w| level::needed(&w.command.op) <= level);
    for waiting in ahead {
        let needed = level::needed(&waiting.command.op);
        let why = format!("it needs feature level {needed}, and the cluster has {level}");
        waiting.answer(ProposeAnswer::Impossible(why));
    }
    known
}

fn answer_all(packed: Vec<Waiting>, answer: &ProposeAnswer) {
    for waiting in packed {
        waiting.answer(answer.clone());
    }
}

async fn propose_entry(
    raft: &RaftNode,
    around: Arc<dyn Surroundings>,
    packed: Vec<Waiting>,
    log_time_ms: u64,
    slot: OwnedSemaphorePermit,
) {
    let commands = packed.iter().map(|w| &*w.command).collect();
    let body = match codec::encode(&EntryBodyRef { format: ENTRY_FORMAT, log_time_ms, commands }) {
        Ok(body) => body,
        Err(error) => {
            tracing::error!(%error, commands = packed.len(), "an entry could not be encoded");
            return answer_all(packed, &ProposeAnswer::Impossible(error.to_string()));
        }
    };
    let (responder, done) = ProgressResponder::<TypeConfig, ClientWriteResult<TypeConfig>>::complete_only();
    // An error here means that the message never reached the core, so nothing was appended.
    if raft.client_write_ff(EntryData(Bytes::from(body)), Some(responder)).await.is_err() {
        return answer_all(packed, &ProposeAnswer::NotLeader);
    }
    around.entry_proposed(packed.len());
    tokio::spawn(async move {
        let result = done.await;
        drop(slot);
        match result {
            Ok(result) => finish_entry(packed, result, around.silenced()),
            Err(_) => {
                answer_all(packed, &ProposeAnswer::Unknown("the Raft core ended before the entry was committed".into()))
            }
        }
    });
}

/// Hands each command its part of the entry's result.
fn finish_entry(packed: Vec<Waiting>, result: ClientWriteResult<TypeConfig>, silenced: Option<String>) {
    let written = match result {
        Ok(written) => written,
        Err(ClientWriteError::ForwardToLeader(_)) => return answer_all(packed, &ProposeAnswer::NotLeader),
        Err(ClientWriteError::LogEntryDiscarded(_)) => {
            let why = "the leader changed before the entry was committed here".to_owned();
            return answer_all(packed, &ProposeAnswer::Unknown(why));
        }
        Err(error @ (ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_))) => {
            return answer_all(packed, &ProposeAnswer::Unknown(error.to_string()));
        }
    };
    // A leader whose disk has failed still commits through its followers; its acknowledgement would
    // claim a copy that it does not have. The same key is sent to the next leader.
    if let Some(why) = silenced {
        return answer_all(packed, &ProposeAnswer::Unknown(why));
    }
    let outcomes: Vec<CommandOutcome> = match codec::decode(&written.data.0) {
        Ok(outcomes) => outcomes,
        Err(error) => {
            tracing::error!(%error, log_id = %written.log_id, "the outcomes of an entry cannot be read");
            return answer_all(packed, &ProposeAnswer::Unknown(error.to_string()));
        }
    };
    if outcomes.len() != packed.len() {
        let why = format!("entry {} has {} commands and {} outcomes", written.log_id, packed.len(), outcomes.len());
        tracing::error!("{why}");
        return answer_all(packed, &ProposeAnswer::Unknown(why));
    }
    for (waiting, outcome) in packed.into_iter().zip(outcomes) {
        waiting.answer(ProposeAnswer::Outcome(outcome));
    }
}

#[cfg(test)]
#[path = "proposer_tests.rs"]
mod tests;
