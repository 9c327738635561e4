//! Nodes are upgraded one by one from the program before this one, go back, and are upgraded for good, behind nginx and
//! under clients that never notice.
//!
//! The program before is built by `scripts/build-previous.sh`, which takes minutes: so this runs with
//! `STEMEDB_TEST_FULL=1`, or with `STEMEDB_TEST_PREVIOUS` naming an executable that is there.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use stemedb::cli::{
    balancer::Kind,
    http_client::{Call, Client},
};

use super::support::{Behind, Clients, HANG};

const CLIENTS: u32 = 16;
/// What holds the level on nodes that run this program; the one before refuses to start with a variable it does not know.
const HOLD: &str = "STEMEDB_CLUSTER_FEATURE_LEVEL_MAX";

/// The program before; `None` where it was not asked for.
fn previous() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("STEMEDB_TEST_PREVIOUS") {
        return Some(PathBuf::from(given));
    }
    if std::env::var_os("STEMEDB_TEST_FULL").is_none_or(|value| value == "0") {
        println!("upgrades from the program before run with STEMEDB_TEST_FULL=1, or with STEMEDB_TEST_PREVIOUS");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/build-previous.sh");
    let built = Command::new(script).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    Some(PathBuf::from(String::from_utf8(built.stdout).unwrap().trim()))
}

fn this_program() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_stemedb"))
}

async fn cluster(behind: &Behind, node: usize) -> Option<Value> {
    Client::new(behind.endpoints()[node].clone()).get_json("/v1/admin/cluster", HANG).await.ok()
}

/// One node goes over to another program, in working hours.
async fn change(behind: &mut Behind, clients: &Clients, node: usize, program: &Path, hold: Option<&str>) {
    behind.order("drain", node).await;
    behind.processes.stop(node).await.unwrap();
    behind.processes.set_node_program(node, program.to_owned());
    match hold {
        Some(level) => behind.processes.set_node_env(node, HOLD, level),
        None => behind.processes.unset_node_env(node, HOLD),
    }
    behind.processes.start(node).unwrap();
    behind.processes.wait_ready(HANG).await.unwrap();
    behind.order("undrain", node).await;
    clients.have_done(behind, 100).await;
    // Each node serves writes and linearizable reads of its own, whoever leads with whichever program.
    for (i, endpoint) in behind.endpoints().into_iter().enumerate() {
        let path = format!("upgrade/{}", uuid::Uuid::now_v7());
        let body = json!({"concept_path": path, "predicate": "through", "value": i}).to_string();
        let mut client = Client::new(endpoint);
        let written = client.call(&Call::post("/v1/assert", body), HANG).await.unwrap();
        assert!(written.is_success(), "{written:?}");
        let read: Value = client.get_json(&format!("/v1/query?concept_path={path}"), HANG).await.unwrap();
        assert_eq!(read["assertions"][0]["value"], i, "{read}");
    }
}

/// A node that is made anew in the mix, from whichever replica there is.
async fn rebuild(behind: &mut Behind, node: usize) {
    let job = behind.order("rebuild", node).await;
    assert!(job.bytes_done > 0, "{job:?}");
    behind.processes.wait_ready(HANG).await.unwrap();
}

/// All that a node keeps is moved away, but for its configuration.
fn empty(folder: &Path) {
    let away = folder.with_extension("away");
    fs::create_dir(&away).unwrap();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().is_some_and(|name| name != "api.toml") {
            fs::rename(&path, away.join(path.file_name().unwrap())).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_upgraded_go_back_and_are_upgraded_for_good_and_no_client_notices() {
    let Some(previous) = previous() else { return };
    let Some(mut behind) = Behind::start_program(Kind::Nginx, &previous).await else { return };
    let clients = Clients::start(&behind, CLIENTS);
    clients.have_done(&behind, 200).await;
    for node in 0..3 {
        change(&mut behind, &clients, node, &this_program(), Some("0")).await;
        // In a mix of one and two, and of two and one.
        rebuild(&mut behind, if node == 0 { 0 } else { 2 }).await;
    }
    for node in 0..3 {
        let seen = cluster(&behind, node).await.unwrap();
        assert_eq!(seen["feature_level"], 0, "{seen}");
    }
    // The way back is open for as long as the level is held.
    for node in [2, 0, 1] {
        change(&mut behind, &clients, node, &previous, None).await;
    }
    for node in [1, 2, 0] {
        change(&mut behind, &clients, node, &this_program(), None).await;
    }
    for node in 0..3 {
        behind
            .until("the level to be raised", async |behind: &Behind| {
                cluster(behind, node).await.filter(|seen| seen["feature_level"] == 1)
            })
            .await;
    }
    clients.have_done(&behind, 100).await;
    let history = clients.finish(&behind).await;
    let (writes, reads) = (history.writes.len(), history.reads.len());
    println!("{writes} writes and {reads} reads while programs changed 9 times, none failed");
    // From here on the program before is refused, and changes nothing: neither with the files that are there...
    behind.order("drain", 2).await;
    behind.processes.stop(2).await.unwrap();
    behind.processes.set_node_program(2, previous.clone());
    behind.processes.start(2).unwrap();
    let ended = tokio::time::timeout(HANG, behind.processes.child_ended()).await;
    let ended = ended.expect("it to refuse its state").unwrap();
    assert!(ended.node == 2 && !ended.status.success(), "{ended:?}\n{}", behind.node_log(2));
    assert!(behind.node_log(2).contains("feature level 1"), "{}", behind.node_log(2));
    // ...nor with none.
    let folder = behind.processes.plan()[2].dir.clone();
    empty(&folder);
    behind.processes.set_node_env(2, "STEMEDB_CLUSTER_AUTO_REBUILD", "true");
    behind.processes.start(2).unwrap();
    behind
        .until("it to be told to come with a newer program", async |behind: &Behind| {
            behind.node_log(2).contains("to be started with a newer program").then_some(())
        })
        .await;
    behind.processes.stop(2).await.unwrap();
    behind.processes.set_node_program(2, this_program());
    behind.processes.start(2).unwrap();
    behind.processes.wait_ready(HANG).await.unwrap();
    behind.stop().await;
}
