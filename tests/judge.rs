//! The judge catches what is planted, and lets clean histories pass.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::judge::{
    Fact, FindingKind, Gap, History, NodeFacts, ReadAttempt, ReadOutcome, Recorder, Seen, Verdict, WriteAttempt,
    WriteOutcome, check, longest_gap_touching, summarize_gaps,
};

/// A correct run against a store that takes effect at one instant between start and end of each request.
struct Run {
    history: History,
    nodes: Vec<NodeFacts>,
}

const NODES: u16 = 3;
const END_US: u64 = 1_000_000;

fn id_of(value: u64) -> u128 {
    0x1000 + u128::from(value)
}

/// Random requests over few keys; all three outcomes; retries of unknown ones under the same value.
fn correct_run(seed: u64) -> Run {
    let mut rng = StdRng::seed_from_u64(seed);
    // Each request: start, moment of effect, end. The moments, sorted, give the order of the store.
    let mut requests: Vec<(u64, u64, u64, u32)> = (0..200)
        .map(|client| {
            let start = rng.random_range(0..END_US / 2);
            let effect = start + rng.random_range(1..2_000);
            (effect, start, effect + rng.random_range(1..2_000), client)
        })
        .collect();
    requests.sort_unstable();
    let mut history = History::default();
    let mut facts: Vec<Fact> = Vec::new();
    let mut index = 0;
    for (value, (_, start_us, end_us, client)) in (0_u64..).zip(requests) {
        let (key, node) = (rng.random_range(0..5), rng.random_range(0..NODES));
        if rng.random_ratio(1, 4) {
            let newest = facts.iter().filter(|fact| fact.key == key).max_by_key(|fact| fact.index);
            let newest = newest.map(|fact| Seen { value: fact.value, index: fact.index });
            let outcome = ReadOutcome::Answered { newest };
            history.reads.push(ReadAttempt { client, node, key, start_us, end_us, outcome });
            continue;
        }
        let mut attempt =
            WriteAttempt { client, node, key, value, start_us, end_us, outcome: WriteOutcome::Unknown { status: 0 } };
        let kind = rng.random_range(0..10);
        if kind == 0 {
            attempt.outcome = WriteOutcome::Refused { status: 503 };
            history.writes.push(attempt);
            continue;
        }
        if kind == 1 {
            // Unknown, and it never arrived.
            history.writes.push(attempt);
            continue;
        }
        index += 1;
        facts.push(Fact { key, value, index, id: id_of(value) });
        if kind == 2 {
            // Unknown, though it was applied; then repeated elsewhere and told the first outcome.
            history.writes.push(attempt);
            attempt.node = (node + 1) % NODES;
            attempt.start_us = end_us + 1;
            attempt.end_us = end_us + 500;
        }
        attempt.outcome = WriteOutcome::Acknowledged { index, id: id_of(value), replayed: kind == 2 };
        history.writes.push(attempt);
    }
    let nodes = (0..NODES).map(|node| NodeFacts { node, start_us: END_US, facts: facts.clone() }).collect();
    Run { history, nodes }
}

impl Run {
    fn verdict(&self) -> Verdict {
        check(&self.history, &self.nodes)
    }

    /// Place of a random acknowledged write that was not retried.
    fn acknowledged(&self, rng: &mut StdRng) -> usize {
        let places: Vec<usize> = (0..self.history.writes.len())
            .filter(|at| {
                let outcome = self.history.writes[*at].outcome;
                matches!(outcome, WriteOutcome::Acknowledged { replayed: false, .. })
            })
            .collect();
        places[rng.random_range(0..places.len())]
    }

    fn fact_place(&self, node: usize, value: u64) -> usize {
        self.nodes[node].facts.iter().position(|fact| fact.value == value).unwrap()
    }
}

const SEEDS: u64 = 200;

