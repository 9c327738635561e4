//! The segments of a log, joined: what each entry's place holds, the last group, and what should be there and is not.
//!
//! Built by the opener segment by segment; a repair fills its gaps in. Changes nothing on the disk.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use crate::{
    disk::DiskFile,
    error::{Damage, OpenError},
    frame::{CutRecord, EntryKind, SegmentHeader, term_of},
    hard_state::HardState,
    index::{Located, SegmentIndex, segment_name},
    recovery::{FrameFound, RowFound, Slot},
    repair::LostLog,
    scan::{Found, Known, SegmentScan},
};

/// Why a log does not open.
pub enum Trouble {
    /// Somebody must do something about it first.
    Error(OpenError),
    /// It is beyond what single entries of the peers can repair.
    Lost(LostLog),
}

impl From<OpenError> for Trouble {
    fn from(error: OpenError) -> Self {
        Self::Error(error)
    }
}

/// A segment as read.
pub struct Scanned {
    /// NNN of its name.
    pub number: u64,
    /// Open.
    pub file: Arc<dyn DiskFile>,
    /// What is in it.
    pub scan: SegmentScan,
    /// Blocks that cannot be read.
    pub unreadable: Vec<u64>,
    /// Blocks of which the page cache shows something else than the device, with what the device has.
    pub stale: BTreeMap<u64, Vec<u8>>,
}

/// What a repair must know of a segment beside its index.
#[derive(Clone)]
pub struct Detail {
    /// Its header.
    pub header: SegmentHeader,
    /// Blocks that cannot be read.
    pub unreadable: Vec<u64>,
    /// See [`Scanned::stale`].
    pub stale: BTreeMap<u64, Vec<u8>>,
    /// The repair tool was here.
    pub cut: Option<CutRecord>,
}

/// An entry that is not intact.
#[derive(Clone)]
pub struct Bad {
    /// What was found.
    pub found: Found,
    /// Number of the segment where it is or should be.
    pub segment: u64,
    /// What the next frame, or the next segment, carries on of it.
    pub link: Option<u32>,
    /// Its term, when the next segment names it.
    pub term: Option<u64>,
}

/// An entry as it is kept until the decision: little for each intact one, because there are millions.
pub enum Joint {
    /// Readable.
    Intact {
        /// What its next frame carries on.
        header_crc: Option<u32>,
    },
    /// Not readable.
    Bad(Box<Bad>),
}

impl Joint {
    fn new(found: &Found, segment: u64) -> Self {
        match found.frame {
            FrameFound::Intact => Self::Intact { header_crc: found.header_crc },
            FrameFound::Damaged => Self::Bad(Box::new(Bad { found: found.clone(), segment, link: None, term: None })),
        }
    }

    fn header_crc(&self) -> Option<u32> {
        match self {
            Self::Intact { header_crc } => *header_crc,
            Self::Bad(bad) => bad.found.header_crc,
        }
    }
}

/// The live entries of all segments, joined.
pub struct Joined {
    /// One more than the last purged index.
    pub purged_end: u64,
    /// Oldest first.
    pub segments: VecDeque<SegmentIndex>,
    /// One for each segment.
    pub details: VecDeque<Detail>,
    /// Entry by entry from `first` on, purged ones included.
    entries: VecDeque<Joint>,
    first: Option<u64>,
    /// One more than D.
    pub durable_end: u64,
    /// One more than the highest index known committed.
    pub committed_end: u64,
    /// Indexes of intact membership entries, ascending.
    pub memberships: Vec<u64>,
    /// No more entries than this are missed: a whole segment's worth.
    lost_max: u64,
}

impl Joined {
    /// Of no segment yet.
    pub fn new(hard: &HardState, lost_max: u64) -> Self {
        let purged_end = hard.purged.map(|id| id.index() + 1).unwrap_or_default().max(hard.start);
        Self {
            purged_end,
            segments: VecDeque::new(),
            details: VecDeque::new(),
            entries: VecDeque::new(),
            first: None,
            durable_end: 0,
            committed_end: 0,
            memberships: Vec::new(),
            lost_max,
        }
    }

