//! Reads one segment and says what is there, entry by entry. Decides nothing.

use crate::{
    frame::{
        CUT_OFFSETS, CutRecord, EntryKind, FRAME_ALIGN, FRAME_HEADER_BYTES, FrameHeader, HEADER_OFFSETS, Invalid,
        MARK_OFFSETS, Mark, ROW_BYTES, ROWS_OFFSET, Row, SegmentHeader, data_offset, frame_bytes, payload_crc,
    },
    index::Located,
    recovery::{FrameFound, RowFound},
};

/// Bytes compared at a time when looking for anything but zeros.
const ZERO_CHUNK_BYTES: usize = 4096;

/// One entry of a segment as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Index of the entry.
    pub index: u64,
    /// Where its frame begins or should begin, when known.
    pub offset: Option<u64>,
    /// The frame.
    pub frame: FrameFound,
    /// The row.
    pub row: RowFound,
    /// Where to read it, when the frame is intact.
    pub located: Option<Located>,
    /// What the next frame carries on of this one, when its header verifies: the header's checksum, or that of the
    /// frame in whose place a repair wrote it.
    pub header_crc: Option<u32>,
    /// What its header carries on of the frame before it, when the header verifies.
    pub previous_crc: Option<u32>,
    /// What its header, or else its row, says of the entry.
    pub known: Option<Known>,
}

/// What an entry was, as far as header or row still tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Term of the entry.
    pub term: u64,
    /// Bytes of its payload.
    pub payload_bytes: u32,
    /// CRC-32 of its payload.
    pub payload_crc: u32,
    /// What the payload is; rows do not say.
    pub kind: Option<EntryKind>,
}

impl Found {
    /// An entry that should be there and of which no frame is found.
    pub fn lost(index: u64, offset: Option<u64>, row: RowFound) -> Self {
        Self {
            index,
            offset,
            frame: FrameFound::Damaged,
            row,
            located: None,
            header_crc: None,
            previous_crc: None,
            known: None,
        }
    }
}

/// A segment as found.
#[derive(Clone, Debug)]
pub struct SegmentScan {
    /// Its header.
    pub header: SegmentHeader,
    /// One of the two copies of the header is damaged.
    pub header_copy_damaged: bool,
    /// Entries in index order, without gaps, from `header.first_index`.
    pub entries: Vec<Found>,
    /// One more than the highest index that the segment itself proves durable.
    pub durable_end: u64,
    /// One more than the highest index that the segment knows committed.
    pub committed_end: u64,
    /// Sequence of the newest mark.
    pub mark_sequence: u64,
    /// Where the next frame would begin.
    pub end_offset: u64,
    /// Bytes that the file lacks: segments are written in full before they count.
    pub short_by: u64,
    /// Nothing but zeros follows the last entry, in the table and behind the frames.
    pub tail_clean: bool,
    /// The segment was cut by the repair tool.
    pub cut: Option<CutRecord>,
}

/// Why a segment cannot be scanned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// Neither copy of the header verifies.
    HeaderDamaged,
    /// A newer program wrote it.
    NewerFormat(u32),
}

struct Walk<'a> {
    bytes: &'a [u8],
    header: SegmentHeader,
    entries: Vec<Found>,
    durable_end: u64,
    committed_end: u64,
    offset: u64,
    /// Header checksum of the frame before, when known.
    chain: Option<u32>,
    /// One more than the last row that is not zeros. Found once: a table of 131,072 rows that is looked
    /// through anew for each of them takes minutes.
    rows_end: u64,
}

/// Scans the bytes of a whole segment.
pub fn scan_segment(bytes: &[u8]) -> Result<SegmentScan, Unreadable> {
    let (header, header_copy_damaged) = read_header(bytes)?;
    let mut walk = Walk {
        bytes,
        header,
        entries: Vec::new(),
        durable_end: header.first_index,
        committed_end: 0,
        offset: data_offset(header.rows),
        chain: Some(header.previous_crc),
        rows_end: rows_end(bytes, &header),
    };
    let mut mark_sequence = 0;
    for at in MARK_OFFSETS {
        if let Ok(mark) = Mark::decode(slice_from(bytes, at), header.identity) {
            walk.durable_end = walk.durable_end.max(mark.synced_end);
            walk.committed_end = walk.committed_end.max(mark.committed_end);
            mark_sequence = mark_sequence.max(mark.sequence);
        }
    }
    let tail_clean = walk.run();
    let cut = CUT_OFFSETS.iter().find_map(|at| CutRecord::decode(slice_from(bytes, *at), header.identity).ok());
    Ok(SegmentScan {
        cut,
        header,
        header_copy_damaged,
        entries: walk.entries,
        durable_end: walk.durable_end,
        committed_end: walk.committed_end,
        mark_sequence,
        end_offset: walk.offset,
        tail_clean,
        short_by: header.segment_bytes.saturating_sub(bytes.len() as u64),
    })
}

