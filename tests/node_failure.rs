//! Disks that fail and hang under three nodes with their HTTP listeners, under load through all of them: not one error
//! for a client, nothing acknowledged is lost, and a disk that hangs for good closes its process.
//!
//! The gaps in writes are printed and never asserted: what a machine under other tests can do says nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr)]

#[path = "node_failure/cluster.rs"]
mod cluster;
mod cluster_rig;
#[path = "node_failure/returns.rs"]
mod returns;

use std::io::ErrorKind;

use cluster::{Cluster, HANG};
use stemedb::{
    judge::{ReadOutcome, WriteOutcome},
    node::disk::DiskState,
};
use stemedb_raft::disk::sim::{Kind, SyncFault};
use tokio::net::TcpStream;

const EIO: i32 = 5;

/// Nothing from this node counts after its disk failed: no answer names it.
fn assert_silent(cluster: &Cluster, node: usize) {
    assert!(cluster.nodes[node].has_failed());
    assert!(!cluster.nodes[node].is_leader_with_quorum());
    assert!(cluster.nodes[node].is_ready().is_err());
}

/// Breaks the disk of the leader or of a follower under load, and goes on for a while.
async fn fails_under_load(of_leader: bool, breaks: impl Fn(&Cluster, usize)) {
    let cluster = Cluster::start().await;
    let load = cluster.load(12);
    cluster.acknowledged(&load, 60).await;
    let leader = cluster.leader().await;
    let node = if of_leader { leader } else { (leader + 1) % 3 };
    let at_us = load.recorder().now_us();
    breaks(&cluster, node);
    cluster.until("the failure", || cluster.nodes[node].has_failed()).await;
    cluster.until("another leader", || cluster.leads_elsewhere(node)).await;
    if !of_leader {
        assert!(cluster.nodes[leader].is_leader_with_quorum(), "the failure of a follower moves nothing");
    }
    // Through all three nodes, the failed one as well.
    cluster.acknowledged(&load, 120).await;
    let history = load.stop().await;
    let gap = stemedb::judge::longest_gap_touching(&history.acknowledged_us(), at_us, at_us + 1_000_000);
    eprintln!("gap in writes: {} ms", gap.length_us() / 1_000);
    for write in &history.writes {
        assert!(matches!(write.outcome, WriteOutcome::Acknowledged { .. }), "an error for a client: {write:?}");
    }
    for read in &history.reads {
        assert!(matches!(read.outcome, ReadOutcome::Answered { .. }), "an error for a client: {read:?}");
    }
    let through = |node: usize| {
        history.writes.iter().filter(|write| usize::from(write.node) == node && write.start_us > at_us).count()
    };
    assert!((0..3).all(|node| through(node) > 0), "all nodes go on taking writes");
    assert_silent(&cluster, node);
    let health = cluster.nodes[node].health();
    assert_eq!((health.status.as_str(), health.disk.state), ("failed", DiskState::Failed));
    assert!(health.disk.reason.is_some() && health.leader.is_some());
    // The one node that no answer names any more.
    let (name, changed) = (cluster.nodes[node].name().to_owned(), load.recorder().now_us());
    assert!(changed > at_us);
    let served_by = cluster.write_once(node, "after").await;
    assert_ne!(served_by, name, "an acknowledgement by the failed node");
    let verdict = load.verdict(&cluster).await;
    assert!(verdict.is_clean(), "{verdict}");
    let metrics = cluster.nodes[node].metrics().encode();
    assert!(metrics.contains("stemedb_disk_state{state=\"failed\"} 1"), "{metrics}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_failed_sync_of_the_leader() {
    fails_under_load(true, |c, node| c.disks[node].fail_next_sync("segment.0", SyncFault::PagesMarkedClean)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_failed_sync_of_a_follower() {
    fails_under_load(false, |c, node| c.disks[node].fail_next_sync("segment.0", SyncFault::ContentsReverted)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_failed_write_of_the_leader() {
    fails_under_load(true, |c, node| c.disks[node].fail_next(Kind::Write, "segment.0", EIO)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_file_system_of_the_leader_that_turns_read_only() {
    fails_under_load(true, |c, node| c.disks[node].set_read_only(true)).await;
}

/// The vote is saved by the node that votes: a leader that fails makes the others save theirs, and one of them cannot.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_vote_that_cannot_be_saved_leaves_two_nodes_that_go_on() {
    let cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    let follower = (leader + 1) % 3;
    cluster.write_once(leader, "before").await;
    cluster.disks[follower].fail_next_sync("hard-state", SyncFault::PagesMarkedClean);
    cluster.nodes[leader].hand_over().await;
    cluster.until("the failure", || cluster.nodes[follower].has_failed()).await;
    let third = (leader + 2) % 3;
    cluster.until("a leader with a working disk", || cluster.nodes[third].is_leader_with_quorum()).await;
    for node in 0..3 {
        cluster.write_once(node, &format!("after-{node}")).await;
    }
    cluster.stop().await;
}

/// A sync that hangs on the leader: it hands over, and works again when the sync returns in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stall_of_the_leader_that_ends_in_time() {
    let cluster = Cluster::start().await;
    let load = cluster.load(12);
    cluster.acknowledged(&load, 60).await;
    let leader = cluster.leader().await;
    let at_us = load.recorder().now_us();
    cluster.disks[leader].hang_sync("segment.0");
    cluster.until("the stall", || cluster.nodes[leader].health().disk.state == DiskState::Stalled).await;
    assert_silent(&cluster, leader);
    cluster.until("another leader", || cluster.leads_elsewhere(leader)).await;
    cluster.acknowledged(&load, 120).await;
    assert_eq!(cluster.nodes[leader].health().status, "stalled");
    cluster.disks[leader].release();
    cluster.until("readiness", || cluster.nodes[leader].is_ready().is_ok()).await;
    assert_eq!(cluster.nodes[leader].health().disk.state, DiskState::Ok);
    cluster.until("its Raft", || cluster.nodes[leader].health().role == "follower").await;
    cluster.acknowledged(&load, 60).await;
    let history = load.stop().await;
    let gap = stemedb::judge::longest_gap_touching(&history.acknowledged_us(), at_us, at_us + 3_000_000);
    eprintln!("gap in writes: {} ms", gap.length_us() / 1_000);
    let error = history.writes.iter().find(|write| !matches!(write.outcome, WriteOutcome::Acknowledged { .. }));
    assert!(error.is_none(), "an error for a client: {error:?}");
    let error = history.reads.iter().find(|read| !matches!(read.outcome, ReadOutcome::Answered { .. }));
    assert!(error.is_none(), "an error for a client: {error:?}");
    let verdict = load.verdict(&cluster).await;
    assert!(verdict.is_clean(), "{verdict}");
    // It has caught up and counts: the cluster goes on without one of the others.
    cluster.write_once(leader, "after").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stall_of_a_follower_moves_nothing_and_its_clients_notice_nothing() {
    let cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    let follower = (leader + 1) % 3;
    let load = cluster.load(12);
    cluster.acknowledged(&load, 60).await;
    cluster.disks[follower].hang_sync("segment.0");
    cluster.until("the stall", || cluster.nodes[follower].health().disk.state == DiskState::Stalled).await;
    assert_silent(&cluster, follower);
    cluster.acknowledged(&load, 120).await;
    assert!(cluster.nodes[leader].is_leader_with_quorum());
    // It must not inherit either: the only other one does.
    cluster.nodes[leader].hand_over().await;
    let third = (leader + 2) % 3;
    cluster.disks[follower].release();
    cluster.until("the healthy one to lead", || cluster.nodes[third].is_leader_with_quorum()).await;
    cluster.until("readiness", || cluster.nodes[follower].is_ready().is_ok()).await;
    let history = load.stop().await;
    let error = history.writes.iter().find(|write| !matches!(write.outcome, WriteOutcome::Acknowledged { .. }));
    assert!(error.is_none(), "an error for a client: {error:?}");
    let verdict = load.verdict(&cluster).await;
    assert!(verdict.is_clean(), "{verdict}");
    cluster.stop().await;
}

/// A sync that hangs for good: the process takes nobody any more, and may end when the sync returns.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_disk_that_hangs_for_good_closes_the_process() {
    let cluster = Cluster::start_with(|config| config.cluster.stall_fence_ms = 2_000).await;
    let leader = cluster.leader().await;
    cluster.write_once(leader, "before").await;
    let (client_side, peer_side) = (cluster.http[leader], cluster.peers[leader].addr.clone());
    let idle = TcpStream::connect(client_side).await.unwrap();
    cluster.disks[leader].hang_sync("segment.0");
    // On their way while it hangs: both are answered, through the next leader.
    cluster.write_once(leader, "meanwhile").await;
    cluster.until("the stall", || cluster.nodes[leader].has_failed()).await;
    cluster.write_once(leader, "stalled").await;
    cluster.until("the fence", || cluster.nodes[leader].fenced().is_cancelled()).await;
    let refused = TcpStream::connect(client_side).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // The end of a connection that was open and idle.
    let mut byte = [0];
    let ended = tokio::time::timeout(HANG, async {
        loop {
            idle.readable().await.unwrap();
            match idle.try_read(&mut byte) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    });
    ended.await.expect("the connection to end");
    cluster.until_async("the peer port to close", async || TcpStream::connect(&peer_side).await.is_err()).await;
    assert_eq!(cluster.nodes[leader].health().disk.state, DiskState::Fenced);
    for node in (0..3).filter(|node| *node != leader) {
        cluster.write_once(node, &format!("after-{node}")).await;
    }
    cluster.disks[leader].release();
    tokio::time::timeout(HANG, cluster.nodes[leader].wait_fence_over()).await.expect("the end of the fence");
    assert!(TcpStream::connect(client_side).await.is_err(), "it stays closed");
    cluster.stop().await;
}

/// A stalled disk that then fails is failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stall_that_ends_in_an_error() {
    let cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    cluster.write_once(leader, "before").await;
    cluster.disks[leader].fail_next_sync("segment.0", SyncFault::PagesMarkedClean);
    cluster.disks[leader].hang(Kind::Write, "segment.0");
    cluster.write_once((leader + 1) % 3, "meanwhile").await;
    cluster.until("the stall", || cluster.nodes[leader].health().disk.state == DiskState::Stalled).await;
    cluster.until("another leader", || cluster.leads_elsewhere(leader)).await;
    cluster.disks[leader].release();
    cluster.until("the failure", || cluster.nodes[leader].health().disk.state == DiskState::Failed).await;
    for node in 0..3 {
        cluster.write_once(node, &format!("after-{node}")).await;
    }
    assert!(cluster.nodes[leader].health().leader.is_some());
    cluster.stop().await;
}
