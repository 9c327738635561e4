//! `stemedb dev` with real nodes: up, used, killed, started again, and gone with its parent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stemedb::cli::drill_load::{self, Load};
use stemedb::cli::http_client::{Call, Client, Endpoint, HttpError};
use stemedb::cli::local_cluster::free_port;
use stemedb::judge;

/// Far above what anything here takes; only a hang ends a test by this.
const DEADLINE: Duration = Duration::from_secs(120);

/// For the nodes, which inherit them: on a slow machine neither elections by overload nor deadlines are wanted here.
const PATIENT: [(&str, &str); 4] = [
    ("STEMEDB_CLUSTER_HEARTBEAT_MS", "100"),
    ("STEMEDB_CLUSTER_ELECTION_MIN_MS", "600"),
    ("STEMEDB_CLUSTER_ELECTION_MAX_MS", "1200"),
    ("STEMEDB_CLUSTER_REQUEST_DEADLINE_MS", "60000"),
];

/// A running `stemedb dev --json`, killed when dropped.
struct Dev {
    child: Child,
    started: Value,
}

impl Dev {
    /// Blocks until all nodes are ready.
    fn start(data: &Path, nodes: usize, port: u16) -> Dev {
        let mut child = Command::new(env!("CARGO_BIN_EXE_stemedb"))
            .args(["dev", "--json", "--nodes", &nodes.to_string(), "--port", &port.to_string(), "--data"])
            .arg(data)
            .envs(PATIENT)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let started = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        Dev { child, started }
    }

    fn endpoint(&self, node: usize) -> Endpoint {
        Endpoint::parse(self.started["endpoints"][node].as_str().unwrap()).unwrap()
    }

    fn client(&self, node: usize) -> Client {
        Client::new(self.endpoint(node))
    }

    fn pid(&self, node: usize) -> Pid {
        pid(self.started["nodes"][node]["pid"].as_i64().unwrap())
    }

    fn pids(&self) -> Vec<Pid> {
        (0..self.started["nodes"].as_array().unwrap().len()).map(|node| self.pid(node)).collect()
    }

    fn signal(&self, signal: Signal) {
        kill_process(pid(i64::from(self.child.id())), signal).unwrap();
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _already_gone = self.child.kill();
        let _collected = self.child.wait();
    }
}

fn pid(number: i64) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap()).unwrap()
}

async fn write(client: &mut Client, number: u64) -> Value {
    let body = json!({"concept_path": "test/dev", "predicate": "number", "value": number}).to_string();
    let answer = client.call(&Call::post("/v1/assert", body), DEADLINE).await.unwrap();
    assert_eq!(answer.status, 201, "{}", answer.describe());
    answer.json().unwrap()
}

async fn numbers(client: &mut Client) -> Vec<u64> {
    let path = "/v1/query?concept_path=test/dev&resolve=all&limit=1000";
    let page: Value = client.get_json(path, DEADLINE).await.unwrap();
    let mut numbers: Vec<u64> =
        page["assertions"].as_array().unwrap().iter().map(|fact| fact["value"].as_u64().unwrap()).collect();
    numbers.sort_unstable();
    numbers
}

/// A process that has ended and that nobody has collected yet (its parent may be gone) does not run. Its first thread
/// may be a zombie while another is still on its way out of a system call: until that one is gone too, so are none of
/// its sockets and files.
fn is_running(pid: Pid) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())) else { return false };
    threads.flatten().any(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat"));
        // The state is the first field after the name, which is in parentheses.
        stat.is_ok_and(|stat| stat.rsplit(") ").next().is_some_and(|rest| !rest.starts_with(['Z', 'X'])))
    })
}

/// Waits until none of the processes is left.
async fn all_gone(pids: &[Pid]) {
    let waiting = async {
        while pids.iter().any(|pid| is_running(*pid)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.expect("the nodes are still there");
}

#[tokio::test]
async fn three_nodes_come_up_serve_stop_and_come_back_with_their_data() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port(3).unwrap();
    let mut dev = Dev::start(dir.path(), 3, port);
    for number in 0..3 {
        let node = usize::try_from(number).unwrap();
        write(&mut dev.client(node), number).await;
    }
    for node in 0..3 {
        assert_eq!(numbers(&mut dev.client(node)).await, [0, 1, 2]);
        let folder = dir.path().join(format!("node-{}", node + 1));
        for name in ["api.toml", "pid", "wal", "kv", "log"] {
            assert!(folder.join(name).exists(), "{name}");
        }
    }
    let endpoints: Vec<&str> =
        dev.started["endpoints"].as_array().unwrap().iter().map(|endpoint| endpoint.as_str().unwrap()).collect();
    let status = Command::new(env!("CARGO_BIN_EXE_stemedb"))
        .args(["status", "--json", "--endpoints", &endpoints.join(",")])
        .output()
        .unwrap();
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["healthy"], true, "{status}");
    assert_eq!(status["nodes"].as_array().unwrap().len(), 3, "{status}");
    let pids = dev.pids();
    dev.signal(Signal::TERM);
    assert!(dev.child.wait().unwrap().success());
    all_gone(&pids).await;
    for node in 1..=3 {
        let left = dir.path().join(format!("node-{node}/pid"));
        assert!(!left.exists(), "a clean stop removes {}", left.display());
    }
    let dev = Dev::start(dir.path(), 3, port);
    for node in 0..3 {
        assert_eq!(numbers(&mut dev.client(node)).await, [0, 1, 2]);
    }
}

