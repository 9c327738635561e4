//! Cells on simulated disks: three nodes in this process with their HTTP listeners.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use stemedb::api;
use stemedb::config::{Config, PeerEntry};
use stemedb::metrics::Metrics;
use stemedb::node::{Ground, Node, StartError};
use stemedb_raft::disk::sim::SimDisk;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::load::until_or;
use super::panic_disk::PanicDisk;

pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub peers: Vec<PeerEntry>,
    pub disks: Vec<SimDisk>,
    nodes: Vec<Option<Up>>,
    /// One for each node: set, the thread that writes its log panics at its next sync.
    pub panics: Vec<Arc<AtomicBool>>,
    auto_rebuild: bool,
}

struct Up {
    node: Arc<Node>,
    stop: CancellationToken,
    http: tokio::task::JoinHandle<()>,
}

async fn bind(address: &str) -> TcpListener {
    // Somebody may hold a port for a moment while its node is down.
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{address}: {error}"),
        }
    }
}

impl Cluster {
    /// Three nodes that are ready.
    pub async fn new(auto_rebuild: bool) -> Self {
        let mut listeners = Vec::new();
        let mut peers = Vec::new();
        for i in 1..=3 {
            let (peer, http) = (bind("127.0.0.1:0").await, bind("127.0.0.1:0").await);
            let of = |listener: &TcpListener| listener.local_addr().unwrap().to_string();
            peers.push(PeerEntry { name: format!("node-{i}"), addr: of(&peer), http: of(&http) });
            listeners.push((peer, http));
        }
        let mut cluster = Self {
            dir: tempfile::tempdir().unwrap(),
            peers,
            disks: (0..3).map(|_| SimDisk::new()).collect(),
            nodes: (0..3).map(|_| None).collect(),
            panics: (0..3).map(|_| Arc::default()).collect(),
            auto_rebuild,
        };
        for (i, (peer, http)) in listeners.into_iter().enumerate() {
            cluster.start_on(i, peer, http).await.unwrap();
        }
        cluster.ready().await;
        cluster
    }

    pub fn folder(&self, i: usize) -> PathBuf {
        self.dir.path().join(&self.peers[i].name)
    }

    pub fn wal(&self, i: usize) -> PathBuf {
        self.folder(i).join("wal")
    }

    fn config(&self, i: usize) -> Arc<Config> {
        let mut config = Config::default();
        // A test needs no reserve for a full disk, and there are many nodes at once.
        config.storage.ballast_mb = 0;
        // A busy machine is not a hanging disk.
        (config.cluster.stall_handoff_ms, config.cluster.stall_fence_ms) = (60_000, 600_000);
        config.node.name = self.peers[i].name.clone();
        config.node.data_dir = self.folder(i);
        config.http.listen = self.peers[i].http.clone();
        config.cluster.peers = self.peers.clone();
        config.cluster.bootstrap_expect = 3;
        config.wal.segment_size_mb = 1;
        config.wal.retain_mb = 1;
        config.cluster.auto_rebuild = self.auto_rebuild;
        // Other tests run beside this one: elections by overload are not what is looked for.
        config.cluster.heartbeat_ms = 100;
        config.cluster.election_min_ms = 600;
        config.cluster.election_max_ms = 1_200;
        Arc::new(config)
    }

    async fn start_on(&mut self, i: usize, peer: TcpListener, http: TcpListener) -> Result<(), StartError> {
        let disk = Arc::new(PanicDisk { under: self.disks[i].shared(), armed: Arc::clone(&self.panics[i]) });
        let ground = Ground { peer_listener: Some(peer), disk, ..Ground::default() };
        let node = Node::start_on(self.config(i), Arc::new(Metrics::new()), ground).await?;
        let stop = CancellationToken::new();
        let serving = api::serve(http, Arc::clone(&node), stop.clone());
        let http = tokio::spawn(async move {
            let _ended = serving.await;
        });
        self.nodes[i] = Some(Up { node, stop, http });
        Ok(())
    }

    pub async fn start(&mut self, i: usize) -> Result<(), StartError> {
        let (peer, http) = (bind(&self.peers[i].addr).await, bind(&self.peers[i].http).await);
        self.start_on(i, peer, http).await
    }

    /// Stops a node; its clients are told by broken connections.
    pub async fn stop(&mut self, i: usize) {
        let Some(up) = self.nodes[i].take() else { return };
        up.stop.cancel();
        up.node.shutdown().await;
        // A request that is still being answered holds the state, and its folder cannot be opened again before.
        tokio::time::timeout(crate::rig::HANG, up.http).await.expect("the last request to end").unwrap();
    }

    pub fn node(&self, i: usize) -> &Arc<Node> {
        &self.nodes[i].as_ref().expect("a running node").node
    }

    pub fn up(&self) -> Vec<usize> {
        (0..3).filter(|i| self.nodes[*i].is_some()).collect()
    }

    pub async fn ready(&self) {
        let ready = async || self.up().iter().all(|i| self.node(*i).is_ready().is_ok());
        if until_or("all nodes are ready", ready).await.is_err() {
            for i in self.up() {
                let node = self.node(i);
                println!("{:?}\n{:?}\n{:?}", node.is_ready(), node.health(), node.jobs().current());
            }
            panic!("waited in vain: all nodes are ready");
        }
    }

    pub async fn leader(&self, except: Option<usize>) -> usize {
        let leads = || self.up().into_iter().find(|i| Some(*i) != except && self.node(*i).is_leader_with_quorum());
        let wait = async {
            loop {
                if let Some(leader) = leads() {
                    return leader;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let health = || self.up().into_iter().map(|i| self.node(i).health()).collect::<Vec<_>>();
        let found = tokio::time::timeout(crate::rig::HANG, wait).await;
        found.unwrap_or_else(|_| panic!("waited in vain for a leader: {:#?}", health()))
    }

    /// Where its bytes are not zero, the last quarter left out: what lies there was surely durable.
    pub fn durable_bytes(&self, i: usize) -> Vec<usize> {
        let mut places = Vec::new();
        let find = |bytes: &mut Vec<u8>| places = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        self.disks[i].corrupt(&self.segment(i), find).unwrap();
        places.truncate(places.len() / 4 * 3);
        places
    }

    /// The segment that has frames.
    pub fn segment(&self, i: usize) -> PathBuf {
        self.wal(i).join("segment.001.wal")
    }
}

/// A copy of a folder with everything in it.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_folder(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}
