//! The drill itself, with the counts of the issue when `STEMEDB_TEST_FULL=1`, else a few rounds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr, missing_docs)]

use std::process::{Command, Stdio};

use serde_json::Value;

#[test]
fn killing_the_leader_loses_nothing_and_survivors_see_no_error() {
    let full = std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1");
    let (rounds, clients) = if full { ("20", "64") } else { ("2", "24") };
    eprintln!("drill: {rounds} rounds, {clients} clients (20 and 64 with STEMEDB_TEST_FULL=1)");
    let output = Command::new(env!("CARGO_BIN_EXE_stemedb"))
        .args(["drill", "--kind", "kill", "--json", "--rounds", rounds, "--clients", clients])
        // The nodes inherit these. Elections by overload are not what is tested here, and a client waits 15 s.
        .envs([("STEMEDB_CLUSTER_HEARTBEAT_MS", "100"), ("STEMEDB_CLUSTER_REQUEST_DEADLINE_MS", "14000")])
        .envs([("STEMEDB_CLUSTER_ELECTION_MIN_MS", "600"), ("STEMEDB_CLUSTER_ELECTION_MAX_MS", "1200")])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{said}"));
    assert_eq!(output.status.code(), Some(0), "{report}\n{said}");
    assert_eq!(report["passed"], true, "{report}");
    assert_eq!(report["survivor_errors"], 0, "{report}");
    assert_eq!(report["verdict"]["counts"], serde_json::json!({}), "{report}");
    // It cannot pass by doing nothing.
    assert!(report["verdict"]["acknowledged"].as_u64().unwrap() > 500, "{report}");
    assert!(report["verdict"]["reads"].as_u64().unwrap() > 50, "{report}");
    assert_eq!(report["verdict"]["nodes"], 3);
    for round in report["rounds"].as_array().unwrap() {
        assert!(round["retried"].as_u64().unwrap() > 0, "clients of the dead node moved: {round}");
        assert_ne!(round["killed"], round["new_leader"]);
        assert_eq!((&round["readable_nodes"], &round["duplicates"]), (&3.into(), &0.into()), "{round}");
    }
}