fn read_header(bytes: &[u8]) -> Result<(SegmentHeader, bool), Unreadable> {
    let [first, second] = HEADER_OFFSETS.map(|at| SegmentHeader::decode(slice_from(bytes, at)));
    match (first, second) {
        (Ok(header), other) => Ok((header, other != Ok(header))),
        (Err(_), Ok(header)) => Ok((header, true)),
        (Err(Invalid::NewerFormat(format)), _) | (_, Err(Invalid::NewerFormat(format))) => {
            Err(Unreadable::NewerFormat(format))
        }
        (Err(_), Err(_)) => Err(Unreadable::HeaderDamaged),
    }
}

fn slice_from(bytes: &[u8], at: u64) -> &[u8] {
    usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default()
}

fn slice(bytes: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(at).ok()?;
    let end = start.checked_add(usize::try_from(len).ok()?)?;
    bytes.get(start..end)
}

/// Whether there is nothing but zeros.
pub fn all_zero(bytes: &[u8]) -> bool {
    // Folding a chunk without an early exit lets the compiler use wide registers.
    bytes.chunks(ZERO_CHUNK_BYTES).all(|chunk| chunk.iter().fold(0, |acc, b| acc | b) == 0)
}

fn rows_end(bytes: &[u8], header: &SegmentHeader) -> u64 {
    let mut table = slice_from(bytes, ROWS_OFFSET).chunks(ROW_BYTES).take(header.rows as usize);
    table.rposition(|row| !all_zero(row)).map(|position| position as u64 + 1).unwrap_or_default()
}

enum Frame {
    Intact(FrameHeader, u32),
    PayloadDamaged(FrameHeader, u32),
    HeaderDamaged,
}

