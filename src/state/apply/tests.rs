#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout)]

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::facts::CYCLE_STEPS_MAX;
use super::*;
use crate::model::NewAssertion;
use crate::state::command::Operation;
use crate::state::engine::Row;
use crate::state::test_support::{Machine, MapRead, START_MS, command, limits, uuid};

/// A tree that must not be read.
struct Unread;

impl StateRead for Unread {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        panic!("read {key:?}");
    }
    fn scan<'a>(
        &'a self,
        from: std::ops::Bound<&[u8]>,
        _: std::ops::Bound<&[u8]>,
    ) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        // The queue of client keys is looked at once after a start.
        assert!(matches!(from, std::ops::Bound::Included([b'x'])));
        Box::new(std::iter::empty())
    }
}

#[test]
fn a_plain_assertion_reads_nothing_and_writes_two_small_rows() {
    let mut machine = Machine::new();
    let mut commands = Vec::new();
    for number in 0..100 {
        let new = machine.assertion(&format!("bench/c{number:09}"), "version", &"7".repeat(126));
        commands.push(machine.command(Operation::Assert(vec![new])));
    }
    let body = EntryBody { format: ENTRY_FORMAT, log_time_ms: START_MS, commands };
    let (batch, _) = machine.applier.apply(&Unread, 0, &body).unwrap();
    // Two rows each; the moment and the counters once.
    assert_eq!(batch.rows.len(), 202);
    let bytes: usize = batch.rows.iter().map(|(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len)).sum();
    // 150 bytes of payload each (path 16, predicate 7, value 126 and a separator): what is left is
    // for the tree's own overhead.
    assert!(bytes / 100 < 250, "{} bytes per assertion", bytes / 100);
}

#[test]
fn indexes_count_facts_and_a_refusal_takes_none() {
    let mut machine = Machine::new();
    let a = machine.assert("a", "p", "1");
    let many = (0..3).map(|_| machine.assertion("b", "p", "2")).collect();
    let last = machine.ok(Operation::Assert(many));
    let missing = machine.supersede(uuid(999), None);
    assert_eq!(machine.refused(missing), Refusal::NotFound { kind: "assertion".into(), name: uuid(999).to_string() });
    let vote = machine.vote(a.id, "ann", 1.0);
    let vote = machine.ok(vote);
    assert_eq!((a.index, last.index, vote.index), (1, 4, 5));
    assert_eq!(machine.applier.assertions(), 4);
    assert_eq!(machine.applier.fact_index(), 5);
}

#[test]
fn a_batch_is_refused_whole_and_may_refer_to_itself() {
    let mut machine = Machine::new();
    let before = machine.tree.clone();
    let first = machine.assertion("a", "p", "1");
    let mut bad = machine.assertion("a", "p", "2");
    bad.epoch = Some("unknown".into());
    let refusal = machine.refused(Operation::Assert(vec![first.clone(), bad.clone()]));
    assert_eq!(refusal, Refusal::NotFound { kind: "epoch".into(), name: "unknown".into() });
    assert_eq!(machine.tree, before, "nothing was written");
    assert_eq!(machine.applier.fact_index(), 0);
    bad.epoch = None;
    bad.supersedes = Some(first.id);
    assert_eq!(machine.ok(Operation::Assert(vec![first, bad])).index, 2);
}

#[test]
fn commands_of_one_entry_see_each_other() {
    let mut machine = Machine::new();
    let epoch = machine.epoch("2026", None);
    let again = machine.epoch("2026", None);
    let mut new = machine.assertion("a", "p", "1");
    new.epoch = Some("2026".into());
    let vote = machine.vote(new.id, "ann", 0.5);
    let vote_again = machine.vote(new.id, "ann", 0.25);
    let mut commands: Vec<_> = [epoch, again, Operation::Assert(vec![new]), vote, vote_again]
        .into_iter()
        .map(|op| machine.command(op))
        .collect();
    commands.push(commands[0].clone());
    let outcomes = machine.entry(commands);
    let applied: Vec<_> = outcomes.iter().map(|o| matches!(o.outcome, Outcome::Applied(_))).collect();
    assert_eq!(applied, [true, false, true, true, true, true]);
    assert_eq!(outcomes[1].outcome, Outcome::Refused(Refusal::EpochExists { name: "2026".into() }));
    assert!(outcomes[5].replayed);
    assert_eq!(outcomes[5].outcome, outcomes[0].outcome);
    assert_eq!(machine.applier.fact_index(), 4);
}

