//! The bytes of a segment: header, marks, identifier rows and frames. Pure: no disk in here.
//!
//! ```text
//! 0        4096     8192     12288    16384            data_offset
//! | header | header | mark A | mark B | row 0, row 1 … | frame, frame, frame … zeros |
//! | (copy) | (copy) |        |        | 32 bytes each  | 72 bytes + payload, padded  |
//! ```
//!
//! Each structure carries a CRC-32 over itself and the identity of its segment, so that bytes of
//! another file never pass. Integers are little-endian. What must survive the loss of one block
//! without help from a peer (header, marks) is there twice, in different blocks.

use crate::types::LogId;

/// Version of the bytes described here. A segment of a newer one is refused.
pub const FORMAT_VERSION: u32 = 1;

/// Size of a block that may be lost as a whole.
pub const BLOCK_BYTES: usize = 4096;
/// Where the two copies of the header begin.
pub const HEADER_OFFSETS: [u64; 2] = [0, 4096];
/// Where the two marks begin.
pub const MARK_OFFSETS: [u64; 2] = [8192, 12288];
/// Where the identifier rows begin.
pub const ROWS_OFFSET: u64 = 16384;
/// Bytes of one identifier row.
pub const ROW_BYTES: usize = 32;
/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 72;
/// Frames begin at multiples of this.
pub const FRAME_ALIGN: u64 = 8;
/// Bytes that a segment's header uses of its block.
pub const HEADER_BYTES: usize = 96;
/// Bytes that a mark uses of its block.
pub const MARK_BYTES: usize = 48;
/// Where the two copies of a cut record lie, behind those of the header.
pub const CUT_OFFSETS: [u64; 2] = [1024, 5120];
/// Bytes of a cut record.
pub const CUT_BYTES: usize = 32;

const HEADER_MAGIC: [u8; 8] = *b"STEMEWAL";
const MARK_MAGIC: [u8; 8] = *b"STEMMARK";
const FRAME_MAGIC: u32 = 0x4d45_5453; // "STEM"
const CUT_MAGIC: [u8; 8] = *b"STEMECUT";
/// Set in the kind of a frame that was written again by a repair. A program that knows no repaired frames takes it
/// for a damaged one, which is safe.
const REPAIRED: u8 = 0x80;

/// Rows of a segment: one for every 512 bytes of it, so that a segment of entries of common size is
/// full before its rows are used up; when rows run out first, the log rolls to the next segment.
pub fn row_capacity(segment_bytes: u64) -> u32 {
    u32::try_from(segment_bytes / 512).unwrap_or(u32::MAX).max(8)
}

/// Where frames begin in a segment with that many rows.
pub fn data_offset(rows: u32) -> u64 {
    let end = ROWS_OFFSET + u64::from(rows) * ROW_BYTES as u64;
    end.next_multiple_of(BLOCK_BYTES as u64)
}

/// Bytes of a frame with its padding.
pub fn frame_bytes(payload_bytes: u32) -> u64 {
    (FRAME_HEADER_BYTES as u64 + u64::from(payload_bytes)).next_multiple_of(FRAME_ALIGN)
}

/// What a segment says of itself. Synced, and its name with it, before the first frame counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// NNN of `segment.NNN.wal`.
    pub number: u64,
    /// Random; part of every checksum in the segment.
    pub identity: u64,
    /// Size of the file.
    pub segment_bytes: u64,
    /// How many rows the identifier table has.
    pub rows: u32,
    /// Index of the first entry that this segment may hold. Entries of older segments at or above it
    /// were truncated and are void.
    pub first_index: u64,
    /// The last entry kept before this segment; `None` at the very beginning.
    pub previous: Option<LogId>,
    /// Checksum of the previous entry's frame header; 0 when that frame is not in the log.
    pub previous_crc: u32,
}

/// A promise, written by an idle writer, that everything up to an index is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Counts up within the segment: the higher of two marks is the newer.
    pub sequence: u64,
    /// One more than the last durable index; 0: none.
    pub synced_end: u64,
    /// One more than the last index known committed; 0: none. A hint.
    pub committed_end: u64,
}

