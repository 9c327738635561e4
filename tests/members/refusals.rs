//! Orders that cannot be carried out say why and what to do, and change nothing.

use serde_json::json;
use stemedb::{
    cli::http_client::Call,
    config::MemberRole,
    node::rebuild::fail_point::{arm, is_armed},
};

use super::support::{Cluster, MEMBERS};

fn post(body: serde_json::Value) -> Call {
    Call::post(MEMBERS, body.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_an_order_is_said_before_anything_is_begun() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let (follower, third) = ((leader + 1) % 3, (leader + 2) % 3);
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    for asked in [leader, follower] {
        let (kind, detail) = cluster.refused(asked, Call::delete(format!("{MEMBERS}/node-9"))).await;
        assert!(kind == "not-found" && detail.contains("node-1, node-2, node-3"), "{kind}: {detail}");
        let (kind, detail) = cluster.refused(asked, post(json!({"name": "node-1", "addr": "127.0.0.1:9"}))).await;
        assert!(kind == "member-exists" && detail.contains("node-1 is a member already"), "{kind}: {detail}");
        let taken = &cluster.peer(third).addr;
        let (kind, detail) = cluster.refused(asked, post(json!({"name": "node-4", "addr": taken}))).await;
        assert!(kind == "member-exists" && detail.contains(cluster.name(third)), "{kind}: {detail}");
        let (kind, detail) = cluster.refused(asked, post(json!({"name": "node-4", "addr": closed}))).await;
        assert!(kind == "member-unfit" && detail.contains("no node answers"), "{kind}: {detail}");
        assert_eq!(
            cluster.refused(asked, post(json!({"name": "A b", "addr": "127.0.0.1:9"}))).await.0,
            "invalid-field"
        );
        assert_eq!(cluster.refused(asked, post(json!({"name": "node-4"}))).await.0, "invalid-field");
        let replace = Call::post(format!("{MEMBERS}/node-9/replace"), r#"{"name": "n", "addr": "127.0.0.1:9"}"#);
        assert_eq!(cluster.refused(asked, replace).await.0, "not-found");
    }
    // Fault tolerance would go: only by force, and a quorum not even so.
    let (kind, detail) = cluster.refused(follower, cluster.remove(third, "")).await;
    assert!(kind == "flow-refused" && detail.contains("force=true") && detail.contains("1 more may fail"), "{detail}");
    // A voter that answers and has nearly nothing of the log is no voter that works.
    cluster.disk(third).hang_sync("segment.0");
    let large = json!({"concept_path": "test/large", "predicate": "p", "value": "x".repeat(900_000)}).to_string();
    cluster
        .until("the third to need a checkpoint", async |c| {
            let written = c.call(leader, &Call::post("/v1/assert", large.clone())).await;
            assert!(written.is_success(), "{}", written.describe());
            let plan = c.taken(leader, c.remove(follower, "?dry_run=true&force=true")).await;
            let why = plan["detail"].as_str().unwrap();
            (plan["allowed"] == false && why.contains("its log") && why.contains(c.name(third))).then_some(())
        })
        .await;
    let (kind, detail) = cluster.refused(leader, cluster.remove(follower, "?force=true")).await;
    assert!(kind == "flow-refused" && detail.contains("nothing could be written"), "{kind}: {detail}");
    cluster.disk(third).release();
    cluster.stop(third).await;
    let (kind, detail) = cluster.refused(leader, cluster.remove(follower, "?force=true")).await;
    assert!(kind == "flow-refused" && detail.contains("nothing could be written"), "{detail}");
    let plan = cluster.taken(leader, cluster.remove(follower, "?dry_run=true")).await;
    assert_eq!((&plan["allowed"], &plan["outlook"]["failures_after"]), (&false.into(), &(-1).into()), "{plan}");
    // A node whose folder is not empty: one that was a member, under a name that is none any more.
    let job = cluster.taken(leader, cluster.remove(third, "")).await;
    assert_eq!(job["state"], "finished", "{job}");
    cluster.restart(third).await;
    cluster.until("it to know it", async |c| (c.node(third).health().status == "removed").then_some(())).await;
    let (kind, detail) = cluster.refused(leader, cluster.add(third, "")).await;
    assert!(kind == "member-unfit" && detail.contains("not empty"), "{kind}: {detail}");
    // Another node answers there.
    let spare = cluster.spare("node-7", MemberRole::Voter).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
    let order = json!({"name": "node-8", "addr": cluster.peer(spare).addr});
    let (kind, detail) = cluster.refused(leader, post(order)).await;
    assert!(kind == "member-unfit" && detail.contains("called \"node-7\""), "{kind}: {detail}");
    // Nobody listens where its clients would go.
    let order = json!({"name": "node-7", "addr": cluster.peer(spare).addr, "http": closed});
    let (kind, detail) = cluster.refused(leader, post(order)).await;
    assert!(
        kind == "member-unfit" && detail.contains(&format!("nobody listens for the clients of node-7 at {closed}"))
    );
    cluster.voters(&[leader, follower]).await;
    cluster.write(follower, "nothing else was changed").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_change_one_at_a_time_and_a_change_is_cancelled_until_the_voters_change() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let follower = (leader + 1) % 3;
    let spare = cluster.spare("node-4", MemberRole::Voter).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
    let folder = cluster.folder(spare);
    arm(&folder, "rebuild.joined");
    let answer = cluster.call(follower, &cluster.add(spare, "?wait=false")).await;
    assert_eq!(answer.status, 202, "{}", answer.describe());
    let job: serde_json::Value = answer.json().unwrap();
    let id = job["id"].as_str().unwrap();
    assert_eq!(answer.header("location"), Some(&*format!("/v1/admin/jobs/{id}")));
    let (kind, detail) = cluster.refused(follower, cluster.remove(follower, "?force=true")).await;
    assert!(kind == "flow-under-way" && detail.contains(id) && detail.contains("node-4"), "{kind}: {detail}");
    cluster.until("the node to join", async |_| (!is_armed(&folder)).then_some(())).await;
    // The leader needs nothing more of it, and a dead voter may be removed.
    cluster.ended(follower, id, "finished").await;
    cluster.stop(spare).await;
    let gone = cluster.taken(leader, cluster.remove(spare, "")).await;
    assert_eq!(gone["state"], "finished", "{gone}");
    cluster.voters(&[0, 1, 2]).await;

    let spare = cluster.spare("node-5", MemberRole::Voter).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
    let folder = cluster.folder(spare);
    arm(&folder, "rebuild.pulled");
    let job = cluster.taken(follower, cluster.add(spare, "?wait=false")).await;
    let id = job["id"].as_str().unwrap();
    cluster.until("the node to fetch", async |_| (!is_armed(&folder)).then_some(())).await;
    let cancelled = cluster.call(follower, &Call::delete(format!("/v1/admin/jobs/{id}"))).await;
    assert!(cancelled.is_success(), "{}", cancelled.describe());
    assert_eq!(cancelled.json::<serde_json::Value>().unwrap()["state"], "cancelled");
    for i in 0..3 {
        cluster.ended(i, id, "cancelled").await;
    }
    let over = cluster.call(leader, &Call::delete(format!("/v1/admin/jobs/{id}"))).await;
    assert!(over.is_success(), "a repetition is no error: {}", over.describe());
    let unknown = format!("/v1/admin/jobs/{}", uuid::Uuid::nil());
    assert_eq!(cluster.refused(leader, Call::delete(unknown)).await.0, "not-found");
    // Whoever was on its way comes with the next order.
    cluster.stop(spare).await;
    cluster.restart(spare).await;
    cluster.until("it to say so", async |c| (c.node(spare).health().status == "joining").then_some(())).await;
    let job = cluster.taken(leader, cluster.add(spare, "")).await;
    assert_eq!(job["state"], "finished", "{job}");
    cluster.voters(&[0, 1, 2, spare]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_may_have_begun_says_so_and_names_its_job() {
    if std::env::var_os("STEMEDB_TEST_FULL").is_none_or(|value| value != "1") {
        eprintln!("an order waits ten seconds for its entry: with STEMEDB_TEST_FULL=1");
        return;
    }
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    let spare = cluster.spare("node-4", MemberRole::Voter).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
    cluster
        .until("the feature level", async |c| {
            let report = c.node(leader).cluster().await;
            (report.feature_level == Some(stemedb::state::level::FEATURE_LEVEL)).then_some(())
        })
        .await;
    for i in others {
        cluster.disk(i).hang_sync("segment.0");
    }
    // Through another node: it is not given to the leader a second time.
    let answer = cluster.call(others[0], &cluster.add(spare, "?wait=false")).await;
    let problem = answer.problem();
    assert_eq!((answer.status, &*problem.kind), (503, "/problems/order-unknown"), "{}", answer.describe());
    assert_eq!(problem.outcome.as_deref(), Some("unknown"));
    let body: serde_json::Value = answer.json().unwrap();
    for i in others {
        cluster.disk(i).release();
    }
    cluster.ended(others[1], body["job"].as_str().unwrap(), "finished").await;
    cluster.voters(&[0, 1, 2, spare]).await;
    cluster.stop_all().await;
}
