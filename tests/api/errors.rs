//! Whatever is sent, the answer is a problem that says what was wrong, and never a 500.

use std::collections::BTreeSet;

use hyper::Method;
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use serde_json::{Value, json};

use crate::support::{Served, start};

const METHODS: [Method; 5] = [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH];

/// Path and upper-case method of each operation in the served OpenAPI document.
async fn described(served: &Served) -> BTreeSet<(String, String)> {
    let document = served.get("/openapi.json").await;
    assert_eq!(document.header("content-type"), "application/json");
    let json = document.json();
    let paths = json["paths"].as_object().unwrap().iter();
    paths
        .flat_map(|(path, item)| {
            let methods: Vec<_> = item.as_object().unwrap().keys().cloned().collect();
            methods.into_iter().map(move |method| (path.clone(), method.to_ascii_uppercase()))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_serves_what_its_document_says() {
    let served = start().await;
    let described = described(&served).await;
    let paths: BTreeSet<_> = described.iter().map(|(path, _)| path.clone()).collect();
    for path in paths {
        let concrete = path.replace("{id}", "0198c0de-0000-7000-8000-000000000000");
        for method in METHODS {
            let answer = served.request(method.clone(), &concrete, &[], "").await;
            if described.contains(&(path.clone(), method.to_string())) {
                assert_ne!(answer.status, 405, "{method} {path}");
                let no_route = json!("/problems/no-such-route");
                assert!(answer.status != 404 || answer.json()["type"] != no_route, "{path}");
            } else {
                let problem = answer.problem(405, "method-not-allowed");
                let allowed = answer.header("allow").to_string();
                for allowed in allowed.split(',').filter(|m| *m != "HEAD") {
                    assert!(described.contains(&(path.clone(), allowed.to_string())), "{allowed}");
                    assert!(problem["accepted"].as_str().unwrap().contains(allowed), "{path}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_routes_and_ids_are_404_and_bad_ids_400() {
    let served = start().await;
    for path in ["/", "/v1", "/v1/assertt", "/v1/assert/", "/v1/assertions", "/%ff"] {
        served.get(path).await.problem(404, "no-such-route");
    }
    let unknown = "/v1/assertions/0198c0de-0000-7000-8000-000000000000";
    served.get(unknown).await.problem(404, "not-found");
    for id in ["x", "%ff", "0198c0de", "a%20b"] {
        served.get(&format!("/v1/assertions/{id}")).await.problem(400, "invalid-id");
    }
    served.get(&format!("/v1/admin/imports/{}", "i".repeat(256))).await.problem(400, "invalid-id");
    served.get(&format!("{unknown}?wrong=1")).await.problem(400, "invalid-query");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_queries_are_400() {
    let served = start().await;
    for query in [
        "",
        "?concept_path=",
        "?concept_path=a//b",
        "?concept_path=a&limit=0",
        "?concept_path=a&limit=1001",
        "?concept_path=a&resolve=best",
        "?concept_path=a&as_of=x",
        "?concept_path=a&valid_at=x",
        "?concept_path=a&consistency=x",
        "?concept_path=a&max_staleness_ms=1",
        "?concept_path=a&unknown=1",
        "?concept_path=%zz",
    ] {
        let problem = served.get(&format!("/v1/query{query}")).await.problem(400, "invalid-query");
        assert!(problem.get("parameter").is_some(), "{problem}");
        assert!(problem.get("outcome").is_none(), "reads have no outcome");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_bodies_and_headers_are_refused_before_anything_is_written() {
    let served = start().await;
    let good = json!({"concept_path": "a", "predicate": "p", "value": 1});
    let with = |name: &str, value: Value| {
        let mut body = good.clone();
        body[name] = value;
        body.to_string()
    };
    for (body, status, kind) in [
        ("{".to_string(), 400, "malformed-json"),
        (r#"{"concept_path":"a","predicate":"p","value":NaN}"#.to_string(), 400, "malformed-json"),
        (r#"{"concept_path":"a","predicate":"p","value":1e999}"#.to_string(), 422, "invalid-field"),
        (with("concept_path", "/a".into()), 422, "invalid-path"),
        (with("concept_path", "a".repeat(1025).into()), 422, "invalid-path"),
        (with("predicate", "".into()), 422, "invalid-field"),
        (with("confidence", 1.1.into()), 422, "invalid-field"),
        (with("colour", "red".into()), 422, "unknown-field"),
        (with("epoch", "nowhere".into()), 422, "unknown-epoch"),
        (with("value", "v".repeat(1024 * 1024).into()), 413, "value-too-large"),
        ("[]".to_string(), 422, "invalid-field"),
    ] {
        let problem = served.post("/v1/assert", body).await.problem(status, kind);
        assert_eq!(problem["outcome"], "refused", "{problem}");
    }
    for (name, value) in [("idempotency-key", ""), ("idempotency-key", "two words"), ("x-stemedb-retry-id", "")] {
        let body = good.to_string();
        let answer = served.request(Method::POST, "/v1/assert", &[(name, value)], body).await;
        assert_eq!(answer.problem(400, "invalid-header")["header"], name);
    }
    let import = [("x-stemedb-import-id", "i"), ("x-stemedb-import-position", "-1")];
    for headers in [&import[..], &import[..1]] {
        let answer = served.request(Method::POST, "/v1/assert/batch", headers, good.to_string()).await;
        answer.problem(400, "invalid-header");
    }
    let page = served.get("/v1/query?concept_path=a&resolve=all").await.json();
    assert_eq!(page["assertions"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn past_eight_mebibytes_both_sizes_are_named() {
    let served = start().await;
    let limit = 8 * 1024 * 1024;
    for size in [limit + 1, 2 * limit] {
        let answer = served.post("/v1/assert", vec![b' '; size]).await;
        let problem = answer.problem(413, "body-too-large");
        assert_eq!((&problem["limit"], &problem["actual"]), (&json!(limit), &json!(size)));
        assert_eq!(problem["outcome"], "refused");
    }
    // Exactly the limit is read.
    let answer = served.post("/v1/assert", vec![b' '; limit]).await;
    answer.problem(422, "invalid-field");
    let items = json!({"concept_path": "a", "predicate": "p", "value": 1}).to_string() + "\n";
    let answer = served.post("/v1/assert/batch", items.repeat(10_001)).await;
    let problem = answer.problem(413, "too-many-items");
    assert_eq!((&problem["limit"], &problem["actual"]), (&json!(10_000), &json!(10_001)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_requests_are_never_the_nodes_fault() {
    let served = start().await;
    let described: Vec<_> = described(&served).await.into_iter().collect();
    let mut runner = TestRunner::deterministic();
    let piece = prop_oneof![
        "[ -~]{0,12}",
        "[{}\\[\\],:\"0-9a-z \n]{0,30}",
        Just(r#"{"concept_path":"a","predicate":"p","value":"#.to_string()),
        Just(r#"{"assertion_id":"0198c0de-0000-7000-8000-000000000000","#.to_string()),
        Just("}".to_string()),
    ];
    let body = prop::collection::vec(piece, 0..6).prop_map(|parts| parts.concat());
    let query = "(concept_path|limit|cursor|as_of|resolve|x)=[a-z0-9%/*.+-]{0,12}";
    let queries = prop::collection::vec(query, 0..4).prop_map(|pairs| pairs.join("&"));
    let id = "[A-Za-z0-9%._~-]{1,12}";
    for _ in 0..300 {
        for (path, method) in &described {
            let body = body.new_tree(&mut runner).unwrap().current();
            let query = queries.new_tree(&mut runner).unwrap().current();
            let id = id.new_tree(&mut runner).unwrap().current();
            let uri = format!("{}?{query}", path.replace("{id}", &id));
            if uri.parse::<hyper::Uri>().is_err() || method == "HEAD" {
                continue;
            }
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let answer = served.request(method.clone(), &uri, &[], body.clone()).await;
            let status = answer.status.as_u16();
            assert!(status < 500, "{method} {uri} {body:?}: {}", answer.json());
            if status >= 400 {
                assert_eq!(answer.header("content-type"), "application/problem+json");
                let is_write = method == Method::POST && !path.starts_with("/v1/admin/");
                assert_eq!(answer.json()["outcome"].is_string(), is_write);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_that_could_lose_data_is_refused_and_changes_nothing() {
    let served = start().await;
    let refused = served.post("/v1/admin/node/rebuild", "").await.problem(409, "rebuild-refused");
    assert!(refused["detail"].as_str().unwrap().contains("Nothing was changed"), "{refused}");
    served.post("/v1/admin/node/rebuild", r#"{"from": "node-9"}"#).await.problem(422, "invalid-field");
    served.post("/v1/admin/node/rebuild", r#"{"form": "node-9"}"#).await.problem(422, "unknown-field");
    served.post("/v1/admin/node/rebuild?node=node-9", "").await.problem(404, "not-found");
    served.post("/v1/admin/node/rebuild?wait=perhaps", "").await.problem(400, "invalid-query");
    served.get("/v1/admin/jobs/current").await.problem(404, "not-found");
    served.get("/v1/admin/jobs/%ff").await.problem(400, "invalid-id");
    served.write("/v1/assert", json!({"concept_path": "a/b", "predicate": "p", "value": 1})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_put_away_is_listed_with_the_day_on_which_it_goes() {
    let served = start().await;
    assert_eq!(served.get("/v1/admin/quarantine").await.json(), json!({"folders": []}));
    let quarantine = served.node.config().node.data_dir.join("quarantine");
    let old = quarantine.join("1700000000000-node/wal");
    std::fs::create_dir_all(&old).unwrap();
    std::fs::write(old.join("segment.001.wal"), [7; 300]).unwrap();
    std::fs::create_dir(quarantine.join("notes-of-an-operator")).unwrap();
    let (since, day) = (1_700_000_000_000_u64, 86_400_000);
    let listed = json!({"folders": [{
        "name": "1700000000000-node", "what": "node", "since_unix_ms": since, "bytes": 300,
        "expires_unix_ms": since + 14 * day,
    }]});
    assert_eq!(served.get("/v1/admin/quarantine").await.json(), listed);
    served.post("/v1/admin/quarantine", "").await.problem(405, "method-not-allowed");
}
