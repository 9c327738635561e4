//! The peer port: what this node answers to other nodes.
//!
//! Who may speak is decided before anything is read: cluster, target and boot count must fit. Appends
//! of one connection reach Raft in the order in which they arrived. Handlers refuse only before they
//! have changed anything; whatever may have had an effect is answered with a value that says so.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest, VoteRequest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use stemedb_net::{
    ConnectionHandler, PeerHello, Refusal, Service, code,
    identity::{PROBE_KINDS, is_guest, judge},
};
use stemedb_raft::types::TypeConfig;
use tokio::sync::oneshot;

use super::{
    bootstrap::{Assignment, ProbeAnswer},
    checkpoint_receive::CheckpointInbox,
    core::{RaftNode, Shared},
    forward::relayed_answer,
    kinds::Kind,
    level, members,
    messages::{
        EntryQuestions, ForwardReply, ForwardRequest, LogEndReply, ProposeAnswer, ReadIndexReply, pack, pack_json,
        unpack,
    },
    process::Process,
    proposer::command_bytes,
    rebuild, repair, status,
    submit_rules::AttemptEnd,
    way,
};
use crate::{clock, config::MemberRole};

/// A handler refused the request, and the request had no effect.
pub const REFUSED_BEFORE_EFFECT: u16 = code::SERVICE_MIN;
/// A handler failed; the request may have had an effect.
pub const FAILED: u16 = code::SERVICE_MIN + 1;

type Answer = Result<Bytes, Refusal>;

/// The service behind the peer port.
pub struct PeerService {
    process: Arc<Process>,
    inbox: Arc<CheckpointInbox>,
}

impl PeerService {
    /// Answers for this node.
    pub fn new(process: Arc<Process>) -> PeerService {
        let inbox = Arc::new(CheckpointInbox::new(process.config.node.data_dir.clone()));
        PeerService { process, inbox }
    }
}

impl Service for PeerService {
    fn connected(&self, hello: PeerHello) -> Box<dyn ConnectionHandler> {
        Box::new(Connection { process: Arc::clone(&self.process), inbox: Arc::clone(&self.inbox), hello })
    }

    fn admit(&self, hello: &PeerHello, kind: u16) -> Result<(), Refusal> {
        judge(&self.process.local(), hello, kind, self.process.boots.highest(hello.node_id))
    }
}

struct Connection {
    process: Arc<Process>,
    inbox: Arc<CheckpointInbox>,
    hello: PeerHello,
}

fn refused(why: impl ToString) -> Refusal {
    Refusal::new(REFUSED_BEFORE_EFFECT, why.to_string())
}

fn failed(why: impl ToString) -> Refusal {
    Refusal::new(FAILED, why.to_string())
}

fn read<T: DeserializeOwned>(body: &Bytes) -> Result<T, Refusal> {
    unpack(body).map_err(refused)
}

fn answer<T: Serialize>(value: &T) -> Answer {
    pack(value).map_err(failed)
}

fn now(answer: Answer) -> BoxFuture<'static, Answer> {
    std::future::ready(answer).boxed()
}

