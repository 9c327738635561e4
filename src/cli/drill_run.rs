//! One drill of one kind: the cluster, the load, the rounds, the judge, and the report in all its forms.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::value::RawValue;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::balancer::Balancer;
use super::dev::StopSignals;
use super::drill::{DrillArgs, DrillKind};
use super::drill_disk::{self, Disks};
use super::drill_drain::{self, Names};
use super::drill_load::{self, Load};
use super::drill_open::{self, Offered};
use super::drill_partition::{self, Relays};
use super::drill_report::{DrillReport, RoundReport, judged, median_and_worst_ms, text, too_long};
use super::drill_watch::{Down, survivor_errors};
use super::http_client::Endpoint;
use super::local_cluster::{LocalCluster, NODES_MAX, NodePlan, free_port, plan};
use super::{CliError, drill_html, drill_kill, output};
use crate::judge::{self, FindingKind, History, WriteOutcome, summarize_gaps};

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

/// What a drill came to.
pub struct Done {
    /// Whether nothing was found.
    pub passed: bool,
    /// The report for programs.
    pub json: Box<RawValue>,
    /// The report for people.
    pub text: String,
    /// Its part of a page, see `drill_html`.
    pub html: String,
}

impl Done {
    /// Of a drill that could not be carried out: that is what its report says.
    pub fn failed(kind: &'static str, error: &CliError) -> Result<Self, CliError> {
        #[derive(serde::Serialize)]
        struct Failed<'a> {
            kind: &'a str,
            passed: bool,
            error: &'a str,
        }
        let why = error.to_string();
        let json = serde_json::value::to_raw_value(&Failed { kind, passed: false, error: &why });
        let json = json.map_err(|error| CliError::Local(format!("cannot write the report: {error}")))?;
        let html = drill_html::failed(kind, &why);
        let text = format!("{kind} could not be carried out: {why}\nFAILED");
        Ok(Self { passed: false, json, text, html })
    }
}

/// What is said of a drill that was ended from outside.
pub fn interrupted() -> CliError {
    CliError::Local("interrupted".to_owned())
}

/// What a drill may use.
struct Ground<'a> {
    /// The throw-away cluster; `None`: an existing one.
    cluster: Option<&'a mut LocalCluster>,
    disks: Option<&'a Disks>,
    relays: Option<&'a Relays>,
    endpoints: Vec<Endpoint>,
    /// The balancer that clients use, and what it is called.
    balancer: Option<(Endpoint, String)>,
}

/// Runs one kind. An error means that it could not even be begun, not that it found anything. A signal ends it: what it
/// drained of an existing cluster is put back, and there is a report; a second one ends that too.
pub async fn run(args: &DrillArgs, stop: &mut StopSignals) -> Result<Done, CliError> {
    if let Some(existing) = args.existing()? {
        let balancer = existing.through.map(|endpoint| (endpoint.clone(), endpoint.authority().to_owned()));
        let ground = Ground { cluster: None, disks: None, relays: None, endpoints: existing.nodes, balancer };
        return drill(args, ground, stop).await;
    }
    let program = match args.kind.breaks_disks() {
        true => Some(super::faulty_disk::find_program(args.faulty_disk.as_deref())?),
        false => None,
    };
    let balancer = args.behind.kind().map(|kind| Ok((kind, kind.find(args.balancer.as_deref())?))).transpose()?;
    let folder = Folder::new(args.data.clone())?;
    let port = free_port(3)?;
    let mut nodes = plan(&folder.path, 3, port)?;
    let disks = match program {
        Some(program) => Some(Disks::start(program, &folder.path, &mut nodes, args.disk_mb).await?),
        None => None,
    };
    let mut cluster = LocalCluster::prepare(nodes)?;
    // A drill is many days of bad luck in one hour; elsewhere an operator looks at a disk that fails three times a day.
    cluster.set_env("STEMEDB_REBUILD_AUTOMATIC_PER_DAY", "1000");
    if balancer.is_some() {
        // The default; a cluster for trying things has nobody who must notice.
        cluster.set_env("STEMEDB_CLUSTER_DRAIN_NOTICE_MS", "2000");
    }
    let relays = match args.kind {
        DrillKind::Partition => Some(Relays::start(&mut cluster).await?),
        _ => None,
    };
    let broken = (disks.as_ref(), relays.as_ref());
    let outcome = on_local(args, &mut cluster, broken, balancer, (&folder, port), stop).await;
    if let Some(disks) = &disks {
        disks.heal();
    }
    let stopped = cluster.stop_all().await;
    // Waits until nothing is mounted any more.
    drop((disks, relays));
    folder.finish(outcome.as_ref().is_ok_and(|done| done.passed));
    let done = outcome?;
    for name in stopped? {
        output::notice(&format!("{name} did not stop in time and was killed"));
    }
    Ok(done)
}

