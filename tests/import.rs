//! `import` against nodes that fail in every way an answer can fail: each record arrives exactly once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stemedb::cli::CliError;
use stemedb::cli::import::{ImportArgs, ImportSummary, import};
use tokio::net::TcpListener;

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// The connection closes before anything happened.
    CutBefore,
    /// Applied, and the connection closes before the answer.
    CutAfter,
    /// 503 that says that nothing was applied.
    NotApplied,
    /// 503 that leaves it open, and it was applied.
    UnknownApplied,
    /// 503 that leaves it open, and it was not.
    UnknownNot,
    /// Another writer of the same import got its first five records in before.
    Stranger,
    /// 503 that is recorded under the key: the same key gets it again.
    TooLate,
}

const FAULTS: [Fault; 6] =
    [Fault::CutBefore, Fault::CutAfter, Fault::NotApplied, Fault::UnknownApplied, Fault::UnknownNot, Fault::TooLate];

/// The replicated state of a cluster that does nothing but imports.
#[derive(Default)]
struct State {
    position: u64,
    stored: Vec<Value>,
    keys: HashMap<String, (Bytes, u16, Value)>,
    /// Faults of the coming writes, last first.
    faults: Vec<Fault>,
    requests: usize,
}

impl State {
    /// The answer, or `None` to close the connection.
    fn answer(&mut self, request: &Request<()>, body: &Bytes) -> Option<(u16, Value)> {
        if request.method() == hyper::Method::GET {
            return Some((200, json!({"import_id": "x", "position": self.position})));
        }
        self.requests += 1;
        let fault = self.faults.pop().unwrap_or(Fault::None);
        let unavailable = |outcome: &str| Some((503, json!({"title": "not now", "outcome": outcome})));
        match fault {
            Fault::CutBefore => None,
            Fault::NotApplied => unavailable("not_applied"),
            Fault::UnknownNot => unavailable("unknown"),
            Fault::TooLate => {
                let key = header(request, "idempotency-key");
                let recorded = (body.clone(), 503, json!({"title": "too late", "outcome": "refused"}));
                let (_, status, answer) = self.keys.entry(key).or_insert(recorded).clone();
                Some((status, answer))
            }
            Fault::None => Some(self.apply(request, body)),
            Fault::Stranger => {
                let items: Vec<Value> = serde_json::from_slice(body).unwrap();
                self.stored.extend(items.into_iter().take(5));
                self.position += 5;
                Some(self.apply(request, body))
            }
            Fault::CutAfter => {
                self.apply(request, body);
                None
            }
            Fault::UnknownApplied => {
                self.apply(request, body);
                unavailable("unknown")
            }
        }
    }

    fn apply(&mut self, request: &Request<()>, body: &Bytes) -> (u16, Value) {
        let key = header(request, "idempotency-key");
        if let Some((known, status, answer)) = self.keys.get(&key) {
            assert_eq!(known, body, "one key, two bodies");
            return (*status, answer.clone());
        }
        let before: u64 = header(request, "x-stemedb-import-position").parse().unwrap();
        let items: Vec<Value> = serde_json::from_slice(body).unwrap();
        let (status, answer) = if before != self.position {
            (409, json!({"title": "position", "outcome": "refused", "expected_position": self.position}))
        } else if let Some(item) = items.iter().position(|item| item["concept_path"] == "//") {
            (422, json!({"title": "path", "outcome": "refused", "item": item}))
        } else {
            self.position += items.len() as u64;
            self.stored.extend(items);
            (201, json!({"results": []}))
        };
        self.keys.insert(key, (body.clone(), status, answer.clone()));
        (status, answer)
    }
}

fn header(request: &Request<()>, name: &str) -> String {
    request.headers().get(name).unwrap().to_str().unwrap().to_owned()
}