impl Walk<'_> {
    fn position(&self) -> u64 {
        self.entries.len() as u64
    }

    fn index(&self) -> u64 {
        self.header.first_index + self.position()
    }

    fn row(&self, position: u64) -> Result<Row, RowFound> {
        if position >= u64::from(self.header.rows) {
            return Err(RowFound::Absent);
        }
        let at = ROWS_OFFSET + position * ROW_BYTES as u64;
        match Row::decode(slice_from(self.bytes, at), self.header.identity) {
            Ok(row) if row.index == self.header.first_index + position => Ok(row),
            Err(Invalid::Zero) => Err(RowFound::Absent),
            Ok(_) | Err(Invalid::Damaged | Invalid::NewerFormat(_)) => Err(RowFound::Damaged),
        }
    }

    fn row_found(&self, position: u64) -> RowFound {
        match self.row(position) {
            Ok(_) => RowFound::Intact,
            Err(found) => found,
        }
    }

    fn frame(&self) -> Frame {
        let Ok((header, sum)) = FrameHeader::decode(slice_from(self.bytes, self.offset), self.header.identity) else {
            return Frame::HeaderDamaged;
        };
        // A frame of another index, or one that does not continue the chain, was meant for another place.
        if header.index != self.index() || self.chain.is_some_and(|chain| chain != header.previous_crc) {
            return Frame::HeaderDamaged;
        }
        let at = self.offset + FRAME_HEADER_BYTES as u64;
        match slice(self.bytes, at, u64::from(header.payload_bytes)) {
            Some(payload) if payload_crc(payload) == header.payload_crc => Frame::Intact(header, sum),
            _ => Frame::PayloadDamaged(header, sum),
        }
    }

    /// Walks to the end; whether only zeros follow it.
    fn run(&mut self) -> bool {
        loop {
            match self.frame() {
                Frame::Intact(header, sum) => {
                    let located = u32::try_from(self.offset).ok().map(|offset| Located {
                        term: header.term,
                        offset,
                        payload_bytes: header.payload_bytes,
                        payload_crc: header.payload_crc,
                    });
                    self.step(&header, sum, FrameFound::Intact, located);
                }
                Frame::PayloadDamaged(header, sum) => self.step(&header, sum, FrameFound::Damaged, None),
                Frame::HeaderDamaged => match self.row(self.position()) {
                    Ok(row) if u64::from(row.offset) >= self.offset => {
                        let next = u64::from(row.offset) + frame_bytes(row.payload_bytes);
                        self.lost(Some(u64::from(row.offset)), RowFound::Intact);
                        let Row { term, payload_bytes, payload_crc, .. } = row;
                        if let Some(lost) = self.entries.last_mut() {
                            lost.known = Some(Known { term, payload_bytes, payload_crc, kind: None });
                        }
                        self.offset = next;
                    }
                    Ok(_) | Err(_) => match self.anchor() {
                        Some((lost, offset)) => {
                            for _ in 0..lost {
                                let row = self.row_found(self.position());
                                self.lost(None, row);
                            }
                            self.offset = offset;
                        }
                        None => return self.finish(),
                    },
                },
            }
        }
    }

    fn step(&mut self, header: &FrameHeader, sum: u32, frame: FrameFound, located: Option<Located>) {
        let row = self.row_found(self.position());
        self.entries.push(Found {
            index: header.index,
            offset: Some(self.offset),
            frame,
            row,
            located,
            header_crc: Some(sum),
            previous_crc: Some(header.previous_crc),
            known: Some(Known {
                term: header.term,
                payload_bytes: header.payload_bytes,
                payload_crc: header.payload_crc,
                kind: Some(header.kind),
            }),
        });
        // The header verifies, so its promises hold even when the payload does not.
        self.durable_end = self.durable_end.max(header.synced_end);
        self.committed_end = self.committed_end.max(header.committed_end);
        self.offset += frame_bytes(header.payload_bytes);
        self.chain = Some(sum);
    }

    fn lost(&mut self, offset: Option<u64>, row: RowFound) {
        self.entries.push(Found::lost(self.index(), offset, row));
        self.chain = None;
    }

    /// The next place behind the current one where an entry is known to begin: how many entries lie
    /// between, and the offset.
    fn anchor(&self) -> Option<(u64, u64)> {
        let here = self.position();
        // Rows are written in order, group by group; a hole in them is torn or damaged, so look on.
        for position in here + 1..self.rows_end {
            if let Ok(row) = self.row(position)
                && u64::from(row.offset) > self.offset
            {
                return Some((position - here, u64::from(row.offset)));
            }
        }
        let mut at = self.offset + FRAME_ALIGN;
        if all_zero(slice_from(self.bytes, at)) {
            return None;
        }
        while let Some(bytes) = slice(self.bytes, at, FRAME_HEADER_BYTES as u64) {
            if let Ok((header, _)) = FrameHeader::decode(bytes, self.header.identity)
                && header.index > self.index()
            {
                return Some((header.index - self.index(), at));
            }
            at += FRAME_ALIGN;
        }
        None
    }

    /// Nothing more is found. Zeros everywhere are the natural end; anything else is one more entry
    /// of which only traces are left.
    fn finish(&mut self) -> bool {
        if self.position() >= self.rows_end && all_zero(slice_from(self.bytes, self.offset)) {
            return true;
        }
        let row = self.row_found(self.position());
        self.lost(Some(self.offset), row);
        false
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::disallowed_methods)]
mod tests {
    use super::*;
    use crate::frame::row_capacity;

    fn empty(segment_bytes: u64) -> (Vec<u8>, SegmentHeader) {
        let rows = row_capacity(segment_bytes);
        let identity = 77;
        let header =
            SegmentHeader { number: 1, identity, segment_bytes, rows, first_index: 0, previous: None, previous_crc: 0 };
        let mut bytes = vec![0; segment_bytes as usize];
        for at in HEADER_OFFSETS {
            bytes[at as usize..][..header.encode().len()].copy_from_slice(&header.encode());
        }
        (bytes, header)
    }

    #[test]
    fn a_flipped_bit_in_the_last_unused_row_costs_no_minutes() {
        let (mut bytes, header) = empty(64 << 20);
        let last_row = ROWS_OFFSET as usize + (header.rows as usize - 1) * ROW_BYTES;
        bytes[last_row] = 1;
        let start = std::time::Instant::now();
        let scan = scan_segment(&bytes).unwrap();
        // Milliseconds, or minutes when the table is looked through once for each of its rows.
        assert!(start.elapsed() < std::time::Duration::from_secs(15), "{:?}", start.elapsed());
        assert!(!scan.tail_clean);
        assert_eq!((scan.entries.len(), scan.entries[0].row), (1, RowFound::Absent));
    }
}