#[test]
fn supersessions_keep_their_rules() {
    let mut machine = Machine::new();
    let ids: Vec<_> = (0..4).map(|_| machine.assert("a/b", "p", "1").id).collect();
    let elsewhere = machine.assert("a/c", "p", "1").id;
    let op = machine.supersede(ids[0], Some(elsewhere));
    let mismatch = Refusal::PathMismatch { old_path: "a/b".into(), new_path: "a/c".into() };
    assert_eq!(machine.refused(op), mismatch);
    let mut new = machine.assertion("a/c", "p", "1");
    new.supersedes = Some(ids[0]);
    assert_eq!(machine.refused(Operation::Assert(vec![new])), mismatch);
    for (old, new) in [(0, 1), (1, 2), (0, 3), (3, 2)] {
        let op = machine.supersede(ids[old], Some(ids[new]));
        machine.ok(op);
    }
    for (old, new) in [(2, 0), (1, 0), (2, 1), (2, 3), (1, 1)] {
        let op = machine.supersede(ids[old], Some(ids[new]));
        assert_eq!(machine.refused(op), Refusal::Cycle, "{old} by {new}");
    }
    // Going back to an older one is no circle as long as it was not superseded by the newer.
    let op = machine.supersede(ids[3], Some(ids[1]));
    machine.ok(op);
    let op = machine.supersede(ids[2], None);
    machine.ok(op);
    let op = machine.supersede(ids[2], Some(uuid(999)));
    assert!(matches!(machine.refused(op), Refusal::NotFound { .. }));
}

#[test]
fn the_look_for_a_circle_is_bounded() {
    let mut machine = Machine::new();
    let first = machine.assert("a", "p", "1").id;
    let other = machine.assert("a", "p", "2").id;
    let mut last = first;
    for chunk in 0..=(CYCLE_STEPS_MAX / 1000) {
        let mut batch: Vec<NewAssertion> = Vec::new();
        for _ in 0..1000 {
            let mut new = machine.assertion("a", "p", "1");
            new.supersedes = Some(last);
            last = new.id;
            batch.push(new);
        }
        machine.ok(Operation::Assert(batch));
        let op = machine.supersede(other, Some(first));
        let mut command = machine.command(op);
        command.created_at_ms = START_MS;
        let outcome = machine.entry(vec![command]).remove(0).outcome;
        let steps_max = CYCLE_STEPS_MAX as u64;
        let given_up = outcome == Outcome::Refused(Refusal::ChainTooLong { steps_max });
        assert_eq!(given_up, chunk + 1 > CYCLE_STEPS_MAX / 1000, "{chunk}");
    }
    let op = machine.supersede(other, Some(last));
    machine.ok(op);
}

#[test]
fn repeated_keys_get_the_first_outcome_and_write_nothing() {
    for source in [KeySource::Client, KeySource::Balancer, KeySource::Node] {
        let mut machine = Machine::new();
        let assertion = machine.assertion("a", "p", "1");
        let accepted = command(source, 1, START_MS, Operation::Assert(vec![assertion]));
        let op = machine.supersede(uuid(999), None);
        let refused = command(source, 2, START_MS, op);
        let first = machine.entry(vec![accepted.clone(), refused.clone()]);
        assert!(!first[0].replayed && !first[1].replayed);
        let tree = machine.tree.clone();
        for _ in 0..2 {
            // A retry through another node has other ids and another deadline.
            let mut retry = accepted.clone();
            let other = machine.assertion("a", "p", "1");
            retry.op = Operation::Assert(vec![other]);
            retry.resend_until_ms += 5;
            let again = machine.entry(vec![retry, refused.clone()]);
            assert_eq!(again[0].outcome, first[0].outcome);
            assert_eq!(again[1].outcome, first[1].outcome);
            assert!(again[0].replayed && again[1].replayed);
            assert_eq!(machine.tree, tree);
        }
        if source != KeySource::Node {
            let mut reused = accepted.clone();
            reused.body_hash = 8;
            let outcome = machine.entry(vec![reused]).remove(0);
            assert_eq!(outcome.outcome, Outcome::Refused(Refusal::KeyReused));
            assert!(!outcome.replayed);
        }
        assert_eq!(machine.applier.fact_index(), 1);
    }
}

