//! A node becomes a member, leaves, or takes the place of another one: which step of the leader comes next.
//!
//! ```text
//!  add      AwaitJoin ─► AwaitLog ─► Announce ─► Change ─► Finish
//!  replace  AwaitJoin ─► AwaitLog ─► Leave? ─► Announce ─► Change (the one in, the other out) ─► Finish
//!  remove                            Leave? ─► Announce ─► Change ─► Finish
//!             │ cancelled: TakeOut? ─► Undone     │ a node has failed meanwhile
//!             ▼ ▲                                 └► Withdraw, AwaitQuorum
//!            GiveUp: a learner that was to come again is at work as before
//! ```
//!
//! The intent is replicated state (`state::members`), and the members are Raft's. So the step follows from those two and
//! from who is well now; nothing else is remembered, and any leader goes on where the one before has ended. The node
//! that comes does its part by itself (`node::rebuild`): it fetches a checkpoint, starts, and asks to be sent the log.

use std::collections::BTreeSet;

use serde::Serialize;

/// A voter that lacks more of the leader's log than this does not count as working: a quorum that needs it would keep
/// every write waiting until it has caught up. So much is sent and synced by a slow disk within a few seconds, less than
/// a request waits.
pub const VOTER_LAG_ENTRIES_MAX: u64 = 10_000;
/// The same in bytes.
pub const VOTER_LAG_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Why a voter that answers does not count as working, if so. `lag`: entries and bytes of the leader's log that it has
/// not acknowledged; `None`: not known, or it needs a checkpoint.
pub fn lags(lag: Option<(u64, u64)>) -> Option<String> {
    match lag {
        None => Some("how far its log is behind is not known; it may need a checkpoint".to_owned()),
        Some((entries, bytes)) if entries > VOTER_LAG_ENTRIES_MAX || bytes > VOTER_LAG_BYTES_MAX => {
            Some(format!("its log is {entries} entries and {bytes} bytes behind"))
        }
        Some(_) => None,
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A node comes.
    #[default]
    Add,
    /// A node comes and another one leaves.
    Replace,
    /// A node leaves.
    Remove,
}

/// What the leader sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct View {
    /// What is to be done.
    pub kind: Kind,
    /// The node that comes gets no vote.
    pub learner: bool,
    /// The change of voters is announced.
    pub changing: bool,
    /// It is to be undone.
    pub cancelled: bool,
    /// A change of the members is half done: voters old and new have to agree to everything.
    pub joint: bool,
    /// The node that comes is sent the log.
    pub joined: bool,
    /// It is a learner under an id that it was given before and has given up.
    pub left_over: bool,
    /// It was to come again, and is at work under the id that it had before.
    pub at_work: bool,
    /// It has nearly all of it.
    pub near: bool,
    /// It votes.
    pub votes: bool,
    /// The one that leaves is a member still.
    pub old_is_member: bool,
    /// The one that leaves is this leader.
    pub old_leads: bool,
    /// The change would leave a quorum of working voters at each moment; see [`Outlook::refusal`].
    pub safe: bool,
}

/// What the leader does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// Wait until the node that comes asks for the log.
    AwaitJoin,
    /// Note that it does not come: it has gone back to work as it was.
    GiveUp,
    /// Wait until it has nearly all of it.
    AwaitLog,
    /// Wait until enough voters work.
    AwaitQuorum,
    /// Give leadership away: this node is to leave.
    Leave,
    /// Note that the voters are about to change.
    Announce,
    /// Note that they do not for the time being.
    Withdraw,
    /// Change the members.
    Change,
    /// Complete a change that was half done.
    Complete,
    /// Take the learner out again, or one that was left behind.
    TakeOut,
    /// Note that it is done.
    Finish,
    /// Note that it is undone.
    Undone,
}

impl Step {
    /// What the job shows.
    pub fn word(self) -> &'static str {
        match self {
            Step::AwaitJoin => "waiting for the node to fetch a checkpoint and to join",
            Step::GiveUp => "giving up: the node is at work as before",
            Step::AwaitLog => "catching up",
            Step::AwaitQuorum => "waiting for enough working voters",
            Step::Leave => "handing over leadership",
            Step::Announce => "announcing the change of voters",
            Step::Withdraw => "putting the change of voters off",
            Step::Change => "changing the members",
            Step::Complete => "completing the change of the members",
            Step::TakeOut => "taking a learner out again",
            Step::Finish => "finishing",
            Step::Undone => "undoing",
        }
    }
}

