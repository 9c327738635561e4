//! Taking a node out of traffic before something is done to it: which step comes next.
//!
//! ```text
//!  RaiseFlag ─► Ask ─► Persist? ─► Close ─► HandOver? ─► AwaitNotice ─► AwaitRequests ─► Finish
//!   None          Wants            │ readiness 503       Draining                         Drained
//!                  └► Refuse       ▼ every answer says `Connection: close`
//! ```
//!
//! At most one planned drain goes on in a cluster, and nothing replicated says whose it is. Each node raises its own
//! flag before it asks the others, so of two that begin at once at least one sees the other. The one with the
//! greater name gives way; the one with the smaller name waits until it has, since the other may have asked before it
//! could see anything. A node that cannot be reached holds nothing. A drained node goes on voting, storing the log and
//! passing on what still comes: only leadership and new traffic are taken from it.

use serde::{Deserialize, Serialize};

/// How far out of traffic a node is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// In traffic.
    #[default]
    None,
    /// It would like to drain, and asks the others; in traffic.
    Wants,
    /// Not ready any more; takes no leadership. What it has taken, and what still comes, is answered.
    Draining,
    /// As `Draining`, and what had come before the load balancers noticed was answered.
    Drained,
}

impl Mark {
    /// Every mark, in order.
    pub const ALL: [Mark; 4] = [Mark::None, Mark::Wants, Mark::Draining, Mark::Drained];

    /// Its word in answers.
    pub fn word(self) -> &'static str {
        match self {
            Mark::None => "none",
            Mark::Wants => "wants",
            Mark::Draining => "draining",
            Mark::Drained => "drained",
        }
    }

    /// Whether the node is out of traffic, or on its way out.
    pub fn is_out(self) -> bool {
        self >= Mark::Draining
    }
}

/// What the other members' marks mean for a node whose own flag is raised.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    /// Nobody else drains.
    Free,
    /// This one does, or has precedence.
    Held {
        /// Its name.
        by: String,
        /// Its mark.
        mark: Mark,
    },
    /// This one wants to as well, and gives way or has begun already: ask again.
    Contested {
        /// Its name.
        by: String,
    },
}

/// Judges the marks of the other members that answered.
pub fn claim<'a>(own_name: &str, others: impl IntoIterator<Item = (&'a str, Mark)>) -> Claim {
    let mut contested = None;
    for (name, mark) in others.into_iter().filter(|(name, _)| *name != own_name) {
        match mark {
            Mark::None => {}
            Mark::Wants if own_name < name => contested = Some(name),
            Mark::Wants | Mark::Draining | Mark::Drained => return Claim::Held { by: name.to_owned(), mark },
        }
    }
    contested.map_or(Claim::Free, |by| Claim::Contested { by: by.to_owned() })
}

/// What a cluster can lose, now and without one of its voters. A drain takes no vote away; what comes after it does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tolerance {
    /// Voters.
    pub voters: usize,
    /// How many of them must work.
    pub needed: usize,
    /// Names of those that work now.
    pub working: Vec<String>,
    /// The others, with what is wrong.
    pub not_working: Vec<String>,
    /// How many more may fail now; negative: too many have.
    pub failures_now: i64,
    /// How many more may fail once this node is stopped; negative: nothing could be written then.
    pub failures_without: i64,
}

impl Tolerance {
    /// `working`: names of the voters that work. `not_working`: one text for each other one. `leaves`: the node that is
    /// to go.
    pub fn of(working: Vec<String>, not_working: Vec<String>, leaves: &str) -> Tolerance {
        let voters = working.len() + not_working.len();
        let needed = voters / 2 + 1;
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let without = working.iter().filter(|name| *name != leaves).count();
        let (failures_now, failures_without) = (count(working.len()) - count(needed), count(without) - count(needed));
        Tolerance { voters, needed, working, not_working, failures_now, failures_without }
    }

    /// Whether the others could not go on alone.
    pub fn is_risky(&self) -> bool {
        self.failures_without < 0
    }

