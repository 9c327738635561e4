//! Orders for flows, and the jobs that come of them, as a client sees them.
//!
//! Any node takes an order and passes it on, so the endpoints are tried one after the other until one answers. An order
//! that may have arrived is not sent again: its job is looked for instead, by the person. A job that goes on is looked
//! at through any endpoint that answers.

use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::http_client::{Answer, Call, Client, Endpoint, HttpError, encode_query};
use super::{CliError, EndpointArgs, output};

/// Deadline of an order: the server answers within 30 s, and passes on within 40 s.
const ORDER_TIMEOUT: Duration = Duration::from_secs(45);
/// Deadline of a question.
pub const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a job is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Questions in a row without an answer before a command gives up; the job goes on.
const SILENCE_MAX: u32 = 20;

/// What every order takes.
#[derive(Args, Debug, Clone)]
pub struct OrderArgs {
    #[command(flatten)]
    pub(super) endpoints: EndpointArgs,
    /// Only say what it would do; exit code 1 when it would be refused
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Do not wait for the end
    #[arg(long)]
    pub(super) no_wait: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// What came of an order.
pub enum Ordered {
    /// What it would do.
    Plan(Answer),
    /// It was taken, and has ended unless that was not to be waited for.
    Job(Job),
}

impl OrderArgs {
    /// What the query of an order says of them.
    pub fn query(&self) -> String {
        format!("dry_run={}&wait={}", self.dry_run, !self.no_wait)
    }

    /// Sends the order, and follows its job.
    pub async fn send(&self, call: &Call) -> Result<Ordered, CliError> {
        let endpoints = self.endpoints.parse()?;
        let (client, answer) = order(&endpoints, call).await?;
        match self.dry_run {
            true => Ok(Ordered::Plan(answer)),
            false => follow(client, &endpoints, &answer, !self.no_wait).await.map(Ordered::Job),
        }
    }
}

/// A job; unknown fields are ignored, so that newer nodes can be asked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `drain`, `undrain`, `failover`, `rebuild`, `member-add`, `member-remove` or `member-replace`.
    pub kind: String,
    /// The node that it runs on, or that it is about.
    pub node: String,
    /// It belongs to the cluster: any node can be asked.
    pub cluster: bool,
    /// `running`, `waiting`, `finished`, `failed` or `cancelled`.
    pub state: String,
    /// What is being done.
    pub step: String,
    /// How long each step took.
    pub steps: Vec<JobStep>,
    /// What it waits for, or how it ended.
    pub detail: String,
    /// Who or what began it.
    pub cause: String,
    /// The node leadership or files come from.
    pub from: Option<String>,
    /// The node that leads afterwards.
    pub to: Option<String>,
    /// The term in which it leads.
    pub term: Option<u64>,
    /// Bytes fetched, of a rebuild.
    pub bytes_done: u64,
    /// Bytes to fetch, of a rebuild.
    pub bytes_total: u64,
    /// Entries of the leader's log that a node lacks that catches up.
    pub entries_behind: Option<u64>,
    /// Seconds left, of a rebuild or of catching up.
    pub eta_s: Option<u64>,
    /// When it began.
    pub began_unix_ms: u64,
    /// How long it took or has taken, milliseconds.
    pub ms: u64,
}

/// A step that was done.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct JobStep {
    /// Its name.
    pub name: String,
    /// How long it took, milliseconds.
    pub ms: u64,
}

impl Job {
    /// Where it is shown.
    pub fn path(&self) -> String {
        let node = if self.cluster { String::new() } else { format!("?node={}", encode_query(&self.node)) };
        format!("/v1/admin/jobs/{}{node}", encode_query(&self.id))
    }

    /// Whether nothing more comes.
    pub fn is_over(&self) -> bool {
        matches!(self.state.as_str(), "finished" | "failed" | "cancelled")
    }
}

/// Whether an answer says that another node may know more, and that nothing was begun: no leader there, or not the
/// leader any more, or the node that is meant was not reached from there.
fn is_try_elsewhere(answer: &Answer, is_order: bool) -> bool {
    let problem = answer.problem();
    let refused = ["not-leader", "node-removed", "too-many-connections"];
    let refused = refused.iter().any(|kind| problem.kind.strip_prefix("/problems/") == Some(kind));
    answer.status == 503 && (!is_order || refused || problem.outcome.as_deref() == Some("not_applied"))
}

/// Sends an order to the first endpoint that takes it. `Refused` with the problem's words when one refuses it.
pub async fn order(endpoints: &[Endpoint], call: &Call) -> Result<(Client, Answer), CliError> {
    first_answer(endpoints, call, true).await
}

