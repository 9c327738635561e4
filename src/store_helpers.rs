//! The only way by which request paths touch the engine.
//!
//! A `StoreView` is one published state: whole entries up to a fact index, whatever is applied
//! meanwhile. It answers queries, single assertions, histories, epochs and import positions. Every
//! row is decoded with checks, every call looks at a bounded number of rows and returns a bounded
//! number of bytes, and a longer answer continues through a cursor pinned to the index of its first
//! page. Nothing here writes.

use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use crate::model::Resolve as ModelResolve;
use crate::state::engine::{EngineError, StateRead};
use crate::state::keys;
use crate::state::record::{Counters, EpochRecord, RecordError, decode_number, decode_place, decode_text};

mod cursor;
mod history;
mod query;
#[cfg(test)]
mod tests;
mod view;
mod walk;

pub use view::{AssertionView, EpochView, HistoryEvent, VotesView};

/// How a query picks per concept and predicate.
pub type Resolve = ModelResolve;

/// Most assertions or events on a page.
pub const LIMIT_MAX: usize = 1000;
/// Page size when none is asked for.
pub const LIMIT_DEFAULT: usize = 100;
/// A page ends once its rows have this many bytes, so that a thousand large values do not fill the
/// memory. One more row may follow, so a page has up to 5 MiB.
pub const PAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Why a read gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A row is not what was written; another replica has a better one.
    #[error("storage get found damage: {what}")]
    Damaged {
        /// Which row, and what does not fit.
        what: String,
    },
    /// The cursor is not one of ours, or belongs to another query.
    #[error("the cursor {why}")]
    BadCursor {
        /// The rest of the sentence.
        why: String,
    },
    /// The cursor is pinned to an index that this state does not have.
    #[error("the cursor is gone: {why}")]
    CursorGone {
        /// Which index, and where this state stands.
        why: String,
    },
    /// More facts than one call may look at; ask for less at once.
    #[error("more than {rows_max} rows to look at: name a predicate or an assertion")]
    TooMuch {
        /// The bound, in rows.
        rows_max: usize,
    },
}

impl StoreError {
    /// True when this node's own data is not what was written: another node has a better answer.
    pub fn is_damage(&self) -> bool {
        match self {
            StoreError::Engine(error) => error.is_damage(),
            StoreError::Damaged { .. } => true,
            StoreError::BadCursor { .. } | StoreError::CursorGone { .. } | StoreError::TooMuch { .. } => false,
        }
    }
}

impl From<RecordError> for StoreError {
    fn from(error: RecordError) -> Self {
        StoreError::Damaged { what: error.to_string() }
    }
}

/// Which past state a query asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum AsOf {
    /// As it was after the fact with this index.
    Index(u64),
    /// As it was at this time, Unix milliseconds: all facts before the first one created later.
    TimeMs(u64),
}

/// A query. The caller has validated path and names.
#[derive(Clone, Debug)]
pub struct Query {
    /// The concept.
    pub concept_path: String,
    /// Also every concept below it.
    pub subtree: bool,
    /// Only this predicate.
    pub predicate: Option<String>,
    /// How to pick per concept and predicate.
    pub resolve: Resolve,
    /// Only assertions of this epoch, even when it was superseded.
    pub epoch: Option<String>,
    /// A past state; a future one is answered as of now.
    pub as_of: Option<AsOf>,
    /// Only what is valid at this time, Unix milliseconds.
    pub valid_at_ms: Option<i64>,
    /// Most assertions on the page; taken as 1 to [`LIMIT_MAX`].
    pub limit: usize,
    /// Continues an earlier page of the same query.
    pub cursor: Option<String>,
}

/// A page of assertions, by path, then predicate, then (with `all`) the latest first.
#[derive(Debug)]
pub struct QueryPage {
    /// At most `limit`; fewer, even none, with a cursor when there was much to look at.
    pub assertions: Vec<AssertionView>,
    /// The fact index as of which the query was answered.
    pub index: u64,
    /// Where the next page begins; `None` when there is no more.
    pub cursor: Option<String>,
}

/// Whose history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum HistoryTarget {
    /// Of one concept, or of one predicate of it.
    Concept {
        /// The concept.
        path: String,
        /// Only this predicate.
        predicate: Option<String>,
    },
    /// Of one assertion.
    Assertion(Uuid),
}

/// Asks for every fact about something.
#[derive(Clone, Debug)]
pub struct HistoryQuery {
    /// Whose.
    pub target: HistoryTarget,
    /// Most events on the page; taken as 1 to [`LIMIT_MAX`].
    pub limit: usize,
    /// Continues an earlier page.
    pub cursor: Option<String>,
}

/// A page of events in the order of their indexes.
#[derive(Debug)]
pub struct HistoryPage {
    /// At most `limit`. An assertion's own `supersedes` also shows as a supersession with its index.
    pub events: Vec<HistoryEvent>,
    /// The fact index as of which it was answered.
    pub index: u64,
    /// Where the next page begins; `None` when there is no more.
    pub cursor: Option<String>,
}

