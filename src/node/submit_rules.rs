//! The life of a command at the node that took it, as a pure step function.
//!
//! A command waits until a leader is known, is sent there, and is sent again under the same key
//! whenever an attempt ends without an outcome, until its deadline. What may be said at the end
//! depends on what is known: "not applied" only if no attempt ended unknown and every one was
//! refused before anything was appended; everything else is "unknown". Nothing is sent again after
//! `resend_until`, because apply forgets keys some time after it.
//!
//! ```text
//!            leader known            outcome
//!   Wait ──────────────────▶ Send ────────────▶ Finish
//!    ▲  ◀── leader unknown ───┤
//!    │                        │ refused before append (NotLeader, Busy, NotSent)
//!    └──────── Pause ◀────────┘ or no outcome (connection lost, leader changed): `unknown` is noted
//! ```

use super::space::Shortage;
use crate::state::command::{CommandOutcome, Outcome, Refusal};

/// First pause before the same leader is tried again, milliseconds.
const PAUSE_MIN_MS: u64 = 5;
/// Longest pause. Below an election, so that a new leader is found soon even when its election was
/// not noticed here.
const PAUSE_MAX_MS: u64 = 100;

/// The leader as far as this node knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leader {
    /// None known.
    Unknown,
    /// This one, in this term. It may be this node.
    Node {
        /// Raft id.
        id: u64,
        /// Its term.
        term: u64,
    },
}

/// How one attempt ended.
#[derive(Clone, Debug, PartialEq)]
pub enum AttemptEnd {
    /// Applied or refused by apply, on every node alike.
    Outcome(CommandOutcome),
    /// That node does not lead, or its quorum is gone; nothing was appended.
    NotLeader,
    /// The leader's queue is full; nothing was appended.
    Busy,
    /// Too few nodes have room on their disks; nothing was appended.
    Full(Vec<Shortage>),
    /// The command never reached a handler.
    NotSent(String),
    /// Log time had passed `resend_until` when the leader took it; nothing was appended.
    Expired {
        /// Log time at the leader.
        log_time_ms: u64,
    },
    /// It may have been appended.
    Unknown(String),
}

/// What has just happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A wait or a pause is over, or the leader changed while none was being asked.
    Go,
    /// The attempt ended.
    Ended(AttemptEnd),
    /// The leader changed while an attempt was under way.
    LeaderChanged,
    /// The deadline is here; an attempt may be under way.
    Deadline,
    /// The node is stopping; an attempt may be under way.
    Stopping,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Until a leader is known.
    Wait,
    /// This long, or until the leader changes.
    Pause {
        /// Milliseconds.
        ms: u64,
    },
    /// Send the command to this node, with this `resend_until`.
    Send {
        /// Raft id of the leader.
        to: u64,
        /// Log time after which it is not sent again.
        resend_until_ms: u64,
    },
    /// The end.
    Finish(Verdict),
}

/// What the client is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Apply's outcome, and the node that led.
    Outcome(CommandOutcome, u64),
    /// Surely not applied, now or later.
    NotApplied {
        /// 429 or 503.
        status: u16,
        /// What kept it from being applied.
        why: String,
    },
    /// Surely not applied: the disks of these nodes are full.
    DiskFull(Vec<Shortage>),
    /// It may have been applied; the same key tells.
    Unknown {
        /// What is known.
        why: String,
    },
}

/// One command's memory.
#[derive(Debug)]
pub struct Life {
    resend_until_ms: u64,
    /// Milliseconds of log time that a command may be sent again, counted from when it was stamped.
    window_ms: u64,
    /// Why an attempt ended without a known outcome; the first such reason.
    unknown: Option<String>,
    sent_to: Option<u64>,
    in_flight: bool,
    refused: Option<(u16, String)>,
    pause_ms: u64,
    restamped: bool,
}

impl Life {
    /// A command taken at `log_time_ms` by this node's estimate, to be settled within `window_ms`.
    pub fn new(log_time_ms: u64, window_ms: u64) -> Life {
        Life {
            resend_until_ms: log_time_ms.saturating_add(window_ms),
            window_ms,
            unknown: None,
            sent_to: None,
            in_flight: false,
            refused: None,
            pause_ms: PAUSE_MIN_MS,
            restamped: false,
        }
    }

    /// The next step after `event`. `log_time_ms`: this node's estimate now.
    pub fn next(&mut self, event: Event, leader: Leader, log_time_ms: u64) -> Step {
        match event {
            Event::Go => self.send_or_wait(leader, log_time_ms),
            Event::LeaderChanged => {
                self.note_unknown("the leader changed before it answered");
                self.send_or_wait(leader, log_time_ms)
            }
            Event::Ended(end) => self.ended(end, leader, log_time_ms),
            Event::Deadline => self.give_up("the deadline passed before an answer came"),
            Event::Stopping => self.give_up("this node is stopping"),
        }
    }