/// Left in a segment by the tool that cut it: what is at and above `from` was there and is not any more. A log that
/// carries it has forgotten entries that it may have acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutRecord {
    /// First index that was cut.
    pub from: u64,
    /// One more than the last index of which the segment had a trace.
    pub end: u64,
}

/// The identifier of one entry, kept megabytes away from its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index of the entry.
    pub index: u64,
    /// Term of the entry.
    pub term: u64,
    /// Where its frame begins in the segment.
    pub offset: u32,
    /// Bytes of its payload.
    pub payload_bytes: u32,
    /// CRC-32 of its payload: with (term, index) the entry's full identity.
    pub payload_crc: u32,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// No payload: a new leader's first entry.
    Blank,
    /// Commands, opaque here.
    Normal,
    /// An encoded membership.
    Membership,
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the payload is.
    pub kind: EntryKind,
    /// Bytes of the payload.
    pub payload_bytes: u32,
    /// Header checksum of the frame before this one, across segments.
    pub previous_crc: u32,
    /// Term of the entry.
    pub term: u64,
    /// Index of the entry.
    pub index: u64,
    /// One more than the last index known durable when this group was written; 0: none.
    pub synced_end: u64,
    /// One more than the last index known committed; 0: none. A hint.
    pub committed_end: u64,
    /// CRC-32 of the payload.
    pub payload_crc: u32,
}

/// Why bytes are not the structure that was looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalid {
    /// Nothing but zeros: never written.
    Zero,
    /// Something that does not verify.
    Damaged,
    /// It verifies, and a newer program wrote it.
    NewerFormat(u32),
}

struct Put<'a>(&'a mut [u8], usize);

impl Put<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let end = self.1 + bytes.len();
        if let Some(to) = self.0.get_mut(self.1..end) {
            to.copy_from_slice(bytes);
        }
        self.1 = end;
        self
    }
    fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }
    fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }
}

fn get_u32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map(u32::from_le_bytes).unwrap_or_default()
}

fn get_u64(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map(u64::from_le_bytes).unwrap_or_default()
}

fn is_zero(b: &[u8]) -> bool {
    b.iter().all(|b| *b == 0)
}

/// CRC-32 over a segment's identity and some bytes.
fn crc(identity: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&identity.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

/// CRC-32 of a payload, as frames and rows carry it.
pub fn payload_crc(payload: &[u8]) -> u32 {
    crc32fast::hash(payload)
}

fn split_crc(bytes: &[u8], crc_at: usize) -> Result<(&[u8], u32), Invalid> {
    let body = bytes.get(..crc_at).ok_or(Invalid::Damaged)?;
    Ok((body, get_u32(bytes, crc_at)))
}

impl SegmentHeader {
    /// The header's bytes, to be written at both [`HEADER_OFFSETS`].
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut buf = [0; HEADER_BYTES];
        let (has, term, index) = match &self.previous {
            Some(id) => (1, term_of(id), id.index()),
            None => (0, 0, 0),
        };
        let mut put = Put(&mut buf, 0);
        put.bytes(&HEADER_MAGIC).u32(FORMAT_VERSION).u32(self.rows).u64(self.number).u64(self.identity);
        put.u64(self.segment_bytes).u64(self.first_index).u32(has).u32(self.previous_crc).u64(term).u64(index);
        let sum = crc(self.identity, buf.get(..HEADER_BYTES - 4).unwrap_or_default());
        Put(&mut buf, HEADER_BYTES - 4).u32(sum);
        buf
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8]) -> Result<Self, Invalid> {
        let bytes = bytes.get(..HEADER_BYTES).ok_or(Invalid::Damaged)?;
        if is_zero(bytes) {
            return Err(Invalid::Zero);
        }
        let identity = get_u64(bytes, 24);
        let (body, sum) = split_crc(bytes, HEADER_BYTES - 4)?;
        if body.get(..8) != Some(&HEADER_MAGIC) || sum != crc(identity, body) {
            return Err(Invalid::Damaged);
        }
        let format = get_u32(bytes, 8);
        if format != FORMAT_VERSION {
            return Err(Invalid::NewerFormat(format));
        }
        let previous = match get_u32(bytes, 48) {
            0 => None,
            _ => Some(log_id(get_u64(bytes, 56), get_u64(bytes, 64))),
        };
        Ok(Self {
            number: get_u64(bytes, 16),
            identity,
            segment_bytes: get_u64(bytes, 32),
            rows: get_u32(bytes, 12),
            first_index: get_u64(bytes, 40),
            previous,
            previous_crc: get_u32(bytes, 52),
        })
    }
}

