//! Peers and listeners over real sockets of the loopback interface.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, future::BoxFuture, future::join_all};
use stemedb_net::{
    CallError, ConnectionHandler, Lane, Limits, Listener, LocalIdentity, LocalProvider, Peer, PeerHello, Refusal,
    Service, code, identity,
    wire::{HEADER_BYTES, Notice, Start, read_start},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

const CLUSTER: [u8; 16] = [5; 16];
const PROBE: u16 = 1;
const ECHO: u16 = 16;
const GATED: u16 = 17;
/// Far longer than anything here takes: its passing is a failed test.
const LONG: Duration = Duration::from_secs(60);

fn identity(node_id: u64) -> LocalIdentity {
    LocalIdentity { cluster_id: CLUSTER, node_id, boot: 4 }
}

fn provider(identity: LocalIdentity) -> LocalProvider {
    Arc::new(move || identity)
}

fn peer_to(addr: SocketAddr) -> Peer {
    Peer::new(provider(identity(1)), addr.to_string(), 2, Lane::Log, Limits::default())
}

/// Node 2: echoes, and remembers the order of arrival.
struct Node {
    seen: watch::Sender<Vec<Bytes>>,
    gate: Semaphore,
    boot_highest: u64,
}

struct NodeService(Arc<Node>);

impl Service for NodeService {
    fn connected(&self, _: PeerHello) -> Box<dyn ConnectionHandler> {
        Box::new(NodeService(Arc::clone(&self.0)))
    }

    fn admit(&self, hello: &PeerHello, kind: u16) -> Result<(), Refusal> {
        identity::judge(&identity(2), hello, kind, Some(self.0.boot_highest))
    }
}

impl ConnectionHandler for NodeService {
    fn on_request(&mut self, kind: u16, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        let node = Arc::clone(&self.0);
        node.seen.send_modify(|seen| seen.push(body.clone()));
        async move {
            if kind == GATED {
                node.gate.acquire().await.unwrap().forget();
            }
            Ok(body)
        }
        .boxed()
    }
}

struct Running {
    node: Arc<Node>,
    addr: SocketAddr,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
    port: Port,
}

impl Running {
    fn start() -> Self {
        Self::start_with(Limits::default())
    }

    fn start_with(limits: Limits) -> Self {
        let socket = bind(SocketAddr::from(([127, 0, 0, 1], 0)));
        let port = Port(bind(socket.local_addr().unwrap()));
        Self::start_on(socket, port, limits)
    }

    fn start_on(socket: TcpSocket, port: Port, limits: Limits) -> Self {
        let tcp = socket.listen(64).unwrap();
        let addr = tcp.local_addr().unwrap();
        let node = Arc::new(Node { seen: watch::Sender::new(vec![]), gate: Semaphore::new(0), boot_highest: 4 });
        let shutdown = CancellationToken::new();
        let service = Arc::new(NodeService(Arc::clone(&node)));
        let serving = tokio::spawn(Listener::serve(tcp, provider(identity(2)), service, limits, shutdown.clone()));
        Running { node, addr, shutdown, serving, port }
    }

    /// Starts anew where another one was.
    fn restart(port: Port) -> Self {
        let next = Port(bind(port.0.local_addr().unwrap()));
        Self::start_on(port.0, next, Limits::default())
    }

    async fn wait_seen(&self, count: usize) {
        self.node.seen.subscribe().wait_for(|seen| seen.len() >= count).await.unwrap();
    }

    /// Ends everything at once, as a crash does.
    async fn crash(self) -> Port {
        self.serving.abort();
        assert!(self.serving.await.unwrap_err().is_cancelled());
        self.port
    }
}

/// Keeps a port from being given to another test while nobody listens on it.
struct Port(TcpSocket);

fn bind(addr: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(addr).unwrap();
    socket
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_callers_are_heard_in_the_order_of_their_sends() {
    let server = Running::start();
    let peer = peer_to(server.addr);
    let sent = Arc::new(Mutex::new(Vec::new()));
    let callers = (0..8_u32).map(|caller| {
        let (peer, sent) = (peer.clone(), Arc::clone(&sent));
        tokio::spawn(async move {
            for n in 0..200_u32 {
                let body = Bytes::from([caller.to_le_bytes(), n.to_le_bytes()].concat());
                let pending = {
                    let mut sent = sent.lock().unwrap();
                    sent.push(body.clone());
                    peer.send(ECHO, body.clone()).unwrap()
                };
                if n % 3 == 0 {
                    assert_eq!(pending.wait(LONG).await.unwrap(), body);
                } else {
                    tokio::spawn(pending.wait(LONG));
                }
            }
        })
    });
    for joined in join_all(callers).await {
        joined.unwrap();
    }
    server.wait_seen(1600).await;
    assert!(*server.node.seen.borrow() == *sent.lock().unwrap());
}

#[tokio::test]
async fn large_and_small_bodies_come_back_unchanged() {
    let server = Running::start();
    let peer = peer_to(server.addr);
    let bodies: Vec<Bytes> = [0, 1, 16_384, 16_385, 65_536, 3 << 20, 20 << 20, 100]
        .into_iter()
        .map(|size: usize| {
            let mut body = BytesMut::with_capacity(size);
            body.extend((0..size).map(|at| (at * 31 + size) as u8));
            body.freeze()
        })
        .collect();
    let pending: Vec<_> = bodies.iter().map(|body| peer.send(ECHO, body.clone()).unwrap()).collect();
    for (pending, body) in pending.into_iter().zip(&bodies) {
        assert!(pending.wait(LONG).await.unwrap() == *body);
    }
}

#[tokio::test]
async fn after_a_crash_sent_calls_are_unknown_and_the_next_ones_reach_the_new_server() {
    let server = Running::start();
    let peer = peer_to(server.addr);
    assert!(!peer.is_connected());
    let sent = peer.send(GATED, Bytes::from_static(b"lost")).unwrap();
    server.wait_seen(1).await;
    assert!(peer.is_connected());
    let port = server.crash().await;
    // No timeout of the caller is needed to learn of the loss.
    assert!(matches!(sent.wait(LONG).await, Err(CallError::Unknown { .. })));

    let queued = peer.send(ECHO, Bytes::from_static(b"kept")).unwrap();
    let server = Running::restart(port);
    assert_eq!(queued.wait(LONG).await.unwrap(), "kept");
    assert_eq!(*server.node.seen.borrow(), ["kept"]);
}

#[tokio::test]
async fn while_nobody_listens_calls_are_not_sent_and_never_are() {
    let port = Running::start().crash().await;
    let peer = peer_to(port.0.local_addr().unwrap());
    let error = peer.call(ECHO, Bytes::from_static(b"given up"), Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(error, CallError::NotSent { .. }), "{error}");
    assert!(error.is_surely_unhandled());
    let server = Running::restart(port);
    assert!(peer.call(ECHO, Bytes::from_static(b"next"), LONG).await.is_ok());
    assert_eq!(*server.node.seen.borrow(), ["next"]);
}

#[tokio::test]
async fn strangers_are_refused_and_nothing_of_theirs_is_handled() {
    let server = Running::start();
    let cases = [
        (LocalIdentity { cluster_id: [6; 16], ..identity(1) }, 2, code::WRONG_CLUSTER),
        (identity(1), 3, code::WRONG_TARGET),
        (LocalIdentity { boot: 3, ..identity(1) }, 2, code::STALE_BOOT),
        (LocalIdentity::default(), 0, code::NO_IDENTITY),
    ];
    for (local, target_id, want) in cases {
        let peer = Peer::new(provider(local), server.addr.to_string(), target_id, Lane::Log, Limits::default());
        let error = peer.call(ECHO, Bytes::from_static(b"?"), LONG).await.unwrap_err();
        assert!(matches!(error, CallError::Refused { code, .. } if code == want), "{want}: {error}");
        assert!(error.is_surely_unhandled());
        assert!(peer.call(PROBE, Bytes::from_static(b"probe"), LONG).await.is_ok());
    }
    assert_eq!(*server.node.seen.borrow(), ["probe"; 4]);
}

#[tokio::test]
async fn an_empty_node_that_joins_is_admitted_on_the_same_peer() {
    let server = Running::start();
    let local = Arc::new(Mutex::new(LocalIdentity::default()));
    let provide: LocalProvider = Arc::new({
        let local = Arc::clone(&local);
        move || *local.lock().unwrap()
    });
    let peer = Peer::new(provide, server.addr.to_string(), 2, Lane::Control, Limits::default());
    let error = peer.call(ECHO, Bytes::new(), LONG).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { code: code::NO_IDENTITY, .. }), "{error}");
    *local.lock().unwrap() = identity(1);
    assert!(peer.call(ECHO, Bytes::new(), LONG).await.is_ok());
}

