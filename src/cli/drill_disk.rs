//! Rounds of `--kind fsync` and `--kind stall`: the disk of the leader fails or hangs under load.
//!
//! Each node's folder is an ext4 on a faulty disk of its own. `fsync`: every write to the blocks of the
//! log's segments fails, so that the next fsync of the log does; nothing else of the disk is touched.
//! `stall`: from one moment on no write and no flush of the disk ends. Who wrote or synced what after
//! the error is read from the disk's own log and the kernel's tracepoints, not from the server.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::drill::DrillKind;
use super::drill_disk_report::{DiskRound, StateSeen};
use super::drill_load::Load;
use super::drill_report::Times;
use super::drill_run::{READY_TIMEOUT, STEADY};
use super::drill_watch::{Down, POLL, check_readable, find_leader, survivor_errors};
use super::faulty_disk::wire::{Failure, Held, IoLine, IoResult, Kind, SyncCall};
use super::faulty_disk::{FaultyDisk, now_us};
use super::http_client::{Call, Client};
use super::local_cluster::{LocalCluster, NodePlan};
use super::{CliError, output, status};
use crate::judge::longest_gap_touching;

/// How long a fault may wait for a write that meets it. A segment that is rolled just then is written no more, and the
/// fault is laid anew.
const HIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long writes may stay away after the fault before the round goes on without them.
const SERVE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the fence of a node whose disk hangs may take, from the beginning of the hang.
const FENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a fenced node is watched for accepting again.
const FENCED_WATCH: Duration = Duration::from_secs(2);

/// How long a node may take to rebuild itself once the fault is lifted.
const REBUILD_TIMEOUT: Duration = Duration::from_secs(60);

/// Deadline of one question to a node that may be hanging.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// Acknowledgements that were under way at the fault come first; a hundred later ones are the new leader's.
const ACKNOWLEDGED_AFTER: u64 = 100;

/// The nodes' disks.
pub struct Disks(Vec<FaultyDisk>);

/// What kind of rounds.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// `Fsync` or `Stall`.
    pub kind: DrillKind,
    /// Whether a node whose fsync failed is expected to rebuild itself.
    pub wait_for_rebuild: bool,
}

impl Disks {
    /// Mounts a disk on each node's folder, and moves what the processes print out of there: it is to be read later.
    pub async fn start(program: PathBuf, dir: &Path, nodes: &mut [NodePlan], mb: u64) -> Result<Self, CliError> {
        let mut wanted = Vec::new();
        for node in nodes {
            node.log = dir.join(format!("{}.log", node.name));
            wanted.push((dir.join(format!("disk-of-{}", node.name)), node.dir.clone()));
        }
        let start = move || wanted.iter().map(|(dir, mount)| FaultyDisk::start(&program, dir, mount, mb)).collect();
        let disks: Result<Vec<_>, _> = tokio::task::spawn_blocking(start)
            .await
            .map_err(|error| CliError::Local(format!("cannot start the disks: {error}")))?;
        let disks = Self(disks?);
        if let Some(why) = disks.0.iter().find_map(FaultyDisk::unwatched) {
            output::notice(&format!("syncs of single files cannot be told apart: {why}"));
        }
        Ok(disks)
    }

    /// Ends all faults, so that processes can stop.
    pub fn heal(&self) {
        for disk in &self.0 {
            if let Err(error) = disk.clear(Held::Done) {
                output::notice(&error.to_string());
            }
        }
    }

    fn of(&self, node: usize) -> Result<&FaultyDisk, CliError> {
        self.0.get(node).ok_or_else(|| CliError::Local(format!("node {node} has no disk")))
    }
}

/// One file of the log as it lies on the disk.
struct Segment {
    ino: u64,
    ranges: Vec<(u64, u64)>,
}

/// A fault that was met. All times are microseconds of the recorder's clock.
struct Met {
    /// When the fault was laid.
    laid_us: u64,
    /// The first operation that met it.
    first: IoLine,
    segments: Vec<Segment>,
    /// Recorder's clock minus the kernel's.
    clock_diff_us: i128,
}

impl Met {
    /// A time of the kernel's clock on the recorder's.
    fn recorder_us(&self, kernel_us: u64) -> u64 {
        u64::try_from(i128::from(kernel_us) + self.clock_diff_us).unwrap_or(0)
    }
}