    /// One sentence about what would be.
    pub fn words(&self, leaves: &str) -> String {
        let rest = self.working.iter().filter(|name| *name != leaves).count();
        let ill = match self.not_working.is_empty() {
            true => String::new(),
            false => format!(" ({})", self.not_working.join("; ")),
        };
        let voters = if self.voters == 1 { "1 voter".to_owned() } else { format!("{} voters", self.voters) };
        let after = match self.failures_without {
            ..0 => "nothing could be written".to_owned(),
            0 => "no further failure could be tolerated".to_owned(),
            1 => "one more failure could be tolerated".to_owned(),
            n => format!("{n} more failures could be tolerated"),
        };
        format!("Of {voters} {} must work; without {leaves} {rest} would{ill}: {after} while it is away", self.needed)
    }
}

/// What the runner sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct View {
    /// This node's own mark.
    pub mark: Mark,
    /// The operator wants it whoever else drains and whatever it does to fault tolerance, or the process has to stop.
    pub forced: bool,
    /// The operator, or the end of the process, wants the drain undone.
    pub cancelled: bool,
    /// What the others said since the flag was raised; `None`: not asked yet.
    pub claim: Option<Answer>,
    /// The others have been asked again for long enough.
    pub waited_out: bool,
    /// Without this node the others could not go on.
    pub risky: bool,
    /// It shall outlast a restart, and that is not durable yet.
    pub to_persist: bool,
    /// Whether this node leads others.
    pub leads: bool,
    /// Every voter that could take over was asked to.
    pub handed_over: bool,
    /// The load balancers have surely noticed.
    pub noticed: bool,
    /// Requests that came before that are still under way.
    pub busy: bool,
}

/// The kind of a [`Claim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// `Claim::Free`.
    Free,
    /// `Claim::Held`.
    Held,
    /// `Claim::Contested`.
    Contested,
}

impl Claim {
    /// Its kind.
    pub fn answer(&self) -> Answer {
        match self {
            Claim::Free => Answer::Free,
            Claim::Held { .. } => Answer::Held,
            Claim::Contested { .. } => Answer::Contested,
        }
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Show the others that this node wants to drain.
    RaiseFlag,
    /// Ask every member for its mark and its health.
    Ask,
    /// Take the flag down: somebody else drains.
    RefuseHeld,
    /// Take the flag down: the others could not go on without this node.
    RefuseRisky,
    /// Note on the disk that a restart shall not end the drain.
    Persist,
    /// Be not ready from now on, and take no leadership.
    Close,
    /// Give leadership to another voter.
    HandOver,
    /// Wait until the load balancers have surely noticed.
    AwaitNotice,
    /// Wait for the requests that came before.
    AwaitRequests,
    /// Be drained.
    Finish,
    /// Go back into traffic.
    Undo,
    /// Nothing is left to do.
    Rest,
}

impl Step {
    /// Its name in a job.
    pub fn word(self) -> &'static str {
        match self {
            Step::RaiseFlag => "raising the flag",
            Step::Ask => "asking the others",
            Step::RefuseHeld | Step::RefuseRisky => "refusing",
            Step::Persist => "noting it on the disk",
            Step::Close => "leaving traffic",
            Step::HandOver => "handing over leadership",
            Step::AwaitNotice => "waiting for the load balancers",
            Step::AwaitRequests => "finishing requests",
            Step::Finish => "finishing",
            Step::Undo => "going back into traffic",
            Step::Rest => "finished",
        }
    }
}

/// The next step. Pure.
pub fn next(view: &View) -> Step {
    match view.mark {
        Mark::None if view.cancelled => Step::Rest,
        Mark::Wants | Mark::Draining if view.cancelled => Step::Undo,
        Mark::None => Step::RaiseFlag,
        Mark::Wants => match view.claim {
            None => Step::Ask,
            Some(Answer::Held) if !view.forced => Step::RefuseHeld,
            Some(Answer::Contested) if !view.forced && view.waited_out => Step::RefuseHeld,
            Some(Answer::Contested) if !view.forced => Step::Ask,
            Some(_) if !view.forced && view.risky => Step::RefuseRisky,
            Some(_) if view.to_persist => Step::Persist,
            Some(_) => Step::Close,
        },
        Mark::Draining | Mark::Drained if view.to_persist => Step::Persist,
        Mark::Draining if view.leads && !view.handed_over => Step::HandOver,
        Mark::Draining if !view.noticed => Step::AwaitNotice,
        Mark::Draining if view.busy => Step::AwaitRequests,
        Mark::Draining => Step::Finish,
        Mark::Drained => Step::Rest,
    }
}

#[cfg(test)]
#[path = "drain_tests.rs"]
mod tests;
