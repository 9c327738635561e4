//! A node that serves on a free port, and a client for it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use stemedb::{api, config::Config, metrics::Metrics, node::Node};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// Nothing here takes long; a test that hangs fails after this.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Served {
    pub address: SocketAddr,
    pub node: Arc<Node>,
    pub shutdown: CancellationToken,
    pub server: JoinHandle<std::io::Result<()>>,
    _folder: tempfile::TempDir,
}

/// A fresh node, ready.
pub async fn start() -> Served {
    start_with(|_| {}).await
}

pub async fn start_with(change: impl FnOnce(&mut Config)) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    // A test needs no reserve for a full disk, and there are many nodes at once.
    config.storage.ballast_mb = 0;
    // A busy machine is not a hanging disk.
    (config.cluster.stall_handoff_ms, config.cluster.stall_fence_ms) = (60_000, 600_000);
    config.node.data_dir = folder.path().to_path_buf();
    config.http.listen = "127.0.0.1:0".into();
    config.cluster.peer_listen = Some("127.0.0.1:0".into());
    change(&mut config);
    let node = Node::start(Arc::new(config), Arc::new(Metrics::new())).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let server = tokio::spawn(api::serve(listener, Arc::clone(&node), shutdown.clone()));
    let ready = async {
        while node.is_ready().is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ready).await.expect("the node becomes ready");
    Served { address, node, shutdown, server, _folder: folder }
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name}")).to_str().unwrap()
    }

    /// Checks that this is a whole problem of the kind, and returns its body.
    pub fn problem(&self, status: u16, kind: &str) -> Value {
        let json = self.json();
        assert_eq!(self.status, status, "{json}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_eq!(json["type"], format!("/problems/{kind}"), "{json}");
        assert_eq!(json["status"], status);
        assert!(json["title"].is_string() && !json["detail"].as_str().unwrap().is_empty());
        json
    }
}

impl Served {
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        let exchange = async {
            let stream = TcpStream::connect(self.address).await.unwrap();
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            let connection = tokio::spawn(connection);
            let response = sender.send_request(request).await.unwrap();
            let (parts, body) = response.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            connection.abort();
            Answer { status: parts.status, headers: parts.headers, body }
        };
        tokio::time::timeout(PATIENCE, exchange).await.expect("an answer")
    }

    pub async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("host", "test");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Full::new(body.into())).unwrap()).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.request(Method::GET, path, &[], "").await
    }

    pub async fn post(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        self.request(Method::POST, path, &[], body).await
    }

    /// Posts, and returns what was written.
    pub async fn write(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body.to_string()).await;
        assert_eq!(answer.status, 201, "{}", answer.json());
        answer.json()
    }

    /// Sends bytes as they are, and returns everything that comes until the server closes.
    pub async fn raw(&self, bytes: &[u8]) -> String {
        let exchange = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            // A reset after the answer is the server's right; what came before it counts.
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8_lossy(&answer).into_owned()
        };
        tokio::time::timeout(PATIENCE, exchange).await.expect("the server closes")
    }
}
