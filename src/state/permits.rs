//! Who may rebuild, and under which Raft id: part of the replicated state.
//!
//! A node that starts afresh takes one copy of every entry out of the cluster, so at most one node at a
//! time may do it: the holder of the permit. The book is one row. [`Book::grant`] and its siblings are
//! the rules; they see log time only, so every replica decides alike. That the others have everything
//! is checked by the leader before it proposes (`node::rebuild::grant`): no rule here can know it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use stemedb_raft::codec::{self, CodecError};

use super::command::{RebuildCommand, Refusal};
use super::record::{RECORD_FORMAT, Reader, RecordError};

/// Milliseconds of log time after which another node may take a permit that its holder has not renewed.
pub const PERMIT_MS: u64 = 3_600_000;
/// The span over which automatic rebuilds of a node are counted, milliseconds of log time.
pub const AUTOMATIC_SPAN_MS: u64 = 24 * 3_600_000;

/// The right to rebuild.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permit {
    /// Name of the node that holds it.
    pub name: String,
    /// The holder's own number for this rebuild. Another number is another rebuild: it starts over, and the
    /// Raft id of the one before is void.
    pub job: u128,
    /// The Raft id that is replaced.
    pub old_id: u64,
    /// The Raft id that replaces it: log index of the granting entry, unless an id as high is taken.
    pub fresh_id: u64,
    /// Log time of the grant, milliseconds.
    pub granted_at_ms: u64,
    /// Log time of the last renewal, milliseconds.
    pub renewed_at_ms: u64,
    /// Whether the node decided by itself.
    pub automatic: bool,
}

impl Permit {
    /// Log time from which another node may have it, milliseconds.
    pub fn expires_at_ms(&self) -> u64 {
        self.renewed_at_ms.saturating_add(PERMIT_MS)
    }

    /// Seconds of log time until then.
    pub fn left_s(&self, now_ms: u64) -> u64 {
        self.expires_at_ms().saturating_sub(now_ms).div_ceil(1_000)
    }
}

/// The permit and what its rules remember.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Book {
    /// The permit, as long as it was neither used up nor given back. It stays after it has expired, until
    /// another node takes it.
    pub permit: Option<Permit>,
    /// Highest id ever given out: none is given out twice.
    pub id_highest: u64,
    /// For each node the log times of its automatic grants within the last day, milliseconds.
    pub automatic: BTreeMap<String, Vec<u64>>,
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// This permit is held now.
    Held(Permit),
    /// No permit is held by that node.
    Free,
}

impl Book {
    /// Reads the row; the empty book when there is none.
    pub fn decode(row: Option<&[u8]>) -> Result<Book, RecordError> {
        let Some(row) = row else { return Ok(Book::default()) };
        let mut read = Reader::new("rebuild permits", row)?;
        codec::decode(read.rest()).map_err(|_| RecordError::Damaged { what: "rebuild permits" })
    }

