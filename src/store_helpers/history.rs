//! Every fact about a concept, a predicate or an assertion, oldest first.
//!
//! The tree has the facts of an assertion together and the latest first; a history is by index over
//! all of them. So a page is a pass that keeps the smallest indexes behind the last page's, in a
//! heap bounded by the page. That pass is bounded too: a concept with more facts than that has to be
//! asked by predicate or assertion.

use std::collections::BTreeMap;

use bytes::Bytes;
use uuid::Uuid;

use super::cursor::{self, Cursor};
use super::walk::{Walker, parse};
use super::{HistoryEvent, HistoryPage, HistoryQuery, HistoryTarget, LIMIT_MAX, PAGE_BYTES_MAX, StoreError, StoreView};
use crate::state::keys::{self, FactKind};
use crate::state::record::{AssertionRecord, SupersessionRecord, VoteRecord};

/// Rows that one call looks at: about half a second.
const HISTORY_ROWS_MAX: usize = 1_000_000;

/// Index, then kind: an assertion comes before the supersession that its own field wrote.
type Order = (u64, u8);

/// The rows of the page so far.
struct Page {
    rows: BTreeMap<Order, (Bytes, Bytes, Uuid)>,
    bytes: usize,
    limit: usize,
    /// Something behind the page's last row was left out.
    more: bool,
}

impl Page {
    fn add(&mut self, order: Order, key: Bytes, row: Bytes, about: Uuid) {
        // Once something was left out, nothing behind it may come in.
        if self.more && self.rows.last_key_value().is_some_and(|(last, _)| order > *last) {
            return;
        }
        self.bytes += key.len() + row.len();
        self.rows.insert(order, (key, row, about));
        while self.rows.len() > self.limit || (self.bytes > PAGE_BYTES_MAX && self.rows.len() > 1) {
            if let Some((_, (key, row, _))) = self.rows.pop_last() {
                self.bytes -= key.len() + row.len();
            }
            self.more = true;
        }
    }
}

/// Answers `query`.
pub(super) fn run(view: &StoreView, query: &HistoryQuery) -> Result<HistoryPage, StoreError> {
    let hash = cursor::query_hash(&("history", &query.target))?;
    let cursor = match &query.cursor {
        Some(text) => Some(Cursor::decode(text, hash, view.fact_index)?),
        None => None,
    };
    let (as_of, after) = match &cursor {
        Some(cursor) => match cursor.place.as_slice() {
            [kind] => (cursor.as_of, Some((cursor.number, *kind))),
            _ => return Err(cursor::bad("points outside its query")),
        },
        None => (view.fact_index, None),
    };
    let (from, end) = match &query.target {
        HistoryTarget::Concept { path, predicate: None } => keys::path_range(path),
        HistoryTarget::Concept { path, predicate: Some(predicate) } => {
            let group = keys::group(path, predicate);
            let end = keys::prefix_end(&group);
            (group, end)
        }
        HistoryTarget::Assertion(id) => match view.place(*id)? {
            Some(key) => {
                let end = keys::assertion_end(&key);
                (key, end)
            }
            None => {
                return Ok(HistoryPage { events: Vec::new(), index: as_of, cursor: None });
            }
        },
    };
    let limit = query.limit.clamp(1, LIMIT_MAX);
    let mut page = Page { rows: BTreeMap::new(), bytes: 0, limit, more: false };
    collect(&mut page, view, (from, end), as_of, after)?;

    let cursor = match page.rows.last_key_value() {
        Some((&(index, kind), _)) if page.more => Some(Cursor { as_of, number: index, place: vec![kind] }.encode(hash)),
        _ => None,
    };
    let events = page.rows.values().map(|(key, row, about)| event(key, row, *about)).collect::<Result<_, _>>()?;
    Ok(HistoryPage { events, index: as_of, cursor })
}

fn collect(
    page: &mut Page,
    view: &StoreView,
    (from, end): (Vec<u8>, Vec<u8>),
    as_of: u64,
    after: Option<Order>,
) -> Result<(), StoreError> {
    let mut walker = Walker::new(view.read(), &from, end, HISTORY_ROWS_MAX)?;
    let mut about = Uuid::nil();
    while let Some((key, row)) = walker.row().cloned() {
        if walker.is_spent() {
            return Err(StoreError::TooMuch { rows_max: HISTORY_ROWS_MAX });
        }
        let fact = parse(&key)?;
        let order = match fact.fact {
            None => {
                about = AssertionRecord::decode(&row)?.id;
                (fact.index, 0)
            }
            Some((kind, index)) => (index, kind as u8),
        };
        walker.step()?;
        if order.0 <= as_of && after.is_none_or(|after| order > after) {
            page.add(order, key, row, about);
        }
    }
    Ok(())
}

fn event(key: &[u8], row: &[u8], about: Uuid) -> Result<HistoryEvent, StoreError> {
    let fact = parse(key)?;
    match fact.fact {
        None => HistoryEvent::assertion(&fact, &AssertionRecord::decode(row)?),
        Some((FactKind::Vote, index)) => HistoryEvent::vote(index, about, &VoteRecord::decode(row)?),
        Some((FactKind::Supersession, index)) => {
            HistoryEvent::supersession(index, about, &SupersessionRecord::decode(row)?)
        }
    }
}
