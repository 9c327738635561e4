//! One row per answer of the layers below: its kind, status and outcome.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::*;
use crate::state::engine::EngineError;
use WriteOutcome::{NotApplied, Refused, Unknown};

fn text(word: &str) -> String {
    word.to_string()
}

#[test]
fn every_refusal_has_its_answer() {
    for (given, kind, status, outcome) in [
        (Refusal::Expired, Kind::Expired, 503, Refused),
        (Refusal::KeyReused, Kind::KeyReused, 409, Refused),
        (Refusal::NotFound { kind: text("assertion"), name: text("x") }, Kind::NotFound, 404, Refused),
        (Refusal::NotFound { kind: text("epoch"), name: text("x") }, Kind::UnknownEpoch, 422, Refused),
        (Refusal::EpochExists { name: text("x") }, Kind::EpochExists, 409, Refused),
        (Refusal::Cycle, Kind::SupersessionCycle, 409, Refused),
        (Refusal::PathMismatch { old_path: text("a"), new_path: text("b") }, Kind::PathMismatch, 422, Refused),
        (Refusal::ChainTooLong { steps_max: 9 }, Kind::ChainTooLong, 409, Refused),
        (Refusal::ImportPosition { expected: 7 }, Kind::ImportPosition, 409, Refused),
        (Refusal::RebuildHeld { by: text("n"), expires_in_s: 1 }, Kind::RebuildRefused, 409, Refused),
        (Refusal::RebuiltTooOften { name: text("n"), times: 2 }, Kind::RebuildRefused, 409, Refused),
        (Refusal::MembersBusy { job: 7, kind: text("member-add"), name: text("n") }, Kind::FlowUnderWay, 409, Refused),
        (Refusal::MembersVoid { job: 7 }, Kind::FlowRefused, 409, Refused),
        (Refusal::KeyTableFull, Kind::TooManyRequests, 429, NotApplied),
    ] {
        let problem = refusal(&given, 10_000).on_write(false);
        assert_eq!(problem.kind(), kind, "{given:?}");
        assert_eq!(problem.status(), status, "{given:?}");
        assert_eq!(problem.write_outcome(), Some(outcome), "{given:?}");
        assert!(!problem.detail().is_empty());
    }
    let position = refusal(&Refusal::ImportPosition { expected: 7 }, 1);
    assert_eq!(position.member("expected_position").unwrap(), 7);
}

#[test]
fn a_submit_error_keeps_what_is_known_of_the_write() {
    for (status, kind) in [(429, Kind::TooManyRequests), (503, Kind::Unavailable)] {
        let error = SubmitError::NotApplied { status, detail: text("why"), retry_after_s: 3 };
        let problem = submit_error(error, 10_000).on_write(false);
        assert_eq!((problem.kind(), problem.status()), (kind, status));
        assert_eq!(problem.write_outcome(), Some(NotApplied));
        assert!(problem.detail().ends_with("applied: why."), "{}", problem.detail());
        let json = serde_json::to_value(&problem).unwrap();
        assert_eq!(json["retry_after_s"], 3);
    }
    let unknown = submit_error(SubmitError::Unknown { detail: text("why") }, 1).on_write(false);
    assert_eq!((unknown.status(), unknown.write_outcome()), (503, Some(Unknown)));
}

#[test]
fn a_full_disk_is_answered_with_what_is_free_and_what_to_do() {
    let shortage = |node: &str, bytes_free| Shortage {
        node: text(node),
        data_dir: text("/data"),
        bytes_free,
        bytes_wanted: 1_500,
        inodes_free: Some(9),
        inodes_wanted: 24,
        blocked: None,
    };
    let full = SubmitError::DiskFull(vec![shortage("node-1", 900), shortage("node-2", 100)]);
    let problem = submit_error(full, 1).on_write(false);
    assert_eq!((problem.kind(), problem.status()), (Kind::DiskFull, 507));
    assert_eq!(problem.write_outcome(), Some(NotApplied));
    assert_eq!(
        (problem.member("bytes_free").unwrap(), problem.member("bytes_needed").unwrap()),
        (&100.into(), &1_400.into())
    );
    let nodes = problem.member("nodes").unwrap();
    assert_eq!((&nodes[0]["node"], &nodes[0]["inodes_needed"]), (&"node-1".into(), &15.into()));
    assert_eq!(nodes[1]["next_command"], "df -h /data; df -i /data");
    for part in ["node-1", "node-2", "100 bytes are free", "Free at least 1400 bytes", "reads go on"] {
        assert!(problem.detail().contains(part), "{part}: {}", problem.detail());
    }
    assert_eq!(serde_json::to_value(&problem).unwrap()["retry_after_s"], 5);
}

#[test]
fn every_read_error_has_its_answer() {
    let io = || EngineError::Io { operation: "get", source: std::io::Error::other("/secret/file") };
    for (error, kind, status) in [
        (ReadError::Unavailable { detail: text("no leader"), retry_after_s: 2 }, Kind::Unavailable, 503),
        (ReadError::TooStale { staleness_ms: 9, max_staleness_ms: 5 }, Kind::TooStale, 503),
        (ReadError::Store(StoreError::Engine(io())), Kind::StorageDamaged, 503),
        (ReadError::Store(StoreError::Damaged { what: text("row") }), Kind::StorageDamaged, 503),
        (ReadError::Store(StoreError::BadCursor { why: text("x") }), Kind::InvalidCursor, 400),
        (ReadError::Store(StoreError::CursorGone { why: text("x") }), Kind::CursorExpired, 410),
        (ReadError::Store(StoreError::TooMuch { rows_max: 9 }), Kind::QueryTooBroad, 422),
    ] {
        let problem = read_error(error);
        assert_eq!((problem.kind(), problem.status()), (kind, status));
        assert!(!problem.detail().contains("/secret/"), "files are not the client's business");
    }
}

#[test]
fn sizes_travel_in_the_problem() {
    let problem = invalid(&Invalid::too_long("value", 10, 11));
    assert_eq!((problem.kind(), problem.status()), (Kind::ValueTooLarge, 413));
    assert_eq!(problem.member("actual").unwrap(), 11);
    assert_eq!(invalid(&Invalid::too_long("concept_path", 1, 2)).kind(), Kind::InvalidPath);
    assert_eq!(invalid(&Invalid::malformed("weight", "is odd")).kind(), Kind::InvalidField);
}
