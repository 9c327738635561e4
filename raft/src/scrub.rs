//! Looking for damage in sealed segments before somebody needs them.
//!
//! Reads past the page cache, in pieces and at the caller's pace. Damage of a frame or a row is repaired by
//! [`crate::WalHandle::repair_entry`], of a copy of the header by [`crate::WalHandle::repair_header`].

use std::{collections::BTreeSet, ops::ControlFlow, sync::Arc};

use bytes::{Bytes, BytesMut};

use crate::{
    disk::DiskFile,
    error::Damage,
    frame::{HEADER_BYTES, HEADER_OFFSETS, ROW_BYTES, ROWS_OFFSET, Row, SegmentHeader, frame_bytes},
    index::{LogIndex, OnDisk, segment_name},
    io_times::Waits,
    open::row_of,
    reader::verify,
    shared::Shared,
};

/// A piece of the segment that is read at once, unless a frame is larger.
const PIECE_BYTES: u64 = 256 << 10;

/// A segment that is not written any more, except to repair it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedSegment {
    /// NNN of its name.
    pub number: u64,
    /// File name.
    pub name: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Index of its first live entry.
    pub first_index: u64,
    /// One more than the index of its last live entry.
    pub end_index: u64,
}

/// What was found in a segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SegmentCheck {
    /// Live entries that were looked at.
    pub entries: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// All that is not as it was written, in the order of offsets within frames, rows and header. Empty: intact.
    pub damage: Vec<Damage>,
    /// Copies of the header that are damaged: 0, 1, or 2.
    pub header_copies_damaged: usize,
    /// The segment was looked at to its end: nobody broke it off, and it was not purged or truncated meanwhile.
    pub complete: bool,
}

impl SegmentCheck {
    /// Indexes of the entries whose frame or row is damaged, ascending.
    pub fn damaged_entries(&self) -> BTreeSet<u64> {
        let of_a_header = |damage: &&Damage| damage.offset.is_some_and(|at| HEADER_OFFSETS.contains(&at));
        self.damage.iter().filter(|damage| !of_a_header(damage)).map(|damage| damage.index).collect()
    }
}

/// Told after each piece how many bytes were read: it may pause there, or break the check off.
pub type Pacer<'a> = dyn FnMut(u64) -> ControlFlow<()> + 'a;

pub(crate) fn sealed_segments(index: &LogIndex) -> Vec<SealedSegment> {
    let purged_end = index.purged.as_ref().map(|id| id.index() + 1).unwrap_or_default();
    let sealed = index.segments.iter().take(index.segments.len().saturating_sub(1));
    let describe = |s: &crate::index::SegmentIndex| SealedSegment {
        number: s.number,
        name: s.name(),
        bytes: s.header.segment_bytes,
        first_index: s.first_index.max(purged_end),
        end_index: s.end(),
    };
    sealed.map(describe).filter(|s| s.first_index < s.end_index).collect()
}

/// Verifies a sealed segment: both copies of its header, then frame by frame with its row. `None`: it is not sealed
/// or not there.
pub(crate) fn verify_segment(shared: &Arc<Shared>, number: u64, pace: &mut Pacer<'_>) -> Option<SegmentCheck> {
    let (file, header, live) = shared.index().sealed(number)?;
    let mut check = SegmentCheck::default();
    header_copies(shared, &*file, &header, live.first(), &mut check);
    check.complete = run(shared, &live, header.first_index, &mut check, pace).is_continue();
    // What was purged or truncated meanwhile may be gone from the disk too, and that is no damage.
    let still_there: Vec<u64> = match shared.index().sealed(number) {
        Some((_, _, now)) => now.iter().map(|on_disk| on_disk.index).collect(),
        None => Vec::new(),
    };
    check.complete &= still_there.len() == live.len();
    check.damage.retain(|damage| still_there.binary_search(&damage.index).is_ok());
    Some(check)
}

