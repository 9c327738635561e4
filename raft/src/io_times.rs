//! What the disk is busy with, and how long its syncs take.
//!
//! A watchdog on a thread of its own must see that a sync hangs while the thread that called it can say nothing.
//! So whoever changes a file registers the operation before and takes it back after ([`guard`]); the lock that
//! guards the list is never held across I/O. One [`IoTimes`] serves a whole process: the log registers here by
//! itself, the tree, checkpoints and identity files do so with [`guard`].

use std::{
    collections::VecDeque,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::clock::monotonic_ms;

/// Syncs older than this say nothing about the disk of now.
pub const FSYNC_WINDOW_MS: u64 = 10_000;

/// The newest syncs that are kept: enough for a 99th percentile, and a window of seconds when the disk is slow.
const FSYNCS_KEPT: usize = 1024;

/// An operation that has begun and not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoInFlight {
    /// What is being done: `write`, `sync`, `rename`, `unlink`, `read` and so on.
    pub operation: &'static str,
    /// File name, for example `segment.001.wal`.
    pub file: String,
    /// When it began, on the scale of [`monotonic_ms`].
    pub since_ms: u64,
    /// Nobody waits for it yet: preparing a spare segment, flushing the tree. It may take long on a healthy disk.
    pub background: bool,
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
}

/// Takes the operation back when it is dropped.
#[must_use = "the operation counts as ended when this is dropped"]
pub struct IoGuard<'a> {
    times: &'a IoTimes,
    id: u64,
}

/// Registers an operation that somebody waits for, until the answer is dropped.
pub fn guard<'a>(times: &'a IoTimes, operation: &'static str, file: &str) -> IoGuard<'a> {
    times.enter(operation, file, false)
}

impl IoTimes {
    /// Registers an operation; see [`IoInFlight::background`].
    pub fn enter(&self, operation: &'static str, file: &str, background: bool) -> IoGuard<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let io = IoInFlight { operation, file: file.to_owned(), since_ms: monotonic_ms(), background };
        self.running().push((id, io));
        IoGuard { times: self, id }
    }

    fn running(&self) -> MutexGuard<'_, Vec<(u64, IoInFlight)>> {
        // Changed by single calls that do not panic half way; a poisoned list is still whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The operation that has been going on for the longest time, those that somebody waits for first.
    pub fn oldest(&self) -> Option<IoInFlight> {
        let running = self.running();
        running.iter().map(|(_, io)| io).min_by_key(|io| (io.background, io.since_ms)).cloned()
    }

    /// Everything that is under way, in no order.
    pub fn all(&self) -> Vec<IoInFlight> {
        self.running().iter().map(|(_, io)| io.clone()).collect()
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
        let spare = times.enter("sync", "segment.spare", true);
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
