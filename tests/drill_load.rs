//! The drill's clients and the judge together, against nodes that lie: what is planted is caught on the way that a real
//! drill takes, over HTTP. And the whole command against nodes that break it: there is a report whatever happens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

#[path = "drill_load/broken.rs"]
mod broken;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use stemedb::cli::drill_load::{Load, client, list_node, repeat_writes};
use stemedb::cli::http_client::Endpoint;
use stemedb::judge::{FindingKind, Verdict, WriteOutcome, check};
use tokio::net::TcpListener;
use tokio::sync::Notify;

/// The lie, told about one write in a hundred.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    None,
    /// Acknowledged and not stored.
    Lose,
    /// Stored twice.
    Double,
    /// Reads show the state of a hundred facts ago.
    Stale,
    /// Refused as not applied, and stored.
    StoreRefused,
    /// A repeated key is a new write.
    ForgetKeys,
}

const WRITES: u64 = 600;
const PAGE: usize = 100;

#[derive(Clone)]
struct Fact {
    path: String,
    value: String,
    index: u64,
}

struct Store {
    lie: Lie,
    facts: Vec<Fact>,
    keys: HashMap<String, u64>,
    next_index: u64,
    enough: Arc<Notify>,
}

type Shared = Arc<Mutex<Store>>;

fn id_of(index: u64) -> String {
    uuid::Uuid::from_u128(u128::from(index)).to_string()
}

async fn write(State(store): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> (StatusCode, Json<Value>) {
    let mut store = store.lock().unwrap();
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let known = if store.lie == Lie::ForgetKeys { None } else { store.keys.get(&key).copied() };
    if let Some(index) = known {
        return (StatusCode::CREATED, Json(json!({"id": id_of(index), "index": index, "replayed": true})));
    }
    store.next_index += 1;
    let index = store.next_index;
    let text = |name: &str| body[name].as_str().unwrap().to_owned();
    let fact = Fact { path: text("concept_path"), value: text("value"), index };
    let lie = if index % 100 == 50 { store.lie } else { Lie::None };
    if lie != Lie::Lose {
        store.facts.push(fact.clone());
    }
    if lie == Lie::Double {
        store.next_index += 1;
        let index = store.next_index;
        store.facts.push(Fact { index, ..fact });
    }
    if index >= WRITES {
        store.enough.notify_one();
    }
    if lie == Lie::StoreRefused {
        // The key is not kept: the client, told that nothing was applied, repeats it and is stored a second time.
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"title": "no", "outcome": "not_applied"})));
    }
    store.keys.insert(key, index);
    (StatusCode::CREATED, Json(json!({"id": id_of(index), "index": index, "replayed": false})))
}

async fn query(State(store): State<Shared>, Query(ask): Query<HashMap<String, String>>) -> Json<Value> {
    let store = store.lock().unwrap();
    let show = |fact: &Fact| json!({"id": id_of(fact.index), "concept_path": fact.path, "value": fact.value, "index": fact.index});
    let path = &ask["concept_path"];
    if let Some(prefix) = path.strip_suffix("**") {
        assert_eq!(ask["resolve"], "all");
        let from: usize = ask.get("cursor").map_or(0, |cursor| cursor.parse().unwrap());
        let rows: Vec<&Fact> = store.facts.iter().filter(|fact| fact.path.starts_with(prefix)).collect();
        let page: Vec<Value> = rows.iter().skip(from).take(PAGE).map(|fact| show(fact)).collect();
        let cursor = (from + PAGE < rows.len()).then(|| (from + PAGE).to_string());
        return Json(json!({"assertions": page, "index": store.next_index, "cursor": cursor}));
    }
    let hidden = if store.lie == Lie::Stale { 100 } else { 0 };
    let visible = store.facts.len().saturating_sub(hidden);
    let newest = store.facts[..visible].iter().filter(|fact| fact.path == *path).max_by_key(|fact| fact.index);
    Json(json!({"assertions": newest.map(show).into_iter().collect::<Vec<_>>(), "cursor": null}))
}

fn store_of(lie: Lie, enough: &Arc<Notify>) -> Shared {
    let enough = Arc::clone(enough);
    Arc::new(Mutex::new(Store { lie, facts: Vec::new(), keys: HashMap::new(), next_index: 0, enough }))
}

/// What clients ask for.
fn facts(store: &Shared) -> Router {
    let routes = Router::new().route("/v1/assert", post(write)).route("/v1/query", get(query));
    routes.with_state(Arc::clone(store))
}

/// Runs eight clients on three nodes that tell `lie`, repeats some writes, lists all nodes, and judges.
async fn verdict(lie: Lie) -> (Verdict, u64) {
    let enough = Arc::new(Notify::new());
    let store = store_of(lie, &enough);
    let mut endpoints = Vec::new();
    for _ in 0..3 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        endpoints.push(Endpoint::parse(&listener.local_addr().unwrap().to_string()).unwrap());
        let app = facts(&store);
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    }
    let load = Load::new(endpoints, 64, 1);
    let clients: Vec<_> = (0..8).map(|number| tokio::spawn(client(Arc::clone(&load), number))).collect();
    enough.notified().await;
    load.stop();
    for client in clients {
        client.await.unwrap().unwrap();
    }
    let acknowledged: Vec<(u64, u16)> = load
        .recorder
        .history()
        .writes
        .iter()
        .filter(|write| matches!(write.outcome, WriteOutcome::Acknowledged { .. }))
        .map(|write| (write.value, write.node))
        .take(20)
        .collect();
    let not_replayed = repeat_writes(&load, &acknowledged).await.unwrap();
    let mut nodes = Vec::new();
    for node in 0..3 {
        nodes.push(list_node(&load, node).await.unwrap());
    }
    (check(&load.recorder.history(), &nodes), not_replayed)
}

#[tokio::test]
async fn an_honest_cluster_passes() {
    let (verdict, not_replayed) = verdict(Lie::None).await;
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!(not_replayed, 0);
    assert!(verdict.acknowledged >= WRITES && verdict.reads > 20 && verdict.nodes == 3, "{verdict}");
}

#[tokio::test]
async fn a_lost_write_is_caught() {
    let (verdict, _) = verdict(Lie::Lose).await;
    assert!(verdict.count(FindingKind::Lost) >= 3, "{verdict}");
}

#[tokio::test]
async fn a_doubled_write_is_caught() {
    let (verdict, _) = verdict(Lie::Double).await;
    assert!(verdict.count(FindingKind::Doubled) >= 3, "{verdict}");
    assert_eq!(verdict.count(FindingKind::Lost), 0, "{verdict}");
}

#[tokio::test]
async fn stale_reads_are_caught() {
    let (verdict, _) = verdict(Lie::Stale).await;
    assert!(verdict.count(FindingKind::Stale) > 0, "{verdict}");
    assert_eq!(verdict.counts.len(), 1, "{verdict}");
}

#[tokio::test]
async fn a_refused_write_that_was_stored_is_caught() {
    let (verdict, _) = verdict(Lie::StoreRefused).await;
    // Most are repeated until they are acknowledged, and are then there twice.
    let caught = verdict.count(FindingKind::Doubled) + verdict.count(FindingKind::RefusedButPresent);
    assert!(caught > 0, "{verdict}");
}

#[tokio::test]
async fn a_forgotten_key_is_caught() {
    let (verdict, not_replayed) = verdict(Lie::ForgetKeys).await;
    assert_eq!(not_replayed, 20);
    assert!(verdict.count(FindingKind::Doubled) >= 20, "{verdict}");
}
