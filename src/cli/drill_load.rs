//! The clients of a drill: closed-loop writes and reads that stay on their node while it lives.
//!
//! Every write has its own idempotency key and a value that no other write has. A write whose
//! connection breaks is repeated with the same key on the next node that is up, until some node
//! answers, and only then does the client begin another one. Everything is recorded for the judge.
//! Behind a load balancer the clients are as plain as clients come: no key, no second attempt, and the
//! only address they know is the balancer's.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::http_client::{Answer, CALL_TIMEOUT, Call, Client, Endpoint, HttpError, encode_query};
use super::listing::each_fact;
use crate::judge::{BALANCER, Fact, Lane, NodeFacts, ReadOutcome, Recorder, Seen, WriteOutcome};

/// Deadline of a request through a balancer, whose own is 30 s.
const BALANCER_TIMEOUT: Duration = Duration::from_secs(35);

/// How long one write is repeated before the client gives it up as unknown.
const WRITE_PATIENCE: Duration = Duration::from_secs(180);

/// Pause after an attempt that was answered with "not now".
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// Writes that share a key. Few enough that reading a key stays cheap, enough that it has a past.
const WRITES_PER_KEY: u64 = 32;

/// Reads look at keys of the last so many writes, where there is something to be stale about.
const READ_BACK: u64 = 256;

/// One operation in so many is a read.
const READ_ONE_IN: u32 = 8;

/// What all clients share.
pub struct Load {
    /// Collects everything.
    pub recorder: Arc<Recorder>,
    /// One per node.
    pub endpoints: Vec<Endpoint>,
    /// The load balancer, if clients are to use nothing else.
    pub balancer: Option<Endpoint>,
    /// Which nodes clients may use; the drill knows which it killed.
    pub up: Vec<AtomicBool>,
    /// Seed of every client's choices.
    pub seed: u64,
    /// Makes this run's concepts and idempotency keys its own.
    pub run: String,
    /// Bytes of each value.
    pub value_bytes: usize,
    /// Writes that were acknowledged on another node than the one they were begun on.
    pub moved: AtomicU64,
    /// Operations that ended, in whatever way.
    pub operations: AtomicU64,
    /// Which node committed each acknowledged write, by its own word.
    served: Mutex<Vec<Served>>,
    stop: AtomicBool,
    abandoned: AtomicBool,
}

/// An acknowledged write and who committed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// The leader that committed it, from 0.
    pub by: usize,
    /// When the request was sent, microseconds of the recorder's clock.
    pub start_us: u64,
    /// When the answer was there.
    pub end_us: u64,
}

#[derive(Deserialize)]
struct WriteBody {
    id: uuid::Uuid,
    index: u64,
    replayed: bool,
}

#[derive(Deserialize)]
struct PageBody {
    assertions: Vec<FactBody>,
}

#[derive(Deserialize)]
struct FactBody {
    id: uuid::Uuid,
    concept_path: String,
    value: String,
    index: u64,
}

impl Load {
    /// A load on `endpoints`; nobody works yet.
    pub fn new(endpoints: Vec<Endpoint>, value_bytes: usize, seed: u64) -> Arc<Self> {
        Self::through(None, endpoints, value_bytes, seed)
    }

    /// The same through a load balancer before `endpoints`.
    pub fn through(balancer: Option<Endpoint>, endpoints: Vec<Endpoint>, value_bytes: usize, seed: u64) -> Arc<Self> {
        let up = endpoints.iter().map(|_| AtomicBool::new(true)).collect();
        Arc::new(Self {
            recorder: Recorder::new(),
            endpoints,
            balancer,
            up,
            seed,
            run: format!("{seed:016x}"),
            value_bytes,
            moved: AtomicU64::new(0),
            operations: AtomicU64::new(0),
            served: Mutex::new(Vec::new()),
            stop: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        })
    }

    /// Tells clients whether they may use a node.
    pub fn set_up(&self, node: usize, up: bool) {
        if let Some(flag) = self.up.get(node) {
            flag.store(up, Ordering::Release);
        }
    }

    /// Whether clients shall end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Acknowledged writes that ended at `since_us` or later and that `node` committed, by the answers' headers.
    pub fn served_by(&self, node: usize, since_us: u64) -> Vec<Served> {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.iter().filter(|each| each.by == node && each.end_us >= since_us).copied().collect()
    }

