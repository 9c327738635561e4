//! Real server processes on file systems that are really full: small tmpfs, which need root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod rig;

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rig::{HANG, SmallDisk};
use serde_json::{Value, json};
use stemedb::cli::http_client::{Answer, Call, Client};
use stemedb::cli::local_cluster::{LocalCluster, NodePlan, free_port, plan};
use tokio::time::Instant;

const MIB: u64 = 1024 * 1024;

/// Low water is a quarter of it, 12 MiB; the log and the tree of an empty node take less than 4.
const DISK_BYTES: u64 = 48 * MIB;
const INODES: u64 = 400;

/// One cluster at a time: nine processes on two cores are another test.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Lines of a node's log that a failed test shows.
const LOG_LINES: usize = 60;

struct Cluster {
    _alone: tokio::sync::MutexGuard<'static, ()>,
    nodes: Vec<NodePlan>,
    disks: Vec<SmallDisk>,
    _dir: tempfile::TempDir,
    local: LocalCluster,
}

impl Cluster {
    /// Starts three nodes, each on a disk of its own. `None` where nothing can be mounted.
    async fn start() -> Option<Cluster> {
        let alone = ALONE.lock().await;
        let dir = tempfile::tempdir().unwrap();
        let mut disks = Vec::new();
        for _ in 0..3 {
            disks.push(SmallDisk::new(DISK_BYTES, INODES)?);
        }
        let mut nodes = plan(dir.path(), 3, free_port(3).unwrap()).unwrap();
        for (node, disk) in nodes.iter_mut().zip(&disks) {
            node.dir = disk.path().to_owned();
            // What it prints lies on the same disk, as under `dev`.
            node.log = disk.path().join("log");
        }
        let local = LocalCluster::prepare_with(env!("CARGO_BIN_EXE_stemedb").into(), nodes.clone()).unwrap();
        for node in &nodes {
            let text = fs::read_to_string(node.config_file()).unwrap();
            let text = text.replace("[storage]\n", "[wal]\nsegment_size_mb = 1\n\n[storage]\nmemtable_mb = 1\n");
            // A slow machine is no fault: elections by overload are not what is tested, and every request is answered.
            let clocks =
                "heartbeat_ms = 100\nelection_min_ms = 800\nelection_max_ms = 1600\nrequest_deadline_ms = 60000\n";
            let text = text.replace("bootstrap_expect = 3\n", &format!("bootstrap_expect = 3\n{clocks}"));
            fs::write(node.config_file(), text).unwrap();
        }
        let mut cluster = Cluster { _alone: alone, nodes, disks, _dir: dir, local };
        cluster.up().await;
        Some(cluster)
    }

    async fn up(&mut self) {
        self.local.start_all().unwrap();
        self.local.wait_ready(HANG).await.unwrap();
    }

    async fn kill_all(&mut self) {
        for node in 0..self.nodes.len() {
            self.local.kill(node).await.unwrap();
        }
    }

    fn client(&self, node: usize) -> Client {
        Client::new(self.nodes[node].endpoint().unwrap())
    }

    async fn health(&self, node: usize) -> Value {
        self.client(node).get_json("/v1/health", HANG).await.unwrap()
    }

