//! What the tests of this crate share: frames made by hand and a service that does as it is told.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use tokio::{
    io::{AsyncRead, AsyncReadExt, DuplexStream},
    sync::{Semaphore, watch},
};

use crate::{
    ConnectionHandler, Lane, LocalIdentity, LocalProvider, PeerHello, Refusal, Service, identity,
    link::Stream,
    wire::{self, FrameType, HEADER_BYTES, Header, NOTICE_BYTES, Notice, Start},
};

/// Answers with the request's body.
pub(crate) const ECHO: u16 = 16;
/// As `ECHO`, once the gate lets it through.
pub(crate) const GATED: u16 = 17;
pub(crate) const PANIC_IN_FUTURE: u16 = 18;
pub(crate) const PANIC_IN_CALL: u16 = 19;
pub(crate) const PANIC_IN_ADMIT: u16 = 20;
/// Answers with as many bytes as the body's number says.
pub(crate) const INFLATE: u16 = 21;
pub(crate) const PROBE: u16 = 1;

pub(crate) const CLUSTER: [u8; 16] = [0xC1; 16];

pub(crate) fn addr() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9))
}

pub(crate) fn identity(node_id: u64) -> LocalIdentity {
    LocalIdentity { cluster_id: CLUSTER, node_id, boot: 3 }
}

pub(crate) fn provider(identity: LocalIdentity) -> LocalProvider {
    Arc::new(move || identity)
}

/// A request from node 1 to node 2.
pub(crate) fn request(request_id: u64, kind: u16) -> Header {
    Header {
        frame: FrameType::Request,
        lane: Lane::Log,
        cluster_id: CLUSTER,
        sender_id: 1,
        target_id: 2,
        boot: 3,
        kind,
        code: 0,
        request_id,
        body_bytes: 0,
        body_crc: 0,
    }
}

/// The answer of node 2 to a request of node 1.
pub(crate) fn reply(request_id: u64, kind: u16) -> Header {
    Header { frame: FrameType::Reply, sender_id: 2, target_id: 1, ..request(request_id, kind) }
}

pub(crate) fn sign(frame: FrameType) -> Header {
    Header { frame, kind: 0, ..request(0, 0) }
}

pub(crate) fn bytes_of(header: &Header, body: &[u8]) -> Vec<u8> {
    [&header.seal(body)[..], body].concat()
}

/// The next frame of a stream, or `None` at its end. A frame cut short is a failed test.
pub(crate) async fn next_frame(stream: &mut (impl AsyncRead + Unpin)) -> Option<(Header, Vec<u8>)> {
    let mut head = [0; HEADER_BYTES];
    if stream.read(&mut head[..1]).await.unwrap() == 0 {
        return None;
    }
    stream.read_exact(&mut head[1..]).await.unwrap();
    let Some(Start::Frame(header)) = wire::read_start(&head).unwrap() else { panic!("no frame") };
    let mut body = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut body).await.unwrap();
    header.check_body(&body).unwrap();
    Some((header, body))
}

/// The stream must consist of one notice.
pub(crate) async fn only_notice(stream: &mut (impl AsyncRead + Unpin)) -> Notice {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes.len(), NOTICE_BYTES);
    let Some(Start::Notice(notice)) = wire::read_start(&bytes).unwrap() else { panic!("no notice") };
    notice
}

impl Stream for DuplexStream {
    fn peer_addr(&self) -> Option<SocketAddr> {
        None
    }
}

/// Node 2 of the cluster.
pub(crate) struct Scripted {
    pub(crate) identity: LocalIdentity,
    pub(crate) boot_highest: Option<u64>,
    pub(crate) gate: Arc<Semaphore>,
    /// Kinds and bodies in order of arrival.
    pub(crate) seen: watch::Sender<Vec<(u16, Bytes)>>,
    pub(crate) hellos: Mutex<Vec<PeerHello>>,
    /// Futures dropped or finished.
    pub(crate) ended: AtomicUsize,
}

impl Scripted {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Scripted {
            identity: identity(2),
            boot_highest: None,
            gate: Arc::new(Semaphore::new(0)),
            seen: watch::Sender::new(Vec::new()),
            hellos: Mutex::default(),
            ended: AtomicUsize::new(0),
        })
    }

    pub(crate) async fn wait_seen(&self, count: usize) {
        self.seen.subscribe().wait_for(|seen| seen.len() >= count).await.unwrap();
    }

    pub(crate) fn seen_count(&self) -> usize {
        self.seen.borrow().len()
    }
}

/// Handed out by value to `Service`, which is implemented for the shared script.
pub(crate) struct ScriptedService(pub(crate) Arc<Scripted>);

impl Service for ScriptedService {
    fn connected(&self, peer: PeerHello) -> Box<dyn ConnectionHandler> {
        self.0.hellos.lock().unwrap().push(peer);
        Box::new(ScriptedHandler(Arc::clone(&self.0)))
    }

    fn admit(&self, hello: &PeerHello, kind: u16) -> Result<(), Refusal> {
        assert!(kind != PANIC_IN_ADMIT, "told to panic");
        identity::judge(&self.0.identity, hello, kind, self.0.boot_highest)
    }
}

struct ScriptedHandler(Arc<Scripted>);

struct CountEnd(Arc<Scripted>);

impl Drop for CountEnd {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::SeqCst);
    }
}

impl ConnectionHandler for ScriptedHandler {
    fn on_request(&mut self, kind: u16, body: Bytes) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        self.0.seen.send_modify(|seen| seen.push((kind, body.clone())));
        assert!(kind != PANIC_IN_CALL, "told to panic");
        let script = Arc::clone(&self.0);
        async move {
            let _end = CountEnd(Arc::clone(&script));
            match kind {
                PROBE | ECHO => Ok(body),
                GATED => {
                    script.gate.acquire().await.unwrap().forget();
                    Ok(body)
                }
                PANIC_IN_FUTURE => panic!("told to panic"),
                INFLATE => Ok(vec![0; std::str::from_utf8(&body).unwrap().parse().unwrap()].into()),
                other => Err(Refusal::unknown_kind(other)),
            }
        }
        .boxed()
    }
}
