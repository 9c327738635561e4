//! What the peer port says of a request, at a whole node.
#![allow(clippy::unwrap_used)]
use std::sync::atomic::Ordering;

use stemedb_raft::types::Vote;

use super::*;
use crate::{
    config::Config,
    metrics::Metrics,
    node::Node,
    state::command::{Command, CommandKey, KeySource, Operation},
};

async fn node(dir: &tempfile::TempDir) -> Arc<Node> {
    let mut config = Config::default();
    // A test needs no reserve for a full disk, and there are many nodes at once.
    config.storage.ballast_mb = 0;
    // A busy machine is not a hanging disk.
    (config.cluster.stall_handoff_ms, config.cluster.stall_fence_ms) = (60_000, 600_000);
    config.node.data_dir = dir.path().to_path_buf();
    config.cluster.peer_listen = Some("127.0.0.1:0".into());
    let node = Node::start(Arc::new(config), Arc::new(Metrics::new())).await.unwrap();
    while node.is_ready().is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    node
}

async fn ask<T: Serialize>(node: &Node, kind: Kind, request: &T) -> Answer {
    ask_as(node, 77, kind, request).await
}

async fn ask_as<T: Serialize>(node: &Node, sender: u64, kind: Kind, request: &T) -> Answer {
    let own = **node.shared().local.load();
    let hello = PeerHello {
        cluster_id: own.cluster_id,
        node_id: sender,
        target_id: own.node_id,
        boot: 1,
        lane: stemedb_net::Lane::Log,
        addr: "127.0.0.1:1".parse().unwrap(),
    };
    let mut connection = PeerService::new(Arc::clone(&node.process)).connected(hello);
    connection.on_request(kind.number(), pack(request).unwrap()).await
}

fn command(source: KeySource) -> Command {
    Command {
        key: CommandKey { source, id: 7 },
        body_hash: 0,
        resend_until_ms: u64::MAX,
        created_at_ms: 1,
        op: Operation::Assert(vec![]),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promise_waits_for_the_boot_of_whom_it_goes_to_and_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(&dir).await;
    let vote = |candidate| VoteRequest::<TypeConfig>::new(Vote::new(0, candidate), None);
    // Refused as too old by Raft, which is an answer.
    assert!(ask_as(&node, 77, Kind::Vote, &vote(77)).await.is_ok());
    // From here on no boot can be saved.
    let partner = dir.path().join("peers-seen.spare");
    std::fs::remove_file(&partner).unwrap();
    std::os::unix::fs::symlink("/dev/full", &partner).unwrap();
    let refusal = ask_as(&node, 78, Kind::Vote, &vote(78)).await.unwrap_err();
    assert_eq!(refusal.code, FAILED, "it reached Raft, and is never refused as without effect: {refusal:?}");
    assert!(ask_as(&node, 77, Kind::Vote, &vote(77)).await.is_ok(), "its own boot is durable");
    // What promises nothing is answered: with every disk full the clients of a node that restarts read all the same.
    let request = ForwardRequest { commands: vec![command(KeySource::Node)] };
    let forwarded: ForwardReply = unpack(&ask_as(&node, 78, Kind::Forward, &request).await.unwrap()).unwrap();
    assert!(matches!(&forwarded.answers[..], [ProposeAnswer::Outcome(_)]), "{forwarded:?}");
    assert!(ask_as(&node, 78, Kind::Status, &()).await.is_ok());
    assert!(ask_as(&node, 78, Kind::ReadIndex, &()).await.is_ok());
    std::fs::remove_file(&partner).unwrap();
    assert!(ask_as(&node, 78, Kind::Vote, &vote(78)).await.is_ok(), "there is room again");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_about_to_stop_refuses_leadership() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(&dir).await;
    let own_id = node.shared().local.load().node_id;
    let offer = TransferLeaderRequest::<TypeConfig>::new(Vote::new(1, 2), own_id, None);
    let taken = ask(&node, Kind::TransferLeader, &offer).await;
    assert!(taken.is_ok(), "{taken:?}");
    node.shared().leaving.store(true, Ordering::Relaxed);
    let refusal = ask(&node, Kind::TransferLeader, &offer).await.unwrap_err();
    assert_eq!(refusal.code, REFUSED_BEFORE_EFFECT, "{refusal:?}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_passes_on_requests_and_its_word_counts_for_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(&dir).await;
    let guest = stemedb_net::LocalIdentity::guest([1; 16], 9).node_id;
    let request = ForwardRequest { commands: vec![command(KeySource::Client)] };
    let forwarded = ask_as(&node, guest, Kind::Forward, &request).await.unwrap();
    let reply: ForwardReply = unpack(&forwarded).unwrap();
    assert!(matches!(&reply.answers[..], [ProposeAnswer::Outcome(_)]), "{reply:?}");
    assert!(ask_as(&node, guest, Kind::Status, &()).await.is_ok());
    assert!(ask_as(&node, guest, Kind::ReadIndex, &()).await.is_ok());
    let vote = VoteRequest::<TypeConfig>::new(Vote::new(u64::MAX, guest), None);
    for refusal in [
        ask_as(&node, guest, Kind::Vote, &vote).await,
        ask_as(&node, guest, Kind::PreVote, &vote).await,
        ask_as(&node, guest, Kind::LogEnd, &()).await,
        ask_as(&node, guest, Kind::RebuildStep, &()).await,
    ] {
        assert!(refusal.is_err_and(|refusal| refusal.message.contains("no place in this cluster")));
    }
    assert_eq!(node.process.boots.highest(guest), None, "nothing about it is remembered");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_says_that_it_forms_no_cluster_before_anybody_gets_a_place() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.storage.ballast_mb = 0;
    config.node.data_dir = dir.path().to_path_buf();
    config.cluster.peer_listen = Some("127.0.0.1:0".into());
    config.cluster.role = MemberRole::Learner;
    let config = Arc::new(config);
    let node = Node::start(Arc::clone(&config), Arc::new(Metrics::new())).await.unwrap();
    let said = ask(&node, Kind::Probe, &()).await.unwrap_err().to_string();
    assert!(said.contains("never forms a cluster") && said.contains("bootstrap_expect"), "{said}");
    node.shutdown().await;
}
