//! The log's figures, and the two log lines about its disk that operators grep for.
//!
//! The error counter always has a series for the segment in use, at 0 until something fails: a
//! series that came into being at 1 would show no increase, and the alert would stay silent.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::{IntCounter, IntCounterVec, IntGauge};

use super::Metrics;
use super::observers::WalObserver;
use super::register::Register;
use super::summary::Summary;
use crate::clock;

/// The name under which errors are counted until the log names a segment.
const FIRST_SEGMENT: &str = "segment.001.wal";

/// When an entry was repaired: before Raft started.
const AT_START: &str = "start";

/// When an entry was repaired: in the running log.
const RUNNING: &str = "running";

/// How segments are named. Syncs of the log's other files are counted too but are never "in use".
const SEGMENT_PREFIX: &str = "segment.";

/// At and above this a sync is slow: the threshold of the alert `WALFsyncSlow`.
const SLOW_FSYNC: Duration = Duration::from_millis(100);

/// A slow disk makes each sync slow; one line in this time says as much as one for each.
const SLOW_LINE_EVERY_MS: u64 = 10_000;

pub(super) struct WalMetrics {
    fsync_errors: IntCounterVec,
    fsync_total: IntCounter,
    fsync_duration: Summary,
    rotations: IntCounter,
    repaired: IntCounterVec,
    bytes: IntGauge,
    segments: IntGauge,
    segment_in_use: Mutex<String>,
    log_circumstances: AtomicBool,
    last_good_ms: AtomicU64,
    slow_line_ms: AtomicU64,
    slow_unlogged: AtomicU64,
}

impl WalMetrics {
    pub(super) fn new(register: &mut Register) -> Self {
        let metrics = WalMetrics {
            fsync_errors: register.counters(
                "stemedb_wal_fsync_errors_total",
                "Failed fsyncs of the write-ahead log. After the first one this node acknowledges nothing.",
                &["segment"],
            ),
            fsync_total: register
                .counter("stemedb_wal_fsync_total", "Fsyncs of the write-ahead log that returned well."),
            fsync_duration: register.summary(
                "stemedb_wal_fsync_duration_seconds",
                "Duration of an fsync of the write-ahead log; quantiles of the last minute.",
            ),
            rotations: register.counter("stemedb_wal_segment_rotations_total", "Segments begun."),
            repaired: register.counters(
                "stemedb_wal_repaired_entries_total",
                "Damaged entries of the write-ahead log that were written again from copies.",
                &["when"],
            ),
            bytes: register.gauge("stemedb_wal_bytes", "Bytes of the write-ahead log on disk."),
            segments: register.gauge("stemedb_wal_segments", "Segments of the write-ahead log on disk."),
            segment_in_use: Mutex::new(FIRST_SEGMENT.to_owned()),
            log_circumstances: AtomicBool::new(true),
            last_good_ms: AtomicU64::new(0),
            slow_line_ms: AtomicU64::new(0),
            slow_unlogged: AtomicU64::new(0),
        };
        metrics.fsync_errors.with_label_values(&[FIRST_SEGMENT]).inc_by(0);
        for when in [AT_START, RUNNING] {
            metrics.repaired.with_label_values(&[when]).inc_by(0);
        }
        metrics
    }

    /// Gives the segment in use its series, and takes the one of the segment before if nothing failed there.
    fn use_segment(&self, segment: &str) {
        if !segment.starts_with(SEGMENT_PREFIX) {
            return;
        }
        let mut in_use = self.segment_in_use.lock().unwrap_or_else(PoisonError::into_inner);
        if *in_use == segment {
            return;
        }
        if self.fsync_errors.with_label_values(&[in_use.as_str()]).get() == 0
            && let Err(error) = self.fsync_errors.remove_label_values(&[in_use.as_str()])
        {
            tracing::debug!(segment = in_use.as_str(), %error, "a series of the fsync errors was gone already");
        }
        self.fsync_errors.with_label_values(&[segment]).inc_by(0);
        segment.clone_into(&mut in_use);
    }

