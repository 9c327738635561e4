//! Writes fetched entries where they were: into their places, or, where a whole segment is gone, into a new one.
//!
//! A frame that is written again keeps what the frame behind it carries on, so that nothing else of the segment
//! changes. Frames and rows go first, with one sync; a tool's cut record is taken away only after that.

use std::{collections::BTreeMap, io, sync::Arc};

use crate::{
    disk::Disk,
    fail_point,
    frame::{
        BLOCK_BYTES, CUT_BYTES, CUT_OFFSETS, EntryKind, FRAME_HEADER_BYTES, FrameHeader, HEADER_OFFSETS, ROW_BYTES,
        ROWS_OFFSET, SegmentHeader, data_offset, frame_bytes, log_id, payload_crc,
    },
    index::{Located, segment_name},
    joined::Joined,
    open::{Looked, row_of, set_aside},
    options::WalOptions,
    patch::{Patch, place_file},
    recovery::{FrameFound, RowFound},
    repair::EntryCopy,
};

/// Name under which a segment is made anew; it carries no meaning.
const NEW_NAME: &str = "segment.repair.tmp";

/// What was done.
pub enum Mended {
    /// Frames were written in their places, and the log in memory knows it.
    InPlace,
    /// Segments were made: the folder must be looked at again.
    NewSegments,
}

/// One frame to be written.
struct Place<'a> {
    copy: &'a EntryCopy,
    kind: EntryKind,
    owner: usize,
    located: Located,
}

/// Neighbouring entries that are missing together.
struct Run<'a> {
    owner: Option<usize>,
    copies: Vec<&'a EntryCopy>,
}

/// Writes the fetched entries, all below `end`.
pub fn mend(
    disk: &dyn Disk,
    options: &WalOptions,
    looked: &mut Looked,
    fetched: &BTreeMap<u64, EntryCopy>,
    end: u64,
) -> io::Result<Mended> {
    let mut places = Vec::new();
    let mut homeless = Vec::new();
    for run in runs(&looked.log, fetched) {
        match place_run(&looked.log, &run, end) {
            Some(placed) => places.extend(placed),
            None => homeless.push(run),
        }
    }
    write_places(looked, &places)?;
    if homeless.is_empty() {
        return Ok(Mended::InPlace);
    }
    for run in homeless {
        make_segment(disk, options, looked, &run)?;
        fail_point::own("repair.segment_made");
    }
    Ok(Mended::NewSegments)
}

fn runs<'a>(log: &Joined, fetched: &'a BTreeMap<u64, EntryCopy>) -> Vec<Run<'a>> {
    let mut runs: Vec<Run<'a>> = Vec::new();
    for (index, copy) in fetched {
        let owner = log.owner(*index);
        match runs.last_mut() {
            Some(run) if run.owner == owner && run.copies.last().is_some_and(|last| last.index + 1 == *index) => {
                run.copies.push(copy);
            }
            _ => runs.push(Run { owner, copies: vec![copy] }),
        }
    }
    runs
}

fn located_of(copy: &EntryCopy, offset: u64) -> Option<Located> {
    Some(Located {
        term: copy.term,
        offset: u32::try_from(offset).ok()?,
        payload_bytes: u32::try_from(copy.payload.len()).ok()?,
        payload_crc: payload_crc(&copy.payload),
    })
}

fn end_of(located: &Located) -> u64 {
    u64::from(located.offset) + frame_bytes(located.payload_bytes)
}

/// Where the entries of a run go in their segment; `None`: they do not fit, so they were in another.
fn place_run<'a>(log: &Joined, run: &Run<'a>, end: u64) -> Option<Vec<Place<'a>>> {
    let owner = run.owner?;
    let detail = log.details.get(owner)?;
    let first = run.copies.first()?;
    let mut at = match first.index.checked_sub(1).filter(|previous| *previous >= detail.header.first_index) {
        Some(previous) => log.located(previous).map(|(_, located)| end_of(&located)),
        None => Some(data_offset(detail.header.rows)),
    };
    let mut placed = Vec::new();
    for copy in &run.copies {
        let known = log.bad(copy.index).and_then(|bad| bad.found.known.and(bad.found.offset));
        let offset = known.or(at)?;
        if at.is_some_and(|at| at > offset) {
            return None;
        }
        let located = located_of(copy, offset)?;
        let position = copy.index - detail.header.first_index;
        if position >= u64::from(detail.header.rows) || end_of(&located) > detail.header.segment_bytes {
            return None;
        }
        at = Some(end_of(&located));
        placed.push(Place { copy, kind: copy.kind()?, owner, located });
    }
    // What comes next here must not be overwritten, and must be where these end.
    let last = run.copies.last()?;
    let next = log.located(last.index + 1).filter(|(s, _)| s.number == log.segments.get(owner).map_or(0, |o| o.number));
    match next {
        Some((_, located)) if last.index + 1 < end => (at == Some(u64::from(located.offset))).then_some(placed),
        _ => Some(placed),
    }
}

