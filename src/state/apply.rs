//! Turns committed commands into rows, the same way on every node.
//!
//! The state machine hands in each entry with a view of the tree; back comes one batch of rows and
//! one outcome per command. Nothing here looks at a clock, a disk or chance. A command's key decides
//! first: a known one is answered with its first outcome and writes nothing. Then the command either
//! writes all its facts or is refused and writes none. A plain assertion under a node's key reads
//! nothing at all.
//!
//! `fact_index`, `log_time_ms`, the counters, the short-lived keys and what waits to expire are held
//! here between entries; everything else is in the tree. After an error the `Applier` and the tree no longer
//! agree: drop it and `restore` another.

use std::collections::HashSet;

use stemedb_raft::codec::CodecError;

use super::command::{
    Command, CommandOutcome, ENTRY_FORMAT, EntryBody, KeySource, MemberCommand, Operation, Outcome, RebuildCommand,
    Refusal,
};
use super::engine::{AppliedState, EngineError, StateRead, WriteBatch};
use super::key_table::{KeyTable, Known};
use super::keys;
use super::level::{self, LEVEL_BALANCER_KEYS, RaiseLevel};
use super::members::MemberBook;
use super::permits::{Book, Change};
use super::record::Counters;

mod client_keys;
mod facts;
mod overlay;
#[cfg(test)]
mod tests;

use client_keys::ClientKeys;
use facts::Facts;
use overlay::Overlay;

/// Names of epochs remembered as existing. Epochs are never removed, so a name seen once needs no
/// further look-up; the bound keeps a flood of epochs from filling the memory.
const EPOCHS_KNOWN_MAX: usize = 1024;

/// How long keys are kept, and how many. **Part of the replicated state's rules**: with other values
/// a node would answer differently from its peers, or from itself before a restart. So nothing
/// configurable is in it, and only tests use anything but the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLimits {
    /// How long a short-lived key is kept, in milliseconds of log time: twice the default request
    /// deadline. A command that may be sent again for longer says so in its `resend_until_ms`, and
    /// its key is kept for twice as long as that.
    pub short_key_ms: u64,
    /// How long the key of a load balancer is kept past the command's `resend_until_ms`, in milliseconds of log time,
    /// from `LEVEL_BALANCER_KEYS` on. With B the longest time from the first attempt of a request until the last one
    /// begins, and W a request deadline: the first attempt was taken at t, so its command says t + W; the last one is taken
    /// by t + B and may be applied until t + B + W. So B suffices, and a margin for estimates of log time that differ. B is
    /// 30 s with the files of `deploy/`: what Envoy gives a request in all (nginx begins nothing after 5 s).
    pub balancer_ms: u64,
    /// How long a client's key is kept, in milliseconds of log time.
    pub client_key_ms: u64,
    /// Most short-lived keys held at once, in memory on every node: `short_key_ms` at 50,000 writes
    /// a second. At the bound new writes get 429. From `LEVEL_BALANCER_KEYS` on twice as many: 44,000
    /// writes a second through balancers.
    pub short_keys_max: usize,
}

impl KeyLimits {
    fn short_keys_max_at(&self, feature_level: u32) -> usize {
        if feature_level < LEVEL_BALANCER_KEYS { self.short_keys_max } else { self.short_keys_max.saturating_mul(2) }
    }
}

impl Default for KeyLimits {
    fn default() -> Self {
        KeyLimits {
            short_key_ms: 20_000,
            balancer_ms: 35_000,
            client_key_ms: 15 * 60 * 1000,
            short_keys_max: 1_000_000,
        }
    }
}

/// Why a command was not applied: for a reason that is the same on every node, or one of this node.
enum ApplyError {
    Rejected(Refusal),
    Local(EngineError),
}

impl<E: Into<EngineError>> From<E> for ApplyError {
    fn from(error: E) -> Self {
        ApplyError::Local(error.into())
    }
}

/// What facts move on: undone as one when a command is refused.
#[derive(Clone, Copy)]
struct Progress {
    fact_index: u64,
    counters: Counters,
}

/// Applies entries in the order of the log. One per tree; see the module's story.
pub struct Applier {
    progress: Progress,
    log_time_ms: u64,
    feature_level: u32,
    /// Of the entry at hand.
    log_index: u64,
    keys: KeyTable,
    client_keys: ClientKeys,
    epochs_known: HashSet<String>,
    limits: KeyLimits,
}

