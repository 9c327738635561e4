//! Bodies of the messages between nodes, and their versioned envelope.
//!
//! A body is a format number (two bytes, little-endian) and the encoded value. A node that gets a
//! newer format than it knows refuses it and names both, so that an upgrade node by node is noticed
//! instead of misread.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use stemedb_raft::{
    EntryAnswer, EntryQuestion,
    codec::{self, CodecError},
    types::{LogId, StoredMembership},
};

use super::{
    disk::DiskHealth,
    flows::DrainMark,
    space::{RoomReport, Shortage},
};
use crate::state::command::{Command, CommandOutcome};

/// Format of all bodies.
pub const MESSAGE_FORMAT: u16 = 1;

/// Why a body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Shorter than its format number.
    #[error("a message of {0} bytes has no format number")]
    TooShort(usize),
    /// Written by a newer version.
    #[error("the message has format {found}, and this version knows up to {MESSAGE_FORMAT}")]
    Newer {
        /// The format found.
        found: u16,
    },
    /// Not a value of the expected type.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// The same of one in JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// A body from a value.
pub fn pack<T: Serialize>(value: &T) -> Result<Bytes, CodecError> {
    let mut body = MESSAGE_FORMAT.to_le_bytes().to_vec();
    body.extend_from_slice(&codec::encode(value)?);
    Ok(body.into())
}

/// A body that says itself what its fields are: for what versions must understand of each other.
pub fn pack_json<T: Serialize>(value: &T) -> Result<Bytes, serde_json::Error> {
    let mut body = MESSAGE_FORMAT.to_le_bytes().to_vec();
    serde_json::to_writer(&mut body, value)?;
    Ok(body.into())
}

/// A value from such a body.
pub fn unpack_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, BodyError> {
    Ok(serde_json::from_slice(value_of(body)?)?)
}

/// A value from a body.
pub fn unpack<T: DeserializeOwned>(body: &[u8]) -> Result<T, BodyError> {
    Ok(codec::decode(value_of(body)?)?)
}

fn value_of(body: &[u8]) -> Result<&[u8], BodyError> {
    let (format, value) = body.split_first_chunk::<2>().ok_or(BodyError::TooShort(body.len()))?;
    let found = u16::from_le_bytes(*format);
    if found > MESSAGE_FORMAT { Err(BodyError::Newer { found }) } else { Ok(value) }
}

/// Questions of a node whose log lacks entries.
#[derive(Debug, Serialize, Deserialize)]
pub struct EntryQuestions {
    /// Oldest first.
    pub questions: Vec<EntryQuestion>,
}

/// What is known of the entries that were asked for.
#[derive(Debug, Serialize, Deserialize)]
pub struct EntryAnswers {
    /// (index, answer), in the order of the questions. Fewer than these when the entries are large: ask again.
    pub answers: Vec<(u64, EntryAnswer)>,
}

/// Commands on their way to the leader, as they are received.
#[derive(Debug, Serialize, Deserialize)]
pub struct ForwardRequest {
    /// In the order in which they should be proposed.
    pub commands: Vec<Command>,
}

/// The same as `ForwardRequest`, as they are sent.
#[derive(Debug, Serialize)]
pub struct ForwardRequestRef<'a> {
    /// Commands.
    pub commands: Vec<&'a Command>,
}

/// What became of the commands.
#[derive(Debug, Serialize, Deserialize)]
pub struct ForwardReply {
    /// One for each command, in order.
    pub answers: Vec<ProposeAnswer>,
}

/// What became of one command at the node that was asked to propose it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ProposeAnswer {
    /// Applied, or refused by apply on every node alike.
    Outcome(CommandOutcome),
    /// This node cannot lead at present; nothing was appended.
    NotLeader,
    /// The queue is full; nothing was appended.
    Busy,
    /// Log time had passed `resend_until`; nothing was appended.
    Expired {
        /// Log time here.
        log_time_ms: u64,
    },
    /// It cannot be encoded or is otherwise impossible; nothing was appended.
    Impossible(String),
    /// It may have been appended.
    Unknown(String),
    /// Disks are full; nothing was appended.
    Full(Vec<Shortage>),
}

/// Answer to `Kind::ReadIndex`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReadIndexReply {
    /// Everything up to this log index was committed when the question arrived, and this node led.
    Index(u64),
    /// It does not lead, or cannot confirm that it does.
    NotLeader(String),
}

/// Answer to `Kind::Status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReply {
    /// The node's name.
    pub name: String,
    /// `leader`, `follower`, `candidate`, `learner`, `starting` or `repairing`.
    pub role: String,
    /// Its term.
    pub term: u64,
    /// The leader it knows.
    pub leader: Option<u64>,
    /// Log index of the last entry in its log.
    pub last_log_index: Option<u64>,
    /// Log index up to which its log was purged; a replica that ends before it needs a checkpoint.
    pub purged_log_index: Option<u64>,
    /// Log index of the last applied and published entry.
    pub applied_log_index: Option<u64>,
    /// Its disk.
    pub disk: DiskHealth,
    /// Version of its program.
    pub version: String,
    /// On a leader: for each member, how much of its log that member has not acknowledged.
    pub replication: Option<BTreeMap<u64, Lag>>,
    /// How much room its data folder has.
    pub room: RoomReport,
    /// Why it would not take leadership over, if so.
    pub may_not_lead: Option<String>,
    /// What is damaged in its tree, while that is so: no checkpoint is to be had there.
    pub damaged: Option<String>,
    /// 99th percentile of its log's syncs of the last seconds, milliseconds; `None` when there were none.
    pub fsync_p99_ms: Option<u64>,
    /// How far out of traffic it is.
    pub drain: DrainMark,
    /// The members of the cluster as it knows them; `None` when it knows none.
    pub membership: Option<StoredMembership>,
}

/// Answer to `Kind::LogEnd`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEndReply {
    /// The last entry of its log, all appends included that had arrived on the same connection before.
    pub last_log_id: Option<LogId>,
    /// Why it would not take leadership over, if so.
    pub may_not_lead: Option<String>,
}

/// How far a member's log is behind the leader's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lag {
    /// Entries.
    pub entries: u64,
    /// Bytes of their frames in the leader's log, as far as they are written and not purged.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::state::command::{CommandKey, KeySource, Operation};

    #[test]
    fn a_newer_format_is_refused_with_both_numbers() {
        let error = unpack::<ReadIndexReply>(&[9, 0, 0, 1]).unwrap_err().to_string();
        assert!(error.contains("format 9") && error.contains("up to 1"), "{error}");
        assert!(unpack::<ReadIndexReply>(&[1]).is_err());
        assert!(unpack::<ReadIndexReply>(&[1, 0, 77]).is_err());
    }

    #[test]
    fn bytes_of_a_body_are_frozen() {
        assert_eq!(&pack(&ReadIndexReply::Index(300)).unwrap()[..], [1, 0, 0, 251, 44, 1]);
        assert_eq!(unpack::<ReadIndexReply>(&[1, 0, 0, 251, 44, 1]).unwrap(), ReadIndexReply::Index(300));
    }

    #[test]
    fn commands_are_read_as_they_were_sent_by_reference() {
        let command = Command {
            key: CommandKey { source: KeySource::Node, id: 7 },
            body_hash: 9,
            resend_until_ms: 5,
            created_at_ms: 6,
            op: Operation::Assert(vec![]),
        };
        let body = pack(&ForwardRequestRef { commands: vec![&command, &command] }).unwrap();
        let read: ForwardRequest = unpack(&body).unwrap();
        assert_eq!(read.commands, [command.clone(), command]);
    }
}