/// Starts the nodes and the balancer, drills, and ends the balancer.
async fn on_local(
    args: &DrillArgs,
    cluster: &mut LocalCluster,
    (disks, relays): (Option<&Disks>, Option<&Relays>),
    balancer: Option<(super::balancer::Kind, PathBuf)>,
    (folder, port): (&Folder, u16),
    stop: &mut StopSignals,
) -> Result<Done, CliError> {
    cluster.start_all()?;
    tokio::select! {
        ready = cluster.wait_ready(READY_TIMEOUT) => ready?,
        () = stop.wait() => return Err(interrupted()),
    }
    let endpoints = cluster.plan().iter().map(NodePlan::endpoint).collect::<Result<Vec<_>, _>>()?;
    let running = match balancer {
        Some((kind, program)) => {
            // The last of the ports of this block that nodes could have; three do not.
            let listen = port + NODES_MAX as u16 - 1;
            let nodes = [port, port + 1, port + 2];
            let at = folder.path.join("balancer");
            Some(tokio::select! {
                started = Balancer::start(kind, &program, &at, listen, nodes) => started?,
                () = stop.wait() => return Err(interrupted()),
            })
        }
        None => None,
    };
    let balancer = running.as_ref().map(|each| (each.endpoint().clone(), each.kind().name().to_owned()));
    let done = drill(args, Ground { cluster: Some(cluster), disks, relays, endpoints, balancer }, stop).await;
    if let Some(running) = running {
        running.stop().await?;
    }
    done
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

/// All rounds and the judge.
async fn drill(args: &DrillArgs, mut ground: Ground<'_>, stop: &mut StopSignals) -> Result<Done, CliError> {
    let balancer = ground.balancer.as_ref().map(|(endpoint, _)| endpoint.clone());
    let new_load = || Load::through(balancer.clone(), ground.endpoints.clone(), args.value, rand::random());
    let before = async {
        let names = match &ground.cluster {
            Some(cluster) => Names::of_plan(cluster.plan()),
            None => Names::ask(&ground.endpoints).await?,
        };
        let measured_per_s = match args.rate_fraction {
            Some(_) => Some(measure(args, new_load()).await?),
            None => None,
        };
        Ok::<_, CliError>((names, measured_per_s))
    };
    let (names, measured_per_s) = tokio::select! {
        before = before => before?,
        () = stop.wait() => return Err(interrupted()),
    };
    let load = new_load();
    let rate = args.rate_fraction.zip(measured_per_s).map(|(share, most)| share * most).or(args.rate());
    if let Some(notice) = args.notice(rate, &load.run) {
        output::notice(&notice);
    }
    let clients = Clients::start(args, &load, rate);
    let mut play = Play::new(args, &load, &names);
    let under = Under { measured_per_s, behind: ground.balancer.as_ref().map(|(_, name)| name.clone()) };
    let no_cluster = || CliError::Usage(format!("--kind {} needs a throw-away cluster", args.kind.word()));
    match args.kind {
        DrillKind::Drain => {
            let cluster = &mut ground.cluster;
            let drain = async |play: &mut Play<'_>, round, done: &mut Vec<_>| {
                let memory = drill_drain::Memory { downs: &mut play.downs, drained: &mut play.drained };
                drill_drain::rolling(cluster.as_deref_mut(), play.names, play.load, round, memory, done).await
            };
            let rounds = play.rounds(stop, drain).await;
            play.end(rounds, clients, under, stop).await
        }
        DrillKind::Failover => {
            let failover = async |play: &mut Play<'_>, round, done: &mut Vec<_>| {
                done.push(drill_drain::failover(play.names, play.load, round).await?);
                Ok(())
            };
            let rounds = play.rounds(stop, failover).await;
            play.end(rounds, clients, under, stop).await
        }
        DrillKind::Kill => {
            let cluster = ground.cluster.ok_or_else(no_cluster)?;
            let kill = async |play: &mut Play<'_>, round, done: &mut Vec<_>| {
                done.push(drill_kill::kill_round(cluster, play.load, round, &mut play.downs).await?);
                Ok(())
            };
            let rounds = play.rounds(stop, kill).await;
            play.end(rounds, clients, under, stop).await
        }
        DrillKind::Partition => {
            let (cluster, relays) = ground.cluster.zip(ground.relays).ok_or_else(no_cluster)?;
            let partition = async |play: &mut Play<'_>, round, done: &mut Vec<_>| {
                done.push(drill_partition::round(cluster, relays, play.load, round, &mut play.downs).await?);
                Ok(())
            };
            let rounds = play.rounds(stop, partition).await;
            relays.heal();
            play.end(rounds, clients, under, stop).await
        }
        DrillKind::Fsync | DrillKind::Stall | DrillKind::All => {
            let (cluster, disks) = ground.cluster.zip(ground.disks).ok_or_else(no_cluster)?;
            let how = drill_disk::How { kind: args.kind, wait_for_rebuild: !args.no_rebuild_wait };
            let fail = async |play: &mut Play<'_>, round, done: &mut Vec<_>| {
                done.push(drill_disk::round(cluster, disks, play.load, how, round, &mut play.downs).await?);
                Ok(())
            };
            let rounds = play.rounds(stop, fail).await;
            if !play.broken.is_empty() {
                disks.heal();
            }
            play.end(rounds, clients, under, stop).await
        }
    }
}

