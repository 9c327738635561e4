//! `stemedb drill`: breaks a throw-away cluster under load, and judges.
//!
//! `kill`: each round kills the leader with SIGKILL while all clients work, waits until they are served
//! again, restarts the killed node and waits until it has caught up. Clients of the surviving nodes
//! must not see a single error; those of the dead node repeat their write with the same key elsewhere.
//! `fsync` and `stall` (`drill_disk`) break the leader's disk instead, on file systems of their own.
//! At the end every node is listed in full and compared with what the clients were told.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::dev::StopSignals;
use super::drill_disk::{self, Disks};
use super::drill_load::{self, Load};
use super::drill_open::{self, Offered};
use super::drill_report::{DrillReport, RoundReport, progress_line, text};
use super::drill_watch::{Down, survivor_errors};
use super::local_cluster::{LocalCluster, NodePlan, free_port, plan};
use super::{CliError, drill_disk_report, drill_kill, output};
use crate::judge::{self, History, WriteOutcome, summarize_gaps};

/// How long all nodes may take to become ready, at the start and after each restart.
pub const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Load before the fault and after the first answer of the new leader: the fault must meet a busy cluster.
pub const STEADY: Duration = Duration::from_millis(1000);

/// How long the most that the cluster takes is measured, for `--rate-fraction`.
const MEASURED: Duration = Duration::from_secs(4);

/// Writes sent once more at the end, beside those that were retried during the drill.
const REPEATED_SAMPLE: usize = 500;

/// Most of the retried ones sent once more: client keys are kept for 15 minutes, so only late ones count.
const REPEATED_MAX: usize = 5000;

/// Client keys are replicated state for 15 minutes; this stays clear of that.
const KEY_LIFE_US: u64 = 10 * 60 * 1_000_000;

