//! Where each entry lies, and the newest entries themselves.
//!
//! The cache holds every entry that is not yet on the disk, and as many newer ones as its budget
//! allows: replication and apply read each entry again shortly after it was appended. Older ones are
//! found by their location.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    disk::DiskFile,
    frame::{SegmentHeader, frame_bytes, log_id},
    types::{Entry, LogId},
};

/// Where an entry's frame lies in its segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// Term of the entry.
    pub term: u64,
    /// Where the frame begins.
    pub offset: u32,
    /// Bytes of the payload.
    pub payload_bytes: u32,
    /// CRC-32 of the payload.
    pub payload_crc: u32,
}

impl Located {
    /// Stands for an entry that is not there any more.
    pub const NOWHERE: Self = Self { term: 0, offset: 0, payload_bytes: 0, payload_crc: 0 };
}

/// An open segment and the live entries in it.
pub struct SegmentIndex {
    /// NNN of its name.
    pub number: u64,
    /// Part of every checksum in it.
    pub identity: u64,
    /// What the segment says of itself: both copies on the disk are this, and are made anew from it.
    pub header: SegmentHeader,
    /// Open for reading.
    pub file: Arc<dyn DiskFile>,
    /// Index of `entries[0]`.
    pub first_index: u64,
    /// Live entries, without gaps.
    pub entries: VecDeque<Located>,
}

impl SegmentIndex {
    /// One more than the last live entry.
    pub fn end(&self) -> u64 {
        self.first_index + self.entries.len() as u64
    }

    /// File name.
    pub fn name(&self) -> String {
        segment_name(self.number)
    }
}

/// The file name of a segment.
pub fn segment_name(number: u64) -> String {
    format!("segment.{number:03}.wal")
}

/// NNN of a segment's file name.
pub fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("segment.")?.strip_suffix(".wal")?;
    if digits.len() < 3 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// An entry with what it costs to keep it.
struct Cached {
    entry: Entry,
    bytes: usize,
}

/// Locations and cache of the live log. `purged < first <= end`; entries at or above `located_end`
/// are in the cache only, and never evicted.
#[derive(Default)]
pub struct LogIndex {
    /// Oldest first.
    pub segments: VecDeque<SegmentIndex>,
    /// The last entry that was purged.
    pub purged: Option<LogId>,
    cache: VecDeque<Cached>,
    cache_first: u64,
    cache_bytes: usize,
}

/// An entry that must be read from its segment.
pub struct OnDisk {
    /// The file.
    pub file: Arc<dyn DiskFile>,
    /// Its name, for errors.
    pub segment: String,
    /// Identity of the segment.
    pub identity: u64,
    /// Index of the entry.
    pub index: u64,
    /// Where it is.
    pub located: Located,
}

/// Where a requested entry is.
pub enum Lookup {
    /// Here it is.
    Cached(Entry),
    /// Read it.
    OnDisk(OnDisk),
}

impl LogIndex {
    /// An index of what was found at start.
    pub fn recovered(segments: VecDeque<SegmentIndex>, purged: Option<LogId>) -> Self {
        Self { segments, purged, ..Self::default() }
    }

    /// One more than the last entry that has a place in a segment.
    pub fn located_end(&self) -> u64 {
        self.segments.back().map(SegmentIndex::end).unwrap_or_default().max(self.purged_end())
    }

    fn purged_end(&self) -> u64 {
        self.purged.as_ref().map(|id| id.index() + 1).unwrap_or_default()
    }

    /// One more than the last entry.
    pub fn end(&self) -> u64 {
        if self.cache.is_empty() { self.located_end() } else { self.cache_first + self.cache.len() as u64 }
    }

    /// Index of the first entry that is not purged.
    pub fn first(&self) -> u64 {
        let first = self.segments.iter().find(|s| !s.entries.is_empty()).map(|s| s.first_index);
        let first = match (first, self.cache.is_empty()) {
            (Some(first), _) => first,
            (None, false) => self.cache_first,
            (None, true) => self.purged_end(),
        };
        first.max(self.purged_end())
    }

    /// The log id at an index that the log holds.
    pub fn log_id_at(&self, index: u64) -> Option<LogId> {
        if let Some(cached) = self.cached(index) {
            return Some(cached.entry.log_id);
        }
        if let Some(purged) = self.purged.as_ref().filter(|id| id.index() == index) {
            return Some(*purged);
        }
        self.locate(index).map(|(_, located)| log_id(located.term, index))
    }

    /// The last entry's log id, or the purged one's when there is no entry.
    pub fn last_log_id(&self) -> Option<LogId> {
        match self.end().checked_sub(1) {
            Some(last) if self.end() > self.purged_end() => self.log_id_at(last),
            _ => self.purged,
        }
    }

    fn cached(&self, index: u64) -> Option<&Cached> {
        let position = usize::try_from(index.checked_sub(self.cache_first)?).ok()?;
        self.cache.get(position)
    }

    fn locate(&self, index: u64) -> Option<(&SegmentIndex, Located)> {
        if index < self.purged_end() {
            return None;
        }
        let at = self.segments.partition_point(|s| s.end() <= index);
        let segment = self.segments.get(at)?;
        let position = usize::try_from(index.checked_sub(segment.first_index)?).ok()?;
        segment.entries.get(position).map(|located| (segment, *located))
    }

