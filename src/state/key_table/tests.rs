#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::*;
use crate::state::command::Refusal;
use crate::state::engine::StateRead;
use crate::state::keys;
use crate::state::test_support::{MapRead, START_MS, uuid};

const KEEP_MS: u64 = 20_000;

fn key(number: u64) -> CommandKey {
    let source = if number.is_multiple_of(2) { KeySource::Node } else { KeySource::Balancer };
    CommandKey { source, id: u128::from(number).wrapping_mul(0x9E37_79B9_7F4A_7C15_1234_5678_9ABC_DEF1) }
}

fn applied(number: u64) -> Outcome {
    let created_at_ms = START_MS + 3;
    Outcome::Applied(vec![Receipt { id: uuid(number), index: number, created_at_ms }])
}

fn outcome(number: u64) -> Outcome {
    match number % 7 {
        3 => Outcome::Refused(Refusal::EpochExists { name: format!("epoch {number}") }),
        5 => Outcome::Applied(
            (0..number % 11)
                .map(|n| Receipt {
                    id: uuid(number * 100 + n * (1 + n / 3)),
                    index: 9 + n,
                    created_at_ms: START_MS - 7,
                })
                .collect(),
        ),
        _ => applied(number),
    }
}

fn body(number: u64) -> u128 {
    u128::from(number) << 64 | 77
}

/// Adds the keys of a range, one per millisecond of log time.
fn fill(table: &mut KeyTable, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let now_ms = START_MS + number;
        table.expire(now_ms);
        // Every 50th has a far `resend_until`.
        let resend_ms = now_ms + if number % 50 == 0 { 60_000 } else { 10_000 };
        table.insert(key(number), body(number), &outcome(number), now_ms, resend_ms, None).unwrap();
    }
}

#[test]
fn known_keys_answer_until_they_expire_and_not_a_moment_less() {
    let mut table = KeyTable::new(KEEP_MS, 1000);
    for number in 1..=20 {
        table.insert(key(number), body(number), &outcome(number), START_MS, START_MS + 10, None).unwrap();
    }
    table.expire(START_MS + KEEP_MS);
    for number in 1..=20 {
        let known = table.get(&key(number), body(number)).unwrap();
        assert_eq!(known, Some(Known::Outcome(outcome(number))), "{number}");
        let other = table.get(&key(number), 1).unwrap();
        if key(number).source == KeySource::Balancer {
            assert_eq!(other, Some(Known::OtherBody));
        }
    }
    let unknown = CommandKey { source: KeySource::Balancer, id: key(2).id };
    assert_eq!(table.get(&unknown, 0).unwrap(), None, "sources never collide");
    table.expire(START_MS + KEEP_MS + 1);
    assert!(table.is_empty());
    assert_eq!(table.packed_bytes, 0);
    assert_eq!(table.get(&key(1), body(1)).unwrap(), None);
}

#[test]
fn a_key_is_kept_for_twice_its_resend_until_without_holding_up_the_others() {
    let mut table = KeyTable::new(KEEP_MS, 1000);
    table.insert(key(1), body(1), &applied(1), START_MS, START_MS + 100_000, None).unwrap();
    table.insert(key(2), body(2), &applied(2), START_MS, START_MS + 10, None).unwrap();
    table.expire(START_MS + KEEP_MS + 1);
    assert_eq!(table.len(), 1);
    table.expire(START_MS + 200_000);
    assert_eq!(table.get(&key(1), body(1)).unwrap(), Some(Known::Outcome(applied(1))));
    assert_eq!(table.get(&key(1), 0).unwrap(), Some(Known::OtherBody));
    table.expire(START_MS + 200_001);
    assert!(table.is_empty() && table.packed_bytes == 0);
}

#[test]
fn a_key_that_is_kept_for_longer_holds_back_what_came_after_it_and_goes_in_time() {
    let mut table = KeyTable::new(KEEP_MS, 1000);
    table.insert(key(2), body(2), &applied(2), START_MS, START_MS + 10, None).unwrap();
    table.insert(key(1), body(1), &applied(1), START_MS, START_MS + 10, Some(START_MS + 45_000)).unwrap();
    table.insert(key(4), body(4), &applied(4), START_MS, START_MS + 10, None).unwrap();
    let mut tree = MapRead::default();
    tree.write(&table.save().unwrap());
    table.expire(START_MS + 45_000);
    assert_eq!(table.len(), 2);
    assert_eq!(table.get(&key(1), body(1)).unwrap(), Some(Known::Outcome(applied(1))));
    let restored = KeyTable::restore(&tree, KEEP_MS, 1000, START_MS + 45_000).unwrap();
    assert_same(&table, &restored);
    table.expire(START_MS + 45_001);
    assert!(table.is_empty());
    // Never for less than the usual time.
    table.insert(key(1), body(1), &applied(1), START_MS, START_MS, Some(START_MS)).unwrap();
    table.expire(START_MS + KEEP_MS);
    assert_eq!(table.len(), 1);
}

