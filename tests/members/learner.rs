//! A learner stays one: it has everything, answers, and never counts.

use serde_json::{Value, json};
use stemedb::{
    cli::http_client::Call,
    config::MemberRole,
    node::rebuild::{
        fail_point::{arm, is_armed},
        journal::Journal,
    },
};

use super::support::Cluster;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_receives_everything_answers_and_never_votes_or_leads() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    cluster.write(0, "before").await;
    let far = cluster.spare("far", MemberRole::Learner).await;
    cluster.until("it to wait", async |c| (c.node(far).health().status == "waiting").then_some(())).await;
    // Its own configuration says so, whatever the order says.
    let job = cluster.taken(leader, cluster.add(far, "")).await;
    assert!(job["detail"].as_str().unwrap().contains("far is a learner; of 3 voters 2 must work"), "{job}");
    cluster.until("the learner to be ready", async |c| c.node(far).is_ready().is_ok().then_some(())).await;
    assert_eq!(cluster.node(far).health().role, "learner");
    cluster.voters(&[0, 1, 2]).await;
    cluster.write(far, "through the learner").await;
    assert_eq!(cluster.count(far).await, 2);
    let (kind, detail) =
        cluster.refused(leader, Call::post("/v1/admin/failover", json!({"target": "far"}).to_string())).await;
    assert!(kind == "flow-refused" && detail.contains("learner"), "{kind}: {detail}");
    let listed = cluster.taken(far, Call::get(super::support::MEMBERS)).await;
    assert_eq!((&listed["voters"], listed["members"].as_array().unwrap().len()), (&3.into(), 4), "{listed}");

    cluster.stop(far).await;
    cluster.write(0, "meanwhile").await;
    cluster.restart(far).await;
    cluster.until("the learner to be ready again", async |c| c.node(far).is_ready().is_ok().then_some(())).await;
    assert_eq!((cluster.count(far).await, &*cluster.node(far).health().role), (3, "learner"));

    // Its files are lost: it comes again by itself, as it is one already.
    cluster.stop(far).await;
    cluster.empty(far);
    cluster.write(0, "while it had nothing").await;
    // And lost again and again before it is here: after the second time in a day an operator decides.
    let folder = cluster.folder(far);
    for _ in 0..2 {
        arm(&folder, "rebuild.pulled");
        cluster.restart(far).await;
        cluster.until("the learner to fetch", async |_| (!is_armed(&folder)).then_some(())).await;
        cluster.stop(far).await;
        cluster.empty(far);
    }
    cluster.restart(far).await;
    cluster
        .until("it to wait for an operator", async |c| {
            c.node(far).all_jobs().iter().any(|job| job.detail.contains("an operator decides")).then_some(())
        })
        .await;
    cluster.taken(leader, Call::post("/v1/admin/node/rebuild?node=far&wait=false", "")).await;
    cluster.until("the learner to be ready once more", async |c| c.node(far).is_ready().is_ok().then_some(())).await;
    assert_eq!((cluster.count(far).await, &*cluster.node(far).health().role), (4, "learner"));
    cluster
        .until("nothing of the old one to be left", async |c| {
            let listed = c.taken(leader, Call::get(super::support::MEMBERS)).await;
            (listed["members"].as_array().unwrap().len() == 4 && listed["change"].is_null()).then_some(())
        })
        .await;
    let jobs = cluster.taken(leader, Call::get("/v1/admin/jobs")).await;
    let job = &jobs["jobs"][0];
    assert_eq!((&job["kind"], &job["cause"]), (&"member-add".into(), &"the node itself".into()), "{jobs}");
    cluster.voters(&[0, 1, 2]).await;

    let job = cluster.taken(leader, cluster.remove(far, "")).await;
    assert_eq!(job["state"], "finished", "{job}");
    cluster.until("the learner to know it", async |c| (c.node(far).health().status == "removed").then_some(())).await;
    cluster.voters(&[0, 1, 2]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_under_a_learners_name_never_takes_its_place() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let far = cluster.spare("far", MemberRole::Learner).await;
    cluster.taken(leader, cluster.add(far, "")).await;
    cluster.until("the learner to be ready", async |c| c.node(far).is_ready().is_ok().then_some(())).await;
    let jobs = |listed: Value| listed["jobs"].as_array().unwrap().len();
    let jobs_before = jobs(cluster.taken(leader, Call::get("/v1/admin/jobs")).await);

    // By mistake a second one is started elsewhere, with the same name and nothing in its folder.
    let other = cluster.spare_in("elsewhere", "far", MemberRole::Learner, |_| {}).await;
    let waits_for = async |cluster: &Cluster, what: &str| {
        cluster
            .until(what, async |c| c.node(other).all_jobs().iter().any(|job| job.detail.contains(what)).then_some(()))
            .await;
    };
    waits_for(&cluster, "far to end: it still runs under its old id").await;
    // Nor while the first one is being restarted.
    cluster.stop(far).await;
    waits_for(&cluster, "far to answer at").await;
    cluster.write(0, "while it was down").await;
    cluster.restart(far).await;
    cluster.until("the learner to be ready again", async |c| c.node(far).is_ready().is_ok().then_some(())).await;
    waits_for(&cluster, "far to end: it still runs under its old id").await;
    assert_eq!((cluster.count(far).await, &*cluster.node(far).health().role), (1, "learner"));
    let listed = cluster.taken(leader, Call::get(super::support::MEMBERS)).await;
    let of_far: Vec<&Value> = listed["members"].as_array().unwrap().iter().filter(|m| m["name"] == "far").collect();
    assert!(of_far.len() == 1 && of_far[0]["peer_addr"] == cluster.peer(far).addr, "{listed}");
    assert_eq!(jobs(cluster.taken(leader, Call::get("/v1/admin/jobs")).await), jobs_before, "nobody came again");
    cluster.stop_all().await;
}

