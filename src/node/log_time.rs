//! Log time: the clock by which idempotency ids expire, the same on every node.
//!
//! It is carried by the entries. A leader stamps an entry with the last applied log time plus what
//! its own monotonic clock has counted since that was applied, and never with less than its last
//! stamp. While nothing is written it advances by at most `IDLE_STEP_MS`, so that the estimates of
//! two nodes differ by the drift of their clocks over that time only. A node that takes a command
//! estimates log time in the same way to say until when it may be sent again.

/// Most milliseconds by which log time advances between two entries. Above the request deadline, so
/// that a waiting command can expire; short enough that clocks drift apart by milliseconds only.
pub const IDLE_STEP_MS: u64 = 60_000;

/// The last applied log time, and the monotonic time of this node when it was published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Log time of the last applied entry, milliseconds.
    pub log_time_ms: u64,
    /// `clock::monotonic_ms` at that moment.
    pub at_monotonic_ms: u64,
}

/// Log time now, as well as this node can tell.
pub fn estimate(applied: Applied, now_monotonic_ms: u64) -> u64 {
    let since = now_monotonic_ms.saturating_sub(applied.at_monotonic_ms);
    applied.log_time_ms.saturating_add(since.min(IDLE_STEP_MS))
}

/// Stamps the entries of one proposer.
#[derive(Debug, Default)]
pub struct Stamper {
    last_stamp_ms: u64,
}

impl Stamper {
    /// The log time of the next entry: never below an earlier one.
    pub fn stamp(&mut self, applied: Applied, now_monotonic_ms: u64) -> u64 {
        self.last_stamp_ms = self.last_stamp_ms.max(estimate(applied, now_monotonic_ms));
        self.last_stamp_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_advances_with_the_monotonic_clock_and_never_goes_back() {
        let mut stamper = Stamper::default();
        let applied = Applied { log_time_ms: 1_000, at_monotonic_ms: 50 };
        assert_eq!(stamper.stamp(applied, 60), 1_010);
        assert_eq!(stamper.stamp(applied, 55), 1_010);
        let restarted = Applied { log_time_ms: 900, at_monotonic_ms: 1 };
        assert_eq!(stamper.stamp(restarted, 2), 1_010);
    }

    #[test]
    fn a_long_idle_time_counts_as_one_step() {
        let applied = Applied { log_time_ms: 1_000, at_monotonic_ms: 0 };
        assert_eq!(estimate(applied, 24 * 3_600_000), 1_000 + IDLE_STEP_MS);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let applied = Applied { log_time_ms: u64::MAX, at_monotonic_ms: 9 };
        assert_eq!(estimate(applied, u64::MAX), u64::MAX);
        assert_eq!(estimate(applied, 0), u64::MAX);
    }
}
