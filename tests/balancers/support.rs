//! A cluster behind a load balancer, clients that know nothing but its address, and the judge.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use stemedb::{
    cli::{
        CliError,
        balancer::{Balancer, Kind},
        drill_load::{self, Load},
        flow_client::{self, Job},
        http_client::{Answer, Call, Client, Endpoint},
        local_cluster::{LocalCluster, free_port, plan},
    },
    judge::{FindingKind, History, ReadOutcome, WriteOutcome, check},
};
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinHandle,
};

/// Far above what any condition needs; only a hang ends a test by this.
pub const HANG: Duration = Duration::from_secs(120);

/// Below the blocks that `free_port` looks through, one for each cluster of this process.
static NEXT_PORT: AtomicU16 = AtomicU16::new(0);

static NEXT_SEED: AtomicU64 = AtomicU64::new(0);

/// Three nodes and a balancer are as much as two cores serve: one cluster at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Whether the counts are those of the whole thing.
pub fn is_full() -> bool {
    std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1")
}

/// Waits until no other cluster of this process runs.
pub async fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().await
}

/// Says that a test does not run, and why; where nothing may be skipped, fails it.
fn skipped(why: &str) {
    println!("SKIPPED: {why}");
    let may_not = std::env::var_os("STEMEDB_TEST_NO_SKIPS").is_some_and(|value| value == "1");
    assert!(!may_not, "nothing may be skipped here: {why}");
}

/// The program of a balancer; `None`, said on the way, where there is none.
pub fn program(kind: Kind) -> Option<PathBuf> {
    let given = std::env::var_os("STEMEDB_TEST_ENVOY").filter(|_| kind == Kind::Envoy).map(PathBuf::from);
    match kind.find(given.as_deref()) {
        Ok(program) => Some(program),
        Err(error) => {
            skipped(&error.to_string());
            None
        }
    }
}

