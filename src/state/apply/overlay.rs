//! What the entry at hand has written so far, laid over the tree.
//!
//! Commands of one entry see each other through it. Rows are only appended; an index over them is
//! built when the first read asks for it, because most entries never read. A refused command's rows are cut
//! off again: the rows of the command at hand have an index of their own, so that this costs nothing.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;

use crate::state::engine::{EngineError, Row, StateRead, WriteBatch};

/// See the module's story.
pub(super) struct Overlay<'r> {
    read: &'r dyn StateRead,
    batch: WriteBatch,
    /// Rows from here on belong to the command at hand.
    command_from: usize,
    earlier: Index,
    current: Index,
}

#[derive(Default)]
struct Index {
    /// Key to position in the batch; the latest of a key.
    positions: BTreeMap<Bytes, usize>,
    /// Rows before this position are in.
    upto: usize,
}

impl Index {
    fn cover(&mut self, batch: &WriteBatch, from: usize, to: usize) {
        let from = self.upto.max(from);
        for (position, (key, _)) in batch.rows.iter().enumerate().take(to).skip(from) {
            self.positions.insert(key.clone(), position);
        }
        self.upto = from.max(to);
    }
}

impl<'r> Overlay<'r> {
    /// Nothing written yet; room for the usual rows of so many commands.
    pub fn new(read: &'r dyn StateRead, commands: usize) -> Self {
        Overlay {
            read,
            batch: WriteBatch { rows: Vec::with_capacity(3 * commands + 1) },
            command_from: 0,
            earlier: Index::default(),
            current: Index::default(),
        }
    }

    /// The tree without this entry.
    pub fn base(&self) -> &'r dyn StateRead {
        self.read
    }

    /// Writes a row.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.batch.put(key, value);
    }

    /// Deletes a row.
    pub fn delete(&mut self, key: impl Into<Bytes>) {
        self.batch.delete(key);
    }

    /// The value of `key`, as written so far.
    pub fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.index();
        let position = self.current.positions.get(key).or_else(|| self.earlier.positions.get(key));
        match position.and_then(|position| self.batch.rows.get(*position)) {
            Some((_, value)) => Ok(value.clone()),
            None => self.read.get(key),
        }
    }

    /// At most `rows_max` rows between two keys, ascending, as written so far.
    pub fn scan(&mut self, from: &[u8], to: &[u8], rows_max: usize) -> Result<Vec<Row>, EngineError> {
        self.index();
        let range = (Bound::Included(from), Bound::Excluded(to));
        let mut rows = BTreeMap::new();
        let mut written = BTreeMap::new();
        for index in [&self.earlier, &self.current] {
            for (key, position) in index.positions.range::<[u8], _>(range) {
                if let Some((_, value)) = self.batch.rows.get(*position) {
                    written.insert(key.clone(), value.clone());
                }
            }
        }
        // Each row written here hides at most one below, so this many suffice.
        for row in self.read.scan(range.0, range.1).take(rows_max + written.len()) {
            let (key, value) = row?;
            rows.insert(key, value);
        }
        for (key, value) in written {
            match value {
                Some(value) => rows.insert(key, value),
                None => rows.remove(&key),
            };
        }
        Ok(rows.into_iter().take(rows_max).collect())
    }

    /// The rows of the command at hand stay.
    pub fn keep_command(&mut self) {
        self.command_from = self.batch.rows.len();
        self.current = Index::default();
    }

    /// The rows of the command at hand were never written.
    pub fn drop_command(&mut self) {
        self.batch.rows.truncate(self.command_from);
        self.current = Index::default();
    }

    /// All rows, in order.
    pub fn into_batch(self) -> WriteBatch {
        self.batch
    }

    fn index(&mut self) {
        self.earlier.cover(&self.batch, 0, self.command_from);
        self.current.cover(&self.batch, self.command_from, self.batch.rows.len());
    }
}
