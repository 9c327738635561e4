//! Writes end to end: receipts, keys, batches, imports.

use hyper::Method;
use serde_json::{Value, json};

use crate::support::start;

fn assertion(path: &str, value: impl Into<Value>) -> Value {
    json!({"concept_path": path, "predicate": "p", "value": value.into()})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_write_is_answered_with_a_receipt() {
    let served = start().await;
    let answer = served.post("/v1/assert", assertion("a/b", 1).to_string()).await;
    assert_eq!(answer.status, 201, "{}", answer.json());
    assert_eq!(answer.header("content-type"), "application/json");
    let first = answer.json();
    assert_eq!(answer.header("x-stemedb-index"), first["index"].to_string());
    assert_eq!(answer.header("x-stemedb-served-by"), served.node.name());
    assert_eq!(first["replayed"], false);
    assert!(first["created_at"].as_str().unwrap().ends_with('Z'));
    let names: Vec<_> = first.as_object().unwrap().keys().cloned().collect();
    assert_eq!(names, ["created_at", "id", "index", "replayed"]);

    let second = served.write("/v1/assert", assertion("a/b", 2)).await;
    let vote = json!({"assertion_id": first["id"], "voter": "v", "weight": 0.5});
    let epoch = json!({"name": "e1"});
    let supersede = json!({"old": first["id"], "new": second["id"], "reason": "newer"});
    let mut last = second["index"].as_u64().unwrap();
    for (path, body) in [("/v1/vote", vote), ("/v1/epoch", epoch), ("/v1/supersede", supersede)] {
        let index = served.write(path, body).await["index"].as_u64().unwrap();
        assert!(index > last, "{path}: {index} after {last}");
        last = index;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_key_gets_the_first_outcome_and_writes_nothing() {
    let served = start().await;
    let body = assertion("a", 1).to_string();
    for header in ["idempotency-key", "x-stemedb-retry-id"] {
        let send = |path: &'static str, body: String| {
            let served = &served;
            async move { served.request(Method::POST, path, &[(header, "key-1")], body).await }
        };
        let first = send("/v1/assert", body.clone()).await;
        let again = send("/v1/assert", body.clone()).await;
        assert_eq!((first.status.as_u16(), again.status.as_u16()), (201, 201));
        let (first, again) = (first.json(), again.json());
        assert_eq!(again["replayed"], true);
        for name in ["id", "index", "created_at"] {
            assert_eq!(first[name], again[name]);
        }
        let other = send("/v1/assert", assertion("a", 2).to_string()).await;
        assert_eq!(other.problem(409, "key-reused")["outcome"], "refused");
        let other_route = send("/v1/assert/batch", format!("[{body}]")).await;
        other_route.problem(409, "key-reused");
        // A refusal is an outcome too, and is repeated.
        let vote = json!({"assertion_id": "0198c0de-0000-7000-8000-000000000000", "voter": "v", "weight": 1});
        for _ in 0..2 {
            let key = [(header, "key-2")];
            let refused = served.request(Method::POST, "/v1/vote", &key, vote.to_string()).await;
            assert_eq!(refused.problem(404, "not-found")["outcome"], "refused");
        }
    }
    let all = served.get("/v1/query?concept_path=a&resolve=all").await.json();
    assert_eq!(all["assertions"].as_array().unwrap().len(), 2, "one per kind of key");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_is_stored_whole_or_not_at_all() {
    let served = start().await;
    let items: Vec<_> = (0..3).map(|n| assertion("batch", n)).collect();
    let array = Value::from(items.clone()).to_string();
    let lines: String = items.iter().map(|item| format!("{item}\n")).collect();
    for body in [array, lines] {
        let answer = served.post("/v1/assert/batch", body).await;
        assert_eq!(answer.status, 201, "{}", answer.json());
        let json = answer.json();
        let results = json["results"].as_array().unwrap();
        let indexes: Vec<_> = results.iter().map(|r| r["index"].as_u64().unwrap()).collect();
        assert_eq!(indexes, [indexes[0], indexes[0] + 1, indexes[0] + 2]);
        assert_eq!(answer.header("x-stemedb-index"), indexes[2].to_string());
    }
    let before = served.get("/v1/query?concept_path=batch&resolve=all").await.json();
    assert_eq!(before["assertions"].as_array().unwrap().len(), 6);

    let mut bad = items.clone();
    bad[1]["confidence"] = 2.into();
    let problem = served.post("/v1/assert/batch", Value::from(bad).to_string()).await;
    let problem = problem.problem(422, "invalid-field");
    assert_eq!((&problem["item"], &problem["field"]), (&json!(1), &json!("confidence")));
    // Refused by the state, after the edge had taken it.
    let mut bad = items;
    bad[2]["epoch"] = "nowhere".into();
    let problem = served.post("/v1/assert/batch", Value::from(bad).to_string()).await;
    assert_eq!(problem.problem(422, "unknown-epoch")["outcome"], "refused");
    let after = served.get("/v1/query?concept_path=batch&resolve=all").await.json();
    assert_eq!(before["assertions"], after["assertions"]);
    served.post("/v1/assert/batch", "[]").await.problem(422, "empty-batch");
    served.post("/v1/assert/batch", "").await.problem(422, "empty-batch");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_goes_on_where_it_stood() {
    let served = start().await;
    let position = || async { served.get("/v1/admin/imports/debian").await.json() };
    assert_eq!(position().await, json!({"import_id": "debian", "position": 0}));
    let chunk = format!("{}\n{}\n", assertion("i/1", 1), assertion("i/2", 2));
    let send = |position: &'static str| {
        let headers = [("x-stemedb-import-id", "debian"), ("x-stemedb-import-position", position)];
        let (served, chunk) = (&served, chunk.clone());
        async move { served.request(Method::POST, "/v1/assert/batch", &headers, chunk).await }
    };
    assert_eq!(send("0").await.status, 201);
    assert_eq!(position().await["position"], 2);
    for stale in ["0", "1", "3"] {
        let problem = send(stale).await.problem(409, "import-position");
        assert_eq!(problem["expected_position"], 2);
    }
    assert_eq!(send("2").await.status, 201);
    assert_eq!(position().await["position"], 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_refuses_with_a_reason() {
    let served = start().await;
    let first = served.write("/v1/assert", assertion("a", 1)).await;
    let second = served.write("/v1/assert", assertion("a", 2)).await;
    let elsewhere = served.write("/v1/assert", assertion("b", 1)).await;
    let unknown = "0198c0de-0000-7000-8000-000000000000";
    let post = |path: &'static str, body: Value| served.post(path, body.to_string());

    post("/v1/supersede", json!({"old": unknown})).await.problem(404, "not-found");
    let mismatch = json!({"old": first["id"], "new": elsewhere["id"]});
    let problem = post("/v1/supersede", mismatch).await.problem(422, "path-mismatch");
    assert_eq!((&problem["old_path"], &problem["new_path"]), (&json!("a"), &json!("b")));
    served.write("/v1/supersede", json!({"old": first["id"], "new": second["id"]})).await;
    let circle = json!({"old": second["id"], "new": first["id"]});
    post("/v1/supersede", circle).await.problem(409, "supersession-cycle");
    served.write("/v1/epoch", json!({"name": "e"})).await;
    post("/v1/epoch", json!({"name": "e"})).await.problem(409, "epoch-exists");
    let missing = json!({"name": "f", "supersedes": "missing"});
    post("/v1/epoch", missing).await.problem(422, "unknown-epoch");
}
