//! The lines that operators paste, byte for byte as curl sends them.

use crate::support::start;

/// What curl sends for `-X POST` with `-d`: a form's content type.
fn curl(method: &str, path: &str, content_type: &str, body: &str) -> String {
    let mut text = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost:18180\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\
         Connection: close\r\n"
    );
    if !content_type.is_empty() {
        text.push_str(&format!("Content-Type: {content_type}\r\n"));
    }
    if !body.is_empty() {
        text.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    format!("{text}\r\n{body}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lines_of_the_runbooks_work() {
    let served = start().await;
    let assert = r#"{"concept_path": "test/disk", "predicate": "space_ok", "value": true}"#;
    for content_type in ["application/json", "application/x-www-form-urlencoded", ""] {
        let answer = served.raw(curl("POST", "/v1/assert", content_type, assert).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 201 Created\r\n"), "{content_type}: {answer}");
    }
    for path in ["/v1/health", "/metrics", "/v1/health/ready"] {
        let answer = served.raw(curl("GET", path, "", "").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{path}: {answer}");
    }
    // Requests are counted by the pattern of their route.
    let scrape = served.raw(curl("GET", "/metrics", "", "").as_bytes()).await;
    for line in [
        "stemedb_http_requests_total{route=\"/v1/assert\",status=\"201\"} 3",
        "stemedb_http_request_duration_seconds_count{route=\"/v1/health\"} 1",
    ] {
        assert!(scrape.contains(line), "no {line} in {scrape}");
    }
    // A POST without a body is the empty object, not a malformed one.
    let answer = served.raw(curl("POST", "/v1/epoch", "", "").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 422 "), "{answer}");
    assert!(answer.contains("\"field\":\"name\""), "{answer}");
}