impl ConnectionHandler for Connection {
    fn on_request(&mut self, kind: u16, body: Bytes) -> BoxFuture<'static, Answer> {
        let Some(kind) = Kind::of(kind) else { return now(Err(Refusal::unknown_kind(kind))) };
        // One incarnation answers the whole request; `admit` has compared the target with its id a moment ago, and
        // a frame that was meant for the one before is refused here.
        let Some(shared) = self.process.current() else { return now(Err(refused("this node is still starting"))) };
        if kind.number() >= PROBE_KINDS && self.hello.target_id != shared.local.load().node_id {
            return now(Err(refused("this node has just come back under another id")));
        }
        match kind {
            Kind::Probe => return now(probe(&shared)),
            Kind::Assign => return assign(shared, body).boxed(),
            Kind::RebuildAsk => return rebuild::grant::ask(shared, body).boxed(),
            Kind::Standing => return members::standing::answer(shared, body).boxed(),
            Kind::Candidate => return now(members::candidate_answer(&shared)),
            Kind::About => return now(level::answer(&shared)),
            Kind::LookAgain => {
                shared.members.look_again.notify_one();
                return now(answer(&()));
            }
            _ => {}
        }
        // What a node needs to pass on the requests of its clients: it promises nothing to that node.
        let promises = !matches!(kind, Kind::Status | Kind::Forward | Kind::Relay | Kind::Way | Kind::ReadIndex);
        if is_guest(self.hello.node_id) {
            return match promises {
                // Nothing about it is remembered.
                false => self.handle(shared, kind, body),
                true => now(Err(refused("the sender has no place in this cluster yet"))),
            };
        }
        let (sender, boot) = (self.hello.node_id, self.hello.boot);
        if let Err(stale) = self.process.boots.observe(sender, boot) {
            return now(Err(Refusal::new(code::STALE_BOOT, stale.to_string())));
        }
        let handled = self.handle(Arc::clone(&shared), kind, body);
        // The boot must be durable here before anything is promised to its bearer; that of no other node (see `boots`).
        if !promises || self.process.boots.is_saved(sender, boot) {
            return handled;
        }
        async move {
            // Not `refused`: the request is in Raft's queue by now.
            shared.boots.wait_saved(sender, boot).await.map_err(failed)?;
            handled.await
        }
        .boxed()
    }
}

impl Connection {
    fn handle(&self, shared: Arc<Shared>, kind: Kind, body: Bytes) -> BoxFuture<'static, Answer> {
        if kind == Kind::Status {
            return now(answer(&status::own_status(&shared)));
        }
        if kind == Kind::Way {
            return now(pack_json(&way::reply(&shared)).map_err(failed));
        }
        if kind == Kind::Entries {
            return entries(shared, body).boxed();
        }
        if shared.core.get().is_none() {
            return now(Err(refused("this node is still starting")));
        }
        match kind {
            Kind::Append => append(shared, &body, self.hello.node_id),
            Kind::Vote => raft_call(shared, body, |raft, request: VoteRequest<TypeConfig>| async move {
                raft.vote(request).await.map_err(failed)
            }),
            Kind::PreVote => raft_call(shared, body, |raft, request: VoteRequest<TypeConfig>| async move {
                raft.pre_vote(request).await.map_err(failed)
            }),
            Kind::TransferLeader => raft_call(
                Arc::clone(&shared),
                body,
                move |raft, request: TransferLeaderRequest<TypeConfig>| async move {
                    let is_own = request.to_node_id() == &shared.local.load().node_id;
                    if let Some(why) = shared.may_not_lead().filter(|_| is_own) {
                        return Err(refused(why));
                    }
                    raft.handle_transfer_leader(request).await.map_err(failed)
                },
            ),
            Kind::Forward => forward(shared, &body),
            Kind::Relay => relay(shared, &body),
            Kind::LogEnd => log_end(shared),
            Kind::ReadIndex => read_index(shared).boxed(),
            Kind::CheckpointOpen => self.inbox.clone().open(shared, body).boxed(),
            Kind::CheckpointChunk => self.inbox.clone().chunk(shared, body).boxed(),
            Kind::CheckpointInstall => self.inbox.clone().install(shared, body).boxed(),
            Kind::CheckpointOffer => Arc::clone(&self.process.offers).offer(shared, body).boxed(),
            Kind::CheckpointFetch => Arc::clone(&self.process.offers).fetch(shared, body).boxed(),
            Kind::RebuildStep => rebuild::grant::step(shared, body).boxed(),
            Kind::Probe
            | Kind::Assign
            | Kind::RebuildAsk
            | Kind::Standing
            | Kind::Candidate
            | Kind::LookAgain
            | Kind::About
            | Kind::Status
            | Kind::Way
            | Kind::Entries => now(Err(failed("handled before"))),
        }
    }
}

