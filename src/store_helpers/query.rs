//! Answering a query: one pass over a key range, a choice per concept and predicate.
//!
//! A group (one concept and predicate) lies together, the latest assertion first. `latest` takes the
//! first that stands and jumps to the next group; `votes` and `confidence` look at the whole group
//! and keep the best; `all` keeps everything. When the page is full or the budget spent, the cursor
//! takes the next key, and the best of a group that was left in its middle.

use std::collections::HashMap;

use super::cursor::{self, Cursor};
use super::walk::{Found, Walker, load, parse};
use super::{LIMIT_MAX, PAGE_BYTES_MAX, Query, QueryPage, Resolve, StoreError, StoreView};
use crate::model::resolve::{Standing, compare};
use crate::state::keys;
use crate::state::record::AssertionRecord;

/// Rows that one call looks at: some 50 ms. A page that ends early continues with its cursor.
pub(super) const QUERY_ROWS_MAX: usize = 100_000;

/// The group that the walk is in.
struct Group {
    /// Its key prefix.
    prefix: Vec<u8>,
    best: Option<(Standing, Found)>,
}

struct Run<'a> {
    view: &'a StoreView,
    query: &'a Query,
    as_of: u64,
    limit: usize,
    found: Vec<Found>,
    found_bytes: usize,
    group: Option<Group>,
    /// First superseding index of the epochs met.
    epochs: HashMap<String, Option<u64>>,
}

/// Answers `query`.
pub(super) fn run(view: &StoreView, query: &Query) -> Result<QueryPage, StoreError> {
    run_within(view, query, QUERY_ROWS_MAX)
}

/// Answers `query`, looking at about `rows_max` rows.
pub(super) fn run_within(view: &StoreView, query: &Query, rows_max: usize) -> Result<QueryPage, StoreError> {
    let hash = cursor::query_hash(&(
        "query",
        &query.concept_path,
        query.subtree,
        &query.predicate,
        query.resolve.as_str(),
        &query.epoch,
        query.as_of,
        query.valid_at_ms,
    ))?;
    let cursor = match &query.cursor {
        Some(text) => Some(Cursor::decode(text, hash, view.fact_index)?),
        None => None,
    };
    let as_of = match &cursor {
        Some(cursor) => cursor.as_of,
        None => view.resolve_as_of(query.as_of)?,
    };
    let mut run = Run {
        view,
        query,
        as_of,
        limit: query.limit.clamp(1, LIMIT_MAX),
        found: Vec::new(),
        found_bytes: 0,
        group: None,
        epochs: HashMap::new(),
    };
    let next = run.ranges(cursor, rows_max)?;
    let cursor = next.map(|next| next.encode(hash));
    let assertions = run.found.iter().map(Found::view).collect::<Result<_, _>>()?;
    Ok(QueryPage { assertions, index: as_of, cursor })
}