/// Nodes that share one state. Returns their endpoints.
async fn cluster(state: &Arc<Mutex<State>>, nodes: usize) -> String {
    let mut endpoints = Vec::new();
    for _ in 0..nodes {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        endpoints.push(listener.local_addr().unwrap().to_string());
        let state = Arc::clone(state);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&state);
                tokio::spawn(async move {
                    let service = service_fn(move |request| handle(Arc::clone(&state), request));
                    // A service error closes the connection without an answer.
                    let _closed = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
    }
    endpoints.join(",")
}

async fn handle(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, std::io::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let answer = state.lock().unwrap().answer(&Request::from_parts(head, ()), &body);
    match answer {
        None => Err(std::io::Error::other("cut")),
        Some((status, answer)) => {
            let bytes = Bytes::from(answer.to_string());
            Ok(Response::builder().status(status).body(Full::new(bytes)).unwrap())
        }
    }
}

fn record(number: usize) -> Value {
    json!({"concept_path": format!("t/{number}"), "predicate": "p", "value": number})
}

fn file_of(dir: &Path, records: usize) -> String {
    let path = dir.join("data.ndjson");
    let mut file = std::fs::File::create(&path).unwrap();
    for number in 0..records {
        writeln!(file, "{}", record(number)).unwrap();
    }
    path.to_str().unwrap().to_owned()
}

#[derive(Parser)]
struct Harness {
    #[command(flatten)]
    import: ImportArgs,
}

async fn run(file: &str, endpoints: &str, more: &[&str]) -> Result<ImportSummary, CliError> {
    let args = ["x", file, "--endpoints", endpoints].into_iter().chain(more.iter().copied());
    import(&Harness::try_parse_from(args).unwrap().import).await
}

fn assert_exactly_once(state: &Mutex<State>, records: usize) {
    let expected: Vec<Value> = (0..records).map(record).collect();
    assert_eq!(state.lock().unwrap().stored, expected);
}

#[tokio::test]
async fn each_record_arrives_once_whatever_happens_to_the_answers() {
    let dir = tempfile::tempdir().unwrap();
    let file = file_of(dir.path(), 500);
    for seed in 0..20 {
        let mut rng = StdRng::seed_from_u64(seed);
        let state = Arc::new(Mutex::new(State::default()));
        state.lock().unwrap().faults = (0..40)
            .map(|_| if rng.random_ratio(1, 2) { Fault::None } else { FAULTS[rng.random_range(0..FAULTS.len())] })
            .collect();
        let endpoints = cluster(&state, 3).await;
        let summary = run(&file, &endpoints, &["--batch", "17"]).await.unwrap();
        assert_eq!((summary.position, summary.imported, summary.already_there), (500, 500, 0), "seed {seed}");
        assert_exactly_once(&state, 500);
    }
}

#[tokio::test]
async fn a_second_run_has_nothing_to_do_and_a_longer_file_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let file = file_of(dir.path(), 100);
    let state = Arc::new(Mutex::new(State::default()));
    let endpoints = cluster(&state, 2).await;
    run(&file, &endpoints, &["--id", "x", "--batch", "30"]).await.unwrap();
    let again = run(&file, &endpoints, &["--id", "x"]).await.unwrap();
    assert_eq!((again.imported, again.already_there), (0, 100));
    file_of(dir.path(), 130);
    let longer = run(&file, &endpoints, &["--id", "x"]).await.unwrap();
    assert_eq!((longer.imported, longer.already_there), (30, 100));
    assert_exactly_once(&state, 130);
    // A shorter file is not the same file.
    file_of(dir.path(), 50);
    let error = run(&file, &endpoints, &["--id", "x"]).await.unwrap_err();
    assert!(error.to_string().contains("has only 50"), "{error}");
}

#[tokio::test]
async fn a_stranger_moving_the_position_inside_a_chunk_is_met_halfway() {
    // As after an interrupted run with other chunk borders, whose last request was still under way.
    let dir = tempfile::tempdir().unwrap();
    let file = file_of(dir.path(), 40);
    let state = Arc::new(Mutex::new(State::default()));
    let endpoints = cluster(&state, 1).await;
    {
        let mut state = state.lock().unwrap();
        state.position = 10;
        state.stored = (0..10).map(record).collect();
    }
    // The client asks for the position; then the stranger's request lands, before and in the middle.
    state.lock().unwrap().faults = vec![Fault::Stranger, Fault::None, Fault::Stranger];
    run(&file, &endpoints, &["--id", "x", "--batch", "25"]).await.unwrap();
    assert_exactly_once(&state, 40);
}

#[tokio::test]
async fn a_bad_line_is_named_and_its_chunk_is_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.ndjson");
    let good = |number| record(number).to_string();
    std::fs::write(&path, format!("{}\n\n{}\n{}\nnonsense\n", good(0), good(1), good(2))).unwrap();
    let state = Arc::new(Mutex::new(State::default()));
    let endpoints = cluster(&state, 1).await;
    let error = run(path.to_str().unwrap(), &endpoints, &["--batch", "2"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 4);
    assert!(error.to_string().contains("line 5"), "{error}");
    assert!(error.to_string().contains("--id"), "says how to go on: {error}");
    assert_exactly_once(&state, 2);
}

#[tokio::test]
async fn an_item_refused_by_the_cluster_is_named_by_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.ndjson");
    let bad = json!({"concept_path": "//", "predicate": "p", "value": 1});
    std::fs::write(&path, format!("{}\n\n\n{bad}\n{}\n", record(0), record(1))).unwrap();
    let state = Arc::new(Mutex::new(State::default()));
    let endpoints = cluster(&state, 1).await;
    let error = run(path.to_str().unwrap(), &endpoints, &["--id", "x"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 4);
    assert!(error.to_string().starts_with("line 4: "), "{error}");
    assert_exactly_once(&state, 0);
    // Corrected, the same import goes on at once: the recorded refusal is not repeated.
    std::fs::write(&path, format!("{}\n{}\n", record(0), record(1))).unwrap();
    run(path.to_str().unwrap(), &endpoints, &["--id", "x"]).await.unwrap();
    assert_exactly_once(&state, 2);
}

#[tokio::test]
async fn no_node_is_exit_code_3_and_says_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let file = file_of(dir.path(), 1);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = run(&file, &endpoint, &["--patience", "1"]).await.unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("Run the same command again"), "{error}");
}

#[tokio::test]
async fn wrong_arguments_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = file_of(dir.path(), 1);
    for more in [["--batch", "0"], ["--batch", "10001"], ["--id", "a/b"], ["--id", ".."], ["--id", ""]] {
        let error = run(&file, "127.0.0.1:1", &more).await.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{more:?}: {error}");
    }
    let error = run("/nowhere.ndjson", "127.0.0.1:1", &[]).await.unwrap_err();
    assert_eq!(error.exit_code(), 4, "{error}");
}
