//! What a node says that is to become a member: asked by the leader before anything is begun, and while it comes.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use stemedb_net::{ClusterId, Refusal as NetRefusal};

use crate::{
    config::MemberRole,
    node::{
        core::Shared,
        kinds::Kind,
        messages::{pack, unpack},
        rebuild::{Need, desk::JobState},
        rpc_server::{FAILED, REFUSED_BEFORE_EFFECT},
    },
};

/// How long it may take to answer.
const REPLY_MAX: Duration = Duration::from_secs(2);

/// Answer to `Kind::Candidate`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// `node.name`.
    pub name: String,
    /// The cluster of its folder, if it has one.
    pub cluster_id: Option<ClusterId>,
    /// Its Raft id there; 0: none.
    pub raft_id: u64,
    /// It has nothing that it would lose: an empty folder, or a way in that it has begun.
    pub empty: bool,
    /// Its configuration says that it gets no vote.
    pub learner: bool,
    /// `host:port` of its HTTP listener, by its own configuration.
    pub http_addr: String,
    /// What it does to come in.
    pub step: String,
    /// What it waits for, if it waits.
    pub waits_for: Option<String>,
    /// Bytes of the checkpoint that are there.
    pub bytes_done: u64,
    /// Bytes of the checkpoint; 0 before it is known.
    pub bytes_total: u64,
    /// Seconds until they are there.
    pub eta_s: Option<u64>,
}

impl Candidate {
    /// Whether it has begun a way in, or would lose nothing by one. A node that only starts, or whose disk stands
    /// still, answers and takes no part either, and does not come.
    pub fn comes(&self) -> bool {
        self.empty || !self.step.is_empty()
    }
}

/// Handles `Kind::Candidate`.
pub fn answer(shared: &Shared) -> Result<Bytes, NetRefusal> {
    let identity = shared.identity.load_full();
    let config = &shared.config;
    let on_its_way = shared.desk.current().filter(|job| job.kind == "rebuild");
    // A node of another cluster, or one that is rebuilt, has something to lose.
    let comes = matches!(&*shared.need.borrow(), Some(Need::Place(_))) || on_its_way.as_ref().is_some_and(|j| j.comes);
    let removed = shared.members.removed().is_some();
    // Whether a folder is empty is not known before its log was read; that of a removed node is never read.
    if shared.wal().is_none() && on_its_way.is_none() && !comes && identity.is_none() && !removed {
        return Err(NetRefusal::new(REFUSED_BEFORE_EFFECT, "this node is still starting"));
    }
    let own = config.cluster.peers.iter().find(|peer| peer.name == config.node.name);
    let waits = on_its_way.as_ref().filter(|job| job.state == JobState::Waiting).map(|job| job.detail.clone());
    let job = on_its_way.clone().unwrap_or_default();
    let reply = Candidate {
        name: config.node.name.clone(),
        cluster_id: (*identity).as_ref().map(|id| id.cluster_id),
        raft_id: (*identity).as_ref().map_or(0, |id| id.raft_id),
        empty: !removed && (comes || (identity.is_none() && !shared.log_is_used() && on_its_way.is_none())),
        learner: config.cluster.role == MemberRole::Learner,
        http_addr: own.map_or_else(|| config.http.listen.clone(), |peer| peer.http.clone()),
        step: job.step.to_owned(),
        waits_for: waits,
        bytes_done: job.bytes_done,
        bytes_total: job.bytes_total,
        eta_s: job.eta_s,
    };
    pack(&reply).map_err(|e| NetRefusal::new(FAILED, e.to_string()))
}

/// Asks whoever answers at `addr`.
pub async fn candidate(shared: &Shared, addr: &str) -> Result<Candidate, String> {
    let body = pack(&()).map_err(|e| e.to_string())?;
    let peer = shared.peers.probe(addr);
    let answer = peer.call(Kind::Candidate.number(), body, REPLY_MAX).await;
    peer.close();
    unpack(&answer.map_err(|e| e.to_string())?).map_err(|e| e.to_string())
}
