//! Reading entries: the newest from memory, older ones from their segments.
//!
//! Every frame read is verified again: a disk that has rotted since the start answers with an error
//! that names segment and offset ([`EntryUnreadable`]), never with other data. Reads are `pread`s and no memory
//! maps, so that a failing disk is an error here and no signal that ends the process. What Raft reads is healed
//! first where the node knows how: a replica's copy takes the place of the damaged entry, here and on the disk.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::{Arc, Weak},
};

use bytes::{Bytes, BytesMut};
use openraft::RaftLogReader;

use tokio::sync::oneshot;

use crate::{
    entry,
    error::EntryUnreadable,
    frame::{FRAME_HEADER_BYTES, FrameHeader, frame_bytes, payload_crc},
    heal,
    index::{Located, Lookup, OnDisk},
    io_times::{IoTimes, Waits},
    shared::Shared,
    store::Inner,
    types::{Entry, LogId, TypeConfig, Vote},
    writer::Job,
};

/// One replication message carries at most this many bytes of entries, unless one entry is larger:
/// enough to keep a link busy, and little enough for heartbeats not to wait behind it.
const REPLICATION_BYTES_MAX: u64 = 4 << 20;

/// Frames that lie behind each other are read together, up to this many bytes.
const READ_BYTES_MAX: u64 = 1 << 20;

/// Reads the log. Clones share it.
#[derive(Clone)]
pub struct WalReader {
    pub(crate) shared: Arc<Shared>,
    /// Readers do not keep the log open.
    pub(crate) log: Weak<Inner>,
}

enum Piece {
    Cached(Entry),
    Run(Vec<OnDisk>),
}

fn end_of(on_disk: &OnDisk) -> u64 {
    u64::from(on_disk.located.offset) + frame_bytes(on_disk.located.payload_bytes)
}

impl WalReader {
    /// Entries of `[start, end)`, as many as exist, stopping before `bytes_max` but after the first.
    fn collect(&self, start: u64, end: u64, bytes_max: u64) -> Vec<Piece> {
        let index = self.shared.index();
        let mut pieces: Vec<Piece> = Vec::new();
        let mut bytes = 0;
        for at in start.max(index.first())..end.min(index.end()) {
            let Some(found) = index.lookup(at) else { break };
            bytes += match &found {
                Lookup::Cached(entry) => entry_bytes(entry),
                Lookup::OnDisk(on_disk) => u64::from(on_disk.located.payload_bytes),
            };
            if bytes > bytes_max && !pieces.is_empty() {
                break;
            }
            match (found, pieces.last_mut()) {
                (Lookup::Cached(entry), _) => pieces.push(Piece::Cached(entry)),
                (Lookup::OnDisk(next), Some(Piece::Run(run))) if continues(run, &next) => run.push(next),
                (Lookup::OnDisk(first), _) => pieces.push(Piece::Run(vec![first])),
            }
        }
        pieces
    }

    /// The durable vote.
    pub fn vote(&self) -> Option<Vote> {
        self.shared.vote()
    }

    /// The log id at an index, when the log holds it.
    pub fn log_id_at(&self, index: u64) -> Option<LogId> {
        self.shared.index().log_id_at(index)
    }

    /// Reads entries without holding the lock across I/O. An entry that cannot be read is an [`EntryUnreadable`].
    pub fn read(&self, start: u64, end: u64, bytes_max: u64) -> io::Result<Vec<Entry>> {
        let read = read_pieces(self.collect(start, end, bytes_max), &self.shared.io_times)?;
        read.into_iter().map(|entry| entry.map_err(unreadable_error)).collect()
    }

    /// The same for an async caller: a disk that hangs must not take a thread that heartbeats need. Heals what it
    /// can.
    pub async fn read_async(&self, start: u64, end: u64, bytes_max: u64) -> io::Result<Vec<Entry>> {
        let pieces = self.collect(start, end, bytes_max);
        let shared = Arc::clone(&self.shared);
        let read = if pieces.iter().all(|piece| matches!(piece, Piece::Cached(_))) {
            read_pieces(pieces, &shared.io_times)?
        } else {
            let read = tokio::task::spawn_blocking(move || read_pieces(pieces, &shared.io_times));
            read.await.map_err(io::Error::other)??
        };
        let mut entries = Vec::with_capacity(read.len());
        for read in read {
            entries.push(match read {
                Ok(entry) => entry,
                Err(unreadable) => match self.heal(&unreadable).await {
                    Some(entry) => entry,
                    None => return Err(unreadable_error(unreadable)),
                },
            });
        }
        Ok(entries)
    }

