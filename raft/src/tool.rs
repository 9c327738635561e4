//! What the tools for single segments do: verify, dump, cut. They read a file and write another one, never the same.
//!
//! Called by `stemedb-wal-verify`, `stemedb-wal-repair` and `stemedb wal …`. A cut is the last resort: what it takes
//! away may have been acknowledged, so the output says that it was cut, and a server that finds it fetches what is
//! missing from its peers, or is rebuilt, before it votes again.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{
    disk::{Disk, RealDisk},
    frame::{CUT_OFFSETS, CutRecord, EntryKind, FRAME_HEADER_BYTES, frame_bytes},
    index::{segment_name, segment_number},
    patch::read_blocks,
    recovery::{FrameFound, RowFound},
    scan::{Found, SegmentScan, Unreadable, scan_segment},
};

/// Exit code of `verify`: nothing is wrong.
pub const CLEAN: u8 = 0;
/// Exit code of `verify`: something is.
pub const DAMAGED: u8 = 1;
/// Exit code of each tool: a file could not be read or written, or the request was refused.
pub const FAILED: u8 = 2;

/// A segment in memory.
pub struct Segment {
    /// The file.
    pub path: PathBuf,
    /// Its bytes; blocks that could not be read are filled with something that does not verify.
    pub bytes: Vec<u8>,
    /// Blocks of 4,096 bytes that could not be read.
    pub unreadable: Vec<u64>,
    /// What is in it.
    pub scan: SegmentScan,
    /// First index of the next segment beside it: everything below was durable.
    pub next_first: Option<u64>,
}

/// Why a tool did nothing.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The disk answered with an error.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is no segment, or none that this program knows.
    #[error("{}: {why}", path.display())]
    NoSegment {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It would do harm.
    #[error("{0}")]
    Refused(String),
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ToolError {
    let path = path.to_owned();
    move |source| ToolError::Io { operation, path, source }
}

/// One thing that is wrong with a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Where in the file, when known.
    pub offset: Option<u64>,
    /// Which entry; `None` for what belongs to no entry.
    pub index: Option<u64>,
    /// What is wrong.
    pub what: String,
}

impl Segment {
    /// Reads a segment, and the header of the one behind it if it lies in the same folder.
    pub fn read(path: &Path) -> Result<Self, ToolError> {
        let file = RealDisk::open_read_only(path).map_err(io_error("open", path))?;
        let mut bytes = Vec::new();
        let blocks = read_blocks(&*file, &mut bytes, false).map_err(io_error("read", path))?;
        let scan = scan_segment(&bytes).map_err(|e| {
            let why = match e {
                Unreadable::HeaderDamaged => "both copies of the header are damaged, or it is no segment".to_owned(),
                Unreadable::NewerFormat(format) => format!("it has format {format}, newer than this program"),
            };
            ToolError::NoSegment { path: path.to_owned(), why }
        })?;
        let next_first = next_segment(path, scan.header.number);
        Ok(Self { path: path.to_owned(), bytes, unreadable: blocks.unreadable, scan, next_first })
    }

    /// One more than the highest index that was durable.
    fn durable_end(&self) -> u64 {
        self.scan.durable_end.max(self.next_first.unwrap_or_default())
    }

    /// Live entries: what a later segment voided is left out.
    fn live(&self) -> impl Iterator<Item = &Found> {
        let end = self.next_first.unwrap_or(u64::MAX);
        self.scan.entries.iter().filter(move |found| found.index < end)
    }