/// Asks the first endpoint that answers.
pub async fn ask(endpoints: &[Endpoint], path: &str) -> Result<(Client, Answer), CliError> {
    first_answer(endpoints, &Call::get(path), false).await
}

async fn first_answer(endpoints: &[Endpoint], call: &Call, is_order: bool) -> Result<(Client, Answer), CliError> {
    let mut errors = Vec::new();
    for endpoint in endpoints {
        let mut client = Client::new(endpoint.clone());
        let authority = endpoint.authority();
        match client.call(call, ORDER_TIMEOUT).await {
            Ok(answer) if answer.is_success() => return Ok((client, answer)),
            Ok(answer) if is_try_elsewhere(&answer, is_order) => {
                errors.push(format!("{authority}: {}", answer.describe()));
            }
            // No more was heard of it, by the node that passed it on, or of the proposal.
            Ok(answer) if answer.status == 503 => {
                return Err(CliError::Unreachable(format!("{authority}: {}", answer.describe())));
            }
            Ok(answer) => return Err(CliError::Refused(answer.describe())),
            Err(HttpError::NotSent(why)) => errors.push(format!("{authority}: {why}")),
            Err(HttpError::Unknown(why)) if !is_order => errors.push(format!("{authority}: {why}")),
            Err(HttpError::Unknown(why)) => {
                return Err(CliError::Unreachable(format!(
                    "{authority} took the order and gave no answer ({why}). Whether it was carried out is not known: \
                     look at `stemedb status` and `stemedb job list`"
                )));
            }
        }
    }
    let what = if is_order { "no node took the order" } else { "no node answered" };
    Err(CliError::Unreachable(format!("{what}: {}", errors.join("; "))))
}

/// Follows the job of an answer to its end, at `client`, or through the next endpoint where that gives no answer. With
/// `wait` false it is shown as it is.
pub async fn follow(mut client: Client, endpoints: &[Endpoint], answer: &Answer, wait: bool) -> Result<Job, CliError> {
    let mut job: Job = answer.json().map_err(CliError::Unreachable)?;
    if !wait || job.is_over() {
        return Ok(job);
    }
    let path = job.path();
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
        bar.set_style(style);
    }
    let mut silent = 0;
    while !job.is_over() {
        bar.set_message(format!("{}: {}", job.node, progress(&job)));
        bar.tick();
        tokio::time::sleep(LOOK_INTERVAL).await;
        match client.get_json::<Job>(&path, ASK_TIMEOUT).await {
            Ok(next) => (job, silent) = (next, 0),
            Err(error) if silent < SILENCE_MAX => {
                silent += 1;
                bar.set_message(format!("{}: {}; no answer ({error})", job.node, progress(&job)));
                client = Client::new(next_endpoint(endpoints, client.endpoint()));
            }
            Err(error) => {
                bar.abandon();
                return Err(CliError::Unreachable(format!(
                    "{error}. Job {} may go on; see `stemedb job list`",
                    job.id
                )));
            }
        }
    }
    bar.finish_and_clear();
    Ok(job)
}

/// Another endpoint than this one, if there is another.
fn next_endpoint(endpoints: &[Endpoint], known: &Endpoint) -> Endpoint {
    let place = endpoints.iter().position(|endpoint| endpoint == known).map_or(0, |place| place + 1);
    endpoints.iter().cycle().nth(place).unwrap_or(known).clone()
}

/// What a job does or waits for, how much is missing and how long that may take.
pub(super) fn progress(job: &Job) -> String {
    let mut text = job.step.clone();
    if job.state == "waiting" {
        text.push_str(&format!(", waits: {}", job.detail));
    }
    if job.bytes_total > 0 {
        let (done, total) = (output::thousands(job.bytes_done), output::thousands(job.bytes_total));
        text.push_str(&format!(", {done} of {total} bytes"));
    }
    if let Some(entries) = job.entries_behind {
        text.push_str(&format!(", {} entries behind", output::thousands(entries)));
    }
    if let Some(eta_s) = job.eta_s {
        text.push_str(&format!(", about {eta_s} s left"));
    }
    text
}

/// Prints a job that was ordered: as JSON, or as one line. A job that has failed is an error.
pub fn show(job: &Job, json: bool) -> Result<(), CliError> {
    if matches!(job.state.as_str(), "failed" | "cancelled") {
        return Err(CliError::Refused(format!("the {} {}: {}", job.kind, job.state, job.detail)));
    }
    if json {
        return output::json(job);
    }
    output::line(&line(job))
}

