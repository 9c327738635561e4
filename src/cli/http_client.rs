//! One keep-alive HTTP/1.1 connection to one node, with deadlines, that never guesses what happened.
//!
//! A request that fails says which of two things is true: it never left this process, so it cannot have
//! had an effect (`NotSent`), or it may have arrived (`Unknown`). It never repeats a request that may
//! have arrived. Every command, the drill and the judge's tests talk to nodes through this.

use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

/// Largest answer read, bytes. A page of 1,000 assertions of 1 MiB would be larger: ask for less then.
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Deadline of one request: above the server's own 10 s, so that its answer arrives.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Time given to connecting, within the request's own deadline.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a node listens, as the user wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    authority: String,
}

impl Endpoint {
    /// From `host:port` or `http://host:port`; the port defaults to 18180.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.starts_with("https://") {
            return Err(format!("{text}: TLS is not supported here yet; use http://"));
        }
        let rest = text.strip_prefix("http://").unwrap_or(text);
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let bad = rest.is_empty() || rest.chars().any(|c| c.is_whitespace() || c.is_control() || "/?#@,".contains(c));
        if bad {
            return Err(format!("{text:?} is not an endpoint; expected host:port"));
        }
        let has_port = match rest.rsplit_once(':') {
            Some((host, port)) => {
                let in_brackets_only = host.starts_with('[') && !host.ends_with(']');
                if !in_brackets_only && port.parse::<u16>().is_err() {
                    return Err(format!("{text:?}: {port:?} is not a port number"));
                }
                !in_brackets_only
            }
            None => false,
        };
        let authority = if has_port { rest.to_owned() } else { format!("{rest}:18180") };
        Ok(Self { authority })
    }

    /// `host:port`.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// `http://host:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.authority)
    }
}

/// Several endpoints separated by commas, at least one.
pub fn parse_endpoints(text: &str) -> Result<Vec<Endpoint>, String> {
    let parts = text.split(',').filter(|part| !part.trim().is_empty());
    let endpoints = parts.map(Endpoint::parse).collect::<Result<Vec<_>, _>>()?;
    if endpoints.is_empty() {
        return Err("no endpoint given; expected host:port[,host:port...]".to_owned());
    }
    Ok(endpoints)
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// The request never left this process: it had no effect.
    #[error("not sent: {0}")]
    NotSent(String),
    /// The request may have arrived and may have had an effect.
    #[error("sent, no answer: {0}")]
    Unknown(String),
}

/// One answer, read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// The fields of `application/problem+json` that commands act on; all optional, since a proxy may answer too.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Problem {
    /// Stable identifier.
    #[serde(rename = "type")]
    pub kind: String,
    /// What kind of problem.
    pub title: String,
    /// What was wrong this time.
    pub detail: String,
    /// For writes: `not_applied` or `unknown`.
    pub outcome: Option<String>,
    /// For imports: the position that the cluster expects, in records.
    pub expected_position: Option<u64>,
    /// For batches: the item that is wrong, counted from 0.
    pub item: Option<u64>,
}

impl Answer {
    /// 200 to 299.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// A header's text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The body as JSON.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, String> {
        serde_json::from_slice(&self.body)
            .map_err(|error| format!("the answer (status {}) is not what was expected: {error}", self.status))
    }

    /// The body as a problem; of another body, its beginning becomes the detail.
    pub fn problem(&self) -> Problem {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| Problem {
            detail: String::from_utf8_lossy(&self.body).chars().take(200).collect(),
            ..Problem::default()
        })
    }

    /// True when an error answer leaves open whether the write was applied.
    pub fn leaves_outcome_open(&self) -> bool {
        !self.is_success() && self.problem().outcome.as_deref() == Some("unknown")
    }

    /// One line for people: status, title and detail.
    pub fn describe(&self) -> String {
        let problem = self.problem();
        let mut text = format!("status {}", self.status);
        for part in [&problem.title, &problem.detail] {
            if !part.is_empty() {
                text.push_str(": ");
                text.push_str(part);
            }
        }
        text
    }

    /// `Retry-After`, at most 30 seconds; `None` when absent.
    pub fn retry_after(&self) -> Option<Duration> {
        let seconds: u64 = self.header("retry-after")?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds.min(30)))
    }
}

/// One request. Build with `get` or `post`.
#[derive(Clone, Debug)]
pub struct Call {
    method: Method,
    path_and_query: String,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: Bytes,
}

