//! Whole nodes whose logs were damaged while they were down: they ask the others before Raft starts, say so while they
//! wait, answer such questions meanwhile, and come back with everything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{path::Path, sync::Arc, time::Duration};

use stemedb::{
    config::{Config, PeerEntry},
    metrics::Metrics,
    model::NewAssertion,
    node::{Consistency, Ground, Node, StartError},
    state::command::{CommandKey, KeySource, Operation, Outcome},
};
use stemedb_raft::{disk::sim::SimDisk, scan::scan_segment};
use tokio::net::TcpListener;
use uuid::Uuid;

/// Far above what any condition needs; only a hang ends a test by this.
const HANG: Duration = Duration::from_secs(120);

struct Cluster {
    dir: tempfile::TempDir,
    peers: Vec<PeerEntry>,
    disks: Vec<SimDisk>,
}

impl Cluster {
    async fn new(size: usize) -> (Cluster, Vec<Arc<Node>>) {
        let disks = (0..size).map(|_| SimDisk::new()).collect();
        let mut cluster = Cluster { dir: tempfile::tempdir().unwrap(), peers: vec![], disks };
        let mut listeners = Vec::new();
        for i in 0..size {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap().to_string();
            cluster.peers.push(PeerEntry { name: format!("node-{}", i + 1), addr, http: String::new() });
            listeners.push(listener);
        }
        let mut nodes = Vec::new();
        for (i, listener) in listeners.into_iter().enumerate() {
            nodes.push(cluster.start_on(i, listener).await.unwrap());
        }
        (cluster, nodes)
    }

    async fn start_on(&self, i: usize, listener: TcpListener) -> Result<Arc<Node>, StartError> {
        let mut config = Config::default();
        // A test needs no reserve for a full disk, and there are many nodes at once.
        config.storage.ballast_mb = 0;
        // A busy machine is not a hanging disk.
        (config.cluster.stall_handoff_ms, config.cluster.stall_fence_ms) = (60_000, 600_000);
        config.node.name = self.peers[i].name.clone();
        config.node.data_dir = self.dir.path().join(&self.peers[i].name);
        config.cluster.peers = self.peers.clone();
        config.cluster.bootstrap_expect = u32::try_from(self.peers.len()).unwrap();
        config.wal.segment_size_mb = 1;
        config.wal.retain_mb = 1;
        // Two cores run three nodes and other tests: elections by overload are not what is tested here.
        config.cluster.heartbeat_ms = 100;
        config.cluster.election_min_ms = 600;
        config.cluster.election_max_ms = 1_200;
        let ground = Ground { peer_listener: Some(listener), disk: self.disks[i].shared(), ..Ground::default() };
        Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await
    }

    async fn restart(&self, i: usize) -> Result<Arc<Node>, StartError> {
        let listener = TcpListener::bind(&self.peers[i].addr).await.unwrap();
        self.start_on(i, listener).await
    }

    /// Damages every entry's payload in the log of a node that is down, or only the given ones.
    fn damage(&self, i: usize, which: impl Fn(u64) -> bool) -> u64 {
        let dir = self.dir.path().join(&self.peers[i].name).join("wal");
        let mut damaged = 0;
        for file in self.disks[i].shared().list(&dir).unwrap() {
            if !file.name.ends_with(".wal") {
                continue;
            }
            let damage = |bytes: &mut Vec<u8>| {
                let scan = scan_segment(bytes).unwrap();
                for found in scan.entries.iter().filter(|f| f.located.unwrap().payload_bytes > 0 && which(f.index)) {
                    bytes[found.offset.unwrap() as usize + 72] ^= 1;
                    damaged += 1;
                }
            };
            self.disks[i].corrupt(&dir.join(&file.name), damage).unwrap();
        }
        damaged
    }
}

impl Cluster {
    /// The log index of the last entry of a node that is down.
    fn newest(&self, i: usize) -> u64 {
        let dir = self.dir.path().join(&self.peers[i].name).join("wal");
        let files = self.disks[i].shared().list(&dir).unwrap().into_iter().filter(|file| file.name.ends_with(".wal"));
        let mut newest = 0;
        for file in files {
            let note = |bytes: &mut Vec<u8>| {
                newest = scan_segment(bytes).unwrap().entries.iter().map(|f| f.index).max().unwrap_or(0).max(newest);
            };
            self.disks[i].corrupt(&dir.join(&file.name), note).unwrap();
        }
        newest
    }
}

async fn until_or(condition: impl AsyncFn() -> bool) -> bool {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, wait).await.is_ok()
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    assert!(until_or(condition).await, "waited in vain for {what}");
}

/// Waits until all are ready; what a node says instead is in the panic.
async fn all_ready(nodes: &[Arc<Node>]) {
    let ready = until_or(async || nodes.iter().all(|node| node.is_ready().is_ok())).await;
    let said = || nodes.iter().map(|node| (node.is_ready(), node.health())).collect::<Vec<_>>();
    assert!(ready, "{:#?}", said());
}

