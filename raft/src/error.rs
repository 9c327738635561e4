//! What can go wrong with the log, kept apart by what the caller must do about it.

use std::{fmt, io, path::PathBuf};

/// The writer met an error of its disk and stopped for good: no retry, no second fsync, no
/// acknowledgement. Only a new start, or a rebuild, ends this state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation} {file}: {error}")]
pub struct Latched {
    /// What was being done, for example `sync`.
    pub operation: &'static str,
    /// File name, for example `segment.001.wal`.
    pub file: String,
    /// The operating system's words.
    pub error: String,
}

impl From<Latched> for io::Error {
    fn from(latched: Latched) -> Self {
        io::Error::other(latched)
    }
}

/// An entry of the log that was there and cannot be read: the disk answers with an error, or with something else.
/// Readers of entries find it inside the `io::Error` by [`EntryUnreadable::of`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("WAL {segment} corrupt at byte {offset}: entry {index}: {what}")]
pub struct EntryUnreadable {
    /// Index of the entry.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// CRC-32 of its payload.
    pub payload_crc: u32,
    /// File name of the segment.
    pub segment: String,
    /// Where its frame begins in the segment.
    pub offset: u64,
    /// What is wrong.
    pub what: String,
}

impl EntryUnreadable {
    /// The entry that an error of a reader is about; `None` when it is about none.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<EntryUnreadable> for Damage {
    fn from(entry: EntryUnreadable) -> Self {
        Self { segment: entry.segment, offset: Some(entry.offset), index: entry.index, what: entry.what }
    }
}

/// Why a damaged place was not written again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RepairError {
    /// The log does not hold it any more: purged or truncated.
    #[error("the log has no entry or segment {0} any more")]
    Gone(u64),
    /// The copy is of another entry. Nothing was written.
    #[error("the copy is not entry {0} of this log")]
    OtherEntry(u64),
    /// No replica has it at present, as far as this node could ask.
    #[error("no copy of entry {0} was found")]
    NoCopy(u64),
    /// The disk failed, now or before.
    #[error(transparent)]
    Latched(#[from] Latched),
}

/// One place of the log that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// File name of the segment.
    pub segment: String,
    /// Byte offset in the segment, when known.
    pub offset: Option<u64>,
    /// Index of the entry.
    pub index: u64,
    /// What is wrong, for example `frame damaged, row intact`.
    pub what: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WAL {} corrupt", self.segment)?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        write!(f, ": entry {}: {}", self.index, self.what)
    }
}

/// Why a log was not opened. Nothing was changed on the disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has the folder.
    #[error("{} is in use by another process", .0.display())]
    Locked(PathBuf),
    /// The disk answered with an error.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Entries that were durable are damaged or missing. Never cut: whoever has other nodes to ask repairs the log from
    /// them instead of opening it (`WalStore::begin_open`), and without any the node must be replaced.
    #[error(
        "the log has lost durable entries ({}): it has to be repaired from another node, which a node of a cluster does by \
         itself when it starts; where there is none, keep the folder, and begin anew from a backup",
        describe(.0)
    )]
    Repair(Vec<Damage>),
    /// The last group of the log is incomplete, and nobody here can tell whether it had been
    /// acknowledged.
    #[error(
        "the end of the log is torn or damaged ({}), and only other nodes can tell which: a node of a cluster asks them \
         when it starts; where there is none, keep the folder, and let stemedb-wal-repair cut the end if what it held may \
         be lost",
        describe(.0)
    )]
    Ask(Vec<Damage>),
    /// The log cannot be used at all.
    #[error("{0}")]
    Refuse(String),
}

fn describe(damage: &[Damage]) -> String {
    const SHOWN: usize = 3;
    let mut text = damage.iter().take(SHOWN).map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if damage.len() > SHOWN {
        text.push_str(&format!("; and {} more", damage.len() - SHOWN));
    }
    text
}
