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
pub mod folder;
mod guard;
mod hidden;
mod lock;
pub mod lsm;
mod options;
pub mod precheck;
pub mod receive;
mod snapshot;

use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;

pub use applied::AppliedState;
pub use snapshot::Snapshot;

/// A failure of the local store. It is never the same on every node: the node must stop using it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The disk answered with an error.
    #[error("storage {operation} error: {source}")]
    Io {
        /// What was being done: `put`, `get`, `scan`, `flush`, `compact`, `checkpoint`, `open`.
        operation: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// What was read is not what was written.
    #[error("storage {operation} found damage: {detail}")]
    Damaged {
        /// What was being done.
        operation: &'static str,
        /// File, table and what does not match.
        detail: String,
    },
}

impl EngineError {
    /// An error with the same kind and text, for the second and later callers of a latched engine.
    pub fn repeat(&self) -> EngineError {
        match self {
            EngineError::Io { operation, source } => {
                EngineError::Io { operation, source: std::io::Error::new(source.kind(), source.to_string()) }
            }
            EngineError::Damaged { operation, detail } => EngineError::Damaged { operation, detail: detail.clone() },
        }
    }

    /// True when the disk had no room. Whether trying again is safe depends on what was being
    /// written, not on this.
    pub fn is_disk_full(&self) -> bool {
        match self {
            EngineError::Io { source, .. } => is_full(source),
            EngineError::Damaged { .. } => false,
        }
    }

    pub(crate) fn io(operation: &'static str, source: std::io::Error) -> EngineError {
        EngineError::Io { operation, source }
    }

    pub(crate) fn damaged(operation: &'static str, detail: impl Into<String>) -> EngineError {
        EngineError::Damaged { operation, detail: detail.into() }
    }
}

/// ENOSPC or a quota, under whichever kind the standard library files them.
fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

/// Hears what the engine does, for metrics. Called from its threads; must not block.
pub trait EngineObserver: Send + Sync + 'static {
    /// `put` (one batch), `flush`, `compact`, `checkpoint` or `open` ended well.
    fn operation_done(&self, operation: &'static str, took: Duration);
    /// Any operation, reads too, ended with this error.
    fn operation_failed(&self, operation: &'static str, error: &EngineError);
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
