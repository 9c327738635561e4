//! A learner stays one: it has everything, answers, and never counts.

use serde_json::json;
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
