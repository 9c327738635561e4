//! What the disk is busy with, and how long its syncs take.
//!
//! A watchdog on a thread of its own must see that a sync hangs while the thread that called it can say nothing.
//! So whoever changes a file registers the operation before and takes it back after ([`guard`]); the lock that
//! guards the list is never held across I/O. One [`IoTimes`] serves a whole process: the log registers here by
//! itself, the tree, checkpoints and identity files do so with [`guard`]. Reads of the tree are too many for a list: each
//! reader has a [`Series`] and counts in it, and whoever looks twice and finds the same count knows that it hangs.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::clock::monotonic_ms;

/// Syncs older than this say nothing about the disk of now.
pub const FSYNC_WINDOW_MS: u64 = 10_000;

/// The newest syncs that are kept: enough for a 99th percentile, and a window of seconds when the disk is slow.
const FSYNCS_KEPT: usize = 1024;

/// Who waits for an operation, the most impatient first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Waits {
    /// Somebody does.
    Somebody,
    /// Somebody does for a row of the tree. The next one of a scan may lie behind very many that were deleted, which takes
    /// time and no disk; and each read waits while a flush or a compaction names its tables, which takes five syncs.
    ARow,
    /// Nobody yet: preparing a spare segment, flushing the tree. It may take long on a healthy disk.
    Nobody,
}

/// An operation that has begun and not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoInFlight {
    /// What is being done: `write`, `sync`, `rename`, `unlink`, `read` and so on.
    pub operation: &'static str,
    /// File name, for example `segment.001.wal`.
    pub file: String,
    /// When it began, on the scale of [`monotonic_ms`].
    pub since_ms: u64,
    /// Who waits for it.
    pub waits: Waits,
}

impl IoInFlight {
    /// For how long it has been going on, in milliseconds.
    pub fn age_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.since_ms)
    }
}

/// All operations of a process that are under way.
#[derive(Debug, Default)]
pub struct IoTimes {
    running: Mutex<Vec<(u64, IoInFlight)>>,
    next: AtomicU64,
    series: Mutex<Vec<SeriesSeen>>,
}

/// A series as it was last looked at.
#[derive(Debug)]
struct SeriesSeen {
    count: Arc<AtomicU64>,
    operation: &'static str,
    file: &'static str,
    /// The count that was seen while something was under way, and since when.
    seen: Option<(u64, u64)>,
}

/// Short operations of one reader, one after the other. Each costs two stores and no clock.
#[derive(Debug)]
pub struct Series {
    times: Arc<IoTimes>,
    /// Another number with each operation; the lowest bit says whether one is under way.
    count: Arc<AtomicU64>,
}

const UNDER_WAY: u64 = 1;

/// The operation of a series ends when it is dropped.
#[must_use = "the operation counts as ended when this is dropped"]
pub struct SeriesGuard<'a>(&'a AtomicU64);

impl Series {
    /// An operation begins. Two at the same time count as one of them.
    pub fn begin(&self) -> SeriesGuard<'_> {
        let next = (self.count.load(Ordering::Relaxed) | UNDER_WAY).wrapping_add(1);
        self.count.store(next | UNDER_WAY, Ordering::Relaxed);
        SeriesGuard(&self.count)
    }
}

impl Drop for SeriesGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_and(!UNDER_WAY, Ordering::Relaxed);
    }
}

impl Drop for Series {
    fn drop(&mut self) {
        self.times.all_series().retain(|seen| !Arc::ptr_eq(&seen.count, &self.count));
    }
}

/// Takes the operation back when it is dropped.
#[must_use = "the operation counts as ended when this is dropped"]
pub struct IoGuard<'a> {
    times: &'a IoTimes,
    id: u64,
}

/// Registers an operation that somebody waits for, until the answer is dropped.
pub fn guard<'a>(times: &'a IoTimes, operation: &'static str, file: &str) -> IoGuard<'a> {
    times.enter(operation, file, Waits::Somebody)
}

impl IoTimes {
    /// Registers an operation.
    pub fn enter(&self, operation: &'static str, file: &str, waits: Waits) -> IoGuard<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let io = IoInFlight { operation, file: file.to_owned(), since_ms: monotonic_ms(), waits };
        self.running().push((id, io));
        IoGuard { times: self, id }
    }

    fn running(&self) -> MutexGuard<'_, Vec<(u64, IoInFlight)>> {
        // Changed by single calls that do not panic half way; a poisoned list is still whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A series of operations like `read` of `kv/tables`.
    pub fn series(self: &Arc<Self>, operation: &'static str, file: &'static str) -> Series {
        let count = Arc::<AtomicU64>::default();
        self.all_series().push(SeriesSeen { count: Arc::clone(&count), operation, file, seen: None });
        Series { times: Arc::clone(self), count }
    }

    fn all_series(&self) -> MutexGuard<'_, Vec<SeriesSeen>> {
        // As with `running`.
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The operation that has been going on for the longest time, those that somebody waits for first.
    pub fn oldest(&self) -> Option<IoInFlight> {
        self.all().into_iter().min_by_key(|io| (io.waits, io.since_ms))
    }

