//! `stemedb status`: what the cluster says about itself, and what each node says when asked.
//!
//! Every given endpoint is asked for its view of the cluster, and the newest one that names a leader is believed: a node that
//! is cut off, or has just started, knows less. Every member and every endpoint is then asked for its own `/v1/health`. Both
//! are shown and compared, because a node that the leader believes in and that answers nobody, or one that answers and that
//! the leader cannot reach, is exactly what one looks for here.

use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::flow_client::Job;
use super::http_client::{Client, Endpoint};
use super::{CliError, EndpointArgs, member, output};

/// Deadline of one question; a healthy node answers in milliseconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Arguments of `stemedb status`.
#[derive(Args, Debug, Clone)]
pub struct StatusArgs {
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Print it again every so many seconds, until Ctrl-C
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
}

/// A node's own word, `/v1/health`. Unknown fields are ignored, so that newer nodes can be asked.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeHealth {
    /// `ok` or what is wrong.
    pub status: String,
    /// The node's name.
    pub name: String,
    /// `leader`, `follower`, `candidate`, `learner` or `starting`.
    pub role: String,
    /// Raft term.
    pub term: u64,
    /// Name of the leader it follows.
    pub leader: Option<String>,
    /// Sequence number of the last fact applied.
    pub applied_index: u64,
    /// Its disk.
    pub disk: Disk,
    /// `none`, `wants`, `draining` or `drained`.
    pub drain: String,
    /// Why it is of no use to clients although it is well, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_off: Option<String>,
    /// Version of its program.
    pub version: String,
}

/// State of a node's disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    /// `ok` or `failed`.
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ClusterBody {
    leader: Option<String>,
    term: u64,
    feature_level: Option<u32>,
    feature_level_held_by: Vec<String>,
    members: Vec<MemberBody>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct MemberBody {
    name: String,
    id: Option<u64>,
    fsync_p99_ms: Option<u64>,
    role: String,
    voter: bool,
    disk: Option<Disk>,
    lag_entries: Option<u64>,
    lag_bytes: Option<u64>,
    #[serde(alias = "http")]
    http_addr: Option<String>,
}

/// One line of the answer.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    id: Option<u64>,
    fsync_p99_ms: Option<u64>,
    endpoint: Option<String>,
    member_role: Option<String>,
    lag_entries: Option<u64>,
    lag_bytes: Option<u64>,
    health: Option<NodeHealth>,
    error: Option<String>,
}

impl Line {
    fn says_that_it_leads(&self) -> bool {
        self.health.as_ref().is_some_and(|health| health.role == "leader")
    }

    /// How the word of a node that answers differs from what the cluster says, if it does.
    fn disagrees(&self, leader: &str, term: u64) -> Option<String> {
        let (name, health) = (&self.name, self.health.as_ref()?);
        if self.member_role.as_deref() == Some("unreachable") {
            return Some(format!("{name} answers here, and the other members do not reach it"));
        }
        if self.says_that_it_leads() && name != leader {
            let its = health.term;
            return Some(format!(
                "{name} says that it leads, in term {its}, and {leader} leads in term {term}: {name} is cut off, or this has just changed"
            ));
        }
        let other = health.leader.as_deref().filter(|followed| *followed != leader)?;
        Some(format!("{name} follows {other}, and {leader} leads: {name} is cut off, or this has just changed"))
    }
}

/// `/v1/admin/members`, as far as it says more than `/v1/admin/cluster`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct MembersBody {
    change: Option<Job>,
}

#[derive(Debug, Serialize)]
struct StatusReport {
    healthy: bool,
    leader: Option<String>,
    term: u64,
    feature_level: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    feature_level_held_by: Vec<String>,
    problems: Vec<String>,
    nodes: Vec<Line>,
    /// The change of the members that goes on, as the leader knows it.
    change: Option<Job>,
}

/// `/v1/health` of one node. A failed node answers it too, with its state.
pub async fn health(client: &mut Client, timeout: Duration) -> Result<NodeHealth, String> {
    client.get_json("/v1/health", timeout).await
}

/// Whether a node with this disk takes part in everything. A slow one does; only leadership is better elsewhere.
pub fn works(disk_state: &str) -> bool {
    matches!(disk_state, "ok" | "slow")
}

/// How many members vote and say that their disk is well, in the view of one node.
pub async fn healthy_voters(client: &mut Client, timeout: Duration) -> Result<usize, String> {
    let cluster: ClusterBody = client.get_json("/v1/admin/cluster", timeout).await?;
    let is_well = |member: &&MemberBody| member.voter && member.disk.as_ref().is_some_and(|disk| works(&disk.state));
    Ok(cluster.members.iter().filter(is_well).count())
}

