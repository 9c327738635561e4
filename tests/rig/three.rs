//! Three server processes on this machine, with a ledger of what they acknowledged; and others that may join them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use stemedb::cli::http_client::{Call, Client};
use stemedb::cli::local_cluster::{LocalCluster, free_port, plan};
use stemedb_raft::scan::scan_segment;

use super::HANG;

/// Writes and questions that repeat while nobody leads.
const PAUSE: Duration = Duration::from_millis(20);

pub struct Three {
    pub processes: LocalCluster,
    /// The numbers that were acknowledged.
    pub acknowledged: BTreeSet<u64>,
    fills: u64,
    dir: tempfile::TempDir,
}

impl Three {
    /// Three nodes that are ready.
    pub async fn start() -> Self {
        Self::prepared(0, &[]).await
    }

    /// The same, and so many nodes that are not running and no members: their configuration lists all.
    pub async fn with_spares(spares: usize) -> Self {
        Self::prepared(spares, &[]).await
    }

    /// The three with further variables of their environment: of which node, name and value.
    pub async fn with_env(env: &[(usize, &str, &str)]) -> Self {
        Self::prepared(0, env).await
    }

    async fn prepared(spares: usize, env: &[(usize, &str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let count = 3 + spares;
        let mut nodes = plan(&dir.path().join("data"), count, free_port(count).unwrap()).unwrap();
        for node in &mut nodes {
            node.log = dir.path().join(format!("{}.log", node.name));
        }
        let program = PathBuf::from(env!("CARGO_BIN_EXE_stemedb"));
        let mut processes = LocalCluster::prepare_with(program, nodes).unwrap();
        for (i, node) in processes.plan().iter().enumerate() {
            let text = std::fs::read_to_string(node.config_file()).unwrap();
            let text = if i < 3 { listing_three(&text, count) } else { text };
            std::fs::write(node.config_file(), tuned(&text)).unwrap();
        }
        for i in 0..count {
            processes.set_node_env(i, "STEMEDB_TEST_FAIL_FILE", fail_file(dir.path(), i));
        }
        for (node, name, value) in env {
            processes.set_node_env(*node, name, *value);
        }
        for i in 0..3 {
            processes.start(i).unwrap();
        }
        processes.wait_ready(HANG).await.unwrap();
        Self { processes, acknowledged: BTreeSet::new(), fills: 0, dir }
    }

    /// Large writes so far.
    pub fn fills(&self) -> u64 {
        self.fills
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The data folder of a node.
    pub fn folder(&self, i: usize) -> &Path {
        &self.processes.plan()[i].dir
    }

    pub fn client(&self, i: usize) -> Client {
        Client::new(self.processes.plan()[i].endpoint().unwrap())
    }

    /// Lets the process end when it passes `point`, see `stemedb_raft::fail_point`.
    pub fn arm(&self, i: usize, point: &str) {
        // Renamed into place: a point that is read in the middle is none.
        let new = self.dir().join(format!("fail-{i}.new"));
        std::fs::write(&new, point).unwrap();
        std::fs::rename(new, fail_file(self.dir(), i)).unwrap();
    }

    pub fn disarm(&self, i: usize) {
        std::fs::remove_file(fail_file(self.dir(), i)).unwrap();
    }

    /// The file that arms a node.
    pub fn fail_file(&self, i: usize) -> PathBuf {
        fail_file(self.dir(), i)
    }

    /// `/v1/health` of a node that answers.
    pub async fn health(&self, i: usize) -> Option<Value> {
        self.client(i).get_json("/v1/health", HANG).await.ok()
    }

    pub async fn until(&self, what: &str, mut condition: impl AsyncFnMut(&Self) -> bool) {
        let wait = async {
            while !condition(self).await {
                tokio::time::sleep(PAUSE).await;
            }
        };
        if tokio::time::timeout(HANG, wait).await.is_err() {
            for i in 0..self.processes.plan().len() {
                println!("{:?}\n{}", self.health(i).await, self.log_tail(i));
            }
            panic!("waited in vain: {what}");
        }
    }

    pub fn log(&self, i: usize) -> String {
        std::fs::read_to_string(self.processes.plan()[i].log_file()).unwrap_or_default()
    }

    fn log_tail(&self, i: usize) -> String {
        let log = self.log(i);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Writes the next number through a node, under one key until it is acknowledged.
    pub async fn write(&mut self, through: usize) {
        let number = self.acknowledged.last().map_or(0, |last| last + 1);
        let body = json!({"concept_path": "test/numbers", "predicate": "number", "value": number}).to_string();
        let call = Call::post("/v1/assert", body).idempotency_key(&format!("number-{number}")).unwrap();
        let mut client = self.client(through);
        self.until("a write", async |_| client.call(&call, HANG).await.is_ok_and(|answer| answer.is_success())).await;
        self.acknowledged.insert(number);
    }

    /// Writes a large value through a node; nobody looks at it.
    pub async fn fill(&mut self, through: usize, bytes: usize) {
        self.fills += 1;
        let (predicate, text) = (self.fills.to_string(), "x".repeat(bytes));
        let body = json!({"concept_path": "test/fill", "predicate": predicate, "value": text}).to_string();
        let call = Call::post("/v1/assert", body).idempotency_key(&format!("fill-{predicate}")).unwrap();
        let mut client = self.client(through);
        self.until("a large write", async |_| client.call(&call, HANG).await.is_ok_and(|a| a.is_success())).await;
    }

    /// All that a node shows to a linearizable read.
    pub async fn numbers(&self, node: usize) -> BTreeSet<u64> {
        let first = "/v1/query?concept_path=test/numbers&resolve=all&limit=1000";
        let (mut path, mut found) = (first.to_owned(), BTreeSet::new());
        let mut client = self.client(node);
        loop {
            let mut page = Value::Null;
            self.until("a read", async |_| {
                let answer: Result<Value, _> = client.get_json(&path, HANG).await;
                answer.map(|value| page = value).is_ok()
            })
            .await;
            found.extend(page["assertions"].as_array().unwrap().iter().filter_map(|fact| fact["value"].as_u64()));
            match page["cursor"].as_str() {
                Some(cursor) => path = format!("{first}&cursor={cursor}"),
                None => return found,
            }
        }
    }

    /// Every node shows all that was acknowledged, and nothing else.
    pub async fn assert_all_there(&self, what: &str) {
        for node in 0..3 {
            assert_eq!(self.numbers(node).await, self.acknowledged, "{what}: node {node}");
        }
    }

    pub async fn ready(&mut self) {
        self.processes.wait_ready(HANG).await.unwrap();
    }

    /// The segments of a node's log, the oldest first.
    pub fn segments(&self, i: usize) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.folder(i).join("wal")).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|ext| ext == "wal")).collect();
        files.sort();
        files
    }

