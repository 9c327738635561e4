//! Nodes of which some form a cluster and others come later, each of which can be stopped and started alone.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use stemedb::{
    api,
    cli::{
        drill_load::{self, Load},
        http_client::{Answer, Call, Client, Endpoint},
    },
    config::{MemberRole, PeerEntry},
    judge::{ReadOutcome, WriteOutcome, check},
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
pub const HANG: Duration = Duration::from_secs(120);

pub const MEMBERS: &str = "/v1/admin/members";

/// As many nodes as two cores serve without elections by overload: one cluster at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

struct Running {
    node: Arc<Node>,
    stop_http: CancellationToken,
    serving: JoinHandle<io::Result<()>>,
}

/// A place for a node.
struct Seat {
    peer: PeerEntry,
    /// Name of its folder: another than that of the node where two go by one name.
    folder: String,
    /// The list in its configuration.
    lists: Vec<PeerEntry>,
    role: MemberRole,
    disk: SimDisk,
    running: Option<Running>,
}

pub struct Cluster {
    dir: tempfile::TempDir,
    seats: Vec<Seat>,
    _alone: MutexGuard<'static, ()>,
}

impl Cluster {
    /// `size` members that are ready, with a leader.
    pub async fn new(size: usize) -> Cluster {
        cluster_rig::log_if_wanted();
        let alone = ONE_AT_A_TIME.lock().await;
        let (lists, listeners) = cluster_rig::nodes(size).await;
        let mut cluster = Cluster { dir: tempfile::tempdir().unwrap(), seats: vec![], _alone: alone };
        for (peer, (peer_listener, http)) in lists.clone().into_iter().zip(listeners) {
            let (lists, role) = (lists.clone(), MemberRole::Voter);
            let folder = peer.name.clone();
            cluster.seats.push(Seat { peer, folder, lists, role, disk: SimDisk::new(), running: None });
            cluster.start(cluster.seats.len() - 1, peer_listener, http).await;
        }
        cluster.all_ready().await;
        cluster.leader().await;
        cluster
    }

    /// A node with an empty folder whose configuration lists the nodes there are and itself.
    pub async fn spare(&mut self, name: &str, role: MemberRole) -> usize {
        self.spare_with(name, role, |_| {}).await
    }

    /// The same with something in its folder.
    pub async fn spare_with(&mut self, name: &str, role: MemberRole, prepare: impl FnOnce(&Path)) -> usize {
        self.spare_in(name, name, role, prepare).await
    }

    /// The same in a folder of another name, for a node that goes by the name of one that there is.
    pub async fn spare_in(&mut self, folder: &str, name: &str, role: MemberRole, prepare: impl FnOnce(&Path)) -> usize {
        let (mut peers, mut listeners) = cluster_rig::nodes(1).await;
        let (peer, (peer_listener, http)) = (peers.remove(0), listeners.remove(0));
        let peer = PeerEntry { name: name.to_owned(), ..peer };
        let others = self.seats.iter().map(|seat| &seat.peer).filter(|other| other.name != name);
        let lists: Vec<PeerEntry> = others.chain([&peer]).cloned().collect();
        self.seats.push(Seat { peer, folder: folder.to_owned(), lists, role, disk: SimDisk::new(), running: None });
        let i = self.seats.len() - 1;
        prepare(&self.folder(i));
        self.start(i, peer_listener, http).await;
        i
    }

    pub fn folder(&self, i: usize) -> PathBuf {
        self.dir.path().join(&self.seats[i].folder)
    }

    pub fn name(&self, i: usize) -> &str {
        &self.seats[i].peer.name
    }

    pub fn peer(&self, i: usize) -> &PeerEntry {
        &self.seats[i].peer
    }

    pub fn disk(&self, i: usize) -> &SimDisk {
        &self.seats[i].disk
    }

    pub fn size(&self) -> usize {
        self.seats.len()
    }