/// Prints the status. Exit code 1 when something is wrong, 3 when no node answers.
pub async fn run(args: &StatusArgs) -> Result<(), CliError> {
    let endpoints = args.endpoints.parse()?;
    let Some(seconds) = args.watch else { return once(args, &endpoints).await };
    loop {
        match once(args, &endpoints).await {
            // What is wrong now may be well the next time: that is what one watches for.
            Err(error @ (CliError::Found(_) | CliError::Unreachable(_))) => {
                output::notice(&format!("stemedb: {error}"))
            }
            ended => ended?,
        }
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
}

async fn once(args: &StatusArgs, endpoints: &[Endpoint]) -> Result<(), CliError> {
    let report = gather(endpoints).await?;
    if args.json {
        output::json(&report)?;
    } else {
        output::line(&text(&report))?;
    }
    if report.healthy { Ok(()) } else { Err(CliError::Found(report.problems.join("; "))) }
}

async fn gather(endpoints: &[Endpoint]) -> Result<StatusReport, CliError> {
    let (cluster, change, cluster_error) = newest_view(endpoints).await;
    let mut asked: Vec<(Option<MemberBody>, Option<Endpoint>)> = Vec::new();
    for member in cluster.members.iter().cloned() {
        let endpoint = member.http_addr.as_deref().and_then(|at| Endpoint::parse(at).ok());
        asked.push((Some(member), endpoint));
    }
    for endpoint in endpoints {
        if !asked.iter().any(|(_, known)| known.as_ref() == Some(endpoint)) {
            asked.push((None, Some(endpoint.clone())));
        }
    }
    let lines = futures_util::future::join_all(asked.into_iter().map(ask)).await;
    let mut nodes: Vec<Line> = Vec::new();
    for line in lines {
        // A member without a known address and the endpoint that turns out to be it are one line.
        let same = nodes.iter_mut().find(|known| known.name == line.name && known.health.is_none());
        match same {
            Some(known) if line.member_role.is_none() && line.health.is_some() => {
                known.endpoint = line.endpoint;
                known.health = line.health;
                known.error = None;
            }
            _ => nodes.push(line),
        }
    }
    if nodes.iter().all(|line| line.health.is_none()) {
        let errors: Vec<String> = nodes.iter().filter_map(|line| line.error.clone()).collect();
        return Err(CliError::Unreachable(format!("no node answered: {}", errors.join("; "))));
    }
    let problems = problems(&cluster, cluster_error, &nodes);
    let ClusterBody { leader, term, feature_level, feature_level_held_by, .. } = cluster;
    let healthy = problems.is_empty();
    Ok(StatusReport { healthy, leader, term, feature_level, feature_level_held_by, problems, nodes, change })
}

/// The view of one endpoint.
struct View {
    endpoint: Endpoint,
    cluster: ClusterBody,
}

/// The newest view that names a leader, else the newest of one that knows the members; or why there is none.
async fn newest_view(endpoints: &[Endpoint]) -> (ClusterBody, Option<Job>, Option<String>) {
    let asked = endpoints.iter().map(|endpoint| async {
        let cluster = Client::new(endpoint.clone()).get_json("/v1/admin/cluster", CALL_TIMEOUT).await;
        cluster.map(|cluster| View { endpoint: endpoint.clone(), cluster })
    });
    let (mut views, mut errors) = (Vec::new(), Vec::new());
    for answer in futures_util::future::join_all(asked).await {
        match answer {
            Ok(view) => views.push(view),
            Err(error) => errors.push(error),
        }
    }
    let Some(View { endpoint, cluster }) = pick(views) else {
        return (ClusterBody::default(), None, Some(errors.join("; ")));
    };
    // A node whose state is not open knows of none; the status says so in its own line.
    let members = Client::new(endpoint).get_json::<MembersBody>("/v1/admin/members", CALL_TIMEOUT).await;
    (cluster, members.unwrap_or_default().change, None)
}

/// The view to believe, the first of equals. Pure.
fn pick(views: Vec<View>) -> Option<View> {
    let worth = |view: &View| {
        let ClusterBody { leader, term, members, .. } = &view.cluster;
        (!members.is_empty(), leader.is_some(), *term)
    };
    views.into_iter().rev().max_by_key(worth)
}

async fn ask((member, endpoint): (Option<MemberBody>, Option<Endpoint>)) -> Line {
    let answer = match &endpoint {
        Some(endpoint) => health(&mut Client::new(endpoint.clone()), CALL_TIMEOUT).await,
        None => Err("its HTTP address is not known".to_owned()),
    };
    let (health, error) = match answer {
        Ok(health) => (Some(health), None),
        Err(error) => (None, Some(error)),
    };
    let name = member.as_ref().map(|member| member.name.clone());
    let name = name.or_else(|| health.as_ref().map(|health| health.name.clone()));
    let address = endpoint.map(|endpoint| endpoint.authority().to_owned());
    Line {
        name: name.or_else(|| address.clone()).unwrap_or_default(),
        endpoint: address,
        id: member.as_ref().and_then(|member| member.id),
        fsync_p99_ms: member.as_ref().and_then(|member| member.fsync_p99_ms),
        lag_entries: member.as_ref().and_then(|member| member.lag_entries),
        lag_bytes: member.as_ref().and_then(|member| member.lag_bytes),
        member_role: member.map(|member| member.role),
        health,
        error,
    }
}

fn problems(cluster: &ClusterBody, cluster_error: Option<String>, nodes: &[Line]) -> Vec<String> {
    let mut problems = Vec::new();
    match (cluster_error, &cluster.leader) {
        (Some(error), _) => problems.push(format!("the list of members is not available: {error}")),
        (None, None) => problems.push("there is no leader, so that writes wait".to_owned()),
        (None, Some(leader)) => {
            // A node that has lost the others goes on naming the last leader it heard of.
            let is_known = nodes.iter().any(|line| line.name == *leader);
            if is_known && !nodes.iter().any(|line| line.says_that_it_leads()) {
                problems.push(format!("{leader} was the last leader, and no node that answers leads now"));
            }
            problems.extend(nodes.iter().filter_map(|line| line.disagrees(leader, cluster.term)));
        }
    }
    let voters = cluster.members.iter().filter(|member| member.voter).count();
    let answering = |member: &&MemberBody| {
        member.voter && nodes.iter().any(|line| line.name == member.name && line.health.is_some())
    };
    let answering = cluster.members.iter().filter(answering).count();
    if answering * 2 <= voters && voters > 0 {
        problems
            .push(format!("only {answering} of {voters} voters answer: no majority, so that nothing can be written"));
    }
    for line in nodes {
        match &line.health {
            None => {
                let error = line.error.as_deref().unwrap_or("no answer");
                problems.push(format!("{} does not answer ({error})", line.name));
            }
            Some(health) if ["failed", "full"].contains(&&*health.disk.state) => {
                let reason = health.disk.reason.as_deref().unwrap_or("no reason given");
                let what = if health.disk.state == "full" { "is full" } else { "failed" };
                problems.push(format!("the disk of {} {what} ({reason})", line.name));
            }
            Some(NodeHealth { cut_off: Some(why), .. }) => problems.push(format!("{} is cut off: {why}", line.name)),
            // Somebody has asked for that.
            Some(health) if ["draining", "drained", "joining"].contains(&health.status.as_str()) => {}
            Some(health) if health.status != "ok" => {
                problems.push(format!("{} says {:?}", line.name, health.status));
            }
            Some(_) => {}
        }
    }
    problems
}

fn text(report: &StatusReport) -> String {
    let mut table = output::table([
        "NODE",
        "ROLE",
        "ID",
        "TERM",
        "APPLIED",
        "LAG",
        "LAG BYTES",
        "FSYNC P99",
        "DISK",
        "DRAIN",
        "VERSION",
        "HTTP",
        "STATUS",
    ]);
    let dash = || "-".to_owned();
    let number = |number: Option<u64>| number.map_or_else(dash, output::thousands);
    for line in &report.nodes {
        let health = line.health.as_ref();
        let role = health.map(|health| health.role.clone()).or_else(|| line.member_role.clone());
        table.add_row([
            line.name.clone(),
            role.unwrap_or_else(dash),
            line.id.map_or_else(dash, |id| id.to_string()),
            health.map_or_else(dash, |health| health.term.to_string()),
            health.map_or_else(dash, |health| health.applied_index.to_string()),
            number(line.lag_entries),
            number(line.lag_bytes),
            line.fsync_p99_ms.map_or_else(dash, |ms| format!("{ms} ms")),
            health.map_or_else(dash, |health| health.disk.state.clone()),
            health.map(|health| health.drain.clone()).filter(|drain| !drain.is_empty()).unwrap_or_else(dash),
            health.map_or_else(dash, |health| health.version.clone()),
            line.endpoint.clone().unwrap_or_else(dash),
            health.map_or_else(|| "no answer".to_owned(), |health| health.status.clone()),
        ]);
    }
    let leader = report.leader.as_deref().unwrap_or("none");
    let mut text = format!("{table}\nleader: {leader}, term {}", report.term);
    // Worth a word while it is held only: otherwise it is what the programs know.
    if let (Some(level), held @ [_, ..]) = (report.feature_level, &*report.feature_level_held_by) {
        text.push_str(&format!("\nfeature level {level}: {}", held.join("; ")));
    }
    // Also of a node that is no member yet and has no line above.
    if let Some(job) = &report.change {
        text.push_str(&format!("\n{}", member::change(job)));
    }
    text
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