    /// A replica's copy of an entry that cannot be read, checked; and asks the writer to put it in its place.
    async fn heal(&self, unreadable: &EntryUnreadable) -> Option<Entry> {
        let copy = heal::copy_of_replica(&self.shared, unreadable).await?;
        let index = copy.index;
        let entry = entry::decode(copy.kind()?, copy.term, index, copy.payload.clone());
        let entry = entry.inspect_err(|error| tracing::warn!(index, %error, "the copy cannot be decoded")).ok()?;
        if let Some(log) = self.log.upgrade() {
            // The reader has what it needs; whether the disk takes it shows in the log of the program, or latches.
            let (reply, _nobody_waits) = oneshot::channel();
            let _gone = log.jobs.send(Job::Repair(copy, reply));
        }
        Some(entry)
    }
}

fn entry_bytes(entry: &Entry) -> u64 {
    match &entry.payload {
        openraft::EntryPayload::Normal(data) => data.0.len() as u64,
        openraft::EntryPayload::Blank | openraft::EntryPayload::Membership(_) => FRAME_HEADER_BYTES as u64,
    }
}

fn continues(run: &[OnDisk], next: &OnDisk) -> bool {
    match (run.first(), run.last()) {
        (Some(first), Some(last)) => {
            last.identity == next.identity
                && end_of(last) == u64::from(next.located.offset)
                && end_of(next) - u64::from(first.located.offset) <= READ_BYTES_MAX
        }
        _ => false,
    }
}

/// Each entry, or what is wrong with it.
type Read = Result<Entry, EntryUnreadable>;

fn read_pieces(pieces: Vec<Piece>, io_times: &IoTimes) -> io::Result<Vec<Read>> {
    let mut entries = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Cached(entry) => entries.push(Ok(entry)),
            Piece::Run(run) => read_run(&run, io_times, &mut entries)?,
        }
    }
    Ok(entries)
}

fn read_run(run: &[OnDisk], io_times: &IoTimes, entries: &mut Vec<Read>) -> io::Result<()> {
    let (Some(first), Some(last)) = (run.first(), run.last()) else {
        return Ok(());
    };
    let start = u64::from(first.located.offset);
    let len = usize::try_from(end_of(last) - start).map_err(io::Error::other)?;
    let mut buf = BytesMut::zeroed(len);
    let read = {
        let _seen = io_times.enter("read", &first.segment, Waits::Somebody);
        first.file.read_at(&mut buf, start)
    };
    match read {
        Ok(read) => buf.truncate(read),
        // One of them cannot be read: which?
        Err(_) if run.len() > 1 => {
            for one in run {
                read_run(std::slice::from_ref(one), io_times, entries)?;
            }
            return Ok(());
        }
        Err(error) => {
            entries.push(Err(unreadable(first, format!("it cannot be read: {error}"))));
            return Ok(());
        }
    }
    let buf = buf.freeze();
    for on_disk in run {
        let at = usize::try_from(u64::from(on_disk.located.offset) - start).map_err(io::Error::other)?;
        let verified = verify(on_disk, &buf.slice(at.min(buf.len())..));
        entries.push(verified.map_err(|what| unreadable(on_disk, what)));
    }
    Ok(())
}

fn unreadable(on_disk: &OnDisk, what: String) -> EntryUnreadable {
    let Located { term, offset, payload_crc, .. } = on_disk.located;
    let (index, segment, offset) = (on_disk.index, on_disk.segment.clone(), u64::from(offset));
    EntryUnreadable { index, term, payload_crc, segment, offset, what }
}

fn unreadable_error(unreadable: EntryUnreadable) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, unreadable)
}

/// The entry, when the bytes are its frame; else what is wrong with them.
pub(crate) fn verify(on_disk: &OnDisk, bytes: &Bytes) -> Result<Entry, String> {
    let (header, _) = FrameHeader::decode(bytes, on_disk.identity).map_err(|_| "the frame header does not verify")?;
    let Located { term, payload_crc: located_crc, .. } = on_disk.located;
    if header.index != on_disk.index || header.term != term || header.payload_crc != located_crc {
        return Err("another entry's frame lies there".into());
    }
    let end = FRAME_HEADER_BYTES + header.payload_bytes as usize;
    if bytes.len() < end {
        return Err("the file is shorter than the frame".into());
    }
    let payload = bytes.slice(FRAME_HEADER_BYTES..end);
    if payload_crc(&payload) != header.payload_crc {
        return Err("the payload does not verify".into());
    }
    entry::decode(header.kind, header.term, header.index, payload).map_err(|e| e.to_string())
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<TypeConfig> for WalReader {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        let (start, end) = bounds(&range);
        self.read_async(start, end, u64::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared.vote())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read_async(start, end, REPLICATION_BYTES_MAX).await
    }
}