#[tokio::test]
async fn kill_9_of_dev_ends_its_nodes_and_kill_9_of_all_nodes_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port(3).unwrap();
    let mut dev = Dev::start(dir.path(), 3, port);
    for number in 0..50 {
        let node = usize::try_from(number % 3).unwrap();
        write(&mut dev.client(node), number).await;
    }
    let pids = dev.pids();
    for pid in &pids {
        kill_process(*pid, Signal::KILL).unwrap();
    }
    // With no node left, dev ends by itself and says so with its exit code.
    assert_eq!(dev.child.wait().unwrap().code(), Some(5));
    let mut dev = Dev::start(dir.path(), 3, port);
    let expected: Vec<u64> = (0..50).collect();
    for node in 0..3 {
        assert_eq!(numbers(&mut dev.client(node)).await, expected);
    }
    let pids = dev.pids();
    dev.signal(Signal::KILL);
    dev.child.wait().unwrap();
    all_gone(&pids).await;
    let dev = Dev::start(dir.path(), 3, port);
    assert_eq!(numbers(&mut dev.client(1)).await, expected);
}

/// Waits until the load has `more` acknowledgements than now.
async fn acknowledged_more(load: &Load, more: u64) {
    let wanted = load.recorder.acknowledged() + more;
    let waiting = async {
        while load.recorder.acknowledged() < wanted {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.expect("the clients are served");
}

/// Every client repeats its write under its key until the cluster is back, so that no write stays unknown; then the
/// judge compares what was acknowledged, before and after, with what each node holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_of_all_nodes_during_writes_keeps_everything_acknowledged() {
    let full = std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1");
    let (rounds, clients, writes) = if full { (10, 64, 5000) } else { (2, 16, 300) };
    println!("kill -9 of all nodes: {rounds} rounds, {clients} clients (10 and 64 with STEMEDB_TEST_FULL=1)");
    let dir = tempfile::tempdir().unwrap();
    let port = free_port(3).unwrap();
    let mut dev = Dev::start(dir.path(), 3, port);
    let load = Load::new((0..3).map(|node| dev.endpoint(node)).collect(), 128, rand::random());
    let working: Vec<_> =
        (0..clients).map(|number| tokio::spawn(drill_load::client(Arc::clone(&load), number))).collect();
    for _ in 0..rounds {
        acknowledged_more(&load, writes).await;
        for pid in dev.pids() {
            kill_process(pid, Signal::KILL).unwrap();
        }
        assert_eq!(dev.child.wait().unwrap().code(), Some(5));
        dev = Dev::start(dir.path(), 3, port);
    }
    acknowledged_more(&load, writes).await;
    load.stop();
    for client in working {
        client.await.unwrap().unwrap();
    }
    let mut nodes = Vec::new();
    for node in 0..3 {
        nodes.push(drill_load::list_node(&load, node).await.unwrap());
    }
    let verdict = judge::check(&load.recorder.history(), &nodes);
    println!("{verdict}");
    assert!(verdict.is_clean(), "{verdict}");
    assert!(verdict.acknowledged > rounds * writes, "{verdict}");
    assert_eq!((verdict.nodes, verdict.unknown), (3, 0), "{verdict}");
}

#[tokio::test]
async fn one_killed_node_is_not_restarted_and_can_be_restarted_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let dev = Dev::start(dir.path(), 3, free_port(3).unwrap());
    kill_process(dev.pid(2), Signal::KILL).unwrap();
    all_gone(&[dev.pid(2)]).await;
    write(&mut dev.client(0), 7).await;
    let refused = async {
        while !matches!(dev.client(2).call(&Call::get("/v1/health"), DEADLINE).await, Err(HttpError::NotSent(_))) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, refused).await.expect("nothing listens any more");
    let mut by_hand = Command::new(env!("CARGO_BIN_EXE_stemedb"))
        .args(["serve", "--config"])
        .arg(dir.path().join("node-3/api.toml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let ready = async {
        loop {
            match dev.client(2).call(&Call::get("/v1/health/ready"), DEADLINE).await {
                Ok(answer) if answer.is_success() => break,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    let ready = tokio::time::timeout(DEADLINE, ready).await;
    let found = if ready.is_ok() { numbers(&mut dev.client(2)).await } else { Vec::new() };
    let _already_gone = by_hand.kill();
    by_hand.wait().unwrap();
    assert_eq!(found, [7]);
}

#[tokio::test]
async fn one_node_is_a_whole_database_and_five_work_too() {
    for nodes in [1, 5] {
        let dir = tempfile::tempdir().unwrap();
        let dev = Dev::start(dir.path(), nodes, free_port(nodes).unwrap());
        write(&mut dev.client(0), 1).await;
        assert_eq!(numbers(&mut dev.client(nodes - 1)).await, [1], "{nodes} nodes");
    }
}
