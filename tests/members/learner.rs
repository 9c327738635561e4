//! A learner stays one: it has everything, answers, and never counts.

use serde_json::{Value, json};
use stemedb::{cli::http_client::Call, config::MemberRole};

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
    cluster.restart(far).await;
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
