//! What a node that rebuilds and the others say to each other.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use stemedb_net::ClusterId;
use stemedb_raft::types::{LogId, Member};

use crate::state::permits::Permit;

/// `Kind::RebuildAsk`: may I rebuild? The asking node has ended its Raft core before, or never had one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The cluster, if the asking node knows it; an emptied node does not.
    pub cluster_id: Option<ClusterId>,
    /// Its name.
    pub name: String,
    /// Its number for this rebuild.
    pub job: u128,
    /// Whether it decided by itself.
    pub automatic: bool,
    /// Nothing is to be granted: would it be? Sent before the core is ended.
    pub dry_run: bool,
    /// The old files are put away already: nothing is lost by going on.
    pub emptied: bool,
}

/// Answer to `Ask`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AskReply {
    /// The permit is held now; with `dry_run`: it would be.
    Granted(Box<Granted>),
    /// Not now, and why.
    Refused(Refusal),
    /// The node that was asked does not lead; this one may.
    NotLeader {
        /// `host:port` of the peer listener.
        leader_addr: Option<String>,
    },
    /// Nothing is known: ask again.
    Failed(String),
}

/// What comes with the permit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// The permit; `None` after a dry run.
    pub permit: Option<Permit>,
    /// The cluster.
    pub cluster_id: ClusterId,
    /// Id of the leader that granted it.
    pub leader: u64,
    /// The members.
    pub members: Vec<KnownMember>,
}

/// A member as a rebuilding node keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownMember {
    /// Raft id.
    pub id: u64,
    /// Name and addresses.
    pub member: Member,
    /// Whether it votes.
    pub voter: bool,
}

/// Why there is no permit now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// It would be unsafe as long as these nodes are as they are. One sentence for each.
    Waits(Vec<String>),
    /// Only an operator can decide.
    Operator(String),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::Waits(whom) => f.write_str(&whom.join("; ")),
            Refusal::Operator(why) => f.write_str(why),
        }
    }
}

/// `Kind::RebuildStep`: what the holder of the permit wants the leader to do. Each may be sent again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRequest {
    /// Name of the node.
    pub name: String,
    /// The fresh id.
    pub fresh_id: u64,
    /// What.
    pub step: LeaderStep,
}

/// A step of the leader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaderStep {
    /// Send me the log: I am a learner.
    Join(Member),
    /// Let me vote in the place of the old id.
    Promote,
    /// I give up.
    Cancel {
        /// The node's number for this rebuild.
        job: u128,
    },
}

/// Answer to `StepRequest`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StepReply {
    /// It is so.
    Done,
    /// Not yet: this many entries are missing.
    Behind {
        /// Entries of the leader's log that the learner has not acknowledged.
        entries: u64,
    },
    /// The permit is held by nobody or by another rebuild: start over.
    Stale(String),
    /// The node that was asked does not lead.
    NotLeader,
    /// Ask again.
    Failed(String),
}

/// `Kind::CheckpointOffer`: what could you send?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferRequest {
    /// The receiver waits for a checkpoint of what is applied now; else any is good.
    pub fresh: bool,
}

/// Answer: a checkpoint that stays as long as its pieces are fetched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Names it in what follows.
    pub session: u64,
    /// What it covers.
    pub covers: Option<LogId>,
    /// Its manifest as stored.
    pub manifest: Bytes,
}

/// `Kind::CheckpointFetch`: one piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchRequest {
    /// The offer.
    pub session: u64,
    /// Name of the file in the manifest.
    pub file: String,
    /// Where in the file, bytes.
    pub offset: u64,
    /// How much, bytes; at most `offer::PIECE_BYTES_MAX`.
    pub bytes: u32,
}

/// The piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The bytes.
    pub bytes: Bytes,
    /// Whether the sender has clients to serve: then the receiver holds to its throttle.
    pub busy: bool,
}
