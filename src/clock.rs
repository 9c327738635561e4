//! The only place that reads the machine's clocks; the log has its own for how long its disk takes.
//!
//! Everything else takes times as numbers, so that rules about time are plain functions and tests
//! choose the time. Deadlines of waiting tasks use `tokio::time`, which is not a source of data.
#![allow(clippy::disallowed_methods)]

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since an arbitrary moment shortly before the first call in this process. Never goes
/// back and is never 0, so that 0 can stand for "never". The log counts its operations from the same moment.
pub use stemedb_raft::clock::monotonic_ms;

/// Milliseconds since 1970 by the machine's wall clock; 0 when it stands before 1970. May jump.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    u64::try_from(since).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_monotonic_clock_is_never_zero_and_never_goes_back() {
        let first = super::monotonic_ms();
        assert!(first > 0);
        assert!(super::monotonic_ms() >= first);
    }
}