    /// One more than the last entry.
    pub fn end(&self) -> u64 {
        self.first.map(|f| f + self.entries.len() as u64).unwrap_or_default()
    }

    fn position(&self, index: u64) -> Option<usize> {
        usize::try_from(index.checked_sub(self.first?)?).ok()
    }

    fn joint(&self, index: u64) -> Option<&Joint> {
        self.entries.get(self.position(index)?)
    }

    /// The entry, if it is damaged.
    pub fn bad(&self, index: u64) -> Option<&Bad> {
        match self.joint(index)? {
            Joint::Bad(bad) => Some(bad),
            Joint::Intact { .. } => None,
        }
    }

    /// What the entry behind this one carries on of it.
    pub fn header_crc(&self, index: u64) -> Option<u32> {
        self.joint(index)?.header_crc()
    }

    /// Which segment holds the live entry, or should hold it: the last one that begins at or before it.
    pub fn owner(&self, index: u64) -> Option<usize> {
        self.details.iter().rposition(|detail| detail.header.first_index <= index)
    }

    /// Where an intact live entry lies.
    pub fn located(&self, index: u64) -> Option<(&SegmentIndex, Located)> {
        let segment = self.segments.get(self.owner(index)?)?;
        let at = usize::try_from(index.checked_sub(segment.first_index)?).ok()?;
        segment.entries.get(at).filter(|l| **l != Located::NOWHERE).map(|l| (segment, *l))
    }

    /// What is known of a live entry, intact or not.
    pub fn known(&self, index: u64) -> Option<Known> {
        if let Some((_, located)) = self.located(index) {
            let Located { term, payload_bytes, payload_crc, .. } = located;
            return Some(Known { term, payload_bytes, payload_crc, kind: None });
        }
        self.bad(index)?.found.known
    }

    fn lose(&mut self, upto: u64, segment: u64, row: RowFound) -> Result<(), Trouble> {
        let missing = upto.saturating_sub(self.end());
        if missing > self.lost_max {
            return Err(Trouble::Lost(LostLog {
                why: format!("{missing} entries are missing, more than a segment holds"),
                damage: vec![missing_from(segment, self.end(), upto)],
            }));
        }
        while self.end() < upto {
            let lost = Found::lost(self.end(), None, row);
            self.push(&lost, segment);
        }
        Ok(())
    }

    fn push(&mut self, found: &Found, segment: u64) {
        if let (Some(Joint::Bad(bad)), Some(previous_crc)) = (self.entries.back_mut(), found.previous_crc) {
            bad.link = Some(previous_crc);
        }
        if found.frame == FrameFound::Intact && found.known.is_some_and(|k| k.kind == Some(EntryKind::Membership)) {
            self.memberships.push(found.index);
        }
        self.entries.push_back(Joint::new(found, segment));
    }