#[test]
fn the_bound_counts_keys_and_packed_bytes() {
    let mut table = KeyTable::new(KEEP_MS, 3);
    fill(&mut table, 1..3);
    assert!(!table.is_full());
    fill(&mut table, 3..4);
    assert!(table.is_full());
    let mut table = KeyTable::new(KEEP_MS, usize::MAX);
    let name = "x".repeat(PACKED_BYTES_MAX / 4);
    let large = Outcome::Refused(Refusal::EpochExists { name });
    for number in 0..4 {
        assert!(!table.is_full(), "{number}");
        table.insert(key(number), 0, &large, START_MS, START_MS, None).unwrap();
    }
    assert!(table.is_full());
}

#[test]
fn what_does_not_fit_a_slot_is_packed() {
    for receipt in [
        Receipt { id: Uuid::nil(), index: 1, created_at_ms: START_MS },
        Receipt { id: uuid(1), index: 1 << 48, created_at_ms: START_MS },
        Receipt { id: uuid(1), index: 1, created_at_ms: START_MS + 32_768 },
        Receipt { id: uuid(1), index: 1, created_at_ms: START_MS - 32_768 },
        Receipt { id: Uuid::max(), index: u64::MAX, created_at_ms: u64::MAX },
    ] {
        let mut table = KeyTable::new(KEEP_MS, 10);
        let outcome = Outcome::Applied(vec![receipt]);
        table.insert(key(1), 0, &outcome, START_MS, 0, None).unwrap();
        assert_eq!(table.get(&key(1), 0).unwrap(), Some(Known::Outcome(outcome)));
    }
}

/// Same keys with the same outcomes, in the same order.
fn assert_same(a: &KeyTable, b: &KeyTable) {
    assert_eq!(a.slots, b.slots);
    assert_eq!(a.first, b.first);
    assert_eq!(a.packed, b.packed);
    assert_eq!(a.packed_bytes, b.packed_bytes);
    assert_eq!(a.late, b.late);
    assert_eq!(a.late_order, b.late_order);
    for slot in &a.slots {
        assert!(b.find(&slot.command_key()).is_some());
    }
}

#[test]
fn saved_tables_come_back_whatever_the_moment() {
    let mut tree = MapRead::default();
    let mut table = KeyTable::new(1500, 100_000);
    let mut rows_written = 0;
    let mut number = 0;
    for step in [0, 1, 10, 2037, 1, 2048, 5000, 0, 3, 9000, 1] {
        fill(&mut table, number..number + step);
        number += step;
        let batch = table.save().unwrap();
        rows_written += batch.rows.iter().filter(|(_, value)| value.is_some()).count();
        tree.write(&batch);
        let now_ms = START_MS + number.saturating_sub(1);
        let restored = KeyTable::restore(&tree, 1500, 100_000, now_ms).unwrap();
        // A restored table counts slots from where the tree does, which is the same place.
        assert_same(&table, &restored);
        // And the restored one goes on saving into the same tree.
        if step % 2 == 1 {
            table = restored;
        }
    }
    // 16,101 keys: nine full chunks, their unfinished states, and the row of late ones.
    assert!(rows_written < 40, "{rows_written} rows");
    table.expire(u64::MAX);
    tree.write(&table.save().unwrap());
    assert!(tree.rows.is_empty(), "{:?}", tree.rows.keys());
}

#[test]
fn damaged_rows_are_errors_and_never_panics() {
    let mut table = KeyTable::new(KEEP_MS, 1000);
    fill(&mut table, 0..60);
    let mut tree = MapRead::default();
    tree.write(&table.save().unwrap());
    for name in [keys::short_keys_chunk(0), keys::SHORT_KEYS_LATE.to_vec()] {
        let row = tree.get(&name).unwrap().unwrap();
        let mut cuts_refused = 0;
        for cut in 0..row.len() {
            let mut cut_tree = tree.clone();
            cut_tree.rows.insert(name.clone().into(), row.slice(..cut));
            cuts_refused += usize::from(KeyTable::restore(&cut_tree, KEEP_MS, 1000, START_MS).is_err());
        }
        assert!(cuts_refused * 10 > row.len() * 9, "only a cut between keys can pass");
        let mut newer = row.to_vec();
        newer[0] = 2;
        tree.rows.insert(name.clone().into(), newer.into());
        let error = KeyTable::restore(&tree, KEEP_MS, 1000, START_MS).err().unwrap().to_string();
        assert!(error.contains("format 2, this program knows 1"), "{error}");
        tree.rows.insert(name.into(), row);
    }
}

#[test]
fn a_million_keys_fit_into_70_mb() {
    let mut table = KeyTable::new(KEEP_MS, 1_000_000);
    for number in 0..1_000_000 {
        table.insert(key(number), 0, &applied(number), START_MS, START_MS, None).unwrap();
    }
    assert!(table.is_full());
    let slots = table.slots.len() * size_of::<Slot>();
    let bytes = slots + table.numbers.allocation_size();
    assert!(bytes < 70_000_000, "{bytes} bytes");
    assert_eq!(table.get(&key(765_432), 0).unwrap(), Some(Known::Outcome(applied(765_432))));
}
