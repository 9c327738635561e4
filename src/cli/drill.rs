//! `stemedb drill --kind kill`: kills leaders of a throw-away cluster under load, and judges.
//!
//! Each round kills the leader with SIGKILL while all clients work, waits until they are served again,
//! restarts the killed node and waits until it has caught up. Clients of the surviving nodes must not
//! see a single error; those of the dead node repeat their write with the same key elsewhere. At the
//! end every node is listed in full and compared with what the clients were told.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::dev::StopSignals;
use super::drill_load::{self, Load};
use super::drill_report::{DrillReport, Round, median_and_worst_ms, progress_line, text};
use super::http_client::{CALL_TIMEOUT, Call, Client};
use super::local_cluster::{LocalCluster, NodePlan, free_port, plan};
use super::status::{self, NodeHealth};
use super::{CliError, output};
use crate::judge::{self, History, ReadOutcome, WriteOutcome, longest_gap_touching, summarize_gaps};

/// How long all nodes may take to become ready, at the start and after each restart.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a new leader may take to serve before the drill calls it a failure.
const SERVE_TIMEOUT: Duration = Duration::from_secs(30);

/// Load before the kill and after the first answer of the new leader: the kill must meet a busy cluster.
const STEADY: Duration = Duration::from_millis(1000);

/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(5);

/// Writes sent once more at the end, beside those that were retried during the drill.
const REPEATED_SAMPLE: usize = 500;

/// Most of the retried ones sent once more: client keys are kept for 15 minutes, so only late ones count.
const REPEATED_MAX: usize = 5000;

/// Client keys are replicated state for 15 minutes; this stays clear of that.
const KEY_LIFE_US: u64 = 10 * 60 * 1_000_000;

/// Errors shown in full.
const ERROR_SAMPLES_MAX: usize = 10;

/// Arguments of `stemedb drill`.
#[derive(Args, Debug, Clone)]
pub struct DrillArgs {
    /// What to break
    #[arg(long, value_enum, default_value_t = DrillKind::Kill)]
    kind: DrillKind,
    /// How many times
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Clients, spread over all nodes
    #[arg(long, default_value_t = 64)]
    clients: u32,
    /// Bytes of each value
    #[arg(long, default_value_t = 128)]
    value: usize,
    /// Folder for the nodes; must be empty or absent, and is kept. Default: a temporary one, removed on success
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What to break. More kinds follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DrillKind {
    /// kill -9 of the leader
    Kill,
}

/// Runs the drill and prints the report. Exit code 1 when the judge found anything.
pub async fn run(args: &DrillArgs) -> Result<(), CliError> {
    let DrillKind::Kill = args.kind;
    if !(1..=10_000).contains(&args.rounds) || !(1..=3000).contains(&args.clients) {
        return Err(CliError::Usage("--rounds takes 1 to 10000, --clients 1 to 3000".to_owned()));
    }
    if !(16..=1 << 20).contains(&args.value) {
        return Err(CliError::Usage(format!("--value {}: 16 to {} bytes", args.value, 1 << 20)));
    }
    let mut stop = StopSignals::new()?;
    let folder = Folder::new(args.data.clone())?;
    let mut cluster = LocalCluster::prepare(plan(&folder.path, 3, free_port(3)?)?)?;
    let outcome = tokio::select! {
        outcome = drill(args, &mut cluster) => outcome,
        () = stop.wait() => Err(CliError::Local("interrupted".to_owned())),
    };
    let stopped = cluster.stop_all().await;
    folder.finish(outcome.as_ref().is_ok_and(|report| report.passed));
    let report = outcome?;
    for name in stopped? {
        output::notice(&format!("{name} did not stop in time and was killed"));
    }
    if args.json {
        output::json(&report)?;
    } else {
        output::line(&text(&report))?;
    }
    if report.passed {
        return Ok(());
    }
    Err(CliError::Found("the drill found what must not happen".to_owned()))
}

/// Where the nodes' data lies.
struct Folder {
    path: PathBuf,
    made_here: bool,
}

impl Folder {
    fn new(wanted: Option<PathBuf>) -> Result<Self, CliError> {
        let fail = |path: &PathBuf, error: std::io::Error| CliError::Local(format!("{}: {error}", path.display()));
        let Some(path) = wanted else {
            let name = format!("stemedb-drill-{:016x}", rand::random::<u64>());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).map_err(|error| fail(&path, error))?;
            return Ok(Self { path, made_here: true });
        };
        let path = std::path::absolute(&path).map_err(|error| fail(&path, error))?;
        std::fs::create_dir_all(&path).map_err(|error| fail(&path, error))?;
        let mut entries = std::fs::read_dir(&path).map_err(|error| fail(&path, error))?;
        if entries.next().is_some() {
            let text = format!("{} is not empty; a drill needs a folder of its own", path.display());
            return Err(CliError::Usage(text));
        }
        Ok(Self { path, made_here: false })
    }

