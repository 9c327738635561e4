//! Disks under the log that neither fail nor hang: one stays slow, one gives the log no more room although the numbers
//! say that there is some. Leadership goes elsewhere, and clients notice no more than slow answers before it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

#[allow(dead_code)]
#[path = "node_failure/cluster.rs"]
mod cluster;
mod cluster_rig;

use std::time::Duration;

use cluster::Cluster;
use stemedb::{
    judge::{ReadOutcome, WriteOutcome},
    model::NewAssertion,
    node::{Node, disk::DiskState},
    state::command::{CommandKey, KeySource, Operation, Outcome},
};
use stemedb_raft::disk::sim::Kind;
use uuid::Uuid;

/// Above the limit by enough that two busy cores do not make the other disks look as slow.
const SLOW: Duration = Duration::from_millis(1_000);
const LIMIT_MS: u64 = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_whose_disk_stays_slow_gives_leadership_away_once() {
    let cluster = Cluster::start_with(|config| {
        config.cluster.slow_fsync_ms = LIMIT_MS;
        // Slow is not hanging.
        config.cluster.stall_handoff_ms = 60_000;
    })
    .await;
    let load = cluster.load(6);
    cluster.acknowledged(&load, 30).await;
    let leader = cluster.leader().await;
    cluster.disks[leader].delay(Kind::Sync, "segment.0", SLOW);
    cluster.until("a slow disk", || cluster.nodes[leader].health().disk.state == DiskState::Slow).await;
    cluster.until("another leader", || cluster.leads_elsewhere(leader)).await;
    let next = cluster.leader().await;
    // Its votes and appends count on, only later; nothing waits for it.
    assert!(!cluster.nodes[leader].has_failed() && cluster.nodes[leader].is_ready().is_ok());
    cluster.acknowledged(&load, 60).await;
    assert_eq!(cluster.leader().await, next, "leadership wanders");
    cluster.disks[leader].release();
    cluster.acknowledged(&load, 30).await;
    let history = load.stop().await;
    for write in &history.writes {
        assert!(matches!(write.outcome, WriteOutcome::Acknowledged { .. }), "an error for a client: {write:?}");
    }
    for read in &history.reads {
        assert!(matches!(read.outcome, ReadOutcome::Answered { .. }), "an error for a client: {read:?}");
    }
    let verdict = load.verdict(&cluster).await;
    assert!(verdict.is_clean(), "{verdict}");
    cluster.stop().await;
}

/// One write of 50,000 bytes: twenty of them fill a segment.
async fn write_large(node: &Node, n: u128) {
    let assertion = NewAssertion {
        id: Uuid::from_u128(n),
        concept_path: "test/a".into(),
        predicate: "p".into(),
        value_json: format!("\"{}\"", "v".repeat(50_000)),
        source: None,
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
    };
    let key = Some(CommandKey { source: KeySource::Client, id: n });
    let written = node.submit(Operation::Assert(vec![assertion]), key, n).await.expect("an error for a client");
    assert!(matches!(written.outcome.outcome, Outcome::Applied(_)), "{written:?}");
}

/// What a quota does: no number shows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_log_that_gets_no_room_for_its_next_segment_makes_its_node_full_in_time() {
    let cluster = Cluster::start_with(|config| config.cluster.stall_handoff_ms = 60_000).await;
    let leader = cluster.leader().await;
    let is_full = || cluster.nodes[leader].health().disk.state == DiskState::Full;
    cluster.disks[leader].set_inodes_left(Some(0));
    let mut next = 1;
    // Until the spare that was there is in use.
    while !is_full() {
        write_large(&cluster.nodes[leader], next).await;
        next += 1;
        assert!(next < 200, "the node does not notice");
        if cluster.disks[leader].operations().iter().filter(|o| *o == "create segment.spare").count() > 2 {
            cluster.until("a full disk", is_full).await;
        }
    }
    let reason = cluster.nodes[leader].health().disk.reason.unwrap_or_default();
    assert!(reason.contains("the log waits for room for its next segment"), "{reason}");
    cluster.until("another leader", || cluster.leads_elsewhere(leader)).await;
    write_large(&cluster.nodes[leader], next).await;
    assert!(!cluster.nodes[leader].has_failed());
    cluster.disks[leader].set_inodes_left(None);
    cluster.until("room", || cluster.nodes[leader].health().disk.state == DiskState::Ok).await;
    write_large(&cluster.nodes[leader], next + 1).await;
    cluster.stop().await;
}