    /// Clients finish the write they are in and end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// The same, and a write is not repeated any more: nobody knows whether it would ever be answered.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.stop();
    }

    fn is_up(&self, node: usize) -> bool {
        self.up.get(node).is_some_and(|flag| flag.load(Ordering::Acquire))
    }

    /// The next node after `node` that is up; `node` itself when no other is.
    fn next_up(&self, node: usize) -> usize {
        let count = self.endpoints.len();
        (1..count).map(|step| (node + step) % count).find(|candidate| self.is_up(*candidate)).unwrap_or(node)
    }

    fn concept(&self, key: u64) -> String {
        format!("drill/{}/key-{key}", self.run)
    }

    fn write_call(&self, value: u64) -> Result<Call, String> {
        // Letters of a fixed filler, so that the bytes of a repetition are those of the first attempt.
        let mut text = format!("v{value}-");
        while text.len() < self.value_bytes {
            text.push(char::from(b'a' + u8::try_from(text.len() % 26).unwrap_or(0)));
        }
        let concept = self.concept(value / WRITES_PER_KEY);
        let body = format!(r#"{{"concept_path":"{concept}","predicate":"drill","value":"{text}"}}"#);
        let call = Call::post("/v1/assert", body);
        match self.balancer {
            Some(_) => Ok(call),
            None => call.idempotency_key(&format!("drill-{}-{value}", self.run)),
        }
    }
}

/// A client's connections, one per node or one to the balancer, opened when needed.
struct Connections {
    clients: Vec<Client>,
    balancer: Option<Client>,
}

impl Connections {
    fn new(load: &Load) -> Self {
        let clients = load.endpoints.iter().cloned().map(Client::new).collect();
        Self { clients, balancer: load.balancer.clone().map(Client::new) }
    }

    async fn call(&mut self, node: usize, call: &Call) -> Result<Answer, HttpError> {
        if let Some(balancer) = &mut self.balancer {
            return balancer.call(call, BALANCER_TIMEOUT).await;
        }
        match self.clients.get_mut(node) {
            Some(client) => client.call(call, CALL_TIMEOUT).await,
            None => Err(HttpError::NotSent(format!("there is no node {node}"))),
        }
    }
}

/// A client: its connections, its record, and where it is at home.
pub struct OneClient {
    lane: Lane,
    connections: Connections,
    rng: StdRng,
    home: usize,
}

/// Runs one client until `Load::stop`.
pub async fn client(load: Arc<Load>, number: u32) -> Result<(), String> {
    let mut client = OneClient::new(&load, number);
    while !load.is_stopped() {
        client.operation(&load).await?;
    }
    Ok(())
}

impl OneClient {
    /// Client `number`, whose node is the one that its number falls on.
    pub fn new(load: &Load, number: u32) -> Self {
        Self {
            lane: load.recorder.lane(number),
            connections: Connections::new(load),
            rng: StdRng::seed_from_u64(load.seed.wrapping_add(u64::from(number))),
            home: usize::try_from(number).unwrap_or(0) % load.endpoints.len().max(1),
        }
    }

