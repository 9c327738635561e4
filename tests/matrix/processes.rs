//! The ground of cells with real processes: on the machine's file system, each on a faulty disk of its own, or each on
//! a small one.

use std::path::PathBuf;
use std::time::Duration;

use stemedb::cli::faulty_disk::FaultyDisk;
use stemedb::cli::faulty_disk::wire::Held;
use stemedb::cli::http_client::{Client, Endpoint};
use stemedb::cli::local_cluster::{LocalCluster, free_port, plan};
use stemedb::cli::status::{self, NodeHealth};

use super::load::Running;
use super::process_acts::act_out;
use super::table::{Act, Ground, Outcome, Victim};
use crate::rig::{self, SmallDisk};

const DISK_MB: u64 = 1024;

/// Low water is a quarter of it; the log and the tree of an empty node take less than 4 MiB.
const SMALL_BYTES: u64 = 48 << 20;
const SMALL_INODES: u64 = 400;

pub struct Cluster {
    // Dropped in this order: processes, disks, folder.
    pub processes: LocalCluster,
    pub disks: Vec<FaultyDisk>,
    pub small: Vec<SmallDisk>,
    pub dir: tempfile::TempDir,
    pub endpoints: Vec<Endpoint>,
    pub up: Vec<usize>,
}

/// `None`, said on the way, where this machine has no such ground.
async fn cluster(ground: Ground, act: Act) -> Option<Cluster> {
    let helper = if ground == Ground::Kernel { Some(rig::faulty_disk_program()?) } else { None };
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = plan(&dir.path().join("data"), 3, free_port(3).unwrap()).unwrap();
    let (mut disks, mut small) = (Vec::new(), Vec::new());
    for node in &mut nodes {
        node.log = dir.path().join(format!("{}.log", node.name));
        if let Some(helper) = &helper {
            let own = dir.path().join(format!("disk-of-{}", node.name));
            disks.push(FaultyDisk::start(helper, &own, &node.dir, DISK_MB).unwrap());
        }
        if ground == Ground::Small {
            small.push(SmallDisk::new(SMALL_BYTES, SMALL_INODES)?);
            node.dir = small.last().unwrap().path().to_owned();
        }
        if matches!(act, Act::TreeFails(_)) {
            // The log lies elsewhere: what fails on this disk is the tree.
            let elsewhere = dir.path().join(format!("log-of-{}", node.name));
            std::fs::create_dir(&elsewhere).unwrap();
            std::os::unix::fs::symlink(elsewhere, node.dir.join("wal")).unwrap();
        }
    }
    let endpoints = nodes.iter().map(|node| node.endpoint().unwrap()).collect();
    let program = PathBuf::from(env!("CARGO_BIN_EXE_stemedb"));
    let mut processes = LocalCluster::prepare_with(program, nodes).unwrap();
    for node in processes.plan() {
        let text = std::fs::read_to_string(node.config_file()).unwrap();
        std::fs::write(node.config_file(), tuned(&text, act)).unwrap();
    }
    for i in 0..3 {
        processes.set_node_env(i, "STEMEDB_TEST_FAIL_FILE", fail_file(&dir, i));
    }
    processes.start_all().unwrap();
    processes.wait_ready(rig::HANG).await.unwrap();
    Some(Cluster { processes, disks, small, dir, endpoints, up: vec![0, 1, 2] })
}

/// The configuration of a node in these cells.
fn tuned(text: &str, act: Act) -> String {
    // A node that has failed is looked at as such.
    let looked_at = matches!(act, Act::ReadOnly | Act::TreeFails(_) | Act::BlockFails(_) | Act::RestartAndEviction);
    let rebuilds = !looked_at;
    // A busy machine is not a hanging disk, except where one hangs.
    let (handoff, fence) = match act {
        Act::Hang => (1_000, 4_000),
        Act::HangsFor(..) | Act::ReadsHang => (500, 60_000),
        _ => (60_000, 600_000),
    };
    // Other tests run beside this one: elections by overload are not what is looked for.
    let cluster = format!(
        "\nheartbeat_ms = 100\nelection_min_ms = 600\nelection_max_ms = 1200\nrequest_deadline_ms = 30000\n\
         stall_handoff_ms = {handoff}\nstall_fence_ms = {fence}\nauto_rebuild = {rebuilds}\nbootstrap_expect"
    );
    // Where a checkpoint is waited for, it is due soon.
    let retain = if matches!(act, Act::TreeFails(_)) { "retain_mb = 16\n" } else { "" };
    let storage = format!("\n[wal]\nsegment_size_mb = 1\n{retain}\n[storage]\nmemtable_mb = 1\n");
    text.replacen("\nbootstrap_expect", &cluster, 1).replacen("\n[storage]\n", &storage, 1).replacen(
        "ballast_mb = 16",
        "ballast_mb = 0",
        1,
    )
}

/// A node of the cells ends at the point that this file names, once there is such a file.
fn fail_file(dir: &tempfile::TempDir, i: usize) -> PathBuf {
    dir.path().join(format!("fail-{i}"))
}

impl Cluster {
    /// See `stemedb_raft::fail_point`.
    pub fn fail_file(&self, i: usize) -> PathBuf {
        fail_file(&self.dir, i)
    }

    pub async fn health(&self, i: usize) -> Option<NodeHealth> {
        let mut client = Client::new(self.endpoints[i].clone());
        status::health(&mut client, Duration::from_secs(1)).await.ok()
    }

    /// Whether what a node says of itself fits.
    pub async fn says(&self, i: usize, fits: impl Fn(&NodeHealth) -> bool) -> bool {
        self.health(i).await.is_some_and(|health| fits(&health))
    }

    pub async fn leader(&self, except: Option<usize>) -> usize {
        let mut last = Vec::new();
        let wait = async {
            loop {
                last.clear();
                for i in self.up.iter().copied().filter(|i| Some(*i) != except) {
                    let health = self.health(i).await;
                    if health.as_ref().is_some_and(|health| health.role == "leader") {
                        return i;
                    }
                    last.push(health);
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let found = tokio::time::timeout(rig::HANG, wait).await;
        found.unwrap_or_else(|_| panic!("waited in vain for a leader: {last:#?}"))
    }
}

pub async fn run(ground: Ground, act: Act, victim: Victim, seed: u64) -> Option<Outcome> {
    let mut cluster = cluster(ground, act).await?;
    let addresses: Vec<String> = cluster.endpoints.iter().map(|endpoint| endpoint.authority().to_owned()).collect();
    let running = Running::start(&addresses, seed);
    running.more().await;
    let leader = cluster.leader(None).await;
    let i = if victim == Victim::Leader { leader } else { (leader + 1) % 3 };
    let seen = act_out(act, &mut cluster, &running, i, victim).await;
    running.more().await;
    let outcome = running.judge(&cluster.up, seen).await;
    for disk in &cluster.disks {
        disk.clear(Held::Done).unwrap();
    }
    cluster.processes.stop_all().await.unwrap();
    Some(outcome)
}
