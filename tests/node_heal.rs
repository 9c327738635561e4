//! The log of a running node rots: its sealed segments are put right from the other nodes, under load, whoever finds
//! the damage. The scrubber does on a leader and on a follower, and a leader that sends old entries to a follower does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod cluster_rig;

use std::{
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use stemedb::{
    config::PeerEntry,
    metrics::Metrics,
    model::NewAssertion,
    node::{Consistency, Ground, Node},
    state::{
        command::{CommandKey, KeySource, Operation, Outcome},
        engine::scrub::{PassEnd, RealClock, Scrubber},
    },
};
use stemedb_raft::{disk::sim::SimDisk, index::segment_name, scan::scan_segment};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Far above what any condition needs; only a hang ends a test by this.
const HANG: Duration = Duration::from_secs(240);

/// Of each write that fills segments.
const LARGE_BYTES: usize = 50_000;

struct Cluster {
    dir: tempfile::TempDir,
    peers: Vec<PeerEntry>,
    disks: Vec<SimDisk>,
    nodes: Vec<Option<Arc<Node>>>,
}

impl Cluster {
    async fn start() -> Cluster {
        cluster_rig::log_if_wanted();
        let (peers, listeners) = cluster_rig::nodes(3).await;
        let disks = (0..3).map(|_| SimDisk::new()).collect();
        let mut cluster = Cluster { dir: tempfile::tempdir().unwrap(), peers, disks, nodes: vec![] };
        for (i, (listener, _)) in listeners.into_iter().enumerate() {
            let node = cluster.start_on(i, listener).await;
            cluster.nodes.push(Some(node));
        }
        cluster.all_ready().await;
        cluster
    }

    async fn start_on(&self, i: usize, listener: TcpListener) -> Arc<Node> {
        let mut config = cluster_rig::config(&self.peers, i, self.dir.path());
        // Passes are ordered here.
        config.storage.scrub_mb_per_s = 0;
        let ground = Ground { peer_listener: Some(listener), disk: self.disks[i].shared(), ..Ground::default() };
        Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await.unwrap()
    }

    async fn up(&mut self, i: usize) {
        let listener = TcpListener::bind(&self.peers[i].addr).await.unwrap();
        self.nodes[i] = Some(self.start_on(i, listener).await);
    }

    async fn down(&mut self, i: usize) {
        self.nodes[i].take().unwrap().shutdown().await;
    }

    /// With nothing of the log in memory afterwards.
    async fn restart(&mut self, i: usize) {
        self.down(i).await;
        self.up(i).await;
        self.all_ready().await;
    }

    fn node(&self, i: usize) -> &Arc<Node> {
        self.nodes[i].as_ref().unwrap()
    }

    async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let wait = async {
            while !condition().await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let healths = || self.nodes.iter().flatten().map(|n| format!("{:?}\n", n.health())).collect::<String>();
        tokio::time::timeout(HANG, wait).await.unwrap_or_else(|_| panic!("waited in vain for {what}\n{}", healths()));
    }

    async fn all_ready(&self) {
        self.until("readiness", async || self.nodes.iter().flatten().all(|node| node.is_ready().is_ok())).await;
    }

    async fn leader(&self) -> usize {
        let leads = |node: &Option<Arc<Node>>| node.as_ref().is_some_and(|node| node.is_leader_with_quorum());
        self.until("a leader", async || self.nodes.iter().any(leads)).await;
        self.nodes.iter().position(leads).unwrap_or(0)
    }

    /// Flips bits of `count` entries in a sealed segment behind the running node's back, and drops the page cache.
    fn damage(&self, i: usize, segment: u64, count: usize) {
        let path: PathBuf = self.dir.path().join(&self.peers[i].name).join("wal").join(segment_name(segment));
        let flip = |bytes: &mut Vec<u8>| {
            let found = scan_segment(bytes).unwrap().entries;
            let large: Vec<_> = found.iter().filter(|f| f.located.unwrap().payload_bytes > 1_000).collect();
            assert!(large.len() > count, "segment {segment} has only {} large entries", large.len());
            for found in &large[..count] {
                bytes[found.offset.unwrap() as usize + 500] ^= 0x10;
            }
        };
        self.disks[i].corrupt(&path, flip).unwrap();
        self.disks[i].evict();
    }

    fn repaired(&self, i: usize) -> u64 {
        let text = self.node(i).metrics().encode();
        let line = text.lines().find(|line| line.starts_with("stemedb_wal_repaired_entries_total{when=\"running\"}"));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// A whole pass of the scrubber.
    async fn scrub(&self, i: usize) -> PassEnd {
        let (dir, node) = (tempfile::tempdir().unwrap(), Arc::clone(self.node(i)));
        let sources = node.scrub_sources();
        assert_eq!(sources.iter().map(|s| s.kind()).collect::<Vec<_>>(), ["tree", "checkpoint", "wal"]);
        let pass = move || {
            let clock = Arc::new(RealClock);
            let observer = Arc::new(Metrics::new());
            Scrubber::new(dir.path(), sources, 1 << 40, observer, clock, CancellationToken::new()).pass()
        };
        tokio::task::spawn_blocking(pass).await.unwrap()
    }

    async fn fill(&self, through: usize, which: Range<u128>) {
        for n in which {
            write(self.node(through), n, LARGE_BYTES).await;
        }
    }

    async fn has_all(&self, i: usize, which: Range<u128>) {
        let mut view = None;
        for _ in 0..1_000 {
            match self.node(i).read(Consistency::Linearizable).await {
                Ok(found) => {
                    view = Some(found);
                    break;
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        let view = view.expect("a read is never answered");
        for n in which {
            assert!(view.assertion(Uuid::from_u128(n)).unwrap().is_some(), "write {n} is gone on node {}", i + 1);
        }
    }

    async fn stop(mut self) {
        for i in 0..3 {
            self.down(i).await;
        }
    }
}

async fn write(node: &Node, n: u128, bytes: usize) {
    let assertion = NewAssertion {
        id: Uuid::from_u128(n),
        concept_path: "test/a".into(),
        predicate: "p".into(),
        value_json: format!("\"{}\"", "v".repeat(bytes)),
        source: None,
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
    };
    let key = Some(CommandKey { source: KeySource::Client, id: n });
    let written = node.submit(Operation::Assert(vec![assertion]), key, n).await.expect("an error for a client");
    assert!(matches!(written.outcome.outcome, Outcome::Applied(_)), "{written:?}");
}

/// Clients that write without a pause, through the given nodes; the first error fails the test.
struct Load {
    written: Arc<AtomicU64>,
    stop: CancellationToken,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    const FIRST: u128 = 1 << 64;

    fn start(nodes: Vec<Arc<Node>>) -> Load {
        let (written, stop) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
        let client = |node: Arc<Node>| {
            let (written, stop) = (Arc::clone(&written), stop.clone());
            tokio::spawn(async move {
                while !stop.is_cancelled() {
                    write(&node, Self::FIRST + u128::from(written.fetch_add(1, Ordering::Relaxed)), 10).await;
                }
            })
        };
        let clients = nodes.into_iter().map(client).collect();
        Load { written, stop, clients }
    }

    /// Waits for so many more writes.
    async fn goes_on(&self, cluster: &Cluster, more: u64) {
        let goal = self.written.load(Ordering::Relaxed) + more;
        cluster.until("writes", async || self.written.load(Ordering::Relaxed) >= goal).await;
    }

    async fn stop(self) -> Range<u128> {
        self.stop.cancel();
        for client in self.clients {
            client.await.expect("an error for a client");
        }
        Self::FIRST..Self::FIRST + u128::from(self.written.load(Ordering::Relaxed))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_scrubber_of_a_leader_and_of_a_follower_puts_damaged_segments_right() {
    let mut cluster = Cluster::start().await;
    cluster.fill(0, 1..60).await;
    for i in 0..3 {
        cluster.restart(i).await;
    }
    let leader = cluster.leader().await;
    let load = Load::start(cluster.nodes.iter().flatten().cloned().collect());
    load.goes_on(&cluster, 20).await;
    for (i, segment, count) in [(leader, 1, 3), ((leader + 1) % 3, 2, 2)] {
        cluster.damage(i, segment, count);
        assert_eq!(cluster.scrub(i).await, PassEnd::Complete { damaged: 1 });
        assert_eq!(cluster.repaired(i), count as u64);
        assert_eq!(cluster.scrub(i).await, PassEnd::Complete { damaged: 0 });
        assert!(cluster.node(i).is_ready().is_ok());
    }
    load.goes_on(&cluster, 20).await;
    let small = load.stop().await;
    // From the platter, and without asking anybody.
    for i in 0..3 {
        cluster.disks[i].lose_unsynced();
        cluster.restart(i).await;
        let metrics = cluster.node(i).metrics().encode();
        assert!(metrics.contains("stemedb_wal_repaired_entries_total{when=\"start\"} 0"), "{metrics}");
    }
    for i in 0..3 {
        cluster.has_all(i, 1..60).await;
        cluster.has_all(i, small.clone()).await;
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_that_sends_old_entries_heals_those_it_cannot_read() {
    let mut cluster = Cluster::start().await;
    let lagging = (cluster.leader().await + 1) % 3;
    cluster.down(lagging).await;
    let through = (lagging + 1) % 3;
    cluster.fill(through, 1..60).await;
    // Nothing of it is in memory any more, on either node.
    for i in (0..3).filter(|i| *i != lagging) {
        cluster.restart(i).await;
    }
    let leader = cluster.leader().await;
    let load = Load::start(cluster.nodes.iter().flatten().cloned().collect());
    load.goes_on(&cluster, 20).await;
    cluster.damage(leader, 1, 3);
    cluster.damage(leader, 2, 1);
    cluster.up(lagging).await;
    cluster.all_ready().await;
    cluster.until("the repair", async || cluster.repaired(leader) == 4).await;
    assert_eq!(cluster.scrub(leader).await, PassEnd::Complete { damaged: 0 });
    assert_eq!(cluster.leader().await, leader, "the damage cost the leadership");
    load.goes_on(&cluster, 20).await;
    let small = load.stop().await;
    for i in 0..3 {
        cluster.has_all(i, 1..60).await;
        cluster.has_all(i, small.clone()).await;
    }
    cluster.stop().await;
}
