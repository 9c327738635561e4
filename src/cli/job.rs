//! `stemedb job list|show|cancel`: the flows and rebuilds of every node.
//!
//! Each node knows its own jobs and those of the whole cluster, so all of them are asked; an id is looked for on each.

use clap::{Args, Subcommand};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use super::flow_client::{self, ASK_TIMEOUT, Job};
use super::http_client::{Call, Client, Endpoint};
use super::{CliError, EndpointArgs, output};

/// What to do with jobs.
#[derive(Subcommand, Debug, Clone)]
pub enum JobCommand {
    /// Every job that the nodes know of, the newest first
    List(JobListArgs),
    /// One job with its steps
    Show(JobArgs),
    /// Undo a job that goes on, where that is safe
    Cancel(JobArgs),
}

/// Arguments of `stemedb job list`.
#[derive(Args, Debug, Clone)]
pub struct JobListArgs {
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `stemedb job show` and `cancel`.
#[derive(Args, Debug, Clone)]
pub struct JobArgs {
    /// The job's id
    id: String,
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct JobsBody {
    node: String,
    jobs: Vec<Job>,
    not_read: Option<String>,
}

#[derive(Debug, Serialize)]
struct Jobs {
    jobs: Vec<Job>,
    not_asked: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Cluster {
    members: Vec<Member>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Member {
    http_addr: String,
}

/// Runs `stemedb job …`.
pub async fn run(command: &JobCommand) -> Result<(), CliError> {
    match command {
        JobCommand::List(args) => {
            let jobs = gather(&args.endpoints.parse()?).await?;
            for node in &jobs.not_asked {
                output::notice(&format!("not asked: {node}"));
            }
            if args.json { output::json(&jobs) } else { output::line(&list(&jobs)) }
        }
        JobCommand::Show(args) => {
            let job = find(args).await?;
            if args.json { output::json(&job) } else { output::line(&details(&job)) }
        }
        JobCommand::Cancel(args) => {
            let job = find(args).await?;
            let (_, answer) = flow_client::order(&args.endpoints.parse()?, &Call::delete(job.path())).await?;
            let job: Job = answer.json().map_err(CliError::Unreachable)?;
            if args.json { output::json(&job) } else { output::line(&details(&job)) }
        }
    }
}

async fn find(args: &JobArgs) -> Result<Job, CliError> {
    let jobs = gather(&args.endpoints.parse()?).await?;
    let not_asked = match jobs.not_asked.is_empty() {
        true => String::new(),
        false => format!(" Not asked: {}.", jobs.not_asked.join("; ")),
    };
    jobs.jobs.into_iter().find(|job| job.id == args.id).ok_or_else(|| {
        CliError::Refused(format!(
            "no node knows job {}; each forgets its own when it restarts, and what it had begun ends with it: see \
             `stemedb status`.{not_asked}",
            args.id
        ))
    })
}

/// Asks the given endpoints and every member that they name.
async fn gather(given: &[Endpoint]) -> Result<Jobs, CliError> {
    let mut endpoints = given.to_vec();
    for endpoint in given {
        let cluster = Client::new(endpoint.clone()).get_json::<Cluster>("/v1/admin/cluster", ASK_TIMEOUT).await;
        let Ok(cluster) = cluster else { continue };
        for found in cluster.members.iter().filter_map(|member| Endpoint::parse(&member.http_addr).ok()) {
            if !endpoints.contains(&found) {
                endpoints.push(found);
            }
        }
        break;
    }
    let asked = endpoints
        .into_iter()
        .map(|endpoint| async move { Client::new(endpoint).get_json::<JobsBody>("/v1/admin/jobs", ASK_TIMEOUT).await });
    let (mut jobs, mut not_asked): (Vec<Job>, Vec<String>) = (Vec::new(), Vec::new());
    let mut answered = false;
    for answer in join_all(asked).await {
        match answer {
            Ok(body) => {
                answered = true;
                jobs.extend(body.jobs);
                not_asked.extend(body.not_read.map(|why| format!("{}: {why}", body.node)));
            }
            Err(error) => not_asked.push(error),
        }
    }
    if !answered {
        return Err(CliError::Unreachable(format!("no node answered: {}", not_asked.join("; "))));
    }
    // The same node under two addresses, or a job of the whole cluster. Who knows most of one that goes on is the leader.
    jobs.sort_by_key(|job| (std::cmp::Reverse(job.began_unix_ms), job.id.clone(), std::cmp::Reverse(job.steps.len())));
    jobs.dedup_by(|a, b| a.id == b.id);
    Ok(Jobs { jobs, not_asked })
}

fn list(jobs: &Jobs) -> String {
    let mut table = output::table(["ID", "KIND", "NODE", "STATE", "STEP", "MS", "DETAIL"]);
    for job in &jobs.jobs {
        let ms = job.ms.to_string();
        table.add_row([&job.id, &job.kind, &job.node, &job.state, &job.step, &ms, &job.detail]);
    }
    table.to_string()
}

fn details(job: &Job) -> String {
    let mut text = format!(
        "{} {} on {}: {}, {} ({} ms)\n  {}\n  begun by {}",
        job.kind, job.id, job.node, job.state, job.step, job.ms, job.detail, job.cause
    );
    if let (Some(from), Some(to)) = (&job.from, &job.to) {
        text.push_str(&format!("\n  leadership: {from} to {to}, term {}", job.term.unwrap_or_default()));
    }
    if job.bytes_total > 0 {
        let (done, total) = (output::thousands(job.bytes_done), output::thousands(job.bytes_total));
        text.push_str(&format!("\n  {done} of {total} bytes"));
    }
    if let Some(entries) = job.entries_behind.filter(|_| !job.is_over()) {
        text.push_str(&format!("\n  {} entries behind", output::thousands(entries)));
    }
    if let Some(eta_s) = job.eta_s.filter(|_| !job.is_over()) {
        text.push_str(&format!("\n  about {eta_s} s left"));
    }
    for step in &job.steps {
        text.push_str(&format!("\n  {:>8} ms  {}", step.ms, step.name));
    }
    text
}
