//! A node that died is replaced by an empty one under load, and a living one too.

use stemedb::admin::rebuild::Phase;
use stemedb::config::MemberRole;
use stemedb::node::rebuild::fail_point::{arm, is_armed};
use stemedb::node::rebuild::{PLACE_WHY, journal::Journal, messages::KnownMember};
use stemedb_raft::types::Member;

use super::support::{Clients, Cluster};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_dead_node_is_replaced_by_an_empty_one_and_no_client_notices() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let dead = (leader + 1) % 3;
    for n in 0..50 {
        cluster.write(leader, &format!("before-{n}")).await;
    }
    // Before the load: what a death itself does to requests under way is not the subject here.
    cluster.stop(dead).await;
    let spare = cluster.spare("node-4", MemberRole::Voter).await;
    let clients = Clients::start(&cluster, 8);
    clients.go_on(&cluster, 200).await;
    let plan = cluster.taken(leader, cluster.replace(dead, spare, "?dry_run=true")).await;
    let outlook = &plan["outlook"];
    assert_eq!((&outlook["failures_now"], &outlook["failures_during"]), (&0.into(), &0.into()), "{plan}");
    assert_eq!((&outlook["failures_after"], &plan["allowed"]), (&1.into(), &true.into()), "{plan}");
    let job = cluster.taken(leader, cluster.replace(dead, spare, "")).await;
    assert_eq!(job["state"], "finished", "{job}");
    let rest: Vec<usize> = (0..4).filter(|i| *i != dead).collect();
    cluster.voters(&rest).await;
    clients.go_on(&cluster, 200).await;
    clients.finish(&cluster, &rest).await;
    assert_eq!(cluster.count(spare).await, 50);

    // The dead one comes back: it is told, and never takes part again.
    cluster.restart(dead).await;
    cluster.until("the dead one to know it", async |c| (c.node(dead).health().status == "removed").then_some(())).await;
    assert!(cluster.node(dead).health().place.unwrap().contains("node-4 has taken its place"));
    cluster.voters(&rest).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_dies_on_its_way_in_goes_on_when_it_is_back() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let old = (leader + 1) % 3;
    cluster.write(leader, "before").await;
    let spare = cluster.spare("node-4", MemberRole::Voter).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
    let mut order = cluster.replace(old, spare, "?wait=false");
    let mut id = None;
    for point in ["rebuild.granted", "rebuild.pulled", "rebuild.swap.installed", "rebuild.joined"] {
        let folder = cluster.folder(spare);
        arm(&folder, point);
        if id.is_none() {
            let job = cluster.taken(leader, order).await;
            id = Some(job["id"].as_str().unwrap().to_owned());
            order = cluster.replace(old, spare, "");
        }
        cluster.until(point, async |_| (!is_armed(&folder)).then_some(())).await;
        cluster.stop(spare).await;
        cluster.restart(spare).await;
    }
    cluster.ended(leader, &id.unwrap(), "finished").await;
    let rest: Vec<usize> = (0..4).filter(|i| *i != old).collect();
    cluster.voters(&rest).await;
    assert_eq!(cluster.count(spare).await, 1);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_comes_although_all_members_that_it_knew_have_been_replaced() {
    let mut cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    cluster.write(leader, "before").await;
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let gone = Member { name: "gone".into(), peer_addr: closed, http_addr: String::new() };
    // It was on its way in long ago.
    let journal = Journal {
        job: 7,
        phase: Phase::Granted,
        why: PLACE_WHY.to_owned(),
        automatic: true,
        fresh_id: 7_777,
        members: vec![KnownMember { id: 1, member: gone, voter: true }],
        ..Journal::default()
    };
    let prepare = |folder: &std::path::Path| journal.save(folder).unwrap();
    let spare = cluster.spare_with("node-4", MemberRole::Voter, prepare).await;
    cluster.until("it to say so", async |c| (c.node(spare).health().status == "joining").then_some(())).await;
    let job = cluster.taken(leader, cluster.add(spare, "")).await;
    assert_eq!(job["state"], "finished", "{job}");
    cluster.voters(&[0, 1, 2, spare]).await;
    assert_eq!(cluster.count(spare).await, 1);
    cluster.stop_all().await;
}
