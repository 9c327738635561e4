//! The feature level, with real servers: held by one node, raised when nobody holds it any more, and what is refused
//! below it. Upgrades from the program before are in `tests/balancers/upgrade.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod rig;

use std::process::Command;

use rig::HANG;
use rig::three::Three;
use serde_json::{Value, json};
use stemedb::cli::http_client::Call;

const HOLD: &str = "STEMEDB_CLUSTER_FEATURE_LEVEL_MAX";

async fn cluster(three: &Three, node: usize) -> Option<Value> {
    three.client(node).get_json("/v1/admin/cluster", HANG).await.ok()
}

/// Asks for a learner that nobody has started; what is refused first is the level.
async fn refusal_of_a_member(three: &Three, node: usize) -> Value {
    let order = json!({"name": "node-9", "addr": "127.0.0.1:9"}).to_string();
    let answer = three.client(node).call(&Call::post("/v1/admin/members", order), HANG).await.unwrap();
    answer.json().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_that_holds_it_keeps_the_level_and_no_longer() {
    let mut three = Three::with_env(&[(1, HOLD, "0")]).await;
    three.write(0).await;
    // Whoever leads has looked by now or does within a second; what it says is the same before and after.
    for node in 0..3 {
        three
            .until("the hold to be shown", async |three| {
                cluster(three, node).await.is_some_and(|c| {
                    let by = c["feature_level_held_by"][0].as_str().unwrap_or_default();
                    c["feature_level"] == 0 && by == "node-2 is held at level 0 by its cluster.feature_level_max"
                })
            })
            .await;
    }
    // The members do not change below level 1, and the answer names who holds it.
    let remove = Call::delete("/v1/admin/members/node-3?force=true".to_owned());
    let refused: Value = three.client(0).call(&remove, HANG).await.unwrap().json().unwrap();
    let detail = refused["detail"].as_str().unwrap_or_default();
    assert!(refused["type"].as_str().is_some_and(|kind| kind.ends_with("feature-level")), "{refused}");
    assert!(detail.contains("node-2 is held at level 0") && detail.contains("Nothing was changed"), "{refused}");
    let status = Command::new(env!("CARGO_BIN_EXE_stemedb"))
        .args(["status", "--endpoints", &three.processes.plan()[0].http_addr()])
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(shown.contains("feature level 0: node-2 is held at level 0"), "{shown}");
    // The hold is taken back: nobody orders anything, and the level rises.
    three.processes.unset_node_env(1, HOLD);
    three.processes.stop(1).await.unwrap();
    three.processes.start(1).unwrap();
    three.ready().await;
    three.write(1).await;
    for node in 0..3 {
        three
            .until("the level to be raised", async |three| {
                cluster(three, node)
                    .await
                    .is_some_and(|c| c["feature_level"] == 1 && c["feature_level_held_by"].is_null())
            })
            .await;
    }
    let refused = refusal_of_a_member(&three, 0).await;
    assert!(refused["detail"].as_str().is_some_and(|why| why.contains("no node answers")), "{refused}");
    // It does not sink any more, neither by a hold nor by the end of every process.
    three.processes.set_node_env(1, HOLD, "0");
    three.processes.stop_all().await.unwrap();
    three.processes.start_all().unwrap();
    three.ready().await;
    three.write(2).await;
    for node in 0..3 {
        assert_eq!(cluster(&three, node).await.unwrap()["feature_level"], 1, "node {node}");
    }
    three.assert_all_there("at the end").await;
}