/// Arguments of `stemedb drill`.
#[derive(Args, Debug, Clone)]
pub struct DrillArgs {
    /// What to break; fsync and stall need root and the helper program stemedb-faulty-disk
    #[arg(long, value_enum, default_value_t = DrillKind::Kill)]
    kind: DrillKind,
    /// How many times
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Clients, spread over all nodes
    #[arg(long, default_value_t = 64)]
    clients: u32,
    /// Offer this share of the most that the clients got done before the first round, whatever the answers take, in
    /// place of one request at a time per client
    #[arg(long, value_name = "SHARE")]
    rate_fraction: Option<f64>,
    /// Bytes of each value
    #[arg(long, default_value_t = 128)]
    value: usize,
    /// Folder for the nodes; must be empty or absent, and is kept. Default: a temporary one, removed on success
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// fsync, stall: the helper program. Default: stemedb-faulty-disk beside this program
    #[arg(long, value_name = "PATH")]
    faulty_disk: Option<PathBuf>,
    /// fsync, stall: size of each node's disk in MiB; takes what is written
    #[arg(long, default_value_t = 2048)]
    disk_mb: u64,
    /// fsync: restart the node by hand when the fault is lifted, instead of waiting until it has rebuilt itself
    #[arg(long)]
    no_rebuild_wait: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DrillKind {
    /// kill -9 of the leader
    Kill,
    /// Writes of the leader's log to its disk fail, so that its fsync does
    Fsync,
    /// The leader's disk hangs for ever
    Stall,
}

/// Runs the drill and prints the report. Exit code 1 when the judge found anything.
pub async fn run(args: &DrillArgs) -> Result<(), CliError> {
    if !(1..=10_000).contains(&args.rounds) || !(1..=3000).contains(&args.clients) {
        return Err(CliError::Usage("--rounds takes 1 to 10000, --clients 1 to 3000".to_owned()));
    }
    if !(16..=1 << 20).contains(&args.value) {
        return Err(CliError::Usage(format!("--value {}: 16 to {} bytes", args.value, 1 << 20)));
    }
    if args.rate_fraction.is_some_and(|share| !(0.01..=1.0).contains(&share)) {
        return Err(CliError::Usage("--rate-fraction takes 0.01 to 1".to_owned()));
    }
    if !(256..=1 << 20).contains(&args.disk_mb) {
        return Err(CliError::Usage("--disk-mb takes 256 to 1048576".to_owned()));
    }
    let needs_disks = args.kind != DrillKind::Kill;
    let program = needs_disks.then(|| super::faulty_disk::find_program(args.faulty_disk.as_deref())).transpose()?;
    let mut stop = StopSignals::new()?;
    let folder = Folder::new(args.data.clone())?;
    let mut nodes = plan(&folder.path, 3, free_port(3)?)?;
    let disks = match program {
        Some(program) => Some(Disks::start(program, &folder.path, &mut nodes, args.disk_mb).await?),
        None => None,
    };
    let mut cluster = LocalCluster::prepare(nodes)?;
    // A drill is many days of bad luck in one hour; elsewhere an operator looks at a disk that fails three times a day.
    cluster.set_env("STEMEDB_REBUILD_AUTOMATIC_PER_DAY", "1000");
    let outcome = tokio::select! {
        outcome = drill(args, &mut cluster, disks.as_ref()) => outcome,
        () = stop.wait() => Err(CliError::Local("interrupted".to_owned())),
    };
    if let Some(disks) = &disks {
        disks.heal();
    }
    let stopped = cluster.stop_all().await;
    // Waits until nothing is mounted any more.
    drop(disks);
    folder.finish(outcome.as_ref().is_ok_and(|(_, passed)| *passed));
    let (report, passed) = outcome?;
    for name in stopped? {
        output::notice(&format!("{name} did not stop in time and was killed"));
    }
    output::line(&report)?;
    if passed {
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

/// All rounds and the judge; the report as it is to be printed, and whether it is clean.
async fn drill(
    args: &DrillArgs,
    cluster: &mut LocalCluster,
    disks: Option<&Disks>,
) -> Result<(String, bool), CliError> {
    cluster.start_all()?;
    cluster.wait_ready(READY_TIMEOUT).await?;
    let endpoints = cluster.plan().iter().map(NodePlan::endpoint).collect::<Result<Vec<_>, _>>()?;
    let measured_per_s = match args.rate_fraction {
        Some(_) => Some(measure(args, Load::new(endpoints.clone(), args.value, rand::random())).await?),
        None => None,
    };
    let load = Load::new(endpoints, args.value, rand::random());
    let rate = args.rate_fraction.zip(measured_per_s).map(|(share, most)| share * most);
    let clients = Clients::start(args, &load, rate);
    let mut downs = Vec::new();
    let (report, passed) = match disks {
        None => {
            let mut rounds = Vec::new();
            for round in 1..=args.rounds {
                let done = drill_kill::kill_round(cluster, &load, round, &mut downs).await?;
                output::notice(&progress_line(&done, args.rounds));
                rounds.push(done);
            }
            let offered = clients.stop(&load).await?;
            let report = judge_run(args, "kill", &load, rounds, &downs, (measured_per_s, offered)).await?;
            (rendered(args, &report, text)?, report.passed)
        }
        Some(disks) => {
            let mut rounds = Vec::new();
            for round in 1..=args.rounds {
                let how = drill_disk::How { kind: args.kind, wait_for_rebuild: !args.no_rebuild_wait };
                let done = drill_disk::round(cluster, disks, &load, how, round, &mut downs).await?;
                output::notice(&drill_disk_report::progress_line(&done, args.rounds));
                rounds.push(done);
            }
            let offered = clients.stop(&load).await?;
            let kind = if args.kind == DrillKind::Stall { "stall" } else { "fsync" };
            let report = judge_run(args, kind, &load, rounds, &downs, (measured_per_s, offered)).await?;
            (rendered(args, &report, drill_disk_report::text)?, report.passed)
        }
    };
    Ok((report, passed))
}

fn rendered<R: Serialize>(
    args: &DrillArgs,
    report: &DrillReport<R>,
    text: impl Fn(&DrillReport<R>) -> String,
) -> Result<String, CliError> {
    if !args.json {
        return Ok(text(report));
    }
    serde_json::to_string(report).map_err(|error| CliError::Local(format!("cannot write the report: {error}")))
}

/// Whoever makes the load.
enum Clients {
    Closed(JoinSet<Result<(), String>>),
    Open(tokio::task::JoinHandle<Result<Offered, String>>),
}

impl Clients {
    /// `rate`: operations per second, whatever they take; `None`: one at a time for each client.
    fn start(args: &DrillArgs, load: &Arc<Load>, rate: Option<f64>) -> Self {
        if let Some(rate) = rate {
            return Self::Open(tokio::spawn(drill_open::offer(Arc::clone(load), rate)));
        }
        let mut clients = JoinSet::new();
        for number in 0..args.clients {
            clients.spawn(drill_load::client(Arc::clone(load), number));
        }
        Self::Closed(clients)
    }

    async fn stop(self, load: &Load) -> Result<Option<Offered>, CliError> {
        load.stop();
        let died = |error| CliError::Local(format!("a client failed: {error}"));
        match self {
            Self::Closed(mut clients) => {
                while let Some(client) = clients.join_next().await {
                    client.map_err(died)?.map_err(CliError::Local)?;
                }
                Ok(None)
            }
            Self::Open(offering) => Ok(Some(offering.await.map_err(died)?.map_err(CliError::Local)?)),
        }
    }
}

/// Operations per second that the clients get done, one at a time each, on the cluster as it is now.
async fn measure(args: &DrillArgs, load: Arc<Load>) -> Result<f64, CliError> {
    let clients = Clients::start(args, &load, None);
    sleep(STEADY).await;
    let (from_us, before) = (load.recorder.now_us(), load.operations.load(Ordering::Relaxed));
    sleep(MEASURED).await;
    let (to_us, after) = (load.recorder.now_us(), load.operations.load(Ordering::Relaxed));
    clients.stop(&load).await?;
    let per_s = (after - before) as f64 * 1e6 / to_us.saturating_sub(from_us).max(1) as f64;
    output::notice(&format!("the most that {} clients got done: {per_s:.0} operations/s", args.clients));
    Ok(per_s)
}

async fn judge_run<R: RoundReport>(
    args: &DrillArgs,
    kind: &'static str,
    load: &Load,
    rounds: Vec<R>,
    downs: &[Down],
    (measured_per_s, offered): (Option<f64>, Option<Offered>),
) -> Result<DrillReport<R>, CliError> {
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
    let (gap_median_ms, gap_worst_ms) = super::drill_report::median_and_worst_ms(&rounds);
    let rounds_clean = rounds.iter().all(|round| round.problem().is_none());
    Ok(DrillReport {
        kind,
        passed: verdict.is_clean() && errors == 0 && not_replayed == 0 && rounds_clean,
        measured_per_s,
        offered,
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