/// One published state.
#[derive(Clone)]
pub struct StoreView {
    read: Arc<dyn StateRead + Send + Sync>,
    fact_index: u64,
}

impl StoreView {
    /// `read` shows exactly the facts up to `fact_index`.
    pub fn new(read: Arc<dyn StateRead + Send + Sync>, fact_index: u64) -> Self {
        StoreView { read, fact_index }
    }

    /// Sequence number of the last fact in this state.
    pub fn fact_index(&self) -> u64 {
        self.fact_index
    }

    /// Answers a query.
    pub fn query(&self, query: &Query) -> Result<QueryPage, StoreError> {
        self.reported(query::run(self, query))
    }

    /// One assertion, whatever superseded it; `None` when there is none with this id.
    pub fn assertion(&self, id: Uuid) -> Result<Option<AssertionView>, StoreError> {
        self.reported(self.load_assertion(id))
    }

    fn load_assertion(&self, id: Uuid) -> Result<Option<AssertionView>, StoreError> {
        let Some(key) = self.place(id)? else {
            return Ok(None);
        };
        match walk::load(self.read(), &key, self.fact_index)? {
            Some(found) => Ok(Some(found.view()?)),
            None => Err(StoreError::Damaged { what: format!("assertion {id} is missing where its place row points") }),
        }
    }

    /// Every fact about something, oldest first.
    pub fn history(&self, query: &HistoryQuery) -> Result<HistoryPage, StoreError> {
        self.reported(history::run(self, query))
    }

    /// The epoch `name`, if it exists.
    pub fn epoch(&self, name: &str) -> Result<Option<EpochView>, StoreError> {
        self.reported(self.load_epoch(name))
    }

    fn load_epoch(&self, name: &str) -> Result<Option<EpochView>, StoreError> {
        let Some(row) = self.read.get(&keys::epoch(name))? else {
            return Ok(None);
        };
        let record = EpochRecord::decode(&row)?;
        let superseded_by = self.epoch_superseded(name)?.map(|(_, by)| by);
        EpochView::new(name, &record, superseded_by).map(Some)
    }

    /// Records already imported under `import_id`; 0 for an unknown one.
    pub fn import_position(&self, import_id: &str) -> Result<u64, StoreError> {
        match self.read.get(&keys::import(import_id))? {
            Some(row) => self.reported(decode_number("import position", &row).map_err(StoreError::from)),
            None => Ok(0),
        }
    }

    /// Assertions ever stored, superseded ones included.
    pub fn count_assertions(&self) -> Result<u64, StoreError> {
        match self.read.get(keys::COUNTERS)? {
            Some(row) => self.reported(Counters::decode(&row).map(|c| c.assertions).map_err(StoreError::from)),
            None => Ok(0),
        }
    }

    /// A row that does not decode came out of a block that verifies: whoever repairs the tree is told.
    fn reported<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.inspect_err(|error| {
            if let StoreError::Damaged { what } = error {
                self.read.report_damage(what);
            }
        })
    }

    fn read(&self) -> &dyn StateRead {
        &*self.read
    }

    /// Key of the assertion `id`.
    fn place(&self, id: Uuid) -> Result<Option<Vec<u8>>, StoreError> {
        match self.read.get(&keys::id(id))? {
            Some(row) => Ok(Some(decode_place(&row)?)),
            None => Ok(None),
        }
    }

    /// The first supersession of an epoch: its index, and the name of the epoch that did it.
    fn epoch_superseded(&self, name: &str) -> Result<Option<(u64, String)>, StoreError> {
        let from = keys::with_byte(&keys::epoch(name), 0);
        let end = keys::prefix_end(&from);
        let Some(row) = walk::first(self.read(), &from, &end)? else {
            return Ok(None);
        };
        let (key, value) = row;
        let index = key.strip_prefix(from.as_slice()).and_then(keys::split_ascending);
        match index {
            Some((index, [])) => Ok(Some((index, decode_text("superseded epoch", &value)?.to_owned()))),
            _ => Err(RecordError::Damaged { what: "superseded epoch" }.into()),
        }
    }

    /// The fact index that a past state ends with.
    fn resolve_as_of(&self, as_of: Option<AsOf>) -> Result<u64, StoreError> {
        match as_of {
            None => Ok(self.fact_index),
            Some(AsOf::Index(index)) => Ok(index.min(self.fact_index)),
            Some(AsOf::TimeMs(time_ms)) => {
                let from = keys::moment(time_ms.saturating_add(1));
                let end = keys::prefix_end(&[keys::TAG_TIME]);
                match walk::first(self.read(), &from, &end)? {
                    Some((_, row)) => Ok(decode_number("moment", &row)?.saturating_sub(1).min(self.fact_index)),
                    None => Ok(self.fact_index),
                }
            }
        }
    }
}