    /// Adds the next segment.
    pub fn add(&mut self, scanned: &Scanned) -> Result<(), Trouble> {
        let header = &scanned.scan.header;
        let behind_purge = header.first_index > self.end() && header.first_index <= self.purged_end;
        if self.first.is_none() || behind_purge {
            // Whatever came before was purged, or is missed below.
            self.entries.clear();
            self.first = Some(header.first_index);
        }
        // Entries at and above the header's first index were truncated when this segment was begun.
        self.cut(header.first_index);
        if self.entries.is_empty() {
            // All that came before is void or purged.
            self.first = Some(header.first_index);
        }
        self.lose(header.first_index, scanned.number.saturating_sub(1), RowFound::Absent)?;
        let known = self.entries.back().and_then(Joint::header_crc);
        if header.previous_crc != 0 && known.is_some_and(|crc| crc != header.previous_crc) {
            let why = format!(
                "{} does not continue the segment before it: it belongs to another log, or one between them is missing",
                segment_name(scanned.number)
            );
            return Err(Trouble::Lost(LostLog { why, damage: vec![] }));
        }
        if let Some(Joint::Bad(bad)) = self.entries.back_mut()
            && header.previous_crc != 0
        {
            bad.link = Some(header.previous_crc);
            bad.term = header.previous.as_ref().map(term_of);
        }
        // The header was synced when all below it was durable and nothing of it was above.
        self.durable_end = scanned.scan.durable_end;
        self.committed_end = self.committed_end.max(scanned.scan.committed_end);
        assert_eq!(self.end(), header.first_index, "segment {} does not begin where the log ends", scanned.number);
        for found in &scanned.scan.entries {
            self.push(found, scanned.number);
        }
        self.segments.push_back(SegmentIndex {
            number: scanned.number,
            identity: header.identity,
            header: *header,
            file: Arc::clone(&scanned.file),
            first_index: header.first_index,
            // A damaged entry keeps its position here, without a place to read it from: it is purged, or cut, or
            // repaired, or the log does not open (see `check_live`).
            entries: scanned.scan.entries.iter().map(|found| found.located.unwrap_or(Located::NOWHERE)).collect(),
        });
        self.details.push_back(Detail {
            header: *header,
            unreadable: scanned.unreadable.clone(),
            stale: scanned.stale.clone(),
            cut: scanned.scan.cut,
        });
        if let Some(cut) = scanned.scan.cut {
            // What the tool took away was there: torn or not, it is missed.
            self.lose(cut.end, scanned.number, RowFound::Damaged)?;
        }
        Ok(())
    }

    /// Adds what should be there and is not.
    pub fn finish(&mut self, hard: &HardState, last: Option<&Scanned>) -> Result<(), Trouble> {
        let newest = self.segments.back().map(|s| s.number).unwrap_or_default();
        if newest < hard.segment_last {
            // How many entries they held is not known to anybody.
            return Err(Trouble::Lost(LostLog {
                why: format!("the newest segments, {} to {}, are missing", newest + 1, hard.segment_last),
                damage: vec![Damage {
                    segment: segment_name(hard.segment_last),
                    offset: None,
                    index: self.end(),
                    what: format!("segments {} to {} are missing", newest + 1, hard.segment_last),
                }],
            }));
        }
        if let Some(first) = self.first
            && first > self.purged_end
        {
            let segment = self.segments.front().map(|s| s.number).unwrap_or_default();
            if first - self.purged_end > self.lost_max {
                return Err(Trouble::Lost(LostLog {
                    why: format!("entries {} to {} are missing", self.purged_end, first - 1),
                    damage: vec![missing_from(segment, self.purged_end, first)],
                }));
            }
            let header = self.details.front().map(|detail| detail.header);
            for index in (self.purged_end..first).rev() {
                let mut lost = Joint::new(&Found::lost(index, None, RowFound::Absent), segment);
                if let (Joint::Bad(bad), Some(header)) = (&mut lost, header.filter(|h| h.first_index == index + 1)) {
                    bad.link = Some(header.previous_crc).filter(|crc| *crc != 0);
                    bad.term = header.previous.as_ref().map(term_of);
                }
                self.entries.push_front(lost);
            }
            self.first = Some(self.purged_end);
        }
        self.lose(self.durable_end, newest, RowFound::Absent)?;
        if let Some(last) = last.filter(|last| last.scan.short_by > 0) {
            // Whatever was cut off may have held an entry of the last group, row and frame and all.
            let lost = Found::lost(self.end(), Some(last.scan.end_offset), RowFound::Damaged);
            self.push(&lost, newest);
        }
        Ok(())
    }

