//! Cells on simulated disks: three nodes in this process with their HTTP listeners.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::api;
use stemedb::config::{Config, PeerEntry};
use stemedb::metrics::Metrics;
use stemedb::node::{Ground, Node, StartError};
use stemedb_raft::disk::sim::{SimDisk, SyncFault};
use stemedb_raft::disk::{Disk, DiskFile, FolderLock, FoundFile};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::load::{Running, until};
use super::table::{Act, Outcome, Victim};

struct Cluster {
    dir: tempfile::TempDir,
    peers: Vec<PeerEntry>,
    disks: Vec<SimDisk>,
    nodes: Vec<Option<Up>>,
    /// One for each node: set, the thread that writes its log panics at its next sync.
    panics: Vec<Arc<AtomicBool>>,
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
    async fn new() -> Self {
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
        };
        for (i, (peer, http)) in listeners.into_iter().enumerate() {
            cluster.start_on(i, peer, http).await.unwrap();
        }
        cluster.ready().await;
        cluster
    }

    fn folder(&self, i: usize) -> PathBuf {
        self.dir.path().join(&self.peers[i].name)
    }

    fn wal(&self, i: usize) -> PathBuf {
        self.folder(i).join("wal")
    }

    fn config(&self, i: usize) -> Arc<Config> {
        let mut config = Config::default();
        config.node.name = self.peers[i].name.clone();
        config.node.data_dir = self.folder(i);
        config.http.listen = self.peers[i].http.clone();
        config.cluster.peers = self.peers.clone();
        config.cluster.bootstrap_expect = 3;
        config.wal.segment_size_mb = 1;
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

    async fn start(&mut self, i: usize) -> Result<(), StartError> {
        let (peer, http) = (bind(&self.peers[i].addr).await, bind(&self.peers[i].http).await);
        self.start_on(i, peer, http).await
    }

    /// Stops a node; its clients are told by broken connections.
    async fn stop(&mut self, i: usize) {
        let Some(up) = self.nodes[i].take() else { return };
        up.stop.cancel();
        up.node.shutdown().await;
        up.http.abort();
        let _aborted = up.http.await;
    }

    fn node(&self, i: usize) -> &Arc<Node> {
        &self.nodes[i].as_ref().expect("a running node").node
    }

    fn up(&self) -> Vec<usize> {
        (0..3).filter(|i| self.nodes[*i].is_some()).collect()
    }

    async fn ready(&self) {
        until("all nodes are ready", async || self.up().iter().all(|i| self.node(*i).is_ready().is_ok())).await;
    }

    async fn leader(&self, except: Option<usize>) -> usize {
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
    fn durable_bytes(&self, i: usize) -> Vec<usize> {
        let mut places = Vec::new();
        let find = |bytes: &mut Vec<u8>| places = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        self.disks[i].corrupt(&self.segment(i), find).unwrap();
        places.truncate(places.len() / 4 * 3);
        places
    }

    /// The segment that has frames.
    fn segment(&self, i: usize) -> PathBuf {
        self.wal(i).join("segment.001.wal")
    }
}

pub async fn run(act: Act, victim: Victim, seed: u64) -> Outcome {
    let mut cluster = Cluster::new().await;
    let addresses: Vec<String> = cluster.peers.iter().map(|peer| peer.http.clone()).collect();
    let running = Running::start(&addresses, seed);
    running.more().await;
    let leader = cluster.leader(None).await;
    let i = if victim == Victim::Leader { leader } else { (leader + 1) % 3 };
    let mut rng = StdRng::seed_from_u64(seed);
    let seen = act_out(act, &mut cluster, &running, i, &mut rng).await;
    running.more().await;
    let outcome = running.judge(&cluster.up(), seen).await;
    for i in 0..3 {
        cluster.stop(i).await;
    }
    outcome
}

async fn act_out(
    act: Act,
    cluster: &mut Cluster,
    running: &Running,
    i: usize,
    rng: &mut StdRng,
) -> Result<String, String> {
    match act {
        Act::SyncFailsOnce => sync_fails(cluster, running, i, SyncFault::PagesMarkedClean).await,
        Act::SyncFailsAndReverts => sync_fails(cluster, running, i, SyncFault::ContentsReverted).await,
        Act::PowerCut => {
            down(cluster, running, i, async |cluster| {
                cluster.disks[i].power_cut(rng);
            })
            .await;
            back(cluster, running, i, "").await
        }
        Act::RandomBlock | Act::BitFlip | Act::SegmentShort | Act::SegmentMissing => {
            down(cluster, running, i, async |_| ()).await;
            let path = cluster.segment(i);
            let places = cluster.durable_bytes(i);
            let at = places[rng.random_range(0..places.len())];
            let bit = 1 << rng.random_range(0..8);
            let noise: Vec<u8> = (0..512).map(|_| rng.random()).collect();
            let disk = &cluster.disks[i];
            match act {
                Act::SegmentMissing => disk.shared().remove(&path).unwrap(),
                Act::SegmentShort => disk.corrupt(&path, |bytes| bytes.truncate(bytes.len() / 2)).unwrap(),
                Act::BitFlip => disk.corrupt(&path, |bytes| bytes[at] ^= bit).unwrap(),
                _ => disk.corrupt(&path, |bytes| bytes[at..at + noise.len()].copy_from_slice(&noise)).unwrap(),
            }
            running.more().await;
            back(cluster, running, i, "segment.").await
        }
        Act::Wiped => {
            down(cluster, running, i, async |_| ()).await;
            std::fs::remove_dir_all(cluster.folder(i)).unwrap();
            cluster.disks[i] = SimDisk::new();
            back(cluster, running, i, "already a member").await
        }
        Act::WriterDies => {
            cluster.panics[i].store(true, Ordering::Release);
            let node = Arc::clone(cluster.node(i));
            let fatal = async { tokio::time::timeout(crate::rig::HANG, node.wait_fatal()).await };
            let said = tokio::select! {
                said = fatal => said.map_err(|_| "the node never said that it cannot go on".to_owned())?,
                () = until("the disk counts as failed", async || node.has_failed()) => {
                    format!("its disk counts as failed: {}", node.health().disk.reason.unwrap_or_default())
                }
            };
            running.more().await;
            // A process would end now; its memory, which this one shares, with it. So there is no coming back here.
            down(cluster, running, i, async |_| ()).await;
            Ok(said)
        }
        other => Err(format!("{other:?} has no simulated ground")),
    }
}

async fn sync_fails(cluster: &Cluster, running: &Running, i: usize, fault: SyncFault) -> Result<String, String> {
    let term = cluster.node(i).health().term;
    cluster.disks[i].fail_next_sync(".wal", fault);
    until("the failure is known", async || cluster.node(i).has_failed()).await;
    let others = async || cluster.leader(Some(i)).await;
    let next = others().await;
    running.more().await;
    let failed = cluster.node(i);
    if failed.is_leader_with_quorum() || failed.is_ready().is_ok() {
        return Err("the failed node leads or calls itself ready".to_owned());
    }
    let moved = if cluster.node(next).health().term > term { ", in a later term" } else { "" };
    Ok(format!("failed, and goes on as a proxy; another node leads{moved}"))
}

/// Takes a node down after `before`, under load, and waits until the others have served without it.
async fn down(cluster: &mut Cluster, running: &Running, i: usize, mut before: impl AsyncFnMut(&Cluster)) {
    running.load.set_up(i, false);
    before(cluster).await;
    cluster.stop(i).await;
    running.more().await;
}

/// Starts a node again. It comes back, or refuses with words that name `refusal`; where `refusal` is empty it must
/// come back.
async fn back(cluster: &mut Cluster, running: &Running, i: usize, refusal: &str) -> Result<String, String> {
    let honest = |why: String| {
        let named = cluster_dir(&why).map_or_else(|| why.clone(), |dir| why.replace(dir, "DATA"));
        let short: String = named.chars().take(160).collect();
        if !refusal.is_empty() && why.contains(refusal) {
            Ok(format!("refuses to start: {short}"))
        } else {
            Err(format!("did not come back: {why}"))
        }
    };
    if let Err(error) = cluster.start(i).await {
        return honest(error.to_string());
    }
    let node = Arc::clone(cluster.node(i));
    tokio::select! {
        why = node.wait_fatal() => {
            cluster.stop(i).await;
            honest(why)
        }
        () = until("it is ready", async || node.is_ready().is_ok()) => {
            running.load.set_up(i, true);
            Ok("comes back with everything".to_owned())
        }
    }
}

/// The temporary folder in a message, which differs from run to run.
fn cluster_dir(why: &str) -> Option<&str> {
    let from = why.find("/tmp/")?;
    let rest = &why[from..];
    Some(&rest[..rest.find("/node-")?])
}

/// A disk whose next sync of a segment panics when armed: the thread that called it dies.
struct PanicDisk {
    under: Arc<dyn Disk>,
    armed: Arc<AtomicBool>,
}

struct PanicFile {
    under: Arc<dyn DiskFile>,
    armed: Arc<AtomicBool>,
}

impl PanicDisk {
    fn file(&self, path: &Path, under: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        // The spare too: it becomes the next segment while it is open.
        match path.file_stem() {
            Some(stem) if stem.to_string_lossy().starts_with("segment") => {
                Arc::new(PanicFile { under, armed: Arc::clone(&self.armed) })
            }
            _ => under,
        }
    }
}

impl Disk for PanicDisk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.under.create_dir_all(dir)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<FoundFile>> {
        self.under.list(dir)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(path, self.under.open(path)?))
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(path, self.under.create(path)?))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.under.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.under.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.under.sync_dir(dir)
    }
    fn space(&self, dir: &Path) -> io::Result<stemedb_raft::disk::Space> {
        self.under.space(dir)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn FolderLock>> {
        self.under.lock(path)
    }
}

impl DiskFile for PanicFile {
    fn bytes(&self) -> io::Result<u64> {
        self.under.bytes()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.under.read_at(buf, offset)
    }
    fn read_uncached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.under.read_uncached_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.under.write_at(buf, offset)
    }
    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.under.reserve(bytes)
    }
    fn sync_data(&self) -> io::Result<()> {
        assert!(!self.armed.load(Ordering::Acquire), "a planted panic");
        self.under.sync_data()
    }
}
