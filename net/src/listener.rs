//! Accepts connections and keeps their number bounded.
//!
//! The loop outlives every error of `accept`: with no file descriptors left it waits and tries again, for the node that
//! stops accepting is lost to its cluster. Each connection is a task of its own. A connection beyond the cap is told so
//! and closed. On shutdown nothing new is taken, what is being handled is finished and answered.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Limits, LocalProvider, Service, code,
    connection::{self, End, Shared},
    wire::Notice,
};

/// Waits after failed accepts: short for a single aborted connection, then long enough not to spin.
const ACCEPT_WAIT_MIN: Duration = Duration::from_millis(5);
const ACCEPT_WAIT_MAX: Duration = Duration::from_secs(1);
/// Connections beyond the cap that are being told so; more are closed without a word.
const FAREWELLS_MAX: usize = 16;

/// The server side of the peer port.
pub struct Listener;

impl Listener {
    /// Accepts connections from `tcp` until `shutdown` is cancelled, then finishes the requests being handled, at most
    /// for [`Limits::drain_timeout`], and returns. Dropping the future ends everything at once.
    pub async fn serve(
        tcp: TcpListener,
        local: LocalProvider,
        service: Arc<dyn Service>,
        limits: Limits,
        shutdown: CancellationToken,
    ) {
        accept_all(Tcp(tcp), Arc::new(Shared { local, service, limits }), shutdown).await;
    }
}

/// Where connections come from; tests have sources that fail.
trait Accept: Send {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;
}

struct Tcp(TcpListener);

impl Accept for Tcp {
    type Stream = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, addr) = self.0.accept().await?;
        stream.set_nodelay(true)?;
        Ok((stream, addr))
    }
}

async fn accept_all<A: Accept>(mut source: A, shared: Arc<Shared>, shutdown: CancellationToken) {
    let mut connections = JoinSet::new();
    let mut farewells = JoinSet::new();
    let mut wait = ACCEPT_WAIT_MIN;
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(ended) = connections.join_next() => { log_end(ended); continue }
            Some(_) = farewells.join_next() => continue,
            accepted = source.accept() => accepted,
        };
        match accepted {
            Ok((stream, addr)) => {
                wait = ACCEPT_WAIT_MIN;
                if connections.len() < shared.limits.connections_max {
                    let serving = connection::serve(stream, addr, Arc::clone(&shared), shutdown.child_token());
                    connections.spawn(async move { (addr, serving.await) });
                } else if farewells.len() < FAREWELLS_MAX {
                    tracing::warn!(%addr, "too many connections");
                    farewells.spawn(connection::farewell(stream, Notice::new(code::BUSY, 0)));
                }
            }
            Err(error) => {
                if wait == ACCEPT_WAIT_MIN {
                    tracing::warn!(%error, "cannot accept a connection, trying again");
                }
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    () = tokio::time::sleep(wait) => wait = (wait * 2).min(ACCEPT_WAIT_MAX),
                }
            }
        }
    }
    drop(source);
    while let Some(ended) = connections.join_next().await {
        log_end(ended);
    }
}

fn log_end(ended: Result<(SocketAddr, End), JoinError>) {
    match ended {
        Ok((addr, end @ (End::Closed | End::Drained | End::Io(_)))) => {
            tracing::debug!(%addr, %end, "connection ended");
        }
        Ok((addr, end)) => tracing::warn!(%addr, %end, "connection given up"),
        Err(error) => tracing::error!(%error, "a connection's task failed"),
    }
}

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;
