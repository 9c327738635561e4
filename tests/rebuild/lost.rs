//! What is found lost or broken when a node starts, or while it takes in a checkpoint or writes its tree.

use std::{path::PathBuf, sync::Arc};

use stemedb::{
    node::{disk::DiskState, rebuild::fail_point},
    state::engine::receive,
};

use crate::support::{Cluster, assert_all_there, write, write_large};

fn segments(cluster: &Cluster, i: usize) -> Vec<PathBuf> {
    let dir = cluster.folder(i).join("wal");
    let mut names: Vec<String> =
        cluster.disks[i].shared().list(&dir).unwrap().into_iter().map(|found| found.name).collect();
    names.retain(|name| name.ends_with(".wal"));
    names.sort();
    names.into_iter().map(|name| dir.join(name)).collect()
}

/// What is done to the files of a node that has stopped.
type Harm = fn(&Cluster, usize);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_log_that_is_lost_at_the_start_has_the_whole_node_rebuilt_without_a_command() {
    let mut cluster = Cluster::new(|_| {}).await;
    let mut acknowledged = Vec::new();
    let harms: [(&str, Harm); 3] = [
        ("the newest segment is gone", |c, i| {
            c.disks[i].shared().remove(segments(c, i).last().unwrap()).unwrap();
        }),
        ("every segment is gone", |c, i| {
            segments(c, i).iter().for_each(|path| c.disks[i].shared().remove(path).unwrap());
        }),
        ("both copies of the vote are damaged", |c, i| {
            for copy in ["hard-state.1", "hard-state.2"] {
                let path = c.folder(i).join("wal").join(copy);
                c.disks[i].corrupt(&path, |bytes| bytes.iter_mut().for_each(|byte| *byte ^= 0x10)).unwrap();
            }
        }),
    ];
    for (n, (what, harm)) in harms.into_iter().enumerate() {
        eprintln!("{what} on node {n}");
        write(cluster.node((n + 1) % 3), n as u128).await;
        acknowledged.push(n as u128);
        let old_id = cluster.id_of(n).await;
        cluster.stop(n).await;
        harm(&cluster, n);
        cluster.restart(n).await;
        assert!(cluster.id_of(n).await > old_id, "{what}: a node that has lost its log comes back under a fresh id");
        assert_all_there(&cluster, &acknowledged).await;
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_disk_that_fails_under_a_received_checkpoint_has_failed_for_the_node() {
    let mut cluster = Cluster::new(|_| {}).await;
    let mut acknowledged: Vec<u128> = Vec::new();
    // More than two rebuilds a day are for an operator to decide.
    for point in ["receive.write", "receive.sync"] {
        assert!(receive::STEPS.contains(&point));
        let leader = cluster.leader().await;
        let node = (leader + 1) % 3;
        let old_id = cluster.id_of(node).await;
        eprintln!("{point} on node {node}");
        let behind = cluster.node(leader).cluster().await.members.iter().filter_map(|m| m.last_log_index).max();
        cluster.stop(node).await;
        cluster
            .until("a log that begins after the end of the node's", async |c| {
                let n = 10_000 + c.node(leader).health().applied_index as u128;
                write_large(c.node(leader), n).await;
                let members = c.node(leader).cluster().await.members;
                let purged = members.iter().find(|m| m.name == c.peers[leader].name)?.purged_log_index;
                (purged > behind).then_some(())
            })
            .await;
        acknowledged = (0..cluster.node(leader).health().applied_index as u128).map(|n| 10_000 + n).collect();
        fail_point::arm(&cluster.folder(node), point);
        cluster.restart(node).await;
        let folder = cluster.folder(node);
        cluster.until("the fail point", async |_| (!fail_point::is_armed(&folder)).then_some(())).await;
        assert!(cluster.id_of(node).await > old_id, "{point}: it has latched, and rebuilt itself");
        assert_all_there(&cluster, &acknowledged).await;
    }
    assert!(!acknowledged.is_empty());
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_write_of_the_tree_that_hangs_has_the_leader_hand_over_and_work_again_afterwards() {
    let mut cluster = Cluster::new(|config| {
        config.storage.memtable_mb = 1;
        // What no client waits for stalls the node after the time of the fence, and fences it after twice as long.
        (config.cluster.stall_handoff_ms, config.cluster.stall_fence_ms) = (4_000, 5_000);
    })
    .await;
    let leader = cluster.leader().await;
    let release = fail_point::hang(&cluster.folder(leader), "flush.manifest");
    let other = Arc::clone(cluster.node((leader + 1) % 3));
    for n in 0..4 {
        write_large(&other, n).await;
    }
    cluster
        .until("another leader", async |c| {
            let stalled = c.node(leader).health().disk;
            let named = stalled.reason.is_some_and(|why| why.contains("kv/current"));
            let elsewhere = c.running().any(|(i, node)| i != leader && node.is_leader_with_quorum());
            (stalled.state == DiskState::Stalled && named && elsewhere).then_some(())
        })
        .await;
    write(&other, 4).await;
    drop(release);
    cluster.three_voters().await;
    assert_all_there(&cluster, &[0, 1, 2, 3, 4]).await;
    cluster.stop_all().await;
}

/// What a leader sends to a node that lags is compared where it arrives, and then where it came from.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_damaged_checkpoint_is_not_sent_for_ever_and_its_sender_is_mended() {
    let mut cluster = Cluster::new(|config| config.storage.memtable_mb = 1).await;
    let leader = cluster.leader().await;
    let (node, third) = ((leader + 1) % 3, (leader + 2) % 3);
    let (old_id, sender_id) = (cluster.id_of(node).await, cluster.id_of(leader).await);
    let behind = cluster.node(leader).cluster().await.members.iter().filter_map(|m| m.last_log_index).max();
    cluster.stop(node).await;
    let mut acknowledged = Vec::new();
    let mut purged = None;
    while purged <= behind {
        for n in 0..4 {
            let n = acknowledged.len() as u128 + n;
            write_large(cluster.node(third), n).await;
        }
        acknowledged.extend(acknowledged.len() as u128..acknowledged.len() as u128 + 4);
        let members = cluster.node(leader).cluster().await.members;
        purged = members.iter().find(|m| m.name == cluster.peers[leader].name).and_then(|m| m.purged_log_index);
    }
    // The tables of tree and checkpoint are the same files under two names, unless they were compacted meanwhile.
    for table in crate::tree::all_tables(&cluster.folder(leader)) {
        let Ok(file) = std::fs::OpenOptions::new().write(true).open(table) else { continue };
        std::os::unix::fs::FileExt::write_all_at(&file, &[0x5a; 64], 300).unwrap();
    }
    cluster.restart(node).await;
    assert_eq!(cluster.id_of(node).await, old_id, "it got what it lacked, and kept its log and vote");
    assert_all_there(&cluster, &acknowledged).await;
    // Whether its tree was replaced or only the checkpoint made anew, its log and vote are as good as before: it is no
    // reason to rebuild the node, and Raft, which asks for a checkpoint while there is none, does not end.
    assert_eq!(cluster.id_of(leader).await, sender_id, "the sender keeps its log and vote");
    assert_all_there(&cluster, &acknowledged).await;
    cluster.stop_all().await;
}