impl Applier {
    /// The applier that goes on where the tree behind `read` stands; `applied` is what was saved with it. Reads the
    /// rows written by [`Applier::save_keys`].
    pub fn restore(read: &dyn StateRead, applied: &AppliedState, limits: KeyLimits) -> Result<Self, EngineError> {
        let &AppliedState { fact_index, log_time_ms, feature_level, .. } = applied;
        let counters = match read.get(keys::COUNTERS)? {
            Some(row) => Counters::decode(&row)?,
            None => Counters::default(),
        };
        Ok(Applier {
            progress: Progress { fact_index, counters },
            log_time_ms,
            feature_level,
            log_index: 0,
            keys: KeyTable::restore(read, limits.short_key_ms, limits.short_keys_max_at(feature_level), log_time_ms)?,
            client_keys: ClientKeys::default(),
            epochs_known: HashSet::new(),
            limits,
        })
    }

    /// Applies one entry: the rows to write, all together, and the outcome of each command, in order.
    /// Later commands see what earlier ones of the same entry wrote. The rows must be written and
    /// visible to `read` before the next call. `log_index` is the entry's place in the log.
    pub fn apply(
        &mut self,
        read: &dyn StateRead,
        log_index: u64,
        body: &EntryBody,
    ) -> Result<(WriteBatch, Vec<CommandOutcome>), EngineError> {
        if body.format != ENTRY_FORMAT {
            let why = format!("entry format {}, this program knows {ENTRY_FORMAT}", body.format);
            return Err(EngineError::io("apply", std::io::Error::new(std::io::ErrorKind::Unsupported, why)));
        }
        self.log_time_ms = self.log_time_ms.max(body.log_time_ms);
        self.log_index = log_index;
        let counters_before = self.progress.counters;
        let mut entry = Overlay::new(read, body.commands.len());
        self.keys.expire(self.log_time_ms);
        self.client_keys.begin_entry();
        self.client_keys.expire(read, self.log_time_ms, body.commands.len(), &mut entry)?;
        let mut outcomes = Vec::with_capacity(body.commands.len());
        for command in &body.commands {
            outcomes.push(self.command(&mut entry, command)?);
        }
        if self.progress.counters != counters_before {
            entry.put(keys::COUNTERS, self.progress.counters.encode());
        }
        Ok((entry.into_batch(), outcomes))
    }

    fn command(&mut self, entry: &mut Overlay<'_>, command: &Command) -> Result<CommandOutcome, EngineError> {
        if let Some(known) = self.known(entry, command)? {
            return Ok(match known {
                Known::Outcome(outcome) => CommandOutcome { outcome, replayed: true },
                Known::OtherBody => refused(Refusal::KeyReused),
            });
        }
        // Neither of these two is remembered. The first stays true for ever; the second says only
        // that there was no room now.
        if self.log_time_ms > command.resend_until_ms {
            return Ok(refused(Refusal::Expired));
        }
        if command.key.source != KeySource::Client && self.keys.is_full() {
            return Ok(refused(Refusal::KeyTableFull));
        }
        let outcome = match self.execute(entry, command) {
            Ok(outcome) => {
                entry.keep_command();
                outcome
            }
            Err(ApplyError::Rejected(refusal)) => {
                entry.drop_command();
                Outcome::Refused(refusal)
            }
            Err(ApplyError::Local(error)) => return Err(error),
        };
        self.remember(entry, command, &outcome)?;
        entry.keep_command();
        Ok(CommandOutcome { outcome, replayed: false })
    }

    fn execute(&mut self, entry: &mut Overlay<'_>, command: &Command) -> Result<Outcome, ApplyError> {
        if let Operation::Rebuild(rebuild) = &command.op {
            return self.permit(entry, rebuild);
        }
        if let Operation::Members(command) = &command.op {
            return self.members(entry, command);
        }
        if let Operation::Level(command) = &command.op {
            return self.raise(entry, *command);
        }
        let mut facts = Facts {
            entry,
            epochs_known: &mut self.epochs_known,
            progress: self.progress,
            created_at_ms: command.created_at_ms,
        };
        let receipts = facts.operation(&command.op)?;
        self.progress = facts.progress;
        Ok(Outcome::Applied(receipts))
    }

    /// No fact: it leaves no receipt and no index.
    fn permit(&self, entry: &mut Overlay<'_>, command: &RebuildCommand) -> Result<Outcome, ApplyError> {
        let mut book = Book::decode(entry.get(keys::REBUILD_PERMITS)?.as_deref())?;
        if matches!(command, RebuildCommand::Grant { .. }) {
            let members = MemberBook::decode(entry.get(keys::MEMBERS)?.as_deref())?;
            members.admits(command, &book).map_err(ApplyError::Rejected)?;
        }
        let change = book.apply(command, self.log_index, self.log_time_ms).map_err(ApplyError::Rejected)?;
        entry.put(keys::REBUILD_PERMITS, book.encode().map_err(encode_error)?);
        Ok(match change {
            Change::Held(permit) => Outcome::Permit(permit),
            Change::Free => Outcome::Applied(Vec::new()),
        })
    }