    /// Whether a line about a slow sync is due now, and how many there were since the last line.
    fn slow_line_due(&self, now_ms: u64) -> Option<u64> {
        let last = self.slow_line_ms.load(Ordering::Relaxed);
        let due = last == 0 || now_ms.saturating_sub(last) >= SLOW_LINE_EVERY_MS;
        if due && self.slow_line_ms.compare_exchange(last, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(self.slow_unlogged.swap(0, Ordering::Relaxed));
        }
        self.slow_unlogged.fetch_add(1, Ordering::Relaxed);
        None
    }
}

impl Metrics {
    /// Whether a failed fsync is followed by a line with its circumstances (`wal.log_fsync_errors`).
    pub fn set_log_fsync_errors(&self, on: bool) {
        self.wal.log_circumstances.store(on, Ordering::Relaxed);
    }

    /// So many entries were repaired before Raft started.
    pub fn wal_repaired_at_start(&self, entries: u64) {
        self.wal.repaired.with_label_values(&[AT_START]).inc_by(entries);
    }

    /// Size of the log on disk.
    pub fn set_wal(&self, bytes: u64, segments: usize) {
        self.wal.bytes.set(gauge(bytes));
        self.wal.segments.set(gauge(segments as u64));
    }
}

impl WalObserver for Metrics {
    fn fsync_done(&self, segment: &str, took: Duration) {
        let now_ms = clock::monotonic_ms();
        self.wal.use_segment(segment);
        self.wal.fsync_total.inc();
        self.wal.fsync_duration.observe(took);
        self.wal.last_good_ms.store(now_ms, Ordering::Relaxed);
        if took >= SLOW_FSYNC
            && let Some(unlogged) = self.wal.slow_line_due(now_ms)
        {
            let took_ms = took.as_millis();
            tracing::warn!(segment, unlogged, "slow fsync of WAL segment {segment}: {took_ms} ms");
        }
    }

    fn fsync_failed(&self, segment: &str, error: &io::Error) {
        self.wal.use_segment(segment);
        self.wal.fsync_errors.with_label_values(&[segment]).inc();
        tracing::error!(segment, "Failed to fsync WAL segment {segment}: fsync failed: {error}");
        if self.wal.log_circumstances.load(Ordering::Relaxed) {
            let os_error = error.raw_os_error();
            let good = self.wal.fsync_total.get();
            let last_good_ms = self.wal.last_good_ms.load(Ordering::Relaxed);
            let since_good_ms = (last_good_ms > 0).then(|| clock::monotonic_ms().saturating_sub(last_good_ms));
            tracing::error!(
                segment,
                os_error,
                good_fsyncs = good,
                ms_since_last_good = since_good_ms,
                "WAL write error: segment {segment} failed after {good} good fsyncs of this process; it is not tried \
                 again, because a second fsync may report success for data that is lost"
            );
        }
    }

    fn write_failed(&self, operation: &'static str, file: &str, error: &io::Error) {
        self.wal.use_segment(file);
        self.wal.fsync_errors.with_label_values(&[file]).inc();
        let os_error = error.raw_os_error();
        tracing::error!(
            segment = file,
            operation,
            os_error,
            "WAL write error: {operation} {file}: {error}; it is not tried again"
        );
    }

    fn segment_rotated(&self) {
        self.wal.rotations.inc();
    }

    fn entry_repaired(&self, _segment: &str, _index: u64) {
        self.wal.repaired.with_label_values(&[RUNNING]).inc();
    }
}

