//! Queries against a naive model: a list of facts, looked through from the front each time.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::*;
use crate::model::{NewAssertion, NewVote};
use crate::state::command::{Outcome, Receipt};

#[derive(Default)]
struct Naive {
    assertions: Vec<(NewAssertion, Receipt)>,
    votes: Vec<(NewVote, u64)>,
    /// Old, new, index.
    supersessions: Vec<(Uuid, Option<Uuid>, u64)>,
    /// Name, the one it supersedes, index.
    epochs: Vec<(String, Option<String>, u64)>,
    /// Creation of each fact, in order.
    created: Vec<u64>,
}

/// Id, sum and count of votes, superseded (by).
type Answer = (Uuid, f64, u64, Option<Option<Uuid>>);

impl Naive {
    fn answer(&self, query: &Query) -> Vec<Answer> {
        let as_of = match query.as_of {
            None => u64::MAX,
            Some(AsOf::Index(index)) => index,
            Some(AsOf::TimeMs(time)) => self.created.iter().take_while(|created| **created <= time).count() as u64,
        };
        let mut groups = BTreeMap::<(&str, &str), Vec<(Answer, &NewAssertion, u64)>>::new();
        for (new, receipt) in &self.assertions {
            let below = new.concept_path.starts_with(&format!("{}/", query.concept_path));
            if receipt.index > as_of
                || !(new.concept_path == query.concept_path || query.subtree && below)
                || query.predicate.as_ref().is_some_and(|wanted| *wanted != new.predicate)
                || query.epoch.is_some() && query.epoch != new.epoch
            {
                continue;
            }
            let superseded = self
                .supersessions
                .iter()
                .rfind(|(old, _, index)| *old == new.id && *index <= as_of)
                .map(|(_, by, _)| *by);
            let mut votes = BTreeMap::new();
            for (vote, index) in &self.votes {
                if vote.assertion_id == new.id && *index <= as_of {
                    votes.insert(&vote.voter, vote.weight);
                }
            }
            let sum = (votes.values().sum::<f64>() * 1e9).round() / 1e9;
            let ended = new.epoch.is_some()
                && query.epoch.is_none()
                && self.epochs.iter().any(|(_, old, index)| *old == new.epoch && *index <= as_of);
            let valid = query.valid_at_ms.is_none_or(|at| {
                new.valid_from_ms.unwrap_or(i64::MIN) <= at && new.valid_to_ms.is_none_or(|to| at < to)
            });
            if !valid || query.resolve != Resolve::All && (superseded.is_some() || ended) {
                continue;
            }
            let answer = (new.id, sum + 0.0, votes.len() as u64, superseded);
            groups.entry((&new.concept_path, &new.predicate)).or_default().push((answer, new, receipt.index));
        }
        let mut answers = Vec::new();
        for mut group in groups.into_values() {
            let confidence = |new: &NewAssertion| new.confidence.unwrap_or(-1.0);
            group.sort_by(|(a, a_new, a_index), (b, b_new, b_index)| {
                let first = match query.resolve {
                    Resolve::Votes => a.1.total_cmp(&b.1),
                    Resolve::Confidence => confidence(a_new).total_cmp(&confidence(b_new)),
                    Resolve::Latest | Resolve::All => std::cmp::Ordering::Equal,
                };
                first.then(a_index.cmp(b_index)).reverse()
            });
            let take = if query.resolve == Resolve::All { usize::MAX } else { 1 };
            answers.extend(group.into_iter().take(take).map(|(answer, ..)| answer));
        }
        answers
    }
}

fn path(rng: &mut StdRng) -> String {
    ["a", "a/b", "a/b/c", "a/b-x", "a/c", "b"].choose(rng).unwrap().to_string()
}