    /// Everything that is wrong, in the order of the file.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut whole = |offset, what: String| findings.push(Finding { offset, index: None, what });
        if self.scan.header_copy_damaged {
            whole(Some(0), "one copy of the header is damaged".into());
        }
        for block in &self.unreadable {
            whole(Some(block * 4096), "the disk cannot read these 4,096 bytes".into());
        }
        if self.scan.short_by > 0 {
            whole(Some(self.bytes.len() as u64), format!("the file ends {} bytes early", self.scan.short_by));
        }
        if let Some(CutRecord { from, end }) = self.scan.cut {
            let what =
                format!("cut from index {from} by the repair tool; {} entries were there", end.saturating_sub(from));
            whole(None, what);
        }
        let durable_end = self.durable_end();
        for found in self.live() {
            let row = match found.row {
                RowFound::Intact => "row intact",
                RowFound::Damaged => "row damaged",
                RowFound::Absent => "row absent",
            };
            let what = match found.frame {
                FrameFound::Intact if found.row == RowFound::Damaged => "row damaged, frame intact".to_owned(),
                FrameFound::Intact => continue,
                FrameFound::Damaged if found.index < durable_end => format!("frame damaged, {row}; it was durable"),
                FrameFound::Damaged => format!("frame damaged or torn, {row}; not known to have been durable"),
            };
            findings.push(Finding { offset: found.offset, index: Some(found.index), what });
        }
        let end = self.scan.header.first_index + self.scan.entries.len() as u64;
        let promised = self.next_first.unwrap_or(self.scan.durable_end);
        if promised > end {
            let what = format!("entries {end} to {} were durable, and nothing of them is left", promised - 1);
            findings.push(Finding { offset: Some(self.scan.end_offset), index: Some(end), what });
        }
        findings
    }

    /// The frames as text, in the form that the golden scripts use: a line about the segment, then one for each
    /// entry, `index:term:payload`.
    pub fn dump(&self) -> String {
        let name = segment_name(self.scan.header.number);
        let frames = self.scan.entries.iter().filter(|f| f.frame == FrameFound::Intact).count();
        let tail = if self.scan.tail_clean { "clean" } else { "damaged" };
        let cut = self.scan.cut.map(|cut| format!(" cut={}", cut.from)).unwrap_or_default();
        let first = self.scan.header.first_index;
        let mut text =
            format!("{name} first={first} frames={frames} durable={} tail={tail}{cut}\n", self.durable_end());
        for found in &self.scan.entries {
            let line = match (found.located, found.known) {
                (Some(located), known) => {
                    let payload = self.payload(u64::from(located.offset), located.payload_bytes);
                    let shown = show(known.and_then(|k| k.kind), payload);
                    format!("{}:{}:{shown}", found.index, located.term)
                }
                (None, Some(known)) => {
                    format!("{}:{}:<damaged, {} bytes>", found.index, known.term, known.payload_bytes)
                }
                (None, None) => format!("{}:?:<damaged>", found.index),
            };
            let _infallible = writeln!(text, "{line}");
        }
        text
    }

    fn payload(&self, offset: u64, bytes: u32) -> &[u8] {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(FRAME_HEADER_BYTES);
        self.bytes.get(start..start.saturating_add(bytes as usize)).unwrap_or_default()
    }

    /// Where an entry begins, or should begin.
    fn boundaries(&self) -> Vec<(u64, u64)> {
        let mut at = Some(crate::frame::data_offset(self.scan.header.rows));
        let mut boundaries = Vec::new();
        for found in self.live() {
            let offset = found.offset.or(at);
            if let Some(offset) = offset {
                boundaries.push((found.index, offset));
            }
            let bytes = found.located.map(|l| l.payload_bytes).or(found.known.map(|k| k.payload_bytes));
            at = offset.zip(bytes).map(|(offset, bytes)| offset + frame_bytes(bytes));
        }
        boundaries
    }

    /// What could be done, in words.
    pub fn plan(&self) -> String {
        let Some(first) = self.live().find(|found| found.frame == FrameFound::Damaged) else {
            return "No frame is damaged: there is nothing to cut.\n".to_owned();
        };
        let end = self.end_of_traces();
        let mut text = format!("The first damaged entry is {}.\n", first.index);
        text.push_str("If this node has peers, do nothing: the server fetches damaged entries from them by itself.\n");
        match self.boundaries().iter().find(|(index, _)| *index == first.index) {
            None => text.push_str("Where it began is not known, so there is no place to cut.\n"),
            Some((index, offset)) => {
                let durable = self.durable_end().saturating_sub(*index).min(end.saturating_sub(*index));
                let _infallible = writeln!(
                    text,
                    "To give up entries {index} to {}: --truncate-at {offset}{}",
                    end.saturating_sub(1),
                    if durable > 0 { " --lose-durable-entries" } else { "" },
                );
                if durable > 0 {
                    let _infallible =
                        writeln!(text, "{durable} of them were durable: acknowledged writes may be lost.");
                }
            }
        }
        text
    }

    /// One more than the last entry of which there is a trace.
    fn end_of_traces(&self) -> u64 {
        let last = self.live().last().map(|found| found.index + 1).unwrap_or(self.scan.header.first_index);
        let end = last.max(self.durable_end()).max(self.scan.cut.map(|cut| cut.end).unwrap_or_default());
        self.next_first.map_or(end, |next| end.min(next))
    }

    /// The segment without what lies at and behind `at`, with the record that says so; also the first index that went.
    pub fn cut(&self, at: u64, lose_durable: bool) -> Result<(Vec<u8>, CutRecord), ToolError> {
        let refuse = |why: String| Err(ToolError::Refused(why));
        let boundaries = self.boundaries();
        let Some((from, _)) = boundaries.iter().find(|(_, offset)| *offset == at) else {
            let inside = boundaries.iter().rfind(|(_, offset)| *offset < at);
            return refuse(match inside {
                Some((index, offset)) if at < self.scan.end_offset => {
                    format!("byte {at} lies inside the frame of entry {index}, which begins at byte {offset}")
                }
                _ => format!("no entry begins at byte {at}: the last frame ends at byte {}", self.scan.end_offset),
            });
        };
        let record =
            CutRecord { from: (*from).min(self.scan.cut.map_or(u64::MAX, |cut| cut.from)), end: self.end_of_traces() };
        let durable_end = self.durable_end();
        if *from < durable_end && !lose_durable {
            return refuse(format!(
                "entries {from} to {} were durable: clients may have been told that their writes are safe. Say \
                 --lose-durable-entries if they are to be lost all the same",
                durable_end.min(record.end).saturating_sub(1)
            ));
        }
        let mut out = self.bytes.clone();
        out.resize(usize::try_from(self.scan.header.segment_bytes).unwrap_or(out.len()).max(out.len()), 0);
        // Rows stay: they are how the entries are known when peers are asked for them.
        if let Some(behind) = usize::try_from(at).ok().and_then(|at| out.get_mut(at..)) {
            behind.fill(0);
        }
        let bytes = record.encode(self.scan.header.identity);
        for offset in CUT_OFFSETS {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            match out.get_mut(start..start.saturating_add(bytes.len())) {
                Some(to) => to.copy_from_slice(&bytes),
                None => return refuse("the file is too short to be a segment".into()),
            }
        }
        Ok((out, record))
    }
}

