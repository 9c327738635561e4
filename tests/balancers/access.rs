//! What the public must not reach stays closed, however it is spelled.

use serde_json::json;
use stemedb::cli::{balancer::Kind, http_client::Call};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::support::{Behind, HANG};

/// Each as it stands in the request line.
const CLOSED: &[&str] = &[
    "/v1/admin",
    "/v1/admin/",
    "/v1/admin/cluster",
    "/v1/admin/cluster?x=1",
    "//v1/admin/cluster",
    "/v1//admin/cluster",
    "///v1///admin///cluster",
    "/v1/./admin/cluster",
    "/./v1/admin/cluster",
    "/v1/x/../admin/cluster",
    "/x/y/../../v1/admin/cluster",
    "/v1/%61dmin/cluster",
    "/v1/%61%64%6D%69%6e/cluster",
    "/%76%31/admin/jobs",
    "/v1/%2e/admin/cluster",
    "/v1/x/%2E%2e/admin/cluster",
    "/v1%2Fadmin/cluster",
    "/v1%2fadmin%2fcluster",
    "/%2fv1/admin/cluster",
    "/V1/Admin/cluster",
    "/metrics",
    "/metrics/",
    "/metrics?x",
    "//metrics",
    "/./metrics",
    "/%6Detrics",
    "/v1/../metrics",
    "/Metrics",
    "http://stemedb/metrics",
    "http://stemedb/v1/admin/cluster",
];

/// A request as it is written, which a client library might not let pass.
async fn raw(behind: &Behind, method: &str, target: &str) -> String {
    let asked = async {
        let mut stream = TcpStream::connect(behind.balancer.endpoint().authority()).await.unwrap();
        let text =
            format!("{method} {target} HTTP/1.1\r\nHost: stemedb\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // Envoy leaves the end of the connection to the client for a second.
        while !is_whole(&answer) && stream.read_buf(&mut answer).await.unwrap() > 0 {}
        String::from_utf8(answer).unwrap()
    };
    tokio::time::timeout(HANG, asked).await.unwrap_or_else(|_| panic!("no answer to {target}"))
}

/// Whether an answer is there with all the bytes that it announces.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let announced = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    announced.is_some_and(|bytes| body.len() >= bytes.parse().unwrap())
}

pub async fn is_closed(behind: &Behind) {
    let name = behind.balancer.kind().name();
    for target in CLOSED {
        for method in ["GET", "POST"] {
            let answer = raw(behind, method, target).await;
            let head = answer.split("\r\n\r\n").next().unwrap().to_ascii_lowercase();
            assert!(head.starts_with("http/1.1 403 "), "{name}: {method} {target}: {answer}");
            assert!(head.contains("content-type: application/problem+json"), "{name}: {target}: {answer}");
            assert!(answer.contains("/problems/not-public"), "{name}: {target}: {answer}");
        }
    }
    is_refused_above_the_root(behind).await;
    // What only looks like it is open, and so is everything else.
    let concept = "v1/admin/metrics";
    let body = json!({"concept_path": concept, "predicate": "metrics", "value": "/v1/admin"}).to_string();
    assert_eq!(behind.call(&Call::post("/v1/assert", body)).await.status, 201);
    let query = behind.call(&Call::get(format!("/v1/query?concept_path={concept}&predicate=metrics"))).await;
    assert_eq!(query.status, 200, "{}", query.describe());
    for path in ["/v1/health", "/v1/health/ready", "/openapi.json"] {
        assert_eq!(behind.call(&Call::get(path)).await.status, 200, "{path}");
    }
    // The nodes themselves go on answering operators.
    for endpoint in behind.endpoints() {
        let mut client = stemedb::cli::http_client::Client::new(endpoint);
        let cluster: serde_json::Value = client.get_json("/v1/admin/cluster", HANG).await.unwrap();
        assert_eq!(cluster["members"].as_array().unwrap().len(), 3);
    }
}

/// A path that climbs above its root is no path to nginx; Envoy resolves it.
async fn is_refused_above_the_root(behind: &Behind) {
    let answer = raw(behind, "GET", "/x/../../v1/admin/cluster").await;
    let expected = if behind.balancer.kind() == Kind::Nginx { "HTTP/1.1 400 " } else { "HTTP/1.1 403 " };
    assert!(answer.starts_with(expected), "{answer}");
}
