//! The Raft type configuration: what an entry carries and how nodes are named.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The bytes of one entry's commands. This crate never looks inside.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryData(pub Bytes);

impl fmt::Debug for EntryData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for EntryData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// The encoded outcomes of an entry's commands, in their order; empty for blank and membership
/// entries. Written and read by the state machine above this crate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryOutcome(pub Bytes);

/// A member as the membership entries of the log name it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The stable name, for example `node-1`.
    pub name: String,
    /// `host:port` of the peer listener.
    pub peer_addr: String,
    /// `host:port` of the HTTP listener.
    pub http_addr: String,
}

openraft::declare_raft_types!(
    /// StemeDB's Raft types. One leader per term (`leader_id_std`), so that (term, index) names one entry.
    pub TypeConfig:
        D = EntryData,
        R = EntryOutcome,
        NodeId = u64,
        Node = Member,
        Term = u64,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
);

/// (term, index) of an entry.
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
/// A node's vote.
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
/// One entry of the log.
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
/// The membership with the id of the entry that set it.
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
