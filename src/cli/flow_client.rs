//! Orders for flows, and the jobs that come of them, as a client sees them.
//!
//! Any node takes an order and passes it on, so the endpoints are tried one after the other until one answers. An order
//! that may have arrived is not sent again: its job is looked for instead, by the person.

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
        let (mut client, answer) = order(&self.endpoints.parse()?, call).await?;
        match self.dry_run {
            true => Ok(Ordered::Plan(answer)),
            false => follow(&mut client, &answer, !self.no_wait).await.map(Ordered::Job),
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

/// Whether an answer says that another node may know more: no leader there, or not the leader any more.
fn is_try_elsewhere(answer: &Answer) -> bool {
    answer.status == 503
}

/// Sends an order to the first endpoint that takes it. `Refused` with the problem's words when one refuses it.
pub async fn order(endpoints: &[Endpoint], call: &Call) -> Result<(Client, Answer), CliError> {
    let mut errors = Vec::new();
    for endpoint in endpoints {
        let mut client = Client::new(endpoint.clone());
        let authority = endpoint.authority();
        match client.call(call, ORDER_TIMEOUT).await {
            Ok(answer) if answer.is_success() => return Ok((client, answer)),
            Ok(answer) if is_try_elsewhere(&answer) => errors.push(format!("{authority}: {}", answer.describe())),
            Ok(answer) => return Err(CliError::Refused(answer.describe())),
            Err(HttpError::NotSent(why)) => errors.push(format!("{authority}: {why}")),
            Err(HttpError::Unknown(why)) => {
                return Err(CliError::Unreachable(format!(
                    "{authority} took the order and gave no answer ({why}). Whether it was carried out is not known: \
                     look at `stemedb status` and `stemedb job list`"
                )));
            }
        }
    }
    Err(CliError::Unreachable(format!("no node took the order: {}", errors.join("; "))))
}

/// Asks the first endpoint that answers.
pub async fn ask(endpoints: &[Endpoint], path: &str) -> Result<(Client, Answer), CliError> {
    order(endpoints, &Call::get(path)).await
}

/// Follows the job of an answer to its end. With `wait` false it is shown as it is.
pub async fn follow(client: &mut Client, answer: &Answer, wait: bool) -> Result<Job, CliError> {
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
        let behind = job.entries_behind.filter(|entries| *entries > 0);
        let behind =
            behind.map_or_else(String::new, |entries| format!(", {} entries behind", output::thousands(entries)));
        bar.set_message(format!("{}: {}{behind}", job.node, job.step));
        bar.tick();
        tokio::time::sleep(LOOK_INTERVAL).await;
        match client.get_json::<Job>(&path, ASK_TIMEOUT).await {
            Ok(next) => (job, silent) = (next, 0),
            Err(_) if silent < SILENCE_MAX => silent += 1,
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
    use super::*;

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
