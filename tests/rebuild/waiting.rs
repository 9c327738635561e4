//! A node that has lost its files and must wait before it may come back.

use std::sync::Arc;

use stemedb::{
    node::{
        kinds::Kind,
        messages::{pack, unpack},
        rebuild::{
            desk::JobState,
            messages::{Ask, AskReply},
        },
    },
    state::command::{CommandKey, KeySource},
};
use stemedb_net::{Lane, Limits, LocalIdentity, Peer};
use stemedb_raft::disk::sim::SimDisk;

use super::support::{Cluster, HANG, assert_all_there, assertion, write};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_emptied_node_that_waits_passes_on_what_its_clients_send() {
    // It may not come back by itself at all.
    let mut cluster = Cluster::new(|config| config.rebuild.automatic_per_day = 0).await;
    let leader = cluster.leader().await;
    let emptied = (leader + 1) % 3;
    write(cluster.node(leader), 0).await;
    let old_id = cluster.id_of(emptied).await;
    cluster.stop(emptied).await;
    std::fs::remove_dir_all(cluster.folder(emptied)).unwrap();
    cluster.disks[emptied] = SimDisk::new();
    cluster.restart(emptied).await;
    let waits = async |c: &Cluster| c.node(emptied).jobs().current().filter(|job| job.state == JobState::Waiting);
    let job = cluster.until("it to wait for an operator", waits).await;
    assert!(job.detail.contains("an operator decides"), "{job:?}");
    let node = Arc::clone(cluster.node(emptied));
    for n in 1..=20 {
        // Once, and not as long as it takes.
        let key = Some(CommandKey { source: KeySource::Client, id: n });
        node.submit(assertion(n), key, n).await.unwrap_or_else(|error| panic!("write {n}: {error:?}"));
    }
    assert!(waits(&cluster).await.is_some(), "and it waits as before");
    node.order_rebuild(None).await.unwrap();
    cluster.until("it to come back", async |c| c.node(emptied).is_ready().is_ok().then_some(())).await;
    assert!(cluster.id_of(emptied).await > old_id);
    assert_all_there(&cluster, &(0..=20).collect::<Vec<_>>()).await;
    cluster.stop_all().await;
}

/// A permit expires by log time, and while nothing is written that moves with entries only.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_waits_for_a_permit_that_was_left_behind_moves_log_time() {
    let mut cluster = Cluster::new(|_| {}).await;
    let leader = cluster.leader().await;
    let (left, waits) = ((leader + 1) % 3, (leader + 2) % 3);
    cluster.stop(left).await;
    // In the name of a node that comes back and knows nothing of it.
    let name = cluster.peers[left].name.clone();
    let ask = Ask { cluster_id: None, name, job: 7, automatic: false, dry_run: false, emptied: false };
    let nobody = Arc::new(LocalIdentity::default);
    let peer = Peer::new(nobody, cluster.peers[leader].addr.clone(), 0, Lane::Control, Limits::default());
    let answer = peer.call(Kind::RebuildAsk.number(), pack(&ask).unwrap(), HANG).await.unwrap();
    peer.close();
    let granted: AskReply = unpack(&answer).unwrap();
    assert!(matches!(granted, AskReply::Granted(_)), "{granted:?}");
    cluster.restart(left).await;
    cluster.until("readiness", async |c| c.node(left).is_ready().is_ok().then_some(())).await;
    cluster.stop(waits).await;
    std::fs::remove_dir_all(cluster.folder(waits)).unwrap();
    cluster.disks[waits] = SimDisk::new();
    cluster.restart(waits).await;
    let applied = async |c: &Cluster| {
        let members = c.node(leader).cluster().await.members;
        members.into_iter().find(|member| member.name == c.peers[leader].name)?.applied_log_index
    };
    let held = async |c: &Cluster| {
        let job = c.node(waits).jobs().current().filter(|job| job.state == JobState::Waiting)?;
        job.detail.contains("one node at a time").then_some(())
    };
    cluster.until("it to wait for the holder", held).await;
    let before = applied(&cluster).await.unwrap();
    cluster.until("entries", async |c| applied(c).await.filter(|now| *now >= before + 3)).await;
    cluster.until("it to wait as before", held).await;
    cluster.stop_all().await;
}
