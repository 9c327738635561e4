//! Group commit, counted by the kernel: `strace` sees each fsync of the log, the metric says the same number, and at 64
//! clients there is fewer than one for ten writes on every node.
//!
//! How many writes wait for one sync is a matter of what is slower, the disk or everything else. An unoptimised build on
//! a busy machine is slower than a fast disk, so a fast run gives every sync the time that a busy spinning disk takes. The
//! full run, optimised, takes the disk as it is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use stemedb::cli::http_client::{Call, Client, Endpoint};
use stemedb::cli::local_cluster::{LocalCluster, NodePlan, free_port, plan};
use tokio::task::JoinSet;

/// Far above what any request takes; only a hang ends the test by this.
const DEADLINE: Duration = Duration::from_secs(120);
const CLIENTS: usize = 64;
const WRITES_EACH: usize = 60;

/// Longer than the slowest sync.
const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

/// What a sync takes at least in a fast run.
const SLOW_DISK: &str = "-e inject=fdatasync:delay_enter=100000";

/// Runs the program it is given under `strace`, which stands beside it: the process keeps its id. The kernel stops it at
/// these calls only, so that the rest runs at its own speed. Neither an election by overload nor a deadline is wanted here.
const WRAPPER: &str = r#"#!/bin/sh
export STEMEDB_CLUSTER_HEARTBEAT_MS=200 STEMEDB_CLUSTER_ELECTION_MIN_MS=4000 STEMEDB_CLUSTER_ELECTION_MAX_MS=8000
export STEMEDB_CLUSTER_REQUEST_DEADLINE_MS=60000
exec strace -D -f --seccomp-bpf -y -e trace=fdatasync,fsync DELAY -o "TRACES/$$" "PROGRAM" "$@"
"#;

/// Why nothing can be traced here, if so.
fn why_not() -> Option<String> {
    let tried = Command::new("strace").args(["-f", "--seccomp-bpf", "-e", "trace=fsync", "true"]).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("strace does not work here: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Some(format!("strace cannot be run: {error}")),
    }
}

/// An executable that is `stemedb` under `strace`; the trace of process N is `dir/N`.
fn traced_program(dir: &Path) -> PathBuf {
    let script = WRAPPER.replace("TRACES", dir.to_str().unwrap()).replace("PROGRAM", env!("CARGO_BIN_EXE_stemedb"));
    let full = std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1");
    let script = script.replace("DELAY", if full { "" } else { SLOW_DISK });
    let path = dir.join("traced");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Fsyncs begun on the log's own files. Its folder and the spare segment, which is no part of the log until it is
/// renamed, do not count.
fn log_fsyncs(trace: &Path) -> usize {
    let text = std::fs::read_to_string(trace).unwrap();
    text.lines().filter(|line| is_log_fsync(line)).count()
}

/// `123 fdatasync(9</data/wal/segment.001.wal>) = 0`, or its first half when two threads interleave.
fn is_log_fsync(line: &str) -> bool {
    let call = ["fdatasync(", "fsync("].iter().find_map(|call| line.split_once(call));
    let file = call.and_then(|(_, rest)| rest.split_once('<')).and_then(|(_, rest)| rest.split_once('>'));
    let name = file.and_then(|(path, _)| path.rsplit('/').next()).unwrap_or_default();
    name.starts_with("segment.") && name.ends_with(".wal") || name.starts_with("hard-state.")
}

#[test]
fn only_the_logs_own_files_count() {
    for (line, counts) in [
        ("7 fdatasync(9</d/wal/segment.001.wal>) = 0", true),
        ("7 fdatasync(9</d/wal/segment.001.wal> <unfinished ...>", true),
        ("7 <... fdatasync resumed>) = 0", false),
        ("7 fsync(9</d/wal/hard-state.2>) = 0", true),
        ("7 fdatasync(9</d/wal/segment.spare>) = 0", false),
        ("7 fsync(9</d/wal>) = 0", false),
        ("7 fsync(9</d/kv/g1/tables/3>) = 0", false),
    ] {
        assert_eq!(is_log_fsync(line), counts, "{line}");
    }
}

async fn fsync_metric(endpoint: &Endpoint) -> usize {
    let answer = Client::new(endpoint.clone()).call(&Call::get("/metrics"), DEADLINE).await.unwrap();
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix("stemedb_wal_fsync_total "));
    value.expect("the metric is there").parse().unwrap()
}

/// Kernel's count and metric of a log that has come to rest. A sync is in the trace a moment before the metric counts
/// it, so a pair counts only when a second look finds the same.
async fn counts_at_rest(trace: &Path, endpoint: &Endpoint) -> (usize, usize) {
    let mut last = None;
    loop {
        let pair = (log_fsyncs(trace), fsync_metric(endpoint).await);
        if last.replace(pair) == Some(pair) {
            return pair;
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
}

async fn write_all(endpoints: &[Endpoint]) {
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let mut client = Client::new(endpoints[number % endpoints.len()].clone());
        clients.spawn(async move {
            for write in 0..WRITES_EACH {
                let body = format!(r#"{{"concept_path":"fsync/{number}","predicate":"n","value":{write}}}"#);
                let answer = client.call(&Call::post("/v1/assert", body), DEADLINE).await.unwrap();
                assert_eq!(answer.status, 201, "{}", answer.describe());
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_64_clients_there_is_less_than_one_fsync_for_ten_writes_and_the_metric_counts_them_all() {
    if let Some(why) = why_not() {
        println!("SKIPPED: {why}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = traced_program(dir.path());
    let nodes = plan(&dir.path().join("data"), 3, free_port(3).unwrap()).unwrap();
    let endpoints: Vec<Endpoint> = nodes.iter().map(|node: &NodePlan| node.endpoint().unwrap()).collect();
    let mut cluster = LocalCluster::prepare_with(program, nodes).unwrap();
    cluster.start_all().unwrap();
    cluster.wait_ready(DEADLINE).await.unwrap();
    let traces: Vec<PathBuf> = (0..3).map(|node| dir.path().join(cluster.pid(node).unwrap().to_string())).collect();
    let mut before = Vec::new();
    for (trace, endpoint) in traces.iter().zip(&endpoints) {
        before.push(counts_at_rest(trace, endpoint).await);
    }
    write_all(&endpoints).await;
    // A linearizable read waits until its node has applied everything.
    for endpoint in &endpoints {
        let read = Call::get("/v1/query?concept_path=fsync/0");
        assert!(Client::new(endpoint.clone()).call(&read, DEADLINE).await.unwrap().is_success());
    }
    let writes = CLIENTS * WRITES_EACH;
    for (node, (trace, endpoint)) in traces.iter().zip(&endpoints).enumerate() {
        let (kernel_before, metric_before) = before[node];
        let (kernel, metric) = counts_at_rest(trace, endpoint).await;
        let (kernel, metric) = (kernel - kernel_before, metric - metric_before);
        println!("node-{}: {kernel} fsyncs for {writes} writes of {CLIENTS} clients", node + 1);
        assert_eq!(kernel, metric, "the kernel's count and the metric of node-{}", node + 1);
        assert!(kernel > 0, "every write is synced");
        assert!(kernel * 10 < writes, "node-{}: {kernel} fsyncs for {writes} writes", node + 1);
    }
    cluster.stop_all().await.unwrap();
}