impl Mark {
    /// The mark's bytes.
    pub fn encode(&self, identity: u64) -> [u8; MARK_BYTES] {
        let mut buf = [0; MARK_BYTES];
        let mut put = Put(&mut buf, 0);
        put.bytes(&MARK_MAGIC).u64(self.sequence).u64(self.synced_end).u64(self.committed_end);
        let sum = crc(identity, buf.get(..MARK_BYTES - 4).unwrap_or_default());
        Put(&mut buf, MARK_BYTES - 4).u32(sum);
        buf
    }

    /// Reads a mark of the segment with that identity.
    pub fn decode(bytes: &[u8], identity: u64) -> Result<Self, Invalid> {
        let bytes = bytes.get(..MARK_BYTES).ok_or(Invalid::Damaged)?;
        if is_zero(bytes) {
            return Err(Invalid::Zero);
        }
        let (body, sum) = split_crc(bytes, MARK_BYTES - 4)?;
        if body.get(..8) != Some(&MARK_MAGIC) || sum != crc(identity, body) {
            return Err(Invalid::Damaged);
        }
        Ok(Self { sequence: get_u64(bytes, 8), synced_end: get_u64(bytes, 16), committed_end: get_u64(bytes, 24) })
    }
}

impl Row {
    /// The row's bytes.
    pub fn encode(&self, identity: u64) -> [u8; ROW_BYTES] {
        let mut buf = [0; ROW_BYTES];
        let mut put = Put(&mut buf, 0);
        put.u64(self.index).u64(self.term).u32(self.offset).u32(self.payload_bytes).u32(self.payload_crc);
        let sum = crc(identity, buf.get(..ROW_BYTES - 4).unwrap_or_default());
        Put(&mut buf, ROW_BYTES - 4).u32(sum);
        buf
    }

    /// Reads a row of the segment with that identity.
    pub fn decode(bytes: &[u8], identity: u64) -> Result<Self, Invalid> {
        let bytes = bytes.get(..ROW_BYTES).ok_or(Invalid::Damaged)?;
        if is_zero(bytes) {
            return Err(Invalid::Zero);
        }
        let (body, sum) = split_crc(bytes, ROW_BYTES - 4)?;
        if sum != crc(identity, body) {
            return Err(Invalid::Damaged);
        }
        Ok(Self {
            index: get_u64(bytes, 0),
            term: get_u64(bytes, 8),
            offset: get_u32(bytes, 16),
            payload_bytes: get_u32(bytes, 20),
            payload_crc: get_u32(bytes, 24),
        })
    }
}

impl CutRecord {
    /// The record's bytes, to be written at both [`CUT_OFFSETS`].
    pub fn encode(&self, identity: u64) -> [u8; CUT_BYTES] {
        let mut buf = [0; CUT_BYTES];
        Put(&mut buf, 0).bytes(&CUT_MAGIC).u64(self.from).u64(self.end);
        let sum = crc(identity, buf.get(..CUT_BYTES - 4).unwrap_or_default());
        Put(&mut buf, CUT_BYTES - 4).u32(sum);
        buf
    }

    /// Reads a record of the segment with that identity.
    pub fn decode(bytes: &[u8], identity: u64) -> Result<Self, Invalid> {
        let bytes = bytes.get(..CUT_BYTES).ok_or(Invalid::Damaged)?;
        if is_zero(bytes) {
            return Err(Invalid::Zero);
        }
        let (body, sum) = split_crc(bytes, CUT_BYTES - 4)?;
        if bytes.get(..8) != Some(&CUT_MAGIC) || sum != crc(identity, body) {
            return Err(Invalid::Damaged);
        }
        Ok(Self { from: get_u64(bytes, 8), end: get_u64(bytes, 16) })
    }
}

