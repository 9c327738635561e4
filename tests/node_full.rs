//! Full disks, told to three nodes in one process: who refuses, who leads, what clients notice, and that it ends.
//! The same on real file systems is in `disk_full.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use stemedb::{
    config::{Config, PeerEntry},
    metrics::Metrics,
    model::{NewAssertion, NewSupersession},
    node::{
        Consistency, Ground, Node, SubmitError,
        disk::DiskState,
        space::{Space, SpaceProbe},
    },
    state::command::{CommandKey, KeySource, Operation, Outcome},
};
use stemedb_raft::disk::sim::SimDisk;
use tokio::net::TcpListener;
use uuid::Uuid;

const MIB: u64 = 1024 * 1024;

/// Far above what any condition needs; only a hang ends a test by this.
const HANG: Duration = Duration::from_secs(60);

/// A disk of 400 MiB, whose low water is 100 MiB, as full as a test says.
struct Told(Mutex<Space>);

impl Told {
    fn new() -> Arc<Told> {
        let space = Space { bytes_free: 400 * MIB, bytes_total: 400 * MIB, inodes_free: 9_000, inodes_total: 10_000 };
        Arc::new(Told(Mutex::new(space)))
    }

    fn free_mib(&self, mib: u64) {
        self.0.lock().unwrap().bytes_free = mib * MIB;
    }
}

impl SpaceProbe for Told {
    fn look(&self, _: &Path) -> io::Result<Space> {
        Ok(*self.0.lock().unwrap())
    }
}

/// What is free: everything, too little for clients, too little for anybody.
const ROOM: u64 = 400;
const LOW: u64 = 60;
const NONE: u64 = 0;

struct Cluster {
    _dir: tempfile::TempDir,
    nodes: Vec<Arc<Node>>,
    disks: Vec<Arc<Told>>,
}

fn config(dir: &Path, name: &str) -> Config {
    let mut config = Config::default();
    config.node.name = name.into();
    config.node.data_dir = dir.join(name);
    config.wal.segment_size_mb = 1;
    config.storage.low_water_mb = 100;
    config.storage.ballast_mb = 0;
    // A busy machine is not a hanging disk.
    (config.cluster.stall_handoff_ms, config.cluster.stall_fence_ms) = (60_000, 600_000);
    config.cluster.heartbeat_ms = 100;
    config.cluster.election_min_ms = 600;
    config.cluster.election_max_ms = 1_200;
    config
}

impl Cluster {
    async fn new() -> Cluster {
        let dir = tempfile::tempdir().unwrap();
        let (mut peers, mut listeners) = (Vec::new(), Vec::new());
        for i in 1..=3 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap().to_string();
            peers.push(PeerEntry { name: format!("node-{i}"), addr, http: String::new() });
            listeners.push(listener);
        }
        let disks: Vec<Arc<Told>> = (0..3).map(|_| Told::new()).collect();
        let mut nodes = Vec::new();
        for (i, listener) in listeners.into_iter().enumerate() {
            let mut config = config(dir.path(), &peers[i].name);
            config.cluster.peers = peers.clone();
            config.cluster.bootstrap_expect = 3;
            let space = Arc::<Told>::clone(&disks[i]);
            let ground = Ground { peer_listener: Some(listener), space, ..Ground::default() };
            nodes.push(Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await.unwrap());
        }
        let cluster = Cluster { _dir: dir, nodes, disks };
        until("readiness", || cluster.nodes.iter().all(|n| n.is_ready().is_ok())).await;
        cluster
    }

    async fn leader(&self) -> usize {
        until("a leader", || self.nodes.iter().any(|n| n.is_leader_with_quorum())).await;
        self.nodes.iter().position(|n| n.is_leader_with_quorum()).unwrap_or_default()
    }

    fn is_full(&self, i: usize) -> bool {
        self.nodes[i].health().disk.state == DiskState::Full
    }

    async fn stop(self) {
        for node in &self.nodes {
            node.shutdown().await;
        }
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, wait).await.unwrap_or_else(|_| panic!("waited in vain for {what}"));
}

