//! Asking other replicas for an entry: the question, the answers, and what makes a copy acceptable.

use std::{future::Future, pin::Pin};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    frame::{EntryKind, payload_crc},
    index::Located,
};

/// Which entry is wanted, by all that is still known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryQuestion {
    /// Index of the entry.
    pub index: u64,
    /// Its term, when known.
    pub term: Option<u64>,
    /// CRC-32 of its payload, when known: (term, index) alone is no identity.
    pub payload_crc: Option<u32>,
    /// Checksum of its frame's header, when known from the frame behind it.
    pub header_crc: Option<u32>,
    /// It was durable here: it must never be given up.
    pub durable: bool,
}

/// What a replica says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryAnswer {
    /// Here it is.
    Have(EntryCopy),
    /// Purged: it is in a checkpoint.
    Covered,
    /// The replica's log is intact and ends before it, or has another entry there.
    Never {
        /// Last index of the replica's log; `None`: it is empty.
        last: Option<u64>,
    },
    /// The replica cannot tell.
    Unknown,
}

/// An entry as another replica has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryCopy {
    /// Index of the entry.
    pub index: u64,
    /// Term of the entry.
    pub term: u64,
    /// What the payload is.
    pub kind: EntryKind,
    /// The payload, as it lies in the frame.
    pub payload: Bytes,
}

impl EntryCopy {
    /// Whether this is the entry at `index` that was located so: term, length and payload checksum agree.
    pub fn is_of(&self, index: u64, located: &Located) -> bool {
        self.index == index
            && self.term == located.term
            && self.payload.len() as u64 == u64::from(located.payload_bytes)
            && payload_crc(&self.payload) == located.payload_crc
    }
}

/// Finds entries that cannot be read here; set by the node, which asks its peers.
pub trait EntryHealer: Send + Sync + 'static {
    /// A copy of the entry, `None` when nobody has one. It is checked before it is used. May take its time: what
    /// reads the log waits, and the Raft core goes on meanwhile.
    fn heal(&self, question: EntryQuestion) -> Pin<Box<dyn Future<Output = Option<EntryCopy>> + Send + '_>>;
}
