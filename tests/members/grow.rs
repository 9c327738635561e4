//! A cluster grows and shrinks, and whoever was removed knows it.

use serde_json::json;
use stemedb::{
    cli::http_client::Call,
    config::MemberRole,
    node::rebuild::fail_point::{arm, is_armed},
};

use super::support::Cluster;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_added_as_voters_and_the_leader_is_removed_for_good() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let follower = (leader + 1) % 3;
    for n in 0..20 {
        cluster.write(n % 3, &format!("before-{n}")).await;
    }
    let fourth = cluster.spare("node-4", MemberRole::Voter).await;
    cluster
        .until("the new node to say what it waits for", async |c| {
            let health = c.node(fourth).health();
            (health.status == "waiting" && health.place.is_some_and(|p| p.contains("stemedb member add node-4")))
                .then_some(())
        })
        .await;
    assert!(cluster.node(fourth).is_ready().unwrap_err().contains("member add"));

    let plan = cluster.taken(follower, cluster.add(fourth, "?dry_run=true")).await;
    assert_eq!((&plan["allowed"], &plan["outlook"]["failures_after"]), (&true.into(), &1.into()), "{plan}");
    assert_eq!(plan["outlook"]["voters_after"].as_array().unwrap().len(), 4);
    let job = cluster.taken(follower, cluster.add(fourth, "")).await;
    assert_eq!((&job["state"], &job["kind"]), (&"finished".into(), &"member-add".into()), "{job}");
    cluster.voters(&[0, 1, 2, fourth]).await;
    assert_eq!(cluster.count(fourth).await, 20);
    cluster.write(fourth, "through the new node").await;

    let fifth = cluster.spare("node-5", MemberRole::Voter).await;
    cluster.until("the fifth to wait", async |c| (c.node(fifth).health().status == "waiting").then_some(())).await;
    // Any node takes it, also the one that was just added; and every node can tell of it.
    let job = cluster.taken(fourth, cluster.add(fifth, "")).await;
    let id = job["id"].as_str().unwrap();
    cluster.voters(&[0, 1, 2, fourth, fifth]).await;
    for i in 0..5 {
        let shown = cluster.ended(i, id, "finished").await;
        assert_eq!((&shown["detail"], &shown["node"]), (&job["detail"], &"node-5".into()), "{shown}");
    }

    // The leader itself is asked to leave: it gives leadership away, and the job goes on at the next one.
    let leader = cluster.leader().await;
    let job = cluster.taken(leader, cluster.remove(leader, "")).await;
    assert_eq!(job["state"], "finished", "{job}");
    let rest: Vec<usize> = (0..5).filter(|i| *i != leader).collect();
    cluster.voters(&rest).await;
    is_out(&cluster, leader).await;
    cluster.write(rest[0], "without the old leader").await;

    // It stays out after a restart, and the others do without it.
    cluster.stop(leader).await;
    cluster.restart(leader).await;
    is_out(&cluster, leader).await;
    let shown = cluster.ended(rest[1], job["id"].as_str().unwrap(), "finished").await;
    assert!(shown["detail"].as_str().unwrap().contains("has left; of 4 voters 3 must work"), "{shown}");

    // With an empty folder it may come again, under its name and another id.
    cluster.stop(leader).await;
    cluster.empty(leader);
    cluster.restart(leader).await;
    cluster.until("it to wait", async |c| (c.node(leader).health().status == "waiting").then_some(())).await;
    cluster.taken(rest[0], cluster.add(leader, "")).await;
    cluster.voters(&[0, 1, 2, fourth, fifth]).await;
    for i in 0..5 {
        assert_eq!(cluster.count(i).await, 22, "node {i}");
    }

    // A node fails after an order without force: it waits, because no further failure could be tolerated.
    let leader = cluster.leader().await;
    let others: Vec<usize> = (0..5).filter(|i| *i != leader).collect();
    let (gone, fails, stays) = (others[0], others[1], others[2]);
    let folder = cluster.folder(leader);
    arm(&folder, "member.announce");
    let job = cluster.taken(stays, cluster.remove(gone, "?wait=false")).await;
    let id = job["id"].as_str().unwrap();
    cluster.until("it to be announced", async |_| (!is_armed(&folder)).then_some(())).await;
    cluster.stop(fails).await;
    let target = json!({"target": cluster.name(stays)}).to_string();
    cluster.taken(leader, Call::post("/v1/admin/failover", target)).await;
    cluster
        .until("it to wait for the node", async |c| {
            let job = c.job(stays, id).await?;
            let why = job["detail"].as_str()?;
            (job["state"] == "waiting" && why.contains("no further failure") && why.contains(c.name(fails)))
                .then_some(())
        })
        .await;
    cluster.restart(fails).await;
    cluster.ended(stays, id, "finished").await;
    // Having handed over it is about to stop.
    cluster.stop(leader).await;
    cluster.restart(leader).await;
    cluster.voters(&[leader, fails, stays, others[3]]).await;
    cluster.stop_all().await;
}

/// A removed node says so and answers nothing.
async fn is_out(cluster: &Cluster, i: usize) {
    cluster
        .until("the removed node to know it", async |c| {
            let health = c.node(i).health();
            (health.status == "removed" && c.node(i).refuses().is_some()).then_some(())
        })
        .await;
    let name = cluster.name(i);
    let why = cluster.node(i).is_ready().unwrap_err();
    assert!(why.contains(&format!("stemedb member add {name} --addr {}", cluster.peer(i).addr)), "{why}");
    // The line that it gives is one that the program takes; only that its folder is not empty is wrong.
    let line: Vec<&str> = why.split('`').nth(1).unwrap().split(' ').skip(1).collect();
    let (code, out, err) = super::cli::stemedb(cluster, &line).await;
    assert!(code == 4 && err.contains("not empty"), "{line:?}: {code}: {out}{err}");
    let answer = cluster.get(i, "/v1/query?concept_path=test/members").await;
    assert_eq!((answer.status, &*answer.problem().kind), (503, "/problems/node-removed"));
    let body = r#"{"concept_path": "test/members", "predicate": "p", "value": 1}"#;
    let write = Call::post("/v1/assert", body);
    let (kind, detail) = cluster.refused(i, write).await;
    assert!(kind == "node-removed" && detail.contains("was removed from the cluster"), "{kind}: {detail}");
}
