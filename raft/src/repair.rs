//! What the other voters say about entries that are damaged here, and what follows from it. Pure.
//!
//! A damaged entry is asked for by what the log itself still says of it. Whoever answers with an entry must prove that
//! it is *this* entry; whoever answers *never* says that no promise of his stands behind it. `docs/wal-format.md` has
//! the same rules, with the reasons why nothing acknowledged can be lost by them.

use std::{collections::BTreeSet, future::Future, pin::Pin};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    error::Damage,
    frame::{EntryKind, payload_crc},
    index::Located,
};

/// What is asked about one damaged entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryQuestion {
    /// Index of the entry.
    pub index: u64,
    /// Its term, when header or row still tell.
    pub term: Option<u64>,
    /// CRC-32 of its payload, when header or row still tell.
    pub payload_crc: Option<u32>,
    /// Checksum of its frame's header, when the header or the next frame still tell. It covers the asker's segment:
    /// only the asker can compare it.
    pub header_crc: Option<u32>,
    /// It lies at or below D: it was durable, and is never cut.
    pub durable: bool,
    /// The nearest later entry of which the log knows what it was. Whoever has that one has the asker's log below it.
    pub anchor: Option<EntryId>,
}

/// An entry's full identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryId {
    /// Its index.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// CRC-32 of its payload; `None` for the last purged entry, of which only the id is kept.
    pub payload_crc: Option<u32>,
}

impl EntryId {
    /// Whether both name one entry, as far as both know.
    pub fn agrees(&self, other: &Self) -> bool {
        let same_payload =
            self.payload_crc.is_none() || other.payload_crc.is_none() || self.payload_crc == other.payload_crc;
        self.index == other.index && self.term == other.term && same_payload
    }
}

/// An entry as another node has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryCopy {
    /// Its index.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// [`EntryKind::to_byte`].
    pub kind: u8,
    /// Its payload.
    pub payload: Bytes,
    /// The entry before it in the answering log; `None` at the log's beginning, or when that one is lost there.
    pub previous: Option<EntryId>,
    /// The answering log has the question's anchor.
    pub has_anchor: bool,
    /// The answering node knows that it is committed.
    pub committed: bool,
}

impl EntryCopy {
    /// What the payload is.
    pub fn kind(&self) -> Option<EntryKind> {
        EntryKind::of(self.kind)
    }

    /// Whether this is the entry at `index` that was located so: term, length and payload checksum agree.
    pub fn is_of(&self, index: u64, located: &Located) -> bool {
        self.index == index
            && self.term == located.term
            && self.payload.len() as u64 == u64::from(located.payload_bytes)
            && payload_crc(&self.payload) == located.payload_crc
    }

    /// Its identity, from its own bytes.
    pub fn id(&self) -> EntryId {
        EntryId { index: self.index, term: self.term, payload_crc: Some(payload_crc(&self.payload)) }
    }
}

/// Finds entries that cannot be read while the log runs; set by the node, which asks its peers.
pub trait EntryHealer: Send + Sync + 'static {
    /// A copy of the entry, `None` when nobody has one. It is checked before it is used. May take its time: what
    /// reads the log waits, and the Raft core goes on meanwhile.
    fn heal(&self, question: EntryQuestion) -> Pin<Box<dyn Future<Output = Option<EntryCopy>> + Send + '_>>;
}

/// Why a node never had an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NeverBecause {
    /// Its log is intact up to its end, which lies before the entry.
    Ends,
    /// It has another entry there.
    Differs,
    /// Its own log is torn there, above its own D.
    Torn,
}

/// What a node says about an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryAnswer {
    /// Here it is.
    Have(EntryCopy),
    /// It was purged here: it is in a checkpoint.
    Covered,
    /// No promise of this node stands behind it.
    Never {
        /// Why.
        why: NeverBecause,
    },
    /// This node cannot tell.
    Unknown,
}

/// Who may decide that an entry was never acknowledged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Electorate {
    /// The asker's own id.
    pub own: Option<u64>,
    /// The current voters' ids.
    pub voters: BTreeSet<u64>,
}