/// The next step. Pure.
pub fn next(view: &View) -> Step {
    if view.joint {
        return Step::Complete;
    }
    let has_come = match view.kind {
        Kind::Remove => true,
        Kind::Add | Kind::Replace if view.learner => view.joined && view.near,
        Kind::Add | Kind::Replace => view.votes,
    };
    let has_left = view.kind == Kind::Add || !view.old_is_member;
    // Nobody who leaves may do so unannounced: its rebuild could bring it back.
    let announced = view.changing || (view.kind == Kind::Add && view.learner);
    let undoes = view.cancelled && !view.changing;
    if has_come && has_left && announced && !undoes {
        return if view.left_over { Step::TakeOut } else { Step::Finish };
    }
    if undoes {
        return if (view.joined && !view.votes) || view.left_over { Step::TakeOut } else { Step::Undone };
    }
    if view.kind != Kind::Remove && !view.joined {
        let gave_up = view.at_work && view.kind == Kind::Add && view.learner;
        return if gave_up && !view.changing { Step::GiveUp } else { Step::AwaitJoin };
    }
    if view.kind != Kind::Remove && !view.near && !view.votes {
        return if view.changing { Step::Withdraw } else { Step::AwaitLog };
    }
    // A learner that comes alone is done once it has the log.
    if view.kind == Kind::Add && view.learner {
        return Step::AwaitLog;
    }
    match (view.safe, view.changing) {
        (false, true) => Step::Withdraw,
        (false, false) => Step::AwaitQuorum,
        (true, _) if view.old_leads => Step::Leave,
        (true, false) => Step::Announce,
        (true, true) => Step::Change,
    }
}

/// What a change of voters does to fault tolerance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outlook {
    /// Names of the voters now.
    pub voters_now: Vec<String>,
    /// Names of the voters afterwards.
    pub voters_after: Vec<String>,
    /// How many must work now, and afterwards.
    pub needed_now: usize,
    /// The same afterwards.
    pub needed_after: usize,
    /// Which of all these do not work, with what is wrong.
    pub not_working: Vec<String>,
    /// How many more may fail now; negative: too many have.
    pub failures_now: i64,
    /// While the voters change, when the ones before and the ones afterwards have to agree.
    pub failures_during: i64,
    /// Afterwards.
    pub failures_after: i64,
}

/// Voters, and whether each works.
pub struct Voters {
    /// Names of the voters now.
    pub now: BTreeSet<String>,
    /// Who comes as a voter.
    pub comes: Option<String>,
    /// Who leaves.
    pub leaves: Option<String>,
    /// Name and complaint of those that do not work.
    pub ill: Vec<(String, String)>,
}

impl Outlook {
    /// What `voters` amount to.
    pub fn of(voters: Voters) -> Outlook {
        let Voters { now, comes, leaves, ill } = voters;
        let mut after = now.clone();
        after.extend(comes);
        after.retain(|name| Some(name) != leaves.as_ref());
        let failures = |set: &BTreeSet<String>| {
            let working = set.iter().filter(|name| ill.iter().all(|(ill, _)| ill != *name)).count();
            count(working) - count(set.len() / 2 + 1)
        };
        let (failures_now, failures_after) = (failures(&now), failures(&after));
        Outlook {
            needed_now: now.len() / 2 + 1,
            needed_after: after.len() / 2 + 1,
            not_working: ill.iter().map(|(name, why)| format!("{name}: {why}")).collect(),
            failures_now,
            failures_during: failures_now.min(failures_after),
            failures_after,
            voters_now: now.into_iter().collect(),
            voters_after: after.into_iter().collect(),
        }
    }

    /// Why the voters must not change so now, if so. `forced`: fault tolerance may be lost, a quorum never.
    pub fn refusal(&self, kind: Kind, forced: bool) -> Option<String> {
        if self.voters_after.is_empty() {
            return Some("it is the last voter: without it there is no database".to_owned());
        }
        if self.failures_during < 0 {
            return Some(format!("{}: nothing could be written", self.words()));
        }
        match kind {
            // Whoever comes was seen to work: then neither of the two can lower it.
            Kind::Add | Kind::Replace => {
                (self.failures_during < self.failures_now).then(|| format!("{}: less than now", self.words()))
            }
            Kind::Remove if self.failures_after < self.failures_now && self.failures_after < 1 && !forced => {
                Some(format!("{}: no further failure could be tolerated", self.words()))
            }
            Kind::Remove => None,
        }
    }

    /// One sentence: what can fail now and afterwards.
    pub fn words(&self) -> String {
        let ill = match self.not_working.is_empty() {
            true => String::new(),
            false => format!(" ({})", self.not_working.join("; ")),
        };
        let (now, after) = (self.voters_now.len(), self.voters_after.len());
        format!(
            "Of {now} {} {} must work now and {} more may fail; afterwards {} of {after} must work and {} more may \
             fail{ill}",
            if now == 1 { "voter" } else { "voters" },
            self.needed_now,
            shown(self.failures_now),
            self.needed_after,
            shown(self.failures_after),
        )
    }
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn shown(failures: i64) -> String {
    match failures {
        ..0 => "no (too few work already)".to_owned(),
        0 => "no".to_owned(),
        n => n.to_string(),
    }
}

#[cfg(test)]
#[path = "member_tests.rs"]
mod tests;
