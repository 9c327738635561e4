//! Keeps a library from saying the same thing hundreds of times a second.
//!
//! While a peer is away Raft reports it with every entry that is committed: an hour of that is millions of lines, on the
//! day on which somebody has to read the log. Each place in the library's code may say [`LINES_MAX`] lines within
//! [`WINDOW_MS`]; the rest is counted (`stemedb_log_lines_suppressed_total`). Own lines always pass.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tracing::callsite::Identifier;
use tracing::{Event, Metadata};
use tracing_subscriber::layer::{Context, Filter};

use crate::clock;

/// Lines of one place that pass within a window.
const LINES_MAX: u32 = 5;

/// Length of a window, milliseconds.
const WINDOW_MS: u64 = 10_000;

/// Whose repeated lines are left out.
const WHOSE: &str = "openraft";

static SUPPRESSED: AtomicU64 = AtomicU64::new(0);

/// Lines left out since the process started.
pub fn suppressed_total() -> u64 {
    SUPPRESSED.load(Ordering::Relaxed)
}

/// Lets the first lines of each place through.
#[derive(Debug, Default)]
pub struct Repeats {
    /// For each place the beginning of its window, monotonic milliseconds, and the lines within it. As many as the
    /// library has places that log.
    places: Mutex<HashMap<Identifier, (u64, u32)>>,
}

impl Repeats {
    fn passes(&self, place: Identifier, now_ms: u64) -> bool {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let (began_ms, lines) = places.entry(place).or_insert((now_ms, 0));
        if now_ms.saturating_sub(*began_ms) >= WINDOW_MS {
            (*began_ms, *lines) = (now_ms, 0);
        }
        *lines = lines.saturating_add(1);
        *lines <= LINES_MAX
    }
}

impl<S> Filter<S> for Repeats {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if !metadata.target().starts_with(WHOSE) || self.passes(metadata.callsite(), clock::monotonic_ms()) {
            return true;
        }
        SUPPRESSED.fetch_add(1, Ordering::Relaxed);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_may_repeat_itself_a_little_in_each_window() {
        struct Site;
        impl tracing::callsite::Callsite for Site {
            fn set_interest(&self, _: tracing::subscriber::Interest) {}
            fn metadata(&self) -> &Metadata<'_> {
                unreachable!("not asked here")
            }
        }
        static ONE: (u8, Site) = (1, Site);
        static OTHER: (u8, Site) = (2, Site);
        let id = |site: &'static (u8, Site)| tracing::callsite::Identifier(&site.1);
        let repeats = Repeats::default();
        let passed = |site, at| (0..100).filter(|_| repeats.passes(id(site), at)).count();
        assert_eq!(passed(&ONE, 50), 5);
        assert_eq!(passed(&ONE, 50 + WINDOW_MS - 1), 0);
        assert_eq!(passed(&OTHER, 60), 5, "another place has a window of its own");
        assert_eq!(passed(&ONE, 50 + WINDOW_MS), 5);
    }
}