    /// The entries that are not intact: intact ones are kept whatever their row, and purged ones do not matter.
    pub fn slots(&self) -> Vec<Slot> {
        let slot = |bad: &Bad| Slot {
            index: bad.found.index,
            segment: segment_name(bad.segment),
            offset: bad.found.offset,
            frame: bad.found.frame,
            row: bad.found.row,
        };
        let bad = self.entries.iter().filter_map(|entry| match entry {
            Joint::Bad(bad) => Some(&**bad),
            Joint::Intact { .. } => None,
        });
        bad.filter(|bad| bad.found.index >= self.purged_end).map(slot).collect()
    }

    /// Index from which on a tool cut the log, if it has not been made whole since.
    pub fn cut_by_tool(&self) -> Option<u64> {
        let cuts = self.details.iter().enumerate().filter_map(|(at, detail)| Some((at, detail.cut?)));
        let open = cuts.filter(|(at, cut)| {
            let void_from = self.details.get(at + 1).map_or(u64::MAX, |next| next.header.first_index);
            (cut.from..cut.end.min(void_from)).any(|index| index >= self.purged_end && self.bad(index).is_some())
        });
        open.map(|(_, cut)| cut.from).min()
    }

    /// A damaged entry has been written again.
    pub fn mended(&mut self, index: u64, segment: usize, located: Located, link: u32, kind: EntryKind) {
        let Some(position) = self.position(index) else { return };
        if let Some(joint) = self.entries.get_mut(position) {
            *joint = Joint::Intact { header_crc: Some(link) };
        }
        if let Some(segment) = self.segments.get_mut(segment)
            && let Some(at) = index.checked_sub(segment.first_index).and_then(|at| usize::try_from(at).ok())
        {
            if segment.entries.len() <= at {
                segment.entries.resize(at + 1, Located::NOWHERE);
            }
            if let Some(place) = segment.entries.get_mut(at) {
                *place = located;
            }
        }
        if kind == EntryKind::Membership {
            let at = self.memberships.partition_point(|m| *m < index);
            self.memberships.insert(at, index);
        }
    }

    /// Forgets what is at and above `end`.
    pub fn cut(&mut self, end: u64) {
        let keep = usize::try_from(end.saturating_sub(self.first.unwrap_or_default())).unwrap_or(usize::MAX);
        self.entries.truncate(keep);
        self.memberships.retain(|index| *index < end);
        for segment in &mut self.segments {
            let keep = usize::try_from(end.saturating_sub(segment.first_index)).unwrap_or(usize::MAX);
            segment.entries.truncate(keep);
            segment.first_index = segment.first_index.min(end);
        }
    }

    /// What is kept is intact: whatever the decision was, nothing else may pass here.
    pub fn check_live(&self) {
        for (position, entry) in self.entries.iter().enumerate() {
            let index = self.first.unwrap_or_default() + position as u64;
            let is_intact = matches!(entry, Joint::Intact { .. });
            assert!(index < self.purged_end || is_intact, "entry {index} is kept and cannot be read");
        }
    }

    /// Terms never decrease; a log in which they do is not one log.
    pub fn check_terms(&self) -> Result<(), Trouble> {
        let mut last = 0;
        for segment in &self.segments {
            for (index, located) in (segment.first_index..).zip(&segment.entries) {
                if index < self.purged_end {
                    continue;
                }
                let term = located.term;
                if term < last {
                    let why = format!(
                        "entry {index} in {} has term {term} behind term {last}: terms never decrease, so this is not \
                         one log",
                        segment.name(),
                    );
                    return Err(Trouble::Lost(LostLog { why, damage: vec![] }));
                }
                last = term;
            }
        }
        Ok(())
    }

    /// What the next frame must carry on.
    pub fn last_crc(&self) -> u32 {
        self.entries.back().and_then(Joint::header_crc).unwrap_or_default()
    }
}

fn missing_from(segment: u64, from: u64, end: u64) -> Damage {
    let what = format!("entries {from} to {} are missing", end.saturating_sub(1));
    Damage { segment: segment_name(segment), offset: None, index: from, what }
}
