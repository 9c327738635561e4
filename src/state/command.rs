//! What one Raft entry carries, and what applying it answers.
//!
//! A command is complete before it is proposed: ids, times and hashes are in it. Its key makes it
//! idempotent: whoever sends it again, and however often, it is applied at most once and answered
//! with its first outcome.

use serde::{Deserialize, Serialize};
use stemedb_raft::codec::{self, CodecError};
use uuid::Uuid;

use super::level::RaiseLevel;
use super::members::{End, Intent};
use super::permits::Permit;
use crate::model::{NewAssertion, NewEpoch, NewSupersession, NewVote};

/// Version of the encoded form of an entry. A newer one stops the node (see [`EntryBody::decode`]).
pub const ENTRY_FORMAT: u16 = 1;

/// Who chose a command's key. Sources never collide with each other, and keep their keys for
/// different times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum KeySource {
    /// The client's `Idempotency-Key`: kept for 15 minutes of log time, in the LSM.
    Client,
    /// The load balancer's `X-StemeDB-Retry-Id`: kept for twice the request deadline, in memory.
    Balancer,
    /// Made by the node that took the request: kept like a balancer's.
    Node,
}

/// The idempotency key of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CommandKey {
    /// Who chose it.
    pub source: KeySource,
    /// First 16 bytes of SHA-256 over the given text, or a UUIDv7 made here.
    pub id: u128,
}

/// One entry of the log: every command that waited at the leader when it was packed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EntryBody {
    /// `ENTRY_FORMAT` of the writer.
    pub format: u16,
    /// Log time in milliseconds. Apply takes the maximum of this and the last one: it never goes back.
    pub log_time_ms: u64,
    /// In the order in which they are applied.
    pub commands: Vec<Command>,
}

/// One command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// The idempotency key.
    pub key: CommandKey,
    /// Hash of the request as the client gave it, so that the same key with another body is a conflict.
    pub body_hash: u128,
    /// Log time in milliseconds after which nobody sends this command again and apply refuses it.
    pub resend_until_ms: u64,
    /// Wall clock of the node that took the request, Unix milliseconds.
    pub created_at_ms: u64,
    /// What to do.
    pub op: Operation,
}

/// What a command does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Operation {
    /// One assertion, or an atomic batch of them.
    Assert(Vec<NewAssertion>),
    /// A vote.
    Vote(NewVote),
    /// An epoch.
    Epoch(NewEpoch),
    /// A supersession or retraction.
    Supersede(NewSupersession),
    /// A chunk of an import, with the position that makes the import resumable after hours.
    ImportChunk {
        /// Name of the import, chosen by the importer.
        import_id: String,
        /// Records of the source already imported before this chunk; must equal the stored position.
        position_before: u64,
        /// The stored position after it.
        position_after: u64,
        /// The chunk.
        assertions: Vec<NewAssertion>,
    },
    /// Who may rebuild. Never taken from clients: nodes and their leader make these.
    Rebuild(RebuildCommand),
    /// Who is to become a member or to leave. Never taken from clients: the leader makes these.
    Members(MemberCommand),
    /// The cluster goes up to a feature level. Never taken from clients: the leader makes it.
    Level(RaiseLevel),
}

/// A change to the permit to rebuild; the rules are in `permits`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RebuildCommand {
    /// Gives the permit, or renews it when the same rebuild holds it. Proposed by the leader after it has checked
    /// that the other voters have everything.
    Grant {
        /// Name of the node.
        name: String,
        /// The node's number for this rebuild.
        job: u128,
        /// The Raft id that is to be replaced.
        old_id: u64,
        /// A Raft id above every one that the leader knows of.
        id_min: u64,
        /// For a rebuild that the node decided by itself: how many of those it may have within a day.
        automatic_max: Option<u64>,
    },
    /// The fresh id is a voter: the permit is used up.
    Finish {
        /// Name of the node.
        name: String,
        /// The fresh id.
        fresh_id: u64,
    },
    /// The rebuild was given up.
    Cancel {
        /// Name of the node.
        name: String,
        /// Its number.
        job: u128,
    },
}