/// A drill while its rounds go on.
struct Play<'a> {
    args: &'a DrillArgs,
    load: &'a Arc<Load>,
    names: &'a Names,
    downs: Vec<Down>,
    /// Nodes of an existing cluster that were drained and are not back.
    drained: Vec<usize>,
    /// What kept it from its end, or the judge from a node.
    broken: Vec<String>,
}

impl<'a> Play<'a> {
    fn new(args: &'a DrillArgs, load: &'a Arc<Load>, names: &'a Names) -> Self {
        let (downs, drained, broken) = (Vec::new(), Vec::new(), Vec::new());
        Self { args, load, names, downs, drained, broken }
    }

    /// Plays every round, or up to the one that fails or in which it is stopped, and says how each ended.
    async fn rounds<R: RoundReport>(
        &mut self,
        stop: &mut StopSignals,
        mut play: impl AsyncFnMut(&mut Self, usize, &mut Vec<R>) -> Result<(), CliError>,
    ) -> Vec<R> {
        let mut all = Vec::new();
        let count = self.args.rounds();
        for round in 1..=count {
            let before = all.len();
            let stopped = tokio::select! {
                played = play(self, round, &mut all) => played.err(),
                () = stop.wait() => Some(interrupted()),
            };
            for done in all.iter().skip(before) {
                output::notice(&format!("round {round:>2}/{count}: {}", done.progress()));
            }
            if let Some(error) = stopped {
                let what = format!("round {round} of {count} did not end: {error}");
                output::notice(&what);
                self.broken.push(what);
                break;
            }
        }
        all
    }