impl Call {
    /// A `GET` of a path with its query, both already encoded.
    pub fn get(path_and_query: impl Into<String>) -> Self {
        Self::new(Method::GET, path_and_query, Bytes::new())
    }

    /// A `POST` of a JSON body.
    pub fn post(path_and_query: impl Into<String>, body: impl Into<Bytes>) -> Self {
        Self::new(Method::POST, path_and_query, body.into())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
    }

    /// A `DELETE`.
    pub fn delete(path_and_query: impl Into<String>) -> Self {
        Self::new(Method::DELETE, path_and_query, Bytes::new())
    }

    /// Adds a header, or replaces one of the same name.
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name, value));
        self
    }

    /// Sets `Idempotency-Key`. Refuses text that cannot stand in a header.
    pub fn idempotency_key(self, key: &str) -> Result<Self, String> {
        let value = HeaderValue::from_str(key).map_err(|_| format!("{key:?} cannot be used as an idempotency key"))?;
        Ok(self.header(HeaderName::from_static("idempotency-key"), value))
    }

    fn new(method: Method, path_and_query: impl Into<String>, body: Bytes) -> Self {
        Self { method, path_and_query: path_and_query.into(), headers: Vec::new(), body }
    }

    fn to_request(&self, authority: &str) -> Result<Request<Full<Bytes>>, HttpError> {
        let mut request =
            Request::builder().method(self.method.clone()).uri(&self.path_and_query).header(HOST, authority);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        request
            .body(Full::new(self.body.clone()))
            .map_err(|error| HttpError::NotSent(format!("{}: {error}", self.path_and_query)))
    }
}

/// A connection that is opened when first needed and again after it broke.
pub struct Client {
    endpoint: Endpoint,
    open: Option<Open>,
}

struct Open {
    sender: SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Client {
    /// A client of `endpoint`; connects lazily.
    pub fn new(endpoint: Endpoint) -> Self {
        Self { endpoint, open: None }
    }

    /// Where it talks to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Sends `call` once and reads the whole answer, within `timeout`.
    pub async fn call(&mut self, call: &Call, timeout: Duration) -> Result<Answer, HttpError> {
        let deadline = Instant::now() + timeout;
        // An idle connection may have been closed by the node in the meantime. hyper hands the request back
        // when not a byte of it was written, and then, and only then, a second connection is tried.
        for fresh in [false, true] {
            let mut open = match self.open.take() {
                Some(open) if !fresh && !open.sender.is_closed() => open,
                _ => self.connect(deadline).await?,
            };
            match timeout_at(deadline, open.sender.ready()).await {
                Err(_) => return Err(HttpError::NotSent("the connection stayed busy".to_owned())),
                Ok(Err(error)) if fresh => return Err(HttpError::NotSent(error.to_string())),
                Ok(Err(_)) => continue,
                Ok(Ok(())) => {}
            }
            let request = call.to_request(self.endpoint.authority())?;
            let response = match timeout_at(deadline, open.sender.try_send_request(request)).await {
                Err(_) => {
                    let why = format!("no answer within {} ms", timeout.as_millis());
                    return Err(HttpError::Unknown(why));
                }
                Ok(Err(mut error)) => {
                    let never_sent = error.take_message().is_some();
                    match (never_sent, fresh) {
                        (true, false) => continue,
                        (true, true) => return Err(HttpError::NotSent(error.error().to_string())),
                        (false, _) => return Err(HttpError::Unknown(error.error().to_string())),
                    }
                }
                Ok(Ok(response)) => response,
            };
            let answer = match timeout_at(deadline, read_answer(response)).await {
                Err(_) => {
                    let why = format!("the answer did not end within {} ms", timeout.as_millis());
                    return Err(HttpError::Unknown(why));
                }
                Ok(read) => read.map_err(HttpError::Unknown)?,
            };
            if !says_close(&answer.headers) {
                self.open = Some(open);
            }
            return Ok(answer);
        }
        Err(HttpError::NotSent("the connection closed".to_owned()))
    }

    /// `GET` and the answer's JSON; anything but success is an error in words.
    pub async fn get_json<T: DeserializeOwned>(
        &mut self,
        path_and_query: &str,
        timeout: Duration,
    ) -> Result<T, String> {
        let answer = self.call(&Call::get(path_and_query), timeout).await;
        let answer = answer.map_err(|error| format!("{}: {error}", self.endpoint.authority()))?;
        if !answer.is_success() {
            let authority = self.endpoint.authority();
            return Err(format!("{authority}: {}", answer.describe()));
        }
        answer.json()
    }

    async fn connect(&self, deadline: Instant) -> Result<Open, HttpError> {
        let authority = self.endpoint.authority();
        let not_sent = |error: String| HttpError::NotSent(format!("connect to {authority}: {error}"));
        let until = deadline.min(Instant::now() + CONNECT_TIMEOUT);
        let stream = timeout_at(until, TcpStream::connect(authority))
            .await
            .map_err(|_| not_sent("timed out".to_owned()))?
            .map_err(|error| not_sent(error.to_string()))?;
        stream.set_nodelay(true).map_err(|error| not_sent(error.to_string()))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| not_sent(error.to_string()))?;
        // Errors of the connection reach the request that is waiting on it.
        let driver = tokio::spawn(async move {
            let _reported_to_the_request = connection.await;
        });
        Ok(Open { sender, driver })
    }
}

