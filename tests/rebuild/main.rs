//! Nodes that make themselves anew from a replica: three in one process, over loopback TCP, real files for the state
//! and a simulated disk under each log.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr)]

mod support;

use std::sync::Arc;

use stemedb_raft::disk::sim::SyncFault;
use support::{Cluster, Load, assert_all_there, write};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_whose_sync_fails_under_load_rebuilds_itself_without_a_command() {
    let mut cluster = Cluster::new(|_| {}).await;
    let leader = cluster.leader().await;
    let old_id = cluster.id_of(leader).await;
    for n in 0..50 {
        write(cluster.node(leader), n).await;
    }
    let nodes: Vec<_> = cluster.running().map(|(_, node)| Arc::clone(node)).collect();
    let load = Load::start(&nodes, 1_000);
    cluster.disks[leader].fail_next_sync("segment.", SyncFault::PagesMarkedClean);
    cluster.until("the failure", async |c| c.node(leader).has_failed().then_some(())).await;
    let members = cluster.three_voters().await;
    let name = &cluster.peers[leader].name;
    let fresh_id = members.iter().find(|m| m.name == *name).unwrap().id;
    assert!(fresh_id > old_id, "{members:?}");
    let mut acknowledged = load.finish().await;
    drop(nodes);
    acknowledged.extend(0..50);
    assert_all_there(&cluster, &acknowledged).await;
    let quarantine = cluster.folder(leader).join("quarantine");
    let kept = std::fs::read_dir(quarantine).unwrap().next().unwrap().unwrap().path();
    assert!(kept.join("identity").exists() && kept.join("kv").exists(), "the old files are kept");

    // It is a node like any other: it starts again from its files.
    cluster.stop(leader).await;
    cluster.restart(leader).await;
    assert_eq!(cluster.id_of(leader).await, fresh_id);
    assert_all_there(&cluster, &acknowledged).await;
    cluster.stop_all().await;
}