#[test]
fn commands_past_their_time_are_refused_and_log_time_never_goes_back() {
    let mut machine = Machine::new();
    let op = Operation::Assert(vec![machine.assertion("a", "p", "1")]);
    let late = command(KeySource::Node, 1, START_MS, op.clone());
    machine.now_ms = START_MS + 10_001;
    assert_eq!(machine.entry(vec![late.clone()])[0].outcome, Outcome::Refused(Refusal::Expired));
    machine.now_ms = START_MS;
    assert_eq!(machine.entry(vec![late])[0].outcome, Outcome::Refused(Refusal::Expired));
    assert_eq!(machine.applier.log_time_ms(), START_MS + 10_001);
    let mut in_time = command(KeySource::Node, 2, START_MS, op);
    in_time.resend_until_ms = START_MS + 10_001;
    assert!(matches!(machine.entry(vec![in_time.clone()])[0].outcome, Outcome::Applied(_)));
    // Known before late: the first outcome is the better answer.
    machine.now_ms = START_MS + 20_000;
    let again = machine.entry(vec![in_time]).remove(0);
    assert!(again.replayed && matches!(again.outcome, Outcome::Applied(_)));
}

#[test]
fn a_full_table_refuses_new_short_lived_keys_only() {
    let mut machine = Machine::with_limits(KeyLimits { short_keys_max: 2, ..limits() });
    machine.assert("a", "p", "1");
    machine.assert("a", "p", "1");
    assert!(machine.applier.short_keys_full());
    let op = Operation::Assert(vec![machine.assertion("a", "p", "1")]);
    assert_eq!(machine.refused(op.clone()), Refusal::KeyTableFull);
    let client = command(KeySource::Client, 1, START_MS, op.clone());
    assert!(matches!(machine.entry(vec![client])[0].outcome, Outcome::Applied(_)));
    // The moment they expire there is room.
    machine.now_ms += limits().short_key_ms;
    assert_eq!(machine.refused(op.clone()), Refusal::KeyTableFull);
    machine.now_ms += 1;
    machine.ok(op);
    assert_eq!(machine.applier.short_keys_len(), 1);
}

/// The last attempt that the files of `deploy/` allow begins 30 s after the first and waits for a whole deadline.
#[test]
fn a_balancers_key_outlives_every_attempt_under_it_from_its_level_on() {
    for (level, known_until_ms) in [(0, 20_000), (1, 45_000)] {
        let mut machine = Machine::new();
        raise(&mut machine, level);
        machine.now_ms = START_MS;
        let op = Operation::Assert(vec![machine.assertion("a", "p", "1")]);
        let attempt = |taken_ms| Command {
            resend_until_ms: taken_ms + 10_000,
            ..command(KeySource::Balancer, 7, taken_ms, op.clone())
        };
        assert!(!machine.entry(vec![attempt(START_MS)]).remove(0).replayed);
        for (at_ms, known) in [(known_until_ms, true), (known_until_ms + 1, false)] {
            machine.now_ms = START_MS + at_ms;
            let again = machine.entry(vec![attempt(machine.now_ms - 10_000)]).remove(0);
            assert_eq!(again.replayed, known, "level {level}, {at_ms} ms later");
        }
    }
    let mut machine = Machine::with_limits(KeyLimits { short_keys_max: 2, ..limits() });
    machine.assert("a", "p", "1");
    raise(&mut machine, 1);
    assert!(!machine.applier.short_keys_full(), "and twice as many fit");
}

#[test]
fn client_keys_expire_after_their_time_in_bounded_steps() {
    let mut machine = Machine::new();
    let mut commands = Vec::new();
    for id in 0..500 {
        let op = Operation::Assert(vec![machine.assertion("a", "p", "1")]);
        commands.push(command(KeySource::Client, id, START_MS, op));
    }
    machine.entry(commands.clone());
    let held = |machine: &Machine| {
        let count = |tag| machine.tree.rows.keys().filter(|key| key[0] == tag).count();
        assert_eq!(count(keys::TAG_CLIENT_KEY), count(keys::TAG_CLIENT_EXPIRY));
        count(keys::TAG_CLIENT_KEY)
    };
    assert_eq!(held(&machine), 500);
    machine.now_ms += limits().client_key_ms;
    machine.entry(Vec::new());
    assert_eq!(held(&machine), 500, "not a moment early");
    machine.now_ms += 1;
    let mut before = 500;
    while before > 0 {
        machine.entry(Vec::new());
        let now = held(&machine);
        assert!(now < before && before - now <= 64, "{before} to {now}");
        before = now;
    }
    let again = machine.entry(vec![commands[0].clone()]).remove(0);
    assert_eq!(again.outcome, Outcome::Refused(Refusal::Expired), "the key is unknown by now");
}

