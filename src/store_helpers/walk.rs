//! Walking over the facts of a key range.
//!
//! The `Walker` steps forward, and jumps when stepping would take too long: rows that the answer
//! does not need (older votes, other predicates, facts after the pinned index) cost a seek, not a row
//! each. It counts what it does against a budget, so that one call cannot hold a thread for long.

use std::ops::Bound;

use bytes::Bytes;
use uuid::Uuid;

use super::StoreError;
use super::view::AssertionView;
use crate::model::resolve::Standing;
use crate::state::engine::{EngineError, Row, StateRead};
use crate::state::keys::{self, FactKey, FactKind};
use crate::state::record::{AssertionRecord, RecordError, SupersessionRecord, Tally, VoteRecord};

/// Rows stepped over before a seek is tried: a seek costs about as much as this many steps.
const STEPS_BEFORE_SEEK: usize = 16;

/// A row counts as one more for each so many bytes: a value may have a megabyte, and reading
/// 100,000 of those is no longer a matter of milliseconds.
const BYTES_PER_ROW: usize = 4096;

/// See the module's story.
pub(super) struct Walker<'a> {
    read: &'a dyn StateRead,
    rows: Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a>,
    end: Vec<u8>,
    next: Option<Row>,
    /// Steps left before the caller should stop.
    budget_rows: usize,
}

impl<'a> Walker<'a> {
    /// Stands on the first row from `from` (inclusive) to `end` (exclusive).
    pub fn new(read: &'a dyn StateRead, from: &[u8], end: Vec<u8>, budget_rows: usize) -> Result<Self, StoreError> {
        let rows = read.scan(Bound::Included(from), Bound::Excluded(&end));
        let mut walker = Walker { read, rows, end, next: None, budget_rows };
        walker.step()?;
        // However large the first row is, there is room to take it: every call gets further.
        walker.budget_rows = budget_rows.saturating_sub(1);
        Ok(walker)
    }

    /// The row it stands on; `None` behind the last one.
    pub fn row(&self) -> Option<&Row> {
        self.next.as_ref()
    }

    /// Goes to the next row.
    pub fn step(&mut self) -> Result<(), StoreError> {
        self.next = self.rows.next().transpose()?;
        let bytes = self.next.as_ref().map_or(0, |(_, value)| value.len());
        self.budget_rows = self.budget_rows.saturating_sub(1 + bytes / BYTES_PER_ROW);
        Ok(())
    }

    /// Goes to the first row at or behind `key`; never back.
    pub fn skip_to(&mut self, key: &[u8]) -> Result<(), StoreError> {
        for _ in 0..STEPS_BEFORE_SEEK {
            match &self.next {
                Some((at, _)) if at.as_ref() < key => self.step()?,
                _ => return Ok(()),
            }
        }
        if self.next.as_ref().is_some_and(|(at, _)| at.as_ref() < key) {
            if key >= self.end.as_slice() {
                self.next = None;
                self.rows = Box::new(std::iter::empty());
                return Ok(());
            }
            self.budget_rows = self.budget_rows.saturating_sub(STEPS_BEFORE_SEEK);
            self.rows = self.read.scan(Bound::Included(key), Bound::Excluded(&self.end));
            self.step()?;
        }
        Ok(())
    }

    /// Enough rows were looked at.
    pub fn is_spent(&self) -> bool {
        self.budget_rows == 0
    }

    /// What is left of the budget, in rows.
    pub fn budget_rows(&self) -> usize {
        self.budget_rows
    }

    /// The key it stands on, which must be a fact's.
    pub fn fact(&self) -> Result<Option<(Bytes, FactKey<'_>)>, StoreError> {
        match &self.next {
            None => Ok(None),
            Some((key, _)) => Ok(Some((key.clone(), parse(key)?))),
        }
    }

    /// Reads the assertion it stands on, as of a fact index, and goes behind its facts.
    pub fn assertion(&mut self, as_of: u64) -> Result<Option<Found>, StoreError> {
        let Some((key, row)) = self.next.clone() else {
            return Ok(None);
        };
        self.step()?;
        let mut found = Found { key, row, superseded: None, votes: Tally::default() };
        // Most assertions have no further fact: one comparison tells.
        if self.is_about(&found.key) {
            if let Some(row) = self.latest(&found.key, FactKind::Supersession, as_of)? {
                found.superseded = Some(SupersessionRecord::decode(&row)?.new);
            }
            if let Some(row) = self.latest(&found.key, FactKind::Vote, as_of)? {
                found.votes = VoteRecord::decode(&row)?.tally;
            }
            self.skip_to(&keys::assertion_end(&found.key))?;
        }
        Ok(Some(found))
    }

    /// The latest fact of a kind about an assertion, as of a fact index.
    fn latest(&mut self, assertion_key: &[u8], kind: FactKind, as_of: u64) -> Result<Option<Bytes>, StoreError> {
        self.skip_to(&keys::fact(assertion_key, kind, as_of))?;
        match &self.next {
            Some((key, row))
                if key.strip_prefix(assertion_key).is_some_and(|tail| tail.first() == Some(&(kind as u8))) =>
            {
                Ok(Some(row.clone()))
            }
            _ => Ok(None),
        }
    }

    fn is_about(&self, assertion_key: &[u8]) -> bool {
        self.next.as_ref().is_some_and(|(key, _)| key.starts_with(assertion_key))
    }
}

/// Takes a fact's key apart, or says that it is damaged.
pub(super) fn parse(key: &[u8]) -> Result<FactKey<'_>, StoreError> {
    keys::parse_fact(key).ok_or_else(|| RecordError::Damaged { what: "key of a fact" }.into())
}

/// The first row of a range.
pub(super) fn first(read: &dyn StateRead, from: &[u8], end: &[u8]) -> Result<Option<Row>, StoreError> {
    Ok(read.scan(Bound::Included(from), Bound::Excluded(end)).next().transpose()?)
}

/// The assertion at `key`, as of a fact index.
pub(super) fn load(read: &dyn StateRead, key: &[u8], as_of: u64) -> Result<Option<Found>, StoreError> {
    let mut walker = Walker::new(read, key, keys::assertion_end(key), usize::MAX)?;
    match walker.row() {
        Some((found, _)) if found.as_ref() == key => walker.assertion(as_of),
        _ => Ok(None),
    }
}

/// An assertion with what was said about it.
pub(super) struct Found {
    /// Its key.
    pub key: Bytes,
    row: Bytes,
    /// `Some(None)` when it was retracted.
    pub superseded: Option<Option<Uuid>>,
    /// Sum and count of its votes.
    pub votes: Tally,
}

impl Found {
    /// Its record.
    pub fn record(&self) -> Result<AssertionRecord<'_>, StoreError> {
        Ok(AssertionRecord::decode(&self.row)?)
    }

    /// What it has to show against others.
    pub fn standing(&self) -> Result<Standing, StoreError> {
        Ok(Standing {
            index: parse(&self.key)?.index,
            votes_sum_nano: self.votes.sum_nano,
            confidence: self.record()?.confidence,
        })
    }

    /// Bytes of its rows.
    pub fn bytes(&self) -> usize {
        self.key.len() + self.row.len()
    }

    /// As it is answered.
    pub fn view(&self) -> Result<AssertionView, StoreError> {
        let key = parse(&self.key)?;
        AssertionView::new(&key, &self.record()?, self.superseded, self.votes)
    }
}
