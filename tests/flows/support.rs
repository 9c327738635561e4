//! Three nodes in this process with their HTTP listeners, each of which can be stopped and started alone, and clients.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use serde_json::{Value, json};
use stemedb::{
    api,
    cli::{
        drill_load::{self, Load},
        http_client::{Answer, Call, Client, Endpoint},
    },
    config::{Config, PeerEntry},
    judge::{History, ReadOutcome, WriteOutcome, check},
    metrics::Metrics,
    node::{Ground, Node},
};
use stemedb_raft::disk::sim::SimDisk;
use tokio::{
    net::TcpListener,
    sync::{Mutex, MutexGuard},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::cluster_rig;

/// Far above what any condition needs; only a hang ends a test by this.
pub const HANG: Duration = Duration::from_secs(240);

/// Three nodes are as much as two cores serve without elections by overload: one cluster at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// A running node and its HTTP side.
struct Running {
    node: Arc<Node>,
    stop_http: CancellationToken,
    serving: JoinHandle<io::Result<()>>,
}

pub struct Cluster {
    dir: tempfile::TempDir,
    pub peers: Vec<PeerEntry>,
    nodes: Vec<Option<Running>>,
    disks: Vec<SimDisk>,
    tune: fn(&mut Config),
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    pub async fn new(size: usize) -> Cluster {
        Cluster::with(size, |_| {}).await
    }

    /// Nodes that are ready, with a leader.
    pub async fn with(size: usize, tune: fn(&mut Config)) -> Cluster {
        cluster_rig::log_if_wanted();
        let alone = ONE_AT_A_TIME.lock().await;
        let (peers, listeners) = cluster_rig::nodes(size).await;
        let disks = (0..size).map(|_| SimDisk::new()).collect();
        let mut cluster =
            Cluster { dir: tempfile::tempdir().unwrap(), peers, nodes: vec![], disks, tune, _alone: alone };
        for (i, (peer, http)) in listeners.into_iter().enumerate() {
            let running = cluster.start(i, peer, http).await;
            cluster.nodes.push(Some(running));
        }
        cluster.all_ready().await;
        cluster.leader().await;
        cluster
    }

    pub fn disk(&self, i: usize) -> &SimDisk {
        &self.disks[i]
    }

    pub fn folder(&self, i: usize) -> PathBuf {
        self.dir.path().join(&self.peers[i].name)
    }

    pub fn name(&self, i: usize) -> &str {
        &self.peers[i].name
    }

    async fn start(&self, i: usize, peer: TcpListener, http: TcpListener) -> Running {
        let mut config = cluster_rig::config(&self.peers, i, self.dir.path());
        config.cluster.stop_deadline_ms = 60_000;
        // Nobody polls here: what has to notice is waited for.
        config.cluster.drain_notice_ms = 50;
        (self.tune)(&mut config);
        let ground = Ground { peer_listener: Some(peer), disk: self.disks[i].shared(), ..Ground::default() };
        let node = Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await.unwrap();
        let stop_http = CancellationToken::new();
        let serving = tokio::spawn(api::serve(http, Arc::clone(&node), stop_http.clone()));
        Running { node, stop_http, serving }
    }

    pub fn node(&self, i: usize) -> &Arc<Node> {
        &self.nodes[i].as_ref().expect("a running node").node
    }

    pub fn running(&self) -> impl Iterator<Item = (usize, &Arc<Node>)> {
        self.nodes.iter().enumerate().filter_map(|(i, running)| Some((i, &running.as_ref()?.node)))
    }

    /// Stops a node without any notice.
    pub async fn stop(&mut self, i: usize) {
        let Running { node, stop_http, serving } = self.nodes[i].take().expect("a running node");
        stop_http.cancel();
        node.shutdown().await;
        serving.await.unwrap().unwrap();
    }

    /// Stops a node as SIGTERM does.
    pub async fn terminate(&mut self, i: usize) {
        let Running { node, stop_http, serving } = self.nodes[i].take().expect("a running node");
        node.stop_gently().await;
        stop_http.cancel();
        serving.await.unwrap().unwrap();
        node.shutdown().await;
    }

    pub async fn restart(&mut self, i: usize) {
        let peer = TcpListener::bind(&self.peers[i].addr).await.unwrap();
        let http = TcpListener::bind(&self.peers[i].http).await.unwrap();
        let running = self.start(i, peer, http).await;
        self.nodes[i] = Some(running);
    }

    pub async fn stop_all(mut self) {
        for i in 0..self.nodes.len() {
            if self.nodes[i].is_some() {
                self.stop(i).await;
            }
        }
    }

    pub async fn until<T>(&self, what: &str, condition: impl AsyncFn(&Cluster) -> Option<T>) -> T {
        let wait = async {
            loop {
                if let Some(found) = condition(self).await {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        match tokio::time::timeout(HANG, wait).await {
            Ok(found) => found,
            Err(_) => {
                for (i, node) in self.running() {
                    eprintln!("node {i}: {:?}\n  jobs {:?}", node.health(), node.all_jobs());
                }
                panic!("waited in vain for {what}")
            }
        }
    }

    pub async fn all_ready(&self) {
        self.until("readiness", async |c| c.running().all(|(_, n)| n.is_ready().is_ok()).then_some(())).await;
    }

    pub async fn leader(&self) -> usize {
        self.until("a leader with a quorum", async |c| {
            c.running().find(|(_, n)| n.is_leader_with_quorum()).map(|(i, _)| i)
        })
        .await
    }

    pub fn endpoint(&self, i: usize) -> Endpoint {
        Endpoint::parse(&self.peers[i].http).unwrap()
    }

    pub async fn call(&self, i: usize, call: &Call) -> Answer {
        Client::new(self.endpoint(i)).call(call, HANG).await.expect("an answer")
    }

    pub async fn post(&self, i: usize, path: &str, body: Value) -> Answer {
        self.call(i, &Call::post(path, body.to_string())).await
    }

    pub async fn get(&self, i: usize, path: &str) -> Answer {
        self.call(i, &Call::get(path)).await
    }

    /// The job or plan that an order to a node answers.
    pub async fn order(&self, i: usize, path: &str, body: Value) -> Value {
        let answer = self.post(i, path, body).await;
        assert!(answer.is_success(), "{path}: {}", answer.describe());
        answer.json().unwrap()
    }

    /// The problem with which it is refused: its kind and its text.
    pub async fn refused(&self, i: usize, path: &str, body: Value) -> (String, String) {
        let answer = self.post(i, path, body).await;
        assert!(!answer.is_success(), "{path}: {}", String::from_utf8_lossy(&answer.body));
        let problem = answer.problem();
        (problem.kind.trim_start_matches("/problems/").to_owned(), problem.detail)
    }

    /// The problem with which the cancellation of a job is refused.
    pub async fn cancelled(&self, i: usize, id: &str) -> (String, String) {
        let answer = self.call(i, &Call::delete(format!("/v1/admin/jobs/{id}"))).await;
        assert!(!answer.is_success(), "{}", String::from_utf8_lossy(&answer.body));
        let problem = answer.problem();
        (problem.kind.trim_start_matches("/problems/").to_owned(), problem.detail)
    }

    /// Writes once through a node, without a key; the name of the node that led.
    pub async fn write(&self, i: usize, predicate: &str) -> String {
        let body = json!({"concept_path": "test/flows", "predicate": predicate, "value": 1});
        let answer = self.post(i, "/v1/assert", body).await;
        assert!(answer.is_success(), "{}", answer.describe());
        answer.header("x-stemedb-served-by").unwrap_or_default().to_owned()
    }

    /// How many assertions each running node holds, once all of them say the same.
    pub async fn count(&self, i: usize) -> usize {
        let answer = self.get(i, "/v1/query?concept_path=test/flows&resolve=all&limit=1000").await;
        assert!(answer.is_success(), "{}", answer.describe());
        let page: Value = answer.json().unwrap();
        page["assertions"].as_array().unwrap().len()
    }
}

/// Closed-loop clients that go only to nodes whose readiness they have seen, as a load balancer has it.
pub struct Clients {
    pub load: Arc<Load>,
    tasks: Vec<JoinHandle<Result<(), String>>>,
    prober: JoinHandle<()>,
}

impl Clients {
    pub fn start(cluster: &Cluster, clients: u32) -> Clients {
        let endpoints: Vec<Endpoint> = (0..cluster.peers.len()).map(|i| cluster.endpoint(i)).collect();
        let load = Load::new(endpoints.clone(), 64, 7);
        let tasks = (0..clients).map(|n| tokio::spawn(drill_load::client(Arc::clone(&load), n))).collect();
        let prober = tokio::spawn(probe(Arc::clone(&load), endpoints));
        Clients { load, tasks, prober }
    }

    pub fn sees(&self, i: usize) -> bool {
        self.load.up[i].load(std::sync::atomic::Ordering::Acquire)
    }

    pub fn operations(&self) -> u64 {
        self.load.operations.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Waits until the clients have seen that a node is or is not ready, and each has ended what it was in.
    pub async fn have_noticed(&self, cluster: &Cluster, i: usize, ready: bool) {
        cluster.until("the load balancer", async |_| (self.sees(i) == ready).then_some(())).await;
        let goal = self.operations() + 4 * self.tasks.len() as u64;
        cluster.until("operations", async |_| (self.operations() >= goal).then_some(())).await;
    }

    /// Ends them. Not one attempt may have failed, and the judge must be content.
    pub async fn finish(self, cluster: &Cluster) -> History {
        self.load.stop();
        for task in self.tasks {
            tokio::time::timeout(HANG, task).await.expect("a client to end").unwrap().unwrap();
        }
        self.prober.abort();
        let history = self.load.recorder.history();
        let lost: Vec<_> =
            history.writes.iter().filter(|w| !matches!(w.outcome, WriteOutcome::Acknowledged { .. })).collect();
        assert!(lost.is_empty(), "{} failed writes: {:?}", lost.len(), lost.first());
        let unread: Vec<_> =
            history.reads.iter().filter(|r| !matches!(r.outcome, ReadOutcome::Answered { .. })).collect();
        assert!(unread.is_empty(), "{} failed reads: {:?}", unread.len(), unread.first());
        let mut listings = Vec::new();
        for (i, _) in cluster.running() {
            listings.push(drill_load::list_node(&self.load, i).await.unwrap());
        }
        let verdict = check(&history, &listings);
        assert!(verdict.is_clean(), "{verdict}");
        history
    }
}

/// Asks every node for its readiness, again and again, and tells the clients.
async fn probe(load: Arc<Load>, endpoints: Vec<Endpoint>) {
    let mut clients: Vec<Client> = endpoints.into_iter().map(Client::new).collect();
    loop {
        for (i, client) in clients.iter_mut().enumerate() {
            let answer = client.call(&Call::get("/v1/health/ready"), HANG).await;
            load.set_up(i, answer.is_ok_and(|answer| answer.is_success()));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
