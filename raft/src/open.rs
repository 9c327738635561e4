//! Opening a log: look, decide, and make what is kept durable before anybody relies on it.
//!
//! Nothing is written before the decision, so that a refused start leaves the folder as it was.

use std::{collections::VecDeque, io, path::Path, sync::Arc};

use crate::{
    disk::{Disk, DiskFile, FolderLock, read_into},
    error::{Damage, OpenError},
    frame::{HEADER_OFFSETS, ROW_BYTES, ROWS_OFFSET, SegmentHeader, log_id},
    hard_state::{FoundState, HardState},
    index::{Located, LogIndex, SegmentIndex, segment_name, segment_number},
    recovery::{Decision, FrameFound, RowFound, Slot, decide},
    scan::{Found, SegmentScan, Unreadable, scan_segment},
    types::LogId,
};

/// Name of the file that keeps other processes out.
const LOCK_NAME: &str = "lock";
/// Name of the prepared next segment: no part of the log until it is renamed.
pub const SPARE_NAME: &str = "segment.spare";

/// What opening found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Segments read.
    pub segments: usize,
    /// Bytes read.
    pub bytes_read: u64,
    /// Entries in the log.
    pub entries: u64,
    /// Index of the first entry that was cut as never acknowledged.
    pub tail_cut_from: Option<u64>,
    /// Files in the folder that are not the log's; left alone.
    pub unknown_files: Vec<String>,
}

/// A recovered log, ready for its writer.
pub struct Opened {
    /// Keeps the folder.
    pub lock: Box<dyn FolderLock>,
    /// Vote and purge point.
    pub hard: HardState,
    /// Where entries are.
    pub index: LogIndex,
    /// Where the writer goes on; `None`: in a new segment.
    pub tail: Option<Tail>,
    /// Header checksum of the last kept frame; 0 when there is none.
    pub last_crc: u32,
    /// One more than the highest index known committed, at most the log's end.
    pub committed_end: u64,
    /// What was found.
    pub report: RecoveryReport,
}

/// The place in the last segment where the next frame goes.
pub struct Tail {
    /// Its header.
    pub header: SegmentHeader,
    /// Open for writing.
    pub file: Arc<dyn DiskFile>,
    /// Rows used.
    pub rows_used: u32,
    /// Where the next frame begins.
    pub offset: u64,
    /// Sequence of its newest mark.
    pub mark_sequence: u64,
}

struct Scanned {
    number: u64,
    file: Arc<dyn DiskFile>,
    scan: SegmentScan,
}

fn io_at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { operation, path, source }
}

/// Recovers the log of a folder.
pub fn open_log(disk: &dyn Disk, dir: &Path) -> Result<Opened, OpenError> {
    disk.create_dir_all(dir).map_err(io_at("create folder", dir))?;
    let lock = disk.lock(&dir.join(LOCK_NAME)).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => OpenError::Locked(dir.to_owned()),
        _ => io_at("lock", dir)(e),
    })?;
    let mut report = RecoveryReport::default();
    let numbers = list_segments(disk, dir, &mut report)?;
    let hard = match HardState::load(disk, dir).map_err(io_at("read hard state in", dir))? {
        FoundState::Valid(hard) => hard,
        FoundState::Absent if numbers.is_empty() => HardState::default(),
        // A folder's first start saves the hard state before it makes a segment: where there are segments,
        // there was one.
        FoundState::Absent => return Err(lost_hard_state(dir, "is missing")),
        FoundState::Damaged => return Err(lost_hard_state(dir, "is damaged in both copies")),
        FoundState::NewerFormat(format) => return Err(newer("the hard state", format)),
    };
    let mut log = Joined::new(&hard);
    let mut last: Option<Scanned> = None;
    // One buffer for all segments: recovery needs no more memory for a log of many.
    let mut buf = Vec::new();
    for number in numbers {
        let scanned = read_segment(disk, dir, number, &mut buf, &mut report)?;
        log.add(&scanned)?;
        last = Some(scanned);
    }
    drop(buf);
    log.finish(&hard, last.as_ref())?;
    let end = match decide(&log.slots(), log.durable_end) {
        Decision::Keep => log.end(),
        Decision::CutTail { first_cut } => {
            report.tail_cut_from = Some(first_cut);
            first_cut
        }
        Decision::Ask(damage) => return Err(OpenError::Ask(damage)),
        Decision::Repair(damage) => return Err(OpenError::Repair(damage)),
    };
    log.cut(end);
    log.check_live();
    log.check_terms()?;
    // A process that was killed may have left names, or the removal of names, that only the page cache knows.
    disk.sync_dir(dir).map_err(io_at("sync folder", dir))?;
    let tail = match last {
        Some(last) => make_durable(&log, last, report.tail_cut_from.is_some(), dir)?,
        None => None,
    };
    report.segments = log.segments.len();
    let last_crc = log.last_crc();
    let committed_end = log.committed_end.min(log.end());
    let index = LogIndex::recovered(log.segments, hard.purged);
    report.entries = index.end() - index.first();
    Ok(Opened { lock, hard, index, tail, last_crc, committed_end, report })
}