    /// Puts back what is still drained, ends the clients, asks the judge, and makes the report: whatever has happened.
    async fn end<R: RoundReport + Send + 'static>(
        mut self,
        rounds: Vec<R>,
        clients: Clients,
        under: Under,
        stop: &mut StopSignals,
    ) -> Result<Done, CliError> {
        self.put_back(stop).await;
        tokio::select! {
            done = finish(self, rounds, clients, under) => done,
            () = stop.wait() => Err(interrupted()),
        }
    }

    /// Undrains what this drill has drained and not put back.
    async fn put_back(&mut self, stop: &mut StopSignals) {
        for node in std::mem::take(&mut self.drained) {
            let name = self.names.of(node);
            output::notice(&format!("putting {name} back into traffic"));
            let tried = tokio::select! {
                tried = drill_drain::undrain(self.names, self.load, node) => tried,
                () = stop.wait() => Err(interrupted()),
            };
            let Err(error) = tried else { continue };
            let endpoints: Vec<&str> = self.load.endpoints.iter().map(Endpoint::authority).collect();
            let endpoints = endpoints.join(",");
            let what = format!(
                "{name} may still be drained ({error}). Put it back with: stemedb undrain {name} --endpoints {endpoints}"
            );
            output::notice(&what);
            self.broken.push(what);
        }
    }
}

/// What the report has from before the first round.
struct Under {
    measured_per_s: Option<f64>,
    behind: Option<String>,
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
        for number in 0..args.clients() {
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
    output::notice(&format!("the most that {} clients got done: {per_s:.0} operations/s", args.clients()));
    Ok(per_s)
}

/// Ends the clients, asks the judge about every node that answers, and makes the report.
async fn finish<R: RoundReport + Send + 'static>(
    play: Play<'_>,
    rounds: Vec<R>,
    clients: Clients,
    under: Under,
) -> Result<Done, CliError> {
    let Play { args, load, downs, mut broken, .. } = play;
    let ended = broken.is_empty();
    if !ended {
        load.abandon();
    }
    let offered = clients.stop(load).await.unwrap_or_else(|error| {
        broken.push(error.to_string());
        None
    });
    let under_load = load.recorder.history();
    let (errors, error_samples) = survivor_errors(&under_load, &downs);
    let acknowledged_us = under_load.acknowledged_us();
    let gaps = summarize_gaps(&acknowledged_us);
    // Without keys a repetition would be a write of its own. A cluster that broke may answer none of them.
    let repeat = match load.balancer {
        None if ended => values_to_repeat(&under_load, load.recorder.now_us()),
        _ => Vec::new(),
    };
    let not_replayed = drill_load::repeat_writes(load, &repeat).await.map_err(CliError::Local)?;
    let mut listings = Vec::new();
    for node in 0..load.endpoints.len() {
        match drill_load::list_node(load, node).await {
            Ok(listing) => listings.push(listing),
            Err(error) => broken.push(format!("the judge has not seen node {}: {error}", node + 1)),
        }
    }
    let history = load.recorder.history();
    let judging = tokio::task::spawn_blocking(move || {
        let verdict = judge::check(&history, &listings);
        let rounds = judged(rounds, &history, &verdict);
        (verdict, rounds)
    });
    let (verdict, rounds) = judging.await.map_err(|error| CliError::Local(format!("the judge failed: {error}")))?;
    let (gap_median_ms, gap_worst_ms) = median_and_worst_ms(&rounds);
    let rounds_clean = rounds.iter().all(|round| round.problem().is_none());
    let rounds_clean = rounds_clean && too_long(&rounds, args.gap_max_ms).is_empty();
    let report = DrillReport {
        kind: args.kind.word(),
        passed: verdict.is_clean() && errors == 0 && not_replayed == 0 && rounds_clean && broken.is_empty(),
        broken,
        gap_max_ms: args.gap_max_ms,
        behind: under.behind,
        requests: (under_load.writes.len() + under_load.reads.len()) as u64,
        duplicates: verdict.count(FindingKind::Doubled),
        measured_per_s: under.measured_per_s,
        offered,
        clients: usize::try_from(args.clients()).unwrap_or(usize::MAX),
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
    };
    let json = serde_json::value::to_raw_value(&report)
        .map_err(|error| CliError::Local(format!("cannot write the report: {error}")))?;
    let html = drill_html::section(&report, &acknowledged_us);
    Ok(Done { passed: report.passed, json, text: text(&report), html })
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
