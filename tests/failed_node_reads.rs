//! A node whose disk has failed answers reads through the others: three nodes with their HTTP listeners.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod cluster_rig;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use stemedb::{
    api,
    metrics::Metrics,
    node::{Ground, Node},
};
use stemedb_raft::disk::sim::{SimDisk, SyncFault};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

/// Far above what any condition needs; only a hang ends the test by this.
const HANG: Duration = Duration::from_secs(120);

async fn send(addr: SocketAddr, text: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(HANG, stream.read_to_string(&mut answer)).await.expect("an answer").unwrap();
    answer
}

async fn post(addr: SocketAddr, predicate: &str) -> String {
    let body = format!(r#"{{"concept_path":"a/b","predicate":"{predicate}","value":1}}"#);
    let head = "POST /v1/assert HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length";
    send(addr, &format!("{head}: {}\r\n\r\n{body}", body.len())).await
}

async fn get(addr: SocketAddr, target: &'static str) -> String {
    send(addr, &format!("GET {target} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")).await
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, wait).await.unwrap_or_else(|_| panic!("waited in vain for {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_at_a_node_with_a_failed_disk_are_answered_by_another() {
    let dir = tempfile::tempdir().unwrap();
    let (peers, listeners) = cluster_rig::nodes(3).await;
    let disks: Vec<SimDisk> = (0..3).map(|_| SimDisk::new()).collect();
    let stop = CancellationToken::new();
    let (mut nodes, mut addrs, mut serving) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (peer, http)) in listeners.into_iter().enumerate() {
        let config = cluster_rig::config(&peers, i, dir.path());
        let ground = Ground { peer_listener: Some(peer), disk: disks[i].shared(), ..Ground::default() };
        let node = Node::start_on(Arc::new(config), Arc::new(Metrics::new()), ground).await.unwrap();
        addrs.push(http.local_addr().unwrap());
        let own_stop = stop.child_token();
        serving.push((tokio::spawn(api::serve(http, Arc::clone(&node), own_stop.clone())), own_stop));
        nodes.push(node);
    }
    until("readiness", || nodes.iter().all(|n| n.is_ready().is_ok())).await;
    until("a leader", || nodes.iter().any(|n| n.is_leader_with_quorum())).await;
    let failed = nodes.iter().position(|n| n.is_leader_with_quorum()).unwrap();
    disks[failed].fail_next_sync("segment.001.wal", SyncFault::PagesMarkedClean);
    let before = post(addrs[failed], "before").await;
    assert!(before.starts_with("HTTP/1.1 201"), "{before}");
    until("the failure to be known", || nodes[failed].has_failed()).await;
    // The failed node never sees this one.
    let after = post(addrs[failed], "after").await;
    assert!(after.starts_with("HTTP/1.1 201"), "{after}");

    let page = get(addrs[failed], "/v1/query?concept_path=a/b&predicate=after").await;
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
    assert!(page.contains("\"predicate\":\"after\""), "{page}");
    let served_by = format!("\"served_by\":\"{}\"", peers[failed].name);
    assert!(page.contains("\"served_by\":") && !page.contains(&served_by), "{page}");
    let missing = get(addrs[failed], "/v1/assertions/00000000-0000-0000-0000-000000000000").await;
    assert!(missing.starts_with("HTTP/1.1 404") && missing.contains("application/problem+json"), "{missing}");

    // A moment in which none of the others answers is not the end of a read either.
    for (i, (task, own_stop)) in serving.iter_mut().enumerate().filter(|(i, _)| *i != failed) {
        own_stop.cancel();
        tokio::time::timeout(HANG, task).await.expect("the listener to close").unwrap().unwrap();
        assert!(TcpStream::connect(addrs[i]).await.is_err());
    }
    let target = "/v1/query?concept_path=a/b&predicate=after";
    let mut waiting = tokio::spawn(get(addrs[failed], target));
    let early = tokio::time::timeout(Duration::from_millis(300), &mut waiting).await;
    assert!(early.is_err(), "it was given up: {early:?}");
    for i in (0..3).filter(|i| *i != failed) {
        let http = TcpListener::bind(addrs[i]).await.unwrap();
        tokio::spawn(api::serve(http, Arc::clone(&nodes[i]), stop.clone()));
    }
    let page = tokio::time::timeout(HANG, waiting).await.expect("an answer").unwrap();
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("\"predicate\":\"after\""), "{page}");
    stop.cancel();
    for node in &nodes {
        node.shutdown().await;
    }
}
