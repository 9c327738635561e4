//! The rows that each kind of fact leaves, and the rules that refuse it.
//!
//! One `Facts` per command. It numbers the facts, checks what they refer to (through the overlay,
//! so that a batch may refer to its own items) and writes their rows. The caller undoes everything
//! when a rule refuses.

use std::collections::HashSet;

use uuid::Uuid;

use super::overlay::Overlay;
use super::{ApplyError, EPOCHS_KNOWN_MAX, Progress};
use crate::model::{NewAssertion, NewEpoch, NewSupersession, NewVote};
use crate::state::command::{Operation, Receipt, Refusal};
use crate::state::keys::{self, FactKind};
use crate::state::record::{
    AssertionRecord, EpochRecord, RecordError, SupersessionRecord, Tally, VoteRecord, decode_number, decode_place,
    encode_number, encode_place, encode_text, weight_nano,
};

/// Most supersessions looked at to find a circle. A chain this long is no one's history, and apply
/// must not be held up by it.
pub(super) const CYCLE_STEPS_MAX: usize = 4096;

/// See the module's story.
pub(super) struct Facts<'a, 'r> {
    pub entry: &'a mut Overlay<'r>,
    pub epochs_known: &'a mut HashSet<String>,
    pub progress: Progress,
    pub created_at_ms: u64,
}

impl Facts<'_, '_> {
    /// Applies one operation: a receipt per fact, in order.
    pub fn operation(&mut self, operation: &Operation) -> Result<Vec<Receipt>, ApplyError> {
        match operation {
            Operation::Assert(assertions) => self.assertions(assertions),
            Operation::Vote(vote) => Ok(vec![self.vote(vote)?]),
            Operation::Epoch(epoch) => Ok(vec![self.epoch(epoch)?]),
            Operation::Supersede(supersession) => Ok(vec![self.supersede(supersession)?]),
            Operation::ImportChunk { import_id, position_before, position_after, assertions } => {
                let key = keys::import(import_id);
                let expected = match self.entry.get(&key)? {
                    Some(row) => decode_number("import position", &row)?,
                    None => 0,
                };
                if *position_before != expected {
                    return rejected(Refusal::ImportPosition { expected });
                }
                let receipts = self.assertions(assertions)?;
                self.entry.put(key, encode_number(*position_after));
                Ok(receipts)
            }
            // No facts: `Applier::permit` and `Applier::members` take them before.
            Operation::Rebuild(_) | Operation::Members(_) | Operation::Level(_) => Ok(Vec::new()),
        }
    }

    fn assertions(&mut self, assertions: &[NewAssertion]) -> Result<Vec<Receipt>, ApplyError> {
        assertions.iter().map(|assertion| self.assertion(assertion)).collect()
    }

    fn assertion(&mut self, new: &NewAssertion) -> Result<Receipt, ApplyError> {
        if let Some(epoch) = &new.epoch {
            self.epoch_must_exist(epoch)?;
        }
        let receipt = self.receipt(new.id);
        if let Some(old) = new.supersedes {
            let old_key = self.place(old)?;
            same_path(&old_key, &new.concept_path)?;
            // The new assertion has no fact yet, so no circle can close.
            self.put_supersession(&old_key, receipt, Some(new.id), None);
        }
        let key = keys::assertion(&new.concept_path, &new.predicate, receipt.index);
        let record = AssertionRecord {
            id: new.id,
            created_at_ms: self.created_at_ms,
            source: new.source.as_deref(),
            confidence: new.confidence,
            epoch: new.epoch.as_deref(),
            supersedes: new.supersedes,
            valid_from_ms: new.valid_from_ms,
            valid_to_ms: new.valid_to_ms,
            value_json: &new.value_json,
        };
        self.entry.put(keys::id(new.id).to_vec(), encode_place(&key));
        self.entry.put(key, record.encode());
        self.progress.counters.assertions += 1;
        Ok(receipt)
    }

    fn vote(&mut self, vote: &NewVote) -> Result<Receipt, ApplyError> {
        let assertion_key = self.place(vote.assertion_id)?;
        let voter_key = keys::voter(&assertion_key, &vote.voter);
        let tally_key = keys::tally(&assertion_key);
        let mut tally = match self.entry.get(&tally_key)? {
            Some(row) => Tally::decode(&row)?,
            None => Tally::default(),
        };
        // Without any vote on the assertion there is none of this voter.
        let before = if tally.count == 0 { None } else { self.entry.get(&voter_key)? };
        match before {
            Some(row) => {
                let before = Tally::decode(&row)?;
                tally.sum_nano = tally.sum_nano.wrapping_sub(before.sum_nano);
            }
            None => tally.count += 1,
        }
        let weight_nano = weight_nano(vote.weight);
        tally.sum_nano = tally.sum_nano.wrapping_add(weight_nano);
        let receipt = self.receipt(vote.id);
        let record = VoteRecord {
            id: vote.id,
            created_at_ms: self.created_at_ms,
            weight_nano,
            tally,
            voter: &vote.voter,
            reason: vote.reason.as_deref(),
        };
        self.entry.put(keys::fact(&assertion_key, FactKind::Vote, receipt.index), record.encode());
        self.entry.put(voter_key, Tally { sum_nano: weight_nano, count: 1 }.encode());
        self.entry.put(tally_key, tally.encode());
        Ok(receipt)
    }