impl EntryKind {
    /// The number that stands for the kind on the disk and between nodes.
    pub fn to_byte(self) -> u8 {
        match self {
            EntryKind::Blank => 1,
            EntryKind::Normal => 2,
            EntryKind::Membership => 3,
        }
    }

    /// The kind of a number.
    pub fn of(byte: u8) -> Option<Self> {
        [EntryKind::Blank, EntryKind::Normal, EntryKind::Membership].into_iter().find(|kind| kind.to_byte() == byte)
    }
}

impl FrameHeader {
    /// The header's bytes and their checksum, which the next frame carries on.
    pub fn encode(&self, identity: u64) -> ([u8; FRAME_HEADER_BYTES], u32) {
        self.encode_as(self.kind.to_byte(), self.committed_end, identity)
    }

    /// The header of a frame that a repair writes: `link` is what the next frame carries on, as it did before the
    /// damage, so that nothing behind has to be written again. It takes the place of `committed_end`.
    pub fn encode_repaired(&self, link: u32, identity: u64) -> [u8; FRAME_HEADER_BYTES] {
        self.encode_as(self.kind.to_byte() | REPAIRED, u64::from(link), identity).0
    }

    fn encode_as(&self, kind: u8, committed_end: u64, identity: u64) -> ([u8; FRAME_HEADER_BYTES], u32) {
        let mut buf = [0; FRAME_HEADER_BYTES];
        let mut put = Put(&mut buf, 0);
        put.u32(FRAME_MAGIC).bytes(&[kind, FORMAT_VERSION as u8, 0, 0]).u64(identity);
        put.u32(self.payload_bytes).u32(self.previous_crc).u64(self.term).u64(self.index);
        put.u64(self.synced_end).u64(committed_end).u32(self.payload_crc);
        let sum = crc(identity, buf.get(..FRAME_HEADER_BYTES - 4).unwrap_or_default());
        Put(&mut buf, FRAME_HEADER_BYTES - 4).u32(sum);
        (buf, sum)
    }

    /// Reads a frame header of the segment with that identity; returns it with what the next frame carries on: its
    /// checksum, or that of the frame that a repair replaced.
    pub fn decode(bytes: &[u8], identity: u64) -> Result<(Self, u32), Invalid> {
        let bytes = bytes.get(..FRAME_HEADER_BYTES).ok_or(Invalid::Damaged)?;
        if is_zero(bytes) {
            return Err(Invalid::Zero);
        }
        let (body, sum) = split_crc(bytes, FRAME_HEADER_BYTES - 4)?;
        if get_u32(bytes, 0) != FRAME_MAGIC || get_u64(bytes, 8) != identity || sum != crc(identity, body) {
            return Err(Invalid::Damaged);
        }
        let kind_byte = bytes.get(4).copied().unwrap_or_default();
        let kind = EntryKind::of(kind_byte & !REPAIRED).ok_or(Invalid::Damaged)?;
        let repaired = kind_byte & REPAIRED != 0;
        let header = Self {
            kind,
            payload_bytes: get_u32(bytes, 16),
            previous_crc: get_u32(bytes, 20),
            term: get_u64(bytes, 24),
            index: get_u64(bytes, 32),
            synced_end: get_u64(bytes, 40),
            committed_end: if repaired { 0 } else { get_u64(bytes, 48) },
            payload_crc: get_u32(bytes, 56),
        };
        Ok((header, if repaired { get_u32(bytes, 48) } else { sum }))
    }
}

/// Builds a log id. With one leader per term the term alone stands for the leader.
pub fn log_id(term: u64, index: u64) -> LogId {
    LogId::new_term_index(term, index)
}

/// The term of a log id.
pub fn term_of(id: &LogId) -> u64 {
    id.committed_leader_id().term
}
