//! Asks the leader, whichever node that is, and keeps who the members are.

use std::{collections::BTreeMap, time::Duration};

use openraft::Membership;
use serde::{Serialize, de::DeserializeOwned};
use stemedb_net::{CallError, LocalIdentity, Peer};
use stemedb_raft::types::{Member, StoredMembership};

use super::{
    journal::Journal,
    messages::{Ask, AskReply, KnownMember},
};
use crate::node::{
    core::Shared,
    kinds::Kind,
    messages::{pack, unpack},
};

/// How long the leader may take for the grant or a step: it waits 10 s for a commit itself.
const LEADER_REPLY_MAX: Duration = Duration::from_secs(12);
/// How long a node may take to answer at all.
const ANSWERS_MAX: Duration = Duration::from_secs(1);
/// The boot under which files are fetched; the first start under the fresh id has the next one.
const PULLING_BOOT: u64 = 1;

pub(super) async fn call<A: DeserializeOwned>(peer: &Peer, kind: Kind, request: &impl Serialize) -> Result<A, String> {
    let body = pack(request).map_err(|e| e.to_string())?;
    let answer = peer.call(kind.number(), body, LEADER_REPLY_MAX).await.map_err(|e| e.to_string())?;
    unpack(&answer).map_err(|e| e.to_string())
}

/// Whether anybody answers at `addr`, whatever the answer.
pub(super) async fn answers(shared: &Shared, addr: &str) -> Result<(), String> {
    let body = pack(&()).map_err(|e| e.to_string())?;
    let peer = shared.peers.probe(addr);
    let answer = peer.call(Kind::Probe.number(), body, ANSWERS_MAX).await;
    peer.close();
    match answer {
        Ok(_) | Err(CallError::Refused { .. }) => Ok(()),
        Err(silent) => Err(silent.to_string()),
    }
}

/// Asks one node after the other until one decides; follows one hint for the leader.
pub async fn ask_any(shared: &Shared, addresses: Vec<String>, ask: &Ask) -> AskReply {
    let mut why = Vec::new();
    let mut waiting: Vec<String> = addresses.into_iter().rev().collect();
    let mut asked: Vec<String> = Vec::new();
    while let Some(addr) = waiting.pop() {
        if asked.contains(&addr) {
            continue;
        }
        asked.push(addr.clone());
        // One that is gone for good would take all the time that an answer may take.
        if let Err(text) = answers(shared, &addr).await {
            why.push(format!("{addr}: {text}"));
            continue;
        }
        let peer = shared.peers.probe(&addr);
        let reply = call::<AskReply>(&peer, Kind::RebuildAsk, ask).await;
        peer.close();
        match reply {
            Ok(AskReply::NotLeader { leader_addr }) => waiting.extend(leader_addr),
            Ok(AskReply::Failed(text)) | Err(text) => why.push(format!("{addr}: {text}")),
            Ok(decided) => return decided,
        }
    }
    match why.is_empty() {
        true => AskReply::NotLeader { leader_addr: None },
        false => AskReply::Failed(why.join("; ")),
    }
}

/// Who this node is while it fetches.
pub fn pulling_identity(journal: &Journal) -> LocalIdentity {
    LocalIdentity { cluster_id: journal.cluster_id, node_id: journal.fresh_id, boot: PULLING_BOOT }
}

pub(super) fn known_members(membership: &StoredMembership) -> Vec<KnownMember> {
    let voters: Vec<u64> = membership.voter_ids().collect();
    let known =
        |(id, member): (&u64, &Member)| KnownMember { id: *id, member: member.clone(), voter: voters.contains(id) };
    membership.nodes().map(known).collect()
}

/// The members as a view of the cluster has them.
pub fn membership_of(members: &[KnownMember]) -> Option<StoredMembership> {
    let nodes: BTreeMap<u64, Member> = members.iter().map(|known| (known.id, known.member.clone())).collect();
    let voters = members.iter().filter(|known| known.voter).map(|known| known.id).collect();
    Membership::new(vec![voters], nodes).ok().map(|membership| StoredMembership::new(None, membership))
}