/// What the frame at `index` must carry on of the one before it.
fn previous_crc(log: &Joined, header: &SegmentHeader, index: u64, links: &BTreeMap<u64, u32>) -> u32 {
    if index == header.first_index {
        return header.previous_crc;
    }
    let previous = index - 1;
    links.get(&previous).copied().or_else(|| log.header_crc(previous)).unwrap_or_default()
}

fn header_of(copy: &EntryCopy, kind: EntryKind, previous_crc: u32) -> FrameHeader {
    FrameHeader {
        kind,
        payload_bytes: u32::try_from(copy.payload.len()).unwrap_or(u32::MAX),
        previous_crc,
        term: copy.term,
        index: copy.index,
        synced_end: 0,
        committed_end: 0,
        payload_crc: payload_crc(&copy.payload),
    }
}

/// A frame's bytes, and what the next one carries on of it.
fn frame_of(header: &FrameHeader, copy: &EntryCopy, link: Option<u32>, identity: u64) -> (Vec<u8>, u32) {
    let link = link.unwrap_or_else(|| header.encode(identity).1);
    let mut bytes = header.encode_repaired(link, identity).to_vec();
    bytes.extend_from_slice(&copy.payload);
    bytes.resize(bytes.len().next_multiple_of(crate::frame::FRAME_ALIGN as usize), 0);
    (bytes, link)
}

fn write_places(looked: &mut Looked, places: &[Place<'_>]) -> io::Result<()> {
    let mut links: BTreeMap<u64, u32> = BTreeMap::new();
    let mut patches: BTreeMap<usize, Patch> = BTreeMap::new();
    for place in places {
        let log = &looked.log;
        let (Some(segment), Some(detail)) = (log.segments.get(place.owner), log.details.get(place.owner)) else {
            continue;
        };
        let patch = match patches.entry(place.owner) {
            std::collections::btree_map::Entry::Occupied(patch) => patch.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                let patch = Patch::new(Arc::clone(&segment.file), &detail.stale);
                new.insert(whole_blocks(log, place.owner, patch)?)
            }
        };
        let index = place.copy.index;
        let bad = log.bad(index);
        let offset = u64::from(place.located.offset);
        match bad.and_then(|bad| bad.found.header_crc) {
            // Only the payload is damaged, and the header keeps its marks.
            Some(link) if !detail.unreadable.contains(&(offset / BLOCK_BYTES as u64)) => {
                patch.put(offset + FRAME_HEADER_BYTES as u64, &place.copy.payload)?;
                links.insert(index, link);
            }
            header_crc => {
                let header = header_of(place.copy, place.kind, previous_crc(log, &detail.header, index, &links));
                let link = header_crc.or(bad.and_then(|bad| bad.link));
                let (bytes, link) = frame_of(&header, place.copy, link, segment.identity);
                patch.put(offset, &bytes)?;
                links.insert(index, link);
            }
        }
        let row_at = ROWS_OFFSET + (index - detail.header.first_index) * ROW_BYTES as u64;
        patch.put(row_at, &row_of(index, &place.located).encode(segment.identity))?;
    }
    for (owner, patch) in &patches {
        patch.write()?;
        fail_point::own("repair.places_written");
        patch.verify()?;
        fail_point::own("repair.places_verified");
        let Some(detail) = looked.log.details.get_mut(*owner) else { continue };
        detail.stale.clear();
        detail.unreadable.clear();
        if detail.cut.take().is_some() {
            let file = looked.log.segments.get(*owner).map(|s| Arc::clone(&s.file));
            let Some(file) = file else { continue };
            let mut spent = Patch::new(file, &BTreeMap::new());
            for at in CUT_OFFSETS {
                spent.put(at, &[0; CUT_BYTES])?;
            }
            spent.write()?;
        }
    }
    for place in places {
        let link = links.get(&place.copy.index).copied().unwrap_or_default();
        looked.log.mended(place.copy.index, place.owner, place.located, link, place.kind);
        let number = looked.log.segments.get(place.owner).map(|s| s.number);
        if let Some(last) = looked.last.as_mut().filter(|last| Some(last.number) == number) {
            // The opener makes the last segment durable by what was found in it.
            let found = last.scan.entries.iter_mut().find(|found| found.index == place.copy.index);
            if let Some(found) = found {
                found.frame = FrameFound::Intact;
                found.row = RowFound::Intact;
                found.located = Some(place.located);
                found.offset = Some(u64::from(place.located.offset));
                found.header_crc = Some(link);
            }
            last.stale.clear();
        }
    }
    Ok(())
}

