//! Checks a history against the facts found on each node afterwards. A pure function.
//!
//! An unknown attempt never counts as absent and never as present: it may take effect until the end.
//! A value counts as refused only when every attempt to write it was refused. Facts of values that
//! nobody wrote are findings too: an invented answer is as wrong as a lost one.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::recorder::{History, ReadAttempt, ReadOutcome, Seen, WriteOutcome};

/// Findings kept in full; beyond it only the counts grow, so that a broken run cannot fill memory.
pub const FINDINGS_MAX: usize = 200;

/// One stored fact, as a full linearizable listing of a node showed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// The key's number.
    pub key: u64,
    /// The value's number.
    pub value: u64,
    /// Its sequence number.
    pub index: u64,
    /// Its id.
    pub id: u128,
}

/// Everything one node lists after the run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NodeFacts {
    /// The node, counted from 0.
    pub node: u16,
    /// When the listing began, microseconds. Writes acknowledged before it must be in it.
    pub start_us: u64,
    /// All facts, superseded ones too, in any order.
    pub facts: Vec<Fact>,
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// An acknowledged write is not there.
    Lost,
    /// One write is there more than once, or was acknowledged with two different outcomes.
    Doubled,
    /// A linearizable read missed a write acknowledged before it began, or went back behind another read.
    Stale,
    /// A write whose every attempt was refused as not applied is there.
    RefusedButPresent,
    /// A fact that nobody wrote, or under a key or index other than the acknowledged one.
    Invented,
    /// A write that began after another was acknowledged got a lower index.
    OutOfOrder,
    /// Two nodes show one write under different indexes or ids.
    Diverged,
}

/// One wrong thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is wrong.
    pub kind: FindingKind,
    /// The key's number.
    pub key: u64,
    /// The value's number, when one value is concerned.
    pub value: Option<u64>,
    /// The node that showed it, when one did.
    pub node: Option<u16>,
    /// What was expected and what was seen.
    pub detail: String,
}

/// What the judge says about a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verdict {
    /// Values acknowledged.
    pub acknowledged: u64,
    /// Values whose every attempt was refused.
    pub refused: u64,
    /// Values of which nobody knows whether they were written.
    pub unknown: u64,
    /// Of the unknown values, those that are there.
    pub unknown_present: u64,
    /// Linearizable reads that were answered.
    pub reads: u64,
    /// Nodes whose facts were compared.
    pub nodes: usize,
    /// How often each kind of finding was met.
    pub counts: BTreeMap<FindingKind, u64>,
    /// The first `FINDINGS_MAX` findings.
    pub findings: Vec<Finding>,
}

impl Verdict {
    /// Nothing wrong was found.
    pub fn is_clean(&self) -> bool {
        self.counts.is_empty()
    }

    /// How often `kind` was met.
    pub fn count(&self, kind: FindingKind) -> u64 {
        self.counts.get(&kind).copied().unwrap_or(0)
    }

    fn add(&mut self, kind: FindingKind, key: u64, on: (Option<u64>, Option<u16>), detail: String) {
        *self.counts.entry(kind).or_insert(0) += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding { kind, key, value: on.0, node: on.1, detail });
        }
    }
}

/// What the client was told about one value, over all its attempts.
#[derive(Clone, Copy)]
struct Told {
    key: u64,
    start_us: u64,
    /// Earliest acknowledgement: end time, index, id.
    acknowledged: Option<(u64, u64, u128)>,
    some_unknown: bool,
}

/// Checks `history` against `nodes`. The listings must have been taken after the last write ended.
pub fn check(history: &History, nodes: &[NodeFacts]) -> Verdict {
    let mut verdict = Verdict { nodes: nodes.len(), ..Verdict::default() };
    let told = gather(history, &mut verdict);
    for value in told.values() {
        match (value.acknowledged, value.some_unknown) {
            (Some(_), _) => verdict.acknowledged += 1,
            (None, true) => verdict.unknown += 1,
            (None, false) => verdict.refused += 1,
        }
    }
    check_order(&told, &mut verdict);
    check_nodes(&told, nodes, &mut verdict);
    check_reads(&told, history, &mut verdict);
    verdict
}