/// A port for the balancer that nobody listens on now.
fn balancer_port() -> u16 {
    let start = 19_000 + u16::try_from(std::process::id() % 500).unwrap();
    loop {
        let port = start + NEXT_PORT.fetch_add(1, Ordering::Relaxed);
        assert!(port < 20_000, "no free port for the balancer");
        if std::net::TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
}

pub struct Behind {
    pub processes: LocalCluster,
    pub balancer: Balancer,
    dir: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Behind {
    /// Three nodes that are ready, and the balancer before them; `None`, said on the way, where there is no such program.
    pub async fn start(kind: Kind) -> Option<Behind> {
        Self::start_program(kind, Path::new(env!("CARGO_BIN_EXE_stemedb"))).await
    }

    /// The same with another program for the nodes.
    pub async fn start_program(kind: Kind, nodes_run: &Path) -> Option<Behind> {
        let program = program(kind)?;
        let alone = alone().await;
        let dir = tempfile::tempdir().unwrap();
        let mut nodes = plan(&dir.path().join("data"), 3, free_port(3).unwrap()).unwrap();
        for node in &mut nodes {
            node.log = dir.path().join(format!("{}.log", node.name));
        }
        let mut processes = LocalCluster::prepare_with(nodes_run.to_owned(), nodes).unwrap();
        for (name, value) in [
            // What a balancer must notice is noticed within half of the default time: four probes of Envoy's.
            ("STEMEDB_CLUSTER_DRAIN_NOTICE_MS", "1000"),
            // Elections by overload are not what is tested here, nor are slow disks.
            ("STEMEDB_CLUSTER_HEARTBEAT_MS", "100"),
            ("STEMEDB_CLUSTER_ELECTION_MIN_MS", "600"),
            ("STEMEDB_CLUSTER_ELECTION_MAX_MS", "1200"),
            ("STEMEDB_CLUSTER_STALL_HANDOFF_MS", "60000"),
            ("STEMEDB_CLUSTER_STALL_FENCE_MS", "600000"),
            ("STEMEDB_CLUSTER_AUTO_REBUILD", "false"),
            ("STEMEDB_STORAGE_BALLAST_MB", "0"),
        ] {
            processes.set_env(name, value);
        }
        for i in 0..3 {
            let file = dir.path().join(format!("fail-{i}"));
            processes.set_node_env(i, "STEMEDB_TEST_FAIL_FILE", file);
        }
        processes.start_all().unwrap();
        processes.wait_ready(HANG).await.unwrap();
        let ports: Vec<u16> = processes.plan().iter().map(|node| node.http_port).collect();
        let (port, folder) = (balancer_port(), dir.path().join("balancer"));
        let balancer = Balancer::start(kind, &program, &folder, port, [ports[0], ports[1], ports[2]]).await.unwrap();
        Some(Behind { processes, balancer, dir, _alone: alone })
    }

    pub fn endpoints(&self) -> Vec<Endpoint> {
        self.processes.plan().iter().map(|node| node.endpoint().unwrap()).collect()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn name(&self, i: usize) -> &str {
        &self.processes.plan()[i].name
    }

    /// A client of the balancer.
    pub fn client(&self) -> Client {
        Client::new(self.balancer.endpoint().clone())
    }

    /// Asks through the balancer.
    pub async fn call(&self, call: &Call) -> Answer {
        self.client().call(call, HANG).await.unwrap_or_else(|error| panic!("{call:?}: {error}\n{}", self.log()))
    }

    /// What the balancer printed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.balancer.log()).unwrap_or_default()
    }

    pub fn node_log(&self, i: usize) -> String {
        std::fs::read_to_string(self.processes.plan()[i].log_file()).unwrap_or_default()
    }

    /// The node that says it leads, as the others see it too.
    pub async fn leader(&self) -> usize {
        self.until("a leader", async |behind: &Behind| {
            let mut leader = None;
            for (i, endpoint) in behind.endpoints().into_iter().enumerate() {
                let health: Value = Client::new(endpoint).get_json("/v1/health", HANG).await.ok()?;
                if health["role"] == "leader" {
                    leader = Some(i);
                }
            }
            leader
        })
        .await
    }

    /// Waits until there is something.
    pub async fn until<T>(&self, what: &str, condition: impl AsyncFn(&Behind) -> Option<T>) -> T {
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
            Err(_) => panic!("waited in vain for {what}\n{}", self.log()),
        }
    }

    /// Orders a flow about one node from another one, again as long as a node that has just come back is not fit for it,
    /// and waits for its end.
    pub async fn order(&self, flow: &str, node: usize) -> Job {
        let others = vec![self.endpoints()[(node + 1) % 3].clone()];
        let call = Call::post(format!("/v1/admin/node/{flow}?node={}", self.name(node)), "");
        let what = format!("{flow} of {} to be taken", self.name(node));
        let taken = self.until(&what, async |_| match flow_client::order(&others, &call).await {
            Err(CliError::Refused(_)) => None,
            taken => Some(taken.unwrap()),
        });
        let (client, answer) = taken.await;
        let job = flow_client::follow(client, &others, &answer, true).await.unwrap();
        assert_eq!(job.state, "finished", "{job:?}");
        job
    }

    /// Ends a node's process when it passes `point`, see `stemedb_raft::fail_point`.
    pub fn arm(&self, i: usize, point: &str) {
        // Renamed into place: a point that is read in the middle is none.
        let new = self.dir.path().join("fail.new");
        std::fs::write(&new, point).unwrap();
        std::fs::rename(new, self.dir.path().join(format!("fail-{i}"))).unwrap();
    }

    pub fn disarm(&self, i: usize) {
        std::fs::remove_file(self.dir.path().join(format!("fail-{i}"))).unwrap();
    }

    /// Nothing is looked at any more: nobody has to be taken out of traffic first.
    pub async fn stop(mut self) {
        self.balancer.stop().await.unwrap();
        for i in 0..3 {
            if self.processes.pid(i).is_some() {
                self.processes.kill(i).await.unwrap();
            }
        }
    }
}

/// Closed-loop clients without keys and without second attempts, seven writes to one read.
pub struct Clients {
    pub load: Arc<Load>,
    tasks: Vec<JoinHandle<Result<(), String>>>,
}

impl Clients {
    pub fn start(behind: &Behind, clients: u32) -> Clients {
        // Another one for each load of a cluster, whose facts must not meet.
        let seed = NEXT_SEED.fetch_add(1, Ordering::Relaxed);
        let balancer = Some(behind.balancer.endpoint().clone());
        let load = Load::through(balancer, behind.endpoints(), 64, seed);
        let tasks = (0..clients).map(|n| tokio::spawn(drill_load::client(Arc::clone(&load), n))).collect();
        Clients { load, tasks }
    }

    pub fn operations(&self) -> u64 {
        self.load.operations.load(Ordering::Relaxed)
    }

    /// Waits until so many more have ended.
    pub async fn have_done(&self, behind: &Behind, more: u64) {
        let goal = self.operations() + more;
        behind.until("operations of clients", async |_| (self.operations() >= goal).then_some(())).await;
    }

    /// Ends them. Not one request may have failed, nothing may be there twice, and the judge must be content with what
    /// each node lists.
    pub async fn finish(self, behind: &Behind) -> History {
        self.load.stop();
        for task in self.tasks {
            tokio::time::timeout(HANG, task).await.expect("a client to end").unwrap().unwrap();
        }
        let history = self.load.recorder.history();
        let mut listings = Vec::new();
        for i in 0..3 {
            listings.push(drill_load::list_node(&self.load, i).await.unwrap());
        }
        let verdict = check(&history, &listings);
        let lost: Vec<_> =
            history.writes.iter().filter(|w| !matches!(w.outcome, WriteOutcome::Acknowledged { .. })).collect();
        let unread: Vec<_> =
            history.reads.iter().filter(|r| !matches!(r.outcome, ReadOutcome::Answered { .. })).collect();
        assert!(verdict.is_clean(), "{verdict}");
        assert_eq!(verdict.count(FindingKind::Doubled), 0);
        assert!(
            lost.is_empty() && unread.is_empty(),
            "{} of {} writes failed: {lost:?}, {} reads: {unread:?}\n{}",
            lost.len(),
            history.writes.len(),
            unread.len(),
            behind.log()
        );
        // Exact: each node holds what was acknowledged, and nothing else.
        for listing in &listings {
            assert_eq!(listing.facts.len(), history.writes.len(), "node {}", listing.node);
        }
        history
    }
}