#[test]
fn imports_move_their_position_with_the_chunk() {
    let mut machine = Machine::new();
    let chunk = |machine: &mut Machine, before, after| Operation::ImportChunk {
        import_id: "dpkg".into(),
        position_before: before,
        position_after: after,
        assertions: vec![machine.assertion("a", "p", "1")],
    };
    let op = chunk(&mut machine, 1, 2);
    assert_eq!(machine.refused(op), Refusal::ImportPosition { expected: 0 });
    let op = chunk(&mut machine, 0, 10);
    machine.ok(op);
    let op = chunk(&mut machine, 0, 10);
    assert_eq!(machine.refused(op), Refusal::ImportPosition { expected: 10 });
    let op = chunk(&mut machine, 10, 20);
    machine.ok(op);
    assert_eq!(machine.applier.assertions(), 2);
}

#[test]
fn an_entry_of_a_newer_format_stops_the_node() {
    let mut machine = Machine::new();
    let body = EntryBody { format: 2, log_time_ms: 0, commands: Vec::new() };
    let error = machine.applier.apply(&machine.tree, 0, &body).unwrap_err().to_string();
    assert!(error.contains("entry format 2, this program knows 1"), "{error}");
}

/// A random command that often collides with what is there.
fn random_command(rng: &mut StdRng, now_ms: u64, seen: &mut Vec<Command>) -> Command {
    if !seen.is_empty() && rng.random_bool(0.15) {
        let mut again = seen[rng.random_range(0..seen.len())].clone();
        if rng.random_bool(0.2) {
            again.body_hash += 1;
        }
        again.resend_until_ms = now_ms + 10_000;
        return again;
    }
    let any = |rng: &mut StdRng| uuid(rng.random_range(0..60));
    let epoch = |rng: &mut StdRng| format!("e{}", rng.random_range(0..6));
    let assertions = |rng: &mut StdRng| {
        (0..rng.random_range(1..4))
            .map(|_| NewAssertion {
                id: any(rng),
                concept_path: format!("c{}", rng.random_range(0..3)),
                predicate: format!("p{}", rng.random_range(0..2)),
                value_json: rng.random_range(0..9).to_string(),
                source: None,
                confidence: None,
                epoch: rng.random_bool(0.2).then(|| epoch(rng)),
                supersedes: rng.random_bool(0.3).then(|| any(rng)),
                valid_from_ms: None,
                valid_to_ms: None,
            })
            .collect()
    };
    let op = match rng.random_range(0..10) {
        0..5 => Operation::Assert(assertions(rng)),
        5 => Operation::ImportChunk {
            import_id: "i".into(),
            position_before: rng.random_range(0..3),
            position_after: rng.random_range(0..3),
            assertions: assertions(rng),
        },
        6 => Operation::Epoch(crate::model::NewEpoch {
            id: any(rng),
            name: epoch(rng),
            description: None,
            supersedes: rng.random_bool(0.4).then(|| epoch(rng)),
        }),
        7 => Operation::Supersede(crate::model::NewSupersession {
            id: any(rng),
            old: any(rng),
            new: rng.random_bool(0.8).then(|| any(rng)),
            reason: None,
        }),
        _ => Operation::Vote(crate::model::NewVote {
            id: any(rng),
            assertion_id: any(rng),
            voter: format!("v{}", rng.random_range(0..4)),
            weight: f64::from(rng.random_range(-10..=10)) / 10.0,
            reason: None,
        }),
    };
    let source = [KeySource::Client, KeySource::Balancer, KeySource::Node][rng.random_range(0..3)];
    let mut new = command(source, rng.random(), now_ms, op);
    new.created_at_ms = now_ms - rng.random_range(0..40);
    new.resend_until_ms = now_ms + [0, 10_000, 50_000][rng.random_range(0..3)];
    seen.push(new.clone());
    new
}