impl Run<'_> {
    /// Walks the ranges from where the cursor points; returns where the next page begins.
    fn ranges(&mut self, cursor: Option<Cursor>, mut rows_max: usize) -> Result<Option<Cursor>, StoreError> {
        let ranges = ranges(self.query);
        let mut from = None;
        if let Some(cursor) = cursor {
            // A place is where a range starts or an assertion's key: from any other one the walk
            // would take a forged cursor for damage.
            let place = &cursor.place;
            let inside = ranges.iter().any(|(start, end)| {
                place == start
                    || (start < place && place < end && keys::parse_fact(place).is_some_and(|key| key.fact.is_none()))
            });
            if !inside {
                return Err(cursor::bad("points outside its query"));
            }
            self.resume(&cursor)?;
            from = Some(cursor.place);
        }
        for (start, end) in ranges {
            if from.as_ref().is_some_and(|from| *from >= end) {
                continue;
            }
            let start = from.take().filter(|from| *from > start).unwrap_or(start);
            if self.is_full() {
                return Ok(Some(self.stop_at(start)?));
            }
            let mut walker = Walker::new(self.view.read(), &start, end, rows_max.max(2))?;
            if let Some(next) = self.walk(&mut walker)? {
                return Ok(Some(next));
            }
            rows_max = walker.budget_rows();
        }
        Ok(None)
    }

    /// Takes up the group that the last page left in its middle: `number` is one more than the
    /// index of its best so far.
    fn resume(&mut self, cursor: &Cursor) -> Result<(), StoreError> {
        let Some(index) = cursor.number.checked_sub(1) else {
            return Ok(());
        };
        let outside = || cursor::bad("points outside its query");
        let group_len = parse(&cursor.place).map_err(|_| outside())?.group_len;
        let prefix = cursor.place.get(..group_len).ok_or_else(outside)?.to_vec();
        let best = load(self.view.read(), &keys::in_group(&prefix, index), self.as_of)?.ok_or_else(outside)?;
        self.group = Some(Group { prefix, best: Some((best.standing()?, best)) });
        Ok(())
    }

    fn walk(&mut self, walker: &mut Walker<'_>) -> Result<Option<Cursor>, StoreError> {
        while let Some((key, fact)) = walker.fact()? {
            let prefix = key.get(..fact.group_len).unwrap_or_default();
            if self.group.as_ref().is_some_and(|group| group.prefix != prefix) {
                self.end_group();
            }
            if self.is_full() || walker.is_spent() {
                return self.stop_at(key.to_vec()).map(Some);
            }
            if let Some(wanted) = &self.query.predicate
                && fact.predicate != wanted
            {
                let wanted_group = keys::group(fact.path, wanted);
                let target = if key < wanted_group {
                    wanted_group
                } else {
                    // This concept's later predicates.
                    keys::path_range(fact.path).1
                };
                walker.skip_to(&target)?;
                continue;
            }
            if fact.index > self.as_of {
                walker.skip_to(&keys::in_group(prefix, self.as_of))?;
                continue;
            }
            if fact.fact.is_some() {
                // A cursor never points here; facts without their assertion are damage.
                return Err(StoreError::Damaged {
                    what: format!("a fact about {} has no assertion before it", fact.path),
                });
            }
            let Some(found) = walker.assertion(self.as_of)? else {
                break;
            };
            let stands = self.stands(&found)?;
            self.take(found, prefix, stands, walker)?;
        }
        self.end_group();
        Ok(None)
    }

    fn take(&mut self, found: Found, prefix: &[u8], stands: bool, walker: &mut Walker<'_>) -> Result<(), StoreError> {
        match self.query.resolve {
            _ if !stands => {}
            Resolve::All => self.push(found),
            Resolve::Latest => {
                self.push(found);
                walker.skip_to(&keys::prefix_end(prefix))?;
            }
            Resolve::Votes | Resolve::Confidence => {
                let standing = found.standing()?;
                let group = self.group.get_or_insert_with(|| Group { prefix: prefix.to_vec(), best: None });
                let better =
                    group.best.as_ref().is_none_or(|(best, _)| compare(self.query.resolve, &standing, best).is_gt());
                if better {
                    group.best = Some((standing, found));
                }
            }
        }
        Ok(())
    }

    /// May this assertion be an answer?
    fn stands(&mut self, found: &Found) -> Result<bool, StoreError> {
        let all = self.query.resolve == Resolve::All;
        if found.superseded.is_some() && !all {
            return Ok(false);
        }
        let record = found.record()?;
        if !is_valid_at(&record, self.query.valid_at_ms) {
            return Ok(false);
        }
        match (&self.query.epoch, record.epoch) {
            (Some(wanted), epoch) => Ok(epoch == Some(wanted)),
            (None, Some(epoch)) if !all => Ok(!self.is_epoch_superseded(epoch)?),
            (None, _) => Ok(true),
        }
    }

    fn is_epoch_superseded(&mut self, name: &str) -> Result<bool, StoreError> {
        let first = match self.epochs.get(name) {
            Some(first) => *first,
            None => {
                let first = self.view.epoch_superseded(name)?.map(|(index, _)| index);
                self.epochs.insert(name.to_owned(), first);
                first
            }
        };
        Ok(first.is_some_and(|index| index <= self.as_of))
    }

    fn push(&mut self, found: Found) {
        self.found_bytes += found.bytes();
        self.found.push(found);
    }

    fn end_group(&mut self) {
        if let Some((_, best)) = self.group.take().and_then(|group| group.best) {
            self.push(best);
        }
    }

    fn is_full(&self) -> bool {
        self.found.len() >= self.limit || self.found_bytes >= PAGE_BYTES_MAX
    }

    fn stop_at(&self, place: Vec<u8>) -> Result<Cursor, StoreError> {
        let best = self.group.as_ref().and_then(|group| group.best.as_ref());
        let number = best.map_or(0, |(standing, _)| standing.index.saturating_add(1));
        Ok(Cursor { as_of: self.as_of, number, place })
    }
}

fn is_valid_at(record: &AssertionRecord<'_>, valid_at_ms: Option<i64>) -> bool {
    valid_at_ms.is_none_or(|at| {
        record.valid_from_ms.is_none_or(|from| from <= at) && record.valid_to_ms.is_none_or(|to| at < to)
    })
}

/// The key ranges of a query: the concept itself, and what is below it. Between the two lie paths
/// that only share its letters.
fn ranges(query: &Query) -> Vec<(Vec<u8>, Vec<u8>)> {
    let own = match &query.predicate {
        Some(predicate) => {
            let group = keys::group(&query.concept_path, predicate);
            let end = keys::prefix_end(&group);
            (group, end)
        }
        None => keys::path_range(&query.concept_path),
    };
    if query.subtree { vec![own, keys::below_range(&query.concept_path)] } else { vec![own] }
}
