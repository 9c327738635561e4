//! Three nodes in one process over loopback TCP and real files: forming, writing through a follower,
//! losing the leader, coming back with the data.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr)]

use std::{path::Path, sync::Arc, time::Duration};

use stemedb::{
    cli::local_cluster::{PEER_PORT_OFFSET, free_port},
    config::{Config, PeerEntry},
    metrics::Metrics,
    model::NewAssertion,
    node::{Consistency, Ground, Node, StartError, SubmitError},
    state::command::{CommandKey, KeySource, Operation, Outcome},
};
use stemedb_raft::disk::sim::{SimDisk, SyncFault};
use tokio::net::TcpListener;
use uuid::Uuid;

/// Far above what any condition needs; only a hang ends a test by this.
const HANG: Duration = Duration::from_secs(120);

struct Cluster {
    dir: tempfile::TempDir,
    peers: Vec<PeerEntry>,
    nodes: Vec<Option<Arc<Node>>>,
    /// Under the log of each node, when faults are wanted.
    disks: Vec<SimDisk>,
    /// Least and longest silence of a leader before an election, milliseconds.
    election_ms: (u64, u64),
}

/// Two cores run three nodes and other tests: elections by overload are not what is tested here.
const ELECTION_MS: (u64, u64) = (600, 1_200);

fn config(dir: &Path, peers: &[PeerEntry], i: usize, election_ms: (u64, u64)) -> Arc<Config> {
    let mut config = Config::default();
    config.node.name = peers[i].name.clone();
    config.node.data_dir = dir.join(&peers[i].name);
    config.cluster.peers = peers.to_vec();
    config.cluster.bootstrap_expect = u32::try_from(peers.len()).unwrap();
    config.wal.segment_size_mb = 1;
    config.wal.retain_mb = 1;
    // What happens then is for `tests/rebuild`.
    config.cluster.auto_rebuild = false;
    config.cluster.heartbeat_ms = 100;
    (config.cluster.election_min_ms, config.cluster.election_max_ms) = election_ms;
    // However slow the machine is, a command gets its outcome.
    config.cluster.request_deadline_ms = 60_000;
    Arc::new(config)
}

impl Cluster {
    async fn new(size: usize) -> Cluster {
        Cluster::with(size, vec![], ELECTION_MS).await
    }

    async fn on(size: usize, disks: Vec<SimDisk>) -> Cluster {
        Cluster::with(size, disks, ELECTION_MS).await
    }

    async fn with(size: usize, disks: Vec<SimDisk>, election_ms: (u64, u64)) -> Cluster {
        let mut cluster =
            Cluster { dir: tempfile::tempdir().unwrap(), peers: vec![], nodes: vec![], disks, election_ms };
        // Ports that stay this test's own while their node is down.
        let first_port = free_port(size).unwrap() + PEER_PORT_OFFSET;
        for (i, port) in (first_port..).take(size).enumerate() {
            let addr = format!("127.0.0.1:{port}");
            cluster.peers.push(PeerEntry { name: format!("node-{}", i + 1), addr, http: String::new() });
        }
        for i in 0..size {
            let listener = TcpListener::bind(&cluster.peers[i].addr).await.unwrap();
            let node = cluster.start(i, listener).await;
            cluster.nodes.push(Some(node));
        }
        cluster
    }

    async fn start(&self, i: usize, listener: TcpListener) -> Arc<Node> {
        let mut ground = Ground { peer_listener: Some(listener), ..Ground::default() };
        if let Some(disk) = self.disks.get(i) {
            ground.disk = disk.shared();
        }
        let config = config(self.dir.path(), &self.peers, i, self.election_ms);
        Node::start_on(config, Arc::new(Metrics::new()), ground).await.unwrap()
    }

    fn node(&self, i: usize) -> &Arc<Node> {
        self.nodes[i].as_ref().expect("a running node")
    }

    fn running(&self) -> impl Iterator<Item = (usize, &Arc<Node>)> {
        self.nodes.iter().enumerate().filter_map(|(i, node)| Some((i, node.as_ref()?)))
    }

    async fn stop(&mut self, i: usize) {
        let node = self.nodes[i].take().expect("a running node");
        node.shutdown().await;
    }

    async fn restart(&mut self, i: usize) {
        let listener = TcpListener::bind(&self.peers[i].addr).await.unwrap();
        self.nodes[i] = Some(self.start(i, listener).await);
    }