/// Runs `work` with Raft and the decoded request.
fn raft_call<Q, A, F>(
    shared: Arc<Shared>,
    body: Bytes,
    work: impl FnOnce(RaftNode, Q) -> F + Send + 'static,
) -> BoxFuture<'static, Answer>
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
    F: Future<Output = Result<A, Refusal>> + Send + 'static,
{
    async move {
        let raft = shared.core.get().ok_or_else(|| refused("this node is still starting"))?.raft.clone();
        answer(&work(raft, read(&body)?).await?)
    }
    .boxed()
}

/// Hands an append to Raft at once, so that the order of arrival is the order in Raft's queue, and
/// returns the future of its answer.
fn append(shared: Arc<Shared>, body: &Bytes, sender: u64) -> BoxFuture<'static, Answer> {
    let request: AppendEntriesRequest<TypeConfig> = match read(body) {
        Ok(request) => request,
        Err(refusal) => return now(Err(refusal)),
    };
    let committed = request.leader_commit.map(|id| id.index);
    // Not when it is answered: its entries may wait for a sync, and the state is as old as the message.
    let arrived_ms = clock::monotonic_ms();
    // Whoever waits for the disk here has not lost its leader.
    if request.vote.leader_id.term >= shared.view.borrow().term {
        shared.leader_heard_at_ms.fetch_max(arrived_ms, Ordering::Relaxed);
    }
    let handled = async move {
        let core = shared.core.get().ok_or_else(|| refused("this node is still starting"))?;
        let response = core.raft.append_entries(request).await.map_err(failed)?;
        if !matches!(response, openraft::raft::AppendEntriesResponse::HigherVote(_)) {
            tracing::trace!(sender, committed, "append");
            shared.leader_contact(arrived_ms, committed);
        }
        answer(&response)
    };
    // The first poll puts the request into Raft's queue.
    begun(handled)
}

/// Queues the question behind every append that arrived before it, so that the answer counts them.
fn log_end(shared: Arc<Shared>) -> BoxFuture<'static, Answer> {
    let asked = async move {
        let core = shared.core.get().ok_or_else(|| refused("this node is still starting"))?;
        let last_log_id = core.raft.with_raft_state(|state| state.log_ids.last().copied()).await.map_err(failed)?;
        answer(&LogEndReply { last_log_id, may_not_lead: shared.may_not_lead() })
    };
    begun(asked)
}

/// Polls `handled` once, here and now, and returns the rest of it.
fn begun(handled: impl Future<Output = Answer> + Send + 'static) -> BoxFuture<'static, Answer> {
    // Without `unconstrained` the first poll could be put off when the connection's task has used up its turn, and a
    // later request would overtake this one.
    let mut handled: Pin<Box<_>> = Box::pin(tokio::task::unconstrained(handled));
    match handled.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => now(answer),
        Poll::Pending => handled,
    }
}

/// Queues the commands in their order at once, and returns the future of their outcomes.
fn forward(shared: Arc<Shared>, body: &Bytes) -> BoxFuture<'static, Answer> {
    let request: ForwardRequest = match read(body) {
        Ok(request) => request,
        Err(refusal) => return now(Err(refusal)),
    };
    let Some(core) = shared.core.get() else { return now(Err(refused("this node is still starting"))) };
    // Its proposer may hang with its core, and would keep the commands for as long.
    if let Some(why) = shared.silenced() {
        return now(Err(refused(why)));
    }
    let queued: Vec<Result<oneshot::Receiver<ProposeAnswer>, ProposeAnswer>> =
        request.commands.into_iter().map(|command| core.proposer.propose(Arc::new(command))).collect();
    async move {
        let mut answers = Vec::with_capacity(queued.len());
        for queued in queued {
            answers.push(match queued {
                Ok(pending) => {
                    pending.await.unwrap_or_else(|_| ProposeAnswer::Unknown("the proposer has ended".into()))
                }
                Err(answer) => answer,
            });
        }
        answer(&ForwardReply { answers })
    }
    .boxed()
}