fn assertion(n: u128, value_bytes: usize) -> Operation {
    Operation::Assert(vec![NewAssertion {
        id: Uuid::from_u128(n),
        concept_path: "test/full".into(),
        predicate: "p".into(),
        value_json: format!("\"{}\"", "x".repeat(value_bytes)),
        source: None,
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
    }])
}

fn retraction(n: u128, old: u128) -> Operation {
    Operation::Supersede(NewSupersession { id: Uuid::from_u128(n), old: Uuid::from_u128(old), new: None, reason: None })
}

async fn submit(node: &Node, n: u128, op: Operation) -> Result<(), SubmitError> {
    let key = CommandKey { source: KeySource::Client, id: n };
    let done = node.submit(op, Some(key), n).await?;
    assert!(matches!(done.outcome.outcome, Outcome::Applied(_)), "{done:?}");
    Ok(())
}

async fn write(node: &Node, n: u128) -> Result<(), SubmitError> {
    submit(node, n, assertion(n, 10)).await
}

async fn is_there(node: &Node, n: u128) -> bool {
    node.read(Consistency::Linearizable).await.unwrap().assertion(Uuid::from_u128(n)).unwrap().is_some()
}

/// Writes until it succeeds; what is refused meanwhile is refused for want of room.
async fn write_when_there_is_room(node: &Node, n: u128) {
    let wait = async {
        loop {
            match write(node, n).await {
                Ok(()) => return,
                Err(SubmitError::DiskFull(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(HANG, wait).await.expect("writes go on by themselves");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_room_hands_over_and_clients_notice_nothing() {
    let cluster = Cluster::new().await;
    let full = cluster.leader().await;
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..6_u128)
        .map(|client| {
            let node = Arc::clone(&cluster.nodes[usize::try_from(client % 3).unwrap()]);
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            tokio::spawn(async move {
                let mut n = client * 1_000_000 + 1;
                while !stop.load(Ordering::Relaxed) {
                    // Unknown is no refusal: the same key is asked for again, as a client does.
                    match write(&node, n).await {
                        Ok(()) => n += 1,
                        Err(SubmitError::Unknown { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let more = async || {
        let now = done.load(Ordering::Relaxed);
        until("more writes", || done.load(Ordering::Relaxed) > now + 50).await;
    };
    more().await;
    cluster.disks[full].free_mib(NONE);
    let another_leads = || (0..3).any(|i| i != full && cluster.nodes[i].is_leader_with_quorum());
    until("leadership to move", another_leads).await;
    assert!(cluster.is_full(full));
    more().await;
    // It is ready, says what it lacks, and does not take leadership back while the others are well.
    assert!(cluster.nodes[full].is_ready().is_ok());
    let health = cluster.nodes[full].health();
    assert!(health.disk.reason.unwrap().contains("0 bytes are free"), "and says how many are needed");
    assert!(!cluster.nodes[full].is_leader_with_quorum());

    cluster.disks[full].free_mib(ROOM);
    until("the disk to be well", || !cluster.is_full(full)).await;
    more().await;
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_room_on_a_majority_writes_are_refused_reads_go_on_and_room_ends_it() {
    let cluster = Cluster::new().await;
    for n in 1..=3 {
        write(&cluster.nodes[0], n).await.unwrap();
    }
    let leader = cluster.leader().await;
    // The leader itself has room.
    let followers = [(leader + 1) % 3, (leader + 2) % 3];
    for i in followers {
        cluster.disks[i].free_mib(LOW);
    }
    let mut n = 100;
    let refused = loop {
        n += 1;
        match write(&cluster.nodes[leader], n).await {
            Ok(()) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(SubmitError::DiskFull(shortages)) => break shortages,
            Err(error) => panic!("{error}"),
        }
    };
    let mut names: Vec<&str> = refused.iter().map(|s| s.node.as_str()).collect();
    names.sort_unstable();
    let mut expected = followers.map(|i| cluster.nodes[i].name());
    expected.sort_unstable();
    assert_eq!(names, expected);
    assert_eq!((refused[0].bytes_free, refused[0].bytes_needed()), (LOW * MIB, 90 * MIB));

    cluster.disks[leader].free_mib(LOW);
    until("all disks to be full", || (0..3).all(|i| cluster.is_full(i))).await;
    for (i, node) in cluster.nodes.iter().enumerate() {
        let n = 1_000 + i as u128;
        assert!(matches!(write(node, n).await, Err(SubmitError::DiskFull(_))), "through node {i}");
        assert!(is_there(node, 1).await && !is_there(node, n).await);
        submit(node, 2_000 + i as u128, retraction(2_000 + i as u128, 1 + i as u128)).await.expect("a retraction");
    }
    for disk in &cluster.disks {
        disk.free_mib(NONE);
    }
    let mut n = 3_000;
    loop {
        n += 1;
        match submit(&cluster.nodes[leader], n, retraction(n, 2)).await {
            Ok(()) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(SubmitError::DiskFull(_)) => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(is_there(&cluster.nodes[leader], 3).await, "reads need no room");

    // Nobody with room is left to be elected: one without room is, because reads need a leader.
    let leader = cluster.leader().await;
    cluster.nodes[leader].hand_over().await;
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    until("another leader", || others.iter().any(|i| cluster.nodes[*i].is_leader_with_quorum())).await;
    assert!(is_there(&cluster.nodes[others[0]], 3).await);

    for disk in &cluster.disks {
        disk.free_mib(ROOM);
    }
    for (i, node) in cluster.nodes.iter().enumerate() {
        write_when_there_is_room(node, 5_000 + i as u128).await;
        assert!(is_there(node, 5_000).await);
    }
    for node in &cluster.nodes {
        for n in 1_000..1_003 {
            assert!(!is_there(node, n).await, "what was refused never appears");
        }
    }
    cluster.stop().await;
}

/// The log itself meets the end of the disk, behind the back of whoever counts free bytes, as a quota would have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shortage_after_proposing_is_unknown_and_what_was_refused_never_appears() {
    let dir = tempfile::tempdir().unwrap();
    let sim = SimDisk::new();
    let start = async || {
        let mut config = config(dir.path(), "node-1");
        config.cluster.peer_listen = Some("127.0.0.1:0".into());
        config.cluster.request_deadline_ms = 2_000;
        let ground = Ground { space: Told::new(), disk: sim.shared(), ..Ground::default() };
        let node = Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await.unwrap();
        until("readiness", || node.is_ready().is_ok()).await;
        node
    };
    let node = start().await;
    let (mut applied, mut not_applied, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
    sim.set_space_left(Some(0));
    // More than the segment in use and its successor hold.
    for n in 1..=40_u128 {
        match submit(&node, n, assertion(n, 100_000)).await {
            Ok(()) => applied.push(n),
            Err(SubmitError::Unknown { .. }) => unknown.push(n),
            Err(SubmitError::DiskFull(_) | SubmitError::NotApplied { .. }) => not_applied.push(n),
        }
        if unknown.len() + not_applied.len() == 3 {
            break;
        }
    }
    assert!(!applied.is_empty() && unknown.len() + not_applied.len() == 3, "{applied:?} {unknown:?} {not_applied:?}");
    node.shutdown().await;
    drop(node);
    sim.set_space_left(None);
    let node = start().await;
    for n in applied {
        assert!(is_there(&node, n).await, "{n} was acknowledged");
    }
    for n in not_applied {
        assert!(!is_there(&node, n).await, "{n} was refused");
    }
    write_when_there_is_room(&node, 100).await;
    node.shutdown().await;
}
