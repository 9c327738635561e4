//! Log time: the clock by which idempotency ids expire, the same on every node.
//!
//! It is carried by the entries. A leader stamps an entry with its own estimate of log time, and never with less than
//! its last stamp of the same term. Each node estimates: from the last applied log time on with its own monotonic clock.
//! A node that takes a command says by that estimate until when it may be sent again.
//!
//! The estimates have to agree, because a leader refuses a command whose time has passed by its own, and then a command of
//! which an attempt ended without an answer has an unknown outcome for ever. Two things keep them together:
//!
//! - An entry is applied some time after it was stamped, on each node. An estimate that began anew with each entry would
//!   lose that time: under load log time would nearly stand still, except on a node that is cut off. So an estimate goes on,
//!   and entries only hold it: not below what they say, and not above it by more than `AHEAD_MS_MAX`.
//! - What a leader has stamped and nobody has committed is forgotten with its term.
//!
//! A node that applies nothing, because it has no core or its core has ended, would soon stamp what it takes with a time
//! that has passed. It hears log time from the leader that refuses such a command ([`Estimate::hear`]). What was heard goes
//! into commands only, until an entry is applied: stamps of entries come from entries.
//!
//! While nothing is written log time advances by at most `IDLE_STEP_MS`, so that the estimates of two nodes differ by the
//! drift of their clocks over that time only.

/// Most milliseconds by which log time advances between two entries. Above the request deadline, so
/// that a waiting command can expire; short enough that clocks drift apart by milliseconds only.
pub const IDLE_STEP_MS: u64 = 60_000;

/// Most milliseconds by which an estimate is ahead of an entry that has just been applied: above the time from its stamp
/// to here, even on slow disks, and far below a request deadline.
pub const AHEAD_MS_MAX: u64 = 1_000;

/// The last applied log time, and the monotonic time of this node when it was published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Log time of the last applied entry, milliseconds.
    pub log_time_ms: u64,
    /// `clock::monotonic_ms` at that moment.
    pub at_monotonic_ms: u64,
}

/// Log time `now`, going on from `from`.
fn go_on(from: Applied, now_monotonic_ms: u64) -> u64 {
    let since = now_monotonic_ms.saturating_sub(from.at_monotonic_ms);
    from.log_time_ms.saturating_add(since.min(IDLE_STEP_MS))
}

/// Log time as one node estimates it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Estimate {
    /// Of the last applied entry that moved it.
    applied_ms: u64,
    /// The estimate at that moment.
    from: Applied,
    /// What a leader has said since, and when.
    heard: Option<Applied>,
}

impl Estimate {
    /// Log time now. `applied`: the newest that was published; a publication without an entry that has a time, such as
    /// the first one of a leader, changes nothing.
    pub fn now(&mut self, applied: Applied, now_monotonic_ms: u64) -> u64 {
        if applied.log_time_ms > self.applied_ms {
            let at_monotonic_ms = applied.at_monotonic_ms;
            let most = applied.log_time_ms.saturating_add(AHEAD_MS_MAX);
            let log_time_ms = go_on(self.from, at_monotonic_ms).clamp(applied.log_time_ms, most);
            let from = Applied { log_time_ms, at_monotonic_ms };
            *self = Estimate { applied_ms: applied.log_time_ms, from, heard: None };
        }
        go_on(self.from, now_monotonic_ms)
    }

    /// The same for a command that this node takes.
    pub fn for_command(&mut self, applied: Applied, now_monotonic_ms: u64) -> u64 {
        let own_ms = self.now(applied, now_monotonic_ms);
        self.heard.map_or(own_ms, |heard| own_ms.max(go_on(heard, now_monotonic_ms)))
    }

    /// A leader has said what log time is.
    pub fn hear(&mut self, log_time_ms: u64, now_monotonic_ms: u64) {
        if self.heard.is_none_or(|heard| go_on(heard, now_monotonic_ms) < log_time_ms) {
            self.heard = Some(Applied { log_time_ms, at_monotonic_ms: now_monotonic_ms });
        }
    }
}

/// Stamps the entries of one proposer.
#[derive(Debug, Default)]
pub struct Stamper {
    term: u64,
    last_stamp_ms: u64,
}

impl Stamper {
    /// The log time of the next entry, by the estimate of this moment: never below an earlier one of the same term.
    pub fn stamp(&mut self, term: u64, estimate_ms: u64) -> u64 {
        if self.term != term {
            *self = Stamper { term, last_stamp_ms: 0 };
        }
        self.last_stamp_ms = self.last_stamp_ms.max(estimate_ms);
        self.last_stamp_ms
    }
}

#[cfg(test)]
#[path = "log_time_tests.rs"]
mod tests;