    /// Waits until `condition` holds.
    async fn until<T>(&self, what: &str, condition: impl AsyncFn(&Cluster) -> Option<T>) -> T {
        let wait = async {
            loop {
                if let Some(found) = condition(self).await {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(HANG, wait).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
    }

    async fn leader(&self) -> usize {
        self.until("a leader with a quorum", async |c| {
            c.running().find(|(_, n)| n.is_leader_with_quorum()).map(|(i, _)| i)
        })
        .await
    }

    async fn all_ready(&self) {
        self.until("readiness", async |c| c.running().all(|(_, n)| n.is_ready().is_ok()).then_some(())).await;
    }
}

fn assertion(n: u128) -> Operation {
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

fn key(n: u128) -> Option<CommandKey> {
    Some(CommandKey { source: KeySource::Client, id: n })
}

/// Writes `n` through a node and returns whether it was replayed. What ends unknown is repeated under
/// the same key, as a client would do it.
async fn write(node: &Node, n: u128) -> bool {
    submit(node, assertion(n), n).await
}

/// `write` of something else.
async fn submit(node: &Node, op: Operation, n: u128) -> bool {
    loop {
        match node.submit(op.clone(), key(n), n).await {
            Ok(done) => {
                assert!(matches!(done.outcome.outcome, Outcome::Applied(_)), "{done:?}");
                assert!(!done.served_by.is_empty());
                return done.outcome.replayed;
            }
            Err(SubmitError::Unknown { detail }) => eprintln!("unknown, asked again: {detail}"),
            Err(error) => panic!("{error}"),
        }
    }
}

async fn count(node: &Node) -> u64 {
    node.read(Consistency::Linearizable).await.expect("a linearizable read").count_assertions().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cluster_forms_serves_through_followers_and_survives_its_leader() {
    let mut cluster = Cluster::new(3).await;
    cluster.all_ready().await;
    let leader = cluster.leader().await;
    let follower = (leader + 1) % 3;

    for n in 0..20 {
        assert!(!write(cluster.node(follower), n).await);
    }
    assert!(write(cluster.node(leader), 3).await, "the same key through another node is replayed");
    for i in 0..3 {
        assert_eq!(count(cluster.node(i)).await, 20, "node {i}");
    }

    // Writes under way while the leader goes: each is applied once.
    let writers: Vec<_> = (100..200)
        .map(|n| {
            let node = Arc::clone(cluster.node(follower));
            tokio::spawn(async move { write(&node, n).await })
        })
        .collect();
    cluster.stop(leader).await;
    for writer in writers {
        writer.await.unwrap();
    }
    let next = cluster.leader().await;
    assert_ne!(next, leader);
    for (i, node) in cluster.running() {
        assert_eq!(count(node).await, 120, "node {i}");
    }

    cluster.restart(leader).await;
    cluster.all_ready().await;
    assert_eq!(count(cluster.node(leader)).await, 120);
    let report = cluster.node(leader).cluster().await;
    assert_eq!(report.members.iter().map(|m| m.id).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(report.members.iter().all(|m| m.voter && m.disk.is_some()), "{report:?}");
    assert!(report.leader.is_some());

    for i in 0..3 {
        cluster.stop(i).await;
    }
    for i in 0..3 {
        cluster.restart(i).await;
    }
    cluster.all_ready().await;
    for i in 0..3 {
        assert_eq!(count(cluster.node(i)).await, 120, "node {i} after a restart of all");
        assert!(write(cluster.node(i), 150).await, "keys survive a restart of all");
    }
    let id = Uuid::from_u128(150);
    let view = cluster.node(0).read(Consistency::Stale { max_staleness_ms: Some(60_000) }).await.unwrap();
    assert!(view.assertion(id).unwrap().is_some());
    for i in 0..3 {
        cluster.stop(i).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_about_to_stop_hands_over_without_an_election_and_takes_nothing_back() {
    // With these clocks an election would begin long after this test has given up.
    let mut cluster = Cluster::with(3, vec![], (400_000, 400_001)).await;
    cluster.all_ready().await;
    let leader = cluster.leader().await;
    write(cluster.node(leader), 1).await;
    // Commands under way on every node, the leaving one too: all get their outcome.
    let writers: Vec<_> = (100..160)
        .map(|n| {
            let node = Arc::clone(cluster.node(usize::try_from(n).unwrap() % 3));
            tokio::spawn(async move { node.submit(assertion(n), key(n), n).await })
        })
        .collect();
    cluster.node(leader).hand_over().await;
    cluster.until("another leader", async |c| (!c.node(leader).is_leader_with_quorum()).then_some(())).await;
    assert!(cluster.node(leader).is_ready().unwrap_err().contains("stopping"));
    for writer in writers {
        writer.await.unwrap().expect("an outcome");
    }
    let next = cluster.leader().await;
    assert_ne!(next, leader);
    assert_eq!(count(cluster.node(leader)).await, 61, "it still serves, through the new leader");
    // The only healthy other one takes over, never the one that is leaving.
    cluster.node(next).hand_over().await;
    let only = (0..3).find(|i| *i != next && *i != leader).unwrap();
    cluster.until("the only one left to lead", async |c| c.node(only).is_leader_with_quorum().then_some(())).await;
    for i in 0..3 {
        cluster.stop(i).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_is_a_whole_database_and_comes_back_with_its_data() {
    let mut cluster = Cluster::new(1).await;
    cluster.all_ready().await;
    for n in 0..10 {
        write(cluster.node(0), n).await;
    }
    assert!(cluster.node(0).is_leader_with_quorum());
    assert_eq!(cluster.node(0).replica_lag_entries(), Some(0));
    let again = Node::start(config(cluster.dir.path(), &cluster.peers, 0, ELECTION_MS), Arc::new(Metrics::new()));
    assert!(matches!(again.await.err(), Some(StartError::Lock(_))), "the folder is locked");
    cluster.stop(0).await;
    cluster.restart(0).await;
    cluster.all_ready().await;
    assert_eq!(count(cluster.node(0)).await, 10);
    let health = cluster.node(0).health();
    assert_eq!((health.status.as_str(), health.role.as_str(), health.applied_index), ("ok", "leader", 10));
    cluster.stop(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_a_command_waits_and_its_end_says_what_is_known() {
    let mut cluster = Cluster::new(3).await;
    cluster.all_ready().await;
    let leader = cluster.leader().await;
    let (a, b) = ((leader + 1) % 3, (leader + 2) % 3);
    write(cluster.node(a), 1).await;
    cluster.stop(a).await;
    cluster.stop(b).await;
    let waiting = {
        let node = Arc::clone(cluster.node(leader));
        tokio::spawn(async move { node.submit(assertion(2), key(2), 2).await })
    };
    cluster.until("the loss of the quorum", async |c| (!c.node(leader).is_leader_with_quorum()).then_some(())).await;
    assert!(cluster.node(leader).is_ready().is_ok(), "readiness outlasts a leaderless moment");
    cluster.restart(a).await;
    let done = waiting.await.unwrap();
    assert!(matches!(done, Ok(_) | Err(SubmitError::Unknown { .. })), "{done:?}");
    write(cluster.node(a), 2).await;
    assert_eq!(count(cluster.node(leader)).await, 2);
    cluster.stop(a).await;
    cluster.stop(leader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_node_never_forms_a_second_cluster() {
    let mut cluster = Cluster::new(3).await;
    cluster.all_ready().await;
    write(cluster.node(0), 1).await;
    cluster.stop(0).await;
    std::fs::remove_dir_all(cluster.dir.path().join("node-1")).unwrap();
    cluster.restart(0).await;
    let why = tokio::time::timeout(HANG, cluster.node(0).wait_fatal()).await.unwrap();
    assert!(why.contains("already a member"), "{why}");
    assert!(cluster.node(0).is_ready().is_err());
    assert_eq!(count(cluster.node(1)).await, 1);
    for i in 0..3 {
        cluster.stop(i).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_that_lost_a_part_does_not_start() {
    let mut cluster = Cluster::new(1).await;
    cluster.all_ready().await;
    write(cluster.node(0), 1).await;
    cluster.stop(0).await;
    let folder = cluster.dir.path().join("node-1");
    let begin = || Node::start(config(cluster.dir.path(), &cluster.peers, 0, ELECTION_MS), Arc::new(Metrics::new()));

    std::fs::rename(folder.join("identity"), folder.join("identity.away")).unwrap();
    let error = begin().await.err().expect("a refusal").to_string();
    assert!(error.contains("no identity file"), "{error}");
    std::fs::rename(folder.join("identity.away"), folder.join("identity")).unwrap();

    std::fs::rename(folder.join("wal"), folder.join("wal.away")).unwrap();
    let error = begin().await.err().expect("a refusal").to_string();
    assert!(error.contains("log and its vote are missing"), "{error}");
    std::fs::remove_dir_all(folder.join("wal")).unwrap();
    std::fs::rename(folder.join("wal.away"), folder.join("wal")).unwrap();

    cluster.restart(0).await;
    cluster.all_ready().await;
    assert_eq!(count(cluster.node(0)).await, 1);
    cluster.stop(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_sync_of_the_leader_is_no_event_for_clients() {
    let disks: Vec<SimDisk> = (0..3).map(|_| SimDisk::new()).collect();
    let mut cluster = Cluster::on(3, disks).await;
    cluster.all_ready().await;
    let leader = cluster.leader().await;
    write(cluster.node(leader), 1).await;
    cluster.disks[leader].fail_next_sync("segment.001.wal", SyncFault::PagesMarkedClean);
    let writers: Vec<_> = (0..60)
        .map(|n| {
            let node = Arc::clone(cluster.node(n % 3));
            let n = 100 + n as u128;
            tokio::spawn(async move { node.submit(assertion(n), key(n), n).await })
        })
        .collect();
    for writer in writers {
        // On the failed node too: it acknowledges nothing itself and sends each command on.
        writer.await.unwrap().expect("an outcome");
    }
    let others_lead =
        async |c: &Cluster| c.running().find(|(i, n)| *i != leader && n.is_leader_with_quorum()).map(|(i, _)| i);
    let next = cluster.until("another leader", others_lead).await;
    assert_eq!(count(cluster.node(next)).await, 61);
    let failed = cluster.node(leader);
    assert!(failed.is_ready().is_err());
    assert!(!failed.is_leader_with_quorum());
    let health = failed.health();
    assert_eq!(health.status, "failed");
    assert!(health.disk.reason.is_some());
    for i in 0..3 {
        cluster.stop(i).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_lies_before_the_purged_log_gets_a_checkpoint() {
    let mut cluster = Cluster::new(3).await;
    cluster.all_ready().await;
    let leader = cluster.leader().await;
    let late = (leader + 1) % 3;
    write(cluster.node(leader), 1).await;
    cluster.stop(late).await;
    let last_here = cluster.node(leader).cluster().await.members[leader].last_log_index;
    let mut n = 1_000;
    loop {
        let before = n;
        while n < before + 40 {
            let mut op = assertion(n);
            if let Operation::Assert(list) = &mut op {
                list[0].value_json = format!("\"{}\"", "x".repeat(20_000));
            }
            submit(cluster.node(leader), op, n).await;
            n += 1;
        }
        if n == 1_040 {
            let lags = async |c: &Cluster| {
                let report = c.node(leader).cluster().await;
                (report.members[late].lag_bytes > Some(40 * 20_000)).then_some(())
            };
            cluster.until("the lag of the one that is down", lags).await;
        }
        let report = cluster.node(leader).cluster().await;
        if report.members[leader].purged_log_index > last_here {
            break;
        }
    }
    let expected = 1 + u64::try_from(n - 1_000).unwrap();
    cluster.restart(late).await;
    cluster.all_ready().await;
    assert_eq!(count(cluster.node(late)).await, expected);
    assert!(write(cluster.node(late), 1).await, "keys travel in the checkpoint");
    cluster.stop(late).await;
    cluster.restart(late).await;
    cluster.all_ready().await;
    assert_eq!(count(cluster.node(late)).await, expected);
    for i in 0..3 {
        cluster.stop(i).await;
    }
}

/// The log marks what is durable a moment after the last group. A mark that fails is awaited by nobody in
/// Raft: the leader must give up all the same, or its heartbeats keep the others from electing another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_log_fails_between_two_writes_gives_up_leadership() {
    let disks: Vec<SimDisk> = (0..3).map(|_| SimDisk::new()).collect();
    let mut cluster = Cluster::on(3, disks).await;
    cluster.all_ready().await;
    let leader = cluster.leader().await;
    write(cluster.node(leader), 1).await;
    // A group is two writes and a sync, a mark is one of each. With the mark made and the next segment prepared
    // the log touches the disk no more until it is asked to.
    let group_then_mark = ["write", "write", "sync", "write", "sync"].map(|what| format!("{what} segment.001.wal"));
    let settled = async |c: &Cluster| {
        let done = c.disks[leader].operations();
        let begun = done.iter().position(|operation| operation == "write segment.001.wal");
        let prepared = done.iter().skip(begun?).any(|operation| operation == "sync segment.spare");
        let log: Vec<_> = done.into_iter().filter(|operation| operation.ends_with("segment.001.wal")).collect();
        (prepared && log.ends_with(&group_then_mark)).then_some(())
    };
    cluster.until("an idle log", settled).await;
    // Of the next write the group is synced, and the mark is not.
    cluster.disks[leader].fail_sync_after(1, SyncFault::PagesMarkedClean);
    write(cluster.node(leader), 2).await;
    cluster.until("the failure to be known", async |c| c.node(leader).has_failed().then_some(())).await;
    let others_lead =
        async |c: &Cluster| c.running().find(|(i, n)| *i != leader && n.is_leader_with_quorum()).map(|(i, _)| i);
    let next = cluster.until("another leader", others_lead).await;
    write(cluster.node(leader), 3).await;
    assert_eq!(count(cluster.node(next)).await, 3);
    for i in 0..3 {
        cluster.stop(i).await;
    }
}
