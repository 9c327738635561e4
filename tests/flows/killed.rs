//! The node that runs a flow ends in the middle of it, before each of its steps.

use serde_json::json;
use stemedb::node::{
    flows::{DRAIN_POINTS, FAILOVER_MISSED_POINTS, FAILOVER_POINTS},
    rebuild::fail_point::{arm, is_armed},
};

use super::support::Cluster;

/// Runs the order on the leader until `point`, stops the leader there and starts it again.
async fn die_at(cluster: &mut Cluster, point: &'static str, path: &str, body: serde_json::Value) -> usize {
    let leader = cluster.leader().await;
    arm(&cluster.folder(leader), point);
    let call = stemedb::cli::http_client::Call::post(path, body.to_string());
    let mut client = stemedb::cli::http_client::Client::new(cluster.endpoint(leader));
    let order = tokio::spawn(async move { client.call(&call, super::support::HANG).await });
    let folder = cluster.folder(leader);
    cluster.until(point, async |_| (!is_armed(&folder)).then_some(())).await;
    cluster.stop(leader).await;
    // An answer that says that it was not done, or a lost connection: never one that says that it was.
    if let Ok(answer) = order.await.unwrap() {
        assert!(answer.status != 200, "{point}: {}", String::from_utf8_lossy(&answer.body));
    }
    leader
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_dies_at_any_step_of_a_drain_comes_back_into_traffic_unless_it_was_to_persist() {
    let mut cluster = Cluster::new(3).await;
    for (n, point) in DRAIN_POINTS.iter().enumerate() {
        let died = die_at(&mut cluster, point, "/v1/admin/node/drain", json!({"persist": true})).await;
        cluster.write((died + 1) % 3, &format!("meanwhile-{n}")).await;
        cluster.restart(died).await;
        let persisted = n > DRAIN_POINTS.iter().position(|point| *point == "drain.persist").unwrap();
        if persisted {
            cluster
                .until("the drained node", async |c| (c.node(died).health().status == "drained").then_some(()))
                .await;
            assert!(cluster.node(died).is_ready().unwrap_err().contains("drained"));
            cluster.order(died, "/v1/admin/node/undrain", json!({})).await;
        }
        cluster.all_ready().await;
        for i in 0..3 {
            assert_eq!(cluster.count(i).await, n + 1, "{point}: node {i}");
        }
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_that_dies_at_any_step_of_a_failover_leaves_a_cluster_that_writes() {
    let mut cluster = Cluster::new(3).await;
    for (n, point) in FAILOVER_POINTS.iter().enumerate() {
        let died = die_at(&mut cluster, point, "/v1/admin/failover", json!({})).await;
        cluster.write((died + 1) % 3, &format!("meanwhile-{n}")).await;
        cluster.restart(died).await;
        cluster.all_ready().await;
        for i in 0..3 {
            assert_eq!(cluster.count(i).await, n + 1, "{point}: node {i}");
        }
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_that_dies_when_no_candidate_has_taken_over_leaves_a_cluster_that_writes() {
    if std::env::var_os("STEMEDB_TEST_FULL").is_none_or(|value| value != "1") {
        eprintln!("each candidate is waited for: with STEMEDB_TEST_FULL=1");
        return;
    }
    let mut cluster = Cluster::new(3).await;
    for (n, point) in FAILOVER_MISSED_POINTS.iter().enumerate() {
        let leader = cluster.leader().await;
        let others = [(leader + 1) % 3, (leader + 2) % 3];
        // Nobody stands for election without having kept its vote.
        for i in others {
            cluster.disk(i).hang_sync("hard-state");
        }
        let died = die_at(&mut cluster, point, "/v1/admin/failover", json!({})).await;
        for i in others {
            cluster.disk(i).release();
        }
        cluster.write(others[0], &format!("meanwhile-{n}")).await;
        cluster.restart(died).await;
        cluster.all_ready().await;
        for i in 0..3 {
            assert_eq!(cluster.count(i).await, n + 1, "{point}: node {i}");
        }
    }
    cluster.stop_all().await;
}
