//! `status`, `bench` and `import-check` as programs, against nodes that answer as the documentation says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use stemedb::cli::local_cluster::free_port;
use tokio::net::TcpListener;

/// Facts, and the name of the node whose disk is said to have failed.
#[derive(Default)]
struct Store {
    facts: Vec<Value>,
    failed_disk: Option<String>,
    broken_writes: bool,
}

#[derive(Clone)]
struct Node {
    name: String,
    store: Arc<Mutex<Store>>,
    members: Arc<Mutex<Vec<Value>>>,
}

async fn write(State(node): State<Node>, Json(body): Json<Value>) -> (StatusCode, Json<Value>) {
    let mut store = node.store.lock().unwrap();
    if store.broken_writes {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"title": "broken", "outcome": "unknown"})));
    }
    let items = if let Value::Array(items) = body { items } else { vec![body] };
    store.facts.extend(items);
    (StatusCode::CREATED, Json(json!({})))
}

async fn query(State(node): State<Node>, Query(ask): Query<HashMap<String, String>>) -> Json<Value> {
    let store = node.store.lock().unwrap();
    let path = &ask["concept_path"];
    let matches = |fact: &&Value| {
        let at = fact["concept_path"].as_str().unwrap();
        path.strip_suffix("**").map_or(at == path, |prefix| at.starts_with(prefix))
    };
    let from: usize = ask.get("cursor").map_or(0, |cursor| cursor.parse().unwrap());
    let all: Vec<&Value> = store.facts.iter().filter(matches).collect();
    let page: Vec<&Value> = all.iter().skip(from).take(7).copied().collect();
    let cursor = (from + 7 < all.len()).then(|| (from + 7).to_string());
    Json(json!({"assertions": page, "cursor": cursor}))
}

async fn health(State(node): State<Node>) -> Json<Value> {
    let failed = node.store.lock().unwrap().failed_disk.as_ref() == Some(&node.name);
    let disk =
        if failed { json!({"state": "failed", "reason": "fsync"}) } else { json!({"state": "ok", "reason": null}) };
    let role = if node.name == "node-1" { "leader" } else { "follower" };
    Json(json!({"status": "ok", "name": node.name, "role": role, "term": 4, "leader": "node-1", "applied_index": 9,
        "disk": disk, "version": "0.1.0"}))
}

async fn cluster(State(node): State<Node>) -> Json<Value> {
    Json(json!({"leader": "node-1", "term": 4, "members": *node.members.lock().unwrap()}))
}

/// Three nodes on one store. Returns their endpoints.
async fn nodes(store: &Arc<Mutex<Store>>) -> String {
    let members = Arc::new(Mutex::new(Vec::new()));
    let mut endpoints = Vec::new();
    for number in 1..=3 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let name = format!("node-{number}");
        members
            .lock()
            .unwrap()
            .push(json!({"name": name, "role": "voter", "voter": true, "lag_entries": 0, "http_addr": address}));
        endpoints.push(address);
        let node = Node { name, store: Arc::clone(store), members: Arc::clone(&members) };
        let routes = Router::new()
            .route("/v1/assert", post(write))
            .route("/v1/assert/batch", post(write))
            .route("/v1/query", get(query))
            .route("/v1/health", get(health))
            .route("/v1/admin/cluster", get(cluster));
        tokio::spawn(async move { axum::serve(listener, routes.with_state(node)).await.unwrap() });
    }
    endpoints.join(",")
}

