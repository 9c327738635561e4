//! Raft's outgoing messages over the connections of this node.
//!
//! Heartbeats, votes and transfers use the control lane, entries the log lane, checkpoints the bulk
//! lane, so that none waits behind a larger one. Appends are pipelined: each goes out when the
//! replication produces it, in order on one connection, and answers are handed back in that order.
//! After the first answer that is no success the stream ends, as openraft expects, and a new one
//! starts from what the follower has. Nothing here decides anything about Raft.

use std::time::Duration;

use futures_util::{
    Stream, StreamExt,
    future::{self, BoxFuture},
    stream::{self, BoxStream},
};
use openraft::{
    OptionalSend, RaftNetworkFactory, RaftNetworkV2,
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult,
        TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use stemedb_net::{CallError, Lane, Peer, PendingReply};
use stemedb_raft::types::{LogId, Member, TypeConfig, Vote};

use super::{
    checkpoint_send,
    kinds::Kind,
    messages::{pack, unpack},
    peers::Peers,
};
use crate::state::{engine::checkpoint::Checkpoint, machine::StateHandle};

/// Appends sent and not answered, per follower. A follower answers after its sync, so this covers the
/// entries that arrive during one; the log's own bound on bytes in one append holds as well.
const APPENDS_IN_FLIGHT_MAX: usize = 64;

/// How long an append may go without an answer. Far above a sync, since giving up means sending the
/// same entries again; a lost connection is noticed at once and does not wait for this.
const APPEND_REPLY_MAX: Duration = Duration::from_secs(5);

/// Makes the clients that openraft asks for.
pub struct Network {
    peers: Peers,
    state: StateHandle,
}

impl Network {
    /// Over these connections; the checkpoints that are sent are this state's.
    pub fn new(peers: Peers, state: StateHandle) -> Network {
        Network { peers, state }
    }

    fn link(&self, target: u64, node: &Member, appends: Lane) -> Link {
        Link { peers: self.peers.clone(), state: self.state.clone(), target, addr: node.peer_addr.clone(), appends }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &Member) -> Link {
        self.link(target, node, Lane::Log)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Member) -> Link {
        self.link(target, node, Lane::Control)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &Member) -> Link {
        self.link(target, node, Lane::Bulk)
    }
}

/// The way to one node.
pub struct Link {
    peers: Peers,
    state: StateHandle,
    target: u64,
    addr: String,
    /// The lane of `append_entries` and `stream_append`.
    appends: Lane,
}

type RpcError = RPCError<TypeConfig>;

/// A failed call as openraft sees it: `Unreachable` makes it wait before it tries again.
pub(super) fn rpc_error(error: CallError) -> RpcError {
    match error {
        CallError::Unknown { .. } => RPCError::Network(NetworkError::new(&error)),
        CallError::NotSent { .. } | CallError::Refused { .. } | CallError::QueueFull | CallError::TooLarge { .. } => {
            RPCError::Unreachable(Unreachable::new(&error))
        }
    }
}

fn unreadable(error: impl std::error::Error + 'static) -> RpcError {
    RPCError::Unreachable(Unreachable::new(&error))
}

impl Link {
    fn peer(&self, lane: Lane) -> Peer {
        self.peers.to(self.target, &self.addr, lane)
    }

    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        lane: Lane,
        kind: Kind,
        request: &Q,
        timeout: Duration,
    ) -> Result<A, RpcError> {
        let body = pack(request).map_err(unreadable)?;
        let answer = self.peer(lane).call(kind.number(), body, timeout).await.map_err(rpc_error)?;
        unpack(&answer).map_err(unreadable)
    }

    fn append_timeout(&self, option: &RPCOption) -> Duration {
        match self.appends {
            Lane::Control => option.soft_ttl(),
            Lane::Log | Lane::Bulk => option.soft_ttl().max(APPEND_REPLY_MAX),
        }
    }
}

/// First and last log id of an append, to turn its answer into openraft's form.
struct Range {
    prev: Option<LogId>,
    last: Option<LogId>,
}

impl Range {
    fn of(request: &AppendEntriesRequest<TypeConfig>) -> Range {
        let last = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
        Range { prev: request.prev_log_id, last }
    }

    fn result(&self, response: AppendEntriesResponse<TypeConfig>) -> Result<StreamAppendResult<TypeConfig>, RpcError> {
        Ok(match response {
            AppendEntriesResponse::Success => Ok(self.last),
            AppendEntriesResponse::PartialSuccess(log_id) => Ok(log_id),
            AppendEntriesResponse::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
            AppendEntriesResponse::Conflict => match self.prev {
                Some(prev) => Err(StreamAppendError::Conflict(prev)),
                None => {
                    let text = "a follower reports a conflict before the first entry, which cannot be";
                    return Err(RPCError::Unreachable(Unreachable::from_string(text)));
                }
            },
        })
    }

