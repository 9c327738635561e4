//! Accepting connections and serving HTTP/1.1 on them, until told to stop.
//!
//! A loop of our own over hyper, because the bounds belong here: how many connections, how large a
//! header, how long a silence. A panic in a handler becomes a 500 and ends nothing else. On shutdown
//! the listener closes first, idle connections go at once, and requests in flight are finished and
//! answered with `Connection: close`. When the disk hangs for good the same happens in less time, and
//! what is left is cut.

use std::{convert::Infallible, future::Future, io, panic::AssertUnwindSafe, pin::Pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Method, Request, header},
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use hyper::{body::Incoming, server::conn::http1, service::Service};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service as _;

use super::{
    connection::{Activity, Patience, Timed},
    mapping,
    problem::{Kind, Problem},
    router,
};
use crate::node::{ANSWER_MAX, Node};

/// Largest request header, in bytes: twice the longest query string. Clients send a few hundred.
const HEADER_BYTES_MAX: usize = 2 * super::params::QUERY_BYTES_MAX;

/// Read buffer of a connection, in bytes: a header and the beginning of its body, and pieces of a
/// size in which 8 MiB arrive quickly.
const BUFFER_BYTES_MAX: usize = 64 * 1024;

/// An answer of which nobody takes a byte for this long is given up.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// Pause after the system has refused to give a socket (no descriptors, no memory): it needs time
/// to get some back, and a loop without pause would burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections past the cap that are told so at the same time; more are closed without a word.
const REFUSALS_MAX: usize = 64;

/// How long a connection past the cap may take to hear that.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// What operators ask.
const ADMIN: &str = "/v1/admin/";

/// Added to the request deadline when requests in flight are waited for at shutdown.
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(1);

/// Serves the API on `listener` until `shutdown`, then finishes what is in flight. A node that is fenced meanwhile takes
/// no connection any more; this returns with `shutdown` all the same.
///
/// # Errors
/// Only if the listener's own address cannot be read, or no descriptor is left to hold it. Failures of single connections end those.
pub async fn serve(listener: TcpListener, node: Arc<Node>, shutdown: CancellationToken) -> io::Result<()> {
    let address = listener.local_addr()?;
    let config = node.config();
    let patience = Patience {
        header: Duration::from_millis(config.http.header_timeout_ms),
        idle: Duration::from_millis(config.http.idle_timeout_ms),
        write: WRITE_PATIENCE,
    };
    let finish_within = Duration::from_millis(config.cluster.request_deadline_ms) + SHUTDOWN_MARGIN;
    let (fenced, cut) = (node.fenced(), CancellationToken::new());
    // One sign for the connections, whatever the reason.
    let closing = shutdown.child_token();
    let door = node.door(&listener)?;
    let connections_max = config.http.connections_max;
    let connections = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    let router = router(Arc::clone(&node));
    let tasks = TaskTracker::new();
    tracing::info!(%address, "HTTP API listening");
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            () = fenced.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if is_about_one_connection(&error) => continue,
            Err(error) => {
                tracing::warn!(%error, "cannot accept connections; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match Arc::clone(&connections).try_acquire_owned() {
            Ok(permit) => {
                let connection = serve_connection(stream, router.clone(), Arc::clone(&node), patience, closing.clone());
                let cut = cut.clone();
                tasks.spawn(async move {
                    cut.run_until_cancelled(connection).await;
                    drop(permit);
                });
            }
            Err(_) => {
                if let Ok(permit) = Arc::clone(&refusals).try_acquire_owned() {
                    tasks.spawn(async move {
                        refuse(stream, connections_max).await;
                        drop(permit);
                    });
                }
            }
        }
    }
    drop(listener);
    drop(door);
    tasks.close();
    closing.cancel();
    let fencing = async {
        fenced.cancelled().await;
        tokio::time::sleep(ANSWER_MAX).await;
    };
    let finished = tokio::select! {
        finished = timeout(finish_within, tasks.wait()) => finished.is_ok(),
        () = fencing => false,
    };
    if !finished {
        tracing::warn!(connections = tasks.len(), "requests in flight did not finish in time");
    }
    if fenced.is_cancelled() {
        cut.cancel();
        tasks.wait().await;
        node.clients_are_gone();
        // The process cannot end yet, and this is not its reason to.
        shutdown.cancelled().await;
    }
    Ok(())
}