impl Electorate {
    /// The voters that can be asked.
    pub fn others(&self) -> impl Iterator<Item = u64> + '_ {
        self.voters.iter().copied().filter(|voter| Some(*voter) != self.own)
    }

    /// Nobody else votes, and this node does: there is nobody to ask.
    pub fn is_alone(&self) -> bool {
        !self.voters.is_empty() && self.others().next().is_none()
    }
}

/// A log that single entries cannot repair: the whole node must be rebuilt under a fresh id. Its folder is as it was
/// found, except for frames that a repair wrote in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostLog {
    /// In words, for the log and the health of the node.
    pub why: String,
    /// Where, as far as it is known.
    pub damage: Vec<Damage>,
}

/// How well a copy is proved to be the entry that was asked for. Later ones prove more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proof {
    /// Not at all, or it is known to be another.
    None,
    /// It continues the entry before it; nothing is known of the entry itself, nor of any behind it.
    Continues,
    /// Term, index and payload checksum are the row's or the header's; or the checksum that the next frame carries on
    /// is that of its header; or the entry before it and one behind it are in both logs; or both logs know that the entry
    /// at this index is committed.
    Same,
}

/// One voter's answer, as far as the decision needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vote {
    /// It sent a copy.
    Copy {
        /// Whether it is the entry.
        proof: Proof,
        /// Its term.
        term: u64,
        /// It is committed.
        committed: bool,
    },
    /// It has it in a checkpoint.
    Covered,
    /// It has what lies behind the entry and not what lies before it: this log is not one log.
    Contradicts,
    /// It never had it.
    Never,
    /// It cannot tell, or has not answered.
    Unknown,
}

/// What becomes of a damaged entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// Write the copy of this voter, by its place in the list.
    Take(usize),
    /// It was never acknowledged: it goes, and with it whatever is behind it.
    Cut,
    /// It is only in checkpoints by now, or this log is not one log: the whole node is rebuilt.
    Rebuild,
    /// Nobody can tell yet.
    Wait,
}

/// What is known here of the entry that is decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    /// At or below D.
    pub durable: bool,
    /// Every entry below it is readable or fetched, so that none of them hides a change of the voters.
    pub voters_are_known: bool,
    /// Nothing is known of the entry.
    pub nameless: bool,
}

/// Decides on one entry. `votes` has one for each other current voter, and may have more from other nodes, `others`
/// being how many of them, from the front, are the voters'.
///
/// The order of the rules is the order of the lines.
pub fn resolve(case: Case, votes: &[Vote], others: usize) -> Resolution {
    let copies = || {
        votes.iter().enumerate().filter_map(|(at, vote)| match vote {
            Vote::Copy { proof, term, committed } => Some((at, *proof, *term, *committed)),
            Vote::Covered | Vote::Contradicts | Vote::Never | Vote::Unknown => None,
        })
    };
    // It is the entry: what it replaces said so itself.
    if let Some((at, ..)) = copies().find(|(_, proof, ..)| *proof == Proof::Same) {
        return Resolution::Take(at);
    }
    if case.nameless {
        let fitting = || copies().filter(|(_, proof, ..)| *proof >= Proof::Continues);
        // What was lost was this entry, or one that can never be committed.
        if let Some((at, ..)) = fitting().find(|(.., committed)| *committed) {
            return Resolution::Take(at);
        }
        // If what was lost is committed, a voter has it, and no voter has one of a later term in its place.
        let voters = votes.get(..others).unwrap_or_default();
        let all_told = others > 0 && voters.iter().all(|v| matches!(v, Vote::Copy { .. } | Vote::Never));
        if let Some((at, ..)) =
            fitting().filter(|(at, ..)| *at < others && all_told).max_by_key(|(_, _, term, _)| *term)
        {
            return Resolution::Take(at);
        }
    }
    if votes.contains(&Vote::Covered) || votes.contains(&Vote::Contradicts) {
        return Resolution::Rebuild;
    }
    let voters = votes.get(..others).unwrap_or_default();
    let never = others > 0 && voters.iter().all(|vote| *vote == Vote::Never);
    if never && !case.durable && case.voters_are_known { Resolution::Cut } else { Resolution::Wait }
}

#[cfg(test)]
#[path = "repair_tests.rs"]
mod tests;
