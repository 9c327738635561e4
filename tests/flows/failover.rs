//! Leadership moves on command, to whom it is told, and writes go on.

use std::sync::Arc;

use serde_json::{Value, json};
use stemedb::{
    cli::http_client::{Call, Client},
    node::rebuild::fail_point::{hang, is_armed},
};

use super::support::{Clients, Cluster, HANG};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn leadership_goes_where_it_is_told_and_the_answer_comes_from_a_cluster_that_writes() {
    let cluster = Cluster::new(3).await;
    let clients = Clients::start(&cluster, 4);
    let mut took = Vec::new();
    for round in 0..6 {
        let leader = cluster.leader().await;
        let target = (leader + 1 + round % 2) % 3;
        // Asked of the leader, of the target and of the third node alike.
        let asked = round % 3;
        let job = cluster.order(asked, "/v1/admin/failover", json!({"target": cluster.name(target)})).await;
        assert_eq!(job["state"], "finished", "{job}");
        assert_eq!((&job["from"], &job["to"]), (&json!(cluster.name(leader)), &json!(cluster.name(target))), "{job}");
        assert_eq!(cluster.write(leader, &format!("round-{round}")).await, cluster.name(target));
        assert_eq!(cluster.leader().await, target);
        assert_eq!(job["term"], json!(cluster.node(target).health().term));
        took.push(job["ms"].as_u64().unwrap());
    }
    eprintln!("failovers took {took:?} ms");
    clients.finish(&cluster).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_target_whoever_lacks_least_takes_over_and_jobs_tell_of_it() {
    let cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let plan = cluster.order((leader + 1) % 3, "/v1/admin/failover?dry_run=true", json!({})).await;
    assert_eq!((&plan["from"], plan["candidates"].as_array().unwrap().len()), (&json!(cluster.name(leader)), 2));
    assert_eq!(cluster.leader().await, leader, "a plan moves nothing");
    let answer = cluster.post(leader, "/v1/admin/failover?wait=false", json!({})).await;
    assert_eq!(answer.status, 202, "{}", answer.describe());
    let location = answer.header("location").unwrap().to_owned();
    let ended = cluster
        .until("the end of the job", async |c| {
            // Through another node, by the address that the answer gave.
            let job: Value = c.get((leader + 1) % 3, &location).await.json().unwrap();
            (job["state"] == "finished").then_some(job)
        })
        .await;
    assert_eq!(ended["kind"], "failover");
    let jobs: Value = cluster.get(leader, "/v1/admin/jobs").await.json().unwrap();
    assert_eq!(jobs["jobs"].as_array().unwrap().len(), 1, "{jobs}");
    assert_eq!(jobs["jobs"][0]["id"], ended["id"]);
    // Followers are well and not the leader, which Envoy hears with its probe.
    let now = cluster.leader().await;
    for i in 0..3 {
        for path in ["/v1/health/ready", "/v1/health", "/v1/health/live"] {
            let probed = cluster.get(i, path).await;
            assert!(probed.is_success());
            assert_eq!(probed.header("x-envoy-degraded").is_some(), i != now, "node {i}, {path}");
        }
        // Who asks this wants to read from followers.
        assert!(cluster.get(i, "/v1/health/replica").await.header("x-envoy-degraded").is_none(), "node {i}");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn leadership_is_moved_by_one_at_a_time() {
    let cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let (target, third) = ((leader + 1) % 3, (leader + 2) % 3);
    let term = cluster.node(leader).health().term;
    let folder = cluster.folder(leader);
    let release = hang(&folder, "failover.trigger");
    let mut client = Client::new(cluster.endpoint(leader));
    let call = Call::post("/v1/admin/failover", json!({"target": cluster.name(target)}).to_string());
    let failover = tokio::spawn(async move { client.call(&call, HANG).await });
    cluster.until("the point", async |_| (!is_armed(&folder)).then_some(())).await;
    // It waits behind the failover, whoever it would ask.
    let stops = Arc::clone(cluster.node(leader));
    let handing_over = tokio::spawn(async move { stops.hand_over().await });
    cluster.until("the hand-over", async |c| c.node(leader).is_ready().is_err().then_some(())).await;
    for n in 0..20 {
        assert_eq!(cluster.write(third, &format!("held-{n}")).await, cluster.name(leader));
    }
    drop(release);
    handing_over.await.unwrap();
    let job: Value = failover.await.unwrap().unwrap().json().unwrap();
    assert_eq!((&job["state"], &job["to"]), (&json!("finished"), &json!(cluster.name(target))), "{job}");
    assert_eq!(cluster.leader().await, target);
    assert_eq!(cluster.node(target).health().term, term + 1, "one candidate stood");
    cluster.stop_all().await;
}
