//! What must not be begun, what may be undone, and two that want to drain at once.

use serde_json::{Value, json};
use stemedb::{
    cli::http_client::{Call, Client},
    node::{
        DrainOrder, FlowError,
        rebuild::fail_point::{arm, hang, is_armed},
    },
};

use super::support::Cluster;

const DRAIN: &str = "/v1/admin/node/drain";
const UNDRAIN: &str = "/v1/admin/node/undrain";
const FAILOVER: &str = "/v1/admin/failover";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_want_to_drain_at_once_one_does_and_the_other_is_told_who() {
    let cluster = Cluster::new(3).await;
    for round in 0..4 {
        let (a, b) = (round % 3, (round + 1) % 3);
        let order = DrainOrder::default();
        let (first, second) = tokio::join!(cluster.node(a).drain(order), cluster.node(b).drain(order));
        let (drains, waits, refusal) = match (first, second) {
            (Ok(_), Err(refusal)) => (a, b, refusal),
            (Err(refusal), Ok(_)) => (b, a, refusal),
            both => panic!("{both:?}"),
        };
        assert!(matches!(&refusal, FlowError::Held { by, .. } if by == cluster.name(drains)), "{refusal:?}");
        let job = cluster.node(drains).all_jobs()[0].id.clone();
        cluster.node(drains).wait_job(&job).await.unwrap();
        let (kind, detail) = cluster.refused(waits, DRAIN, json!({})).await;
        assert_eq!(kind, "drain-held");
        assert!(detail.contains(cluster.name(drains)) && detail.contains("force=true"), "{detail}");
        assert!(cluster.node(waits).is_ready().is_ok(), "the one that was refused stays in traffic");
        // A plan says the same and changes nothing.
        let plan = cluster.order(waits, &format!("{DRAIN}?dry_run=true"), json!({})).await;
        assert_eq!((&plan["allowed"], &plan["held_by"]), (&json!(false), &json!(cluster.name(drains))), "{plan}");
        // A drained node neither takes leadership nor stops voting.
        let leader = cluster.leader().await;
        assert_ne!(leader, drains);
        let (kind, detail) = cluster.refused(leader, FAILOVER, json!({"target": cluster.name(drains)})).await;
        assert!(kind == "flow-refused" && detail.contains("undrain it first"), "{detail}");
        cluster.order(drains, UNDRAIN, json!({})).await;
        cluster.all_ready().await;
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_holder_holds_nothing_and_the_last_healthy_voters_stay_unless_forced() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let (gone, stays) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.order(gone, DRAIN, json!({"persist": true})).await;
    cluster.stop(gone).await;
    let (kind, detail) = cluster.refused(stays, DRAIN, json!({})).await;
    assert_eq!(kind, "flow-refused", "{detail}");
    assert!(detail.contains("nothing could be written") && detail.contains(cluster.name(gone)), "{detail}");
    let plan = cluster.order(stays, &format!("{DRAIN}?dry_run=true"), json!({})).await;
    assert_eq!((&plan["allowed"], &plan["tolerance"]["failures_without"]), (&json!(false), &json!(-1)), "{plan}");
    cluster.order(stays, &format!("{DRAIN}?force=true"), json!({})).await;
    assert!(cluster.node(stays).is_ready().is_err());
    cluster.write(stays, "through the drained node").await;
    // The drain of the dead node was to outlast its restart; the other one's was not.
    cluster.restart(gone).await;
    cluster.until("its mark", async |c| (c.node(gone).health().status == "drained").then_some(())).await;
    cluster.stop(stays).await;
    cluster.restart(stays).await;
    cluster.until("readiness", async |c| c.node(stays).is_ready().is_ok().then_some(())).await;
    cluster.order(gone, UNDRAIN, json!({})).await;
    cluster.all_ready().await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_order_that_cannot_be_done_says_why() {
    let cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let follower = (leader + 1) % 3;
    for asked in [leader, follower] {
        let (kind, detail) = cluster.refused(asked, FAILOVER, json!({"target": "node-9"})).await;
        assert!(kind == "not-found" && detail.contains("node-1, node-2, node-3"), "{detail}");
        let (kind, detail) = cluster.refused(asked, FAILOVER, json!({"target": cluster.name(leader)})).await;
        assert!(kind == "flow-refused" && detail.contains("leader already"), "{detail}");
        assert_eq!(cluster.refused(asked, FAILOVER, json!({"to": "node-1"})).await.0, "unknown-field");
        assert_eq!(cluster.refused(asked, &format!("{FAILOVER}?force=true"), json!({})).await.0, "invalid-query");
        assert_eq!(cluster.refused(asked, &format!("{DRAIN}?node=node-9"), json!({})).await.0, "not-found");
        assert_eq!(cluster.refused(asked, &format!("{UNDRAIN}?node=node-9"), json!({})).await.0, "not-found");
        assert_eq!(cluster.get(asked, "/v1/admin/jobs/none").await.problem().kind, "/problems/not-found");
    }
    assert_eq!(cluster.leader().await, leader, "nothing was changed");

    // Two flows at once on one node, and a drain that is cancelled in the middle.
    arm(&cluster.folder(leader), "drain.await_notice");
    let answer = cluster.post(leader, &format!("{DRAIN}?wait=false"), json!({"persist": true})).await;
    assert_eq!(answer.status, 202, "{}", answer.describe());
    let job: Value = answer.json().unwrap();
    let folder = cluster.folder(leader);
    cluster.until("the point", async |_| (!is_armed(&folder)).then_some(())).await;
    let (kind, detail) = cluster.refused(leader, DRAIN, json!({})).await;
    assert!(kind == "flow-under-way" && detail.contains(job["id"].as_str().unwrap()), "{detail}");
    let path = format!("/v1/admin/jobs/{}?node={}", job["id"].as_str().unwrap(), cluster.name(leader));
    let cancelled = cluster.call(follower, &Call::delete(&path)).await;
    assert!(cancelled.is_success(), "{}", cancelled.describe());
    assert_eq!(cancelled.json::<Value>().unwrap()["state"], "cancelled");
    cluster.all_ready().await;
    assert!(!cluster.node(leader).flows().drain.known().persists, "nothing of it is left");

    // An undrain ends a drain that goes on; one that has ended cannot be cancelled.
    arm(&cluster.folder(follower), "drain.close");
    let node = std::sync::Arc::clone(cluster.node(follower));
    let draining = tokio::spawn(async move { node.drain(DrainOrder::default()).await });
    let folder = cluster.folder(follower);
    cluster.until("the point", async |_| (!is_armed(&folder)).then_some(())).await;
    let undone = cluster.order(follower, UNDRAIN, json!({})).await;
    assert_eq!(undone["state"], "finished");
    assert_eq!(draining.await.unwrap(), Err(FlowError::Cancelled));
    let path = format!("/v1/admin/jobs/{}", undone["id"].as_str().unwrap());
    let over = cluster.call(follower, &Call::delete(&path)).await;
    assert_eq!(over.problem().kind, "/problems/flow-refused");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_order_whose_client_goes_away_in_the_middle_is_finished_all_the_same() {
    let cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    for (point, path) in [("drain.await_notice", DRAIN), ("undrain.persist", UNDRAIN)] {
        let folder = cluster.folder(leader);
        let release = hang(&folder, point);
        let mut client = Client::new(cluster.endpoint(leader));
        let call = Call::post(path, json!({}).to_string());
        let order = tokio::spawn(async move { client.call(&call, super::support::HANG).await });
        cluster.until(point, async |_| (!is_armed(&folder)).then_some(())).await;
        // With it the connection.
        order.abort();
        assert!(order.await.unwrap_err().is_cancelled());
        drop(release);
        let wanted = if path == DRAIN { "drained" } else { "ok" };
        cluster.until(wanted, async |c| (c.node(leader).health().status == wanted).then_some(())).await;
        let jobs: Value = cluster.get(leader, "/v1/admin/jobs").await.json().unwrap();
        assert!(jobs["jobs"][0]["state"] == "finished", "{jobs}");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_node_of_a_database_neither_drains_nor_gives_leadership_away() {
    let cluster = Cluster::new(1).await;
    let (kind, detail) = cluster.refused(0, FAILOVER, json!({})).await;
    assert!(kind == "flow-refused" && detail.contains("only voter"), "{detail}");
    let (kind, detail) = cluster.refused(0, DRAIN, json!({})).await;
    assert!(kind == "flow-refused" && detail.contains("1 voter"), "{detail}");
    cluster.order(0, &format!("{DRAIN}?force=true"), json!({})).await;
    cluster.write(0, "a drained node still answers").await;
    cluster.order(0, UNDRAIN, json!({})).await;
    cluster.all_ready().await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_whose_disk_cannot_note_it_stays_drained() {
    let cluster = Cluster::new(1).await;
    let (forced, persist) = (format!("{DRAIN}?force=true"), json!({"persist": true}));
    let partner = cluster.folder(0).join("drain.spare");
    // The disk is full.
    std::os::unix::fs::symlink("/dev/full", &partner).unwrap();
    let (_, detail) = cluster.refused(0, &forced, persist.clone()).await;
    assert!(detail.contains("outlast a restart") && !detail.contains("stays"), "{detail}");
    assert!(cluster.node(0).is_ready().is_ok(), "nothing is left of a drain that was not begun");
    cluster.order(0, &forced, json!({})).await;
    let (_, detail) = cluster.refused(0, &forced, persist.clone()).await;
    assert!(detail.contains("until then it stays out of traffic"), "{detail}");
    assert_eq!(cluster.node(0).health().status, "drained");
    assert!(cluster.node(0).is_ready().is_err());
    assert!(!cluster.node(0).flows().drain.known().persists);
    std::fs::remove_file(&partner).unwrap();
    cluster.order(0, &forced, persist).await;
    assert!(cluster.node(0).flows().drain.known().persists);
    cluster.order(0, UNDRAIN, json!({})).await;
    cluster.all_ready().await;
    cluster.stop_all().await;
}
