//! One group of entries on its way to the disk: the bytes of its frames and of its rows. Pure.

use bytes::Bytes;

use crate::{
    frame::{EntryKind, FRAME_HEADER_BYTES, FrameHeader, frame_bytes, payload_crc},
    index::Located,
    open::row_of,
};

/// An entry ready to be written.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Index of the entry.
    pub index: u64,
    /// Term of the entry.
    pub term: u64,
    /// What the payload is.
    pub kind: EntryKind,
    /// The payload.
    pub payload: Bytes,
}

impl Encoded {
    /// Bytes that its frame takes.
    pub fn frame_bytes(&self) -> u64 {
        frame_bytes(u32::try_from(self.payload.len()).unwrap_or(u32::MAX))
    }
}

/// What every frame of a group carries.
#[derive(Clone, Copy, Debug)]
pub struct Marks {
    /// One more than the last durable index.
    pub synced_end: u64,
    /// One more than the last index known committed.
    pub committed_end: u64,
}

/// Frames and rows of consecutive entries, to be written at one place each.
#[derive(Default)]
pub struct Group {
    /// Frames, one behind the other.
    pub frames: Vec<u8>,
    /// Their rows.
    pub rows: Vec<u8>,
    /// Where each entry will lie.
    pub located: Vec<Located>,
}

impl Group {
    /// Forgets the content and keeps the memory.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.rows.clear();
        self.located.clear();
    }

    /// Adds an entry whose frame will begin at `offset`; returns its header's checksum.
    pub fn push(&mut self, entry: &Encoded, identity: u64, offset: u32, previous_crc: u32, marks: Marks) -> u32 {
        let payload_bytes = u32::try_from(entry.payload.len()).unwrap_or(u32::MAX);
        let header = FrameHeader {
            kind: entry.kind,
            payload_bytes,
            previous_crc,
            term: entry.term,
            index: entry.index,
            synced_end: marks.synced_end,
            committed_end: marks.committed_end,
            payload_crc: payload_crc(&entry.payload),
        };
        let (bytes, crc) = header.encode(identity);
        let start = self.frames.len();
        self.frames.extend_from_slice(&bytes);
        self.frames.extend_from_slice(&entry.payload);
        let padded = usize::try_from(frame_bytes(payload_bytes)).unwrap_or(FRAME_HEADER_BYTES);
        self.frames.resize(start + padded, 0);
        let located = Located { term: entry.term, offset, payload_bytes, payload_crc: header.payload_crc };
        self.rows.extend_from_slice(&row_of(entry.index, &located).encode(identity));
        self.located.push(located);
        crc
    }
}
