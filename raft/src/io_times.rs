//! What the disk is busy with, and how long its syncs take.
//!
//! A watchdog on a thread of its own must see that a sync hangs while the thread that called it can say nothing.
//! So whoever changes a file registers the operation before and takes it back after ([`guard`]); the lock that
//! guards the list is never held across I/O. One [`IoTimes`] serves a whole process: the log registers here by
//! itself, the tree, checkpoints and identity files do so with [`guard`]. Reads of the tree are too many for a list: each
//! thread counts its own ([`IoTimes::row`]), and whoever looks twice and finds the same count of a thread knows that its
//! read hangs. Per thread, because a thread reads one row at a time: of a count that readers share, a read from memory
//! that ends would hide another one that hangs.

use std::{
    cell::RefCell,
    collections::VecDeque,
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
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
    threads: Mutex<Vec<ThreadSeen>>,
}

/// Reads of rows by one thread, as they were last looked at.
#[derive(Debug)]
struct ThreadSeen {
    /// The thread holds it too, as long as it lives.
    count: Arc<AtomicU64>,
    operation: &'static str,
    file: &'static str,
    /// The count that was seen while a read was under way, and since when.
    seen: Option<(u64, u64)>,
}

/// What a thread counts in: another number with each read; the lowest bit says whether one is under way.
type RowCount = Rc<Arc<AtomicU64>>;

const UNDER_WAY: u64 = 1;

thread_local! {
    /// The counts of this thread: one for each process's worth of [`IoTimes`], of which there are several in tests only.
    static ROW_COUNTS: RefCell<Vec<(Weak<IoTimes>, RowCount)>> = const { RefCell::new(Vec::new()) };
}

/// The read of a row ends when it is dropped. It does not leave its thread.
#[must_use = "the read counts as ended when this is dropped"]
pub struct RowGuard {
    /// `None`: the thread is ending, and counts no more.
    count: Option<RowCount>,
    /// A read within a read: that one goes on.
    within: bool,
}

impl Drop for RowGuard {
    fn drop(&mut self) {
        if let Some(count) = self.count.as_ref().filter(|_| !self.within) {
            count.fetch_and(!UNDER_WAY, Ordering::Relaxed);
        }
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

    /// This thread reads a row, until the answer is dropped: for example `read` of `kv/tables`. Costs a few steps in
    /// what the thread alone uses; only the first one of a thread takes a lock.
    pub fn row(self: &Arc<Self>, operation: &'static str, file: &'static str) -> RowGuard {
        let Some(count) = self.row_count(operation, file) else { return RowGuard { count: None, within: false } };
        // Nobody else writes it.
        let last = count.load(Ordering::Relaxed);
        count.store((last | UNDER_WAY).wrapping_add(1) | UNDER_WAY, Ordering::Relaxed);
        RowGuard { count: Some(count), within: last & UNDER_WAY != 0 }
    }

    /// The count of this thread.
    fn row_count(self: &Arc<Self>, operation: &'static str, file: &'static str) -> Option<RowCount> {
        let counts = ROW_COUNTS.try_with(|counts| {
            let mut counts = counts.borrow_mut();
            if let Some((_, count)) = counts.iter().find(|(times, _)| std::ptr::eq(times.as_ptr(), Arc::as_ptr(self))) {
                return Rc::clone(count);
            }
            counts.retain(|(times, _)| times.strong_count() > 0);
            let count = Arc::<AtomicU64>::default();
            let mut threads = self.all_threads();
            threads.retain(ThreadSeen::lives);
            threads.push(ThreadSeen { count: Arc::clone(&count), operation, file, seen: None });
            let count = Rc::new(count);
            counts.push((Arc::downgrade(self), Rc::clone(&count)));
            count
        });
        counts.ok()
    }

    fn all_threads(&self) -> MutexGuard<'_, Vec<ThreadSeen>> {
        // As with `running`.
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The operation that has been going on for the longest time, those that somebody waits for first.
    pub fn oldest(&self) -> Option<IoInFlight> {
        self.all().into_iter().min_by_key(|io| (io.waits, io.since_ms))
    }

    /// Everything that is under way, in no order. Of the read of a row: since it was first seen so.
    pub fn all(&self) -> Vec<IoInFlight> {
        let mut all: Vec<IoInFlight> = self.running().iter().map(|(_, io)| io.clone()).collect();
        let mut threads = self.all_threads();
        if !threads.is_empty() {
            let now_ms = monotonic_ms();
            threads.retain(ThreadSeen::lives);
            all.extend(threads.iter_mut().filter_map(|thread| thread.look(now_ms)));
        }
        all
    }
}

impl ThreadSeen {
    /// Whether the thread has not ended. One that hangs has not.
    fn lives(&self) -> bool {
        Arc::strong_count(&self.count) > 1
    }

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

    const ROW: (&str, &str) = ("read", "kv/tables");

    /// Since when each read of a row is seen, looked at then.
    fn look(times: &IoTimes, now_ms: u64) -> Vec<u64> {
        let mut threads = times.all_threads();
        threads.iter_mut().filter_map(|thread| thread.look(now_ms)).map(|io| io.since_ms).collect()
    }

    #[test]
    fn a_row_hangs_when_two_looks_find_the_same_read() {
        let times = Arc::new(IoTimes::default());
        assert_eq!(times.all(), []);
        let first = times.row(ROW.0, ROW.1);
        assert_eq!((look(&times, 100), look(&times, 110)), (vec![100], vec![100]));
        drop(first);
        let second = times.row(ROW.0, ROW.1);
        assert_eq!(look(&times, 120), [120], "another read is none that hangs");
        drop(second);
        assert_eq!(look(&times, 130), []);
        let third = times.row(ROW.0, ROW.1);
        assert_eq!(look(&times, 140), [140], "nothing of the one before is left");
        drop(times.row(ROW.0, ROW.1));
        assert_eq!(look(&times, 150), [150], "the end of a read within it does not end it");
        assert_eq!(times.oldest().map(|io| (io.operation, io.file)), Some((ROW.0, ROW.1.into())));
        assert_eq!(look(&Arc::default(), 150), [], "nor is it of another process's disk");
        drop(third);
        assert_eq!(times.all(), []);
    }

    #[test]
    fn reads_of_other_threads_do_not_hide_one_that_hangs() {
        let times = Arc::new(IoTimes::default());
        let hangs = times.row(ROW.0, ROW.1);
        for now_ms in [100, 110, 120] {
            let of_another = Arc::clone(&times);
            std::thread::spawn(move || drop(of_another.row(ROW.0, ROW.1))).join().expect("it ends well");
            assert_eq!(look(&times, now_ms), [100]);
        }
        assert_eq!(times.all().len(), 1);
        assert_eq!(times.all_threads().len(), 1, "threads that have ended are forgotten");
        drop(hangs);
        assert_eq!(times.all(), []);
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
