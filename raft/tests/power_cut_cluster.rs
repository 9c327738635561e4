//! Three real Raft nodes over this log lose their power at the same moment, in the middle of writes,
//! and any subset of what was not synced is gone. Nothing acknowledged may be missing afterwards, and
//! no log id may have two contents. What a node cannot tell alone it asks the others, and all three start.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod common;

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    io,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use common::{ListMachine, options};
use openraft::{
    Config, Raft, RaftNetworkFactory, SnapshotPolicy,
    errors::{RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::{RPCOption, v2::RaftNetworkV2},
    raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse},
    type_config::alias::SnapshotOf,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use stemedb_raft::{EntryData, LogId, Member, TypeConfig, Vote, WalStore, disk::sim::SimDisk};

type Snapshot = Vec<(LogId, Bytes)>;
type Node = Raft<TypeConfig, ListMachine>;

/// Who can be reached: the nodes that are up.
#[derive(Clone, Default)]
struct Router(Arc<Mutex<HashMap<u64, Node>>>);

struct Link {
    router: Router,
    target: u64,
}

impl Link {
    fn node(&self) -> Result<Node, RPCError<TypeConfig>> {
        let node = self.router.0.lock().unwrap().get(&self.target).cloned();
        node.ok_or_else(|| unreachable_because(io::Error::other("down")))
    }
}

fn unreachable_because(e: impl std::error::Error + 'static) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(&e))
}

impl RaftNetworkFactory<TypeConfig> for Router {
    type Network = Link;
    async fn new_client(&mut self, target: u64, _node: &Member) -> Link {
        Link { router: self.clone(), target }
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = Snapshot;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.node()?.append_entries(rpc).await.map_err(unreachable_because)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.node()?.vote(rpc).await.map_err(unreachable_because)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<TypeConfig, Snapshot>,
        _cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let node = self.node().map_err(|e| StreamingError::Unreachable(Unreachable::new(&e)))?;
        let installed = node.install_full_snapshot(vote, snapshot).await;
        installed.map_err(|e| StreamingError::Unreachable(Unreachable::new(&e)))
    }
}

fn config() -> Arc<Config> {
    let config = Config {
        heartbeat_interval: 20,
        election_timeout_min: 60,
        election_timeout_max: 120,
        snapshot_policy: SnapshotPolicy::Never,
        enable_leader_restore: Some(false),
        ..Config::default()
    };
    Arc::new(config.validate().unwrap())
}

fn members() -> BTreeMap<u64, Member> {
    (1..=3).map(|id| (id, Member { name: format!("node-{id}"), ..Member::default() })).collect()
}

async fn start(id: u64, store: WalStore, router: &Router) -> Node {
    let node = Node::new(id, config(), router.clone(), store, ListMachine::default()).await.unwrap();
    router.0.lock().unwrap().insert(id, node.clone());
    node
}

async fn leader(nodes: &[Node]) -> Option<u64> {
    for _ in 0..2_000 {
        for node in nodes {
            let linearizable = node.ensure_linearizable(openraft::ReadPolicy::ReadIndex);
            if node.is_leader()
                && tokio::time::timeout(Duration::from_millis(500), linearizable).await.is_ok_and(|r| r.is_ok())
            {
                return Some(*node.node_id());
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    None
}

/// Clients write through the leader until the power goes; returns what was acknowledged.
async fn write_until_dark(leader: &Node, seed: u64) -> BTreeMap<LogId, Bytes> {
    let acked = Arc::new(Mutex::new(BTreeMap::new()));
    let clients = (0..8).map(|client| {
        let (leader, acked) = (leader.clone(), Arc::clone(&acked));
        tokio::spawn(async move {
            for n in 0..10_000 {
                let text = Bytes::from(format!("{seed}/{client}/{n}/{}", "z".repeat(n % 700)));
                let write = leader.client_write(EntryData(text.clone()));
                match tokio::time::timeout(Duration::from_millis(200), write).await {
                    Ok(Ok(done)) => acked.lock().unwrap().insert(done.log_id, text),
                    Ok(Err(_)) | Err(_) => return,
                };
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    let acked = acked.lock().unwrap();
    acked.clone()
}

#[derive(Default, Debug)]
struct Tally {
    acked: usize,
    /// Nodes that still wait for an answer.
    asked: usize,
    /// Entries of torn tails that a peer gave back.
    fetched: usize,
    restarted: usize,
    without_quorum: usize,
}

async fn one(seed: u64, tally: &mut Tally) {
    let mut rng = StdRng::seed_from_u64(seed);
    let sims: Vec<SimDisk> = (0..3).map(|_| SimDisk::new()).collect();
    let router = Router::default();
    let mut nodes = Vec::new();
    for (id, sim) in (1..).zip(&sims) {
        let (store, _) = WalStore::open(sim.shared(), options(Path::new("/wal"))).unwrap();
        nodes.push(start(id, store, &router).await);
    }
    nodes[0].initialize(members()).await.unwrap();
    let first = leader(&nodes).await.expect("no leader on healthy disks");
    // All at once: each disk loses its power within the same few changes.
    for sim in &sims {
        sim.lose_power_after(rng.random_range(20..160));
    }
    let acked = write_until_dark(&nodes[first as usize - 1], seed).await;
    tally.acked += acked.len();
    for sim in &sims {
        sim.power_cut(&mut rng);
    }
    router.0.lock().unwrap().clear();
    for node in nodes {
        let _dead = node.shutdown().await;
    }
    // What a node cannot tell alone, it asks the others, whose own logs may be torn as well.
    let mut stores = Vec::new();
    for (id, found) in (1..).zip(common::settle(&sims)) {
        match found {
            common::Found::Ready(store, report) => {
                tally.fetched += report.repaired.len();
                stores.push((id, store));
            }
            common::Found::Waits(_) => tally.asked += 1,
            common::Found::Lost(why) | common::Found::Refused(why) => panic!("seed {seed}, node {id}: {why}"),
        }
    }
    if stores.len() < 2 {
        tally.without_quorum += 1;
        return;
    }
    let mut nodes = Vec::new();
    for (id, store) in &stores {
        nodes.push(start(*id, store.clone(), &router).await);
    }
    let Some(second) = leader(&nodes).await else { panic!("seed {seed}: no leader after the power cut") };
    let at = nodes.iter().position(|n| *n.node_id() == second).unwrap();
    let machine = nodes[at].with_state_machine(|sm: &mut ListMachine| {
        let texts = sm.state.lock().unwrap().texts.clone();
        Box::pin(async move { texts })
    });
    let texts: BTreeMap<LogId, Bytes> = machine.await.unwrap().into_iter().collect();
    for (id, text) in &acked {
        assert_eq!(texts.get(id), Some(text), "seed {seed}: acknowledged {id} is not what the new leader has");
    }
    let mut contents: BTreeMap<LogId, String> = BTreeMap::new();
    for (node, store) in &stores {
        for entry in store.reader().read(0, u64::MAX, u64::MAX).unwrap() {
            let text = common::text_of(&entry);
            let known = contents.entry(entry.log_id).or_insert_with(|| text.clone());
            assert_eq!(*known, text, "seed {seed}: node {node} has another content under {}", entry.log_id);
        }
    }
    for node in nodes {
        node.shutdown().await.unwrap();
    }
    tally.restarted += 1;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_of_all_nodes_loses_nothing_acknowledged() {
    let seeds = if std::env::var_os("STEMEDB_TEST_FULL").is_some() { 500 } else { 40 };
    let mut tally = Tally::default();
    for seed in 0..seeds {
        one(seed, &mut tally).await;
    }
    println!("{seeds} seeds: {tally:?}");
    assert_eq!((tally.asked, tally.without_quorum), (0, 0), "all three are there, so every question has an answer");
    assert!(tally.acked > seeds as usize && tally.restarted > seeds as usize / 4, "too little was tried: {tally:?}");
}