async fn write(node: &Node, n: u128) {
    write_value(node, n, n.to_string()).await;
}

async fn write_value(node: &Node, n: u128, value_json: String) {
    let assertion = NewAssertion {
        id: Uuid::from_u128(n),
        concept_path: "test/a".into(),
        predicate: "p".into(),
        value_json,
        source: None,
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
    };
    let key = Some(CommandKey { source: KeySource::Client, id: n });
    until("a write", async || {
        let written = node.submit(Operation::Assert(vec![assertion.clone()]), key, n).await;
        written.is_ok_and(|done| matches!(done.outcome.outcome, Outcome::Applied(_)))
    })
    .await;
}

/// Whether a node shows a write. A read that finds no leader is repeated: only an answer counts.
async fn has(node: &Node, n: u128) -> bool {
    let read = async {
        loop {
            match node.read(Consistency::Linearizable).await {
                Ok(view) => return view.assertion(Uuid::from_u128(n)).unwrap().is_some(),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    tokio::time::timeout(HANG, read).await.expect("a read is never answered")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_repaired_by_the_others_before_raft_starts() {
    let (cluster, mut nodes) = Cluster::new(3).await;
    all_ready(&nodes).await;
    for n in 1..=20 {
        write(&nodes[n as usize % 3], n).await;
    }
    let down = nodes.remove(0);
    down.shutdown().await;
    drop(down);
    assert!(cluster.damage(0, |_| true) > 3, "nothing was damaged");
    let back = cluster.restart(0).await.unwrap();
    all_ready(&[Arc::clone(&back)]).await;
    assert_eq!(back.health().status, "ok");
    for n in 1..=20 {
        assert!(has(&back, n).await, "write {n} is gone");
    }
    for node in nodes.into_iter().chain([back]) {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_nodes_wait_say_so_and_give_each_other_what_they_have() {
    let (cluster, nodes) = Cluster::new(3).await;
    all_ready(&nodes).await;
    for n in 1..=8 {
        write(&nodes[0], n).await;
    }
    for node in nodes {
        node.shutdown().await;
    }
    // Two nodes each lack what the other one has, and the third is not there.
    assert!(cluster.damage(0, |index| index % 2 == 0) > 0);
    assert!(cluster.damage(1, |index| index % 2 == 1) > 0);
    let first = cluster.restart(0).await.unwrap();
    until("a node that says that it waits", async || {
        let health = first.health();
        health.status == "repairing" && health.repairing.is_some_and(|why| why.contains("node-2"))
    })
    .await;
    assert!(first.is_ready().unwrap_err().contains("being repaired"));
    let second = cluster.restart(1).await.unwrap();
    all_ready(&[Arc::clone(&first), Arc::clone(&second)]).await;
    for n in 1..=8 {
        assert!(has(&first, n).await && has(&second, n).await, "write {n} is gone");
    }
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_refuses_and_names_the_command() {
    let (cluster, nodes) = Cluster::new(1).await;
    all_ready(&nodes).await;
    write(&nodes[0], 1).await;
    for node in nodes {
        node.shutdown().await;
    }
    // The first entry says who votes.
    assert!(cluster.damage(0, |index| index > 0) > 0);
    let Err(error) = cluster.restart(0).await else { panic!("it started") };
    let text = error.to_string();
    assert!(text.contains("stemedb-wal-repair --segment") && text.contains("may have been acknowledged"), "{text}");
    assert!(Path::new(&cluster.dir.path().join("node-1")).exists());
}

/// The entry that says who votes is long purged: the newest checkpoint says it too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purged_log_that_is_damaged_knows_who_votes() {
    let (cluster, nodes) = Cluster::new(3).await;
    all_ready(&nodes).await;
    let purged = async || {
        let members = nodes[0].cluster().await.members;
        members.iter().any(|m| m.name == "node-1" && m.purged_log_index.is_some_and(|index| index > 2))
    };
    let mut n = 0;
    while !purged().await {
        n += 1;
        write_value(&nodes[0], n, format!("\"{}\"", "x".repeat(200_000))).await;
    }
    write(&nodes[0], 10_000).await;
    for node in nodes {
        node.shutdown().await;
    }
    let last = cluster.newest(0);
    assert!(cluster.damage(0, |index| index + 2 >= last) > 0);
    let alone = cluster.restart(0).await.unwrap();
    until("a node that says for whom it waits", async || {
        alone.health().repairing.is_some_and(|why| why.contains("waiting for"))
    })
    .await;
    let why = alone.health().repairing.unwrap();
    assert!(!why.contains("who votes is not known"), "{why}");
    let mut others = Vec::new();
    for i in 1..3 {
        others.push(cluster.restart(i).await.unwrap());
    }
    all_ready(&[Arc::clone(&alone), Arc::clone(&others[0]), Arc::clone(&others[1])]).await;
    assert!(has(&alone, 10_000).await, "the last write is gone");
    for node in others.into_iter().chain([alone]) {
        node.shutdown().await;
    }
}
