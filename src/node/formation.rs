//! Forms the cluster, or waits for a place in it: `bootstrap` with real messages and files.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::join_all;
use stemedb_net::{ClusterId, LocalIdentity};
use stemedb_raft::types::{Member, Vote};
use tokio::sync::mpsc;

use super::{
    bootstrap::{Assignment, Decision, Heard, ProbeAnswer, decide, raft_id_of},
    core::{AssignRequest, Shared},
    identity::{Identity, cluster_hex},
    kinds::Kind,
    members::standing::{self, Standing, StandingAsk},
    messages::{pack, unpack},
};
use crate::config::PeerEntry;

/// How often the peers are asked again.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);
/// The same while this node waits to be added.
const PLACE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a peer may take for an answer.
const PROBE_REPLY_MAX: Duration = Duration::from_secs(1);
/// How long a peer may take to write its identity: a few syncs, on a slow disk.
const ASSIGN_REPLY_MAX: Duration = Duration::from_secs(10);
/// The same reasons for waiting are logged again after this long.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Formed {
    /// This node has its identity; another one forms the cluster.
    Assigned,
    /// Every node has its place, and this one has to call `initialize` with these members.
    Initialize(BTreeMap<u64, Member>),
}

/// Why a node must not start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormError {
    /// The cluster exists and this folder has nothing: only a rebuild brings the node back.
    AlreadyMember(String),
    /// The cluster exists, and this node is to become a member.
    Awaited,
    /// Anything else.
    Refused(String),
}

impl From<String> for FormError {
    fn from(why: String) -> FormError {
        FormError::Refused(why)
    }
}

/// The configured list, with this node alone when it is empty.
pub fn effective_peers(config: &crate::config::Config, own_peer_addr: &str, own_http_addr: &str) -> Vec<PeerEntry> {
    if !config.cluster.peers.is_empty() {
        return config.cluster.peers.clone();
    }
    vec![PeerEntry { name: config.node.name.clone(), addr: own_peer_addr.into(), http: own_http_addr.into() }]
}

fn members(peers: &[PeerEntry]) -> BTreeMap<u64, Member> {
    let member = |peer: &PeerEntry| Member {
        name: peer.name.clone(),
        peer_addr: peer.addr.clone(),
        http_addr: peer.http.clone(),
    };
    peers.iter().enumerate().map(|(position, peer)| (raft_id_of(position), member(peer))).collect()
}

/// What a node needs in order to take a place.
pub struct Place<'a> {
    /// Shared by the node's parts.
    pub shared: &'a Arc<Shared>,
    /// The log, to keep the first vote.
    pub log: stemedb_raft::WalStore,
}

impl Place<'_> {
    /// Keeps the vote of term 0, then writes the identity: an identity without a vote would say that
    /// the log was lost.
    async fn take(&mut self, cluster_id: ClusterId, raft_id: u64) -> Result<(), String> {
        use openraft::storage::RaftLogStorage;
        let vote = Vote::new(0, raft_id);
        self.log.save_vote(&vote).await.map_err(|e| format!("the first vote was not saved: {e}"))?;
        let name = self.shared.name().to_owned();
        let identity = Identity { cluster_id, name, raft_id, boot: 1 };
        let (saved, data_dir) = (identity.clone(), self.shared.config.node.data_dir.clone());
        tokio::task::spawn_blocking(move || saved.save(&data_dir))
            .await
            .map_err(|e| e.to_string())?
            .map_err(|e| format!("the identity was not saved: {e}"))?;
        tracing::info!(cluster = cluster_hex(&cluster_id), raft_id, "this node has a place in a cluster");
        assume(self.shared, identity);
        Ok(())
    }
}

/// From now on this node speaks under `identity`.
pub fn assume(shared: &Shared, identity: Identity) {
    let local =
        LocalIdentity { cluster_id: identity.cluster_id, node_id: identity.raft_id, boot: identity.spoken_boot() };
    shared.identity.store(Arc::new(Some(identity)));
    shared.local.store(Arc::new(local));
}

/// Runs until this node has its place, and, at the first of the list, every other node too. The error
/// says why this node must not start.
pub async fn form(
    mut place: Place<'_>,
    peers: &[PeerEntry],
    own_position: usize,
    assignments: &mut mpsc::Receiver<AssignRequest>,
) -> Result<Formed, FormError> {
    let mut waiting_said: Option<(Vec<String>, tokio::time::Instant)> = None;
    loop {
        let heard = tokio::select! {
            biased;
            request = assignments.recv() => {
                let Some((assignment, reply)) = request else { return Err(FormError::Refused("the node is stopping".into())) };
                let taken = place.take(assignment.cluster_id, assignment.raft_id).await;
                // The forming node asks again when this answer is lost.
                let _ = reply.send(taken.clone());
                return taken.map(|()| Formed::Assigned).map_err(FormError::Refused);
            }
            heard = probe_all(place.shared, peers, own_position) => heard,
        };
        let own_cluster = (**place.shared.identity.load()).as_ref().map(|id| id.cluster_id);
        match decide(peers, own_position, own_cluster, &heard) {
            Decision::Refuse(why) if has_members(&heard, own_cluster) => match own_cluster {
                Some(_) => return Err(FormError::AlreadyMember(why)),
                None => return Err(await_place(place.shared, peers).await),
            },
            Decision::Refuse(why) => return Err(FormError::Refused(why)),
            Decision::AwaitAssignment => {
                say_waiting(&mut waiting_said, vec!["the first node of the list to form the cluster".into()])
            }
            Decision::Wait(whom) => say_waiting(&mut waiting_said, whom),
            Decision::Form { adopt, assign } => {
                let cluster_id = adopt.unwrap_or_else(rand::random);
                if own_cluster.is_none() {
                    place.take(cluster_id, raft_id_of(own_position)).await?;
                }
                match assign_all(place.shared, peers, &assign, cluster_id).await {
                    Ok(()) => return Ok(Formed::Initialize(members(peers))),
                    Err(why) => say_waiting(&mut waiting_said, vec![why]),
                }
            }
        }
        tokio::select! {
            () = place.shared.stop.cancelled() => return Err(FormError::Refused("the node is stopping".into())),
            () = tokio::time::sleep(PROBE_INTERVAL) => {}
        }
    }
}