/// Breaks the leader's disk, looks at what everybody does, heals it and waits for three healthy voters.
pub async fn round(
    cluster: &mut LocalCluster,
    disks: &Disks,
    load: &Arc<Load>,
    how: How,
    round: usize,
    downs: &mut Vec<Down>,
) -> Result<DiskRound, CliError> {
    let round_start_us = load.recorder.now_us();
    sleep(STEADY).await;
    let (victim, before) = find_leader(load, None).await?;
    let disk = disks.of(victim)?;
    let plan = cluster.plan().get(victim).cloned().ok_or_else(|| CliError::Local(format!("no node {victim}")))?;
    let errors_before = fsync_errors(load, victim).await.unwrap_or(0);
    if disk.unwatched().is_none() {
        disk.watch_syncs()?;
    }
    let states = watch_states(load, victim);
    let met = lay(disk, &plan.dir, load, how.kind).await?;
    let acknowledged = load.recorder.acknowledged();
    let served_again = eventually(SERVE_TIMEOUT, || load.recorder.acknowledged() >= acknowledged + ACKNOWLEDGED_AFTER);
    let served_again = served_again.await;
    sleep(STEADY).await;
    let looked_until_us = load.recorder.now_us();
    let mut done = DiskRound {
        round,
        victim: plan.name.clone(),
        hit_after_ms: met.recorder_us(met.first.at_us).saturating_sub(met.laid_us) / 1000,
        served_again,
        ..DiskRound::default()
    };
    match how.kind {
        DrillKind::Stall => {
            let fence = watch_fence(&plan, load, met.laid_us).await;
            done.fenced_ms = fence.map(|(_, refused_us)| refused_us.saturating_sub(met.laid_us) / 1000);
            done.accepts_after_fence = fence.is_some() && accepts_again(&plan).await;
            let from_us = fence.map_or_else(|| load.recorder.now_us(), |(last_accepted_us, _)| last_accepted_us);
            load.set_up(victim, false);
            downs.push(Down { node: node_number(victim), from_us, to_us: u64::MAX });
            // It cannot end while its disk hangs.
            cluster.signal(victim, Signal::KILL)?;
        }
        _ => {
            let (syncs, log) = (disk.unwatched().is_none().then(|| disk.syncs()).transpose()?, disk.io_log()?);
            let proof = after_the_error(&met, &log, syncs.as_deref());
            done.segment_writes_after = proof.writes;
            done.segment_syncs_after = proof.syncs;
            let error_us = met.recorder_us(proof.error_at_us);
            let until_us = healthy_again_us(&states).unwrap_or(looked_until_us);
            let served = load.served_by(victim, error_us);
            done.served_after =
                served.iter().filter(|each| each.start_us > error_us && each.end_us < until_us).count() as u64;
            done.fsync_errors = fsync_errors(load, victim).await.ok().map(|now| now.saturating_sub(errors_before));
        }
    }
    let lifted = Instant::now();
    let lifted_us = load.recorder.now_us();
    disk.clear(Held::Done)?;
    if how.kind == DrillKind::Stall {
        restart(cluster, victim).await?;
        done.rejoined = "restarted";
    } else if how.wait_for_rebuild && rebuilt(load, victim, &states).await {
        done.rejoined = "rebuilt itself";
    } else {
        if how.wait_for_rebuild {
            done.rejoined = "did not rebuild itself; restarted";
        } else {
            done.rejoined = "restarted";
        }
        let from_us = load.recorder.now_us();
        load.set_up(victim, false);
        downs.push(Down { node: node_number(victim), from_us, to_us: u64::MAX });
        restart(cluster, victim).await?;
    }
    cluster.wait_ready(READY_TIMEOUT).await?;
    done.healthy_voters = wait_for_voters(load).await;
    done.rejoin_ms = u64::try_from(lifted.elapsed().as_millis()).unwrap_or(u64::MAX);
    done.readable_nodes = check_readable(load).await?;
    load.set_up(victim, true);
    let end_us = load.recorder.now_us();
    if let Some(down) = downs.last_mut().filter(|down| down.to_us == u64::MAX) {
        down.to_us = end_us;
    }
    let (leader, after) = find_leader(load, None).await?;
    done.new_leader = cluster.plan().get(leader).map(|plan| plan.name.clone()).unwrap_or_default();
    done.terms = after.term.saturating_sub(before.term);
    done.states = finish(states, met.laid_us);
    let history = load.recorder.history_since(round_start_us);
    let acknowledged_us = history.acknowledged_us();
    done.errors = survivor_errors(&history, downs).0;
    done.acknowledged = acknowledged_us.len() as u64;
    let window_end_us = if served_again { looked_until_us } else { lifted_us };
    let gap = longest_gap_touching(&acknowledged_us, met.laid_us, window_end_us);
    done.gap_us = gap.length_us();
    done.gap_after_ms =
        (i64::try_from(gap.from_us).unwrap_or(i64::MAX) - i64::try_from(met.laid_us).unwrap_or(0)) / 1000;
    done.rejoin_gap_us = longest_gap_touching(&acknowledged_us, window_end_us, end_us).length_us();
    let mut times = Times { from_us: round_start_us, to_us: end_us, marks: Vec::new() };
    times.fault(
        met.recorder_us(met.first.at_us),
        if how.kind == DrillKind::Stall { "disk hangs" } else { "disk fails" },
    );
    times.event(lifted_us, "fault lifted");
    done.times = times;
    Ok(done)
}