    async fn figure(&self, node: usize, name: &str) -> f64 {
        let answer = self.client(node).call(&Call::get("/metrics"), HANG).await.unwrap();
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    async fn disk_state(&self, node: usize) -> String {
        self.health(node).await["disk"]["state"].as_str().unwrap().to_owned()
    }

    async fn leader(&self) -> usize {
        loop {
            for node in 0..3 {
                if self.health(node).await["role"] == "leader" {
                    return node;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn until_state(&self, node: usize, state: &str) {
        let wait = async {
            while self.disk_state(node).await != state {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(HANG, wait).await.unwrap_or_else(|_| panic!("node {node} never says {state}"));
    }

    fn leave_bytes(&self, node: usize, bytes: u64) {
        self.disks[node].leave_bytes(bytes);
    }

    /// Takes the rest of the bytes and of the inodes.
    fn leave_nothing(&self, node: usize) {
        self.disks[node].leave_no_inode();
        // A log line may take the last page meanwhile.
        self.disks[node].leave_bytes(0);
        let stat = rustix::fs::statvfs(self.disks[node].path()).unwrap();
        assert_eq!((stat.f_bavail, stat.f_ffree), (0, 0));
    }

    fn free(&self, node: usize) {
        self.disks[node].free();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in self.nodes.iter().filter(|_| std::thread::panicking()) {
            let log = fs::read_to_string(node.log_file()).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("{}:\n{}", node.name, lines[lines.len().saturating_sub(LOG_LINES)..].join("\n"));
        }
    }
}

async fn post(client: &mut Client, path: &str, body: Value, key: &str) -> Answer {
    client.call(&Call::post(path, body.to_string()).idempotency_key(key).unwrap(), HANG).await.unwrap()
}

async fn write(client: &mut Client, number: u64) -> Answer {
    let body = json!({"concept_path": "test/full", "predicate": "number", "value": number});
    post(client, "/v1/assert", body, &format!("key-{number}")).await
}

/// Until it is taken it is refused for want of room, and for nothing else.
async fn write_when_there_is_room(client: &mut Client, number: u64) {
    let wait = async {
        loop {
            let answer = write(client, number).await;
            if answer.status == 201 {
                return;
            }
            assert_full(&answer);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, wait).await.expect("writes go on by themselves");
}

async fn numbers(client: &mut Client) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let mut path = "/v1/query?concept_path=test/full&resolve=all&limit=1000".to_owned();
    loop {
        let page: Value = client.get_json(&path, HANG).await.unwrap();
        found.extend(page["assertions"].as_array().unwrap().iter().filter_map(|fact| fact["value"].as_u64()));
        match page["next_cursor"].as_str().or(page["cursor"].as_str()) {
            Some(cursor) => path = format!("/v1/query?concept_path=test/full&resolve=all&limit=1000&cursor={cursor}"),
            None => return found,
        }
    }
}

fn assert_full(answer: &Answer) -> Value {
    assert_eq!(answer.status, 507, "{}", answer.describe());
    let problem: Value = answer.json().unwrap();
    assert_eq!((&problem["type"], &problem["outcome"]), (&json!("/problems/disk-full"), &json!("not_applied")));
    assert!(problem["bytes_free"].is_u64() && problem["bytes_needed"].is_u64(), "{problem}");
    assert!(problem["nodes"][0]["next_command"].as_str().unwrap().starts_with("df -h /"), "{problem}");
    problem
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_full_disk_is_no_event_for_clients() {
    let Some(mut cluster) = Cluster::start().await else { return };
    let full = cluster.leader().await;
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..6_u64)
        .map(|number| {
            let mut client = cluster.client(usize::try_from(number % 3).unwrap());
            let (stop, written) = (Arc::clone(&stop), Arc::clone(&written));
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                let mut next = number * 100_000;
                while !stop.load(Ordering::Relaxed) {
                    let answer = write(&mut client, next).await;
                    assert_eq!(answer.status, 201, "{}", answer.describe());
                    acknowledged.push(next);
                    next += 1;
                    written.fetch_add(1, Ordering::Relaxed);
                }
                acknowledged
            })
        })
        .collect();
    let more = async || {
        let now = written.load(Ordering::Relaxed);
        let wait = async {
            while written.load(Ordering::Relaxed) < now + 200 {
                assert!(writers.iter().all(|writer| !writer.is_finished()), "a client met an error");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(HANG, wait).await.expect("clients are served");
    };
    more().await;
    cluster.leave_bytes(full, 0);
    cluster.until_state(full, "full").await;
    more().await;
    let next = cluster.leader().await;
    assert_ne!(next, full, "leadership stays where there is no room");
    let ready = cluster.client(full).call(&Call::get("/v1/health/ready"), HANG).await.unwrap();
    assert_eq!(ready.status, 200, "{}", ready.describe());
    cluster.free(full);
    cluster.until_state(full, "ok").await;
    more().await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = BTreeSet::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    for node in 0..3 {
        assert_eq!(numbers(&mut cluster.client(node)).await, acknowledged, "node {node}");
    }
    cluster.local.stop_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_all_disks_full_writes_get_507_reads_go_on_and_freed_space_ends_it() {
    let Some(mut cluster) = Cluster::start().await else { return };
    let mut acknowledged = BTreeSet::new();
    let mut first_id = Value::Null;
    for number in 0..30 {
        let answer = write(&mut cluster.client(usize::try_from(number % 3).unwrap()), number).await;
        assert_eq!(answer.status, 201, "{}", answer.describe());
        first_id = answer.json::<Value>().unwrap()["id"].clone();
        acknowledged.insert(number);
    }
    // Some segments of log, which no replica needs.
    for number in 0..40 {
        let body = json!({"concept_path": "test/bulk", "predicate": "p", "value": "x".repeat(100_000)});
        let answer = post(&mut cluster.client(0), "/v1/assert", body, &format!("bulk-{number}")).await;
        assert_eq!(answer.status, 201, "{}", answer.describe());
    }
    for node in 0..3 {
        assert!(cluster.figure(node, "stemedb_wal_segments").await > 3.0);
        cluster.leave_bytes(node, 9 * MIB);
    }
    for node in 0..3 {
        cluster.until_state(node, "full").await;
    }
    let mut refused = BTreeSet::new();
    // What comes before the leader has the word of the others fits into its reserve.
    for number in 500.. {
        let answer = write(&mut cluster.client(0), number).await;
        if answer.status == 507 {
            refused.insert(number);
            break;
        }
        assert_eq!(answer.status, 201, "{}", answer.describe());
        acknowledged.insert(number);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for node in 0..3 {
        let number = 1_000 + node as u64;
        let began = Instant::now();
        let answer = write(&mut cluster.client(node), number).await;
        println!("507 through node {} after {:?}", node + 1, began.elapsed());
        let problem = assert_full(&answer);
        assert!(problem["bytes_needed"].as_u64() > Some(0), "{problem}");
        // The leader names itself at once, the others with their next word.
        assert!(!problem["nodes"].as_array().unwrap().is_empty(), "{problem}");
        refused.insert(number);
        assert_eq!(numbers(&mut cluster.client(node)).await, acknowledged, "a linearizable read at node {node}");
        let low_water = cluster.figure(node, "stemedb_disk_low_water_bytes").await;
        assert!(cluster.figure(node, "stemedb_disk_free_bytes").await < low_water * 1.5);
        assert!(cluster.figure(node, "stemedb_disk_free_inodes").await > 0.0);
        // The log shrinks by itself, long before it would with room.
        let purged = async {
            while cluster.figure(node, "stemedb_wal_segments").await > 2.0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(HANG, purged).await.expect("checkpoints and purges go on");
    }
    let retraction = json!({"old": first_id});
    let answer = post(&mut cluster.client(0), "/v1/supersede", retraction, "retract").await;
    assert_eq!(answer.status, 201, "{}", answer.describe());

    // Down to nothing at all.
    for node in 0..3 {
        cluster.leave_bytes(node, 4096);
        cluster.leave_nothing(node);
    }
    for number in 2_000..2_010 {
        let answer = write(&mut cluster.client(usize::try_from(number % 3).unwrap()), number).await;
        assert_full(&answer);
        refused.insert(number);
    }
    for node in 0..3 {
        assert_eq!(numbers(&mut cluster.client(node)).await, acknowledged, "a linearizable read at node {node}");
    }
    // Also without the leader, and with nobody left who has room.
    let leader = cluster.leader().await;
    cluster.local.kill(leader).await.unwrap();
    for node in (0..3).filter(|node| *node != leader) {
        assert_eq!(numbers(&mut cluster.client(node)).await, acknowledged, "node {node} without {leader}");
    }
    cluster.up().await;
    for node in 0..3 {
        cluster.free(node);
    }
    let freed = Instant::now();
    for node in 0..3 {
        let number = 3_000 + node as u64;
        write_when_there_is_room(&mut cluster.client(node), number).await;
        println!("written through node {} {:?} after the space was freed", node + 1, freed.elapsed());
        acknowledged.insert(number);
    }
    for node in 0..3 {
        let found = numbers(&mut cluster.client(node)).await;
        assert!(found.is_disjoint(&refused), "a refused write appears: {found:?}");
        assert_eq!(found, acknowledged);
    }
    cluster.local.stop_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_start_again_and_again_with_neither_bytes_nor_inodes() {
    let Some(mut cluster) = Cluster::start().await else { return };
    let expected: BTreeSet<u64> = (0..50).collect();
    for number in 0..50 {
        let answer = write(&mut cluster.client(usize::try_from(number % 3).unwrap()), number).await;
        assert_eq!(answer.status, 201, "{}", answer.describe());
    }
    // The ballast is made in the background, some seconds after the start.
    let ballasts: Vec<_> = cluster.disks.iter().map(|disk| disk.path().join("ballast")).collect();
    let wait = async {
        while !ballasts.iter().all(|ballast| ballast.exists()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(HANG, wait).await.expect("a ballast");
    for round in 0..3 {
        if round == 1 {
            cluster.local.stop_all().await.unwrap();
        } else {
            cluster.kill_all().await;
        }
        for node in 0..3 {
            cluster.leave_bytes(node, 4096);
            cluster.leave_nothing(node);
        }
        cluster.up().await;
        assert!(ballasts.iter().all(|ballast| !ballast.exists()), "the ballast is let go");
        for node in 0..3 {
            assert_eq!(numbers(&mut cluster.client(node)).await, expected, "round {round}, node {node}");
            assert_eq!(cluster.disk_state(node).await, "full");
        }
        assert_full(&write(&mut cluster.client(0), 1_000 + round).await);
        println!("round {round}: started with 0 bytes and 0 inodes");
    }
    let logs: Vec<String> = cluster.nodes.iter().map(|node| fs::read_to_string(node.log_file()).unwrap()).collect();
    assert!(logs.iter().all(|log| log.contains("no space left below") && log.contains("the ballast of")));
    for node in 0..3 {
        cluster.free(node);
    }
    for node in 0..3 {
        cluster.until_state(node, "ok").await;
    }
    write_when_there_is_room(&mut cluster.client(1), 50).await;
    let expected = (0..51).collect();
    for node in 0..3 {
        assert_eq!(numbers(&mut cluster.client(node)).await, expected, "no refused write appears");
    }
    cluster.local.stop_all().await.unwrap();
}