    /// Everything that is under way, in no order. Of a series: since it was first seen so.
    pub fn all(&self) -> Vec<IoInFlight> {
        let mut all: Vec<IoInFlight> = self.running().iter().map(|(_, io)| io.clone()).collect();
        let mut series = self.all_series();
        if !series.is_empty() {
            let now_ms = monotonic_ms();
            all.extend(series.iter_mut().filter_map(|series| series.look(now_ms)));
        }
        all
    }
}

impl SeriesSeen {
    /// What is under way at `now_ms`.
    fn look(&mut self, now_ms: u64) -> Option<IoInFlight> {
        let count = self.count.load(Ordering::Relaxed);
        if count & UNDER_WAY == 0 {
            self.seen = None;
            return None;
        }
        let since_ms = match self.seen {
            Some((seen, since_ms)) if seen == count => since_ms,
            _ => now_ms,
        };
        self.seen = Some((count, since_ms));
        Some(IoInFlight { operation: self.operation, file: self.file.to_owned(), since_ms, waits: Waits::ARow })
    }
}

impl Drop for IoGuard<'_> {
    fn drop(&mut self) {
        self.times.running().retain(|(id, _)| *id != self.id);
    }
}

/// How long the log's syncs took lately.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FsyncFigures {
    /// Syncs that the figures are of: at most 1,024, of the last 10 seconds.
    pub count: usize,
    /// Median in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile in milliseconds.
    pub p99_ms: f64,
    /// The longest in milliseconds.
    pub max_ms: f64,
}

/// The newest syncs and how long each took. A sync costs one push here; the figures are computed when asked for.
#[derive(Debug, Default)]
pub struct FsyncWindow(Mutex<VecDeque<(u64, Duration)>>);

impl FsyncWindow {
    /// A sync that ended at `now_ms` took so long.
    pub fn add(&self, now_ms: u64, took: Duration) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == FSYNCS_KEPT {
            kept.pop_front();
        }
        kept.push_back((now_ms, took));
    }

    /// The figures at `now_ms`; all zero when no sync ended within the window.
    pub fn figures(&self, now_ms: u64) -> FsyncFigures {
        let from = now_ms.saturating_sub(FSYNC_WINDOW_MS);
        let mut took: Vec<Duration> = {
            let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            kept.iter().filter(|(at, _)| *at >= from).map(|(_, took)| *took).collect()
        };
        took.sort_unstable();
        let at = |percent: usize| {
            let position = (took.len() * percent).div_ceil(100).saturating_sub(1);
            took.get(position).map(|t| t.as_secs_f64() * 1e3).unwrap_or_default()
        };
        FsyncFigures { count: took.len(), p50_ms: at(50), p99_ms: at(99), max_ms: at(100) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_operation_is_seen_while_it_runs_and_not_after() {
        let times = IoTimes::default();
        assert_eq!(times.oldest(), None);
        let spare = times.enter("sync", "segment.spare", Waits::Nobody);
        assert_eq!(times.oldest().map(|io| io.file), Some("segment.spare".into()));
        let sync = guard(&times, "sync", "segment.001.wal");
        let oldest = times.oldest().expect("two are running");
        assert_eq!((oldest.operation, oldest.file.as_str()), ("sync", "segment.001.wal"), "background waits behind");
        assert_eq!(oldest.age_ms(oldest.since_ms + 7), 7);
        assert_eq!(times.all().len(), 2);
        drop(sync);
        drop(spare);
        assert_eq!(times.oldest(), None);
    }

    #[test]
    fn a_series_hangs_when_two_looks_find_the_same_operation() {
        let times = Arc::new(IoTimes::default());
        let reads = times.series("read", "kv/tables");
        assert_eq!(times.all(), []);
        let look = |now_ms| {
            let found = times.all_series().iter_mut().find_map(|series| series.look(now_ms));
            found.map(|io| io.since_ms)
        };
        let first = reads.begin();
        assert_eq!((look(100), look(110)), (Some(100), Some(100)));
        drop(first);
        let second = reads.begin();
        assert_eq!(look(120), Some(120), "another operation is none that hangs");
        drop(second);
        assert_eq!(look(130), None);
        let third = reads.begin();
        assert_eq!(look(140), Some(140), "nothing of the one before is left");
        assert_eq!(times.oldest().map(|io| (io.operation, io.file)), Some(("read", "kv/tables".into())));
        drop(third);
        drop(reads);
        assert_eq!(times.all_series().len(), 0);
    }

    #[test]
    fn percentiles_are_of_the_window() {
        let window = FsyncWindow::default();
        assert_eq!(window.figures(5), FsyncFigures::default());
        for took in 1..=100 {
            window.add(100, Duration::from_millis(took));
        }
        let figures = window.figures(100);
        assert_eq!((figures.count, figures.p50_ms, figures.p99_ms, figures.max_ms), (100, 50.0, 99.0, 100.0));
        window.add(100 + FSYNC_WINDOW_MS, Duration::from_millis(7));
        assert_eq!(window.figures(100 + FSYNC_WINDOW_MS).count, 101);
        let later = window.figures(101 + FSYNC_WINDOW_MS);
        assert_eq!((later.count, later.p99_ms), (1, 7.0));
        for _ in 0..2 * FSYNCS_KEPT {
            window.add(100 + FSYNC_WINDOW_MS, Duration::ZERO);
        }
        assert_eq!(window.figures(100 + FSYNC_WINDOW_MS).count, FSYNCS_KEPT);
    }
}