fn gather(history: &History, verdict: &mut Verdict) -> HashMap<u64, Told> {
    let mut told: HashMap<u64, Told> = HashMap::with_capacity(history.writes.len());
    for write in &history.writes {
        let entry = told.entry(write.value).or_insert(Told {
            key: write.key,
            start_us: write.start_us,
            acknowledged: None,
            some_unknown: false,
        });
        entry.start_us = entry.start_us.min(write.start_us);
        match write.outcome {
            WriteOutcome::Refused { .. } => {}
            WriteOutcome::Unknown { .. } => entry.some_unknown = true,
            WriteOutcome::Acknowledged { index, id, .. } => match entry.acknowledged {
                None => entry.acknowledged = Some((write.end_us, index, id)),
                Some((end_us, first_index, first_id)) => {
                    entry.acknowledged = Some((end_us.min(write.end_us), first_index, first_id));
                    if (index, id) != (first_index, first_id) {
                        let detail = format!(
                            "acknowledged as index {first_index} id {first_id:032x} and as index {index} id {id:032x}"
                        );
                        let on = (Some(write.value), Some(write.node));
                        verdict.add(FindingKind::Doubled, write.key, on, detail);
                    }
                }
            },
        }
    }
    told
}

/// Index order must agree with real time: a write that began after another was acknowledged comes later.
fn check_order(told: &HashMap<u64, Told>, verdict: &mut Verdict) {
    let mut acknowledged: Vec<(u64, u64, u64, u64, u64)> = told
        .iter()
        .filter_map(|(value, t)| t.acknowledged.map(|(end_us, index, _)| (index, t.start_us, end_us, t.key, *value)))
        .collect();
    acknowledged.sort_unstable();
    let mut previous: Option<(u64, u64, u64)> = None;
    for &(index, _, _, key, value) in &acknowledged {
        if let Some((last_index, _, last_value)) = previous
            && last_index == index
        {
            let detail = format!("values {last_value} and {value} were acknowledged as index {index}");
            verdict.add(FindingKind::Diverged, key, (Some(value), None), detail);
        }
        previous = Some((index, key, value));
    }
    // From the highest index down: the earliest end among higher indexes must not lie before this start.
    let mut earliest_end: Option<(u64, u64, u64)> = None;
    for &(index, start_us, end_us, key, value) in acknowledged.iter().rev() {
        if let Some((end_above_us, index_above, value_above)) = earliest_end
            && end_above_us < start_us
        {
            let detail = format!(
                "began at {start_us} us and got index {index}, after value {value_above} was acknowledged at {end_above_us} us with the higher index {index_above}"
            );
            verdict.add(FindingKind::OutOfOrder, key, (Some(value), None), detail);
        }
        if earliest_end.is_none_or(|(end_above_us, _, _)| end_us < end_above_us) {
            earliest_end = Some((end_us, index, value));
        }
    }
}

fn check_nodes(told: &HashMap<u64, Told>, nodes: &[NodeFacts], verdict: &mut Verdict) {
    // Of each value the first fact met on any node, to compare the others with.
    let mut first_seen: HashMap<u64, (u16, Fact)> = HashMap::new();
    for listing in nodes {
        let node = Some(listing.node);
        let mut here: HashMap<u64, Fact> = HashMap::with_capacity(listing.facts.len());
        for fact in &listing.facts {
            let on = (Some(fact.value), node);
            if let Some(other) = here.insert(fact.value, *fact) {
                let detail = format!("stored at index {} and at index {}", other.index, fact.index);
                verdict.add(FindingKind::Doubled, fact.key, on, detail);
                continue;
            }
            check_fact(told, fact, listing.node, verdict);
            match first_seen.get(&fact.value) {
                None => {
                    first_seen.insert(fact.value, (listing.node, *fact));
                }
                Some((other_node, other)) if other != fact => {
                    let detail = format!("node {other_node} shows {other:?}, this node {fact:?}");
                    verdict.add(FindingKind::Diverged, fact.key, on, detail);
                }
                Some(_) => {}
            }
        }
        for (value, told) in told {
            let Some((end_us, index, _)) = told.acknowledged else {
                continue;
            };
            if end_us <= listing.start_us && !here.contains_key(value) {
                let detail = format!("acknowledged at {end_us} us as index {index}, absent");
                verdict.add(FindingKind::Lost, told.key, (Some(*value), node), detail);
            }
        }
    }
    let present_though_unknown = told
        .iter()
        .filter(|(value, told)| told.acknowledged.is_none() && told.some_unknown && first_seen.contains_key(value));
    verdict.unknown_present = present_though_unknown.count() as u64;
}