#[test]
fn clean_histories_pass() {
    for seed in 0..SEEDS {
        let verdict = correct_run(seed).verdict();
        assert!(verdict.is_clean(), "seed {seed}: {verdict}");
        assert!(verdict.acknowledged > 80 && verdict.reads > 20 && verdict.refused > 0, "seed {seed}: {verdict}");
    }
}

#[test]
fn a_write_missing_on_one_node_is_lost() {
    for seed in 0..SEEDS {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut run = correct_run(seed);
        let value = run.history.writes[run.acknowledged(&mut rng)].value;
        let node = rng.random_range(0..3);
        let place = run.fact_place(node, value);
        run.nodes[node].facts.remove(place);
        let verdict = run.verdict();
        assert_eq!(verdict.count(FindingKind::Lost), 1, "seed {seed}: {verdict}");
        assert_eq!(verdict.findings[0].value, Some(value));
        assert_eq!(verdict.findings[0].node, Some(node as u16));
    }
}

#[test]
fn a_write_stored_twice_is_doubled() {
    for seed in 0..SEEDS {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut run = correct_run(seed);
        let value = run.history.writes[run.acknowledged(&mut rng)].value;
        for node in 0..3 {
            let mut again = run.nodes[node].facts[run.fact_place(node, value)];
            again.index = 10_000;
            again.id += 1;
            run.nodes[node].facts.push(again);
        }
        let verdict = run.verdict();
        assert_eq!(verdict.count(FindingKind::Doubled), 3, "seed {seed}: {verdict}");
    }
}

#[test]
fn a_retry_told_another_outcome_is_doubled() {
    for seed in 0..SEEDS {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut run = correct_run(seed);
        let mut again = run.history.writes[run.acknowledged(&mut rng)];
        let WriteOutcome::Acknowledged { index, .. } = again.outcome else { unreachable!() };
        again.start_us = END_US - 10;
        again.end_us = END_US - 5;
        again.outcome = WriteOutcome::Acknowledged { index, id: 7, replayed: true };
        run.history.writes.push(again);
        let verdict = run.verdict();
        assert_eq!(verdict.count(FindingKind::Doubled), 1, "seed {seed}: {verdict}");
    }
}

#[test]
fn a_write_stored_under_another_index_than_acknowledged_is_found() {
    let mut run = correct_run(1);
    let place = run.acknowledged(&mut StdRng::seed_from_u64(1));
    let value = run.history.writes[place].value;
    for node in 0..3 {
        let place = run.fact_place(node, value);
        run.nodes[node].facts[place].index += 5_000;
    }
    assert_eq!(run.verdict().count(FindingKind::Doubled), 3);
}

#[test]
fn a_read_that_misses_an_acknowledged_write_is_stale() {
    for seed in 0..SEEDS {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut run = correct_run(seed);
        let write = run.history.writes[run.acknowledged(&mut rng)];
        run.history.reads.clear();
        let read = |start_us, newest| ReadAttempt {
            client: 9,
            node: 2,
            key: write.key,
            start_us,
            end_us: END_US - 1,
            outcome: ReadOutcome::Answered { newest },
        };
        // Begun before the acknowledgement it may miss it; begun after, it may not.
        run.history.reads.push(read(write.start_us, None));
        let first_of_key = run.history.writes.iter().filter(|other| other.key == write.key);
        let earliest = first_of_key.map(|other| other.end_us).min().unwrap();
        run.history.reads[0].start_us = earliest;
        assert!(run.verdict().is_clean(), "seed {seed}: {}", run.verdict());
        run.history.reads[0] = read(write.end_us + 1, None);
        let verdict = run.verdict();
        assert_eq!(verdict.count(FindingKind::Stale), 1, "seed {seed}: {verdict}");
    }
}

