//! Opening a log: look, decide, and make what is kept durable before anybody relies on it.
//!
//! Nothing is written before the decision, so that a refused start leaves the folder as it was. What the page cache
//! shows of the last segment and of the hard state is not believed: after a sync that failed it shows what the device
//! never got, and would show something else once it is evicted.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use crate::{
    disk::{Disk, DiskFile, FolderLock},
    error::{Damage, OpenError},
    fail_point,
    frame::{BLOCK_BYTES, HEADER_BYTES, HEADER_OFFSETS, ROW_BYTES, ROWS_OFFSET, SegmentHeader, log_id, row_capacity},
    hard_state::{FoundState, HardState},
    index::{Located, LogIndex, segment_name, segment_number},
    joined::{Joined, Scanned, Trouble},
    options::WalOptions,
    patch::{Patch, read_blocks, stale_blocks},
    recovery::{FrameFound, Lacking, RowFound, lacking},
    repair::LostLog,
    scan::{Found, SegmentScan, Unreadable, scan_segment},
    types::LogId,
};

/// Name of the file that keeps other processes out.
pub const LOCK_NAME: &str = "lock";
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
    /// Index of the first entry that was cut: never acknowledged, or given up by an operator.
    pub tail_cut_from: Option<u64>,
    /// Entries that were fetched from peers and written again.
    pub repaired: Vec<u64>,
    /// Blocks of which the page cache showed what the device never got.
    pub stale_blocks: u64,
    /// Blocks that could not be read.
    pub unreadable_blocks: u64,
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

/// A log as it was found; nothing has been written.
pub struct Looked {
    /// Vote and purge point.
    pub hard: HardState,
    /// All segments.
    pub log: Joined,
    /// The last one.
    pub last: Option<Scanned>,
    /// What it lacks.
    pub lacking: Lacking,
    /// So far.
    pub report: RecoveryReport,
    /// Numbers of files that are no segments, and why: they are in the way of new ones of that number.
    pub useless: Vec<(u64, String)>,
}

/// Gives a file that is no segment another name; it is kept.
pub fn set_aside(disk: &dyn Disk, dir: &Path, number: u64) -> io::Result<()> {
    let taken: Vec<String> = disk.list(dir)?.into_iter().map(|f| f.name).collect();
    let name = segment_name(number);
    let mut aside = format!("{name}.corrupted");
    while taken.contains(&aside) {
        aside.push_str("-again");
    }
    disk.rename(&dir.join(name), &dir.join(aside))?;
    disk.sync_dir(dir)
}

fn io_at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { operation, path, source }
}

/// Takes the folder for this process.
pub fn lock_folder(disk: &dyn Disk, dir: &Path) -> Result<Box<dyn FolderLock>, OpenError> {
    disk.create_dir_all(dir).map_err(io_at("create folder", dir))?;
    disk.lock(&dir.join(LOCK_NAME)).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => OpenError::Locked(dir.to_owned()),
        _ => io_at("lock", dir)(e),
    })
}

/// Reads the log of a folder and says what it lacks. Writes nothing.
pub fn look(disk: &dyn Disk, options: &WalOptions) -> Result<Looked, Trouble> {
    let dir = &options.dir;
    let mut report = RecoveryReport::default();
    let numbers = list_segments(disk, dir, &mut report)?;
    let hard = match HardState::load(disk, dir).map_err(io_at("read hard state in", dir))? {
        FoundState::Valid(hard) => hard,
        FoundState::Absent if numbers.is_empty() => HardState::default(),
        // A folder's first start saves the hard state before it makes a segment: where there are segments,
        // there was one.
        FoundState::Absent => return Err(lost_hard_state(dir, "is missing")),
        FoundState::Damaged => return Err(lost_hard_state(dir, "is damaged in both copies")),
        FoundState::NewerFormat(format) => return Err(newer("the hard state", format).into()),
    };
    let mut log = Joined::new(&hard, u64::from(row_capacity(options.segment_bytes)));
    let mut last: Option<Scanned> = None;
    let mut useless = Vec::new();
    // One buffer for all segments: recovery needs no more memory for a log of many.
    let mut buf = Vec::new();
    let newest = newest_segment(disk, dir, &numbers)?;
    for number in numbers {
        match read_segment(disk, dir, number, Some(number) >= newest, &mut buf, &mut report)? {
            Ok(scanned) => {
                log.add(&scanned)?;
                last = Some(scanned);
            }
            Err(why) => {
                tracing::warn!(segment = segment_name(number), why, "a file in the WAL is no segment that can be used");
                report.unknown_files.push(segment_name(number));
                useless.push((number, why));
            }
        }
    }
    drop(buf);
    if let Err(trouble) = log.finish(&hard, last.as_ref()) {
        return Err(match trouble {
            Trouble::Lost(mut lost) => {
                let found = useless.iter().map(|(number, why)| Damage {
                    segment: segment_name(*number),
                    offset: Some(0),
                    index: log.end(),
                    what: why.clone(),
                });
                lost.damage = found.chain(lost.damage).collect();
                Trouble::Lost(lost)
            }
            other => other,
        });
    }
    let lacking = lacking(&log.slots(), log.durable_end);
    fail_point::own("recovery.looked");
    Ok(Looked { hard, log, last, lacking, report, useless })
}