    fn epoch(&mut self, epoch: &NewEpoch) -> Result<Receipt, ApplyError> {
        let key = keys::epoch(&epoch.name);
        if self.epochs_known.contains(&epoch.name) || self.entry.get(&key)?.is_some() {
            return rejected(Refusal::EpochExists { name: epoch.name.clone() });
        }
        if let Some(old) = &epoch.supersedes {
            self.epoch_must_exist(old)?;
        }
        let receipt = self.receipt(epoch.id);
        let record = EpochRecord {
            id: epoch.id,
            created_at_ms: self.created_at_ms,
            index: receipt.index,
            supersedes: epoch.supersedes.as_deref(),
            description: epoch.description.as_deref(),
        };
        self.entry.put(key, record.encode());
        if let Some(old) = &epoch.supersedes {
            self.entry.put(keys::epoch_superseded(old, receipt.index), encode_text(&epoch.name));
        }
        Ok(receipt)
    }

    fn supersede(&mut self, supersession: &NewSupersession) -> Result<Receipt, ApplyError> {
        let old_key = self.place(supersession.old)?;
        if let Some(new) = supersession.new {
            let new_key = self.place(new)?;
            let parsed = keys::parse_fact(&new_key).ok_or(RecordError::Damaged { what: "place" })?;
            same_path(&old_key, parsed.path)?;
            self.refuse_circle(&old_key, new_key)?;
        }
        let receipt = self.receipt(supersession.id);
        let reason = supersession.reason.as_deref();
        self.put_supersession(&old_key, receipt, supersession.new, reason);
        Ok(receipt)
    }

    fn put_supersession(&mut self, old_key: &[u8], receipt: Receipt, new: Option<Uuid>, reason: Option<&str>) {
        let key = keys::fact(old_key, FactKind::Supersession, receipt.index);
        let created_at_ms = receipt.created_at_ms;
        let record = SupersessionRecord { id: receipt.id, created_at_ms, new, reason };
        self.entry.put(key, record.encode());
    }

    /// Follows what superseded `new`, and what superseded that: `old` must not be among it.
    fn refuse_circle(&mut self, old_key: &[u8], new_key: Vec<u8>) -> Result<(), ApplyError> {
        let mut seen = HashSet::new();
        let mut open = vec![new_key];
        let mut steps = 0;
        while let Some(key) = open.pop() {
            if key == old_key {
                return rejected(Refusal::Cycle);
            }
            if !seen.insert(key.clone()) {
                continue;
            }
            let from = keys::with_byte(&key, FactKind::Supersession as u8);
            let to = keys::prefix_end(&from);
            for (_, row) in self.entry.scan(&from, &to, CYCLE_STEPS_MAX + 1)? {
                steps += 1;
                if steps > CYCLE_STEPS_MAX {
                    return rejected(Refusal::ChainTooLong { steps_max: CYCLE_STEPS_MAX as u64 });
                }
                if let Some(next) = SupersessionRecord::decode(&row)?.new {
                    open.push(self.place(next)?);
                }
            }
        }
        Ok(())
    }

    /// Key of the assertion `id`, which must exist.
    fn place(&mut self, id: Uuid) -> Result<Vec<u8>, ApplyError> {
        match self.entry.get(&keys::id(id))? {
            Some(row) => Ok(decode_place(&row)?),
            None => rejected(Refusal::NotFound { kind: "assertion".into(), name: id.to_string() }),
        }
    }

    fn epoch_must_exist(&mut self, name: &str) -> Result<(), ApplyError> {
        if self.epochs_known.contains(name) {
            return Ok(());
        }
        if self.entry.get(&keys::epoch(name))?.is_none() {
            return rejected(Refusal::NotFound { kind: "epoch".into(), name: name.to_owned() });
        }
        if self.epochs_known.len() >= EPOCHS_KNOWN_MAX {
            self.epochs_known.clear();
        }
        self.epochs_known.insert(name.to_owned());
        Ok(())
    }

    /// Numbers the next fact, and notes the first index of a new moment.
    fn receipt(&mut self, id: Uuid) -> Receipt {
        self.progress.fact_index += 1;
        let receipt = Receipt { id, index: self.progress.fact_index, created_at_ms: self.created_at_ms };
        if self.created_at_ms > self.progress.counters.created_max_ms {
            self.progress.counters.created_max_ms = self.created_at_ms;
            self.entry.put(keys::moment(self.created_at_ms), encode_number(receipt.index));
        }
        receipt
    }
}

fn same_path(old_key: &[u8], new_path: &str) -> Result<(), ApplyError> {
    let old = keys::parse_fact(old_key).ok_or(RecordError::Damaged { what: "place" })?;
    if old.path == new_path {
        return Ok(());
    }
    rejected(Refusal::PathMismatch { old_path: old.path.to_owned(), new_path: new_path.to_owned() })
}

fn rejected<T>(refusal: Refusal) -> Result<T, ApplyError> {
    Err(ApplyError::Rejected(refusal))
}