#[test]
fn an_applier_restored_in_the_middle_goes_on_identically() {
    for seed in 0..20 {
        let mut rng = StdRng::seed_from_u64(seed);
        let tight = KeyLimits { short_keys_max: 40, client_key_ms: 30_000, short_key_ms: 10_000, balancer_ms: 15_000 };
        let mut steady = Machine::with_limits(tight);
        // The other node's tree also has rows of saved keys, which are its own.
        let (mut other_tree, mut other) = (MapRead::default(), None::<Applier>);
        let mut seen = Vec::new();
        let mut now_ms = START_MS;
        for step in 0..150 {
            now_ms += rng.random_range(0..2_000);
            let mut commands: Vec<_> =
                (0..rng.random_range(0..8)).map(|_| random_command(&mut rng, now_ms, &mut seen)).collect();
            if step == 70 {
                commands.push(command(
                    KeySource::Node,
                    rng.random(),
                    now_ms,
                    Operation::Level(RaiseLevel { level: 1 }),
                ));
            }
            let log_time_ms = now_ms - rng.random_range(0..1_000);
            let body = EntryBody { format: ENTRY_FORMAT, log_time_ms, commands };
            let body = EntryBody::decode(&body.encode().unwrap()).unwrap();
            let mut restored = match other.take() {
                Some(applier) => applier,
                None => {
                    let applied = AppliedState {
                        fact_index: steady.applier.fact_index(),
                        log_time_ms: steady.applier.log_time_ms(),
                        feature_level: steady.applier.feature_level(),
                        ..AppliedState::default()
                    };
                    Applier::restore(&other_tree, &applied, tight).unwrap()
                }
            };
            let (batch, outcomes) = steady.applier.apply(&steady.tree, step, &body).unwrap();
            let (other_batch, other_outcomes) = restored.apply(&other_tree, step, &body).unwrap();
            assert_eq!(outcomes, other_outcomes, "seed {seed}, step {step}");
            assert_eq!(batch.rows, other_batch.rows, "seed {seed}, step {step}");
            steady.tree.write(&batch);
            other_tree.write(&other_batch);
            assert_eq!(restored.short_keys_len(), steady.applier.short_keys_len());
            match rng.random_range(0..10) {
                // Restarted: only the tree is left.
                0 | 1 => other_tree.write(&restored.save_keys().unwrap()),
                2 => {
                    other_tree.write(&restored.save_keys().unwrap());
                    other = Some(restored);
                }
                _ => other = Some(restored),
            }
        }
        let facts = |tree: &MapRead| {
            let mut rows = tree.rows.clone();
            rows.retain(|key, _| !key.starts_with(b"mkeys"));
            rows
        };
        assert_eq!(facts(&steady.tree), facts(&other_tree), "seed {seed}");
    }
}

/// Speed is printed, not asserted: `cargo test --release apply_speed -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, for people"]
fn apply_speed() {
    for (name, source) in [("node", KeySource::Node), ("client", KeySource::Client)] {
        let mut machine = Machine::with_limits(KeyLimits::default());
        let (mut applied, mut took) = (0, std::time::Duration::ZERO);
        for _ in 0..2000 {
            machine.now_ms += 4;
            let commands: Vec<_> = (0..100)
                .map(|_| {
                    let new = machine.assertion("bench/concept-000000", "version", &"7".repeat(120));
                    let mut command = machine.command(Operation::Assert(vec![new]));
                    command.key.source = source;
                    command
                })
                .collect();
            applied += commands.len();
            let body = EntryBody { format: ENTRY_FORMAT, log_time_ms: machine.now_ms, commands };
            #[allow(clippy::disallowed_methods)]
            let started = std::time::Instant::now();
            let (batch, _) = machine.applier.apply(&machine.tree, 0, &body).unwrap();
            took += started.elapsed();
            machine.tree.write(&batch);
        }
        println!("{name}: {} ns per command", took.as_nanos() / applied as u128);
    }
}

fn raise(machine: &mut Machine, level: u32) -> Outcome {
    machine.run(Operation::Level(RaiseLevel { level }))
}

#[test]
fn the_feature_level_only_rises_and_waits_for_whoever_is_on_the_way_in() {
    let mut machine = Machine::new();
    assert_eq!(machine.applier.feature_level(), 0);
    let grant = RebuildCommand::Grant { name: "b".into(), job: 7, old_id: 2, id_min: 4, automatic_max: None };
    let Outcome::Permit(permit) = machine.run(Operation::Rebuild(grant)) else { unreachable!() };
    assert!(matches!(raise(&mut machine, 1), Outcome::Refused(Refusal::RebuildHeld { by, .. }) if by == "b"));
    assert_eq!(machine.applier.feature_level(), 0);
    let finish = RebuildCommand::Finish { name: "b".into(), fresh_id: permit.fresh_id };
    machine.run(Operation::Rebuild(finish));
    assert_eq!(raise(&mut machine, 1), Outcome::Applied(vec![]));
    assert_eq!(raise(&mut machine, 0), Outcome::Applied(vec![]));
    assert_eq!(machine.applier.feature_level(), 1);
}

#[test]
fn a_level_that_this_program_does_not_know_stops_it() {
    let mut machine = Machine::new();
    let command = machine.command(Operation::Level(RaiseLevel { level: level::FEATURE_LEVEL + 1 }));
    let body = EntryBody { format: ENTRY_FORMAT, log_time_ms: START_MS, commands: vec![command] };
    let error = machine.applier.apply(&machine.tree, 0, &body).unwrap_err();
    assert_eq!(error.class(), crate::state::engine::ErrorClass::Newer);
    assert!(error.to_string().contains("start a newer version"), "{error}");
}
