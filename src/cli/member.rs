//! `stemedb member add|remove|replace|list`: who belongs to the cluster, and orders that change it.
//!
//! Any node takes an order and passes it on to the leader. The job belongs to the cluster: this command may be ended at
//! any time, and the job goes on, whichever node leads.

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use super::flow_client::{self, Job, OrderArgs, Ordered};
use super::http_client::{Call, encode_query};
use super::{CliError, EndpointArgs, output};

/// What to do with members.
#[derive(Subcommand, Debug, Clone)]
pub enum MemberCommand {
    /// Add a node that runs with an empty folder; it votes once it has caught up
    Add(AddArgs),
    /// Remove a node for good; a leader gives leadership away first
    Remove(RemoveArgs),
    /// Replace a node, dead or alive, by an empty one, in one step
    Replace(ReplaceArgs),
    /// Every member, and the change that goes on
    List(ListArgs),
}

/// Arguments of `stemedb member add`.
#[derive(Args, Debug, Clone)]
pub struct AddArgs {
    /// Its node.name
    name: String,
    /// Its listener for other nodes
    #[arg(long, value_name = "HOST:PORT")]
    addr: String,
    /// Its HTTP listener; default: what it says itself
    #[arg(long, value_name = "HOST:PORT")]
    http: Option<String>,
    /// It receives the log and answers, and never votes
    #[arg(long)]
    learner: bool,
    #[command(flatten)]
    order: OrderArgs,
}

/// Arguments of `stemedb member remove`.
#[derive(Args, Debug, Clone)]
pub struct RemoveArgs {
    /// Its name
    name: String,
    /// Also when no further failure could be tolerated afterwards
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    order: OrderArgs,
}

/// Arguments of `stemedb member replace`.
#[derive(Args, Debug, Clone)]
pub struct ReplaceArgs {
    /// Name of the node that leaves
    old: String,
    /// Name of the node that comes
    new: String,
    /// Its listener for other nodes
    #[arg(long, value_name = "HOST:PORT")]
    addr: String,
    /// Its HTTP listener; default: what it says itself
    #[arg(long, value_name = "HOST:PORT")]
    http: Option<String>,
    #[command(flatten)]
    order: OrderArgs,
}

/// Arguments of `stemedb member list`.
#[derive(Args, Debug, Clone)]
pub struct ListArgs {
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Plan {
    kind: String,
    node: String,
    replaces: Option<String>,
    learner: bool,
    allowed: bool,
    detail: String,
    leads: bool,
    outlook: serde_json::Value,
}

/// `GET /v1/admin/members`; unknown fields are ignored.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Members {
    leader: Option<String>,
    term: u64,
    voters: u64,
    needed: u64,
    members: Vec<Member>,
    change: Option<Job>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Member {
    name: String,
    id: Option<u64>,
    role: String,
    voter: bool,
    lag_entries: Option<u64>,
    lag_bytes: Option<u64>,
    peer_addr: String,
    http_addr: String,
    version: Option<String>,
}

/// Runs `stemedb member …`.
pub async fn run(command: &MemberCommand) -> Result<(), CliError> {
    match command {
        MemberCommand::Add(AddArgs { name, addr, http, learner, order }) => {
            let learner = learner.then_some(true);
            let body = serde_json::json!({"name": name, "addr": addr, "http": http, "learner": learner});
            carry_out(order, "", |query| Call::post(format!("/v1/admin/members?{query}"), body.to_string())).await
        }
        MemberCommand::Remove(RemoveArgs { name, force, order }) => {
            let force = if *force { "&force=true" } else { "" };
            let path = format!("/v1/admin/members/{}", encode_query(name));
            carry_out(order, force, |query| Call::delete(format!("{path}?{query}"))).await
        }
        MemberCommand::Replace(ReplaceArgs { old, new, addr, http, order }) => {
            let body = serde_json::json!({"name": new, "addr": addr, "http": http});
            let path = format!("/v1/admin/members/{}/replace", encode_query(old));
            carry_out(order, "", |query| Call::post(format!("{path}?{query}"), body.to_string())).await
        }
        MemberCommand::List(args) => {
            let (_, answer) = flow_client::ask(&args.endpoints.parse()?, "/v1/admin/members").await?;
            let members: Members = answer.json().map_err(CliError::Unreachable)?;
            if args.json { output::json(&members) } else { output::line(&text(&members)) }
        }
    }
}

async fn carry_out(args: &OrderArgs, more: &str, call: impl FnOnce(String) -> Call) -> Result<(), CliError> {
    let answer = match args.send(&call(format!("{}{more}", args.query()))).await? {
        Ordered::Job(job) => return flow_client::show(&job, args.json),
        Ordered::Plan(answer) => answer,
    };
    let plan: Plan = answer.json().map_err(CliError::Unreachable)?;
    if args.json {
        output::json(&plan)?;
    } else {
        let leads = if plan.leads { " It leads, so leadership would move first." } else { "" };
        output::line(&format!("{} {}: {}.{leads}", plan.kind, plan.node, plan.detail))?;
    }
    match plan.allowed {
        true => Ok(()),
        false => Err(CliError::Found("it would be refused".to_owned())),
    }
}

fn text(members: &Members) -> String {
    let mut table = output::table(["NODE", "VOTE", "ID", "ROLE", "LAG", "LAG BYTES", "PEERS", "HTTP", "VERSION"]);
    let dash = || "-".to_owned();
    let number = |number: Option<u64>| number.map_or_else(dash, output::thousands);
    for member in &members.members {
        table.add_row([
            member.name.clone(),
            if member.voter { "voter" } else { "learner" }.to_owned(),
            member.id.map_or_else(dash, |id| id.to_string()),
            member.role.clone(),
            number(member.lag_entries),
            number(member.lag_bytes),
            member.peer_addr.clone(),
            member.http_addr.clone(),
            member.version.clone().unwrap_or_else(dash),
        ]);
    }
    let leader = members.leader.as_deref().unwrap_or("none");
    let mut text = format!(
        "{table}\nleader: {leader}, term {}; of {} voters {} must work",
        members.term, members.voters, members.needed
    );
    if let Some(job) = &members.change {
        text.push_str(&format!("\n{}", change(job)));
    }
    text
}

/// A change of the members that goes on, in one line: what is done, how much is missing, how long that may take.
pub(super) fn change(job: &Job) -> String {
    let detail = if job.state == "waiting" { String::new() } else { format!(" ({})", job.detail) };
    format!("{} of {}: {}{detail}; job {}", job.kind, job.node, flow_client::progress(job), job.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_shows_learners_and_the_change_that_goes_on() {
        let member = |name: &str, voter| Member { name: name.into(), voter, id: Some(7), ..Member::default() };
        let change = Job {
            id: "5".into(),
            kind: "member-add".into(),
            node: "node-4".into(),
            step: "catching up".into(),
            bytes_done: 1_000,
            bytes_total: 2_000,
            entries_behind: Some(12_345),
            eta_s: Some(3),
            ..Job::default()
        };
        let members = Members {
            leader: Some("node-1".into()),
            voters: 1,
            needed: 1,
            members: vec![member("node-1", true), member("far", false)],
            change: Some(change),
            ..Members::default()
        };
        let shown = text(&members);
        for part in ["learner", "catching up", "1,000 of 2,000 bytes", "12,345 entries behind", "about 3 s", "job 5"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
    }
}
