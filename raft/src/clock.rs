//! The only place of this crate that reads the clock: how long disk operations take is real time, even on a
//! simulated disk. Nothing that is written depends on it.
#![allow(clippy::disallowed_methods)]

use std::{sync::OnceLock, time::Instant};

/// Now, for deadlines and durations.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Milliseconds since an arbitrary moment shortly before the first call in this process. Never goes
/// back and is never 0, so that 0 can stand for "never".
pub fn monotonic_ms() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed().as_millis();
    u64::try_from(elapsed).unwrap_or(u64::MAX - 1).saturating_add(1)
}
