//! Every kind of request comes through as the node would have answered it, bodies up to the limit too, and a retry id that
//! a client made up does not.

use hyper::header::{HeaderName, HeaderValue};
use serde_json::{Value, json};
use stemedb::cli::{
    balancer::Kind,
    http_client::{Answer, Call, Client},
};

use super::support::{Behind, HANG};

fn assertion(predicate: &str, value: Value) -> String {
    json!({"concept_path": "test/requests", "predicate": predicate, "value": value}).to_string()
}

async fn created(behind: &Behind, call: &Call) -> Value {
    let answer = behind.call(call).await;
    assert_eq!(answer.status, 201, "{}", answer.describe());
    assert!(answer.header("x-stemedb-served-by").is_some_and(|name| name.starts_with("node-")));
    assert!(answer.header("x-stemedb-index").is_some());
    answer.json().unwrap()
}

async fn found(behind: &Behind, path: &str) -> Answer {
    let answer = behind.call(&Call::get(path)).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.describe());
    answer
}

pub async fn are_served(behind: &Behind) {
    each_kind(behind).await;
    keys(behind).await;
    bodies(behind).await;
    if behind.balancer.kind() == Kind::Envoy {
        go_straight_to_the_leader(behind).await;
    }
}

/// Nobody is left to answer: that is said in the form of the API, and what became of a write is left open.
pub async fn without_nodes(behind: &mut Behind) {
    for i in 0..3 {
        behind.processes.kill(i).await.unwrap();
    }
    let answer = behind.call(&Call::post("/v1/assert", assertion("late", json!(1)))).await;
    let problem = answer.problem();
    assert_eq!(answer.status, 503, "{}", answer.describe());
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    assert_eq!((problem.kind.as_str(), problem.outcome.as_deref()), ("/problems/outcome-unknown", Some("unknown")));
    assert_eq!(answer.header("retry-after"), Some("1"));
}

async fn each_kind(behind: &Behind) {
    let first = created(behind, &Call::post("/v1/assert", assertion("first", json!({"a": [1, "ä"]})))).await;
    let second = created(behind, &Call::post("/v1/assert", assertion("first", json!(2)))).await;
    let (first_id, second_id) = (first["id"].as_str().unwrap(), second["id"].as_str().unwrap());
    let items: Vec<String> = (0..3).map(|n| assertion(&format!("batch-{n}"), json!(n))).collect();
    for batch in [format!("[{}]", items.join(",")), items.join("\n")] {
        let batch = created(behind, &Call::post("/v1/assert/batch", batch)).await;
        assert_eq!(batch["results"].as_array().unwrap().len(), 3);
    }
    let vote = json!({"assertion_id": first_id, "voter": "me", "weight": 1}).to_string();
    created(behind, &Call::post("/v1/vote", vote)).await;
    created(behind, &Call::post("/v1/epoch", json!({"name": "spring"}).to_string())).await;
    let supersession = json!({"old": first_id, "new": second_id}).to_string();
    created(behind, &Call::post("/v1/supersede", supersession).clone()).await;
    let page: Value = found(behind, "/v1/query?concept_path=test/**&resolve=all&limit=1000").await.json().unwrap();
    assert!(page["assertions"].as_array().unwrap().len() >= 8, "{page}");
    found(behind, &format!("/v1/assertions/{first_id}")).await;
    found(behind, "/v1/history?concept_path=test/requests&predicate=first").await;
    found(behind, "/v1/query?concept_path=test%2Frequests&predicate=first&consistency=stale").await;
    // Problems are the node's own.
    let missing = behind.call(&Call::get("/v1/no-such-thing")).await;
    assert_eq!((missing.status, missing.problem().kind.as_str()), (404, "/problems/no-such-route"));
    let wrong = behind.call(&Call::post("/v1/assert", "{")).await;
    assert_eq!((wrong.status, wrong.problem().kind.as_str()), (400, "/problems/malformed-json"));
}

async fn keys(behind: &Behind) {
    // The client's key comes through.
    let call = Call::post("/v1/assert", assertion("keyed", json!(1))).idempotency_key("a-key").unwrap();
    let (first, again) = (created(behind, &call).await, created(behind, &call).await);
    assert_eq!((&first["id"], &first["replayed"], &again["replayed"]), (&again["id"], &json!(false), &json!(true)));
    // A retry id of a client's own does not: two requests are two facts, and an invalid one is no error.
    for made_up in ["made-up", "made up"] {
        let header = (HeaderName::from_static("x-stemedb-retry-id"), HeaderValue::from_static(made_up));
        let call = Call::post("/v1/assert", assertion("retried", json!(1))).header(header.0, header.1);
        let (first, again) = (created(behind, &call).await, created(behind, &call).await);
        assert_ne!(first["id"], again["id"]);
        assert_eq!((&first["replayed"], &again["replayed"]), (&json!(false), &json!(false)));
    }
}

/// A batch of about so many bytes.
fn batch_of(bytes: usize) -> String {
    let filler = "x".repeat(64 * 1024);
    let mut lines = String::with_capacity(bytes);
    while lines.len() < bytes {
        lines.push_str(&assertion("large", json!(filler)));
        lines.push('\n');
    }
    lines
}

async fn bodies(behind: &Behind) {
    const MIB: usize = 1024 * 1024;
    let taken = created(behind, &Call::post("/v1/assert/batch", batch_of(7 * MIB))).await;
    assert!(taken["results"].as_array().unwrap().len() > 100);
    // The node reads on to say both sizes, and the balancer lets it.
    let answer = behind.call(&Call::post("/v1/assert/batch", batch_of(9 * MIB))).await;
    let body: Value = answer.json().unwrap();
    assert_eq!((answer.status, &body["type"]), (413, &json!("/problems/body-too-large")), "{body}");
    assert_eq!((&body["limit"], &body["outcome"]), (&json!(8 * MIB), &json!("refused")), "{body}");
    assert!(body["actual"].as_u64().unwrap() > 9 * MIB as u64, "{body}");
    // Past what the node reads, nginx refuses by itself. Envoy hands on what the node says before it closes.
    if behind.balancer.kind() == Kind::Nginx {
        let answer = behind.call(&Call::post("/v1/assert/batch", batch_of(17 * MIB))).await;
        assert_eq!((answer.status, answer.problem().kind.as_str()), (413, "/problems/body-too-large"));
    }
}

/// Requests for `/v1/assert` that each node has answered.
async fn asserts(behind: &Behind) -> [u64; 3] {
    let mut counts = [0; 3];
    for (count, endpoint) in counts.iter_mut().zip(behind.endpoints()) {
        let answer = Client::new(endpoint).call(&Call::get("/metrics"), HANG).await.unwrap();
        let text = String::from_utf8(answer.body.to_vec()).unwrap();
        let lines = text
            .lines()
            .filter(|line| line.starts_with("stemedb_http_requests_total{") && line.contains("\"/v1/assert\""));
        *count = lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64).sum();
    }
    counts
}

/// Followers answer the probe with `x-envoy-degraded`, and get nothing once Envoy has seen it.
async fn go_straight_to_the_leader(behind: &Behind) {
    const WRITES: u64 = 20;
    behind
        .until("writes that go to the leader alone", async |behind| {
            let leader = behind.leader().await;
            let before = asserts(behind).await;
            for _ in 0..WRITES {
                created(behind, &Call::post("/v1/assert", assertion("straight", json!(1)))).await;
            }
            let after = asserts(behind).await;
            (after[leader] - before[leader] == WRITES).then_some(())
        })
        .await;
}