    /// The row.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        let mut row = vec![RECORD_FORMAT];
        row.extend(codec::encode(self)?);
        Ok(row)
    }

    /// Carries out a command of the entry at `log_index`, at `now_ms` of log time. A refusal changes nothing.
    pub fn apply(&mut self, command: &RebuildCommand, log_index: u64, now_ms: u64) -> Result<Change, Refusal> {
        match command {
            RebuildCommand::Grant { name, job, old_id, id_min, automatic_max } => {
                let id_min = (*id_min).max(log_index);
                self.grant(name, *job, *old_id, id_min, *automatic_max, now_ms).map(Change::Held)
            }
            RebuildCommand::Finish { name, fresh_id } => {
                self.permit.take_if(|held| held.name == *name && held.fresh_id == *fresh_id);
                Ok(Change::Free)
            }
            RebuildCommand::Cancel { name, job } => {
                self.permit.take_if(|held| held.name == *name && held.job == *job);
                Ok(Change::Free)
            }
        }
    }

    /// A Raft id of at least `id_min` that nobody ever had.
    pub fn fresh_id(&mut self, id_min: u64) -> u64 {
        self.id_highest = id_min.max(self.id_highest.saturating_add(1));
        self.id_highest
    }

    /// Whether this grant would only renew what its rebuild holds.
    pub fn is_renewal(&self, command: &RebuildCommand) -> bool {
        match (command, &self.permit) {
            (RebuildCommand::Grant { name, job, .. }, Some(held)) => held.name == *name && held.job == *job,
            _ => false,
        }
    }

    fn grant(
        &mut self,
        name: &str,
        job: u128,
        old_id: u64,
        id_min: u64,
        automatic_max: Option<u64>,
        now_ms: u64,
    ) -> Result<Permit, Refusal> {
        match &mut self.permit {
            Some(held) if held.name == name && held.job == job => {
                held.renewed_at_ms = now_ms;
                return Ok(held.clone());
            }
            Some(held) if held.name != name && now_ms < held.expires_at_ms() => {
                return Err(Refusal::RebuildHeld { by: held.name.clone(), expires_in_s: held.left_s(now_ms) });
            }
            _ => {}
        }
        let counts = |at: &u64| at.saturating_add(AUTOMATIC_SPAN_MS) > now_ms;
        let so_far = self.automatic.get(name).map_or(0, |times| times.iter().filter(|at| counts(at)).count());
        let so_far = so_far as u64;
        if automatic_max.is_some_and(|most| so_far >= most) {
            return Err(Refusal::RebuiltTooOften { name: name.to_owned(), times: so_far });
        }
        for times in self.automatic.values_mut() {
            times.retain(counts);
        }
        if automatic_max.is_some() {
            self.automatic.entry(name.to_owned()).or_default().push(now_ms);
        }
        self.automatic.retain(|_, times| !times.is_empty());
        let fresh_id = self.fresh_id(id_min);
        let permit = Permit {
            name: name.to_owned(),
            job,
            old_id,
            fresh_id,
            granted_at_ms: now_ms,
            renewed_at_ms: now_ms,
            automatic: automatic_max.is_some(),
        };
        self.permit = Some(permit.clone());
        Ok(permit)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn grant(name: &str, job: u128, automatic: bool) -> RebuildCommand {
        RebuildCommand::Grant { name: name.into(), job, old_id: 2, id_min: 4, automatic_max: automatic.then_some(2) }
    }

    fn held(change: Result<Change, Refusal>) -> Permit {
        let Ok(Change::Held(permit)) = change else { unreachable!("{change:?}") };
        permit
    }

    #[test]
    fn one_node_holds_it_renews_it_and_starts_over_under_another_id() {
        let mut book = Book::default();
        let first = held(book.apply(&grant("a", 7, false), 100, 1_000));
        assert_eq!((first.fresh_id, first.granted_at_ms), (100, 1_000));
        let refused = book.apply(&grant("b", 8, false), 101, 2_000).unwrap_err();
        assert_eq!(refused, Refusal::RebuildHeld { by: "a".into(), expires_in_s: 3_599 });
        let again = held(book.apply(&grant("a", 7, false), 102, 3_000));
        assert_eq!((again.fresh_id, again.renewed_at_ms, again.granted_at_ms), (100, 3_000, 1_000));
        let over = held(book.apply(&grant("a", 9, false), 103, 4_000));
        assert_eq!(over.fresh_id, 103);
        // What belongs to the rebuild before changes nothing any more.
        book.apply(&RebuildCommand::Finish { name: "a".into(), fresh_id: 100 }, 104, 4_000).unwrap();
        book.apply(&RebuildCommand::Cancel { name: "a".into(), job: 7 }, 105, 4_000).unwrap();
        assert_eq!(book.permit, Some(over));
        book.apply(&RebuildCommand::Finish { name: "a".into(), fresh_id: 103 }, 106, 4_000).unwrap();
        assert_eq!(book.permit, None);
    }

    #[test]
    fn an_id_is_never_given_out_twice_and_never_one_of_a_member() {
        let mut book = Book::default();
        assert_eq!(held(book.apply(&grant("a", 1, false), 2, 0)).fresh_id, 4, "ids up to 3 are taken");
        assert_eq!(held(book.apply(&grant("a", 2, false), 3, 0)).fresh_id, 5);
        assert_eq!(held(book.apply(&grant("a", 3, false), 4, 0)).fresh_id, 6);
        assert_eq!(held(book.apply(&grant("a", 4, false), 90, 0)).fresh_id, 90);
    }

    #[test]
    fn a_permit_that_nobody_renews_can_be_taken_after_an_hour_and_not_before() {
        let mut book = Book::default();
        held(book.apply(&grant("a", 1, false), 10, 0));
        assert!(book.apply(&grant("b", 2, false), 11, PERMIT_MS - 1).is_err());
        // The holder may renew as long as nobody took it.
        held(book.apply(&grant("a", 1, false), 12, PERMIT_MS + 5));
        assert!(book.apply(&grant("b", 2, false), 13, PERMIT_MS + 6).is_err());
        let taken = held(book.apply(&grant("b", 2, false), 14, 2 * PERMIT_MS + 5));
        assert_eq!(taken.name, "b");
        assert!(book.apply(&grant("a", 1, false), 15, 2 * PERMIT_MS + 6).is_err());
    }

    #[test]
    fn a_node_rebuilds_by_itself_twice_a_day_and_then_an_operator_decides() {
        let mut book = Book::default();
        for job in 0..2 {
            held(book.apply(&grant("a", job, true), 10 + job as u64, 1_000 * job as u64));
        }
        let before = book.clone();
        let refused = book.apply(&grant("a", 2, true), 20, 2_000).unwrap_err();
        assert_eq!(refused, Refusal::RebuiltTooOften { name: "a".into(), times: 2 });
        assert_eq!(book, before, "a refusal changes nothing");
        // A resumed one does not count, another node has its own count, and so has an operator.
        held(book.apply(&grant("a", 1, true), 21, 3_000));
        held(book.apply(&grant("a", 3, false), 22, 3_000));
        book.apply(&RebuildCommand::Cancel { name: "a".into(), job: 3 }, 23, 3_000).unwrap();
        held(book.apply(&grant("b", 9, true), 24, 3_000));
        book.apply(&RebuildCommand::Cancel { name: "b".into(), job: 9 }, 25, 3_000).unwrap();
        held(book.apply(&grant("a", 4, true), 26, AUTOMATIC_SPAN_MS));
    }

    #[test]
    fn the_row_is_frozen_and_damage_is_refused() {
        let mut book = Book::default();
        held(book.apply(&grant("a", 1, true), 300, 5));
        let row = book.encode().unwrap();
        assert_eq!(
            row,
            [1, 1, 1, b'a', 1, 2, 251, 44, 1, 5, 5, 1, 251, 44, 1, 1, 1, b'a', 1, 5],
            "the form of a stored row never changes"
        );
        assert_eq!(Book::decode(Some(&row)).unwrap(), book);
        assert_eq!(Book::decode(None).unwrap(), Book::default());
        for length in 0..row.len() {
            assert!(Book::decode(row.get(..length)).is_err(), "{length} bytes");
        }
    }
}