fn lost_hard_state(dir: &Path, what: &str) -> OpenError {
    OpenError::Refuse(format!(
        "the hard state in {} {what}, and no peer can restore this node's vote: the node must come back as a new \
         member with an empty folder (keep this one until then)",
        dir.display()
    ))
}

fn newer(what: &str, format: u32) -> OpenError {
    OpenError::Refuse(format!(
        "{what} has format {format} and this program knows up to {}: start a program that is at least as new",
        crate::frame::FORMAT_VERSION
    ))
}

fn list_segments(disk: &dyn Disk, dir: &Path, report: &mut RecoveryReport) -> Result<Vec<u64>, OpenError> {
    let mut numbers = Vec::new();
    for found in disk.list(dir).map_err(io_at("list", dir))? {
        match segment_number(&found.name) {
            // An empty file carries no meaning: if it should have been a segment, its number is missing.
            Some(number) if found.bytes > 0 => numbers.push(number),
            _ if crate::hard_state::COPY_NAMES.contains(&found.name.as_str()) => {}
            _ if found.name == LOCK_NAME || found.name == SPARE_NAME => {}
            _ => report.unknown_files.push(found.name),
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn read_segment(
    disk: &dyn Disk,
    dir: &Path,
    number: u64,
    buf: &mut Vec<u8>,
    report: &mut RecoveryReport,
) -> Result<Scanned, OpenError> {
    let path = dir.join(segment_name(number));
    let file = disk.open(&path).map_err(io_at("open", &path))?;
    read_into(&*file, buf).map_err(io_at("read", &path))?;
    report.bytes_read += buf.len() as u64;
    let scan = scan_segment(buf).map_err(|e| match e {
        Unreadable::NewerFormat(format) => newer(&path.display().to_string(), format),
        Unreadable::HeaderDamaged => OpenError::Repair(vec![Damage {
            segment: segment_name(number),
            offset: Some(0),
            index: 0,
            what: "both copies of the segment's header are damaged".into(),
        }]),
    })?;
    if scan.header.number != number {
        return Err(OpenError::Refuse(format!(
            "{} says that it is segment {}: give it its name back",
            path.display(),
            scan.header.number
        )));
    }
    Ok(Scanned { number, file, scan })
}

/// An entry as it is kept until the decision: little for each intact one, because there are millions.
enum Joint {
    Intact {
        /// Its frame header's checksum, when the header verifies.
        header_crc: Option<u32>,
    },
    /// With the number of its segment.
    Bad(Box<(Found, u64)>),
}

impl Joint {
    fn new(found: &Found, segment: u64) -> Self {
        match found.frame {
            FrameFound::Intact => Self::Intact { header_crc: found.header_crc },
            FrameFound::Damaged => Self::Bad(Box::new((found.clone(), segment))),
        }
    }

    fn header_crc(&self) -> Option<u32> {
        match self {
            Self::Intact { header_crc } => *header_crc,
            Self::Bad(bad) => bad.0.header_crc,
        }
    }
}

/// The live entries of all segments, joined.
struct Joined {
    purged_end: u64,
    segments: VecDeque<SegmentIndex>,
    /// Entry by entry from the first segment's first index, purged ones included.
    entries: VecDeque<Joint>,
    first: Option<u64>,
    durable_end: u64,
    committed_end: u64,
}

impl Joined {
    fn new(hard: &HardState) -> Self {
        let purged_end = hard.purged.map(|id| id.index() + 1).unwrap_or_default().max(hard.start);
        Self {
            purged_end,
            segments: VecDeque::new(),
            entries: VecDeque::new(),
            first: None,
            durable_end: 0,
            committed_end: 0,
        }
    }

    fn end(&self) -> u64 {
        self.first.map(|f| f + self.entries.len() as u64).unwrap_or_default()
    }

    fn lose(&mut self, upto: u64, segment: u64) {
        while self.end() < upto {
            let index = self.end();
            let lost = Found {
                index,
                offset: None,
                frame: FrameFound::Damaged,
                row: RowFound::Absent,
                located: None,
                header_crc: None,
            };
            self.entries.push_back(Joint::new(&lost, segment));
        }
    }

    fn add(&mut self, scanned: &Scanned) -> Result<(), OpenError> {
        let header = &scanned.scan.header;
        let behind_purge = header.first_index > self.end() && header.first_index <= self.purged_end;
        if self.first.is_none() || behind_purge {
            // Whatever came before was purged: the log begins here.
            self.entries.clear();
            self.first = Some(header.first_index);
        }
        // Entries at and above the header's first index were truncated when this segment was begun.
        let keep = usize::try_from(header.first_index.saturating_sub(self.first.unwrap_or_default()));
        self.entries.truncate(keep.unwrap_or(usize::MAX));
        if self.entries.is_empty() {
            // All that came before is void or purged.
            self.first = Some(header.first_index);
        }
        for segment in &mut self.segments {
            let keep = usize::try_from(header.first_index.saturating_sub(segment.first_index));
            segment.entries.truncate(keep.unwrap_or(usize::MAX));
            segment.first_index = segment.first_index.min(header.first_index);
        }
        self.lose(header.first_index, scanned.number.saturating_sub(1));
        let known = self.entries.back().and_then(Joint::header_crc);
        if header.previous_crc != 0 && known.is_some_and(|crc| crc != header.previous_crc) {
            return Err(OpenError::Refuse(format!(
                "{} does not continue the segment before it: it belongs to another log",
                segment_name(scanned.number)
            )));
        }
        // The header was synced when all below it was durable and nothing of it was above.
        self.durable_end = scanned.scan.durable_end;
        self.committed_end = self.committed_end.max(scanned.scan.committed_end);
        assert_eq!(self.end(), header.first_index, "segment {} does not begin where the log ends", scanned.number);
        self.entries.extend(scanned.scan.entries.iter().map(|found| Joint::new(found, scanned.number)));
        self.segments.push_back(SegmentIndex {
            number: scanned.number,
            identity: header.identity,
            segment_bytes: header.segment_bytes,
            file: Arc::clone(&scanned.file),
            first_index: header.first_index,
            // A damaged entry keeps its position here, without a place to read it from: it is purged, or
            // cut, or the log does not open (see `check_live`).
            entries: scanned.scan.entries.iter().map(|found| found.located.unwrap_or(Located::NOWHERE)).collect(),
        });
        Ok(())
    }

    /// Adds what should be there and is not.
    fn finish(&mut self, hard: &HardState, last: Option<&Scanned>) -> Result<(), OpenError> {
        let newest = self.segments.back().map(|s| s.number).unwrap_or_default();
        if newest < hard.segment_last {
            return Err(OpenError::Repair(vec![Damage {
                segment: segment_name(hard.segment_last),
                offset: None,
                index: self.end(),
                what: format!("segments {} to {} are missing", newest + 1, hard.segment_last),
            }]));
        }
        if let Some(first) = self.first
            && first > self.purged_end
        {
            let missing = format!("entries {} to {} are missing", self.purged_end, first - 1);
            return Err(OpenError::Repair(vec![Damage {
                segment: self.segments.front().map(SegmentIndex::name).unwrap_or_default(),
                offset: None,
                index: self.purged_end,
                what: missing,
            }]));
        }
        self.lose(self.durable_end, newest);
        if let Some(last) = last.filter(|last| last.scan.short_by > 0) {
            // Whatever was cut off may have held an entry of the last group, row and frame and all.
            let index = self.end();
            let (frame, row) = (FrameFound::Damaged, RowFound::Damaged);
            let offset = Some(last.scan.end_offset);
            let lost = Found { index, offset, frame, row, located: None, header_crc: None };
            self.entries.push_back(Joint::new(&lost, newest));
        }
        Ok(())
    }

    /// The entries that are not intact: intact ones are kept whatever their row, and purged ones do not matter.
    fn slots(&self) -> Vec<Slot> {
        let bad = self.entries.iter().filter_map(|entry| match entry {
            Joint::Bad(bad) => Some(&**bad),
            Joint::Intact { .. } => None,
        });
        let slot = |(found, number): &(Found, u64)| Slot {
            index: found.index,
            segment: segment_name(*number),
            offset: found.offset,
            frame: found.frame,
            row: found.row,
        };
        bad.filter(|(found, _)| found.index >= self.purged_end).map(slot).collect()
    }

    fn cut(&mut self, end: u64) {
        let keep = usize::try_from(end.saturating_sub(self.first.unwrap_or_default())).unwrap_or(usize::MAX);
        self.entries.truncate(keep);
        for segment in &mut self.segments {
            let keep = usize::try_from(end.saturating_sub(segment.first_index)).unwrap_or(usize::MAX);
            segment.entries.truncate(keep);
            segment.first_index = segment.first_index.min(end);
        }
    }

    /// What is kept is intact: whatever the decision was, nothing else may pass here.
    fn check_live(&self) {
        for (position, entry) in self.entries.iter().enumerate() {
            let index = self.first.unwrap_or_default() + position as u64;
            let is_intact = matches!(entry, Joint::Intact { .. });
            assert!(index < self.purged_end || is_intact, "entry {index} is kept and cannot be read");
        }
    }

    fn check_terms(&self) -> Result<(), OpenError> {
        let mut last = 0;
        for segment in &self.segments {
            for (index, located) in (segment.first_index..).zip(&segment.entries) {
                if index < self.purged_end {
                    continue;
                }
                let term = located.term;
                if term < last {
                    return Err(OpenError::Refuse(format!(
                        "entry {index} in {} has term {term} behind term {last}: terms never decrease, so this is \
                         not one log",
                        segment.name(),
                    )));
                }
                last = term;
            }
        }
        Ok(())
    }

    fn last_crc(&self) -> u32 {
        self.entries.back().and_then(Joint::header_crc).unwrap_or_default()
    }
}

/// Writes again and syncs what is kept above D in the last segment: after an unclean stop, what the
/// page cache shows may never reach the disk. Returns where to go on, if it can be there.
fn make_durable(log: &Joined, last: Scanned, cut: bool, dir: &Path) -> Result<Option<Tail>, OpenError> {
    let Scanned { number, file, scan } = last;
    let path = dir.join(segment_name(number));
    let header = scan.header;
    let end = log.end();
    let copy = |from: u64, bytes: u64| -> io::Result<()> {
        let mut buf = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        let read = file.read_at(&mut buf, from)?;
        if read < buf.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.write_at(&buf, from)
    };
    let write = || -> io::Result<()> {
        for at in HEADER_OFFSETS {
            file.write_at(&header.encode(), at)?;
        }
        let unsynced = |f: &&Found| f.index >= log.durable_end && f.index < end && f.frame == FrameFound::Intact;
        let first = scan.entries.iter().find(unsynced).and_then(|f| f.offset);
        if let Some(first) = first {
            copy(first, end_offset_of(&scan, end).saturating_sub(first))?;
        }
        let used = end.saturating_sub(header.first_index).min(scan.entries.len() as u64);
        if used > 0 {
            for (position, found) in scan.entries.iter().take(usize::try_from(used).unwrap_or(usize::MAX)).enumerate() {
                // A row that the power cut lost is written anew from its intact frame.
                if found.row != RowFound::Intact
                    && let (Some(located), Some(_)) = (found.located, found.offset)
                {
                    let at = ROWS_OFFSET + (position * ROW_BYTES) as u64;
                    file.write_at(&row_of(found.index, &located).encode(header.identity), at)?;
                }
            }
            let unsynced_rows = used.saturating_sub(log.durable_end.saturating_sub(header.first_index));
            copy(ROWS_OFFSET + (used - unsynced_rows) * ROW_BYTES as u64, unsynced_rows * ROW_BYTES as u64)?;
        }
        file.sync_data()
    };
    write().map_err(io_at("make durable", &path))?;
    let clean = scan.tail_clean && !cut && end == header.first_index + scan.entries.len() as u64;
    let rows_used = u32::try_from(scan.entries.len()).unwrap_or(u32::MAX);
    if !clean || end < log.purged_end || rows_used >= header.rows {
        return Ok(None);
    }
    Ok(Some(Tail { header, file, rows_used, offset: scan.end_offset, mark_sequence: scan.mark_sequence }))
}

fn end_offset_of(scan: &SegmentScan, end: u64) -> u64 {
    let next = scan.entries.iter().find(|f| f.index >= end).and_then(|f| f.offset);
    next.unwrap_or(scan.end_offset)
}

/// The row of an entry.
pub fn row_of(index: u64, located: &Located) -> crate::frame::Row {
    crate::frame::Row {
        index,
        term: located.term,
        offset: located.offset,
        payload_bytes: located.payload_bytes,
        payload_crc: located.payload_crc,
    }
}

/// The id of the entry below `end`, for the header of a segment that begins there; `None` at the
/// log's very beginning.
pub fn previous_of(index: &LogIndex, end: u64) -> Option<LogId> {
    let previous = end.checked_sub(1)?;
    index.log_id_at(previous).map(|id| log_id(crate::frame::term_of(&id), id.index()))
}