/// One fact against what its writer was told.
fn check_fact(told: &HashMap<u64, Told>, fact: &Fact, node: u16, verdict: &mut Verdict) {
    let on = (Some(fact.value), Some(node));
    let Some(told) = told.get(&fact.value) else {
        let detail = format!("nobody wrote this value; stored at index {}", fact.index);
        verdict.add(FindingKind::Invented, fact.key, on, detail);
        return;
    };
    if told.key != fact.key {
        let detail = format!("written to key {}, found under key {}", told.key, fact.key);
        verdict.add(FindingKind::Invented, fact.key, on, detail);
    }
    match told.acknowledged {
        Some((_, index, id)) if (index, id) != (fact.index, fact.id) => {
            let detail = format!(
                "acknowledged as index {index} id {id:032x}, stored as index {} id {:032x}",
                fact.index, fact.id
            );
            verdict.add(FindingKind::Doubled, fact.key, on, detail);
        }
        None if !told.some_unknown => {
            let detail = format!("every attempt was refused, stored at index {}", fact.index);
            verdict.add(FindingKind::RefusedButPresent, fact.key, on, detail);
        }
        _ => {}
    }
}

/// What must be visible from `at_us` on: `index` was acknowledged, or shown by a read, at that time.
#[derive(Clone, Copy)]
struct Visible {
    at_us: u64,
    index: u64,
    by_read: bool,
}

fn check_reads(told: &HashMap<u64, Told>, history: &History, verdict: &mut Verdict) {
    let mut visible: HashMap<u64, Vec<Visible>> = HashMap::new();
    for told in told.values() {
        if let Some((at_us, index, _)) = told.acknowledged {
            let by_read = false;
            let mark = Visible { at_us, index, by_read };
            visible.entry(told.key).or_default().push(mark);
        }
    }
    for read in &history.reads {
        if let ReadOutcome::Answered { newest } = read.outcome {
            verdict.reads += 1;
            if let Some(seen) = newest {
                let mark = Visible { at_us: read.end_us, index: seen.index, by_read: true };
                visible.entry(read.key).or_default().push(mark);
            }
        }
    }
    // Ascending by time, each mark raised to the highest index up to it: one binary search per read.
    for marks in visible.values_mut() {
        marks.sort_unstable_by_key(|mark| mark.at_us);
        let mut highest = Visible { at_us: 0, index: 0, by_read: false };
        for mark in marks.iter_mut() {
            if mark.index >= highest.index {
                highest = *mark;
            } else {
                mark.index = highest.index;
                mark.by_read = highest.by_read;
            }
        }
    }
    for read in &history.reads {
        if let ReadOutcome::Answered { newest } = read.outcome {
            check_read(told, visible.get(&read.key), read, newest, verdict);
        }
    }
}

fn check_read(
    told: &HashMap<u64, Told>,
    visible: Option<&Vec<Visible>>,
    read: &ReadAttempt,
    newest: Option<Seen>,
    verdict: &mut Verdict,
) {
    let on = (newest.map(|seen| seen.value), Some(read.node));
    if let Some(marks) = visible {
        // Marks that ended strictly before the read began; equal times may be concurrent.
        let before = marks.partition_point(|mark| mark.at_us < read.start_us);
        let must_see = before.checked_sub(1).and_then(|last| marks.get(last));
        let seen_index = newest.map_or(0, |seen| seen.index);
        if let Some(mark) = must_see
            && seen_index < mark.index
        {
            let by = if mark.by_read { "another read had shown" } else { "acknowledged was" };
            let detail = format!(
                "a read that began at {} us saw index {seen_index}; {by} index {} before it",
                read.start_us, mark.index
            );
            verdict.add(FindingKind::Stale, read.key, on, detail);
        }
    }
    let Some(seen) = newest else { return };
    match told.get(&seen.value) {
        Some(told) if told.key == read.key && told.start_us <= read.end_us => {
            if told.acknowledged.is_none() && !told.some_unknown {
                let detail = format!("a read at {} us shows a refused write", read.end_us);
                verdict.add(FindingKind::RefusedButPresent, read.key, on, detail);
            }
        }
        _ => {
            let detail = format!("a read at {} us shows a value that nobody had written to this key", read.end_us);
            verdict.add(FindingKind::Invented, read.key, on, detail);
        }
    }
}
