//! The leader dies in the middle of a change of the members, before each of its steps: the next one finishes it.

use serde_json::Value;
use stemedb::{
    cli::http_client::Call,
    config::MemberRole,
    node::rebuild::fail_point::{arm, is_armed},
};

use super::support::Cluster;

/// Stops the leader once it is at the point. Where it was.
async fn die(cluster: &mut Cluster, leader: usize, point: &str) {
    let folder = cluster.folder(leader);
    cluster.until(point, async |_| (!is_armed(&folder)).then_some(())).await;
    cluster.stop(leader).await;
}

fn points() -> Vec<&'static str> {
    let all = ["member.await_join", "member.await_log", "member.announce", "member.change", "member.finish"];
    match std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1") {
        true => all.to_vec(),
        // One before and one after the last moment at which it could have been cancelled.
        false => vec!["member.await_join", "member.change"],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replacement_is_finished_whenever_the_leader_dies() {
    let mut cluster = Cluster::new(3).await;
    let points = points();
    eprintln!("{} points", points.len());
    let mut members: Vec<usize> = vec![0, 1, 2];
    for (n, point) in points.into_iter().enumerate() {
        let leader = cluster.leader().await;
        let others: Vec<usize> = members.iter().copied().filter(|i| *i != leader).collect();
        let old = others[0];
        let spare = cluster.spare(&format!("spare-{n}"), MemberRole::Voter).await;
        cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
        arm(&cluster.folder(leader), point);
        let job = cluster.taken(others[1], cluster.replace(old, spare, "?wait=false")).await;
        let id = job["id"].as_str().unwrap().to_owned();
        die(&mut cluster, leader, point).await;
        let shown = cluster.ended(others[1], &id, "finished").await;
        assert!(shown["detail"].as_str().unwrap().contains("has taken the place of"), "{point}: {shown}");
        cluster.write(others[1], point).await;
        cluster.restart(leader).await;
        members = members.into_iter().filter(|i| *i != old).chain([spare]).collect();
        cluster.voters(&members).await;
        // The same on every node, also on the one that was down and on the new one.
        for i in &members {
            let there: Value = cluster.ended(*i, &id, "finished").await;
            assert_eq!(there["detail"], shown["detail"], "{point}");
        }
        cluster.stop(old).await;
    }
    for i in &members {
        assert_eq!(cluster.count(*i).await, cluster.count(members[0]).await);
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_node_that_leaves_gives_leadership_away_if_it_leads_by_then() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let (old, third) = ((leader + 1) % 3, (leader + 2) % 3);
    let spare = cluster.spare("node-4", MemberRole::Voter).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
    let folder = cluster.folder(spare);
    arm(&folder, "rebuild.pulled");
    let job = cluster.taken(third, cluster.replace(old, spare, "?wait=false")).await;
    cluster.until("the node to fetch", async |_| (!is_armed(&folder)).then_some(())).await;
    let target = serde_json::json!({"target": cluster.name(old)}).to_string();
    cluster.taken(leader, Call::post("/v1/admin/failover", target)).await;
    arm(&cluster.folder(old), "member.leave");
    cluster.stop(spare).await;
    cluster.restart(spare).await;
    // It dies before it has given leadership away, and it is gone for good.
    die(&mut cluster, old, "member.leave").await;
    cluster.ended(third, job["id"].as_str().unwrap(), "finished").await;
    cluster.voters(&[leader, third, spare]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_change_that_was_cancelled_is_undone_whenever_the_leader_dies() {
    let mut cluster = Cluster::new(3).await;
    for (n, point) in ["member.undone"].into_iter().enumerate() {
        let leader = cluster.leader().await;
        let other = (leader + 1) % 3;
        let spare = cluster.spare(&format!("spare-{n}"), MemberRole::Voter).await;
        cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
        let folder = cluster.folder(spare);
        arm(&folder, "rebuild.pulled");
        let job = cluster.taken(other, cluster.add(spare, "?wait=false")).await;
        let id = job["id"].as_str().unwrap().to_owned();
        cluster.until("the node to fetch", async |_| (!is_armed(&folder)).then_some(())).await;
        arm(&cluster.folder(leader), point);
        let call = Call::delete(format!("/v1/admin/jobs/{id}"));
        let mut client = stemedb::cli::http_client::Client::new(cluster.endpoint(leader));
        let cancel = tokio::spawn(async move { client.call(&call, super::support::HANG).await });
        die(&mut cluster, leader, point).await;
        // Its answer is lost with it, or says that it is not known.
        if let Ok(answer) = cancel.await.unwrap() {
            assert!(answer.status != 200, "{}", answer.describe());
        }
        cluster.ended(other, &id, "cancelled").await;
        cluster.restart(leader).await;
        cluster.voters(&[0, 1, 2]).await;
        cluster.stop(spare).await;
    }
    cluster.stop_all().await;
}
