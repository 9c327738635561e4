//! The stored forms, frozen: a change of these bytes is a change of format and needs a new version.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt::Write;

use super::*;
use crate::model::{NewAssertion, NewEpoch, NewSupersession, NewVote};
use crate::state::command::*;
use crate::state::keys::{self, FactKind};
use crate::state::members::{Change, End, Intent, MemberBook};
use crate::state::outcome_record::ClientKeyRecord;
use crate::state::permits::Book;
use crate::state::test_support::{START_MS, uuid};

const GOLDEN: &str = include_str!("../../../tests/golden/state_format_1.txt");

fn assertion() -> AssertionRecord<'static> {
    AssertionRecord {
        id: uuid(1),
        created_at_ms: START_MS + 2,
        source: Some("apt"),
        confidence: Some(0.9),
        epoch: Some("2026"),
        supersedes: Some(uuid(2)),
        valid_from_ms: Some(-5),
        valid_to_ms: Some(1_700_000_000_000),
        value_json: "\"8.5.0-2\"",
    }
}

fn plain() -> AssertionRecord<'static> {
    AssertionRecord {
        source: None,
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
        ..assertion()
    }
}

fn vote(reason: Option<&'static str>) -> VoteRecord<'static> {
    VoteRecord {
        id: uuid(3),
        created_at_ms: START_MS,
        weight_nano: weight_nano(-0.25),
        tally: Tally { sum_nano: weight_nano(0.5), count: 3 },
        voter: "ann",
        reason,
    }
}

fn supersession(new: Option<u64>, reason: Option<&'static str>) -> SupersessionRecord<'static> {
    SupersessionRecord { id: uuid(4), created_at_ms: START_MS - 1, new: new.map(uuid), reason }
}

fn epoch() -> EpochRecord<'static> {
    EpochRecord {
        id: uuid(5),
        created_at_ms: START_MS,
        index: 300,
        supersedes: Some("2025"),
        description: Some("the year"),
    }
}

fn client_key(outcome: Outcome) -> ClientKeyRecord {
    ClientKeyRecord { body_hash: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10, outcome }
}

fn receipts(ids: &[u64]) -> Outcome {
    let receipt =
        |(n, id): (usize, &u64)| Receipt { id: uuid(*id), index: 1000 + n as u64, created_at_ms: START_MS + 1 };
    Outcome::Applied(ids.iter().enumerate().map(receipt).collect())
}

fn command(op: Operation) -> Command {
    Command {
        key: CommandKey { source: KeySource::Client, id: 0x1111_2222_3333_4444_5555_6666_7777_8888 },
        body_hash: 9,
        resend_until_ms: START_MS + 10_000,
        created_at_ms: START_MS,
        op,
    }
}

fn entry() -> EntryBody {
    let new = NewAssertion {
        id: uuid(1),
        concept_path: "debian/net/curl".into(),
        predicate: "version".into(),
        value_json: "\"8.5.0-2\"".into(),
        source: Some("apt".into()),
        confidence: Some(0.9),
        epoch: None,
        supersedes: None,
        valid_from_ms: Some(-5),
        valid_to_ms: None,
    };
    let (id, reason) = (uuid(9), Some("why".to_owned()));
    EntryBody {
        format: ENTRY_FORMAT,
        log_time_ms: START_MS,
        commands: vec![
            command(Operation::Assert(vec![new.clone()])),
            command(Operation::Vote(NewVote {
                id,
                assertion_id: uuid(1),
                voter: "ann".into(),
                weight: -0.25,
                reason: reason.clone(),
            })),
            command(Operation::Epoch(NewEpoch {
                id,
                name: "2026".into(),
                description: None,
                supersedes: Some("2025".into()),
            })),
            command(Operation::Supersede(NewSupersession { id, old: uuid(1), new: None, reason })),
            command(Operation::ImportChunk {
                import_id: "dpkg".into(),
                position_before: 10,
                position_after: 11,
                assertions: vec![new],
            }),
        ],
    }
}

fn rebuild_entry() -> EntryBody {
    let name = || "node-1".to_owned();
    let ops = [
        RebuildCommand::Grant { name: name(), job: 7, old_id: 1, id_min: 4, automatic_max: Some(2) },
        RebuildCommand::Finish { name: name(), fresh_id: 300 },
        RebuildCommand::Cancel { name: name(), job: 7 },
    ];
    let commands = ops.into_iter().map(|op| command(Operation::Rebuild(op))).collect();
    EntryBody { format: ENTRY_FORMAT, log_time_ms: START_MS, commands }
}

fn book() -> Book {
    let mut book = Book::default();
    let grant = RebuildCommand::Grant { name: "node-1".into(), job: 7, old_id: 1, id_min: 4, automatic_max: Some(2) };
    book.apply(&grant, 300, 5).unwrap();
    book
}

fn permit() -> Outcome {
    Outcome::Permit(book().permit.unwrap())
}

fn held() -> Outcome {
    Outcome::Refused(Refusal::RebuildHeld { by: "node-1".into(), expires_in_s: 9 })
}

fn too_often() -> Outcome {
    Outcome::Refused(Refusal::RebuiltTooOften { name: "node-1".into(), times: 2 })
}

fn intent() -> Intent {
    Intent {
        job: 9,
        change: Change::Replace { old: "node-3".into(), learner: false },
        name: "node-4".into(),
        peer_addr: "10.0.0.4:18280".into(),
        http_addr: "10.0.0.4:18180".into(),
        forced: false,
        cause: "an operator".into(),
        began_unix_ms: START_MS,
        place: None,
        leaves: vec![],
        changing: false,
        cancelled: false,
    }
}

fn member_commands() -> Vec<MemberCommand> {
    let (job, detail) = (9, "done".to_owned());
    vec![
        MemberCommand::Begin(Box::new(intent())),
        MemberCommand::TakePlace { job, node_job: 77, id_min: 4 },
        MemberCommand::Announce { job, leaves: vec![3] },
        MemberCommand::Withdraw { job },
        MemberCommand::Announce { job, leaves: vec![3] },
        MemberCommand::End { job, end: End::Finished, detail, ended_unix_ms: START_MS + 1 },
        MemberCommand::Begin(Box::new(Intent { job: 10, change: Change::Add { learner: true }, ..intent() })),
        MemberCommand::Cancel { job: 10 },
    ]
}

fn members_entry() -> EntryBody {
    let commands = member_commands().into_iter().map(|op| command(Operation::Members(op))).collect();
    EntryBody { format: ENTRY_FORMAT, log_time_ms: START_MS, commands }
}

fn member_book() -> MemberBook {
    let (mut members, mut permits) = (MemberBook::default(), Book::default());
    for command in member_commands() {
        members.apply(&command, &mut permits, 300, START_MS).unwrap();
    }
    members
}

fn member() -> Outcome {
    Outcome::Member(Box::new(intent()))
}

fn members_busy() -> Outcome {
    Outcome::Refused(Refusal::MembersBusy { job: 9, kind: "member-add".into(), name: "node-4".into() })
}

/// Everything that reaches a disk from here: name and bytes.
fn forms() -> Vec<(&'static str, Vec<u8>)> {
    let key = keys::assertion("debian/net/curl", "version", 70_000);
    let late = Outcome::Refused(Refusal::NotFound { kind: "epoch".into(), name: "2024".into() });
    vec![
        ("key assertion", key.clone()),
        ("key assertion 1", keys::assertion("a", "b", 1)),
        ("key assertion max", keys::assertion("a", "b", u64::MAX)),
        ("key supersession", keys::fact(&key, FactKind::Supersession, 70_001)),
        ("key vote", keys::fact(&key, FactKind::Vote, 70_002)),
        ("key voter", keys::voter(&key, "ann")),
        ("key tally", keys::tally(&key)),
        ("key id", keys::id(uuid(1)).to_vec()),
        ("key epoch", keys::epoch("2026")),
        ("key epoch superseded", keys::epoch_superseded("2025", 300)),
        ("key moment", keys::moment(START_MS)),
        ("key client key", keys::client_key(0x0102).to_vec()),
        ("key client expiry", keys::client_expiry(START_MS, 0x0102)),
        ("key import", keys::import("dpkg")),
        ("key short keys", keys::short_keys_chunk(3)),
        ("assertion plain", plain().encode()),
        ("assertion full", assertion().encode()),
        ("place", encode_place(&key)),
        ("supersession", supersession(Some(6), Some("wrong")).encode()),
        ("supersession own", supersession(Some(4), None).encode()),
        ("supersession retracted", supersession(None, None).encode()),
        ("vote", vote(Some("seen")).encode()),
        ("vote plain", vote(None).encode()),
        ("tally", vote(None).tally.encode()),
        ("epoch", epoch().encode()),
        ("epoch superseded", encode_text("2026")),
        ("number", encode_number(300)),
        ("counters", Counters { assertions: 300, created_max_ms: START_MS }.encode()),
        ("client key run", client_key(receipts(&[7, 8, 9])).encode().unwrap()),
        ("client key apart", client_key(receipts(&[7, 9])).encode().unwrap()),
        ("client key refused", client_key(late).encode().unwrap()),
        ("entry", entry().encode().unwrap()),
        ("entry rebuild", rebuild_entry().encode().unwrap()),
        ("rebuild permits", book().encode().unwrap()),
        ("client key permit", client_key(permit()).encode().unwrap()),
        ("client key rebuild held", client_key(held()).encode().unwrap()),
        ("client key rebuilt too often", client_key(too_often()).encode().unwrap()),
        ("entry members", members_entry().encode().unwrap()),
        ("members", member_book().encode().unwrap()),
        ("client key member", client_key(member()).encode().unwrap()),
        ("client key members busy", client_key(members_busy()).encode().unwrap()),
        ("client key members void", client_key(Outcome::Refused(Refusal::MembersVoid { job: 9 })).encode().unwrap()),
    ]
}

#[test]
fn stored_forms_are_the_frozen_ones() {
    let mut text = String::new();
    for (name, bytes) in forms() {
        let hex: String = bytes.iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        writeln!(text, "{name}: {hex}").unwrap();
    }
    assert!(
        text == GOLDEN,
        "the stored forms changed. If that is meant, raise the version, keep reading\nthe old one, and freeze beside it:\n{text}"
    );
}

#[test]
fn records_come_back() {
    for record in [plain(), assertion()] {
        assert_eq!(AssertionRecord::decode(&record.encode()), Ok(record));
    }
    for record in [vote(None), vote(Some("")), vote(Some("seen"))] {
        assert_eq!(VoteRecord::decode(&record.encode()), Ok(record));
    }
    for (new, reason) in [(None, None), (None, Some("x")), (Some(4), None), (Some(4), Some("x")), (Some(9), Some(""))] {
        let record = supersession(new, reason);
        assert_eq!(SupersessionRecord::decode(&record.encode()), Ok(record));
    }
    assert_eq!(EpochRecord::decode(&epoch().encode()), Ok(epoch()));
    let key = keys::assertion("a/b", "c", 9);
    assert_eq!(decode_place(&encode_place(&key)), Ok(key));
    for outcome in [
        receipts(&[]),
        receipts(&[1]),
        receipts(&[1, 2, 3, 9, 10, 5]),
        Outcome::Refused(Refusal::Cycle),
        permit(),
        held(),
        too_often(),
        member(),
        members_busy(),
    ] {
        let record = client_key(outcome);
        assert_eq!(ClientKeyRecord::decode(&record.encode().unwrap()), Ok(record));
    }
    assert_eq!(EntryBody::decode(&entry().encode().unwrap()).unwrap(), entry());
    assert_eq!(EntryBody::decode(&rebuild_entry().encode().unwrap()).unwrap(), rebuild_entry());
    assert_eq!(EntryBody::decode(&members_entry().encode().unwrap()).unwrap(), members_entry());
    assert_eq!(MemberBook::decode(Some(&member_book().encode().unwrap())), Ok(member_book()));
}

#[test]
fn newer_versions_are_named_and_cut_rows_are_damage() {
    let mut row = assertion().encode();
    row[0] = 3;
    let error = AssertionRecord::decode(&row).unwrap_err();
    assert_eq!(error.to_string(), "assertion: format 3, this program knows 1");
    type IsOk = fn(&[u8]) -> bool;
    let decode: [(Vec<u8>, IsOk); 7] = [
        (vote(Some("seen")).encode(), |b| VoteRecord::decode(b).is_ok()),
        (supersession(Some(6), None).encode(), |b| SupersessionRecord::decode(b).is_ok()),
        (epoch().encode(), |b| EpochRecord::decode(b).is_ok()),
        (vote(None).tally.encode(), |b| Tally::decode(b).is_ok()),
        (encode_number(1 << 40), |b| decode_number("n", b).is_ok()),
        (encode_place(&keys::assertion("a/b", "c", 9)), |b| decode_place(b).is_ok()),
        (client_key(receipts(&[7, 9])).encode().unwrap(), |b| ClientKeyRecord::decode(b).is_ok()),
    ];
    for (row, is_ok) in decode {
        assert!(is_ok(&row));
        assert!(!is_ok(&[]));
        for cut in 0..row.len() {
            // A cut may leave a shorter text; it may never panic.
            is_ok(&row[..cut]);
        }
        for (at, bit) in (0..row.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            let mut flipped = row.clone();
            flipped[at] ^= 1 << bit;
            is_ok(&flipped);
        }
        let mut versioned = row.clone();
        versioned[0] = 0;
        assert!(!is_ok(&versioned));
    }
    let row = assertion().encode();
    for cut in 0..row.len() - assertion().value_json.len() {
        assert!(AssertionRecord::decode(&row[..cut]).is_err());
    }
    let mut newer = entry().encode().unwrap();
    newer[0] = 2;
    let error = EntryBody::decode(&newer).unwrap_err().to_string();
    assert!(error.contains("entry format 2, this program knows 1"), "{error}");
    assert!(EntryBody::decode(&[]).is_err());
    assert!(EntryBody::decode(&entry().encode().unwrap()[..40]).is_err());
}

#[test]
fn numbers_sort_as_bytes() {
    let mut numbers: Vec<u64> = (0..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1]).collect();
    numbers.push(u64::MAX);
    numbers.sort_unstable();
    numbers.dedup();
    let encode = |push: fn(&mut Vec<u8>, u64), number| {
        let mut out = Vec::new();
        push(&mut out, number);
        out
    };
    for pair in numbers.windows(2) {
        assert!(encode(keys::push_ascending, pair[0]) < encode(keys::push_ascending, pair[1]));
        assert!(encode(keys::push_descending, pair[0]) > encode(keys::push_descending, pair[1]));
    }
    for &number in &numbers {
        let mut bytes = encode(keys::push_ascending, number);
        bytes.push(7);
        assert_eq!(keys::split_ascending(&bytes), Some((number, &[7][..])));
        let bytes = encode(keys::push_descending, number);
        assert_eq!(keys::split_descending(&bytes), Some((number, &[][..])));
        for cut in 0..bytes.len() {
            assert_eq!(keys::split_descending(&bytes[..cut]), None);
        }
    }
    assert_eq!(encode(keys::push_ascending, (1 << 20) - 1).len(), 3);
    assert_eq!(encode(keys::push_ascending, 1 << 20).len(), 4);
}