    async fn start(&mut self, i: usize, peer: TcpListener, http: TcpListener) {
        let seat = &self.seats[i];
        let place = seat.lists.iter().position(|peer| peer.name == seat.peer.name).unwrap();
        let mut config = cluster_rig::config(&seat.lists, place, self.dir.path());
        config.node.data_dir = self.folder(i);
        // What becomes of a failed voter is for `tests/rebuild`; a learner has no permit to ask for.
        config.cluster.auto_rebuild = seat.role == MemberRole::Learner;
        config.cluster.role = seat.role;
        config.wal.retain_mb = 1;
        // A disk that hangs in a test lags, and nothing else, however slow the machine is.
        config.cluster.stall_handoff_ms = 300_000;
        config.cluster.stop_deadline_ms = 60_000;
        // Nobody polls here: what has to notice is waited for.
        config.cluster.drain_notice_ms = 50;
        let ground = Ground { peer_listener: Some(peer), disk: seat.disk.shared(), ..Ground::default() };
        let node = Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await.unwrap();
        let stop_http = CancellationToken::new();
        let serving = tokio::spawn(api::serve(http, Arc::clone(&node), stop_http.clone()));
        self.seats[i].running = Some(Running { node, stop_http, serving });
    }

    pub fn node(&self, i: usize) -> &Arc<Node> {
        &self.seats[i].running.as_ref().expect("a running node").node
    }

    pub fn running(&self) -> impl Iterator<Item = (usize, &Arc<Node>)> {
        self.seats.iter().enumerate().filter_map(|(i, seat)| Some((i, &seat.running.as_ref()?.node)))
    }

    /// Stops a node without any notice.
    pub async fn stop(&mut self, i: usize) {
        let Running { node, stop_http, serving } = self.seats[i].running.take().expect("a running node");
        stop_http.cancel();
        node.shutdown().await;
        serving.await.unwrap().unwrap();
    }

    pub async fn restart(&mut self, i: usize) {
        let peer = TcpListener::bind(&self.seats[i].peer.addr).await.unwrap();
        let http = TcpListener::bind(&self.seats[i].peer.http).await.unwrap();
        self.start(i, peer, http).await;
    }

    /// Takes everything away that a stopped node has.
    pub fn empty(&mut self, i: usize) {
        assert!(self.seats[i].running.is_none());
        std::fs::remove_dir_all(self.folder(i)).unwrap();
        self.seats[i].disk = SimDisk::new();
    }