/// Runs the program on a thread of its own. Exit code, standard output, standard error.
async fn stemedb(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stemedb"));
    command.args(args).stdin(Stdio::null()).env_remove("STEMEDB_ENDPOINTS");
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn status_shows_each_node_once_and_its_exit_code_says_whether_all_is_well() {
    let store = Arc::new(Mutex::new(Store::default()));
    let endpoints = nodes(&store).await;
    let (code, out, err) = stemedb(&["status", "--endpoints", &endpoints]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(out.matches("0.1.0").count(), 3, "{out}");
    assert!(out.contains("leader: node-1, term 4"), "{out}");
    // One endpoint is enough: the members are asked at their own addresses.
    let one = endpoints.split(',').next().unwrap();
    let (code, out, err) = stemedb(&["status", "--json", "--endpoints", one]).await;
    assert_eq!(code, 0, "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["nodes"].as_array().unwrap().len(), 3, "{report}");
    store.lock().unwrap().failed_disk = Some("node-3".to_owned());
    let (code, _, err) = stemedb(&["status", "--endpoints", one]).await;
    assert_eq!(code, 1);
    assert!(err.contains("the disk of node-3 failed (fsync)"), "{err}");
}

#[tokio::test]
async fn status_says_when_the_named_leader_and_the_majority_are_gone() {
    let endpoints = nodes(&Arc::default()).await;
    let follower = endpoints.rsplit(',').next().unwrap();
    let gone = free_port(1).unwrap();
    let member =
        |number: u16, address: String| json!({"name": format!("node-{number}"), "voter": true, "http_addr": address});
    let members = vec![
        member(1, format!("127.0.0.1:{gone}")),
        member(2, format!("127.0.0.1:{gone}")),
        member(3, follower.to_owned()),
    ];
    let node = Node { name: "node-3".into(), store: Arc::default(), members: Arc::new(Mutex::new(members)) };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let routes = Router::new().route("/v1/health", get(health)).route("/v1/admin/cluster", get(cluster));
    tokio::spawn(async move { axum::serve(listener, routes.with_state(node)).await.unwrap() });
    let (code, _, err) = stemedb(&["status", "--endpoints", &address]).await;
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("node-1 was the last leader, and no node that answers leads now"), "{err}");
    assert!(err.contains("only 1 of 3 voters answer"), "{err}");
}

#[tokio::test]
async fn bench_measures_writes_and_reads_and_reports_errors() {
    let store = Arc::new(Mutex::new(Store::default()));
    let endpoints = nodes(&store).await;
    let quick = ["bench", "--endpoints", &endpoints, "--clients", "4", "--secs", "0.2", "--warmup", "0", "--json"];
    let (code, out, err) = stemedb(&quick).await;
    assert_eq!(code, 0, "{err}");
    let figures: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&figures[0]["op"], &figures[1]["op"]), (&"write".into(), &"read".into()));
    assert!(figures[0]["requests"].as_u64().unwrap() > 0, "{figures}");
    let written = store.lock().unwrap().facts.clone();
    assert!(written.iter().all(|fact| fact["value"].as_str().unwrap().len() == 128));
    let batched = [&quick[..], &["--batch", "5", "--op", "write"]].concat();
    let (code, out, _) = stemedb(&batched).await;
    assert_eq!((code, out.matches("\"batch\":5").count()), (0, 1), "{out}");
    // An open load offers what it says, whatever gets done.
    let (code, out, err) = stemedb(&[&quick[..], &["--rate", "100", "--op", "write"]].concat()).await;
    assert_eq!(code, 0, "{err}");
    let figures: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(figures[0]["offered"], 20, "{figures}");
    assert!((1..=20).contains(&figures[0]["requests"].as_u64().unwrap()), "{figures}");
    store.lock().unwrap().broken_writes = true;
    let (code, _, err) = stemedb(&[&quick[..], &["--op", "write"]].concat()).await;
    assert_eq!(code, 3);
    assert!(err.contains("broken"), "{err}");
}

/// Changes what the nodes hold.
type Plant = fn(&mut Vec<Value>);

#[tokio::test]
async fn import_check_finds_what_is_missing_changed_or_doubled() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.ndjson");
    let record = |package: u32, predicate: &str| json!({"concept_path": format!("debian/libs/{package}"), "predicate": predicate, "value": {"n": package}, "source": "apt"});
    let records: Vec<Value> = (0..30).flat_map(|package| [record(package, "a"), record(package, "b")]).collect();
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    let store = Arc::new(Mutex::new(Store::default()));
    let endpoints = nodes(&store).await;
    let args = ["import-check", file.to_str().unwrap(), "--endpoints", &endpoints];
    store.lock().unwrap().facts = records.clone();
    let (code, out, err) = stemedb(&args).await;
    assert_eq!(code, 0, "{out}{err}");
    let (code, out, err) = stemedb(&[&args[..], &["--json"]].concat()).await;
    assert_eq!(code, 0, "{out}{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    for node in report["nodes"].as_array().unwrap() {
        assert_eq!(node["counts"]["debian"], json!([60, 60]), "{report}");
        assert_eq!(node["concepts_compared"], 30, "{report}");
    }
    let plants: [(&str, Plant); 4] = [
        ("b = {\"n\":0} is missing", |facts| drop(facts.remove(1))),
        ("a = {\"n\":0} is missing", |facts| facts[0]["value"] = json!({"n": 5})),
        ("is there 1 times too often", |facts| facts.push(facts[0].clone())),
        ("a = {\"n\":0} is missing", |facts| facts[0]["source"] = json!("somebody")),
    ];
    for (said, plant) in plants {
        let mut facts = records.clone();
        plant(&mut facts);
        store.lock().unwrap().facts = facts;
        let (code, out, err) = stemedb(&args).await;
        assert_eq!(code, 1, "{said}: {out}{err}");
        assert!(out.contains(said), "{said}: {out}");
    }
    // A concept outside of the sample shows in the counts.
    let mut facts = records.clone();
    facts.push(json!({"concept_path": "debian/x", "predicate": "p", "value": 1}));
    store.lock().unwrap().facts = facts;
    assert_eq!(stemedb(&args).await.0, 1);
    assert_eq!(stemedb(&[&args[..], &["--no-count"]].concat()).await.0, 0);
}
