//! Reads that this node cannot answer and another one can.
//!
//! After its disk has failed, or when it meets a damaged block, a node asks other nodes for the same
//! page and passes their answer on, so that the failure is an event for its operator and not for the
//! client. One hop only: a request that was passed on already is answered here, with whatever it takes.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    extract::FromRequestParts,
    http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header, request::Parts},
    response::Response,
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use super::{Api, headers, problem::Kind};

/// In a request that was passed on: the name of the node that did it.
const PASSED_ON: HeaderName = HeaderName::from_static("x-stemedb-passed-on-by");

/// How long a connection to another node may take before the next one is asked.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// How long an order that is passed on may take: a flow answers within 30 s.
const PASS_ON_MAX: Duration = Duration::from_secs(40);

/// Largest answer passed on, in bytes: four times the longest page, since JSON escapes take room.
const ANSWER_BYTES_MAX: usize = 20 * 1024 * 1024;

/// Reads passed on at the same time, which bounds the memory for their answers.
pub const PASSED_ON_MAX: usize = 8;

/// Why there is no answer of another node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// It was not reached, and can have done nothing.
    #[error("{0}")]
    NotSent(String),
    /// It may have got the request.
    #[error("{0}")]
    Unknown(String),
}

/// In the answer of a node that was asked to do something as the leader, and does not lead.
#[derive(Clone, Copy, Debug)]
struct NotLeader;

/// Whether it is the answer of a node that does not lead, and so has done nothing.
pub fn is_not_leader(answer: &Response) -> bool {
    answer.extensions().get::<NotLeader>().is_some()
}

/// What was asked, in the form in which another node can be asked.
pub struct Asked {
    uri: Uri,
    passed_on: bool,
    balanced: bool,
}

impl<S: Sync> FromRequestParts<S> for Asked {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let balanced = headers::came_through_balancer(&parts.headers);
        Ok(Asked { uri: parts.uri.clone(), passed_on: parts.headers.contains_key(PASSED_ON), balanced })
    }
}

impl Asked {
    /// Whether another node asks in place of its client.
    pub fn was_passed_on(&self) -> bool {
        self.passed_on
    }

    /// Whether it came straight from a load balancer, which can ask another node.
    pub fn is_balanced(&self) -> bool {
        self.balanced && !self.passed_on
    }
}

/// The answer of the first other node that has one; `None` when each was asked in vain, or at the `deadline`.
pub async fn ask(api: &Api, asked: &Asked, deadline: Instant) -> Option<Response> {
    if asked.passed_on {
        return None;
    }
    let _place = timeout_at(deadline, api.passed_on.acquire()).await.ok()?.ok()?;
    let addrs = api.node.other_http_addrs();
    for (n, addr) in addrs.iter().enumerate() {
        // One that hangs leaves the next one its share of the time.
        let share = deadline.saturating_duration_since(Instant::now()) / u32::try_from(addrs.len() - n).unwrap_or(1);
        match timeout(share, ask_one(addr, asked, api.node.name())).await {
            Ok(Ok(answer)) if !answer.status().is_server_error() => return Some(answer),
            Ok(Ok(answer)) => tracing::debug!(addr, status = %answer.status(), "another node has no answer either"),
            Ok(Err(error)) => tracing::debug!(addr, %error, "another node could not be asked"),
            Err(_) => tracing::debug!(addr, "another node does not answer"),
        }
    }
    None
}

/// The answer of the node at `addr` to the same question or order.
pub async fn pass_on(api: &Api, asked: &Asked, addr: &str, method: Method, body: Bytes) -> Result<Response, NoAnswer> {
    if asked.passed_on {
        return Err(NoAnswer::NotSent("this request was passed on already".to_owned()));
    }
    let _place = api.passed_on.acquire().await.map_err(|e| NoAnswer::NotSent(e.to_string()))?;
    timeout(PASS_ON_MAX, ask_with(addr, asked, api.node.name(), method, body))
        .await
        .unwrap_or_else(|_| Err(NoAnswer::Unknown(format!("no answer within {PASS_ON_MAX:?}"))))
}

async fn ask_one(addr: &str, asked: &Asked, own_name: &str) -> Result<Response, NoAnswer> {
    ask_with(addr, asked, own_name, Method::GET, Bytes::new()).await
}

async fn ask_with(
    addr: &str,
    asked: &Asked,
    own_name: &str,
    method: Method,
    body: Bytes,
) -> Result<Response, NoAnswer> {
    let not_sent = |e: &dyn ToString| NoAnswer::NotSent(e.to_string());
    let stream = timeout(CONNECT_MAX, TcpStream::connect(addr)).await.map_err(|e| not_sent(&e))?;
    let stream = stream.map_err(|e| not_sent(&e))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| not_sent(&e))?;
    let target = asked.uri.path_and_query().map_or("/", |target| target.as_str());
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header(header::HOST, addr)
        .header(header::CONNECTION, "close")
        .header(PASSED_ON, HeaderValue::from_str(own_name).unwrap_or(HeaderValue::from_static("a-node")))
        .body(Full::new(body))
        .map_err(|e| not_sent(&e))?;
    let answered = async {
        let unknown = |e: &dyn ToString| NoAnswer::Unknown(e.to_string());
        let (head, body) = sender.send_request(request).await.map_err(|e| unknown(&e))?.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|e| unknown(&e))?.to_bytes();
        let not_leader = head.status == StatusCode::SERVICE_UNAVAILABLE && is_of_no_leader(&body);
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = head.status;
        if not_leader {
            response.extensions_mut().insert(NotLeader);
        }
        for name in [header::CONTENT_TYPE, header::RETRY_AFTER, header::LOCATION, headers::INDEX, headers::SERVED_BY] {
            if let Some(value) = head.headers.get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
        Ok(response)
    };
    tokio::pin!(answered);
    // Driven here, so that nothing outlives this request.
    tokio::select! {
        answer = &mut answered => answer,
        ended = connection => match ended {
            Ok(()) => answered.await,
            Err(error) => Err(NoAnswer::Unknown(error.to_string())),
        },
    }
}

/// Whether a problem is the one of a node that does not lead.
fn is_of_no_leader(body: &[u8]) -> bool {
    let problem: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let wanted = format!("/problems/{}", Kind::NotLeader.row().slug);
    problem.as_ref().and_then(|problem| problem.get("type")).is_some_and(|found| *found == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_node_that_does_not_lead_has_certainly_done_nothing() {
        assert!(is_of_no_leader(br#"{"type": "/problems/not-leader", "status": 503}"#));
        assert!(!is_of_no_leader(br#"{"type": "/problems/order-unknown", "status": 503}"#));
        assert!(!is_of_no_leader(br#"{"type": "/problems/unavailable", "status": 503}"#));
        assert!(!is_of_no_leader(b"<html>a proxy</html>"));
    }
}