/// Blocks that cannot be read are written in full: what was in them is in `places`, or a row of an intact entry, or a
/// header.
fn whole_blocks(log: &Joined, owner: usize, mut patch: Patch) -> io::Result<Patch> {
    let (Some(segment), Some(detail)) = (log.segments.get(owner), log.details.get(owner)) else { return Ok(patch) };
    for block in &detail.unreadable {
        patch.clear_block(*block);
        if HEADER_OFFSETS.contains(&(block * BLOCK_BYTES as u64)) {
            patch.put(block * BLOCK_BYTES as u64, &detail.header.encode())?;
        }
    }
    let is_lost = |at: u64| detail.unreadable.contains(&(at / BLOCK_BYTES as u64));
    for (index, located) in (segment.first_index..).zip(&segment.entries) {
        let at = ROWS_OFFSET + (index - detail.header.first_index) * ROW_BYTES as u64;
        if is_lost(at) && *located != Located::NOWHERE {
            patch.put(at, &row_of(index, located).encode(segment.identity))?;
        }
    }
    Ok(patch)
}

/// Makes a segment of entries whose own one is gone, under a number between its neighbours'.
fn make_segment(disk: &dyn Disk, options: &WalOptions, looked: &Looked, run: &Run<'_>) -> io::Result<()> {
    let log = &looked.log;
    let (Some(first), Some(last)) = (run.copies.first(), run.copies.last()) else { return Ok(()) };
    let number_of = |at: usize| log.segments.get(at).map(|s| s.number);
    let next = run.owner.map_or(Some(0), |owner| Some(owner + 1)).and_then(number_of);
    let number = match (run.owner.and_then(number_of), next) {
        (Some(before), _) => before + 1,
        (None, Some(next)) => next.saturating_sub(1),
        (None, None) => 1,
    };
    if number == 0 || next == Some(number) {
        return Err(io::Error::other(format!("entries {} to {} fit into no segment", first.index, last.index)));
    }
    if log.owner(last.index + 1) == run.owner && run.owner.is_some() && log.located(last.index + 1).is_some() {
        return Err(io::Error::other(format!("entries {} to {} do not fit into their place", first.index, last.index)));
    }
    let rows = u32::try_from(run.copies.len()).map_err(io::Error::other)?;
    let frames: u64 = run.copies.iter().map(|c| frame_bytes(u32::try_from(c.payload.len()).unwrap_or(u32::MAX))).sum();
    let previous = first.index.checked_sub(1);
    let known_previous = previous.and_then(|previous| {
        let purged = looked.hard.purged.filter(|id| id.index() == previous);
        purged.or_else(|| Some(log_id(log.known(previous)?.term, previous)))
    });
    let header = SegmentHeader {
        number,
        identity: (options.identities)(),
        segment_bytes: (data_offset(rows) + frames).next_multiple_of(BLOCK_BYTES as u64),
        rows,
        first_index: first.index,
        previous: known_previous,
        previous_crc: previous.and_then(|previous| log.header_crc(previous)).unwrap_or_default(),
    };
    let mut bytes = vec![0; usize::try_from(header.segment_bytes).map_err(io::Error::other)?];
    let mut put = |at: u64, from: &[u8]| {
        let start = usize::try_from(at).unwrap_or(usize::MAX);
        match bytes.get_mut(start..start.saturating_add(from.len())) {
            Some(to) => {
                to.copy_from_slice(from);
                Ok(())
            }
            None => Err(io::Error::other("a made segment is too short")),
        }
    };
    for at in HEADER_OFFSETS {
        put(at, &header.encode())?;
    }
    let mut offset = data_offset(rows);
    let mut links = BTreeMap::new();
    for (copy, row_at) in run.copies.iter().zip((ROWS_OFFSET..).step_by(ROW_BYTES)) {
        let kind = copy.kind().ok_or_else(|| io::Error::other("an entry of an unknown kind"))?;
        let located = located_of(copy, offset).ok_or_else(|| io::Error::other("an entry is too large"))?;
        let frame = header_of(copy, kind, previous_crc(log, &header, copy.index, &links));
        let link = log.bad(copy.index).and_then(|bad| bad.link);
        let (frame, link) = frame_of(&frame, copy, link, header.identity);
        links.insert(copy.index, link);
        put(offset, &frame)?;
        put(row_at, &row_of(copy.index, &located).encode(header.identity))?;
        offset += frame.len() as u64;
    }
    if looked.useless.iter().any(|(useless, _)| *useless == number) {
        set_aside(disk, &options.dir, number)?;
    }
    place_file(disk, &options.dir.join(NEW_NAME), &options.dir.join(segment_name(number)), &bytes)
}