fn next_segment(path: &Path, number: u64) -> Option<u64> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Only beside a segment that bears its own name: a copy elsewhere has no neighbours.
    path.file_name().and_then(|n| n.to_str()).and_then(segment_number).filter(|n| *n == number)?;
    let names = fs::read_dir(dir).ok()?.flatten().filter_map(|entry| segment_number(entry.file_name().to_str()?));
    let next = names.filter(|n| *n > number).min()?;
    let mut head = vec![0; crate::frame::BLOCK_BYTES * 2];
    let file = RealDisk::open_read_only(&dir.join(segment_name(next))).ok()?;
    let read = file.read_at(&mut head, 0).ok()?;
    head.truncate(read);
    let headers = crate::frame::HEADER_OFFSETS.iter().filter_map(|at| head.get(usize::try_from(*at).ok()?..));
    headers.filter_map(|bytes| crate::frame::SegmentHeader::decode(bytes).ok()).map(|h| h.first_index).next()
}

fn show(kind: Option<EntryKind>, payload: &[u8]) -> String {
    match kind {
        Some(EntryKind::Blank) => "<blank>".to_owned(),
        Some(EntryKind::Membership) => format!("<membership, {} bytes>", payload.len()),
        Some(EntryKind::Normal) | None => match std::str::from_utf8(payload) {
            Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
            _ => format!("<{} bytes, crc {:08x}>", payload.len(), crate::frame::payload_crc(payload)),
        },
    }
}

