//! Who is to become a member and who is to leave: part of the replicated state.
//!
//! One such intent goes on in a cluster at a time. It is a row and no task of some node: whoever leads goes on with it,
//! and every node can tell of it. The voters themselves are changed by Raft; the intent says why, and keeps the
//! change apart from rebuilds, which change voters too. Each rule sees the two books and log time only, so every replica
//! decides alike.
//!
//! ```text
//!  Begin ─► TakePlace (the node that comes has asked; its Raft id is fresh) ─► Announce ─► voters change ─► End
//!    └────────────────────────────── Cancel ──► End                            └► Withdraw
//! ```

use serde::{Deserialize, Serialize};
use stemedb_raft::codec::{self, CodecError};

use super::command::{MemberCommand, RebuildCommand, Refusal};
use super::permits;
use super::record::{RECORD_FORMAT, Reader, RecordError};

/// Ended intents that are kept for whoever asks.
pub const ENDED_MAX: usize = 64;
/// Raft ids of removed members that are remembered, so that a node which comes back learns that it was removed.
pub const REMOVED_MAX: usize = 256;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// A node comes.
    Add {
        /// It gets no vote, now or later.
        learner: bool,
    },
    /// A node comes in the place of another one, which leaves in the same change.
    Replace {
        /// Name of the one that leaves.
        old: String,
        /// The one that leaves had no vote, and neither gets the one that comes.
        learner: bool,
    },
    /// A node leaves.
    Remove,
}

impl Change {
    /// The kind of the job.
    pub fn word(&self) -> &'static str {
        match self {
            Change::Add { .. } => "member-add",
            Change::Replace { .. } => "member-replace",
            Change::Remove => "member-remove",
        }
    }
}

/// What a node that comes was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The node's own number for its way in. Another number is another way: it starts over under another id.
    pub node_job: u128,
    /// Its Raft id.
    pub fresh_id: u64,
}

/// A change of the members that an operator has ordered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Number of the job.
    pub job: u128,
    /// What is to be done.
    pub change: Change,
    /// Name of the node that comes, or of the one that leaves when none comes.
    pub name: String,
    /// `host:port` of the peer listener of the node that comes.
    pub peer_addr: String,
    /// `host:port` of its HTTP listener.
    pub http_addr: String,
    /// Fault tolerance may become less.
    pub forced: bool,
    /// Who ordered it, and where.
    pub cause: String,
    /// When, Unix milliseconds.
    pub began_unix_ms: u64,
    /// What the node that comes was given, once it has asked.
    pub place: Option<Place>,
    /// Every Raft id of the node that leaves, as of the announcement.
    pub leaves: Vec<u64>,
    /// The voters are about to change. No rebuild is granted meanwhile, and nothing is cancelled any more.
    pub changing: bool,
    /// It is to be undone.
    pub cancelled: bool,
}

impl Intent {
    /// Name of the node that leaves, if one does.
    pub fn leaving(&self) -> Option<&str> {
        match &self.change {
            Change::Add { .. } => None,
            Change::Replace { old, .. } => Some(old),
            Change::Remove => Some(&self.name),
        }
    }

    /// Name of the node that comes, if one does.
    pub fn coming(&self) -> Option<&str> {
        (self.change != Change::Remove).then_some(&*self.name)
    }

    /// Whether the node that comes gets no vote.
    pub fn stays_learner(&self) -> bool {
        matches!(self.change, Change::Add { learner: true } | Change::Replace { learner: true, .. })
    }
}

/// How an intent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// It was done.
    Finished,
    /// It was undone.
    Cancelled,
}

/// An intent that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The intent as it was.
    pub intent: Intent,
    /// How.
    pub end: End,
    /// One sentence.
    pub detail: String,
    /// When, Unix milliseconds.
    pub ended_unix_ms: u64,
}

/// A Raft id that is no member's any more, and never will be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// The id.
    pub id: u64,
    /// Name of its node.
    pub name: String,
    /// Name of the node that came in its place, if one did.
    pub replaced_by: Option<String>,
    /// When, Unix milliseconds.
    pub at_unix_ms: u64,
}

/// The row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberBook {
    /// What goes on.
    pub current: Option<Intent>,
    /// What has ended, the newest last.
    pub ended: Vec<Ended>,
    /// Who was removed, the newest last.
    pub removed: Vec<Removed>,
}

fn void(job: u128) -> Refusal {
    Refusal::MembersVoid { job }
}

impl MemberBook {
    /// Reads the row; the empty book when there is none.
    pub fn decode(row: Option<&[u8]>) -> Result<MemberBook, RecordError> {
        let Some(row) = row else { return Ok(MemberBook::default()) };
        let mut read = Reader::new("members", row)?;
        codec::decode(read.rest()).map_err(|_| RecordError::Damaged { what: "members" })
    }

