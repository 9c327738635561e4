//! A tree in memory for tests, and short ways to make commands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;
use uuid::Uuid;

use crate::model::{NewAssertion, NewEpoch, NewSupersession, NewVote};
use crate::state::apply::{Applier, KeyLimits};
use crate::state::command::{
    Command, CommandKey, CommandOutcome, ENTRY_FORMAT, EntryBody, KeySource, Operation, Outcome, Receipt, Refusal,
};
use crate::state::engine::{AppliedState, EngineError, Row, StateRead, WriteBatch};

/// Rows in a map.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct MapRead {
    pub rows: BTreeMap<Bytes, Bytes>,
}

impl MapRead {
    pub fn write(&mut self, batch: &WriteBatch) {
        for (key, value) in &batch.rows {
            match value {
                Some(value) => self.rows.insert(key.clone(), value.clone()),
                None => self.rows.remove(key),
            };
        }
    }
}

impl StateRead for MapRead {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.rows.get(key).cloned())
    }
    fn scan<'a>(
        &'a self,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
    ) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        // A range that ends before it starts is empty, as in the engine.
        if let (Bound::Included(from) | Bound::Excluded(from), Bound::Excluded(to)) = (from, to)
            && from >= to
        {
            return Box::new(std::iter::empty());
        }
        Box::new(self.rows.range::<[u8], _>((from, to)).map(|(k, v)| Ok((k.clone(), v.clone()))))
    }
}

/// Log time at which tests start; also the time inside their ids.
pub(crate) const START_MS: u64 = 1_700_000_000_000;

pub(crate) fn uuid(number: u64) -> Uuid {
    Uuid::from_u128((u128::from(START_MS) << 80) | (0x7 << 76) | (0x8 << 60) | u128::from(number))
}

pub(crate) fn limits() -> KeyLimits {
    KeyLimits { short_key_ms: 20_000, balancer_ms: 35_000, client_key_ms: 900_000, short_keys_max: 100_000 }
}

/// An applier with its tree.
pub(crate) struct Machine {
    pub tree: MapRead,
    pub applier: Applier,
    pub now_ms: u64,
    next: u64,
}

impl Machine {
    pub fn new() -> Self {
        Self::with_limits(limits())
    }
    pub fn with_limits(limits: KeyLimits) -> Self {
        let tree = MapRead::default();
        let applied = AppliedState { log_time_ms: START_MS, ..AppliedState::default() };
        let applier = Applier::restore(&tree, &applied, limits).unwrap();
        Machine { tree, applier, now_ms: START_MS, next: 0 }
    }
    pub fn id(&mut self) -> Uuid {
        self.next += 1;
        uuid(self.next)
    }
    /// A command under a fresh node's key, created now.
    pub fn command(&mut self, op: Operation) -> Command {
        let id = self.id().as_u128();
        command(KeySource::Node, id, self.now_ms, op)
    }
    pub fn entry(&mut self, commands: Vec<Command>) -> Vec<CommandOutcome> {
        let body = EntryBody { format: ENTRY_FORMAT, log_time_ms: self.now_ms, commands };
        let (batch, outcomes) = self.applier.apply(&self.tree, self.next, &body).unwrap();
        self.tree.write(&batch);
        outcomes
    }
    pub fn run(&mut self, op: Operation) -> Outcome {
        let command = self.command(op);
        let mut outcomes = self.entry(vec![command]);
        assert!(!outcomes[0].replayed);
        outcomes.remove(0).outcome
    }
    pub fn ok(&mut self, op: Operation) -> Receipt {
        match self.run(op) {
            Outcome::Applied(receipts) => *receipts.last().unwrap(),
            other => panic!("{other:?}"),
        }
    }
    pub fn refused(&mut self, op: Operation) -> Refusal {
        match self.run(op) {
            Outcome::Refused(refusal) => refusal,
            other => panic!("{other:?}"),
        }
    }
    pub fn assert(&mut self, path: &str, predicate: &str, value: &str) -> Receipt {
        let new = self.assertion(path, predicate, value);
        self.ok(Operation::Assert(vec![new]))
    }
    pub fn assertion(&mut self, path: &str, predicate: &str, value: &str) -> NewAssertion {
        NewAssertion {
            id: self.id(),
            concept_path: path.into(),
            predicate: predicate.into(),
            value_json: value.into(),
            source: None,
            confidence: None,
            epoch: None,
            supersedes: None,
            valid_from_ms: None,
            valid_to_ms: None,
        }
    }
    pub fn vote(&mut self, assertion_id: Uuid, voter: &str, weight: f64) -> Operation {
        let voter = voter.into();
        Operation::Vote(NewVote { id: self.id(), assertion_id, voter, weight, reason: None })
    }
    pub fn epoch(&mut self, name: &str, supersedes: Option<&str>) -> Operation {
        Operation::Epoch(NewEpoch {
            id: self.id(),
            name: name.into(),
            description: None,
            supersedes: supersedes.map(str::to_owned),
        })
    }
    pub fn supersede(&mut self, old: Uuid, new: Option<Uuid>) -> Operation {
        Operation::Supersede(NewSupersession { id: self.id(), old, new, reason: None })
    }
}

pub(crate) fn command(source: KeySource, id: u128, now_ms: u64, op: Operation) -> Command {
    Command {
        key: CommandKey { source, id },
        body_hash: 7,
        resend_until_ms: now_ms + 10_000,
        created_at_ms: now_ms,
        op,
    }
}
