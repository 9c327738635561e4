//! Three nodes in one process over loopback TCP, with a simulated disk under each log.

use std::{path::PathBuf, sync::Arc, time::Duration};

use stemedb::{
    config::{Config, PeerEntry},
    metrics::Metrics,
    model::NewAssertion,
    node::{Consistency, Ground, MemberReport, Node, StartError, SubmitError},
    state::command::{CommandKey, KeySource, Operation, Outcome},
};
use stemedb_raft::disk::sim::SimDisk;
use tokio::net::TcpListener;
use uuid::Uuid;

/// Far above what any condition needs; only a hang ends a test by this.
pub const HANG: Duration = Duration::from_secs(120);

pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub peers: Vec<PeerEntry>,
    pub nodes: Vec<Option<Arc<Node>>>,
    /// Under the log of each node.
    pub disks: Vec<SimDisk>,
    /// Changes the configuration of every node.
    pub tune: fn(&mut Config),
}

impl Cluster {
    pub async fn new(tune: fn(&mut Config)) -> Cluster {
        // Shown when a test fails, or with --nocapture.
        let _ = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::INFO).try_init();
        let disks = (0..3).map(|_| SimDisk::new()).collect();
        let mut cluster = Cluster { dir: tempfile::tempdir().unwrap(), peers: vec![], nodes: vec![], disks, tune };
        let mut listeners = Vec::new();
        for i in 0..3 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap().to_string();
            cluster.peers.push(PeerEntry { name: format!("node-{}", i + 1), addr, http: String::new() });
            listeners.push(listener);
        }
        for (i, listener) in listeners.into_iter().enumerate() {
            let node = cluster.start(i, listener).await.unwrap();
            cluster.nodes.push(Some(node));
        }
        cluster.until("readiness", async |c| c.running().all(|(_, n)| n.is_ready().is_ok()).then_some(())).await;
        cluster
    }

    pub fn folder(&self, i: usize) -> PathBuf {
        self.dir.path().join(&self.peers[i].name)
    }

    async fn start(&self, i: usize, listener: TcpListener) -> Result<Arc<Node>, StartError> {
        let mut config = Config::default();
        // A test needs no reserve for a full disk, and there are many nodes at once.
        config.storage.ballast_mb = 0;
        // A busy machine is not a hanging disk.
        (config.cluster.stall_handoff_ms, config.cluster.stall_fence_ms) = (60_000, 600_000);
        config.node.name = self.peers[i].name.clone();
        config.node.data_dir = self.folder(i);
        config.cluster.peers = self.peers.clone();
        config.cluster.bootstrap_expect = 3;
        config.wal.segment_size_mb = 1;
        config.wal.retain_mb = 1;
        // Two cores run three nodes and other tests: elections by overload are not what is tested here.
        config.cluster.heartbeat_ms = 100;
        config.cluster.election_min_ms = 600;
        config.cluster.election_max_ms = 1_200;
        (self.tune)(&mut config);
        let ground = Ground { peer_listener: Some(listener), disk: self.disks[i].shared(), ..Ground::default() };
        Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await
    }

    pub fn node(&self, i: usize) -> &Arc<Node> {
        self.nodes[i].as_ref().expect("a running node")
    }

    pub fn running(&self) -> impl Iterator<Item = (usize, &Arc<Node>)> {
        self.nodes.iter().enumerate().filter_map(|(i, node)| Some((i, node.as_ref()?)))
    }

    pub async fn stop(&mut self, i: usize) {
        let node = self.nodes[i].take().expect("a running node");
        node.shutdown().await;
    }

    pub async fn stop_all(&mut self) {
        for i in 0..3 {
            if self.nodes[i].is_some() {
                self.stop(i).await;
            }
        }
    }

    pub async fn restart(&mut self, i: usize) {
        self.try_restart(i).await.unwrap();
    }

    pub async fn try_restart(&mut self, i: usize) -> Result<(), StartError> {
        let listener = TcpListener::bind(&self.peers[i].addr).await.unwrap();
        self.nodes[i] = Some(self.start(i, listener).await?);
        Ok(())
    }

    /// Waits until `condition` holds.
    pub async fn until<T>(&self, what: &str, condition: impl AsyncFn(&Cluster) -> Option<T>) -> T {
        let wait = async {
            loop {
                if let Some(found) = condition(self).await {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(HANG, wait).await {
            Ok(found) => found,
            Err(_) => {
                for (i, node) in self.running() {
                    eprintln!("node {i}: {:?}\n  job {:?}", node.health(), node.jobs().current());
                }
                panic!("waited in vain for {what}")
            }
        }
    }

    pub async fn leader(&self) -> usize {
        self.until("a leader with a quorum", async |c| {
            c.running().find(|(_, n)| n.is_leader_with_quorum()).map(|(i, _)| i)
        })
        .await
    }

    /// The members as a leader sees them, once there are exactly three voters, all of them well, and no other member.
    pub async fn three_voters(&self) -> Vec<MemberReport> {
        self.until("three healthy voters", async |c| {
            let leader = c.running().find(|(_, n)| n.is_leader_with_quorum())?.1;
            let members = leader.cluster().await.members;
            let well = members.iter().all(|m| {
                m.voter
                    && (m.role == "leader" || m.role == "follower")
                    && m.disk.as_ref().is_some_and(|d| d.reason.is_none())
            });
            let ready = c.running().filter(|(_, n)| n.is_ready().is_ok() && n.jobs().current().is_none()).count() == 3;
            (members.len() == 3 && well && ready).then_some(members)
        })
        .await
    }

    /// The Raft id under which a node is a member.
    pub async fn id_of(&self, i: usize) -> u64 {
        let members = self.three_voters().await;
        members.iter().find(|m| m.name == self.peers[i].name).unwrap().id
    }
}

pub fn assertion(n: u128) -> Operation {
    Operation::Assert(vec![NewAssertion {
        id: Uuid::from_u128(n),
        concept_path: format!("test/{}", n % 7),
        predicate: "p".into(),
        value_json: n.to_string(),
        source: None,
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
    }])
}

/// Writes `n` through a node. What ends unknown, or was not taken, is repeated under the same key, as a client would.
pub async fn write(node: &Node, n: u128) {
    let key = Some(CommandKey { source: KeySource::Client, id: n });
    loop {
        match node.submit(assertion(n), key, n).await {
            Ok(done) => {
                assert!(matches!(done.outcome.outcome, Outcome::Applied(_)), "{done:?}");
                return;
            }
            Err(SubmitError::Unknown { .. } | SubmitError::NotApplied { .. } | SubmitError::DiskFull(_)) => {}
        }
    }
}

/// Writes half a MiB that does not compress.
pub async fn write_large(node: &Node, n: u128) {
    use rand::{Rng, SeedableRng, distr::Alphanumeric, rngs::StdRng};
    let text: String =
        StdRng::seed_from_u64(n as u64).sample_iter(Alphanumeric).take(512 * 1024).map(char::from).collect();
    let mut op = assertion(n);
    if let Operation::Assert(items) = &mut op {
        items[0].value_json = format!("\"{text}\"");
    }
    while node.submit(op.clone(), Some(CommandKey { source: KeySource::Client, id: n }), n).await.is_err() {}
}

pub async fn count(node: &Node) -> u64 {
    loop {
        match node.read(Consistency::Linearizable).await {
            Ok(view) => return view.count_assertions().unwrap(),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Writers that go on until they are told to stop; each write is acknowledged before the next.
pub struct Load {
    stop: Arc<std::sync::atomic::AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Vec<u128>>>,
}

impl Load {
    pub fn start(nodes: &[Arc<Node>], from: u128) -> Load {
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let tasks = nodes
            .iter()
            .enumerate()
            .map(|(w, node)| {
                let (node, stop) = (Arc::clone(node), Arc::clone(&stop));
                tokio::spawn(async move {
                    let mut written = Vec::new();
                    let mut n = from + 1_000_000 * w as u128;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        write(&node, n).await;
                        written.push(n);
                        n += 1;
                    }
                    written
                })
            })
            .collect();
        Load { stop, tasks }
    }

    /// What was acknowledged.
    pub async fn finish(self) -> Vec<u128> {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let mut all = Vec::new();
        for task in self.tasks {
            all.extend(task.await.unwrap());
        }
        all
    }
}

/// Every node has every acknowledged write, and nothing else.
pub async fn assert_all_there(cluster: &Cluster, acknowledged: &[u128]) {
    for (i, node) in cluster.running() {
        assert_eq!(count(node).await, acknowledged.len() as u64, "node {i}");
        let view = node.read(Consistency::Linearizable).await.unwrap();
        for n in acknowledged {
            assert!(view.assertion(Uuid::from_u128(*n)).unwrap().is_some(), "node {i} lacks {n}");
        }
    }
}