#[test]
fn a_read_that_goes_back_behind_another_read_is_stale() {
    // The newer value is unknown to its writer, so only the first read proves that it was visible.
    let write =
        |value, end_us, outcome| WriteAttempt { client: 0, node: 0, key: 1, value, start_us: 0, end_us, outcome };
    let read = |start_us, value, index| ReadAttempt {
        client: 1,
        node: 1,
        key: 1,
        start_us,
        end_us: start_us + 5,
        outcome: ReadOutcome::Answered { newest: Some(Seen { value, index }) },
    };
    let mut history = History {
        writes: vec![
            write(1, 10, WriteOutcome::Acknowledged { index: 1, id: 1, replayed: false }),
            write(2, 90, WriteOutcome::Unknown { status: 0 }),
        ],
        reads: vec![read(20, 2, 2), read(30, 2, 2)],
    };
    assert!(check(&history, &[]).is_clean());
    history.reads[1] = read(30, 1, 1);
    let verdict = check(&history, &[]);
    assert_eq!(verdict.count(FindingKind::Stale), 1, "{verdict}");
    assert!(verdict.findings[0].detail.contains("another read had shown index 2"), "{verdict}");
    // Concurrent reads may see either.
    history.reads[1] = read(24, 1, 1);
    assert!(check(&history, &[]).is_clean());
}

#[test]
fn a_refused_write_that_is_there_is_found() {
    for seed in 0..SEEDS {
        let mut run = correct_run(seed);
        let refused = run.history.writes.iter().find(|w| matches!(w.outcome, WriteOutcome::Refused { .. }));
        let refused = *refused.unwrap();
        let fact = Fact { key: refused.key, value: refused.value, index: 20_000, id: 5 };
        for node in &mut run.nodes {
            node.facts.push(fact);
        }
        let verdict = run.verdict();
        assert_eq!(verdict.count(FindingKind::RefusedButPresent), 3, "seed {seed}: {verdict}");
        // With one attempt unknown, the refusal of another says nothing.
        let unknown = WriteAttempt { outcome: WriteOutcome::Unknown { status: 0 }, ..refused };
        run.history.writes.push(unknown);
        assert!(run.verdict().is_clean(), "seed {seed}: {}", run.verdict());
    }
}

#[test]
fn a_refused_write_shown_by_a_read_is_found() {
    let mut run = correct_run(3);
    let refused = run.history.writes.iter().find(|w| matches!(w.outcome, WriteOutcome::Refused { .. }));
    let refused = *refused.unwrap();
    run.history.reads.push(ReadAttempt {
        client: 1,
        node: 0,
        key: refused.key,
        start_us: END_US - 5,
        end_us: END_US - 1,
        outcome: ReadOutcome::Answered { newest: Some(Seen { value: refused.value, index: 20_000 }) },
    });
    assert_eq!(run.verdict().count(FindingKind::RefusedButPresent), 1);
}

#[test]
fn a_fact_that_nobody_wrote_is_invented() {
    let mut run = correct_run(4);
    run.nodes[1].facts.push(Fact { key: 1, value: 999_999, index: 30_000, id: 1 });
    assert_eq!(run.verdict().count(FindingKind::Invented), 1);
    let mut run = correct_run(4);
    run.nodes[1].facts[0].key += 1;
    assert_eq!(run.verdict().count(FindingKind::Invented), 1, "another key");
    let mut run = correct_run(4);
    let outcome = ReadOutcome::Answered { newest: Some(Seen { value: 999_999, index: 30_000 }) };
    run.history.reads.push(ReadAttempt { client: 1, node: 0, key: 1, start_us: 1, end_us: 2, outcome });
    assert!(run.verdict().count(FindingKind::Invented) > 0);
}

#[test]
fn indexes_against_real_time_are_out_of_order() {
    for seed in 0..SEEDS {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut run = correct_run(seed);
        // A write long after all others, under an index below theirs.
        let mut late = run.history.writes[run.acknowledged(&mut rng)];
        (late.value, late.start_us, late.end_us) = (777_777, END_US - 9, END_US - 8);
        late.outcome = WriteOutcome::Acknowledged { index: 0, id: 3, replayed: false };
        run.history.writes.push(late);
        run.nodes.clear();
        run.history.reads.clear();
        let verdict = run.verdict();
        assert_eq!(verdict.count(FindingKind::OutOfOrder), 1, "seed {seed}: {verdict}");
    }
}