/// Waits until the members know of this node, whose folder is empty: as one that is to be added, or as one that was a
/// member before. Says what it waits for in its log and its health.
pub async fn await_place(shared: &Arc<Shared>, peers: &[PeerEntry]) -> FormError {
    let name = shared.name().to_owned();
    let ask = StandingAsk { cluster_id: None, name: name.clone(), raft_id: 0 };
    let mut said: Option<(Vec<String>, tokio::time::Instant)> = None;
    loop {
        let others: Vec<String> = peers.iter().filter(|peer| peer.name != name).map(|peer| peer.addr.clone()).collect();
        let waits_for = match standing::ask(shared, others.clone(), &ask).await {
            Some(Standing::Awaited) => return FormError::Awaited,
            Some(Standing::Member) => {
                return FormError::AlreadyMember(format!(
                    "{name} is already a member of a cluster, and its folder is empty: its files were lost"
                ));
            }
            Some(Standing::Stranger) => {
                let addr =
                    peers.iter().find(|peer| peer.name == name).map(|peer| peer.addr.as_str()).unwrap_or_default();
                format!("to be added: stemedb member add {name} --addr {addr}")
            }
            Some(Standing::OtherCluster | Standing::Removed(_) | Standing::Unknown) | None => {
                format!("a member that can say whether this node is to be added; asked: {}", others.join(", "))
            }
        };
        shared.awaits_place.send_replace(Some(waits_for.clone()));
        say(&mut said, vec![waits_for], "this node has no place in a cluster yet, waiting");
        tokio::select! {
            () = shared.stop.cancelled() => return FormError::Refused("the node is stopping".into()),
            () = tokio::time::sleep(PLACE_INTERVAL) => {}
        }
    }
}

/// Whether a peer is a working member of a cluster that this node may belong to.
fn has_members(heard: &[Heard], own_cluster: Option<ClusterId>) -> bool {
    heard.iter().any(|heard| match heard {
        Heard::Answer(ProbeAnswer::Member { cluster_id, .. }) => own_cluster.is_none_or(|own| own == *cluster_id),
        _ => false,
    })
}

fn say_waiting(said: &mut Option<(Vec<String>, tokio::time::Instant)>, whom: Vec<String>) {
    say(said, whom, "the cluster is not formed yet, waiting for");
}

fn say(said: &mut Option<(Vec<String>, tokio::time::Instant)>, whom: Vec<String>, what: &str) {
    let now = tokio::time::Instant::now();
    if said.as_ref().is_some_and(|(old, at)| *old == whom && now < *at + SAY_AGAIN) {
        return;
    }
    tracing::info!("{what}: {}", whom.join("; "));
    *said = Some((whom, now));
}

async fn probe_all(shared: &Shared, peers: &[PeerEntry], own_position: usize) -> Vec<Heard> {
    join_all(peers.iter().enumerate().map(|(position, peer)| async move {
        if position == own_position {
            return Heard::Silent("this node".into());
        }
        match probe(shared, &peer.addr).await {
            Ok(answer) => Heard::Answer(answer),
            Err(why) => Heard::Silent(why),
        }
    }))
    .await
}

/// Asks whoever answers at `addr` where it stands.
pub async fn probe(shared: &Shared, addr: &str) -> Result<ProbeAnswer, String> {
    let body = pack(&()).map_err(|e| e.to_string())?;
    let answer = shared.peers.probe(addr).call(Kind::Probe.number(), body, PROBE_REPLY_MAX).await;
    unpack(&answer.map_err(|e| e.to_string())?).map_err(|e| e.to_string())
}

async fn assign_all(
    shared: &Shared,
    peers: &[PeerEntry],
    positions: &[usize],
    cluster_id: ClusterId,
) -> Result<(), String> {
    for (position, peer) in peers.iter().enumerate().filter(|(position, _)| positions.contains(position)) {
        let assignment = Assignment {
            cluster_id,
            raft_id: raft_id_of(position),
            name: peer.name.clone(),
            list_hash: shared.list_hash,
        };
        let body = pack(&assignment).map_err(|e| e.to_string())?;
        let answer = shared.peers.probe(&peer.addr).call(Kind::Assign.number(), body, ASSIGN_REPLY_MAX).await;
        answer.map_err(|e| format!("{} to take its place ({e})", peer.name))?;
    }
    Ok(())
}