    /// No fact either.
    fn members(&self, entry: &mut Overlay<'_>, command: &MemberCommand) -> Result<Outcome, ApplyError> {
        let mut permits = Book::decode(entry.get(keys::REBUILD_PERMITS)?.as_deref())?;
        let mut members = MemberBook::decode(entry.get(keys::MEMBERS)?.as_deref())?;
        let before = permits.clone();
        let intent = members.apply(command, &mut permits, self.log_index, self.log_time_ms);
        let intent = intent.map_err(ApplyError::Rejected)?;
        entry.put(keys::MEMBERS, members.encode().map_err(encode_error)?);
        if permits != before {
            entry.put(keys::REBUILD_PERMITS, permits.encode().map_err(encode_error)?);
        }
        Ok(Outcome::Member(Box::new(intent)))
    }

    /// Nor this. The leader has asked every member whether it knows the level. A node that is on its way in was not asked,
    /// so the level waits for its end.
    fn raise(&mut self, entry: &mut Overlay<'_>, command: RaiseLevel) -> Result<Outcome, ApplyError> {
        let permits = Book::decode(entry.get(keys::REBUILD_PERMITS)?.as_deref())?;
        if let Some(held) = permits.permit.filter(|held| self.log_time_ms < held.expires_at_ms()) {
            let expires_in_s = held.left_s(self.log_time_ms);
            return Err(ApplyError::Rejected(Refusal::RebuildHeld { by: held.name, expires_in_s }));
        }
        if let Some(intent) = MemberBook::decode(entry.get(keys::MEMBERS)?.as_deref())?.current {
            let kind = intent.change.word().to_owned();
            return Err(ApplyError::Rejected(Refusal::MembersBusy { job: intent.job, kind, name: intent.name }));
        }
        // Last: what every other node refuses must not stop the one whose program is older.
        if let Some(why) = level::unknown(command.level) {
            let error = std::io::Error::new(std::io::ErrorKind::Unsupported, why);
            return Err(ApplyError::Local(EngineError::io("apply", error)));
        }
        self.feature_level = self.feature_level.max(command.level);
        self.keys.set_keys_max(self.limits.short_keys_max_at(self.feature_level));
        Ok(Outcome::Applied(Vec::new()))
    }

    fn known(&self, entry: &Overlay<'_>, command: &Command) -> Result<Option<Known>, EngineError> {
        match command.key.source {
            KeySource::Client => self.client_keys.get(entry.base(), command.key.id, command.body_hash),
            KeySource::Balancer | KeySource::Node => Ok(self.keys.get(&command.key, command.body_hash)?),
        }
    }

    fn remember(&mut self, entry: &mut Overlay<'_>, command: &Command, outcome: &Outcome) -> Result<(), EngineError> {
        match command.key.source {
            KeySource::Client => {
                let expires_ms = self.log_time_ms.saturating_add(self.limits.client_key_ms);
                let expires_ms = expires_ms.max(command.resend_until_ms);
                self.client_keys.insert(entry, command, outcome, expires_ms)
            }
            source @ (KeySource::Balancer | KeySource::Node) => {
                let longer = source == KeySource::Balancer && self.feature_level >= LEVEL_BALANCER_KEYS;
                let until_ms = longer.then(|| command.resend_until_ms.saturating_add(self.limits.balancer_ms));
                let resend_until_ms = command.resend_until_ms;
                self.keys
                    .insert(command.key, command.body_hash, outcome, self.log_time_ms, resend_until_ms, until_ms)
                    .map_err(encode_error)
            }
        }
    }

    /// The short-lived keys as rows. Call it on the apply thread just before the memtable is rotated,
    /// and write the rows: the next call leaves out what is already there.
    pub fn save_keys(&mut self) -> Result<WriteBatch, EngineError> {
        self.keys.save()
    }

    /// Sequence number of the last fact.
    pub fn fact_index(&self) -> u64 {
        self.progress.fact_index
    }

    /// Log time, in milliseconds; never goes back.
    pub fn log_time_ms(&self) -> u64 {
        self.log_time_ms
    }

    /// The feature level that the cluster has reached.
    pub fn feature_level(&self) -> u32 {
        self.feature_level
    }

    /// Assertions ever stored.
    pub fn assertions(&self) -> u64 {
        self.progress.counters.assertions
    }

    /// Short-lived keys held. The leader refuses before proposing when this nears the bound.
    pub fn short_keys_len(&self) -> usize {
        self.keys.len()
    }

    /// No room for further short-lived keys, in number or in bytes of their outcomes.
    pub fn short_keys_full(&self) -> bool {
        self.keys.is_full()
    }
}

fn refused(refusal: Refusal) -> CommandOutcome {
    CommandOutcome { outcome: Outcome::Refused(refusal), replayed: false }
}

fn encode_error(error: CodecError) -> EngineError {
    EngineError::damaged("apply", error.to_string())
}
