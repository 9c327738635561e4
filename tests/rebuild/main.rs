//! Nodes that make themselves anew from a replica: three in one process, over loopback TCP, real files for the state
//! and a simulated disk under each log.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr)]

mod lost;
mod spare;
mod support;
mod tree;
mod waiting;

use std::sync::Arc;

use stemedb::node::rebuild::{desk::JobState, fail_point};
use stemedb_raft::disk::sim::{SimDisk, SyncFault};
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

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_operator_rebuilds_a_healthy_follower_and_then_the_leader() {
    let mut cluster = Cluster::new(|_| {}).await;
    let leader = cluster.leader().await;
    for n in 0..30 {
        write(cluster.node(leader), n).await;
    }
    let follower = (leader + 1) % 3;
    let unknown = cluster.node(follower).order_rebuild(Some("node-9".into())).await.unwrap_err();
    assert!(unknown.to_string().contains("node-9"), "{unknown}");
    for (node, from) in [(follower, Some(cluster.peers[leader].name.clone())), (leader, None)] {
        let old_id = cluster.id_of(node).await;
        let id = cluster.node(node).order_rebuild(from.clone()).await.unwrap();
        let job = cluster.node(node).jobs().wait_ended(&id).await.unwrap();
        assert_eq!((job.state, job.automatic), (JobState::Finished, false), "{job:?}");
        assert!(job.bytes_total > 0 && job.bytes_done == job.bytes_total, "{job:?}");
        assert!(from.is_none() || job.from == from, "{job:?}");
        assert!(cluster.id_of(node).await > old_id);
    }
    assert_all_there(&cluster, &(0..30).collect::<Vec<_>>()).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_emptied_node_comes_back_by_itself_under_another_id() {
    let mut cluster = Cluster::new(|_| {}).await;
    // The first of the list is the one that forms clusters: it must not form a second one.
    for node in [0, 1] {
        let n = node as u128;
        write(cluster.node(2), n).await;
        let old_id = cluster.id_of(node).await;
        cluster.stop(node).await;
        std::fs::remove_dir_all(cluster.folder(node)).unwrap();
        cluster.disks[node] = SimDisk::new();
        cluster.restart(node).await;
        assert!(cluster.id_of(node).await > old_id);
        assert_all_there(&cluster, &(0..=n).collect::<Vec<_>>()).await;
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_rebuild_is_refused_while_another_voter_is_down_and_says_which() {
    let mut cluster = Cluster::new(|_| {}).await;
    let leader = cluster.leader().await;
    let (asking, down) = ((leader + 1) % 3, (leader + 2) % 3);
    let old_id = cluster.id_of(asking).await;
    cluster.stop(down).await;
    let refused = cluster.node(asking).order_rebuild(None).await.unwrap_err();
    assert!(refused.to_string().contains(&cluster.peers[down].name), "{refused}");
    assert!(cluster.node(asking).is_ready().is_ok(), "nothing was ended");
    // An automatic one waits in the same way, with its files untouched.
    cluster.disks[asking].fail_next_sync("segment.", SyncFault::PagesMarkedClean);
    let writing = {
        let node = Arc::clone(cluster.node(leader));
        tokio::spawn(async move { write(&node, 1).await })
    };
    let name = cluster.peers[down].name.clone();
    cluster
        .until("an honest wait", async |c| {
            let job = c.node(asking).jobs().current()?;
            (job.state == JobState::Waiting && !c.folder(asking).join("quarantine").exists()).then_some(job)
        })
        .await;
    cluster.restart(down).await;
    writing.await.unwrap();
    assert!(cluster.id_of(asking).await > old_id, "once {name} is back it goes on");
    assert_all_there(&cluster, &[1]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_nodes_that_fail_at_once_wait_with_their_files_and_a_restart_brings_them_back() {
    let mut cluster = Cluster::new(|_| {}).await;
    let leader = cluster.leader().await;
    let (a, b) = ((leader + 1) % 3, (leader + 2) % 3);
    write(cluster.node(leader), 1).await;
    for node in [a, b] {
        cluster.disks[node].fail_next_sync("segment.", SyncFault::PagesMarkedClean);
    }
    let writing = {
        let node = Arc::clone(cluster.node(leader));
        tokio::spawn(async move { write(&node, 2).await })
    };
    cluster
        .until("two that wait", async |c| {
            let waits = |i: usize| c.node(i).jobs().current().is_some_and(|job| job.state == JobState::Waiting);
            (waits(a) && waits(b)).then_some(())
        })
        .await;
    for node in [a, b] {
        assert!(!cluster.folder(node).join("quarantine").exists(), "nothing was given up");
        cluster.stop(node).await;
        cluster.restart(node).await;
    }
    writing.await.unwrap();
    cluster.three_voters().await;
    assert_all_there(&cluster, &[1, 2]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn after_two_rebuilds_in_a_day_an_operator_decides() {
    let mut cluster = Cluster::new(|_| {}).await;
    let node = (cluster.leader().await + 1) % 3;
    for n in 0..2 {
        let old_id = cluster.id_of(node).await;
        cluster.disks[node].fail_next_sync("segment.", SyncFault::PagesMarkedClean);
        write(cluster.node((node + 1) % 3), n).await;
        cluster.until("a rebuild", async |c| c.node(node).jobs().current()).await;
        assert!(cluster.id_of(node).await > old_id);
    }
    let old_id = cluster.id_of(node).await;
    cluster.disks[node].fail_next_sync("segment.", SyncFault::PagesMarkedClean);
    write(cluster.node((node + 1) % 3), 2).await;
    let says = async |c: &Cluster| c.node(node).jobs().current().filter(|job| job.detail.contains("operator"));
    cluster.until("the word of an operator", says).await;
    let id = cluster.node(node).order_rebuild(None).await.unwrap();
    let job = cluster.node(node).jobs().wait_ended(&id).await.unwrap();
    assert_eq!(job.state, JobState::Finished, "{job:?}");
    assert!(cluster.id_of(node).await > old_id);
    assert_all_there(&cluster, &[0, 1, 2]).await;
    cluster.stop_all().await;
}

/// A process that dies at any step of a rebuild goes on with it, and never is half a voter.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_rebuild_that_is_killed_at_any_point_comes_to_its_end() {
    let mut cluster = Cluster::new(|_| {}).await;
    let mut acknowledged = Vec::new();
    let only = std::env::var("STEMEDB_TEST_POINT").ok();
    for (n, point) in fail_point::POINTS.iter().enumerate() {
        if only.as_ref().is_some_and(|only| only != point) {
            continue;
        }
        let node = n % 3;
        eprintln!("{point} on node {node}");
        let old_id = cluster.id_of(node).await;
        write(cluster.node((node + 1) % 3), n as u128).await;
        acknowledged.push(n as u128);
        fail_point::arm(&cluster.folder(node), point);
        cluster.node(node).order_rebuild(None).await.unwrap();
        let folder = cluster.folder(node);
        cluster.until("the fail point", async |_| (!fail_point::is_armed(&folder)).then_some(())).await;
        cluster.stop(node).await;
        write(cluster.node((node + 1) % 3), 1_000 + n as u128).await;
        acknowledged.push(1_000 + n as u128);
        cluster.restart(node).await;
        let members = cluster.three_voters().await;
        let id = members.iter().find(|m| m.name == cluster.peers[node].name).unwrap().id;
        assert!(id > old_id, "{point}: {members:?}");
        assert_all_there(&cluster, &acknowledged).await;
    }
    cluster.stop_all().await;
}

/// MB/s of a rebuild on an idle cluster, and under writes. `STEMEDB_TEST_MIB`: size of the state, 64 by default.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "a measurement, for people"]
async fn rebuild_speed() {
    let mib = std::env::var("STEMEDB_TEST_MIB").map_or(64, |text| text.parse::<u128>().unwrap());
    let mut cluster = Cluster::new(|config| {
        config.wal.retain_mb = 64;
        config.wal.segment_size_mb = 64;
        config.rebuild.quarantine_days = None;
    })
    .await;
    let leader = cluster.leader().await;
    for n in 0..2 * mib {
        support::write_large(cluster.node(leader), n).await;
    }
    for busy in [false, true] {
        let nodes: Vec<_> = cluster.running().map(|(_, node)| Arc::clone(node)).collect();
        let load = busy.then(|| Load::start(&nodes, 1_000_000_000));
        let node = (leader + 1) % 3;
        let began = tokio::time::Instant::now();
        let id = cluster.node(node).order_rebuild(None).await.unwrap();
        let pulled = cluster
            .until("the files", async |c| {
                let job = c.node(node).jobs().job(&id)?;
                (job.bytes_total > 0 && job.bytes_done >= job.bytes_total).then(|| (job, began.elapsed()))
            })
            .await;
        let job = cluster.node(node).jobs().wait_ended(&id).await.unwrap();
        let mb = job.bytes_total as f64 / 1e6;
        eprintln!(
            "busy {busy}: {mb:.0} MB here after {:.2} s ({:.0} MB/s), a voter after {:.2} s ({:.0} MB/s)",
            pulled.1.as_secs_f64(),
            mb / pulled.1.as_secs_f64(),
            job.ms as f64 / 1e3,
            mb / (job.ms as f64 / 1e3)
        );
        if let Some(load) = load {
            eprintln!("{} writes meanwhile", load.finish().await.len());
        }
    }
    cluster.stop_all().await;
}
