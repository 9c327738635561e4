//! Drills of disks: real servers on an ext4 whose disk fails. One round, or the counts when `STEMEDB_TEST_FULL=1`.
//!
//! No gap is asserted: `stemedb drill` prints them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod rig;

use std::{
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use serde_json::{Value, json};

fn is_full() -> bool {
    std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1")
}

/// One at a time: three nodes and three disks are enough for a small machine.
static DRILLS: Mutex<()> = Mutex::new(());

/// Runs a drill to its end; its report and what it said beside it.
fn drill(args: &[&str]) -> Option<(Value, String)> {
    let program = rig::faulty_disk_program()?;
    let _one = DRILLS.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(env!("CARGO_BIN_EXE_stemedb"))
        .args(["drill", "--json"])
        .args(args)
        .arg("--faulty-disk")
        .arg(program)
        // Far above a hand-over, and shorter to wait for than the default.
        .env("STEMEDB_CLUSTER_STALL_FENCE_MS", "4000")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{said}"));
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{said}");
    Some((report, said))
}

fn assert_clean(report: &Value, said: &str) {
    assert_eq!(report["passed"], true, "{report:#}\n{said}");
    assert_eq!(report["verdict"]["counts"], json!({}), "{report:#}");
    assert_eq!(report["survivor_errors"], 0, "{report:#}\n{said}");
    // It cannot pass by doing nothing.
    assert!(report["verdict"]["acknowledged"].as_u64().unwrap() > 100, "{report:#}");
    assert!(report["verdict"]["reads"].as_u64().unwrap() > 10, "{report:#}");
    for round in report["rounds"].as_array().unwrap() {
        println!("{}: gap {} us, {}", round["victim"], round["gap_us"], round["rejoined"]);
        assert_eq!((&round["healthy_voters"], &round["readable_nodes"]), (&json!(3), &json!(3)), "{round:#}");
    }
}

#[test]
fn a_failed_fsync_of_the_leader_is_no_event_for_clients_and_is_never_tried_again() {
    let (rounds, clients) = if is_full() { ("10", "64") } else { ("1", "12") };
    println!("drill --kind fsync: {rounds} rounds, {clients} clients (10 and 64 with STEMEDB_TEST_FULL=1)");
    let args = ["--kind", "fsync", "--rounds", rounds, "--clients", clients];
    let Some((report, said)) = drill(&args) else { return };
    assert_clean(&report, &said);
    for round in report["rounds"].as_array().unwrap() {
        assert_eq!(round["fsync_errors"], 1, "{round:#}");
        assert_eq!(round["segment_writes_after"], 0, "{round:#}");
        assert_eq!(round["served_after"], 0, "{round:#}");
        // Absent only where the kernel cannot be watched.
        let syncs = &round["segment_syncs_after"];
        assert!(*syncs == json!(0) || said.contains("cannot be told apart"), "{round:#}\n{said}");
        assert_ne!(round["victim"], round["new_leader"], "{round:#}");
    }
    for round in report["rounds"].as_array().unwrap() {
        assert_eq!(round["rejoined"], "rebuilt itself", "{round:#}\n{said}");
    }
}

#[test]
fn a_disk_of_the_leader_that_hangs_for_good_is_left_and_its_process_accepts_nothing() {
    let (rounds, clients) = if is_full() { ("3", "64") } else { ("1", "12") };
    println!("drill --kind stall: {rounds} rounds, {clients} clients (3 and 64 with STEMEDB_TEST_FULL=1)");
    let args = ["--kind", "stall", "--rounds", rounds, "--clients", clients];
    let Some((report, said)) = drill(&args) else { return };
    assert_clean(&report, &said);
    for round in report["rounds"].as_array().unwrap() {
        assert!(round["fenced_ms"].is_u64(), "it was never fenced: {round:#}");
        assert_eq!(round["accepts_after_fence"], false, "{round:#}");
        assert_eq!(round["rejoined"], "restarted", "{round:#}");
        assert_ne!(round["victim"], round["new_leader"], "{round:#}");
    }
}

#[test]
fn the_helper_is_asked_for_by_name_when_it_is_missing() {
    let args = ["drill", "--kind", "fsync", "--faulty-disk", "/nowhere/stemedb-faulty-disk"];
    let output = Command::new(env!("CARGO_BIN_EXE_stemedb")).args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("cargo build --release --features faulty-disk"), "{said}");
}