    /// Flips a bit in the payload of entries of a node that is down; how many.
    pub fn damage(&self, i: usize, which: impl Fn(u64) -> bool) -> usize {
        let mut damaged = 0;
        for file in self.segments(i) {
            let mut bytes = std::fs::read(&file).unwrap();
            let Ok(scan) = scan_segment(&bytes) else { continue };
            for found in &scan.entries {
                let Some(located) = found.located.filter(|l| l.payload_bytes > 0 && which(found.index)) else {
                    continue;
                };
                bytes[located.offset as usize + FRAME_HEADER_BYTES] ^= 1;
                damaged += 1;
            }
            std::fs::write(&file, bytes).unwrap();
        }
        damaged
    }
}

/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 72;

fn fail_file(dir: &Path, i: usize) -> PathBuf {
    dir.join(format!("fail-{i}"))
}

/// The configuration of a member that knows of no others than the first three.
fn listing_three(text: &str, count: usize) -> String {
    const PEER: &str = "\n[[cluster.peers]]";
    let kept: Vec<&str> = text.split(PEER).take(1 + 3).collect();
    kept.join(PEER).replacen(&format!("bootstrap_expect = {count}"), "bootstrap_expect = 3", 1)
}

/// Small files, and clocks for a machine on which other tests run.
fn tuned(text: &str) -> String {
    let cluster = "\nheartbeat_ms = 100\nelection_min_ms = 600\nelection_max_ms = 1200\nrequest_deadline_ms = 30000\n\
                   stall_handoff_ms = 60000\nstall_fence_ms = 600000\nbootstrap_expect";
    let storage = "\n[wal]\nsegment_size_mb = 1\nretain_mb = 16\n\n[storage]\nmemtable_mb = 1\n";
    let text = text.replacen("\nbootstrap_expect", cluster, 1).replacen("\n[storage]\n", storage, 1);
    text.replacen("ballast_mb = 16", "ballast_mb = 0", 1)
}
