//! The ordered key-value store under the state, behind one small trait.
//!
//! One thread writes (the apply thread) and many read. Readers see only what has been published,
//! and publishing happens between entries, so that an entry is seen whole or not at all.

//!
//! The implementation is [`lsm::LsmEngine`]. It keeps no log of its own: what a crash takes from
//! memory is applied again from the Raft log, from [`AppliedState`] on.

mod applied;
mod background;
pub mod checkpoint;
pub mod damage;
pub mod direct;
mod error;
pub mod folder;
pub mod foreign;
mod guard;
mod hidden;
pub mod latch;
mod lock;
pub mod lsm;
pub mod manifest;
mod options;
pub mod precheck;
pub mod quarantine;
pub mod receive;
pub mod replace;
pub mod scrub;
mod snapshot;
mod verify;

use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;

pub use applied::AppliedState;
pub use damage::TreeDamage;
pub(crate) use error::synced;
pub use error::{EngineError, ErrorClass};
pub use latch::POINTS;
pub use snapshot::Snapshot;

/// Hears what the engine does, for metrics. Called from its threads; must not block.
pub trait EngineObserver: Send + Sync + 'static {
    /// `put` (one batch), `flush`, `compact`, `checkpoint` or `open` ended well.
    fn operation_done(&self, operation: &'static str, took: Duration);
    /// Any operation, reads too, ended with this error.
    fn operation_failed(&self, operation: &'static str, error: &EngineError);
    /// Something was not what was written; `operation_failed` was called too when it was an operation.
    fn damage_found(&self, _damage: &TreeDamage) {}
}

/// An observer that hears nothing.
#[derive(Debug, Default)]
pub struct NoObserver;

impl EngineObserver for NoObserver {
    fn operation_done(&self, _operation: &'static str, _took: Duration) {}
    fn operation_failed(&self, _operation: &'static str, _error: &EngineError) {}
}

/// One row.
pub type Row = (Bytes, Bytes);

/// Reads over one consistent state.
pub trait StateRead {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError>;
    /// Rows with keys in the range, ascending.
    fn scan<'a>(
        &'a self,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
    ) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a>;
    /// A row that was read does not decode: the tree below, if there is one, is to be told.
    fn report_damage(&self, _what: &str) {}
}

/// Changes that become visible together.
#[derive(Clone, Debug, Default)]
pub struct WriteBatch {
    /// Key and value, or `None` to delete. In order; a later one of the same key wins.
    pub rows: Vec<(Bytes, Option<Bytes>)>,
}

impl WriteBatch {
    /// Adds a row.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.rows.push((key.into(), Some(value.into())));
    }
    /// Removes a row.
    pub fn delete(&mut self, key: impl Into<Bytes>) {
        self.rows.push((key.into(), None));
    }
}