/// Makes what is kept durable. `end`: one more than the last entry that is kept.
pub fn finish(
    disk: &dyn Disk,
    dir: &Path,
    lock: Box<dyn FolderLock>,
    looked: Looked,
    end: u64,
) -> Result<Opened, Trouble> {
    let Looked { hard, mut log, last, mut report, useless, .. } = looked;
    for (number, _) in useless.into_iter().filter(|(n, _)| last.as_ref().is_none_or(|last| *n > last.number)) {
        // The next segment takes its name.
        set_aside(disk, dir, number).map_err(io_at("set aside a useless segment in", dir))?;
        fail_point::own("recovery.set_aside");
    }
    if end < log.end() {
        report.tail_cut_from = Some(end);
    }
    log.cut(end);
    log.check_live();
    log.check_terms()?;
    // A process that was killed may have left names, or the removal of names, that only the page cache knows.
    disk.sync_dir(dir).map_err(io_at("sync folder", dir))?;
    fail_point::own("recovery.folder_synced");
    let tail = match last {
        Some(last) => make_durable(&log, last, report.tail_cut_from.is_some(), dir)?,
        None => None,
    };
    fail_point::own("recovery.durable");
    report.segments = log.segments.len();
    let last_crc = log.last_crc();
    let committed_end = log.committed_end.min(log.end());
    let index = LogIndex::recovered(log.segments, hard.purged);
    report.entries = index.end() - index.first();
    Ok(Opened { lock, hard, index, tail, last_crc, committed_end, report })
}

fn lost_hard_state(dir: &Path, what: &str) -> Trouble {
    let why = format!(
        "the hard state in {} {what}, and no peer can restore this node's vote: the node must come back as a new \
         member with an empty folder (keep this one until then)",
        dir.display()
    );
    Trouble::Lost(LostLog { why, damage: vec![] })
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

/// The newest file that is a segment. Others may lie behind it, and must not make it count as one that was sealed: of
/// those the page cache is believed.
fn newest_segment(disk: &dyn Disk, dir: &Path, numbers: &[u64]) -> Result<Option<u64>, OpenError> {
    for number in numbers.iter().rev() {
        let path = dir.join(segment_name(*number));
        let file = disk.open(&path).map_err(io_at("open", &path))?;
        let mut bytes = [0; HEADER_BYTES];
        for at in HEADER_OFFSETS {
            // What cannot be read is looked at closely later.
            let read = file.read_at(&mut bytes, at).unwrap_or_default();
            let header = SegmentHeader::decode(bytes.get(..read).unwrap_or_default());
            if header.is_ok_and(|header| header.number == *number) {
                return Ok(Some(*number));
            }
        }
    }
    Ok(numbers.last().copied())
}

/// A segment, or why its file is none.
fn read_segment(
    disk: &dyn Disk,
    dir: &Path,
    number: u64,
    is_newest: bool,
    buf: &mut Vec<u8>,
    report: &mut RecoveryReport,
) -> Result<Result<Scanned, String>, OpenError> {
    let path = dir.join(segment_name(number));
    let file = disk.open(&path).map_err(io_at("open", &path))?;
    let unreadable = read_blocks(&*file, buf, is_newest).map_err(io_at("read", &path))?.unreadable;
    report.bytes_read += buf.len() as u64;
    report.unreadable_blocks += unreadable.len() as u64;
    // Older segments were durable before the next one was begun.
    let stale = match is_newest {
        true => stale_blocks(&*file, buf).map_err(io_at("read", &path))?,
        false => BTreeMap::new(),
    };
    report.stale_blocks += stale.len() as u64;
    let scan = match scan_segment(buf) {
        Ok(scan) => scan,
        Err(Unreadable::NewerFormat(format)) => return Err(newer(&path.display().to_string(), format)),
        Err(Unreadable::HeaderDamaged) => return Ok(Err("both copies of its header are damaged".into())),
    };
    if scan.header.number != number {
        return Ok(Err(format!("it says that it is segment {}", scan.header.number)));
    }
    Ok(Ok(Scanned { number, file, scan, unreadable, stale }))
}

/// Writes again and syncs what is kept above D in the last segment: after an unclean stop, what the
/// page cache shows may never reach the disk. Returns where to go on, if it can be there.
fn make_durable(log: &Joined, last: Scanned, cut: bool, dir: &Path) -> Result<Option<Tail>, OpenError> {
    let Scanned { number, file, scan, unreadable, stale } = last;
    let path = dir.join(segment_name(number));
    let header = scan.header;
    let end = log.end();
    let mut patch = Patch::new(Arc::clone(&file), &stale);
    let mut fill = || -> io::Result<()> {
        for at in HEADER_OFFSETS {
            if unreadable.contains(&(at / BLOCK_BYTES as u64)) {
                patch.clear_block(at / BLOCK_BYTES as u64);
            }
            patch.put(at, &header.encode())?;
        }
        let unsynced = |f: &&Found| f.index >= log.durable_end && f.index < end && f.frame == FrameFound::Intact;
        let first = scan.entries.iter().find(unsynced).and_then(|f| f.offset);
        if let Some(first) = first {
            patch.touch(first, end_offset_of(&scan, end).saturating_sub(first))?;
        }
        for (found, at) in scan.entries.iter().filter(|f| f.index < end).zip((ROWS_OFFSET..).step_by(ROW_BYTES)) {
            let block = at / BLOCK_BYTES as u64;
            if unreadable.contains(&block) {
                continue;
            }
            // A row that the power cut lost is written anew from its intact frame.
            match found.located {
                Some(located) if found.row != RowFound::Intact => {
                    patch.put(at, &row_of(found.index, &located).encode(header.identity))?;
                }
                _ if found.index >= log.durable_end => patch.touch(at, ROW_BYTES as u64)?,
                _ => {}
            }
        }
        Ok(())
    };
    fill().and_then(|()| patch.write()).map_err(io_at("make durable", &path))?;
    let clean = scan.tail_clean && !cut && end == header.first_index + scan.entries.len() as u64;
    let rows_used = u32::try_from(scan.entries.len()).unwrap_or(u32::MAX);
    if !clean || end < log.purged_end || rows_used >= header.rows || !unreadable.is_empty() || scan.short_by > 0 {
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
