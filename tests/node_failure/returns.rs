//! A node fails, is retired, rebuilt and comes back, and whoever talks to it all the while notices nothing: not one read
//! and not one write through that node ends with anything but its answer.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use stemedb::{
    cli::http_client::{Call, Client, Endpoint},
    config::Config,
    node::rebuild::desk::JobState,
};
use stemedb_raft::disk::sim::SyncFault;
use tokio::task::JoinHandle;

use crate::cluster::{Cluster, HANG};

/// Readers and writers at one node. Enough that some are under way in every moment of the node's change.
const READERS: usize = 24;
const WRITERS: usize = 4;

/// Clients of one node that take nothing but an answer.
struct Clients {
    stop: Arc<AtomicBool>,
    errors: Arc<Mutex<Vec<String>>>,
    reads: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<()>>,
}

impl Clients {
    fn start(cluster: &Cluster, node: usize) -> Clients {
        let (stop, errors, reads): (Arc<AtomicBool>, Arc<Mutex<Vec<String>>>, Arc<AtomicU64>) = Default::default();
        let endpoint = Endpoint::parse(&cluster.http[node].to_string()).unwrap();
        let one = |number: usize| {
            let (stop, errors, reads) = (Arc::clone(&stop), Arc::clone(&errors), Arc::clone(&reads));
            let mut client = Client::new(endpoint.clone());
            async move {
                let mut written = 0;
                while !stop.load(Ordering::Relaxed) {
                    let is_write = number < WRITERS;
                    let call = if is_write {
                        written += 1;
                        let body = format!(r#"{{"concept_path":"all/{number}","predicate":"p{written}","value":1}}"#);
                        Call::post("/v1/assert", body)
                    } else {
                        Call::get("/v1/query?concept_path=all/**&limit=1".to_owned())
                    };
                    match client.call(&call, HANG).await {
                        Ok(answer) if answer.is_success() => {}
                        Ok(answer) => errors.lock().unwrap().push(answer.describe()),
                        Err(error) => errors.lock().unwrap().push(format!("{error:?}")),
                    }
                    reads.fetch_add(u64::from(!is_write), Ordering::Relaxed);
                }
            }
        };
        let tasks = (0..READERS + WRITERS).map(|number| tokio::spawn(one(number))).collect();
        Clients { stop, errors, reads, tasks }
    }

    /// Waits for that many more reads.
    async fn read(&self, cluster: &Cluster, more: u64) {
        let goal = self.reads.load(Ordering::Relaxed) + more;
        cluster.until("more reads", || self.reads.load(Ordering::Relaxed) >= goal).await;
    }

    /// Ends them; what went wrong.
    async fn finish(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            tokio::time::timeout(HANG, task).await.expect("a client to end").unwrap();
        }
        self.errors.lock().unwrap().clone()
    }
}

fn rebuilds_itself(config: &mut Config) {
    config.cluster.auto_rebuild = true;
    config.cluster.stall_handoff_ms = 60_000;
    // However slow the machine is, a request gets its answer; one that waits for what never comes does not.
    config.cluster.request_deadline_ms = 120_000;
}

/// Three voters that are well, and none of them busy with itself.
async fn all_well(cluster: &Cluster) {
    let well = async || {
        let Some(leader) = cluster.nodes.iter().find(|node| node.is_leader_with_quorum()) else { return false };
        let members = leader.cluster().await.members;
        let voters = members.len() == 3 && members.iter().all(|m| m.voter && m.role != "unreachable");
        voters && cluster.nodes.iter().all(|node| node.is_ready().is_ok() && node.jobs().current().is_none())
    };
    cluster.until_async("three voters that are well", well).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn clients_of_a_leader_that_fails_notice_nothing_until_it_is_back() {
    let cluster = Cluster::start_with(rebuilds_itself).await;
    let leader = cluster.leader().await;
    let clients = Clients::start(&cluster, leader);
    clients.read(&cluster, 100).await;
    cluster.disks[leader].fail_next_sync("segment.0", SyncFault::PagesMarkedClean);
    cluster.until("the failure", || cluster.nodes[leader].has_failed()).await;
    let id = async || cluster.nodes[leader].cluster().await.members.iter().map(|m| m.id).max();
    cluster.until_async("a fresh id", async || id().await > Some(3)).await;
    all_well(&cluster).await;
    clients.read(&cluster, 100).await;
    assert_eq!(clients.finish().await, Vec::<String>::new());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn clients_of_nodes_that_are_rebuilt_by_order_notice_nothing() {
    let cluster = Cluster::start_with(rebuilds_itself).await;
    let leader = cluster.leader().await;
    for node in [(leader + 1) % 3, leader] {
        let clients = Clients::start(&cluster, node);
        clients.read(&cluster, 100).await;
        let job = cluster.nodes[node].order_rebuild(None).await.unwrap();
        let ended = cluster.nodes[node].jobs().wait_ended(&job).await.unwrap();
        assert_eq!(ended.state, JobState::Finished, "{ended:?}");
        all_well(&cluster).await;
        clients.read(&cluster, 100).await;
        assert_eq!(clients.finish().await, Vec::<String>::new());
    }
    cluster.stop().await;
}
