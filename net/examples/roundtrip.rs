//! Measures calls between two ends of a loopback connection in one process: one at a time, then many at once.
//! `cargo run --release -p stemedb-net --example roundtrip`

#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture, future::join_all};
use stemedb_net::{ConnectionHandler, Lane, Limits, Listener, LocalIdentity, Peer, PeerHello, Refusal, Service};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

struct Echo;

impl Service for Echo {
    fn connected(&self, _peer: PeerHello) -> Box<dyn ConnectionHandler> {
        Box::new(Echo)
    }

    fn admit(&self, _hello: &PeerHello, _kind: u16) -> Result<(), Refusal> {
        Ok(())
    }
}

impl ConnectionHandler for Echo {
    fn on_request(&mut self, _kind: u16, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        async move { Ok(body) }.boxed()
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let timeout = Duration::from_secs(10);
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = tcp.local_addr().unwrap().to_string();
    let target = LocalIdentity { cluster_id: [1; 16], node_id: 2, boot: 1 };
    let source = LocalIdentity { cluster_id: [1; 16], node_id: 1, boot: 1 };
    let shutdown = CancellationToken::new();
    let serving = Listener::serve(tcp, Arc::new(move || target), Arc::new(Echo), Limits::default(), shutdown);
    tokio::spawn(serving);
    let peer = Peer::new(Arc::new(move || source), addr, 2, Lane::Log, Limits::default());
    peer.call(16, Bytes::new(), timeout).await.unwrap();

    let body = Bytes::from(vec![7; 200]);
    let one_by_one = tokio::spawn({
        let (peer, body) = (peer.clone(), body.clone());
        async move {
            let mut took = Vec::new();
            for _ in 0..20_000 {
                let begun = Instant::now();
                peer.call(16, body.clone(), timeout).await.unwrap();
                took.push(begun.elapsed());
            }
            took.sort();
            took
        }
    });
    let took = one_by_one.await.unwrap();
    let at = |share: usize| took.get(took.len() * share / 1000).unwrap().as_nanos() as f64 / 1000.0;
    println!("one at a time, 200 bytes: p50 {:.1} us, p99 {:.1} us, p99.9 {:.1} us", at(500), at(990), at(999));

    for callers in [16, 256] {
        let calls_each = 200_000 / callers;
        let begun = Instant::now();
        join_all((0..callers).map(|_| {
            let (peer, body) = (peer.clone(), body.clone());
            tokio::spawn(async move {
                for _ in 0..calls_each {
                    peer.call(16, body.clone(), timeout).await.unwrap();
                }
            })
        }))
        .await;
        let per_s = (callers * calls_each) as f64 / begun.elapsed().as_secs_f64();
        println!("{callers} callers, 200 bytes: {per_s:.0} calls/s");
    }

    let large = Bytes::from(vec![7; 32 << 20]);
    let begun = Instant::now();
    for _ in 0..16 {
        peer.call(16, large.clone(), timeout).await.unwrap();
    }
    let mib_per_s = 16.0 * 32.0 / begun.elapsed().as_secs_f64();
    println!("bodies of 32 MiB there and back: {mib_per_s:.0} MiB/s each way");
}