    pub async fn stop_all(mut self) {
        for i in 0..self.seats.len() {
            if self.seats[i].running.is_some() {
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
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        match tokio::time::timeout(HANG, wait).await {
            Ok(found) => found,
            Err(_) => {
                for (i, node) in self.running() {
                    eprintln!(
                        "node {i}: {:?}\n  jobs {:?}\n  {:?}",
                        node.health(),
                        node.all_jobs(),
                        node.cluster_jobs().await
                    );
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

    /// Waits until each of these nodes is ready and names exactly these voters.
    pub async fn voters(&self, wanted: &[usize]) {
        let names: Vec<&str> = wanted.iter().map(|i| self.name(*i)).collect();
        self.until(&format!("the voters {names:?}"), async |c| {
            for i in wanted {
                let members = c.node(*i).cluster().await.members;
                let mut voters: Vec<&str> = members.iter().filter(|m| m.voter).map(|m| &*m.name).collect();
                voters.sort_unstable();
                let mut names = names.clone();
                names.sort_unstable();
                if voters != names || c.node(*i).is_ready().is_err() {
                    return None;
                }
            }
            Some(())
        })
        .await;
    }

    pub fn endpoint(&self, i: usize) -> Endpoint {
        Endpoint::parse(&self.seats[i].peer.http).unwrap()
    }

    pub async fn call(&self, i: usize, call: &Call) -> Answer {
        Client::new(self.endpoint(i)).call(call, HANG).await.expect("an answer")
    }

    pub async fn get(&self, i: usize, path: &str) -> Answer {
        self.call(i, &Call::get(path)).await
    }

    /// An order that is taken: its job or plan.
    pub async fn taken(&self, i: usize, call: Call) -> Value {
        let answer = self.call(i, &call).await;
        assert!(answer.is_success(), "{}", answer.describe());
        answer.json().unwrap()
    }

    /// An order that is refused: the kind of the problem and its text.
    pub async fn refused(&self, i: usize, call: Call) -> (String, String) {
        let answer = self.call(i, &call).await;
        assert!(!answer.is_success(), "{}", String::from_utf8_lossy(&answer.body));
        let problem = answer.problem();
        (problem.kind.trim_start_matches("/problems/").to_owned(), problem.detail)
    }

    pub fn add(&self, i: usize, more: &str) -> Call {
        let PeerEntry { name, addr, .. } = self.peer(i);
        Call::post(format!("{MEMBERS}{more}"), json!({"name": name, "addr": addr}).to_string())
    }

    pub fn replace(&self, old: usize, new: usize, more: &str) -> Call {
        let PeerEntry { name, addr, .. } = self.peer(new);
        let path = format!("{MEMBERS}/{}/replace{more}", self.name(old));
        Call::post(path, json!({"name": name, "addr": addr}).to_string())
    }

    pub fn remove(&self, i: usize, more: &str) -> Call {
        Call::delete(format!("{MEMBERS}/{}{more}", self.name(i)))
    }

    /// The job as a node shows it.
    pub async fn job(&self, i: usize, id: &str) -> Option<Value> {
        let answer = self.get(i, &format!("/v1/admin/jobs/{id}")).await;
        answer.is_success().then(|| answer.json().unwrap())
    }

    /// Waits until a node shows that the job has ended so.
    pub async fn ended(&self, i: usize, id: &str, state: &str) -> Value {
        self.until(&format!("job {id} to be {state} at {}", self.name(i)), async |c| {
            let job = c.job(i, id).await?;
            (job["state"] == state).then_some(job)
        })
        .await
    }

    /// Writes once through a node.
    pub async fn write(&self, i: usize, predicate: &str) {
        let body = json!({"concept_path": "test/members", "predicate": predicate, "value": 1});
        let answer = self.call(i, &Call::post("/v1/assert", body.to_string())).await;
        assert!(answer.is_success(), "{}", answer.describe());
    }

    /// How many assertions a node shows.
    pub async fn count(&self, i: usize) -> usize {
        let answer = self.get(i, "/v1/query?concept_path=test/members&resolve=all&limit=1000").await;
        assert!(answer.is_success(), "{}", answer.describe());
        let page: Value = answer.json().unwrap();
        page["assertions"].as_array().unwrap().len()
    }
}

/// Closed-loop clients that go only to nodes whose readiness they have seen, as a load balancer has it.
pub struct Clients {
    load: Arc<Load>,
    tasks: Vec<JoinHandle<Result<(), String>>>,
    prober: JoinHandle<()>,
}

impl Clients {
    pub fn start(cluster: &Cluster, clients: u32) -> Clients {
        let endpoints: Vec<Endpoint> = (0..cluster.size()).map(|i| cluster.endpoint(i)).collect();
        let load = Load::new(endpoints.clone(), 64, 7);
        for i in 0..cluster.size() {
            load.set_up(i, cluster.running().any(|(n, node)| n == i && node.is_ready().is_ok()));
        }
        let tasks = (0..clients).map(|n| tokio::spawn(drill_load::client(Arc::clone(&load), n))).collect();
        let prober = tokio::spawn(probe(Arc::clone(&load), endpoints));
        Clients { load, tasks, prober }
    }

    /// Waits for more operations.
    pub async fn go_on(&self, cluster: &Cluster, more: u64) {
        let done = || self.load.operations.load(std::sync::atomic::Ordering::Relaxed);
        let goal = done() + more;
        cluster.until("operations", async |_| (done() >= goal).then_some(())).await;
    }

    /// Ends them. Not one operation may have failed, and the judge must be content with what `nodes` list.
    pub async fn finish(self, cluster: &Cluster, nodes: &[usize]) {
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
        for i in nodes {
            assert!(cluster.node(*i).is_ready().is_ok());
            listings.push(drill_load::list_node(&self.load, *i).await.unwrap());
        }
        let verdict = check(&history, &listings);
        assert!(verdict.is_clean(), "{verdict}");
    }
}

/// Asks every node for its readiness, again and again, and tells the clients.
async fn probe(load: Arc<Load>, endpoints: Vec<Endpoint>) {
    let mut clients: Vec<Client> = endpoints.into_iter().map(Client::new).collect();
    loop {
        for (i, client) in clients.iter_mut().enumerate() {
            let answer = client.call(&Call::get("/v1/health/ready"), Duration::from_secs(2)).await;
            load.set_up(i, answer.is_ok_and(|answer| answer.is_success()));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