/// A step of a change of the members; the rules are in `members`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberCommand {
    /// It begins, unless another one goes on. What it was given so far is ignored.
    Begin(Box<Intent>),
    /// The node that comes has asked for its Raft id.
    TakePlace {
        /// The job.
        job: u128,
        /// The node's own number for its way in.
        node_job: u128,
        /// A Raft id above every one that the leader knows of.
        id_min: u64,
    },
    /// The voters are about to change.
    Announce {
        /// The job.
        job: u128,
        /// Every Raft id of the node that leaves.
        leaves: Vec<u64>,
    },
    /// They do not change for the time being: a node has failed meanwhile.
    Withdraw {
        /// The job.
        job: u128,
    },
    /// It is to be undone.
    Cancel {
        /// The job.
        job: u128,
    },
    /// It is done, or undone.
    End {
        /// The job.
        job: u128,
        /// How.
        end: End,
        /// One sentence.
        detail: String,
        /// When, Unix milliseconds.
        ended_unix_ms: u64,
    },
}

/// What applying a command answered the first time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Applied: one receipt per fact, in order.
    Applied(Vec<Receipt>),
    /// Refused on every node alike; nothing was written.
    Refused(Refusal),
    /// The permit to rebuild that is held now.
    Permit(Permit),
    /// The change of the members as it is now.
    Member(Box<Intent>),
}

/// An outcome, and whether it is the first answer or the repetition of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommandOutcome {
    /// The first outcome.
    pub outcome: Outcome,
    /// True when the key was known and nothing was written now.
    pub replayed: bool,
}

/// Proof of one stored fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Id of the assertion, vote, epoch or supersession.
    pub id: Uuid,
    /// Sequence number of the fact, given by apply: one per fact, equal on all nodes.
    pub index: u64,
    /// Unix milliseconds.
    pub created_at_ms: u64,
}

/// Why apply refused a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Log time had passed `resend_until_ms`.
    Expired,
    /// The key is known with another body.
    KeyReused,
    /// What the command refers to does not exist: `kind` is `assertion` or `epoch`.
    NotFound {
        /// `assertion` or `epoch`.
        kind: String,
        /// The id or name.
        name: String,
    },
    /// The epoch's name is taken.
    EpochExists {
        /// The name.
        name: String,
    },
    /// The supersession would close a circle.
    Cycle,
    /// Old and new do not share the concept path.
    PathMismatch {
        /// Path of the old one.
        old_path: String,
        /// Path of the new one.
        new_path: String,
    },
    /// The import stands elsewhere.
    ImportPosition {
        /// The stored position, in records.
        expected: u64,
    },
    /// The table of short-lived keys is full; try again later.
    KeyTableFull,
    /// The new assertion was itself superseded so often, directly and in turn, that the check for
    /// a circle gave up.
    ChainTooLong {
        /// Supersessions looked at.
        steps_max: u64,
    },
    /// Another node holds the permit to rebuild.
    RebuildHeld {
        /// Its name.
        by: String,
        /// Seconds of log time until somebody else may have it, if it is not renewed.
        expires_in_s: u64,
    },
    /// The node has rebuilt itself as often as it may by itself.
    RebuiltTooOften {
        /// Its name.
        name: String,
        /// How often within a day.
        times: u64,
    },
    /// Another change of the members goes on.
    MembersBusy {
        /// Its job.
        job: u128,
        /// `member-add`, `member-remove` or `member-replace`.
        kind: String,
        /// The node that it is about.
        name: String,
    },
    /// That change of the members has ended, or is past this step.
    MembersVoid {
        /// Its job.
        job: u128,
    },
}

/// An entry that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// Written by a program that knows a newer form.
    #[error("entry format {found}, this program knows {ENTRY_FORMAT}: upgrade this node")]
    Format {
        /// The version found.
        found: u16,
    },
    /// The bytes are no entry.
    #[error("entry: {0}")]
    Codec(#[from] CodecError),
}

impl EntryBody {
    /// The bytes for the log.
    pub fn encode(&self) -> Result<Vec<u8>, EntryError> {
        Ok(codec::encode(self)?)
    }

    /// Reads the bytes of an entry. The format comes first, so that a newer one is named even when
    /// the rest cannot be understood.
    pub fn decode(bytes: &[u8]) -> Result<Self, EntryError> {
        // Formats below 251 are one byte in the codec's form; that is far off.
        match bytes.first() {
            Some(&first) if u16::from(first) != ENTRY_FORMAT => Err(EntryError::Format { found: first.into() }),
            _ => Ok(codec::decode(bytes)?),
        }
    }
}