    /// Removes a temporary folder after a success; everything else stays for whoever wants to look.
    fn finish(&self, passed: bool) {
        if !(self.made_here && passed) {
            output::notice(&format!("data and logs are in {}", self.path.display()));
        } else if let Err(error) = std::fs::remove_dir_all(&self.path) {
            output::notice(&format!("cannot remove {}: {error}", self.path.display()));
        }
    }
}

async fn drill(args: &DrillArgs, cluster: &mut LocalCluster) -> Result<DrillReport, CliError> {
    cluster.start_all()?;
    cluster.wait_ready(READY_TIMEOUT).await?;
    let endpoints = cluster.plan().iter().map(NodePlan::endpoint).collect::<Result<Vec<_>, _>>()?;
    let load = Load::new(endpoints, args.value, rand::random());
    let mut clients = JoinSet::new();
    for number in 0..args.clients {
        clients.spawn(drill_load::client(Arc::clone(&load), number));
    }
    let mut rounds = Vec::new();
    let mut downs = Vec::new();
    for round in 1..=args.rounds {
        let done = kill_round(cluster, &load, round, &mut downs).await?;
        output::notice(&progress_line(&done, args.rounds));
        rounds.push(done);
    }
    load.stop();
    while let Some(client) = clients.join_next().await {
        client.map_err(|error| CliError::Local(format!("a client failed: {error}")))?.map_err(CliError::Local)?;
    }
    judge_run(args, &load, rounds, &downs).await
}

/// A time in which a node was dead or not yet back: errors of its own clients are expected then.
struct Down {
    node: u16,
    from_us: u64,
    to_us: u64,
}

async fn kill_round(
    cluster: &mut LocalCluster,
    load: &Load,
    round: usize,
    downs: &mut Vec<Down>,
) -> Result<Round, CliError> {
    let round_start_us = load.recorder.now_us();
    let moved_before = load.moved.load(std::sync::atomic::Ordering::Relaxed);
    // A drill, not a test: the kill shall meet a cluster that has been busy for a while.
    sleep(STEADY).await;
    let (leader, before) = find_leader(load, None).await?;
    let killed_us = load.recorder.now_us();
    cluster.kill(leader).await?;
    load.set_up(leader, false);
    // Acknowledgements that were under way at the kill come first; a hundred later ones are the new leader's.
    let acknowledged = load.recorder.acknowledged();
    wait_until("no write was acknowledged after the kill", || load.recorder.acknowledged() >= acknowledged + 100)
        .await?;
    let (new_leader, after) = find_leader(load, Some(before.term)).await?;
    sleep(STEADY).await;
    let restarted = Instant::now();
    let restarted_us = load.recorder.now_us();
    cluster.start(leader)?;
    cluster.wait_ready(READY_TIMEOUT).await?;
    let rejoin_ms = u64::try_from(restarted.elapsed().as_millis()).unwrap_or(u64::MAX);
    let readable_nodes = check_readable(load).await?;
    load.set_up(leader, true);
    let end_us = load.recorder.now_us();
    let down = Down { node: u16::try_from(leader).unwrap_or(u16::MAX), from_us: killed_us, to_us: end_us };
    let history = load.recorder.history_since(round_start_us);
    let acknowledged_us = history.acknowledged_us();
    let errors = survivor_errors(&history, std::slice::from_ref(&down)).0;
    downs.push(down);
    let name = |node: usize| {
        let plan = cluster.plan().get(node);
        plan.map_or_else(|| format!("node {node}"), |plan| plan.name.clone())
    };
    Ok(Round {
        round,
        killed: name(leader),
        new_leader: name(new_leader),
        term: after.term,
        gap_us: longest_gap_touching(&acknowledged_us, killed_us, restarted_us).length_us(),
        rejoin_gap_us: longest_gap_touching(&acknowledged_us, restarted_us, end_us).length_us(),
        survivor_errors: errors,
        retried: load.moved.load(std::sync::atomic::Ordering::Relaxed) - moved_before,
        acknowledged: acknowledged_us.len() as u64,
        rejoin_ms,
        readable_nodes,
    })
}

/// The node that says it leads, in a term above `above_term`, and that a second look confirms.
async fn find_leader(load: &Load, above_term: Option<u64>) -> Result<(usize, NodeHealth), CliError> {
    let deadline = Instant::now() + SERVE_TIMEOUT;
    loop {
        let mut best: Option<(usize, NodeHealth)> = None;
        for (node, endpoint) in load.endpoints.iter().enumerate() {
            let mut client = Client::new(endpoint.clone());
            let Ok(health) = status::health(&mut client, Duration::from_secs(1)).await else {
                continue;
            };
            let new_enough = above_term.is_none_or(|term| health.term > term);
            let better = best.as_ref().is_none_or(|(_, known)| health.term > known.term);
            if health.role == "leader" && new_enough && better {
                best = Some((node, health));
            }
        }
        if let Some(found) = best {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            let seconds = SERVE_TIMEOUT.as_secs();
            return Err(CliError::Found(format!("no leader within {seconds} s")));
        }
        sleep(POLL).await;
    }
}

