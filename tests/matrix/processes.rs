//! Cells with real processes, on the machine's file system or each on a faulty disk of its own.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use stemedb::cli::faulty_disk::FaultyDisk;
use stemedb::cli::faulty_disk::wire::{Failure, Held};
use stemedb::cli::http_client::{Client, Endpoint};
use stemedb::cli::local_cluster::{LocalCluster, free_port, plan};
use stemedb::cli::status::{self, NodeHealth};

use super::load::{Running, until};
use super::table::{Act, Ground, Outcome, Victim};
use crate::rig;

const DISK_MB: u64 = 1024;

struct Cluster {
    // Dropped in this order: processes, disks, folder.
    processes: LocalCluster,
    disks: Vec<FaultyDisk>,
    _dir: tempfile::TempDir,
    endpoints: Vec<Endpoint>,
    up: Vec<usize>,
}

/// `None`, said on the way, where this machine has no such ground.
async fn cluster(ground: Ground) -> Option<Cluster> {
    let helper = if ground == Ground::Kernel { Some(rig::faulty_disk_program()?) } else { None };
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = plan(&dir.path().join("data"), 3, free_port(3).unwrap()).unwrap();
    let mut disks = Vec::new();
    for node in &mut nodes {
        node.log = dir.path().join(format!("{}.log", node.name));
        if let Some(helper) = &helper {
            let own = dir.path().join(format!("disk-of-{}", node.name));
            disks.push(FaultyDisk::start(helper, &own, &node.dir, DISK_MB).unwrap());
        }
    }
    let endpoints = nodes.iter().map(|node| node.endpoint().unwrap()).collect();
    let program = PathBuf::from(env!("CARGO_BIN_EXE_stemedb"));
    let mut processes = LocalCluster::prepare_with(program, nodes).unwrap();
    for node in processes.plan() {
        // Other tests run beside this one: elections by overload are not what is looked for.
        let text = std::fs::read_to_string(node.config_file()).unwrap();
        let patient = "\nheartbeat_ms = 100\nelection_min_ms = 600\nelection_max_ms = 1200\nbootstrap_expect";
        std::fs::write(node.config_file(), text.replacen("\nbootstrap_expect", patient, 1)).unwrap();
    }
    processes.start_all().unwrap();
    processes.wait_ready(rig::HANG).await.unwrap();
    Some(Cluster { processes, disks, _dir: dir, endpoints, up: vec![0, 1, 2] })
}

impl Cluster {
    async fn health(&self, i: usize) -> Option<NodeHealth> {
        let mut client = Client::new(self.endpoints[i].clone());
        status::health(&mut client, Duration::from_secs(1)).await.ok()
    }

    async fn leader(&self, except: Option<usize>) -> usize {
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
    let mut cluster = cluster(ground).await?;
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

async fn act_out(
    act: Act,
    cluster: &mut Cluster,
    running: &Running,
    i: usize,
    victim: Victim,
) -> Result<String, String> {
    match act {
        Act::Kill => {
            running.load.set_up(i, false);
            cluster.processes.kill(i).await.unwrap();
            running.more().await;
            cluster.processes.start(i).unwrap();
            cluster.processes.wait_ready(rig::HANG).await.unwrap();
            running.load.set_up(i, true);
            Ok("comes back with everything".to_owned())
        }
        Act::Freeze => {
            let pid = cluster.processes.pid(i).unwrap();
            rig::freeze(pid);
            if victim == Victim::Leader {
                cluster.leader(Some(i)).await;
            }
            running.more().await;
            cluster.processes.signal(i, Signal::CONT).unwrap();
            until("it answers again", async || cluster.health(i).await.is_some()).await;
            cluster.processes.wait_ready(rig::HANG).await.unwrap();
            Ok("goes on, and knows that the others went on without it".to_owned())
        }
        Act::ReadOnly => {
            // The journal cannot be written any more, and ext4 stops writing.
            cluster.disks[i].fail_syncs(Failure::Eio, None).unwrap();
            let failed =
                async |cluster: &Cluster| cluster.health(i).await.is_some_and(|health| health.status == "failed");
            until("the failure is known", async || failed(cluster).await).await;
            cluster.leader(Some(i)).await;
            running.more().await;
            let health = cluster.health(i).await.ok_or("the failed node does not answer")?;
            if health.role == "leader" {
                return Err("the failed node leads".to_owned());
            }
            Ok("failed, and goes on as a proxy; another node leads".to_owned())
        }
        other => Err(format!("{other:?} needs no process")),
    }
}
