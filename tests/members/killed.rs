//! The leader dies in the middle of a change of the members that is cancelled: the next one undoes it. Changes that go on,
//! and every other step, are in `tests/kill_points/flows.rs`, with real servers.

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_in_that_started_over_and_is_cancelled_leaves_no_learner_behind() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let other = (leader + 1) % 3;
    let spare = cluster.spare("node-4", MemberRole::Voter).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
    // It joins, and the leader does no more.
    let (leads, comes) = (cluster.folder(leader), cluster.folder(spare));
    arm(&leads, "member.announce");
    let job = cluster.taken(other, cluster.add(spare, "?wait=false")).await;
    let id = job["id"].as_str().unwrap();
    cluster.until("the node to have joined", async |_| (!is_armed(&leads)).then_some(())).await;
    // Its folder is lost: another place, under which it does not join.
    cluster.stop(spare).await;
    cluster.empty(spare);
    arm(&comes, "rebuild.pulled");
    cluster.restart(spare).await;
    cluster.until("the node to fetch again", async |_| (!is_armed(&comes)).then_some(())).await;
    let members = async |c: &Cluster, i: usize| c.node(i).cluster().await.members.len();
    assert_eq!(members(&cluster, leader).await, 4, "a learner of the older place");
    let cancel = Call::delete(format!("/v1/admin/jobs/{id}"));
    let (_, ()) = tokio::join!(cluster.call(other, &cancel), async {
        cluster
            .until("the leader to have taken that", async |c| {
                let job = c.job(leader, id).await?;
                (job["step"] == "undoing" || job["cancellable"] == false).then_some(())
            })
            .await;
        cluster.node(leader).hand_over().await;
    });
    cluster.ended(other, id, "cancelled").await;
    for i in 0..3 {
        cluster.until("no learner to be left", async |c| (members(c, i).await == 3).then_some(())).await;
    }
    cluster.stop_all().await;
}
