//! `stemedb rebuild NODE`: makes a node anew from a replica, and shows how far it is.
//!
//! The order goes to the node itself where its address is known, else through any other that answers. This command may
//! be ended at any time: the rebuild goes on, and asking again joins it.

use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::flow_client::next_endpoint;
use super::http_client::{Call, Client, Endpoint, encode_query};
use super::{CliError, EndpointArgs, output};

/// How often the job is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Deadline of one question. Orders are looked at by the leader first.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Questions in a row without an answer before this command gives up; the rebuild goes on.
const SILENCE_MAX: u32 = 60;

/// Arguments of `stemedb rebuild`.
#[derive(Args, Debug, Clone)]
pub struct RebuildArgs {
    /// Name of the node
    node: String,
    /// Fetch from this node alone; default: a replica
    #[arg(long, value_name = "NODE")]
    from: Option<String>,
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Print the finished job as one JSON object
    #[arg(long)]
    json: bool,
}

/// A job; unknown fields are ignored.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Job {
    id: String,
    kind: String,
    node: String,
    state: String,
    step: String,
    detail: String,
    automatic: bool,
    from: Option<String>,
    fresh_id: Option<u64>,
    bytes_done: u64,
    bytes_total: u64,
    entries_behind: Option<u64>,
    eta_s: Option<u64>,
    began_unix_ms: u64,
    ms: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Members {
    members: Vec<MemberAddress>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct MemberAddress {
    name: String,
    http_addr: String,
}

/// Runs `stemedb rebuild`.
pub async fn run(args: &RebuildArgs) -> Result<(), CliError> {
    let ways = ways_to(args).await?;
    let body = serde_json::json!({ "from": args.from }).to_string();
    let query = format!("node={}", encode_query(&args.node));
    let order = Call::post(format!("/v1/admin/node/rebuild?{query}&wait=false"), body);
    let mut errors = Vec::new();
    for way in &ways {
        let mut client = Client::new(way.clone());
        let answer = match client.call(&order, CALL_TIMEOUT).await {
            Ok(answer) => answer,
            Err(error) => {
                errors.push(error.to_string());
                continue;
            }
        };
        // Another node may know the way.
        if answer.status == 503 || answer.status == 404 {
            errors.push(answer.describe());
            continue;
        }
        if !answer.is_success() {
            return Err(CliError::Refused(answer.describe()));
        }
        let job: Job = answer.json().map_err(CliError::Unreachable)?;
        return follow(client, &ways, &query, job, args.json).await;
    }
    Err(CliError::Unreachable(format!("{} could not be told to rebuild: {}", args.node, errors.join("; "))))
}

/// The node itself first.
async fn ways_to(args: &RebuildArgs) -> Result<Vec<Endpoint>, CliError> {
    let given = args.endpoints.parse()?;
    for endpoint in &given {
        let members: Result<Members, String> =
            Client::new(endpoint.clone()).get_json("/v1/admin/cluster", CALL_TIMEOUT).await;
        let Ok(members) = members else { continue };
        if members.members.is_empty() {
            continue;
        }
        let Some(member) = members.members.iter().find(|member| member.name == args.node) else {
            let names: Vec<&str> = members.members.iter().map(|member| member.name.as_str()).collect();
            let why = format!("there is no member {:?}; the members are {}", args.node, names.join(", "));
            return Err(CliError::Refused(why));
        };
        let mut ways: Vec<Endpoint> = Endpoint::parse(&member.http_addr).into_iter().collect();
        ways.extend(given.iter().filter(|way| !ways.contains(way)).cloned().collect::<Vec<_>>());
        return Ok(ways);
    }
    Ok(given)
}

/// Through any node that answers.
async fn follow(mut client: Client, ways: &[Endpoint], query: &str, mut job: Job, json: bool) -> Result<(), CliError> {
    let bar = ProgressBar::new(0);
    let shape = "{msg:.bold} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec}";
    bar.set_style(ProgressStyle::with_template(shape).unwrap_or_else(|_| ProgressStyle::default_bar()));
    let path = format!("/v1/admin/jobs/{}?{query}", job.id);
    let mut silent = 0;
    loop {
        show(&bar, &job);
        match job.state.as_str() {
            "finished" => {
                bar.finish_and_clear();
                return finished(&job, json);
            }
            "failed" => {
                bar.abandon();
                return Err(CliError::Refused(format!("the rebuild of {} was given up: {}", job.node, job.detail)));
            }
            _ => tokio::time::sleep(LOOK_INTERVAL).await,
        }
        match client.get_json::<Job>(&path, CALL_TIMEOUT).await {
            Ok(next) => (job, silent) = (next, 0),
            Err(error) if silent < SILENCE_MAX => {
                silent += 1;
                bar.set_message(format!("no answer ({error})"));
                client = Client::new(next_endpoint(ways, client.endpoint()));
            }
            Err(error) => {
                bar.abandon();
                let why = format!("{error}; the rebuild goes on. Run the same command again to see it");
                return Err(CliError::Unreachable(why));
            }
        }
    }
}

fn show(bar: &ProgressBar, job: &Job) {
    bar.set_length(job.bytes_total);
    bar.set_position(job.bytes_done);
    bar.set_message(message(job));
}

fn message(job: &Job) -> String {
    let mut text = format!("{}: {}", job.node, job.step);
    if job.state == "waiting" {
        text.push_str(&format!(", waits: {}", job.detail));
    }
    if let Some(entries) = job.entries_behind.filter(|entries| *entries > 0) {
        text.push_str(&format!(", {} entries behind", output::thousands(entries)));
    }
    if let Some(eta_s) = job.eta_s {
        text.push_str(&format!(", {eta_s} s left"));
    }
    text
}

fn finished(job: &Job, json: bool) -> Result<(), CliError> {
    if json {
        return output::json(job);
    }
    let from = job.from.as_deref().unwrap_or("another node");
    let id = job.fresh_id.map_or_else(String::new, |id| format!(" It votes as id {id}."));
    output::line(&format!(
        "{} was rebuilt from {from} in {:.1} s, {} bytes.{id} Its old files are in its quarantine.",
        job.node,
        job.ms as f64 / 1_000.0,
        output::thousands(job.bytes_total)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_is_waited_for_and_how_long() {
        let job = Job {
            node: "node-2".into(),
            state: "waiting".into(),
            step: "asking for the permit".into(),
            detail: "node-3: it does not answer".into(),
            ..Job::default()
        };
        assert_eq!(message(&job), "node-2: asking for the permit, waits: node-3: it does not answer");
        let job = Job { node: "node-2".into(), step: "pulling".into(), eta_s: Some(7), ..Job::default() };
        assert_eq!(message(&job), "node-2: pulling, 7 s left");
    }
}