#[tokio::test]
async fn beyond_the_cap_calls_are_refused_as_busy() {
    let server = Running::start_with(Limits { connections_max: 1, ..Limits::default() });
    let first = peer_to(server.addr);
    assert!(first.call(ECHO, Bytes::new(), LONG).await.is_ok());
    let second = peer_to(server.addr);
    let error = second.call(ECHO, Bytes::new(), LONG).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { code: code::BUSY, .. }), "{error}");
    // Dropping the last handle ends the first connection; then there is room.
    drop(first);
    while let Err(error) = second.call(ECHO, Bytes::new(), LONG).await {
        assert!(matches!(error, CallError::Refused { code: code::BUSY, .. }), "{error}");
    }
}

#[tokio::test]
async fn another_version_is_answered_with_both_named() {
    let server = Running::start();
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let mut bytes = vec![0x55; 300_000];
    bytes[..6].copy_from_slice(b"STMN\x02\x00");
    // Far more than the server reads before it has seen enough: the notice must survive that.
    stream.write_all(&bytes).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let notice = Notice { version: 1, version_seen: 2, code: code::VERSION };
    assert_eq!(read_start(&answer), Ok(Some(Start::Notice(notice))));
    assert!(server.node.seen.borrow().is_empty());
}

#[tokio::test]
async fn a_server_of_another_version_refuses_with_both_named() {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = peer_to(tcp.local_addr().unwrap());
    let pending = peer.send(ECHO, Bytes::new()).unwrap();
    let (mut stream, _) = tcp.accept().await.unwrap();
    stream.read_exact(&mut [0; HEADER_BYTES]).await.unwrap();
    let notice = Notice { version: 2, version_seen: 1, code: code::VERSION };
    stream.write_all(&notice.seal()).await.unwrap();
    let error = pending.wait(LONG).await.unwrap_err();
    let CallError::Refused { code: code::VERSION, message } = error else { panic!("{error}") };
    assert!(message.contains("version 2") && message.contains("version 1"), "{message}");
}

#[tokio::test]
async fn garbage_and_half_frames_harm_no_other_connection() {
    let server = Running::start();
    let peer = peer_to(server.addr);
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        &[0; 500],
        b"STMN\x01\x00 and then nonsense of some length......................",
    ] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // Closed with a reset or without one; either way without an answer.
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.is_empty());
        assert!(peer.call(ECHO, Bytes::new(), LONG).await.is_ok());
    }
}

#[tokio::test]
async fn a_graceful_shutdown_answers_what_is_being_handled() {
    let server = Running::start();
    let peer = peer_to(server.addr);
    let pending = peer.send(GATED, Bytes::from_static(b"begun")).unwrap();
    server.wait_seen(1).await;
    server.shutdown.cancel();
    server.node.gate.add_permits(1);
    assert_eq!(pending.wait(LONG).await.unwrap(), "begun");
    server.serving.await.unwrap();
}

#[tokio::test]
async fn requests_outlive_the_last_handle() {
    let server = Running::start();
    let peer = peer_to(server.addr);
    let pending = peer.send(ECHO, Bytes::from_static(b"still wanted")).unwrap();
    drop(peer);
    assert_eq!(pending.wait(LONG).await.unwrap(), "still wanted");
}