async fn read_answer(response: Response<hyper::body::Incoming>) -> Result<Answer, String> {
    let (head, body) = response.into_parts();
    let body = Limited::new(body, ANSWER_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| format!("status {}, body: {error}", head.status.as_u16()))?;
    Ok(Answer { status: head.status.as_u16(), headers: head.headers, body: body.to_bytes() })
}

fn says_close(headers: &HeaderMap) -> bool {
    headers
        .get_all(hyper::header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.to_ascii_lowercase().contains("close"))
}

/// `text` with everything but unreserved characters percent-encoded, for a query string.
pub fn encode_query(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _infallible = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// Far above what any call here takes.
    const HANG: Duration = Duration::from_secs(60);

    #[test]
    fn endpoints_are_read_in_their_usual_forms() {
        let of = |text: &str| Endpoint::parse(text).map(|e| e.authority().to_owned());
        assert_eq!(of("127.0.0.1:18181").unwrap(), "127.0.0.1:18181");
        assert_eq!(of("http://db.example/").unwrap(), "db.example:18180");
        assert_eq!(of("[::1]:9").unwrap(), "[::1]:9");
        assert_eq!(of("[::1]").unwrap(), "[::1]:18180");
        for bad in ["", "https://a:1", "a:b", "a:70000", "a b:1", "a/b", "u@a:1"] {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_endpoints("a:1,b:2,").unwrap().len(), 2);
        assert!(parse_endpoints(" , ").is_err());
    }

    #[test]
    fn query_values_are_encoded() {
        assert_eq!(encode_query("debian/libs/g++ä"), "debian%2Flibs%2Fg%2B%2B%C3%A4");
    }

    #[tokio::test]
    async fn refused_connection_is_not_sent() {
        // Bound, so that nobody else gets the port, and never listening.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap().to_string();
        let mut client = Client::new(Endpoint::parse(&address).unwrap());
        let error = client.call(&Call::get("/"), HANG).await.unwrap_err();
        assert!(matches!(error, HttpError::NotSent(_)), "{error}");
    }

    #[tokio::test]
    async fn connection_cut_after_the_request_is_unknown_and_not_repeated() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut read = [0_u8; 16];
            stream.read_exact(&mut read).await.unwrap();
            drop(stream);
            listener
        });
        let mut client = Client::new(Endpoint::parse(&address).unwrap());
        let error = client.call(&Call::post("/", "{}"), HANG).await.unwrap_err();
        assert!(matches!(error, HttpError::Unknown(_)), "{error}");
        let listener = server.await.unwrap();
        // Nobody connected a second time.
        let again = tokio::time::timeout(Duration::from_millis(20), listener.accept()).await;
        assert!(again.is_err());
    }

    #[tokio::test]
    async fn idle_connection_closed_by_the_node_is_opened_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut read = vec![0_u8; 1024];
                let _bytes = stream.read(&mut read).await.unwrap();
                let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let mut client = Client::new(Endpoint::parse(&address).unwrap());
        for _ in 0..20 {
            let answer = client.call(&Call::get("/"), HANG).await.unwrap();
            assert_eq!(&answer.body[..], b"ok");
            // Wait for the close to arrive, so that the next call meets a closed connection.
            while !client.open.as_ref().is_none_or(|open| open.sender.is_closed()) {
                tokio::task::yield_now().await;
            }
        }
    }
}
