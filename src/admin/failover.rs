//! Moving leadership on command: who may take over, and which step comes next.
//!
//! ```text
//!  choose ─► Trigger ─► Await ─► Confirm ─► Done
//!               ▲ next    │ deadline passed
//!               └─────────┤
//!                         └► AwaitElection ─► Confirm ─► Done
//! ```
//!
//! A transfer that was begun cannot be taken back: the leader has given its lease up and refuses writes. So who takes
//! over is looked at before, a candidate that does not take over in time is followed by the next one, and after the
//! last one an election decides. Writes wait in the park meanwhile.

use super::drain::Mark;

/// A log this far behind is sent and synced well within the deadline of a transfer.
pub const LAG_ENTRIES_MAX: u64 = 1_000;
/// The same in bytes: less than a tenth of a second of a slow disk.
pub const LAG_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// What is known of another member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Other {
    /// Raft id.
    pub id: u64,
    /// Name.
    pub name: String,
    /// Whether it votes.
    pub voter: bool,
    /// Why it did not answer, if so.
    pub silent: Option<String>,
    /// Why it would not take leadership over, by its own word.
    pub may_not_lead: Option<String>,
    /// How far out of traffic it is.
    pub drain: Mark,
    /// Entries and bytes of the leader's log that it has not acknowledged; `None`: not known, or it needs a
    /// checkpoint.
    pub lag: Option<(u64, u64)>,
}

/// Why a member is not fit to lead now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// It has no vote.
    #[error("it is a learner: it receives the log and has no vote")]
    Learner,
    /// It did not answer.
    #[error("it does not answer ({0})")]
    Silent(String),
    /// It is out of traffic.
    #[error("it is {}; undrain it first", .0.word())]
    Drained(Mark),
    /// It would refuse.
    #[error("{0}")]
    Unwell(String),
    /// Its log is too far behind.
    #[error(
        "its log is {entries} entries and {bytes} bytes behind, and at most {LAG_ENTRIES_MAX} and {LAG_BYTES_MAX} are \
         caught up with quickly"
    )]
    Lags {
        /// Entries.
        entries: u64,
        /// Bytes.
        bytes: u64,
    },
    /// How far it is behind is not known.
    #[error("how far its log is behind is not known; it may need a checkpoint")]
    LagUnknown,
}

/// Why a failover was not begun. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The target is no member.
    #[error("there is no member {name:?}; the members are {}", members.join(", "))]
    Unknown {
        /// The name given.
        name: String,
        /// The names there are.
        members: Vec<String>,
    },
    /// The target leads already.
    #[error("{0} is the leader already")]
    AlreadyLeads(String),
    /// There is nobody else.
    #[error("{0} is the only voter: nobody could take leadership over")]
    OnlyVoter(String),
    /// The target is not fit.
    #[error("{name} cannot take leadership over: {why}")]
    Target {
        /// Its name.
        name: String,
        /// Why not.
        why: Unfit,
    },
    /// Nobody is fit.
    #[error("no voter can take leadership over: {}", each(.0))]
    Nobody(Vec<(String, Unfit)>),
}

fn each(unfit: &[(String, Unfit)]) -> String {
    unfit.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join("; ")
}

/// Whether a member may take leadership over now.
pub fn fitness(other: &Other) -> Result<(), Unfit> {
    match other {
        Other { voter: false, .. } => Err(Unfit::Learner),
        Other { silent: Some(why), .. } => Err(Unfit::Silent(why.clone())),
        Other { drain, .. } if drain.is_out() => Err(Unfit::Drained(*drain)),
        Other { may_not_lead: Some(why), .. } => Err(Unfit::Unwell(why.clone())),
        Other { lag: None, .. } => Err(Unfit::LagUnknown),
        Other { lag: Some((entries, bytes)), .. } if *entries > LAG_ENTRIES_MAX || *bytes > LAG_BYTES_MAX => {
            Err(Unfit::Lags { entries: *entries, bytes: *bytes })
        }
        Other { .. } => Ok(()),
    }
}

/// Ids of those to ask, one after the other: the target first, then whoever lacks least. `others`: every member but
/// the leader `own`.
pub fn choose(own: &str, others: &[Other], target: Option<&str>) -> Result<Vec<u64>, Refusal> {
    if target == Some(own) {
        return Err(Refusal::AlreadyLeads(own.to_owned()));
    }
    let named = match target {
        None => None,
        Some(name) => match others.iter().find(|other| other.name == name) {
            None => {
                let mut members: Vec<String> = others.iter().map(|other| other.name.clone()).collect();
                members.push(own.to_owned());
                members.sort();
                return Err(Refusal::Unknown { name: name.to_owned(), members });
            }
            Some(other) => Some(other),
        },
    };
    if let Some(other) = named {
        fitness(other).map_err(|why| Refusal::Target { name: other.name.clone(), why })?;
    }
    if !others.iter().any(|other| other.voter) {
        return Err(Refusal::OnlyVoter(own.to_owned()));
    }
    let mut fit: Vec<&Other> = others.iter().filter(|other| fitness(other).is_ok()).collect();
    if fit.is_empty() {
        let why = others.iter().filter_map(|other| Some((other.name.clone(), fitness(other).err()?)));
        return Err(Refusal::Nobody(why.collect()));
    }
    fit.sort_by_key(|other| (named.is_some_and(|named| named.id != other.id), other.lag, other.id));
    Ok(fit.into_iter().map(|other| other.id).collect())
}

/// What the runner sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct View {
    /// Whether this node still leads the term in which the flow began.
    pub leads: bool,
    /// Another node is known to lead.
    pub elsewhere: bool,
    /// That one has said, with a majority behind it, that it takes writes.
    pub confirmed: bool,
    /// This node leads again, in another term.
    pub came_back: bool,
    /// Candidates that were not asked yet.
    pub left: usize,
    /// One was asked.
    pub triggered: bool,
    /// It did not take over in time.
    pub missed: bool,
    /// The time for all of it is over.
    pub over: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Ask the next candidate to take over.
    Trigger,
    /// Wait for it.
    Await,
    /// Wait for an election.
    AwaitElection,
    /// Ask the new leader whether it takes writes.
    Confirm,
    /// Another node leads.
    Done,
    /// It did not work; whoever leads, leads.
    GiveUp,
}

impl Step {
    /// Its name in a job.
    pub fn word(self) -> &'static str {
        match self {
            Step::Trigger => "asking a candidate",
            Step::Await => "waiting for it",
            Step::AwaitElection => "waiting for an election",
            Step::Confirm => "asking the new leader",
            Step::Done => "finished",
            Step::GiveUp => "giving up",
        }
    }
}

/// The next step. Pure.
pub fn next(view: &View) -> Step {
    match view {
        View { elsewhere: true, confirmed: true, .. } => Step::Done,
        View { over: true, .. } => Step::GiveUp,
        View { elsewhere: true, .. } => Step::Confirm,
        View { came_back: true, .. } => Step::GiveUp,
        View { triggered: true, missed: false, .. } => Step::Await,
        View { leads: true, left: 1.., .. } => Step::Trigger,
        View { .. } => Step::AwaitElection,
    }
}

#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
