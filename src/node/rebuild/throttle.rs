//! How fast a checkpoint is fetched.
//!
//! As fast as it goes while the sender has nothing else to do; while it has clients, at most at the configured
//! rate, and below that while the others' syncs suffer (`strain`). Time that was saved is not made up for later: a burst
//! is what clients would feel.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// The rate of the moment, bytes a second. Clones share it.
#[derive(Clone, Debug)]
pub struct Pace(Arc<AtomicU64>);

impl Pace {
    /// At this rate from the next piece on.
    pub fn set(&self, bytes_per_s: u64) {
        self.0.store(bytes_per_s, Ordering::Relaxed);
    }
}

/// Holds the pace. One per pull.
#[derive(Debug)]
pub struct Throttle {
    rate_max: u64,
    pace: Pace,
    /// When the next piece may be taken.
    free_at: Option<Instant>,
    /// Whether the sender of the last piece was busy.
    was_busy: bool,
}

impl Throttle {
    /// `mb_per_s`: MB (10^6 bytes) a second while the sender is busy; 0: never wait.
    pub fn new(mb_per_s: u64) -> Throttle {
        let rate_max = mb_per_s.saturating_mul(1_000_000);
        Throttle { rate_max, pace: Pace(Arc::new(AtomicU64::new(rate_max))), free_at: None, was_busy: true }
    }

    /// The configured rate, bytes a second; 0: none.
    pub fn rate_max(&self) -> u64 {
        self.rate_max
    }

    /// Where the rate is changed meanwhile.
    pub fn shared_pace(&self) -> Pace {
        self.pace.clone()
    }

    /// Whether the cluster had clients to serve when the last piece came; true before the first.
    pub fn was_busy(&self) -> bool {
        self.was_busy
    }

    /// Waits until a piece of `bytes` fits the rate.
    pub async fn pace(&mut self, bytes: u64, busy: bool) {
        self.was_busy = busy;
        let now = Instant::now();
        let rate = self.pace.0.load(Ordering::Relaxed);
        match wait(self.free_at.map(|at| at.saturating_duration_since(now)), bytes, busy, rate) {
            None => self.free_at = None,
            Some((pause, next)) => {
                self.free_at = Some(now + next);
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }
}

/// How long to wait now, and how long from now until the next piece may be taken. Pure.
fn wait(left: Option<Duration>, bytes: u64, busy: bool, bytes_per_s: u64) -> Option<(Duration, Duration)> {
    if !busy || bytes_per_s == 0 {
        return None;
    }
    let pause = left.unwrap_or_default();
    let takes = Duration::from_micros(bytes.saturating_mul(1_000_000) / bytes_per_s);
    Some((pause, pause + takes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other_at_the_rate_and_time_is_not_saved_up() {
        let ms = Duration::from_millis;
        assert_eq!(wait(None, 1_000_000, true, 50_000_000), Some((ms(0), ms(20))));
        assert_eq!(wait(Some(ms(20)), 1_000_000, true, 50_000_000), Some((ms(20), ms(40))));
        assert_eq!(wait(Some(ms(0)), 1_000_000, true, 50_000_000), Some((ms(0), ms(20))));
        assert_eq!(wait(Some(ms(20)), 1_000_000, false, 50_000_000), None);
        assert_eq!(wait(None, 1_000_000, true, 0), None);
    }
}