/// True for errors of `accept` that concern the connection and not the listener.
fn is_about_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

async fn serve_connection(
    stream: TcpStream,
    router: Router,
    node: Arc<Node>,
    patience: Patience,
    shutdown: CancellationToken,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let activity = Activity::new();
    let io = TokioIo::new(Timed::new(stream, patience, Arc::clone(&activity)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None) // `Timed` does this, and tells idle from slow
        .max_header_size(HEADER_BYTES_MAX)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(io, Handler { router, node, activity });
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        biased;
        result = connection.as_mut() => result,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // A client that breaks off or falls silent is its own affair.
    if let Err(error) = result {
        tracing::debug!(%error, "connection ended");
    }
}

/// Says 503 to a connection past the cap and closes it.
async fn refuse(mut stream: TcpStream, connections_max: usize) {
    let detail = format!(
        "This node serves at most {connections_max} connections at once. Close idle ones, or try \
         another node."
    );
    let problem = Problem::new(Kind::TooManyConnections, detail)
        .with("limit", connections_max)
        .retry_after(mapping::RETRY_AFTER_S);
    let body = serde_json::to_string(&problem).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: {}\r\nretry-after: {}\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        super::problem::PROBLEM_JSON,
        mapping::RETRY_AFTER_S,
        body.len()
    );
    let told = timeout(REFUSAL_TIMEOUT, async {
        // Unread bytes would turn the close into a reset that overtakes the answer.
        stream.readable().await?;
        let mut scratch = [0; 4096];
        while let Ok(1..) = stream.try_read(&mut scratch) {}
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    })
    .await;
    if let Ok(Err(error)) = told {
        tracing::debug!(%error, "a connection past the cap broke off");
    }
}

/// The router behind one connection.
struct Handler {
    router: Router,
    node: Arc<Node>,
    activity: Arc<Activity>,
}

impl Service<Request<Incoming>> for Handler {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let at_work = AtWork::start(&self.activity);
        let is_write = request.method() == Method::POST;
        let (route, began) = (super::route_pattern(request.uri().path()), Instant::now());
        let node = Arc::clone(&self.node);
        // An operator's order may be the very one that waits for all others.
        let in_flight = (!route.starts_with(ADMIN)).then(|| node.flows().traffic.begin());
        let mut router = self.router.clone();
        Box::pin(async move {
            let answer = async move { router.call(request.map(Body::new)).await };
            let mut response = match AssertUnwindSafe(answer).catch_unwind().await {
                Ok(Ok(response)) => response,
                Ok(Err(never)) => match never {},
                Err(_panic) => panicked(is_write),
            };
            node.metrics().http_request(route, response.status().as_u16(), began.elapsed());
            // On its way out of traffic: the next request of this client shall look for another node.
            if node.flows().drain.mark().is_out() {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            drop((at_work, in_flight));
            Ok(response)
        })
    }
}

/// The panic itself has been logged by the hook.
fn panicked(is_write: bool) -> Response {
    let detail = "The node met a defect of its own while serving this request; its log says more.";
    let problem = Problem::new(Kind::Internal, detail);
    let problem = if is_write { problem.on_write(true) } else { problem };
    problem.into_response()
}

/// The connection is at work until this is dropped, also when the client breaks off.
struct AtWork(Arc<Activity>);

impl AtWork {
    fn start(activity: &Arc<Activity>) -> Self {
        activity.begin();
        AtWork(Arc::clone(activity))
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_in_a_write_leaves_its_outcome_unknown() {
        use super::super::problem::WriteOutcome;
        assert_eq!(panicked(true).status(), 500);
        let problem = Problem::new(Kind::Internal, "x").on_write(true);
        assert_eq!(problem.write_outcome(), Some(WriteOutcome::Unknown));
    }
}