    /// Whether more answers may follow this one.
    fn goes_on(&self, result: &Result<StreamAppendResult<TypeConfig>, RpcError>) -> bool {
        matches!(result, Ok(Ok(matched)) if *matched == self.last)
    }
}

async fn append_answer(
    sent: Result<PendingReply, RpcError>,
    range: &Range,
    timeout: Duration,
) -> Result<StreamAppendResult<TypeConfig>, RpcError> {
    let answer = sent?.wait(timeout).await.map_err(rpc_error)?;
    range.result(unpack(&answer).map_err(unreadable)?)
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = Checkpoint;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RpcError> {
        self.call(self.appends, Kind::Append, &request, self.append_timeout(&option)).await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let timeout = self.append_timeout(&option);
        let peer = self.peer(self.appends);
        let sent_and_answered = input
            .map(move |request| {
                let range = Range::of(&request);
                // Sent here, when the stream is polled, and not in the future: this keeps the order.
                let sent = pack(&request)
                    .map_err(unreadable)
                    .and_then(|body| peer.send(Kind::Append.number(), body).map_err(rpc_error));
                async move {
                    let result = append_answer(sent, &range, timeout).await;
                    let goes_on = range.goes_on(&result);
                    (result, goes_on)
                }
            })
            .buffered(APPENDS_IN_FLIGHT_MAX);
        // After the last answer nothing more is asked of the input: openraft counts what it hands out as sent.
        let answers = stream::unfold(Some(sent_and_answered), |open| async move {
            let mut open = open?;
            let (result, goes_on) = open.next().await?;
            Some((result, goes_on.then_some(open)))
        });
        let answers: BoxStream<'s, _> = Box::pin(answers);
        Box::pin(future::ready(Ok(answers)))
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        self.call(Lane::Control, Kind::Vote, &request, option.soft_ttl()).await
    }

    // The default implementation grants: a node that cannot be reached must not.
    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        self.call(Lane::Control, Kind::PreVote, &request, option.soft_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::type_config::alias::SnapshotOf<TypeConfig, Checkpoint>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let peer = self.peer(Lane::Bulk);
        let checkpoint = snapshot.snapshot.clone();
        if self.state.is_put_away(&checkpoint) {
            let why = "the checkpoint is damaged, and there cannot be another one before the tree is mended";
            return Err(StreamingError::Unreachable(Unreachable::from_string(why)));
        }
        let failed = tokio::select! {
            closed = cancel => return Err(StreamingError::Closed(closed)),
            sent = checkpoint_send::send(&peer, vote, snapshot) => match sent {
                Ok(response) => return Ok(response),
                Err(failed) => failed,
            },
        };
        if failed.doubtful {
            let state = self.state.clone();
            if let Err(error) = tokio::task::spawn_blocking(move || state.doubt_blocking(&checkpoint)).await {
                tracing::error!(%error, "a checkpoint could not be compared with its hashes");
            }
        }
        Err(failed.error)
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RpcError> {
        self.call(Lane::Control, Kind::TransferLeader, &request, option.soft_ttl()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_success_lets_the_stream_go_on() {
        let id = |index| Some(openraft::testing::log_id::<TypeConfig>(1, 1, index));
        let range = Range { prev: id(4), last: id(9) };
        let goes_on = |response| range.goes_on(&range.result(response));
        assert!(goes_on(AppendEntriesResponse::Success));
        assert!(!goes_on(AppendEntriesResponse::PartialSuccess(id(7))));
        assert!(!goes_on(AppendEntriesResponse::Conflict));
        assert!(!goes_on(AppendEntriesResponse::HigherVote(Vote::new(7, 2))));
        let first = Range { prev: None, last: id(0) };
        assert!(first.result(AppendEntriesResponse::Conflict).is_err());
    }

    #[test]
    fn a_target_that_cannot_be_reached_is_waited_for_and_a_lost_answer_is_asked_for_again() {
        let not_sent = rpc_error(CallError::NotSent { why: "refused".into() });
        assert!(matches!(not_sent, RPCError::Unreachable(_)));
        let lost = rpc_error(CallError::Unknown { why: "reset".into() });
        assert!(matches!(lost, RPCError::Network(_)));
    }
}
