//! What clusters in one process begin with: addresses, and the configuration of each node. How nodes are started, stopped
//! and looked at differs from test to test.
#![allow(dead_code, clippy::unwrap_used, clippy::indexing_slicing)]

use std::{io, path::Path};

use stemedb::config::{Config, PeerEntry};
use tokio::net::TcpListener;

/// The listeners of one node: for the others, and for clients.
pub type Listeners = (TcpListener, TcpListener);

/// `node-1` and so on, each with ports of its own.
pub async fn nodes(count: usize) -> (Vec<PeerEntry>, Vec<Listeners>) {
    let (mut peers, mut listeners) = (Vec::new(), Vec::new());
    for i in 1..=count {
        let peer = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let of = |listener: &TcpListener| listener.local_addr().unwrap().to_string();
        peers.push(PeerEntry { name: format!("node-{i}"), addr: of(&peer), http: of(&http) });
        listeners.push((peer, http));
    }
    (peers, listeners)
}

/// The configuration of node `i`, whose folder lies in `dir`: for a machine on which other tests run.
pub fn config(peers: &[PeerEntry], i: usize, dir: &Path) -> Config {
    let mut config = Config::default();
    config.node.name.clone_from(&peers[i].name);
    config.node.data_dir = dir.join(&peers[i].name);
    config.http.listen.clone_from(&peers[i].http);
    config.cluster.peers = peers.to_vec();
    config.cluster.bootstrap_expect = u32::try_from(peers.len()).unwrap();
    // A test needs no reserve for a full disk, and there are many nodes at once.
    config.storage.ballast_mb = 0;
    // A busy machine is not a hanging disk.
    (config.cluster.stall_handoff_ms, config.cluster.stall_fence_ms) = (60_000, 600_000);
    // What becomes of a failed node is for `tests/rebuild`.
    config.cluster.auto_rebuild = false;
    // Two cores run three nodes and other tests: elections by overload are not what is tested here.
    config.cluster.heartbeat_ms = 100;
    config.cluster.election_min_ms = 600;
    config.cluster.election_max_ms = 1_200;
    // However slow the machine is, a request gets its answer.
    config.cluster.request_deadline_ms = 60_000;
    config.wal.segment_size_mb = 1;
    config
}

/// Writes what nodes log to the standard error stream, where `STEMEDB_TEST_LOG` asks for it.
pub fn log_if_wanted() {
    if std::env::var_os("STEMEDB_TEST_LOG").is_some() {
        let _set_before = tracing_subscriber::fmt().with_writer(io::stderr).try_init();
    }
}