async fn wait_until(failure: &str, mut condition: impl FnMut() -> bool) -> Result<(), CliError> {
    let deadline = Instant::now() + SERVE_TIMEOUT;
    while !condition() {
        if Instant::now() >= deadline {
            let seconds = SERVE_TIMEOUT.as_secs();
            return Err(CliError::Found(format!("{failure} within {seconds} s")));
        }
        sleep(POLL).await;
    }
    Ok(())
}

/// Every node must answer a linearizable read.
async fn check_readable(load: &Load) -> Result<usize, CliError> {
    for endpoint in &load.endpoints {
        let mut client = Client::new(endpoint.clone());
        let path = format!("/v1/query?concept_path=drill/{}/key-0", load.run);
        let answer = client.call(&Call::get(path), CALL_TIMEOUT).await;
        let why = match answer {
            Ok(answer) if answer.is_success() => continue,
            Ok(answer) => answer.describe(),
            Err(error) => error.to_string(),
        };
        return Err(CliError::Found(format!(
            "{} does not answer a linearizable read after the restart: {why}",
            endpoint.authority()
        )));
    }
    Ok(load.endpoints.len())
}

/// Attempts on nodes that were alive and did not end in success, and the first of them in words.
fn survivor_errors(history: &History, downs: &[Down]) -> (u64, Vec<String>) {
    // An attempt on a node that was down at some time of the attempt belongs to the dead node's clients.
    let excused = |node: u16, start_us: u64, end_us: u64| {
        let overlaps = |down: &&Down| down.node == node && start_us <= down.to_us && end_us >= down.from_us;
        downs.iter().find(overlaps).is_some()
    };
    let mut count = 0;
    let mut samples = Vec::new();
    let mut add = |what: String| {
        count += 1;
        if samples.len() < ERROR_SAMPLES_MAX {
            samples.push(what);
        }
    };
    for write in &history.writes {
        let is_error = !matches!(write.outcome, WriteOutcome::Acknowledged { .. });
        if is_error && !excused(write.node, write.start_us, write.end_us) {
            add(format!("write on a living node: {write:?}"));
        }
    }
    for read in &history.reads {
        let is_error = matches!(read.outcome, ReadOutcome::Failed { .. });
        if is_error && !excused(read.node, read.start_us, read.end_us) {
            add(format!("read on a living node: {read:?}"));
        }
    }
    (count, samples)
}

async fn judge_run(args: &DrillArgs, load: &Load, rounds: Vec<Round>, downs: &[Down]) -> Result<DrillReport, CliError> {
    let under_load = load.recorder.history();
    let (errors, error_samples) = survivor_errors(&under_load, downs);
    let gaps = summarize_gaps(&under_load.acknowledged_us());
    let repeat = values_to_repeat(&under_load, load.recorder.now_us());
    let not_replayed = drill_load::repeat_writes(load, &repeat).await.map_err(CliError::Local)?;
    let mut listings = Vec::new();
    for node in 0..load.endpoints.len() {
        listings.push(drill_load::list_node(load, node).await.map_err(CliError::Found)?);
    }
    let history = load.recorder.history();
    let verdict = tokio::task::spawn_blocking(move || judge::check(&history, &listings))
        .await
        .map_err(|error| CliError::Local(format!("the judge failed: {error}")))?;
    let (gap_median_ms, gap_worst_ms) = median_and_worst_ms(&rounds);
    Ok(DrillReport {
        kind: "kill",
        passed: verdict.is_clean() && errors == 0 && not_replayed == 0,
        clients: usize::try_from(args.clients).unwrap_or(usize::MAX),
        nodes: load.endpoints.len(),
        rounds,
        gap_median_ms,
        gap_worst_ms,
        gaps,
        survivor_errors: errors,
        not_replayed,
        repeated: repeat.len() as u64,
        error_samples,
        verdict,
    })
}

/// All writes that took more than one attempt, and some of the others, with the node that acknowledged them.
/// Only recent ones: keys live for 15 minutes.
fn values_to_repeat(history: &History, now_us: u64) -> Vec<(u64, u16)> {
    let mut attempts: HashMap<u64, u32> = HashMap::new();
    for write in &history.writes {
        *attempts.entry(write.value).or_insert(0) += 1;
    }
    let recent = history.writes.iter().rev().filter(|write| {
        let acknowledged = matches!(write.outcome, WriteOutcome::Acknowledged { .. });
        acknowledged && write.end_us + KEY_LIFE_US > now_us
    });
    let (mut retried, mut plain) = (Vec::new(), Vec::new());
    for write in recent {
        let place = if attempts.get(&write.value).is_some_and(|count| *count > 1) { &mut retried } else { &mut plain };
        place.push((write.value, write.node));
    }
    retried.truncate(REPEATED_MAX);
    let step = (plain.len() / REPEATED_SAMPLE).max(1);
    retried.extend(plain.into_iter().step_by(step).take(REPEATED_SAMPLE));
    retried
}
