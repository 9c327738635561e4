//! Every node in turn is taken out of traffic, stopped, started and put back, while clients without retries go on.

use serde_json::json;
use stemedb::judge::summarize_gaps;

use super::support::{Clients, Cluster};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_rolling_drain_restart_and_undrain_costs_no_client_a_request() {
    let mut cluster = Cluster::new(3).await;
    let clients = Clients::start(&cluster, 8);
    for i in 0..3 {
        clients.have_noticed(&cluster, i, true).await;
        // Ordered through another node than the one it is about.
        let path = format!("/v1/admin/node/drain?node={}", cluster.name(i));
        let job = cluster.order((i + 1) % 3, &path, json!({})).await;
        assert_eq!((job["state"].as_str(), job["node"].as_str()), (Some("finished"), Some(cluster.name(i))), "{job}");
        let health = cluster.node(i).health();
        assert_eq!(health.status, "drained", "{health:?}");
        assert!(!cluster.node(i).is_leader_with_quorum());
        assert_eq!(cluster.get(i, "/v1/health/ready").await.status, 503);
        // What comes late is passed on, and told to look elsewhere.
        let late = cluster.get(i, "/v1/query?concept_path=late").await;
        assert!(late.is_success() && late.header("connection") == Some("close"), "{late:?}");
        clients.have_noticed(&cluster, i, false).await;
        cluster.terminate(i).await;
        cluster.restart(i).await;
        cluster.all_ready().await;
        // A restart has ended the drain: to undo it once more is no error.
        let path = format!("/v1/admin/node/undrain?node={}", cluster.name(i));
        assert_eq!(cluster.order((i + 1) % 3, &path, json!({})).await["state"], "finished");
    }
    clients.have_noticed(&cluster, 2, true).await;
    let history = clients.finish(&cluster).await;
    let gaps = summarize_gaps(&history.acknowledged_us());
    eprintln!("{} writes, {} reads, no failure; {gaps:?}", history.writes.len(), history.reads.len());
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_drain_that_is_undone_in_place_and_a_stop_by_signal_cost_no_request_either() {
    let mut cluster = Cluster::new(3).await;
    let clients = Clients::start(&cluster, 6);
    let leader = cluster.leader().await;
    clients.have_noticed(&cluster, leader, true).await;
    let job = cluster.order(leader, "/v1/admin/node/drain", json!({"persist": false})).await;
    assert_eq!(job["from"], cluster.name(leader), "{job}");
    let steps: Vec<&str> = job["steps"].as_array().unwrap().iter().map(|step| step["name"].as_str().unwrap()).collect();
    assert!(steps.contains(&"handing over leadership") && steps.contains(&"waiting for the load balancers"), "{job}");
    clients.have_noticed(&cluster, leader, false).await;
    assert_eq!(cluster.order(leader, "/v1/admin/node/undrain", json!({})).await["kind"], "undrain");
    cluster.all_ready().await;
    clients.have_noticed(&cluster, leader, true).await;
    // It leads again when it is asked to.
    cluster.order(leader, "/v1/admin/failover", json!({"target": cluster.name(leader)})).await;
    assert_eq!(cluster.leader().await, leader);

    // A signal: the balancer notices while the node waits for it to.
    let node = std::sync::Arc::clone(cluster.node(leader));
    let stopping = tokio::spawn(async move { node.stop_gently().await });
    clients.have_noticed(&cluster, leader, false).await;
    stopping.await.unwrap();
    cluster.terminate(leader).await;
    let goal = clients.operations() + 60;
    cluster.until("operations", async |_| (clients.operations() >= goal).then_some(())).await;
    clients.finish(&cluster).await;
    cluster.stop_all().await;
}
