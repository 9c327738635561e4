//! Reading entries: the newest from memory, older ones from their segments.
//!
//! Every frame read is verified again: a disk that has rotted since the start answers with an error
//! that names segment and offset, never with other data. Reads are `pread`s and no memory maps, so
//! that a failing disk is an error here and no signal that ends the process.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use openraft::RaftLogReader;

use crate::{
    entry,
    frame::{FRAME_HEADER_BYTES, FrameHeader, frame_bytes, payload_crc},
    index::{Located, Lookup, OnDisk},
    shared::Shared,
    types::{Entry, LogId, TypeConfig, Vote},
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

    /// Reads entries without holding the lock across I/O.
    pub fn read(&self, start: u64, end: u64, bytes_max: u64) -> io::Result<Vec<Entry>> {
        read_pieces(self.collect(start, end, bytes_max))
    }

    /// The same for an async caller: a disk that hangs must not take a thread that heartbeats need.
    async fn read_async(&self, start: u64, end: u64, bytes_max: u64) -> io::Result<Vec<Entry>> {
        let pieces = self.collect(start, end, bytes_max);
        if pieces.iter().all(|piece| matches!(piece, Piece::Cached(_))) {
            return read_pieces(pieces);
        }
        tokio::task::spawn_blocking(move || read_pieces(pieces)).await.map_err(io::Error::other)?
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

fn read_pieces(pieces: Vec<Piece>) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Cached(entry) => entries.push(entry),
            Piece::Run(run) => read_run(&run, &mut entries)?,
        }
    }
    Ok(entries)
}

fn read_run(run: &[OnDisk], entries: &mut Vec<Entry>) -> io::Result<()> {
    let (Some(first), Some(last)) = (run.first(), run.last()) else {
        return Ok(());
    };
    let start = u64::from(first.located.offset);
    let len = usize::try_from(end_of(last) - start).map_err(io::Error::other)?;
    let mut buf = BytesMut::zeroed(len);
    let read = first.file.read_at(&mut buf, start)?;
    buf.truncate(read);
    let buf = buf.freeze();
    for on_disk in run {
        let at = usize::try_from(u64::from(on_disk.located.offset) - start).map_err(io::Error::other)?;
        entries.push(verify(on_disk, &buf.slice(at.min(buf.len())..))?);
    }
    Ok(())
}

fn verify(on_disk: &OnDisk, bytes: &Bytes) -> io::Result<Entry> {
    let damaged = |what: &str| {
        let OnDisk { segment, located, index, .. } = on_disk;
        let text = format!("WAL {segment} corrupt at byte {}: entry {index}: {what}", located.offset);
        io::Error::new(io::ErrorKind::InvalidData, text)
    };
    let (header, _) =
        FrameHeader::decode(bytes, on_disk.identity).map_err(|_| damaged("the frame header does not verify"))?;
    let Located { term, payload_crc: located_crc, .. } = on_disk.located;
    if header.index != on_disk.index || header.term != term || header.payload_crc != located_crc {
        return Err(damaged("another entry's frame lies there"));
    }
    let end = FRAME_HEADER_BYTES + header.payload_bytes as usize;
    if bytes.len() < end {
        return Err(damaged("the file is shorter than the frame"));
    }
    let payload = bytes.slice(FRAME_HEADER_BYTES..end);
    if payload_crc(&payload) != header.payload_crc {
        return Err(damaged("the payload does not verify"));
    }
    entry::decode(header.kind, header.term, header.index, payload).map_err(|e| damaged(&e.to_string()))
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
