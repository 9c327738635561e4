//! Connections: reuse, patience, caps, shutdown.

use std::io;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::{PATIENCE, Served, start, start_with};

const LIVE: &[u8] = b"GET /v1/health/live HTTP/1.1\r\nhost: test\r\n\r\n";

/// One answer off a connection that stays open.
async fn answer(stream: &mut TcpStream) -> String {
    let read = async {
        let mut text = Vec::new();
        loop {
            text.push(stream.read_u8().await.unwrap());
            let Some(head) = String::from_utf8_lossy(&text).find("\r\n\r\n") else { continue };
            let head_text = String::from_utf8_lossy(&text).to_ascii_lowercase();
            let length = head_text.split("content-length: ").nth(1).unwrap();
            let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
            let mut body = vec![0; head + 4 + length - text.len()];
            stream.read_exact(&mut body).await.unwrap();
            text.extend(body);
            return String::from_utf8(text).unwrap();
        }
    };
    timeout(PATIENCE, read).await.expect("an answer")
}

/// True when the server has closed its side.
async fn is_closed(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    match timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("the server closes") {
        Ok(_) => rest.is_empty(),
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

async fn connect(served: &Served) -> TcpStream {
    TcpStream::connect(served.address).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_used_again_also_after_errors() {
    let served = start().await;
    let mut stream = connect(&served).await;
    for request in [
        LIVE.to_vec(),
        b"POST /v1/assert HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\n\r\n{".to_vec(),
        b"GET /nowhere HTTP/1.1\r\nhost: t\r\n\r\n".to_vec(),
        b"PUT /v1/assert HTTP/1.1\r\nhost: t\r\ncontent-length: 2\r\n\r\n{}".to_vec(),
        b"POST /v1/assert HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n".to_vec(),
        LIVE.to_vec(),
    ] {
        stream.write_all(&request).await.unwrap();
        let text = answer(&mut stream).await;
        assert!(text.starts_with("HTTP/1.1 "), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_headers_and_idle_connections_are_closed() {
    let short = |config: &mut stemedb::config::Config| {
        config.http.header_timeout_ms = 50;
        config.http.idle_timeout_ms = 100;
    };
    let served = start_with(short).await;
    let mut silent = connect(&served).await;
    let mut slow = connect(&served).await;
    slow.write_all(b"GET /v1/health/live HTTP/1.1\r\nhost:").await.unwrap();
    let mut idle = connect(&served).await;
    idle.write_all(LIVE).await.unwrap();
    assert!(answer(&mut idle).await.starts_with("HTTP/1.1 200"));
    for stream in [&mut silent, &mut slow, &mut idle] {
        assert!(is_closed(stream).await);
    }
    let mut stalled = connect(&served).await;
    stalled.write_all(b"POST /v1/assert HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\n{\"conc").await.unwrap();
    let text = answer(&mut stalled).await;
    assert!(text.starts_with("HTTP/1.1 408"), "{text}");
    assert!(text.contains("/problems/request-timeout") && text.contains("\"outcome\":\"not_applied\""));
    assert!(is_closed(&mut stalled).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_past_the_cap_are_told_so() {
    let served = start_with(|config| config.http.connections_max = 1).await;
    let mut first = connect(&served).await;
    first.write_all(LIVE).await.unwrap();
    assert!(answer(&mut first).await.starts_with("HTTP/1.1 200"));
    let text = served.raw(LIVE).await;
    assert!(text.starts_with("HTTP/1.1 503"), "{text}");
    assert!(text.contains("/problems/too-many-connections") && text.contains("retry-after: 1"));
    // The first goes on, and its place becomes free when it ends.
    first.write_all(LIVE).await.unwrap();
    assert!(answer(&mut first).await.starts_with("HTTP/1.1 200"));
    drop(first);
    let freed = async {
        let close = b"GET /v1/health/live HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n";
        while !served.raw(close).await.starts_with("HTTP/1.1 200") {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, freed).await.expect("the place becomes free");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_in_flight_is_answered_with_close_at_shutdown() {
    let served = start().await;
    let mut idle = connect(&served).await;
    idle.write_all(LIVE).await.unwrap();
    answer(&mut idle).await;
    let mut busy = connect(&served).await;
    let body = r#"{"concept_path":"a","predicate":"p","value":1}"#;
    let head = format!("POST /v1/assert HTTP/1.1\r\nhost: t\r\ncontent-length: {}\r\n", body.len());
    // The server asks for the body only when its handler is at work.
    busy.write_all(format!("{head}expect: 100-continue\r\n\r\n").as_bytes()).await.unwrap();
    let mut go_on = [0; 25];
    timeout(PATIENCE, busy.read_exact(&mut go_on)).await.unwrap().unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    served.shutdown.cancel();
    assert!(is_closed(&mut idle).await, "idle connections go at once");
    busy.write_all(body.as_bytes()).await.unwrap();
    let text = answer(&mut busy).await.to_ascii_lowercase();
    assert!(text.starts_with("http/1.1 201"), "{text}");
    assert!(text.contains("connection: close"), "{text}");
    assert!(is_closed(&mut busy).await);
    timeout(PATIENCE, served.server).await.expect("the server ends").unwrap().unwrap();
    assert!(TcpStream::connect(served.address).await.is_err(), "the listener is closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_http_is_refused_and_closed() {
    let served = start().await;
    let huge = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "h".repeat(100_000));
    // The target counts too, so that a 414 never comes first.
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000));
    for (bytes, status) in [("nonsense\r\n\r\n", "400"), (huge.as_str(), "431"), (long.as_str(), "431")] {
        let text = served.raw(bytes.as_bytes()).await;
        assert!(text.starts_with(&format!("HTTP/1.1 {status}")), "{text}");
    }
    // HTTP/2 by prior knowledge is not spoken here.
    let text = served.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(!text.contains(" 200"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_far_too_large_is_answered_before_it_is_read() {
    let served = start().await;
    let head = "POST /v1/assert HTTP/1.1\r\nhost: t\r\ncontent-length: 1000000000000\r\n\r\n";
    let text = served.raw(head.as_bytes()).await;
    assert!(text.starts_with("HTTP/1.1 413"), "{text}");
    assert!(text.contains("\"actual\":1000000000000"), "{text}");
}