    /// Finds an entry.
    pub fn lookup(&self, index: u64) -> Option<Lookup> {
        if index < self.purged_end() {
            return None;
        }
        if let Some(cached) = self.cached(index) {
            return Some(Lookup::Cached(cached.entry.clone()));
        }
        self.lookup_located(index)
    }

    /// Finds an entry's place in its segment, whether it is cached or not.
    pub fn lookup_located(&self, index: u64) -> Option<Lookup> {
        self.locate(index).map(|(segment, located)| {
            Lookup::OnDisk(OnDisk {
                file: Arc::clone(&segment.file),
                segment: segment.name(),
                identity: segment.identity,
                index,
                located,
            })
        })
    }

    /// Where the live entries of a segment lie that is not the last one.
    pub fn sealed(&self, number: u64) -> Option<(Arc<dyn DiskFile>, SegmentHeader, Vec<OnDisk>)> {
        let at = self.segments.iter().position(|s| s.number == number)?;
        let segment = self.segments.get(at).filter(|_| at + 1 < self.segments.len())?;
        let (name, purged_end) = (segment.name(), self.purged_end());
        let live = (segment.first_index..).zip(&segment.entries).filter(|(index, _)| *index >= purged_end);
        let on_disk = live.map(|(index, located)| OnDisk {
            file: Arc::clone(&segment.file),
            segment: name.clone(),
            identity: segment.identity,
            index,
            located: *located,
        });
        Some((Arc::clone(&segment.file), segment.header, on_disk.collect()))
    }

    /// Makes an entry readable before it is written. Entries come without gaps.
    pub fn push(&mut self, entry: Entry, bytes: usize) {
        let index = entry.log_id.index();
        if self.cache.is_empty() {
            self.cache_first = index;
        }
        assert_eq!(index, self.cache_first + self.cache.len() as u64, "a hole in the log");
        self.cache_bytes += bytes;
        self.cache.push_back(Cached { entry, bytes });
    }

    /// The writer has put entries into a segment and they are durable: give them their places and
    /// drop from the cache what is beyond its budget.
    pub fn located(&mut self, segment: u64, located: impl Iterator<Item = Located>, budget_bytes: usize) {
        if let Some(segment) = self.segments.back_mut() {
            segment.entries.extend(located);
        }
        debug_assert_eq!(self.segments.back().map(|s| s.number), Some(segment));
        let end = self.located_end();
        while self.cache_bytes > budget_bytes && self.cache_first < end {
            let Some(oldest) = self.cache.pop_front() else {
                break;
            };
            self.cache_bytes -= oldest.bytes;
            self.cache_first += 1;
        }
    }

    /// Forgets the entries at and above `end`.
    pub fn truncate(&mut self, end: u64) {
        while self.cache_first + self.cache.len() as u64 > end {
            let Some(newest) = self.cache.pop_back() else {
                break;
            };
            self.cache_bytes -= newest.bytes;
        }
        for segment in &mut self.segments {
            let keep = usize::try_from(end.saturating_sub(segment.first_index)).unwrap_or(usize::MAX);
            segment.entries.truncate(keep);
            // A wholly void segment stands empty at the cut, so that the ends of segments never decrease.
            segment.first_index = segment.first_index.min(end);
        }
    }

    /// Forgets the entries up to and including `upto`; returns the segments that no live entry
    /// needs any more, oldest first. The last segment stays.
    pub fn purge(&mut self, upto: LogId) -> Vec<SegmentIndex> {
        self.purged = Some(self.purged.map_or(upto, |old| old.max(upto)));
        let end = self.purged_end();
        while self.cache_first < end {
            let Some(oldest) = self.cache.pop_front() else {
                break;
            };
            self.cache_bytes -= oldest.bytes;
            self.cache_first += 1;
        }
        let mut gone = Vec::new();
        while self.segments.len() > 1 && self.segments.front().is_some_and(|s| s.end() <= end) {
            gone.extend(self.segments.pop_front());
        }
        gone
    }

    /// Takes out the segments that a truncation left without a live entry, newest first: each one's header
    /// continues the one before it, so whatever is left after a crash must not lack a predecessor. The last
    /// segment stays.
    pub fn take_void(&mut self) -> Vec<SegmentIndex> {
        let last = self.segments.pop_back();
        let all = std::mem::take(&mut self.segments);
        let (mut void, live): (Vec<_>, Vec<_>) = all.into_iter().partition(|s| s.entries.is_empty());
        void.reverse();
        self.segments = live.into_iter().chain(last).collect();
        void
    }

    /// Bytes of the frames of live entries.
    pub fn live_bytes(&self) -> u64 {
        self.bytes_from(0)
    }

    /// Bytes of frames from the entry at `index`, or the oldest live one, to the newest that is written.
    pub fn bytes_from(&self, index: u64) -> u64 {
        let index = index.max(self.purged_end());
        let extent = |s: &SegmentIndex| {
            let first = usize::try_from(index.saturating_sub(s.first_index)).ok().and_then(|at| s.entries.get(at));
            match (first, s.entries.back()) {
                (Some(first), Some(last)) => {
                    (u64::from(last.offset) + frame_bytes(last.payload_bytes)).saturating_sub(u64::from(first.offset))
                }
                _ => 0,
            }
        };
        let wanted = self.segments.partition_point(|s| s.end() <= index);
        self.segments.iter().skip(wanted).map(extent).sum()
    }
}
