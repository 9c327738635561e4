//! The accept loop against a source of connections that fails at will.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;

use tokio::io::{AsyncWriteExt, DuplexStream};

use super::*;
use crate::{testing::*, wire::VERSION};

/// Gives what it was filled with, then nothing more.
struct Source(VecDeque<io::Result<DuplexStream>>);

impl Accept for Source {
    type Stream = DuplexStream;

    async fn accept(&mut self) -> io::Result<(DuplexStream, SocketAddr)> {
        match self.0.pop_front() {
            Some(next) => next.map(|stream| (stream, addr())),
            None => std::future::pending().await,
        }
    }
}

fn start(
    script: &Arc<Scripted>,
    limits: Limits,
    accepts: impl IntoIterator<Item = io::Result<DuplexStream>>,
) -> (tokio::task::JoinHandle<()>, CancellationToken) {
    let shutdown = CancellationToken::new();
    let service = Arc::new(ScriptedService(Arc::clone(script)));
    let shared = Arc::new(Shared { local: provider(script.identity), service, limits });
    let source = Source(accepts.into_iter().collect());
    (tokio::spawn(accept_all(source, shared, shutdown.clone())), shutdown)
}

async fn echo(client: &mut DuplexStream) {
    client.write_all(&bytes_of(&request(1, ECHO), &[])).await.unwrap();
    assert_eq!(next_frame(client).await.unwrap().0.code, 0);
}

#[tokio::test(start_paused = true)]
async fn no_error_of_accept_ends_the_loop() {
    let (mut client, far) = tokio::io::duplex(1000);
    const EMFILE: i32 = 24;
    let mut accepts: Vec<_> = (0..50).map(|_| Err(io::Error::from_raw_os_error(EMFILE))).collect();
    accepts.push(Err(io::ErrorKind::ConnectionAborted.into()));
    accepts.push(Ok(far));
    let (serving, _shutdown) = start(&Scripted::new(), Limits::default(), accepts);
    echo(&mut client).await;
    assert!(!serving.is_finished());
}

#[tokio::test(start_paused = true)]
async fn shutdown_is_heard_while_accept_fails() {
    let accepts = (0..1000).map(|_| Err(io::Error::other("always")));
    let (serving, shutdown) = start(&Scripted::new(), Limits::default(), accepts);
    tokio::time::sleep(Duration::from_secs(5)).await;
    shutdown.cancel();
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_connection_beyond_the_cap_is_told_so_and_room_is_used_again() {
    let (mut first, far_first) = tokio::io::duplex(1000);
    let (mut second, far_second) = tokio::io::duplex(1000);
    let limits = Limits { connections_max: 1, ..Limits::default() };
    let (_serving, _shutdown) = start(&Scripted::new(), limits.clone(), [Ok(far_first), Ok(far_second)]);
    echo(&mut first).await;
    let notice = only_notice(&mut second).await;
    assert_eq!(notice, Notice { version: VERSION, version_seen: 0, code: code::BUSY });

    let (first, far_first) = tokio::io::duplex(1000);
    let (mut second, far_second) = tokio::io::duplex(1000);
    drop(first);
    // The failed accept gives the loop time to see that the first one has ended.
    let accepts = [Ok(far_first), Err(io::Error::other("pause")), Ok(far_second)];
    let (_serving, _shutdown) = start(&Scripted::new(), limits, accepts);
    echo(&mut second).await;
}

#[tokio::test(start_paused = true)]
async fn farewells_are_bounded_too() {
    let (mut clients, fars): (Vec<_>, Vec<_>) = (0..FAREWELLS_MAX + 5).map(|_| tokio::io::duplex(1000)).unzip();
    let limits = Limits { connections_max: 0, ..Limits::default() };
    let (_serving, _shutdown) = start(&Scripted::new(), limits, fars.into_iter().map(Ok));
    let mut told = 0;
    for client in &mut clients {
        let mut bytes = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(client, &mut bytes).await.unwrap();
        told += usize::from(!bytes.is_empty());
    }
    assert_eq!(told, FAREWELLS_MAX);
}

#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_requests_being_handled() {
    let script = Scripted::new();
    let (mut client, far) = tokio::io::duplex(1000);
    let (serving, shutdown) = start(&script, Limits::default(), [Ok(far)]);
    client.write_all(&bytes_of(&request(1, GATED), &[])).await.unwrap();
    script.wait_seen(1).await;
    shutdown.cancel();
    tokio::task::yield_now().await;
    assert!(!serving.is_finished());
    script.gate.add_permits(1);
    assert_eq!(next_frame(&mut client).await.unwrap().0.request_id, 1);
    serving.await.unwrap();
}