/// Looks at both copies of the header.
fn header_copies(
    shared: &Shared,
    file: &dyn DiskFile,
    expected: &SegmentHeader,
    first: Option<&OnDisk>,
    check: &mut SegmentCheck,
) {
    let number = expected.number;
    for at in HEADER_OFFSETS {
        let found = read(shared, file, number, at, HEADER_BYTES as u64, check).ok();
        if found.and_then(|bytes| SegmentHeader::decode(&bytes).ok()) != Some(*expected) {
            check.header_copies_damaged += 1;
            check.damage.push(Damage {
                segment: segment_name(number),
                offset: Some(at),
                index: first.map(|on_disk| on_disk.index).unwrap_or_default(),
                what: "a copy of the segment's header is damaged".into(),
            });
        }
    }
}

fn read(
    shared: &Shared,
    file: &dyn DiskFile,
    number: u64,
    at: u64,
    bytes: u64,
    check: &mut SegmentCheck,
) -> Result<Bytes, String> {
    let mut buf = BytesMut::zeroed(usize::try_from(bytes).map_err(|e| e.to_string())?);
    // Nobody waits for a scrubber.
    let _seen = shared.io_times.enter("read", &segment_name(number), Waits::Nobody);
    let read = file.read_uncached_at(&mut buf, at).map_err(|error| format!("it cannot be read: {error}"))?;
    check.bytes_read += read as u64;
    buf.truncate(read);
    Ok(buf.freeze())
}

fn run(
    shared: &Shared,
    live: &[OnDisk],
    first_index: u64,
    check: &mut SegmentCheck,
    pace: &mut Pacer<'_>,
) -> ControlFlow<()> {
    let mut rest = live;
    while let Some(first) = rest.first() {
        let start = u64::from(first.located.offset);
        let end_of = |on_disk: &OnDisk| u64::from(on_disk.located.offset) + frame_bytes(on_disk.located.payload_bytes);
        let fits = rest.iter().take_while(|on_disk| end_of(on_disk) - start <= PIECE_BYTES).count().max(1);
        let (piece, behind) = rest.split_at(fits);
        rest = behind;
        let before = check.bytes_read;
        frames(shared, piece, start, piece.last().map(end_of).unwrap_or(start), check);
        rows(shared, piece, first_index, check);
        check.entries += piece.len() as u64;
        pace(check.bytes_read - before)?;
    }
    ControlFlow::Continue(())
}

fn frames(shared: &Shared, piece: &[OnDisk], start: u64, end: u64, check: &mut SegmentCheck) {
    let Some(first) = piece.first() else { return };
    let number = crate::index::segment_number(&first.segment).unwrap_or_default();
    let bytes = match read(shared, &*first.file, number, start, end - start, check) {
        Ok(bytes) => bytes,
        Err(what) if piece.len() == 1 => return check.damage.push(damaged(first, what)),
        Err(_) => {
            // One of them cannot be read: which?
            for one in piece {
                let at = u64::from(one.located.offset);
                frames(shared, std::slice::from_ref(one), at, at + frame_bytes(one.located.payload_bytes), check);
            }
            return;
        }
    };
    for on_disk in piece {
        let at = usize::try_from(u64::from(on_disk.located.offset) - start).unwrap_or(usize::MAX);
        if let Err(what) = verify(on_disk, &bytes.slice(at.min(bytes.len())..)) {
            check.damage.push(damaged(on_disk, what));
        }
    }
}

fn rows(shared: &Shared, piece: &[OnDisk], first_index: u64, check: &mut SegmentCheck) {
    let Some(first) = piece.first() else { return };
    let number = crate::index::segment_number(&first.segment).unwrap_or_default();
    let at = ROWS_OFFSET + first.index.saturating_sub(first_index) * ROW_BYTES as u64;
    let found = read(shared, &*first.file, number, at, (piece.len() * ROW_BYTES) as u64, check).unwrap_or_default();
    for (position, on_disk) in piece.iter().enumerate() {
        let bytes = found.get(position * ROW_BYTES..).unwrap_or_default();
        if Row::decode(bytes, on_disk.identity) != Ok(row_of(on_disk.index, &on_disk.located)) {
            let mut damage = damaged(on_disk, "its row is damaged".into());
            damage.offset = Some(at + (position * ROW_BYTES) as u64);
            check.damage.push(damage);
        }
    }
}

fn damaged(on_disk: &OnDisk, what: String) -> Damage {
    Damage {
        segment: on_disk.segment.clone(),
        offset: Some(u64::from(on_disk.located.offset)),
        index: on_disk.index,
        what,
    }
}