/// Passes commands on to the leader for a node that does not reach it. One hop: what goes out from here is `Forward`, which
/// is proposed where it arrives, or refused.
fn relay(shared: Arc<Shared>, body: &Bytes) -> BoxFuture<'static, Answer> {
    let leader = shared.view.borrow().leader.clone();
    let leader = match leader {
        Some(leader) if leader.here => return forward(shared, body),
        Some(leader) => leader,
        None => return now(Err(refused("no leader is known here"))),
    };
    if let Some(why) = shared.silenced() {
        return now(Err(refused(why)));
    }
    let request: ForwardRequest = match read(body) {
        Ok(request) => request,
        Err(refusal) => return now(Err(refusal)),
    };
    // They hold their places here as the commands of this node's own clients do.
    let passed_on: Vec<_> = request
        .commands
        .into_iter()
        .map(|command| {
            let place = shared.park.enter(command_bytes(&command)).map_err(|_| ProposeAnswer::Busy)?;
            Ok((place, shared.forwarders.forward(leader.id, &leader.addr, Arc::new(command))))
        })
        .collect();
    async move {
        let mut answers = Vec::with_capacity(passed_on.len());
        for passed_on in passed_on {
            answers.push(match passed_on {
                Ok((_place, end)) => {
                    let gone = |_| AttemptEnd::Unknown("the forwarding task has ended".into());
                    relayed_answer(end.await.unwrap_or_else(gone))
                }
                Err(answer) => answer,
            });
        }
        answer(&ForwardReply { answers })
    }
    .boxed()
}

/// Answers before this node's own log is whole: two damaged logs may have what the other lacks.
async fn entries(shared: Arc<Shared>, body: Bytes) -> Answer {
    let request: EntryQuestions = read(&body)?;
    let answers = tokio::task::spawn_blocking(move || repair::answer_blocking(&shared, &request)).await;
    answer(&answers.map_err(failed)?.ok_or_else(|| refused("this node is still reading its log"))?)
}

async fn read_index(shared: Arc<Shared>) -> Answer {
    let core = shared.core.get().ok_or_else(|| refused("this node is still starting"))?;
    // Only rounds of this node itself: asking on would let two nodes that take each other for the
    // leader ask for ever.
    answer(&match core.leader_rounds.join().await {
        Ok(index) => ReadIndexReply::Index(index),
        Err(why) => ReadIndexReply::NotLeader(why),
    })
}

/// Where this node stands, for a forming cluster.
fn probe(shared: &Shared) -> Answer {
    // Whether this folder is empty is not known before its log was read: an early "empty" could let the others
    // form a second cluster.
    if shared.wal().is_none() {
        return Err(refused("this node is still starting"));
    }
    let name = shared.name().to_owned();
    let list_hash = shared.list_hash;
    // A cluster that counts on it would be given half of its places, and wait for ever.
    if shared.identity.load().is_none() && shared.config.cluster.role == MemberRole::Learner {
        return Err(refused(format!(
            "it has cluster.role = \"learner\" and never forms a cluster: take it out of cluster.peers and \
             cluster.bootstrap_expect of the others, and add it once they run: stemedb member add {name} --learner"
        )));
    }
    answer(&match &**shared.identity.load() {
        None => ProbeAnswer::Empty { name, list_hash },
        Some(id) if shared.log_is_used() => {
            ProbeAnswer::Member { name, cluster_id: id.cluster_id, raft_id: id.raft_id }
        }
        Some(id) => ProbeAnswer::Assigned { name, list_hash, cluster_id: id.cluster_id, raft_id: id.raft_id },
    })
}

async fn assign(shared: Arc<Shared>, body: Bytes) -> Answer {
    let assignment: Assignment = read(&body)?;
    let own = (**shared.identity.load()).as_ref().map(|id| (id.cluster_id, id.raft_id));
    super::bootstrap::accept(&assignment, shared.name(), shared.list_hash, own).map_err(refused)?;
    if own.is_some() {
        return answer(&());
    }
    let (reply, done) = oneshot::channel();
    shared.assignments.try_send((assignment, reply)).map_err(|_| refused("this node is not waiting for a place"))?;
    done.await.map_err(|_| refused("this node is not waiting for a place"))?.map_err(refused)?;
    answer(&())
}

#[cfg(test)]
#[path = "rpc_server_tests.rs"]
mod tests;