    /// One write or read, to its end.
    pub async fn operation(&mut self, load: &Load) -> Result<(), String> {
        // Home again as soon as the drill says that the node is back.
        let node = match &load.balancer {
            Some(_) => usize::from(BALANCER),
            None if load.is_up(self.home) => self.home,
            None => load.next_up(self.home),
        };
        if self.rng.random_ratio(1, READ_ONE_IN) {
            let back = self.rng.random_range(0..READ_BACK);
            read(load, &self.lane, &mut self.connections, node, back).await;
        } else {
            let value = load.recorder.next_value();
            write(load, &self.lane, &mut self.connections, node, value).await?;
        }
        load.operations.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Sends `value` until some node acknowledges it or patience ends; through a balancer, once.
async fn write(
    load: &Load,
    lane: &Lane,
    connections: &mut Connections,
    first_node: usize,
    value: u64,
) -> Result<(), String> {
    let call = load.write_call(value)?;
    let deadline = Instant::now() + WRITE_PATIENCE;
    let mut node = first_node;
    loop {
        match attempt(load, lane, connections, node, &call, value).await {
            WriteOutcome::Acknowledged { .. } => {
                if node != first_node {
                    load.moved.fetch_add(1, Ordering::Relaxed);
                }
                return Ok(());
            }
            _ if load.balancer.is_some() || Instant::now() >= deadline => return Ok(()),
            _ if load.abandoned.load(Ordering::Acquire) => return Ok(()),
            // An answer: the node lives. Everything else means a broken connection, so go elsewhere.
            WriteOutcome::Refused { status } | WriteOutcome::Unknown { status } if status > 0 => {
                sleep(REFUSED_PAUSE).await;
            }
            _ => {
                let next = load.next_up(node);
                if next == node {
                    sleep(REFUSED_PAUSE).await;
                }
                node = next;
            }
        }
    }
}

async fn attempt(
    load: &Load,
    lane: &Lane,
    connections: &mut Connections,
    node: usize,
    call: &Call,
    value: u64,
) -> WriteOutcome {
    let start_us = load.recorder.now_us();
    let pending = lane.begin_write(node_number(node), value / WRITES_PER_KEY, value);
    let outcome = match connections.call(node, call).await {
        Err(HttpError::NotSent(_)) => WriteOutcome::Refused { status: 0 },
        Err(HttpError::Unknown(_)) => WriteOutcome::Unknown { status: 0 },
        Ok(answer) => {
            let outcome = write_outcome(&answer);
            if matches!(outcome, WriteOutcome::Acknowledged { replayed: false, .. })
                && let Some(by) = answer.header("x-stemedb-served-by").and_then(place_of)
            {
                let served = Served { by, start_us, end_us: load.recorder.now_us() };
                load.served.lock().unwrap_or_else(PoisonError::into_inner).push(served);
            }
            outcome
        }
    };
    pending.finish(outcome);
    outcome
}

/// `node-2` is at place 1.
fn place_of(name: &str) -> Option<usize> {
    name.strip_prefix("node-")?.parse::<usize>().ok()?.checked_sub(1)
}

fn write_outcome(answer: &Answer) -> WriteOutcome {
    let status = answer.status;
    if answer.is_success() {
        return match answer.json::<WriteBody>() {
            Ok(body) => {
                WriteOutcome::Acknowledged { index: body.index, id: body.id.as_u128(), replayed: body.replayed }
            }
            // Success without the promised fields: whatever happened, the client was not told.
            Err(_) => WriteOutcome::Unknown { status },
        };
    }
    // Only an answer that says so counts as "not applied".
    match answer.problem().outcome.as_deref() {
        Some("refused" | "not_applied") => WriteOutcome::Refused { status },
        _ => WriteOutcome::Unknown { status },
    }
}

/// Reads the key of the write `back` writes ago.
async fn read(load: &Load, lane: &Lane, connections: &mut Connections, node: usize, back: u64) {
    let newest = load.recorder.values_issued();
    let key = newest.saturating_sub(back) / WRITES_PER_KEY;
    let concept = encode_query(&load.concept(key));
    let call = Call::get(format!("/v1/query?concept_path={concept}&predicate=drill"));
    let pending = lane.begin_read(node_number(node), key);
    let outcome = match connections.call(node, &call).await {
        Ok(answer) if answer.is_success() => match answer.json::<PageBody>() {
            Ok(page) => newest_of(page)
                .map_or(ReadOutcome::Failed { status: answer.status }, |newest| ReadOutcome::Answered { newest }),
            Err(_) => ReadOutcome::Failed { status: answer.status },
        },
        Ok(answer) => ReadOutcome::Failed { status: answer.status },
        Err(_) => ReadOutcome::Failed { status: 0 },
    };
    lane.finish_read(pending, outcome);
}

/// The newest fact of a page, `Some(None)` of an empty one, `None` when a value is not ours.
fn newest_of(page: PageBody) -> Option<Option<Seen>> {
    let Some(fact) = page.assertions.into_iter().max_by_key(|fact| fact.index) else {
        return Some(None);
    };
    let value = value_number(&fact.value)?;
    Some(Some(Seen { value, index: fact.index }))
}

/// Sends acknowledged writes once more, with their keys, to a node that did not take them first. The judge
/// compares the outcomes. Returns how many of the answers did not say `replayed`.
pub async fn repeat_writes(load: &Load, values: &[(u64, u16)]) -> Result<u64, String> {
    let lane = load.recorder.lane(u32::MAX);
    let mut connections = Connections::new(load);
    let mut not_replayed = 0;
    for (value, node) in values {
        let node = load.next_up(usize::from(*node));
        let call = load.write_call(*value)?;
        let outcome = attempt(load, &lane, &mut connections, node, &call, *value).await;
        if !matches!(outcome, WriteOutcome::Acknowledged { replayed: true, .. }) {
            not_replayed += 1;
        }
    }
    Ok(not_replayed)
}

/// Everything one node holds of this run, read with linearizable consistency, page by page.
pub async fn list_node(load: &Load, node: usize) -> Result<NodeFacts, String> {
    let endpoint = load.endpoints.get(node).ok_or("there is no such node")?;
    let mut client = Client::new(endpoint.clone());
    let mut listing = NodeFacts { node: node_number(node), start_us: load.recorder.now_us(), facts: Vec::new() };
    let mut facts: Vec<FactBody> = Vec::new();
    each_fact(&mut client, &format!("drill/{}/**", load.run), |fact| facts.push(fact))
        .await
        .map_err(|error| error.to_string())?;
    for fact in facts {
        let key = fact.concept_path.rsplit("/key-").next().and_then(|key| key.parse().ok());
        let (Some(key), Some(value)) = (key, value_number(&fact.value)) else {
            return Err(format!("a fact that this drill did not write: {}", fact.concept_path));
        };
        listing.facts.push(Fact { key, value, index: fact.index, id: fact.id.as_u128() });
    }
    Ok(listing)
}

fn value_number(text: &str) -> Option<u64> {
    text.strip_prefix('v')?.split('-').next()?.parse().ok()
}

fn node_number(node: usize) -> u16 {
    u16::try_from(node).unwrap_or(u16::MAX)
}