    fn ended(&mut self, end: AttemptEnd, leader: Leader, log_time_ms: u64) -> Step {
        let sent_to = self.sent_to.unwrap_or_default();
        self.in_flight = false;
        match end {
            AttemptEnd::Outcome(outcome) => self.outcome(outcome, sent_to),
            AttemptEnd::NotLeader => self.again((503, "no node leads at present".into()), leader, log_time_ms),
            AttemptEnd::Busy => self.again((429, "the leader's queue of commands is full".into()), leader, log_time_ms),
            AttemptEnd::Full(shortages) => match self.unknown {
                // At once: nothing would be gained by waiting with the client.
                None => Step::Finish(Verdict::DiskFull(shortages)),
                // An earlier attempt may be in the log. With room again the same key still tells.
                Some(_) => self.again((507, "the disks are full".into()), leader, log_time_ms),
            },
            AttemptEnd::NotSent(why) => self.again((503, why), leader, log_time_ms),
            AttemptEnd::Expired { log_time_ms: at_leader } => self.expired(at_leader, leader),
            AttemptEnd::Unknown(why) => {
                self.in_flight = true;
                self.note_unknown(&why);
                self.pause_or_send(sent_to, leader, log_time_ms)
            }
        }
    }

    fn outcome(&mut self, outcome: CommandOutcome, sent_to: u64) -> Step {
        // An attempt that ended unknown may have been applied and its key forgotten since: then
        // "expired" is no proof.
        match (&outcome.outcome, &self.unknown) {
            (Outcome::Refused(Refusal::Expired), Some(why)) => unknown(why, "it reached the log too late"),
            (Outcome::Refused(Refusal::Expired), None) => not_applied(503, "it reached the log too late"),
            // Not recorded with the key, so an earlier attempt may still be applied later.
            (Outcome::Refused(Refusal::KeyTableFull), Some(why)) => unknown(why, "no more keys could be remembered"),
            _ => Step::Finish(Verdict::Outcome(outcome, sent_to)),
        }
    }

    /// This node's estimate of log time was behind the leader's. If nothing was ever appended, the
    /// command may be stamped anew, once.
    fn expired(&mut self, at_leader_ms: u64, leader: Leader) -> Step {
        match &self.unknown {
            Some(why) => unknown(why, "log time was past the end of its time"),
            None if self.restamped => not_applied(503, "log time runs ahead of this node"),
            None => {
                self.restamped = true;
                self.resend_until_ms = at_leader_ms.saturating_add(self.window_ms);
                self.send_or_wait(leader, at_leader_ms)
            }
        }
    }

    /// After an attempt that appended nothing.
    fn again(&mut self, why: (u16, String), leader: Leader, log_time_ms: u64) -> Step {
        self.refused = Some(why);
        self.pause_or_send(self.sent_to.unwrap_or_default(), leader, log_time_ms)
    }

    /// At once when the leader is another one than was asked, else after a pause.
    fn pause_or_send(&mut self, asked: u64, leader: Leader, log_time_ms: u64) -> Step {
        match leader {
            Leader::Node { id, .. } if id != asked => self.send_or_wait(leader, log_time_ms),
            _ => {
                let ms = self.pause_ms;
                self.pause_ms = (ms * 2).min(PAUSE_MAX_MS);
                Step::Pause { ms }
            }
        }
    }

    fn send_or_wait(&mut self, leader: Leader, log_time_ms: u64) -> Step {
        if self.sent_to.is_some() && log_time_ms > self.resend_until_ms {
            return self.give_up("it may not be sent again");
        }
        match leader {
            Leader::Unknown => {
                self.in_flight = false;
                Step::Wait
            }
            Leader::Node { id, .. } => {
                self.sent_to = Some(id);
                self.in_flight = true;
                Step::Send { to: id, resend_until_ms: self.resend_until_ms }
            }
        }
    }

    /// The attempt under way has no outcome and may still get one.
    fn note_unknown(&mut self, why: &str) {
        if self.in_flight && self.unknown.is_none() {
            self.unknown = Some(why.to_owned());
        }
        self.in_flight = false;
    }

    fn give_up(&mut self, why: &str) -> Step {
        self.note_unknown(why);
        if let Some(reason) = &self.unknown {
            return unknown(reason, why);
        }
        match self.refused.take() {
            Some((status, reason)) => not_applied(status, &reason),
            None => not_applied(503, &format!("no leader was found: {why}")),
        }
    }
}

/// `first`: why an attempt has no outcome. `last`: why there is no further one.
fn unknown(first: &str, last: &str) -> Step {
    let why = if first == last { first.to_owned() } else { format!("{first}; then {last}") };
    Step::Finish(Verdict::Unknown { why })
}

fn not_applied(status: u16, why: &str) -> Step {
    Step::Finish(Verdict::NotApplied { status, why: why.to_owned() })
}

#[cfg(test)]
#[path = "submit_rules_tests.rs"]
mod tests;