    /// The row.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        let mut row = vec![RECORD_FORMAT];
        row.extend(codec::encode(self)?);
        Ok(row)
    }

    /// What is known of a job.
    pub fn ended(&self, job: u128) -> Option<&Ended> {
        self.ended.iter().rev().find(|ended| ended.intent.job == job)
    }

    /// Whether an id was a member's that has left. It votes never again, and no rebuild takes its place.
    pub fn has_removed(&self, id: u64) -> bool {
        self.removed.iter().any(|removed| removed.id == id)
    }

    /// Whether a permit to rebuild may be given or renewed: never for a node that was removed, and not to another rebuild
    /// than the one that holds it while voters change. The leader has looked before it proposed, but the node that asks
    /// may have left since.
    pub fn admits(&self, command: &RebuildCommand, permits: &permits::Book) -> Result<(), Refusal> {
        let RebuildCommand::Grant { job, old_id, .. } = command else { return Ok(()) };
        let renewed = permits.permit.as_ref().filter(|_| permits.is_renewal(command));
        if self.has_removed(*old_id) || renewed.is_some_and(|held| self.has_removed(held.fresh_id)) {
            return Err(void(*job));
        }
        match &self.current {
            Some(intent) if intent.changing && renewed.is_none() => Err(Refusal::MembersBusy {
                job: intent.job,
                kind: intent.change.word().into(),
                name: intent.name.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Carries out a command of the entry at `log_index`, at `now_ms` of log time, and returns the intent as it is then.
    /// A refusal changes nothing. Each command may come again.
    pub fn apply(
        &mut self,
        command: &MemberCommand,
        permits: &mut permits::Book,
        log_index: u64,
        now_ms: u64,
    ) -> Result<Intent, Refusal> {
        match command {
            MemberCommand::Begin(intent) => self.begin(intent),
            MemberCommand::TakePlace { job, node_job, id_min } => {
                let intent = self.open(*job)?;
                if intent.change == Change::Remove || intent.cancelled {
                    return Err(void(*job));
                }
                match intent.place {
                    Some(place) if place.node_job == *node_job => {}
                    // Its id is about to vote, or does: whoever asks now is not the one that has caught up.
                    _ if intent.changing => return Err(void(*job)),
                    _ => {
                        let fresh_id = permits.fresh_id((*id_min).max(log_index));
                        intent.place = Some(Place { node_job: *node_job, fresh_id });
                    }
                }
                Ok(intent.clone())
            }
            MemberCommand::Announce { job, leaves } => {
                let intent = self.open(*job)?;
                if intent.cancelled {
                    return Err(void(*job));
                }
                let leaving = intent.leaving().map(str::to_owned);
                match &permits.permit {
                    // However old: a rebuild that was begun for the one that leaves must never come to its end.
                    Some(held) if leaving.as_ref() == Some(&held.name) => permits.permit = None,
                    Some(held) if !intent.changing && now_ms < held.expires_at_ms() => {
                        return Err(Refusal::RebuildHeld { by: held.name.clone(), expires_in_s: held.left_s(now_ms) });
                    }
                    _ => {}
                }
                // What an earlier announcement named may have left by now, and stays named.
                let new = leaves.iter().filter(|id| !intent.leaves.contains(id)).copied().collect::<Vec<_>>();
                intent.leaves.extend(new);
                // The first ids of a cluster were given out by nobody: none of those that leave is ever given out again.
                let leaves_highest = intent.leaves.iter().copied().max().unwrap_or_default();
                permits.id_highest = permits.id_highest.max(leaves_highest);
                intent.changing = true;
                Ok(intent.clone())
            }
            MemberCommand::Withdraw { job } => {
                let intent = self.open(*job)?;
                intent.changing = false;
                Ok(intent.clone())
            }
            MemberCommand::Cancel { job } => {
                let intent = self.open(*job)?;
                if intent.changing {
                    return Err(void(*job));
                }
                intent.cancelled = true;
                Ok(intent.clone())
            }
            MemberCommand::End { job, end, detail, ended_unix_ms } => {
                let intent = self.end(*job, *end, detail, *ended_unix_ms)?;
                if *end == End::Finished
                    && let Some(leaving) = intent.leaving()
                {
                    permits.permit.take_if(|held| held.name == leaving && self.has_removed(held.old_id));
                }
                Ok(intent)
            }
        }
    }

    fn open(&mut self, job: u128) -> Result<&mut Intent, Refusal> {
        self.current.as_mut().filter(|intent| intent.job == job).ok_or_else(|| void(job))
    }

    fn begin(&mut self, intent: &Intent) -> Result<Intent, Refusal> {
        if let Some(ended) = self.ended(intent.job) {
            return Ok(ended.intent.clone());
        }
        match &self.current {
            Some(current) if current.job == intent.job => Ok(current.clone()),
            Some(current) => {
                let (kind, name) = (current.change.word().to_owned(), current.name.clone());
                Err(Refusal::MembersBusy { job: current.job, kind, name })
            }
            None => {
                let begun =
                    Intent { place: None, leaves: Vec::new(), changing: false, cancelled: false, ..intent.clone() };
                self.current = Some(begun.clone());
                Ok(begun)
            }
        }
    }

    fn end(&mut self, job: u128, end: End, detail: &str, ended_unix_ms: u64) -> Result<Intent, Refusal> {
        if let Some(ended) = self.ended(job) {
            return Ok(ended.intent.clone());
        }
        let intent = self.open(job)?;
        // What was announced is done or withdrawn, never dropped; and what was not has changed no voter.
        let fits = match end {
            End::Finished => intent.changing || intent.change == Change::Add { learner: true },
            End::Cancelled => intent.cancelled && !intent.changing,
        };
        if !fits {
            return Err(void(job));
        }
        let Some(intent) = self.current.take() else { return Err(void(job)) };
        if let Some(name) = intent.leaving().filter(|_| end == End::Finished) {
            let replaced_by = intent.coming().map(str::to_owned);
            let gone = |id: &u64| Removed {
                id: *id,
                name: name.to_owned(),
                replaced_by: replaced_by.clone(),
                at_unix_ms: ended_unix_ms,
            };
            self.removed.extend(intent.leaves.iter().map(gone));
            let too_many = self.removed.len().saturating_sub(REMOVED_MAX);
            self.removed.drain(..too_many);
        }
        self.ended.push(Ended { intent: intent.clone(), end, detail: detail.to_owned(), ended_unix_ms });
        let too_many = self.ended.len().saturating_sub(ENDED_MAX);
        self.ended.drain(..too_many);
        Ok(intent)
    }
}

#[cfg(test)]
#[path = "members_tests.rs"]
mod tests;