#[test]
fn nodes_that_disagree_have_diverged() {
    let mut run = correct_run(6);
    let unknown_applied = Fact { key: 1, value: 555_555, index: 40_000, id: 1 };
    let attempt = WriteAttempt {
        client: 1,
        node: 0,
        key: 1,
        value: unknown_applied.value,
        start_us: END_US - 9,
        end_us: END_US - 8,
        outcome: WriteOutcome::Unknown { status: 0 },
    };
    run.history.writes.push(attempt);
    run.nodes[0].facts.push(unknown_applied);
    // An unknown write may take effect between two listings.
    let verdict = run.verdict();
    assert!(verdict.is_clean(), "{verdict}");
    run.nodes[1].facts.push(Fact { index: 40_001, ..unknown_applied });
    assert_eq!(run.verdict().count(FindingKind::Diverged), 1);
    // One index for two writes.
    let mut run = correct_run(6);
    let place = run.acknowledged(&mut StdRng::seed_from_u64(6));
    let mut twin = run.history.writes[place];
    twin.value = 666_666;
    run.history.writes.push(twin);
    run.nodes.clear();
    assert_eq!(run.verdict().count(FindingKind::Diverged), 1);
}

#[test]
fn gaps_count_silence_up_to_both_edges() {
    let at = [10, 20, 100, 110];
    assert_eq!(longest_gap_touching(&at, 15, 105), Gap { from_us: 20, to_us: 100 });
    assert_eq!(longest_gap_touching(&at, 50, 60).length_us(), 40, "silence around the whole window");
    assert_eq!(longest_gap_touching(&at, 105, 500), Gap { from_us: 110, to_us: 500 }, "never served again");
    assert_eq!(longest_gap_touching(&[], 3, 9).length_us(), 6);
    assert_eq!(longest_gap_touching(&at, 0, 12), Gap { from_us: 0, to_us: 10 });
    let summary = summarize_gaps(&at);
    assert_eq!((summary.count, summary.p50_us, summary.longest_us), (3, 10, 80));
    assert_eq!(summarize_gaps(&[5]).longest_us, 0);
}

#[test]
fn reports_name_what_was_found_and_keep_its_count() {
    let mut run = correct_run(7);
    for node in &mut run.nodes {
        node.facts.clear();
    }
    let verdict = run.verdict();
    let text = verdict.to_string();
    assert!(text.contains(&format!("lost: {}", verdict.count(FindingKind::Lost))), "{text}");
    assert!(text.contains("acknowledged at") && text.contains("and 2"), "{text}");
    let json = serde_json::to_value(&verdict).unwrap();
    assert_eq!(json["counts"]["lost"], verdict.count(FindingKind::Lost));
    assert!(json["findings"].as_array().unwrap().len() <= 200);
}

#[tokio::test]
async fn the_recorder_keeps_what_many_clients_do_and_an_abandoned_write_is_unknown() {
    let recorder = Recorder::new();
    let tasks: Vec<_> = (0..8_u32)
        .map(|client| {
            let recorder = Arc::clone(&recorder);
            tokio::spawn(async move {
                let lane = recorder.lane(client);
                for _ in 0..100 {
                    let value = recorder.next_value();
                    let pending = lane.begin_write(0, 1, value);
                    tokio::task::yield_now().await;
                    pending.finish(WriteOutcome::Acknowledged { index: value + 1, id: id_of(value), replayed: false });
                }
                drop(lane.begin_write(0, 1, recorder.next_value()));
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let history = recorder.history();
    assert_eq!(recorder.acknowledged(), 800);
    assert_eq!(history.acknowledged_us().len(), 800);
    assert_eq!(history.writes.len(), 808);
    let unknown = history.writes.iter().filter(|w| w.outcome == WriteOutcome::Unknown { status: 0 }).count();
    assert_eq!(unknown, 8);
    assert!(history.writes.iter().all(|write| write.end_us >= write.start_us));
}