/// Gauges are signed.
pub(super) fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors_in(metrics: &Metrics) -> Vec<String> {
        let text = metrics.render();
        text.lines().filter(|line| line.starts_with("stemedb_wal_fsync_errors_total")).map(str::to_owned).collect()
    }

    #[test]
    fn the_segment_in_use_has_a_series_before_anything_fails() {
        let metrics = Metrics::new();
        assert_eq!(errors_in(&metrics), ["stemedb_wal_fsync_errors_total{segment=\"segment.001.wal\"} 0"]);
        metrics.fsync_done("segment.007.wal", Duration::from_millis(1));
        assert_eq!(errors_in(&metrics), ["stemedb_wal_fsync_errors_total{segment=\"segment.007.wal\"} 0"]);
        metrics.fsync_done("vote.a", Duration::from_millis(1));
        assert_eq!(errors_in(&metrics), ["stemedb_wal_fsync_errors_total{segment=\"segment.007.wal\"} 0"]);
        metrics.fsync_failed("segment.007.wal", &io::Error::from_raw_os_error(5));
        metrics.fsync_done("segment.008.wal", Duration::from_millis(1));
        assert_eq!(
            errors_in(&metrics),
            [
                "stemedb_wal_fsync_errors_total{segment=\"segment.007.wal\"} 1",
                "stemedb_wal_fsync_errors_total{segment=\"segment.008.wal\"} 0",
            ]
        );
    }

    #[test]
    fn slow_syncs_are_logged_once_in_a_while_and_counted_between() {
        let wal = WalMetrics::new(&mut Register::new());
        assert_eq!(wal.slow_line_due(1), Some(0));
        assert_eq!(wal.slow_line_due(2), None);
        assert_eq!(wal.slow_line_due(3), None);
        assert_eq!(wal.slow_line_due(1 + SLOW_LINE_EVERY_MS), Some(2));
        assert_eq!(wal.slow_line_due(2 + SLOW_LINE_EVERY_MS), None);
    }

    /// What the log shows while `act` runs, with `wanted` in it. A line that another thread writes for the first time just
    /// then may be left out for everybody, so that `act` runs again.
    fn logged(wanted: &str, act: impl Fn()) -> String {
        let mut text = String::new();
        for _ in 0..1_000 {
            let (lines, buffer) = std::sync::mpsc::channel::<u8>();
            let writer = move || Lines(lines.clone());
            let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
            tracing::subscriber::with_default(subscriber, || {
                tracing::callsite::rebuild_interest_cache();
                act();
            });
            text = String::from_utf8_lossy(&buffer.try_iter().collect::<Vec<u8>>()).into_owned();
            if text.contains(wanted) {
                break;
            }
            std::thread::yield_now();
        }
        assert!(text.contains(wanted), "{wanted:?} is not in {text:?}");
        text
    }

    struct Lines(std::sync::mpsc::Sender<u8>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            bytes.iter().for_each(|byte| self.0.send(*byte).expect("the test reads"));
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_runbooks_greps_find_the_failure_and_the_slow_sync() {
        let metrics = Metrics::new();
        let error = io::Error::from_raw_os_error(5);
        let line = "Failed to fsync WAL segment segment.001.wal: fsync failed: Input/output error (os error 5)";
        let text = logged("WAL write error", || metrics.fsync_failed("segment.001.wal", &error));
        assert!(text.contains(line) && text.contains("os_error=5"), "{text}");
        let wanted = "WAL write error: write segment.001.wal: Input/output error (os error 5)";
        logged(wanted, || metrics.write_failed("write", "segment.001.wal", &error));
        metrics.set_log_fsync_errors(false);
        let text = logged(line, || metrics.fsync_failed("segment.001.wal", &error));
        assert!(!text.contains("WAL write error"), "{text}");
        let text = logged("", || metrics.fsync_done("segment.001.wal", Duration::from_millis(99)));
        assert_eq!(text, "");
        // The line is written once in a while only: each try has figures of its own.
        let slow = || Metrics::new().fsync_done("segment.001.wal", Duration::from_millis(120));
        logged("slow fsync of WAL segment segment.001.wal: 120 ms", slow);
    }
}