fn line(job: &Job) -> String {
    if !job.is_over() {
        return format!(
            "Job {} goes on at {}: {}. `stemedb job show {}` shows it.",
            job.id, job.node, job.step, job.id
        );
    }
    let moved = match (&job.from, &job.to, job.term) {
        (Some(from), Some(to), Some(term)) => format!(" Leadership went from {from} to {to} in term {term}."),
        _ => String::new(),
    };
    format!("{} of {}: {} ({} ms).{moved}", job.kind, job.node, job.detail, job.ms)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// A node that answers each request alike; how often it was asked.
    async fn node(status: u16, body: serde_json::Value) -> (Endpoint, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::parse(&listener.local_addr().unwrap().to_string()).unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = Vec::new();
                while !request.windows(4).any(|end| end == b"\r\n\r\n") {
                    stream.read_buf(&mut request).await.unwrap();
                }
                counted.fetch_add(1, Relaxed);
                let body = body.to_string();
                let head =
                    format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
            }
        });
        (endpoint, asked)
    }

    #[tokio::test]
    async fn an_order_that_may_have_begun_is_never_given_to_the_next_node() {
        let problem = |kind: &str, outcome: Option<&str>| serde_json::json!({"type": format!("/problems/{kind}"), "outcome": outcome});
        let call = Call::delete("/v1/admin/members/node-4");
        for (first, goes_on) in [
            (problem("not-leader", None), true),
            (problem("unavailable", Some("not_applied")), true),
            (problem("order-unknown", Some("unknown")), false),
            // As an older program says it.
            (problem("unavailable", None), false),
        ] {
            let (first_node, _) = node(503, first.clone()).await;
            let (second_node, asked) = node(200, serde_json::json!({})).await;
            let endpoints = [first_node, second_node];
            let taken = order(&endpoints, &call).await;
            assert_eq!((taken.is_ok(), asked.load(Relaxed)), (goes_on, usize::from(goes_on)), "{first}");
            assert!(goes_on || matches!(taken, Err(CliError::Unreachable(_))), "{first}");
            // A question may be asked of everybody.
            ask(&endpoints, "/v1/admin/members").await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_job_is_followed_at_the_next_node_when_one_is_silent() {
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        let gone = Endpoint::parse(&gone).unwrap();
        let over = serde_json::json!({"id": "7", "state": "finished", "cluster": true, "detail": "node-4 votes"});
        let (lives, asked) = node(200, over).await;
        let begun = serde_json::json!({"id": "7", "state": "running", "cluster": true}).to_string();
        let answer = Answer { status: 202, headers: Default::default(), body: begun.into() };
        let endpoints = [gone.clone(), lives];
        let job = follow(Client::new(gone), &endpoints, &answer, true).await.unwrap();
        assert_eq!((&*job.state, &*job.detail, asked.load(Relaxed)), ("finished", "node-4 votes", 1));
    }

    #[test]
    fn what_a_job_waits_for_is_shown_and_how_long_it_takes() {
        let job = Job {
            step: "waiting for the node to fetch a checkpoint and to join".into(),
            state: "waiting".into(),
            detail: "node-4 does not answer".into(),
            bytes_done: 1_000,
            bytes_total: 2_000,
            entries_behind: Some(12_345),
            eta_s: Some(3),
            ..Job::default()
        };
        assert_eq!(
            progress(&job),
            "waiting for the node to fetch a checkpoint and to join, waits: node-4 does not answer, \
             1,000 of 2,000 bytes, 12,345 entries behind, about 3 s left"
        );
        let running = Job { state: "running".into(), step: "catching up".into(), ..Job::default() };
        assert_eq!(progress(&running), "catching up");
    }

    #[test]
    fn one_line_says_what_became_of_a_job() {
        let job = Job {
            id: "7".into(),
            kind: "failover".into(),
            node: "node-1".into(),
            state: "finished".into(),
            detail: "node-2 leads in term 5 and takes writes".into(),
            from: Some("node-1".into()),
            to: Some("node-2".into()),
            term: Some(5),
            ms: 31,
            ..Job::default()
        };
        assert_eq!(
            line(&job),
            "failover of node-1: node-2 leads in term 5 and takes writes (31 ms). \
             Leadership went from node-1 to node-2 in term 5."
        );
        let running = Job { state: "running".into(), step: "asking the others".into(), ..job };
        assert!(line(&running).contains("stemedb job show 7"));
    }
}