fn node_number(node: usize) -> u16 {
    u16::try_from(node).unwrap_or(u16::MAX)
}

/// Lays the fault and waits until an operation met it.
async fn lay(disk: &FaultyDisk, folder: &Path, load: &Load, kind: DrillKind) -> Result<Met, CliError> {
    let (seen, faults_before) = (disk.io_log()?.len(), disk.counts()?.faults);
    let deadline = Instant::now() + SERVE_TIMEOUT;
    loop {
        let segments = segments(disk, &folder.join("wal"))?;
        let clock_diff_us = i128::from(load.recorder.now_us()) - i128::from(now_us());
        let laid_us = load.recorder.now_us();
        match kind {
            DrillKind::Stall => disk.hang()?,
            _ => {
                let ranges = segments.iter().flat_map(|segment| segment.ranges.iter().copied()).collect();
                disk.fail_writes(ranges, Failure::Eio, None)?;
            }
        }
        let is_hit = || disk.counts().is_ok_and(|counts| counts.faults > faults_before);
        let log = if eventually(HIT_TIMEOUT, is_hit).await { disk.io_log()? } else { Vec::new() };
        let fault = |line: &&IoLine| !matches!(line.result, IoResult::Done);
        if let Some(first) = log.iter().skip(seen).find(fault).copied() {
            return Ok(Met { laid_us, first, segments, clock_diff_us });
        }
        if Instant::now() >= deadline {
            return Err(CliError::Found("the leader wrote nothing to its log that could meet the fault".to_owned()));
        }
        disk.clear(Held::Done)?;
    }
}

/// The segments of the log. Not the spare one: its failure would be no event before it is used.
fn segments(disk: &FaultyDisk, wal: &Path) -> Result<Vec<Segment>, CliError> {
    let fail = |error: std::io::Error| CliError::Local(format!("{}: {error}", wal.display()));
    let mut segments = Vec::new();
    for entry in std::fs::read_dir(wal).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_segment = name.starts_with("segment.") && name.ends_with(".wal");
        // Renamed or removed meanwhile: the fault is laid anew if nothing meets it.
        let Ok(ino) = std::fs::metadata(&path).map(|metadata| metadata.ino()) else { continue };
        if is_segment && let Ok(ranges) = disk.ranges_of(&path) {
            segments.push(Segment { ino, ranges });
        }
    }
    Ok(segments)
}

/// What reached a segment after its failed sync had returned.
struct Proof {
    /// When it had, on the kernel's clock.
    error_at_us: u64,
    writes: u64,
    /// `None` where the kernel cannot be watched.
    syncs: Option<u64>,
}

fn after_the_error(met: &Met, log: &[IoLine], syncs: Option<&[SyncCall]>) -> Proof {
    let none = Segment { ino: 0, ranges: Vec::new() };
    let segment = met.segments.iter().find(|segment| met.first.touches(&segment.ranges)).unwrap_or(&none);
    let of_segment = || syncs.unwrap_or_default().iter().filter(|call| call.ino == segment.ino);
    let failed = of_segment().find(|call| call.result.is_some_and(|result| result < 0));
    // Without the kernel's word: the pages of one sync fail one after another, without a pause.
    let error_at_us = failed.and_then(|call| call.end_us).unwrap_or(met.first.at_us);
    let touched = log.iter().filter(|line| line.kind == Kind::Write && line.touches(&segment.ranges));
    let later = touched.filter(|line| line.at_us > error_at_us);
    let writes = match failed {
        Some(_) => later.count(),
        None => later.filter(|line| line.result == IoResult::Done).count(),
    };
    let again = failed.map(|failed| of_segment().filter(|call| call.at_us > failed.at_us).count() as u64);
    Proof { error_at_us, writes: writes as u64, syncs: again }
}

/// Polls a condition until it holds; false when the time is up.
async fn eventually(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(POLL).await;
    }
    true
}

type States = Arc<Mutex<Vec<(u64, String)>>>;