fn change(rng: &mut StdRng, machine: &mut Machine, naive: &mut Naive) {
    let id = |naive: &Naive, rng: &mut StdRng| naive.assertions.choose(rng).map(|(new, _)| new.id);
    let epoch = |naive: &Naive, rng: &mut StdRng| naive.epochs.choose(rng).map(|e| e.0.clone());
    let op = match rng.random_range(0..20) {
        0..10 => {
            let predicate = ["p", "q", "pp"][rng.random_range(0..3)];
            let mut new = machine.assertion(&path(rng), predicate, "1");
            new.confidence = rng.random_bool(0.6).then(|| f64::from(rng.random_range(0..4)) / 4.0);
            new.epoch = epoch(naive, rng).filter(|_| rng.random_bool(0.4));
            new.supersedes = id(naive, rng).filter(|_| rng.random_bool(0.3));
            new.valid_from_ms = rng.random_bool(0.3).then(|| rng.random_range(0..5));
            new.valid_to_ms = rng.random_bool(0.3).then(|| rng.random_range(5..10));
            Operation::Assert(vec![new])
        }
        10..15 => {
            let Some(id) = id(naive, rng) else { return };
            let weight = f64::from(rng.random_range(-10..=10)) / 10.0;
            machine.vote(id, ["ann", "bob", "eve"].choose(rng).unwrap(), weight)
        }
        15..19 => {
            let (Some(old), new) = (id(naive, rng), id(naive, rng)) else {
                return;
            };
            machine.supersede(old, new.filter(|_| rng.random_bool(0.8)))
        }
        _ => {
            let supersedes = epoch(naive, rng).filter(|_| rng.random_bool(0.5));
            machine.epoch(&format!("e{}", rng.random_range(0..10)), supersedes.as_deref())
        }
    };
    let Outcome::Applied(receipts) = machine.run(op.clone()) else {
        return;
    };
    let receipt = receipts[0];
    naive.created.push(receipt.created_at_ms);
    let index = receipt.index;
    match op {
        Operation::Assert(mut new) => {
            let new = new.remove(0);
            if let Some(old) = new.supersedes {
                naive.supersessions.push((old, Some(new.id), index));
            }
            naive.assertions.push((new, receipt));
        }
        Operation::Vote(vote) => naive.votes.push((vote, index)),
        Operation::Supersede(new) => naive.supersessions.push((new.old, new.new, index)),
        Operation::Epoch(new) => naive.epochs.push((new.name, new.supersedes, index)),
        Operation::ImportChunk { .. } | Operation::Rebuild(_) | Operation::Members(_) | Operation::Level(_) => {}
    }
}

fn any_query(rng: &mut StdRng, facts: u64) -> Query {
    let mut query = query(&path(rng));
    query.subtree = rng.random_bool(0.5);
    query.predicate = rng.random_bool(0.4).then(|| ["p", "q", "pp", "o"].choose(rng).unwrap().to_string());
    query.resolve = *[Resolve::Latest, Resolve::Votes, Resolve::Confidence, Resolve::All].choose(rng).unwrap();
    query.epoch = rng.random_bool(0.2).then(|| format!("e{}", rng.random_range(0..10)));
    query.valid_at_ms = rng.random_bool(0.2).then(|| rng.random_range(-1..11));
    query.limit = rng.random_range(1..8);
    query.as_of = match rng.random_range(0..4) {
        0 => Some(AsOf::Index(rng.random_range(0..=facts + 2))),
        1 => Some(AsOf::TimeMs(START_MS + rng.random_range(0..=facts / 2 + 2))),
        _ => None,
    };
    query
}

#[test]
fn queries_answer_as_a_naive_model_does() {
    for seed in 0..60 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut machine, mut naive) = (Machine::new(), Naive::default());
        for _ in 0..6 {
            for _ in 0..30 {
                machine.now_ms += rng.random_range(0..2);
                change(&mut rng, &mut machine, &mut naive);
            }
            let view = view(&machine);
            assert_eq!(view.count_assertions().unwrap(), naive.assertions.len() as u64);
            for _ in 0..40 {
                let mut query = any_query(&mut rng, view.fact_index());
                let expected = naive.answer(&query);
                let mut found = Vec::new();
                let rows_max = [40, 100_000][rng.random_range(0..2)];
                let asked = format!("seed {seed}: {query:?}");
                loop {
                    let page = query::run_within(&view, &query, rows_max).unwrap();
                    assert!(page.assertions.len() <= query.limit, "{asked}");
                    found.extend(page.assertions.iter().map(|a| {
                        let superseded = (a.retracted || a.superseded_by.is_some()).then_some(a.superseded_by);
                        (a.id, a.votes.sum, a.votes.count, superseded)
                    }));
                    query.cursor = page.cursor;
                    if query.cursor.is_none() {
                        break;
                    }
                }
                assert_eq!(found, expected, "{asked}");
            }
        }
    }
}
