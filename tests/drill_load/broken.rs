//! `stemedb drill` of nodes whose flows fail or never end: what it says, and what it leaves behind.

use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::Notify;

use super::{Lie, facts, store_of};

/// Far above what any of this takes.
const HANG: Duration = Duration::from_secs(120);

/// Three nodes, the first of which leads.
struct Nodes {
    endpoints: String,
    seen: Arc<Seen>,
    dir: tempfile::TempDir,
}

/// What the nodes were told, and how their flows end.
struct Seen {
    /// State of every job of a drain or failover.
    jobs: &'static str,
    /// The same of an undrain.
    undrains: &'static str,
    /// The node, from 0, that lists nothing.
    unlisted: Option<usize>,
    orders: Mutex<Vec<String>>,
}

impl Seen {
    fn orders(&self) -> Vec<String> {
        self.orders.lock().unwrap().clone()
    }
}

async fn order(State(seen): State<Arc<Seen>>, request: Request) -> Json<Value> {
    let uri = request.uri().clone();
    let what = uri.path().rsplit('/').next().unwrap().to_owned();
    seen.orders.lock().unwrap().push(format!("{what} {}", uri.query().unwrap_or_default()));
    Json(job(if what == "undrain" { seen.undrains } else { seen.jobs }))
}

fn job(state: &str) -> Value {
    json!({"id": "7", "kind": "flow", "node": "node-1", "state": state, "detail": "as planted"})
}

async fn look(State(seen): State<Arc<Seen>>, Path(_id): Path<String>, Query(_of): Query<Value>) -> Json<Value> {
    Json(job(seen.jobs))
}

async fn hide(State(hidden): State<bool>, request: Request, next: Next) -> Response {
    match hidden && request.uri().query().is_some_and(|query| query.contains("resolve=all")) {
        true => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        false => next.run(request).await,
    }
}

impl Nodes {
    async fn start(lie: Lie, jobs: &'static str, undrains: &'static str, unlisted: Option<usize>) -> Nodes {
        let seen = Arc::new(Seen { jobs, undrains, unlisted, orders: Mutex::default() });
        let store = store_of(lie, &Arc::new(Notify::new()));
        let mut endpoints = Vec::new();
        for node in 0..3 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            endpoints.push(listener.local_addr().unwrap().to_string());
            let role = if node == 0 { "leader" } else { "follower" };
            let health = json!({"status": "ok", "name": format!("node-{}", node + 1), "role": role, "term": 1});
            let flows = Router::new()
                .route("/v1/admin/failover", post(order))
                .route("/v1/admin/node/drain", post(order))
                .route("/v1/admin/node/undrain", post(order))
                .route("/v1/admin/jobs/{id}", get(look))
                .with_state(Arc::clone(&seen));
            let app = facts(&store)
                .layer(middleware::from_fn_with_state(seen.unlisted == Some(node), hide))
                .merge(flows)
                .route("/v1/health", get(async move || Json(health)));
            tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        }
        Nodes { endpoints: endpoints.join(","), seen, dir: tempfile::tempdir().unwrap() }
    }

    fn drill(&self, kind: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_stemedb"))
            .args(["drill", "--kind", kind, "--rounds", "2", "--rate", "200", "--json"])
            .args(["--endpoints", &self.endpoints])
            .arg("--html")
            .arg(self.dir.path().join("report.html"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    fn page(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("report.html")).unwrap()
    }

    /// Waits until an order has come that begins so.
    async fn until_ordered(&self, what: &str) -> String {
        let seen = async {
            loop {
                if let Some(order) = self.seen.orders().into_iter().find(|order| order.starts_with(what)) {
                    return order;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(HANG, seen).await.unwrap_or_else(|_| panic!("in vain: an order to {what}"))
    }
}

async fn ended(drill: Child) -> (Output, Value, String) {
    let output = tokio::time::timeout(HANG, drill.wait_with_output()).await.expect("the drill to end").unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{said}"));
    (output, report, said)
}

fn terminate(drill: &Child) {
    let pid = drill.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
}

fn broken(report: &Value) -> Vec<&str> {
    report["broken"].as_array().unwrap().iter().map(|each| each.as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_round_that_breaks_is_reported_and_the_judge_is_asked_all_the_same() {
    let nodes = Nodes::start(Lie::Lose, "failed", "finished", Some(2)).await;
    let (output, report, said) = ended(nodes.drill("failover")).await;
    assert_eq!((output.status.code(), &report["passed"]), (Some(1), &json!(false)), "{said}");
    assert_eq!(report["rounds"], json!([]));
    let broken = broken(&report);
    assert!(broken[0].starts_with("round 1 of 2 did not end") && broken[0].contains("as planted"), "{broken:?}");
    assert!(broken[1].contains("not seen node 3"), "{broken:?}");
    // What the other two list lacks what was planted.
    assert_eq!(report["verdict"]["nodes"], 2);
    assert!(report["verdict"]["counts"]["lost"].as_u64().unwrap() > 0, "{report}");
    let page = nodes.page();
    assert!(page.contains("failed") && page.contains("as planted") && page.contains("<svg "), "{page}");
    // Whose cluster it is was told before.
    assert!(said.contains("200 operations a second") && said.contains("below drill/"), "{said}");
}

#[tokio::test]
async fn a_drill_that_is_ended_puts_back_what_it_has_drained() {
    let nodes = Nodes::start(Lie::None, "running", "finished", None).await;
    let drill = nodes.drill("drain");
    assert_eq!(nodes.until_ordered("drain").await, "drain node=node-1");
    terminate(&drill);
    let (output, report, said) = ended(drill).await;
    assert_eq!(nodes.seen.orders(), ["drain node=node-1", "undrain node=node-1"], "{said}");
    assert_eq!((output.status.code(), &report["passed"]), (Some(5), &json!(false)), "{said}");
    let broken = broken(&report);
    assert!(matches!(broken.as_slice(), [one] if one.contains("interrupted")), "{broken:?}");
    assert_eq!((&report["verdict"]["nodes"], &report["verdict"]["counts"]), (&json!(3), &json!({})), "{report}");
    assert!(nodes.page().contains("interrupted"));
}

#[tokio::test]
async fn what_cannot_be_put_back_is_named_with_the_command_for_it() {
    let nodes = Nodes::start(Lie::None, "failed", "failed", None).await;
    // The drain fails by itself here, which may leave the node half drained.
    let drill = nodes.drill("drain");
    nodes.until_ordered("undrain").await;
    terminate(&drill);
    let (output, report, said) = ended(drill).await;
    assert_eq!(output.status.code(), Some(5), "{said}");
    let command = format!("stemedb undrain node-1 --endpoints {}", nodes.endpoints);
    assert!(said.contains(&command), "{said}");
    assert!(broken(&report).iter().any(|each| each.contains(&command)), "{report}");
}

#[tokio::test]
async fn what_could_not_be_begun_has_a_report_too() {
    let dir = tempfile::tempdir().unwrap();
    let html = dir.path().join("report.html");
    std::fs::write(&html, "of an earlier run").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_stemedb"))
        .args(["drill", "--kind", "drain", "--json", "--endpoints", "127.0.0.1:1", "--html"])
        .arg(&html)
        .output();
    let output = tokio::time::timeout(HANG, output).await.expect("the drill to end").unwrap();
    assert_eq!(output.status.code(), Some(3));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["passed"], report["error"].is_string()), (&json!(false), true), "{report}");
    assert!(std::fs::read_to_string(&html).unwrap().contains("could not be carried out"));
}