/// `verify`: prints what is wrong with a segment. The exit code.
pub fn verify(file: &Path, out: &mut dyn Write) -> u8 {
    let segment = match Segment::read(file) {
        Ok(segment) => segment,
        // A segment without a header can be read, and is damaged; a file that cannot be opened is not.
        Err(error @ ToolError::NoSegment { .. }) => return say(out, &format!("{error}\n"), DAMAGED),
        Err(error) => return say(out, &format!("{error}\n"), FAILED),
    };
    let name = file.display();
    let findings = segment.findings();
    let mut text = String::new();
    for Finding { offset, index, what } in &findings {
        let at = offset.map(|at| format!(" at byte {at}")).unwrap_or_default();
        let entry = index.map(|index| format!(" entry {index}:")).unwrap_or_default();
        let _infallible = writeln!(text, "WAL {name} corrupt{at}:{entry} {what}");
    }
    if findings.is_empty() {
        let first = segment.scan.header.first_index;
        let count = segment.scan.entries.len();
        let _infallible = writeln!(text, "{name}: clean, {count} entries from index {first}");
    }
    say(out, &text, if findings.is_empty() { CLEAN } else { DAMAGED })
}

/// `dump`: prints a segment's frames. The exit code.
pub fn dump(file: &Path, out: &mut dyn Write) -> u8 {
    match Segment::read(file) {
        Ok(segment) => say(out, &segment.dump(), CLEAN),
        Err(error) => say(out, &format!("{error}\n"), FAILED),
    }
}

/// What `repair` is asked to do.
#[derive(Clone, Debug)]
pub struct RepairRequest {
    /// The segment; never written.
    pub segment: PathBuf,
    /// The new file; must not exist yet. Needed for a cut.
    pub output: Option<PathBuf>,
    /// Where to cut: the first byte of a frame. `None`: print the plan.
    pub truncate_at: Option<u64>,
    /// Cut durable entries too.
    pub lose_durable_entries: bool,
}

/// `repair`: prints the plan, or writes the cut segment. The exit code.
pub fn repair(request: &RepairRequest, out: &mut dyn Write) -> u8 {
    match repair_inner(request) {
        Ok(text) => say(out, &text, CLEAN),
        Err(error) => say(out, &format!("{error}\n"), FAILED),
    }
}

fn repair_inner(request: &RepairRequest) -> Result<String, ToolError> {
    let segment = Segment::read(&request.segment)?;
    let Some(at) = request.truncate_at else { return Ok(segment.plan()) };
    let Some(output) = &request.output else {
        return Err(ToolError::Refused("--truncate-at needs --output: the input is never written".into()));
    };
    let (bytes, record) = segment.cut(at, request.lose_durable_entries)?;
    // `create_new` refuses a file that exists, the input among them.
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).open(output).map_err(io_error("create", output))?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io_error("write", output))?;
    let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    RealDisk.sync_dir(dir).map_err(io_error("sync", dir))?;
    let lost = record.end.saturating_sub(record.from);
    let durable = segment.durable_end().min(record.end).saturating_sub(record.from);
    let mut text = format!("{}: cut from index {}, byte {at}\n", output.display(), record.from);
    let last = record.end.saturating_sub(1);
    let _infallible =
        writeln!(text, "lost: {lost} entries, {} to {last}, of which {durable} were durable", record.from);
    text.push_str(
        "Put it in the place of the input, keep the input. A node with peers fetches what is missing from them before it \
         votes, or is rebuilt; a single node goes on without it.\n",
    );
    Ok(text)
}

fn say(out: &mut dyn Write, text: &str, code: u8) -> u8 {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => code,
        Err(_) => FAILED,
    }
}
