//! Real input: the package index of Debian goes in while a follower is killed and restarted, and comes out the same on
//! every node. A slice by default, all of it with `STEMEDB_TEST_FULL=1`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use stemedb::cli::http_client::{Client, Endpoint};
use stemedb::cli::local_cluster::{LocalCluster, NodePlan, free_port, plan};
use stemedb::cli::status;

const READY: Duration = Duration::from_secs(120);
const SLICE_PACKAGES: usize = 1000;

/// The index as NDJSON. A machine without one (no `apt-get update` yet) gets packages of the same shape.
fn sample(dir: &Path, full: bool) -> PathBuf {
    let file = dir.join("sample.ndjson");
    let packages = if full { "0".to_owned() } else { SLICE_PACKAGES.to_string() };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/sample-data.sh");
    let made = Command::new("sh").arg(script).args(["--packages", &packages, "--output"]).arg(&file).status();
    if made.is_ok_and(|status| status.success()) {
        return file;
    }
    eprintln!("no package index on this machine: made-up packages instead");
    let mut text = String::new();
    for package in 0..SLICE_PACKAGES {
        for (predicate, value) in [
            ("version", format!("\"1.{package}-1\"")),
            ("depends", format!("\"libc6 (>= 2.{package}), é\\\"quoted\\\"\"")),
            ("maintainer", "\"Nobody <nobody@example.org>\"".to_owned()),
            ("installed-size", package.to_string()),
            ("description", "\"a package that is not there\"".to_owned()),
        ] {
            text.push_str(&format!(
                "{{\"concept_path\":\"debian/misc/made-up-{package}\",\"predicate\":\"{predicate}\",\"value\":{value},\"source\":\"apt\"}}\n"
            ));
        }
    }
    std::fs::write(&file, text).unwrap();
    file
}

async fn a_follower(cluster: &LocalCluster) -> usize {
    for (node, plan) in cluster.plan().iter().enumerate() {
        let mut client = Client::new(plan.endpoint().unwrap());
        if status::health(&mut client, READY).await.is_ok_and(|health| health.role == "follower") {
            return node;
        }
    }
    panic!("no follower");
}

async fn position(endpoint: &str) -> u64 {
    let mut client = Client::new(Endpoint::parse(endpoint).unwrap());
    let body = client.get_json::<Value>("/v1/admin/imports/sample", READY).await;
    body.ok().and_then(|body| body["position"].as_u64()).unwrap_or(0)
}

#[tokio::test]
async fn the_package_index_survives_an_import_with_a_dying_follower() {
    let full = std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1");
    let dir = tempfile::tempdir().unwrap();
    let file = sample(dir.path(), full);
    let records = std::fs::read_to_string(&file).unwrap().lines().count() as u64;
    eprintln!("importing {records} assertions ({SLICE_PACKAGES} packages; all with STEMEDB_TEST_FULL=1)");
    let nodes = plan(&dir.path().join("data"), 3, free_port(3).unwrap()).unwrap();
    let endpoints = nodes.iter().map(NodePlan::http_addr).collect::<Vec<_>>().join(",");
    let program = PathBuf::from(env!("CARGO_BIN_EXE_stemedb"));
    let mut cluster = LocalCluster::prepare_with(program.clone(), nodes).unwrap();
    cluster.start_all().unwrap();
    cluster.wait_ready(READY).await.unwrap();
    let follower = a_follower(&cluster).await;
    let alive = cluster.plan()[(follower + 1) % 3].http_addr();

    let batch = (records / 50).clamp(1, 2000).to_string();
    let mut import = tokio::process::Command::new(&program)
        .arg("import")
        .arg(&file)
        .args(["--id", "sample", "--json", "--batch", &batch, "--endpoints", &endpoints])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    // Killed a fifth into the import, restarted at half of it: conditions, not times.
    for (share, kill) in [(5, true), (2, false)] {
        while position(&alive).await < records / share && import.try_wait().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if kill {
            cluster.kill(follower).await.unwrap();
        } else {
            cluster.start(follower).unwrap();
        }
    }
    let output = import.wait_with_output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["position"], records, "{summary}");
    eprintln!("{summary}");
    cluster.wait_ready(READY).await.unwrap();

    // Once more: nothing to do.
    let again = Command::new(&program)
        .arg("import")
        .arg(&file)
        .args(["--id", "sample", "--json", "--endpoints", &endpoints])
        .output()
        .unwrap();
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((&again["imported"], &again["already_there"]), (&0.into(), &records.into()));

    let check = Command::new(&program)
        .arg("import-check")
        .arg(&file)
        .args(["--sample", "1000", "--json", "--endpoints", &endpoints])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!(report["equal"], true, "{report}");
    assert_eq!(report["nodes"].as_array().unwrap().len(), 3);
    assert_eq!(check.status.code(), Some(0));
    cluster.stop_all().await.unwrap();
}