struct StateWatch {
    seen: States,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for StateWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Notes each change of what a node says about itself, with the time.
fn watch_states(load: &Arc<Load>, node: usize) -> StateWatch {
    let seen = States::default();
    let (load, into) = (Arc::clone(load), Arc::clone(&seen));
    let task = tokio::spawn(async move {
        let Some(endpoint) = load.endpoints.get(node).cloned() else { return };
        let mut client = Client::new(endpoint);
        loop {
            let state = match status::health(&mut client, ASK_TIMEOUT).await {
                Ok(health) => health.disk.state,
                Err(_) => "no answer".to_owned(),
            };
            note_state(&into, load.recorder.now_us(), state);
            sleep(POLL).await;
        }
    });
    StateWatch { seen, task }
}

fn note_state(seen: &States, at_us: u64, state: String) {
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.last().is_none_or(|(_, last)| *last != state) {
        seen.push((at_us, state));
    }
}

/// When the node called itself healthy again after it had not.
fn healthy_again_us(states: &StateWatch) -> Option<u64> {
    let seen = states.seen.lock().unwrap_or_else(PoisonError::into_inner);
    let mut later = seen.iter().skip_while(|(_, state)| status::works(state));
    later.find(|(_, state)| status::works(state)).map(|(at_us, _)| *at_us)
}

fn finish(states: StateWatch, laid_us: u64) -> Vec<StateSeen> {
    let seen = states.seen.lock().unwrap_or_else(PoisonError::into_inner);
    let after = |at_us: u64| i64::try_from(at_us).unwrap_or(0) - i64::try_from(laid_us).unwrap_or(0);
    seen.iter().map(|(at_us, state)| StateSeen { after_ms: after(*at_us) / 1000, state: state.clone() }).collect()
}

/// `stemedb_wal_fsync_errors_total` of a node, all segments together.
async fn fsync_errors(load: &Load, node: usize) -> Result<u64, String> {
    let endpoint = load.endpoints.get(node).cloned().ok_or("no such node")?;
    let answer = Client::new(endpoint).call(&Call::get("/metrics"), ASK_TIMEOUT).await;
    let answer = answer.map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&answer.body);
    let lines = text.lines().filter(|line| line.starts_with("stemedb_wal_fsync_errors_total"));
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64)
}

async fn accepts(address: &str) -> bool {
    matches!(timeout(ASK_TIMEOUT, TcpStream::connect(address)).await, Ok(Ok(_)))
}

/// When the listener for clients was last seen accepting, and both listeners first refusing; `None` when that does not
/// happen in time. The listener for clients is shut first, while peers still answer what clients had asked.
async fn watch_fence(plan: &NodePlan, load: &Load, laid_us: u64) -> Option<(u64, u64)> {
    let deadline_us = laid_us + u64::try_from(FENCE_TIMEOUT.as_micros()).unwrap_or(u64::MAX);
    let mut accepted_us = laid_us;
    while load.recorder.now_us() < deadline_us {
        let asked_us = load.recorder.now_us();
        let accepts_clients = accepts(&plan.http_addr()).await;
        if accepts_clients {
            accepted_us = asked_us;
        }
        if !accepts_clients && !accepts(&plan.peer_addr()).await {
            return Some((accepted_us, load.recorder.now_us()));
        }
        sleep(POLL).await;
    }
    None
}

async fn accepts_again(plan: &NodePlan) -> bool {
    let deadline = Instant::now() + FENCED_WATCH;
    while Instant::now() < deadline {
        if accepts(&plan.http_addr()).await || accepts(&plan.peer_addr()).await {
            return true;
        }
        sleep(POLL).await;
    }
    false
}

async fn restart(cluster: &mut LocalCluster, node: usize) -> Result<(), CliError> {
    cluster.kill(node).await?;
    cluster.start(node)
}

/// Waits until the node, which was not healthy, says that it is.
async fn rebuilt(load: &Load, node: usize, states: &StateWatch) -> bool {
    let deadline = Instant::now() + REBUILD_TIMEOUT;
    while Instant::now() < deadline {
        if healthy_again_us(states).is_some() && ready(load, node).await {
            return true;
        }
        sleep(POLL).await;
    }
    false
}

async fn ready(load: &Load, node: usize) -> bool {
    let Some(endpoint) = load.endpoints.get(node).cloned() else { return false };
    let answer = Client::new(endpoint).call(&Call::get("/v1/health/ready"), ASK_TIMEOUT).await;
    answer.is_ok_and(|answer| answer.is_success())
}

/// Waits until every node votes and is well, at most as long as a rebuild may take; how many are.
async fn wait_for_voters(load: &Load) -> usize {
    let deadline = Instant::now() + REBUILD_TIMEOUT;
    loop {
        let mut most = 0;
        for endpoint in &load.endpoints {
            let voters = status::healthy_voters(&mut Client::new(endpoint.clone()), ASK_TIMEOUT).await;
            most = most.max(voters.unwrap_or(0));
        }
        if most >= load.endpoints.len() || Instant::now() >= deadline {
            return most;
        }
        sleep(POLL).await;
    }
}