/// Has the learner rebuilt, until it has its place. The job of the whole cluster.
async fn rebuild_until_it_has_its_place(cluster: &Cluster, leader: usize, far: usize) -> String {
    let folder = cluster.folder(far);
    // An order would join the job that brought it here.
    let is_over = |c: &Cluster| c.node(far).all_jobs().iter().all(|job| job.state.is_over());
    cluster.until("its way in to be over", async |c| is_over(c).then_some(())).await;
    arm(&folder, "rebuild.granted");
    cluster.taken(leader, Call::post("/v1/admin/node/rebuild?node=far&wait=false", "")).await;
    cluster.until("the learner to have its place", async |_| (!is_armed(&folder)).then_some(())).await;
    let listed = cluster.taken(leader, Call::get(super::support::MEMBERS)).await;
    assert_eq!(listed["change"]["cause"], "an operator, at the node itself", "{listed}");
    listed["change"]["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_whose_rebuild_is_given_up_stays_the_learner_that_it_was() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let far = cluster.spare("far", MemberRole::Learner).await;
    cluster.taken(leader, cluster.add(far, "")).await;
    cluster.until("the learner to be ready", async |c| c.node(far).is_ready().is_ok().then_some(())).await;
    let ids = async |c: &Cluster| {
        let listed = c.taken(leader, Call::get(super::support::MEMBERS)).await;
        let of_far = listed["members"].as_array().unwrap().iter().filter(|m| m["name"] == "far");
        of_far.map(|m| m["id"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    let before = ids(&cluster).await;

    // It gives up without the leader hearing of it, as one does that finds no leader, and is down when that is
    // cancelled.
    let job = rebuild_until_it_has_its_place(&cluster, leader, far).await;
    cluster.stop(far).await;
    Journal::remove(&cluster.folder(far)).unwrap();
    let cancelled = cluster.taken(leader, Call::delete(format!("/v1/admin/jobs/{job}"))).await;
    assert!(cancelled["detail"].as_str().unwrap().contains("far stays a learner under Raft id"), "{cancelled}");
    assert_eq!(ids(&cluster).await, before, "nobody knew that it had lost anything");
    cluster.write(0, "while it was down").await;
    cluster.restart(far).await;
    cluster.until("the learner to be ready again", async |c| c.node(far).is_ready().is_ok().then_some(())).await;
    assert_eq!(cluster.count(far).await, 1);

    // At work again it is not waited for, and the members can change.
    let job = rebuild_until_it_has_its_place(&cluster, leader, far).await;
    cluster.stop(far).await;
    Journal::remove(&cluster.folder(far)).unwrap();
    cluster.restart(far).await;
    let ended = cluster.ended(leader, &job, "cancelled").await;
    assert!(ended["detail"].as_str().unwrap().contains("far does not come again: it is at work"), "{ended}");
    cluster.write(0, "after that").await;
    cluster.until("the learner to be ready once more", async |c| c.node(far).is_ready().is_ok().then_some(())).await;
    assert_eq!((ids(&cluster).await, cluster.count(far).await), (before, 2));

    // Its rebuild goes on when that is cancelled: it is no member then, as one that has lost its files.
    let job = rebuild_until_it_has_its_place(&cluster, leader, far).await;
    let cancelled = cluster.taken(leader, Call::delete(format!("/v1/admin/jobs/{job}"))).await;
    assert!(cancelled["detail"].as_str().unwrap().contains("far is no member"), "{cancelled}");
    assert!(ids(&cluster).await.is_empty());
    cluster.stop_all().await;
}
