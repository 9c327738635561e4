#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use serde_json::{Value, json};

use super::*;
use crate::state::command::Operation;
use crate::state::test_support::{Machine, START_MS, uuid};

mod random;

pub(super) fn view(machine: &Machine) -> StoreView {
    StoreView::new(Arc::new(machine.tree.clone()), machine.applier.fact_index())
}

pub(super) fn query(path: &str) -> Query {
    let (path, subtree) = crate::model::path::parse_query(path).unwrap();
    Query {
        concept_path: path.into(),
        subtree,
        predicate: None,
        resolve: Resolve::Latest,
        epoch: None,
        as_of: None,
        valid_at_ms: None,
        limit: 100,
        cursor: None,
    }
}

fn values(view: &StoreView, query: &Query) -> Vec<String> {
    let page = view.query(query).unwrap();
    assert_eq!(page.cursor, None);
    page.assertions.iter().map(|a| a.value.get().to_owned()).collect()
}

fn all(path: &str) -> Query {
    Query { resolve: Resolve::All, ..query(path) }
}

#[test]
fn an_assertion_is_answered_as_the_design_says() {
    let mut machine = Machine::new();
    let epoch = machine.epoch("2026", None);
    machine.ok(epoch);
    let old = machine.assert("debian/net/curl", "version", "\"8.4\"");
    let mut new = machine.assertion("debian/net/curl", "version", r#"{"b":1.50,"a":[null]}"#);
    new.source = Some("apt".into());
    new.confidence = Some(0.9);
    new.epoch = Some("2026".into());
    new.supersedes = Some(old.id);
    new.valid_from_ms = Some(0);
    let new = machine.ok(Operation::Assert(vec![new]));
    for (voter, weight) in [("ann", 1.0), ("bob", 0.1), ("eve", 0.2), ("ann", -0.5)] {
        let op = machine.vote(new.id, voter, weight);
        machine.ok(op);
    }
    let view = view(&machine);
    let text = serde_json::to_string(&view.assertion(new.id).unwrap().unwrap()).unwrap();
    assert_eq!(
        text,
        format!(
            r#"{{"id":"{}","concept_path":"debian/net/curl","predicate":"version","value":{{"b":1.50,"a":[null]}},"source":"apt","confidence":0.9,"epoch":"2026","created_at":"2023-11-14T22:13:20.000Z","index":3,"votes":{{"sum":-0.2,"count":3}},"superseded_by":null,"supersedes":"{}","valid_from":"1970-01-01T00:00:00.000Z"}}"#,
            new.id, old.id
        )
    );
    let old_json = serde_json::to_value(view.assertion(old.id).unwrap().unwrap()).unwrap();
    assert_eq!(
        old_json,
        json!({"id": old.id, "concept_path": "debian/net/curl", "predicate": "version",
            "value": "8.4", "source": null, "confidence": null, "epoch": null,
            "created_at": "2023-11-14T22:13:20.000Z", "index": 2,
            "votes": {"sum": 0.0, "count": 0}, "superseded_by": new.id})
    );
    assert!(view.assertion(uuid(999)).unwrap().is_none());
    assert_eq!(view.count_assertions().unwrap(), 2);
    assert_eq!(view.import_position("x").unwrap(), 0);
}

#[test]
fn a_retraction_is_marked_and_leaves_the_answer() {
    let mut machine = Machine::new();
    let first = machine.assert("a", "p", "1");
    let second = machine.assert("a", "p", "2");
    let op = machine.supersede(second.id, None);
    machine.ok(op);
    let view = view(&machine);
    assert_eq!(values(&view, &query("a")), ["1"]);
    let page = view.query(&all("a")).unwrap();
    let page = serde_json::to_value(&page.assertions).unwrap();
    assert_eq!(page[0]["retracted"], Value::Bool(true));
    assert_eq!(page[0]["superseded_by"], Value::Null);
    assert_eq!(page[1]["id"], json!(first.id));
    assert_eq!(page[1].get("retracted"), None);
}

#[test]
fn subtrees_hold_the_concept_and_what_is_below_and_nothing_beside() {
    let mut machine = Machine::new();
    for path in ["a/b", "a/b/c", "a/b-c", "a/b/c/d", "a/bb", "a", "a/b.", "a/b/0"] {
        machine.assert(path, "q", &format!("\"{path} q\""));
        machine.assert(path, "p", &format!("\"{path} p\""));
    }
    let view = view(&machine);
    let texts = |query: &Query| values(&view, query).join(" ").replace('"', "");
    assert_eq!(texts(&query("a/b")), "a/b p a/b q");
    assert_eq!(texts(&query("a/b/**")), "a/b p a/b q a/b/0 p a/b/0 q a/b/c p a/b/c q a/b/c/d p a/b/c/d q");
    for (predicate, answer) in
        [("q", "a/b q a/b/0 q a/b/c q a/b/c/d q"), ("p", "a/b p a/b/0 p a/b/c p a/b/c/d p"), ("o", ""), ("r", "")]
    {
        assert_eq!(texts(&Query { predicate: Some(predicate.into()), ..query("a/b/**") }), answer);
    }
    assert_eq!(texts(&query("b/**")), "");
}

#[test]
fn superseded_epochs_leave_the_default_answer() {
    let mut machine = Machine::new();
    let op = machine.epoch("2025", None);
    machine.ok(op);
    let mut old = machine.assertion("a", "p", "1");
    old.epoch = Some("2025".into());
    old.confidence = Some(1.0);
    machine.ok(Operation::Assert(vec![old]));
    let before = machine.applier.fact_index();
    let op = machine.epoch("2026", Some("2025"));
    machine.ok(op);
    machine.assert("a", "p", "0");
    let op = machine.epoch("2026b", Some("2025"));
    machine.ok(op);
    let view = view(&machine);
    for resolve in [Resolve::Latest, Resolve::Votes, Resolve::Confidence] {
        assert_eq!(values(&view, &Query { resolve, ..query("a") }), ["0"]);
        let then = Some(AsOf::Index(before));
        assert_eq!(values(&view, &Query { resolve, as_of: then, ..query("a") }), ["1"]);
        let named = Some("2025".into());
        assert_eq!(values(&view, &Query { resolve, epoch: named, ..query("a") }), ["1"]);
    }
    assert_eq!(values(&view, &all("a")), ["0", "1"]);
    let epoch = serde_json::to_value(view.epoch("2025").unwrap().unwrap()).unwrap();
    assert_eq!(epoch["superseded_by"], "2026");
    assert_eq!(view.epoch("2026").unwrap().unwrap().supersedes.as_deref(), Some("2025"));
    assert!(view.epoch("2024").unwrap().is_none());
}

#[test]
fn times_and_validity_pick_the_past_and_the_valid() {
    let mut machine = Machine::new();
    for (after_ms, value) in [(0, "1"), (100, "2"), (200, "3")] {
        machine.now_ms = START_MS + after_ms;
        let mut new = machine.assertion("a", "p", value);
        new.valid_from_ms = Some(after_ms as i64);
        new.valid_to_ms = Some(after_ms as i64 + 150);
        machine.ok(Operation::Assert(vec![new]));
        machine.assert("b", "p", value);
    }
    let view = view(&machine);
    for (time_ms, answer) in
        [(START_MS - 1, ""), (START_MS, "1"), (START_MS + 99, "1"), (START_MS + 100, "2"), (u64::MAX, "3")]
    {
        let as_of = Some(AsOf::TimeMs(time_ms));
        assert_eq!(values(&view, &Query { as_of, ..query("b") }).join(","), answer, "{time_ms}");
    }
    for (at, answer) in [(-1, ""), (0, "1"), (100, "2"), (149, "2"), (150, "2"), (249, "3"), (350, "")] {
        let query = Query { valid_at_ms: Some(at), ..query("a") };
        assert_eq!(values(&view, &query).join(","), answer, "{at}");
    }
}

#[test]
fn pages_are_pinned_to_the_index_of_the_first() {
    let mut machine = Machine::new();
    for number in 0..10 {
        machine.assert(&format!("a/{number}"), "p", &number.to_string());
    }
    let mut query = Query { limit: 4, ..query("a/**") };
    let first = view(&machine).query(&query).unwrap();
    assert_eq!(first.assertions.len(), 4);
    for number in 0..10 {
        machine.assert(&format!("a/{number}"), "p", "\"later\"");
    }
    query.cursor = first.cursor;
    query.limit = 100;
    let rest = view(&machine).query(&query).unwrap();
    assert_eq!(rest.index, first.index);
    assert_eq!(rest.cursor, None);
    let values: Vec<_> = rest.assertions.iter().map(|a| a.value.get()).collect();
    assert_eq!(values, ["4", "5", "6", "7", "8", "9"]);
}

#[test]
fn cursors_of_others_are_refused() {
    let mut machine = Machine::new();
    for number in 0..10 {
        machine.assert(&format!("a/{number}"), "p", "1");
    }
    let view = view(&machine);
    let first = Query { limit: 3, ..query("a/**") };
    let cursor = view.query(&first).unwrap().cursor.unwrap();
    let with = |cursor: &str, change: fn(&mut Query)| {
        let mut query = Query { cursor: Some(cursor.to_owned()), ..first.clone() };
        change(&mut query);
        view.query(&query).map(|page| page.assertions.len())
    };
    assert_eq!(with(&cursor, |_| {}).unwrap(), 3);
    assert_eq!(with(&cursor, |query| query.limit = 5).unwrap(), 5, "the limit may change");
    for at in 0..cursor.len() {
        let mut bytes = cursor.clone().into_bytes();
        bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
        let altered = String::from_utf8(bytes).unwrap();
        assert!(matches!(with(&altered, |_| {}), Err(StoreError::BadCursor { .. })), "{at}");
        assert!(matches!(with(&cursor[..at], |_| {}), Err(StoreError::BadCursor { .. })), "{at}");
    }
    let others: [fn(&mut Query); 7] = [
        |q| q.concept_path = "b".into(),
        |q| q.subtree = false,
        |q| q.predicate = Some("p".into()),
        |q| q.resolve = Resolve::All,
        |q| q.epoch = Some("e".into()),
        |q| q.as_of = Some(AsOf::Index(10)),
        |q| q.valid_at_ms = Some(0),
    ];
    for other in others {
        let error = with(&cursor, other).unwrap_err().to_string();
        assert_eq!(error, "the cursor belongs to another query");
    }
    for text in ["", "zz", "0", "+1+1+1+1+1+1+1+1+1+1", "ü", &"00".repeat(5000)] {
        assert!(matches!(with(text, |_| {}), Err(StoreError::BadCursor { .. })), "{text}");
    }
    // The same cursor at a store that has not come that far.
    let behind = StoreView::new(Arc::new(machine.tree.clone()), 9);
    let query = Query { cursor: Some(cursor), ..first };
    assert!(matches!(behind.query(&query), Err(StoreError::CursorGone { .. })));
}

#[test]
fn one_call_looks_at_a_bounded_number_of_rows_and_bytes() {
    let mut machine = Machine::new();
    for resolve in [Resolve::Latest, Resolve::Votes, Resolve::Confidence] {
        let path = resolve.as_str();
        let best = machine.assertion(path, "p", "\"best\"");
        let best = crate::model::NewAssertion { confidence: Some(1.0), ..best };
        let best = machine.ok(Operation::Assert(vec![best]));
        let op = machine.vote(best.id, "ann", 1.0);
        machine.ok(op);
        for _ in 0..300 {
            let other = machine.assert(path, "p", "\"other\"");
            if resolve == Resolve::Latest {
                let op = machine.supersede(other.id, None);
                machine.ok(op);
            }
        }
        let mut query = Query { resolve, ..query(path) };
        let (mut calls, mut found) = (0, Vec::new());
        loop {
            let page = query::run_within(&view(&machine), &query, 50).unwrap();
            found.extend(page.assertions.iter().map(|a| a.value.get().to_owned()));
            calls += 1;
            query.cursor = page.cursor;
            if query.cursor.is_none() {
                break;
            }
        }
        assert_eq!(found, ["\"best\""], "{path}");
        assert!(calls > 4, "{path}: {calls} calls");
    }
    // A thousand votes are one seek, not a thousand rows.
    let voted = machine.assert("voted", "p", "1");
    for number in 0..1000 {
        let op = machine.vote(voted.id, &format!("v{number}"), 0.001);
        machine.ok(op);
    }
    machine.assert("voted", "q", "2");
    let page = query::run_within(&view(&machine), &all("voted"), 100).unwrap();
    assert_eq!((page.assertions.len(), page.cursor), (2, None));
    assert_eq!(page.assertions[0].votes, VotesView { sum: 1.0, count: 1000 });
    // Large values end a page early.
    let large = format!("\"{}\"", "x".repeat(1_000_000));
    for _ in 0..9 {
        machine.assert("large", "p", &large);
    }
    // They count for more than one row, also where only one of them is an answer.
    let mut votes = Query { resolve: Resolve::Votes, ..query("large") };
    let page = query::run_within(&view(&machine), &votes, 600).unwrap();
    assert_eq!(page.assertions.len(), 0);
    let mut calls = 1;
    votes.cursor = page.cursor;
    while votes.cursor.is_some() {
        let page = query::run_within(&view(&machine), &votes, 2).unwrap();
        (calls, votes.cursor) = (calls + 1, page.cursor);
        assert!(calls < 10, "each call takes at least one");
    }
    assert!(calls > 2, "{calls} calls");
    let (mut query, mut pages) = (all("large"), Vec::new());
    loop {
        let page = view(&machine).query(&query).unwrap();
        pages.push(page.assertions.len());
        query.cursor = page.cursor;
        if query.cursor.is_none() {
            break;
        }
    }
    assert_eq!(pages, [5, 4]);
}

#[test]
fn a_history_has_every_fact_in_order() {
    let mut machine = Machine::new();
    let first = machine.assert("a", "p", "1");
    machine.assert("b", "p", "1");
    let other = machine.assert("a", "q", "2");
    for (voter, weight) in [("ann", 0.5), ("ann", -0.3)] {
        let op = machine.vote(first.id, voter, weight);
        machine.ok(op);
    }
    let mut new = machine.assertion("a", "p", "3");
    new.supersedes = Some(first.id);
    machine.ok(Operation::Assert(vec![new]));
    let op = machine.supersede(other.id, None);
    machine.ok(op);
    let view = view(&machine);
    let history = |target: HistoryTarget, limit: usize| {
        let mut query = HistoryQuery { target, limit, cursor: None };
        let mut facts = Vec::new();
        loop {
            let page = view.history(&query).unwrap();
            assert!(page.events.len() <= limit);
            facts.extend(page.events.iter().map(|event| {
                let json = serde_json::to_value(event).unwrap();
                format!("{} {}", event.index(), json["kind"].as_str().unwrap())
            }));
            query.cursor = page.cursor;
            if query.cursor.is_none() {
                return facts;
            }
        }
    };
    let concept =
        |predicate: Option<&str>| HistoryTarget::Concept { path: "a".into(), predicate: predicate.map(str::to_owned) };
    for limit in [1, 2, 3, 100] {
        assert_eq!(
            history(concept(None), limit),
            ["1 assertion", "3 assertion", "4 vote", "5 vote", "6 assertion", "6 supersession", "7 supersession"]
        );
        assert_eq!(history(concept(Some("q")), limit), ["3 assertion", "7 supersession"]);
        let target = HistoryTarget::Assertion(first.id);
        assert_eq!(history(target, limit), ["1 assertion", "4 vote", "5 vote", "6 supersession"]);
    }
    assert!(history(HistoryTarget::Assertion(uuid(999)), 1).is_empty());
    let page =
        view.history(&HistoryQuery { target: HistoryTarget::Assertion(first.id), limit: 10, cursor: None }).unwrap();
    let json = serde_json::to_value(&page.events).unwrap();
    assert_eq!(json[2]["voter"], "ann");
    assert_eq!(json[2]["weight"], -0.3);
    assert_eq!(json[2]["assertion_id"], json!(first.id));
    assert_eq!(json[3]["old"], json!(first.id));
    assert_eq!(json[3]["new"], json[3]["id"]);
    assert_eq!(json[0]["created_at"], "2023-11-14T22:13:20.000Z");
}

#[test]
fn damaged_rows_are_said_to_be() {
    let mut machine = Machine::new();
    let only = machine.assert("a", "p", "1");
    let key = machine.tree.rows.keys().find(|key| key[0] == keys::TAG_FACT).unwrap().clone();
    let row = machine.tree.rows[&key].clone();
    for cut in [0, 1, 5, row.len() - 1] {
        machine.tree.rows.insert(key.clone(), row.slice(..cut));
        assert!(matches!(view(&machine).query(&query("a")), Err(StoreError::Damaged { .. })));
        assert!(matches!(view(&machine).assertion(only.id), Err(StoreError::Damaged { .. })));
    }
    machine.tree.rows.remove(&key);
    assert!(matches!(view(&machine).assertion(only.id), Err(StoreError::Damaged { .. })));
}
