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
        config.node.name = self.peers[i].name.clone();
        config.node.data_dir = self.dir.path().join(&self.peers[i].name);
        config.cluster.peers = self.peers.clone();
        config.cluster.bootstrap_expect = u32::try_from(self.peers.len()).unwrap();
        config.wal.segment_size_mb = 1;
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

    /// Damages every entry's payload in the first segment of a node that is down, or only the given one.
    fn damage(&self, i: usize, which: impl Fn(u64) -> bool) -> u64 {
        let dir = self.dir.path().join(&self.peers[i].name).join("wal");
        let mut damaged = 0;
        self.disks[i]
            .corrupt(&dir.join("segment.001.wal"), |bytes| {
                let scan = scan_segment(bytes).unwrap();
                for found in scan.entries.iter().filter(|f| f.located.unwrap().payload_bytes > 0 && which(f.index)) {
                    bytes[found.offset.unwrap() as usize + 72] ^= 1;
                    damaged += 1;
                }
            })
            .unwrap();
        damaged
    }
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, wait).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

async fn all_ready(nodes: &[Arc<Node>]) {
    until("readiness", async || nodes.iter().all(|node| node.is_ready().is_ok())).await;
}

async fn write(node: &Node, n: u128) {
    let assertion = NewAssertion {
        id: Uuid::from_u128(n),
        concept_path: "test/a".into(),
        predicate: "p".into(),
        value_json: n.to_string(),
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

async fn has(node: &Node, n: u128) -> bool {
    let Ok(view) = node.read(Consistency::Linearizable).await else { return false };
    view.assertion(Uuid::from_u128(n)).unwrap().is_some()
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
    until("the repaired node", async || back.is_ready().is_ok()).await;
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
