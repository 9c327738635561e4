//! Three nodes in this process, each with its own simulated disk under the log, and clients over HTTP.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use stemedb::{
    api,
    cli::{
        drill_load::{self, Load},
        http_client::{Call, Client, Endpoint},
    },
    config::{Config, PeerEntry},
    judge::{History, Recorder, Verdict, check},
    metrics::Metrics,
    node::{Ground, Node},
};
use stemedb_raft::disk::sim::SimDisk;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cluster_rig;

/// Far above what any condition needs; only a hang ends a test by this.
pub const HANG: Duration = Duration::from_secs(240);

pub struct Cluster {
    _dir: tempfile::TempDir,
    pub peers: Vec<PeerEntry>,
    pub http: Vec<SocketAddr>,
    pub nodes: Vec<Arc<Node>>,
    pub disks: Vec<SimDisk>,
    stop: CancellationToken,
    serving: Vec<JoinHandle<io::Result<()>>>,
}

impl Cluster {
    pub async fn start() -> Cluster {
        Cluster::start_with(|_| {}).await
    }

    /// Three nodes that are ready, with a leader.
    pub async fn start_with(change: impl Fn(&mut Config)) -> Cluster {
        cluster_rig::log_if_wanted();
        let dir = tempfile::tempdir().unwrap();
        let (peers, listeners) = cluster_rig::nodes(3).await;
        let disks: Vec<SimDisk> = (0..3).map(|_| SimDisk::new()).collect();
        let stop = CancellationToken::new();
        let mut cluster = Cluster { _dir: dir, peers, http: vec![], nodes: vec![], disks, stop, serving: vec![] };
        for (i, (peer, http)) in listeners.into_iter().enumerate() {
            let mut config = cluster_rig::config(&cluster.peers, i, cluster._dir.path());
            // Stalls are what some of these tests are about; one that ends in time has all the time it needs.
            config.cluster.stall_handoff_ms = Config::default().cluster.stall_handoff_ms;
            config.cluster.request_deadline_ms = 30_000;
            change(&mut config);
            let ground = Ground { peer_listener: Some(peer), disk: cluster.disks[i].shared(), ..Ground::default() };
            let node = Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await.unwrap();
            cluster.http.push(http.local_addr().unwrap());
            cluster.serving.push(tokio::spawn(api::serve(http, Arc::clone(&node), cluster.stop.clone())));
            cluster.nodes.push(node);
        }
        cluster.until("readiness", || cluster.nodes.iter().all(|n| n.is_ready().is_ok())).await;
        cluster.leader().await;
        cluster
    }

    pub async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        self.until_async(what, async || condition()).await;
    }

    pub async fn until_async(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let wait = async {
            while !condition().await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let healths = || self.nodes.iter().map(|n| format!("{:?}", n.health())).collect::<Vec<_>>().join("\n");
        tokio::time::timeout(HANG, wait).await.unwrap_or_else(|_| panic!("waited in vain for {what}\n{}", healths()));
    }

    pub async fn leader(&self) -> usize {
        self.until("a leader with a quorum", || self.nodes.iter().any(|n| n.is_leader_with_quorum())).await;
        self.nodes.iter().position(|n| n.is_leader_with_quorum()).unwrap_or(0)
    }

    /// Whether another node than this one leads.
    pub fn leads_elsewhere(&self, node: usize) -> bool {
        self.nodes.iter().enumerate().any(|(i, n)| i != node && n.is_leader_with_quorum())
    }

    /// Writes once through a node; the name of the node that led.
    pub async fn write_once(&self, node: usize, predicate: &str) -> String {
        let endpoint = Endpoint::parse(&self.http[node].to_string()).unwrap();
        let body = format!(r#"{{"concept_path":"once/{node}","predicate":"{predicate}","value":1}}"#);
        let call = Call::post("/v1/assert", body);
        let answer = Client::new(endpoint).call(&call, HANG).await.expect("an answer");
        assert!(answer.is_success(), "{}", answer.describe());
        answer.header("x-stemedb-served-by").unwrap_or_default().to_owned()
    }

    /// Closed-loop clients on all three nodes.
    pub fn load(&self, clients: u32) -> Running {
        let endpoints = self.http.iter().map(|addr| Endpoint::parse(&addr.to_string()).unwrap()).collect();
        let load = Load::new(endpoints, 64, 7);
        let clients = (0..clients).map(|n| tokio::spawn(drill_load::client(Arc::clone(&load), n))).collect();
        Running { load, clients: std::sync::Mutex::new(clients) }
    }

    /// Waits until that many more writes were acknowledged.
    pub async fn acknowledged(&self, running: &Running, more: u64) {
        let goal = running.load.recorder.acknowledged() + more;
        self.until("acknowledged writes", || running.load.recorder.acknowledged() >= goal).await;
    }

    pub async fn stop(self) {
        for disk in &self.disks {
            disk.release();
        }
        self.stop.cancel();
        for serving in self.serving {
            serving.await.unwrap().unwrap();
        }
        for node in &self.nodes {
            node.shutdown().await;
        }
    }
}

/// Clients at work.
pub struct Running {
    load: Arc<Load>,
    clients: std::sync::Mutex<Vec<JoinHandle<Result<(), String>>>>,
}

impl Running {
    pub fn recorder(&self) -> &Arc<Recorder> {
        &self.load.recorder
    }

    /// Ends the clients; what they did.
    pub async fn stop(&self) -> History {
        self.load.stop();
        let clients = std::mem::take(&mut *self.clients.lock().unwrap());
        for client in clients {
            tokio::time::timeout(HANG, client).await.expect("a client to end").unwrap().unwrap();
        }
        self.load.recorder.history()
    }

    /// What the judge says of all of it, with what each node answers now.
    pub async fn verdict(&self, cluster: &Cluster) -> Verdict {
        let mut listings = Vec::new();
        for node in 0..cluster.nodes.len() {
            listings.push(drill_load::list_node(&self.load, node).await.unwrap());
        }
        check(&self.load.recorder.history(), &listings)
    }
}
