//! Real processes that are stopped and go on: a leader that slept does not answer from the past, and is no hung disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::{path::PathBuf, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stemedb::cli::{
    http_client::{Call, Client},
    local_cluster::{LocalCluster, free_port, plan},
};

/// Far above what any answer needs; only a hang ends the test by this.
const HANG: Duration = Duration::from_secs(120);
/// Writes that repeat while nobody leads.
const PAUSE: Duration = Duration::from_millis(20);

/// One node that sleeps; wakes up when dropped, so that it can be stopped.
struct Asleep(Pid);

impl Asleep {
    fn fall(pid: i32) -> Asleep {
        let pid = Pid::from_raw(pid).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        Asleep(pid)
    }
}

impl Drop for Asleep {
    fn drop(&mut self) {
        let _gone = kill_process(self.0, Signal::CONT);
    }
}

async fn health(cluster: &LocalCluster, node: usize) -> Value {
    let mut client = Client::new(cluster.plan()[node].endpoint().unwrap());
    client.call(&Call::get("/v1/health"), HANG).await.unwrap().json().unwrap()
}

async fn leader(cluster: &LocalCluster, of: &[usize]) -> usize {
    let found = async {
        loop {
            for node in of {
                if health(cluster, *node).await["role"] == "leader" {
                    return *node;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(HANG, found).await.expect("a leader")
}

async fn write(cluster: &LocalCluster, node: usize, value: u64) {
    let mut client = Client::new(cluster.plan()[node].endpoint().unwrap());
    let body = json!({"concept_path": "test/pause", "predicate": "number", "value": value}).to_string();
    let call = Call::post("/v1/assert", body).idempotency_key(&format!("pause-{value}")).unwrap();
    let written = async {
        // On a machine that is busy with other things an election may take longer than a request may wait.
        while !client.call(&call, HANG).await.is_ok_and(|answer| answer.is_success()) {
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(HANG, written).await.expect("a write");
}

/// What a linearizable read at this node shows; `None`: it refused.
async fn newest(cluster: &LocalCluster, node: usize) -> Option<u64> {
    let mut client = Client::new(cluster.plan()[node].endpoint().unwrap());
    let call = Call::get("/v1/query?concept_path=test/pause&predicate=number");
    let answer = client.call(&call, HANG).await.ok().filter(|answer| answer.is_success())?;
    let page: Value = answer.json().unwrap();
    page["assertions"][0]["value"].as_u64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_slept_reads_nothing_stale_and_goes_on_as_a_follower() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = plan(dir.path(), 3, free_port(3).unwrap()).unwrap();
    let mut cluster = LocalCluster::prepare_with(PathBuf::from(env!("CARGO_BIN_EXE_stemedb")), nodes).unwrap();
    cluster.start_all().unwrap();
    cluster.wait_ready(HANG).await.unwrap();
    for round in 0..3 {
        let asleep = leader(&cluster, &[0, 1, 2]).await;
        write(&cluster, asleep, round * 10).await;
        let others: Vec<usize> = (0..3).filter(|node| *node != asleep).collect();
        let sleeping = Asleep::fall(cluster.pid(asleep).unwrap());
        write(&cluster, others[0], round * 10 + 1).await;
        drop(sleeping);
        // Asked at once, before it can have heard of anything.
        if let Some(seen) = newest(&cluster, asleep).await {
            assert_eq!(seen, round * 10 + 1, "a stale answer");
        }
        cluster.wait_ready(HANG).await.unwrap();
        assert_eq!(health(&cluster, asleep).await["disk"]["state"], "ok", "it was the process that stood still");
        assert_eq!(newest(&cluster, others[1]).await, Some(round * 10 + 1));
    }
    cluster.stop_all().await.unwrap();
}
