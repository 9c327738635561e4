//! What is done to the cells with real processes, and what is looked at.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use stemedb::cli::faulty_disk::wire::{Action, Failure, Held, Kind, Rule};
use stemedb::cli::http_client::{Call, Client, Endpoint};
use stemedb::cli::status::NodeHealth;
use tokio::net::TcpStream;

use super::load::{Running, until};
use super::processes::Cluster;
use super::table::{Act, Part, Victim};
use crate::rig;

/// A memtable of the cells takes ten of these.
const FILL_BYTES: usize = 100_000;

pub async fn act_out(
    act: Act,
    cluster: &mut Cluster,
    running: &Running,
    i: usize,
    victim: Victim,
) -> Result<String, String> {
    match act {
        Act::Kill => {
            kill(cluster, running, i).await;
            running.more().await;
            start(cluster, running, i).await;
            Ok("comes back with everything".to_owned())
        }
        Act::Freeze => {
            let pid = cluster.processes.pid(i).unwrap();
            rig::freeze(pid);
            if victim == Victim::Leader {
                cluster.leader(Some(i)).await;
            }
            running.more().await;
            cluster.processes.signal(i, Signal::CONT).unwrap();
            until("it answers again", async || cluster.health(i).await.is_some()).await;
            cluster.processes.wait_ready(rig::HANG).await.unwrap();
            Ok("goes on, and knows that the others went on without it".to_owned())
        }
        Act::ReadOnly => {
            // The journal cannot be written any more, and ext4 stops writing.
            cluster.disks[i].fail_syncs(Failure::Eio, None).unwrap();
            until("the failure is known", async || cluster.says(i, has_failed).await).await;
            proxies(cluster, running, i).await
        }
        Act::TreeFails(point) => {
            // Armed from outside, so that it strikes in the role that is wanted.
            std::fs::write(cluster.fail_file(i), format!("{point} waits")).unwrap();
            let waits = |cluster: &Cluster| log(cluster, i).contains("a test waits here");
            fill(cluster, (i + 1) % 3, async |cluster| waits(cluster)).await;
            cluster.disks[i].fail_syncs(Failure::Eio, Some(1)).unwrap();
            std::fs::remove_file(cluster.fail_file(i)).unwrap();
            until("the failure is known", async || cluster.says(i, has_failed).await).await;
            proxies(cluster, running, i).await
        }
        Act::BlockFails(part) => {
            let file = segments(cluster, i).pop().ok_or("no segment")?;
            let ranges = cluster.disks[i].ranges_of(&file).unwrap();
            cluster.disks[i].fail_writes(part_of(&ranges, part), Failure::Eio, Some(1)).unwrap();
            fill(cluster, (i + 1) % 3, async |cluster| cluster.says(i, has_failed).await).await;
            proxies(cluster, running, i).await
        }
        Act::HangsFor(ms, times) => {
            let mut moved = false;
            for _ in 0..times {
                let led = cluster.leader(None).await == i;
                cluster.disks[i].hang().unwrap();
                // The time is the fault.
                tokio::time::sleep(Duration::from_millis(ms)).await;
                cluster.disks[i].clear(Held::Done).unwrap();
                until("its disk is well again", async || cluster.says(i, |h| h.disk.state == "ok").await).await;
                running.more().await;
                moved |= led && cluster.leader(None).await != i;
            }
            cluster.processes.wait_ready(rig::HANG).await.unwrap();
            let how = if moved { "hands over, and goes on as a follower" } else { "goes on" };
            Ok(how.to_owned())
        }
        Act::ReadsHang => {
            let tables = tables_on_disk(cluster, i).await;
            let ranges = tables.iter().flat_map(|file| cluster.disks[i].ranges_of(file).unwrap()).collect();
            cluster.disks[i].add(Rule { on: vec![Kind::Read], ranges, action: Action::Hang, times: None }).unwrap();
            let reading = tokio::spawn(read_filled(cluster.endpoints[i].clone()));
            until("it stalls", async || cluster.says(i, |h| h.disk.state == "stalled").await).await;
            let why = cluster.health(i).await.and_then(|health| health.disk.reason).unwrap_or_default();
            if !why.starts_with("read kv/tables") {
                return Err(format!("it stalls because of another operation: {why}"));
            }
            cluster.leader(Some(i)).await;
            running.more().await;
            cluster.disks[i].clear(Held::Done).unwrap();
            until("its disk is well again", async || cluster.says(i, |h| h.disk.state == "ok").await).await;
            cluster.processes.wait_ready(rig::HANG).await.unwrap();
            reading.await.unwrap()?;
            Ok("stalls, another leads, the read that hung is answered; goes on".to_owned())
        }
        Act::ReadsFail => {
            let tables = tables_on_disk(cluster, i).await;
            let ranges = tables.iter().flat_map(|file| cluster.disks[i].ranges_of(file).unwrap()).collect();
            let fail = Action::Fail(Failure::Eio);
            cluster.disks[i].add(Rule { on: vec![Kind::Read], ranges, action: fail, times: None }).unwrap();
            read_filled(cluster.endpoints[i].clone()).await?;
            let put_away = cluster.processes.plan()[i].dir.join("quarantine");
            until("the damaged tree is put away", async || put_away.exists()).await;
            cluster.processes.wait_ready(rig::HANG).await.unwrap();
            running.more().await;
            Ok("another node answers the read; the tree is replaced".to_owned())
        }
        Act::RestartAndEviction => restart_and_eviction(cluster, running, i).await,
        Act::Hang => hang(cluster, running, i).await,
        Act::NoBytes | Act::NoInodes => {
            match act {
                Act::NoBytes => cluster.small[i].leave_bytes(0),
                _ => cluster.small[i].leave_no_inode(),
            }
            until("it says that it is full", async || cluster.says(i, |h| h.disk.state == "full").await).await;
            let next = cluster.leader(None).await;
            if next == i {
                cluster.leader(Some(i)).await;
            }
            running.more().await;
            retract(cluster, i).await?;
            cluster.small[i].free();
            until("it says that it has room", async || cluster.says(i, |h| h.disk.state == "ok").await).await;
            Ok("says full, another leads, reads and deletes go on through it; clears itself".to_owned())
        }
        Act::TaskDies(point) => {
            // Armed from outside, so that it strikes in the role that is wanted.
            std::fs::write(cluster.fail_file(i), format!("{point} panics")).unwrap();
            let ended = tokio::time::timeout(rig::HANG, cluster.processes.child_ended()).await;
            let ended = ended.map_err(|_| "the process goes on".to_owned())?.unwrap();
            running.load.set_up(i, false);
            if ended.node != i || ended.status.code() != Some(EXIT_RAN_AND_FAILED) {
                return Err(format!("node {} ended with {}", ended.node, ended.status));
            }
            let log = log(cluster, i);
            let why = log.lines().rev().find_map(|line| line.split("cannot go on: ").nth(1));
            let why = why.ok_or("it ended without a reason")?.to_owned();
            std::fs::remove_file(cluster.fail_file(i)).unwrap();
            running.more().await;
            start(cluster, running, i).await;
            Ok(format!("ends: {why}; started again it has everything"))
        }
        other => Err(format!("{other:?} needs no process")),
    }
}

/// Of a node that ran and could not go on.
const EXIT_RAN_AND_FAILED: i32 = 7;

fn has_failed(health: &NodeHealth) -> bool {
    health.status == "failed"
}

async fn kill(cluster: &mut Cluster, running: &Running, i: usize) {
    running.load.set_up(i, false);
    cluster.processes.kill(i).await.unwrap();
}

async fn start(cluster: &mut Cluster, running: &Running, i: usize) {
    cluster.processes.start(i).unwrap();
    cluster.processes.wait_ready(rig::HANG).await.unwrap();
    running.load.set_up(i, true);
}

/// The victim has failed: another one leads, and requests are answered through it.
async fn proxies(cluster: &Cluster, running: &Running, i: usize) -> Result<String, String> {
    cluster.leader(Some(i)).await;
    running.more().await;
    let health = cluster.health(i).await.ok_or("the failed node does not answer")?;
    if health.role == "leader" {
        return Err("the failed node leads".to_owned());
    }
    let file = health.disk.reason.unwrap_or_default().replace(&cluster.dir.path().display().to_string(), "");
    let file = file.split(['/', ' ']).find(|word| word.starts_with("segment.")).map(str::to_owned);
    let of = file.map(|file| format!(" ({file})")).unwrap_or_default();
    Ok(format!("failed{of}, and goes on as a proxy; another node leads"))
}

/// Writes large values through a node until `condition` holds.
async fn fill(cluster: &Cluster, through: usize, condition: impl AsyncFn(&Cluster) -> bool) {
    let mut client = Client::new(cluster.endpoints[through].clone());
    let text = "x".repeat(FILL_BYTES);
    let mut number = 0;
    until("enough was written", async || {
        number += 1;
        let body = json!({"concept_path": "matrix/fill", "predicate": number.to_string(), "value": text}).to_string();
        // Whatever comes of it: only room is taken.
        let _answer = client.call(&Call::post("/v1/assert", body), rig::HANG).await;
        condition(cluster).await
    })
    .await;
}

/// Writes a fact and retracts it, through a node.
async fn retract(cluster: &Cluster, through: usize) -> Result<(), String> {
    let mut client = Client::new(cluster.endpoints[through].clone());
    let body = json!({"concept_path": "matrix/retract", "predicate": "p", "value": 1}).to_string();
    let asserted = client.call(&Call::post("/v1/assert", body), rig::HANG).await.map_err(|e| e.to_string())?;
    let id = asserted.json::<Value>().map_err(|e| format!("{e}: {}", asserted.describe()))?["id"].clone();
    let call = Call::post("/v1/supersede", json!({"old": id}).to_string());
    let answer = client.call(&call, rig::HANG).await.map_err(|e| e.to_string())?;
    if answer.is_success() { Ok(()) } else { Err(format!("a retraction: {}", answer.describe())) }
}

/// What a node has printed.
fn log(cluster: &Cluster, i: usize) -> String {
    std::fs::read_to_string(cluster.processes.plan()[i].log_file()).unwrap_or_default()
}

/// Reads all that [`fill`] has written, through one node.
async fn read_filled(node: Endpoint) -> Result<(), String> {
    let mut client = Client::new(node);
    let call = Call::get("/v1/query?concept_path=matrix/fill&limit=1000");
    let answer = client.call(&call, rig::HANG).await.map_err(|e| e.to_string())?;
    if answer.is_success() { Ok(()) } else { Err(format!("a read: {}", answer.describe())) }
}

/// Fills the node's tree until it has tables that nobody has read yet, and drops them from the page cache.
async fn tables_on_disk(cluster: &Cluster, i: usize) -> Vec<PathBuf> {
    let kv = cluster.processes.plan()[i].dir.join("kv");
    let tables = || -> Vec<PathBuf> {
        let trees = std::fs::read_dir(&kv).into_iter().flatten().flatten().map(|entry| entry.path().join("tables"));
        trees.flat_map(|tables| std::fs::read_dir(tables).into_iter().flatten().flatten()).map(|e| e.path()).collect()
    };
    fill(cluster, (i + 1) % 3, async |_| tables().len() >= 2).await;
    // Its newest may be in the making.
    fill(cluster, (i + 1) % 3, async |_| tables().len() >= 3).await;
    let found = tables();
    for table in &found {
        rig::evict(&std::fs::File::open(table).unwrap());
    }
    found
}

/// A part of a file that lies in these ranges of the disk.
fn part_of(ranges: &[(u64, u64)], part: Part) -> Vec<(u64, u64)> {
    const HEAD_BYTES: u64 = 64 << 10;
    const TAIL_BYTES: u64 = 160 << 10;
    let bytes: u64 = ranges.iter().map(|(from, to)| to - from).sum();
    let (from, to) = match part {
        Part::First => (0, HEAD_BYTES),
        Part::Middle => (HEAD_BYTES, bytes - TAIL_BYTES),
        Part::Last => (bytes - TAIL_BYTES, bytes),
    };
    let mut at = 0;
    let mut found = Vec::new();
    for (begin, end) in ranges {
        let (first, last) = (from.max(at), to.min(at + end - begin));
        if first < last {
            found.push((begin + first - at, begin + last - at));
        }
        at += end - begin;
    }
    found
}

/// The files of a node's log.
fn segments(cluster: &Cluster, i: usize) -> Vec<PathBuf> {
    let wal = cluster.processes.plan()[i].dir.join("wal");
    let mut files: Vec<PathBuf> = std::fs::read_dir(wal).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ext| ext == "wal"));
    files.sort();
    files
}

/// A write to the log fails and the process is killed: what its page cache shows was never on the disk. Whoever starts
/// then must not believe it.
async fn restart_and_eviction(cluster: &mut Cluster, running: &Running, i: usize) -> Result<String, String> {
    let ranges = segments(cluster, i).iter().flat_map(|file| cluster.disks[i].ranges_of(file).unwrap()).collect();
    cluster.disks[i].fail_writes(ranges, Failure::Eio, None).unwrap();
    until("the failure is known", async || cluster.says(i, has_failed).await).await;
    proxies(cluster, running, i).await?;
    cluster.disks[i].clear(Held::Done).unwrap();
    kill(cluster, running, i).await;
    let (cached, on_disk) = before_and_after_eviction(cluster, i, false);
    let lied = if cached == on_disk { "" } else { " (the page cache showed what was not on the disk)" };
    start(cluster, running, i).await;
    running.more().await;
    kill(cluster, running, i).await;
    let (cached, on_disk) = before_and_after_eviction(cluster, i, true);
    if cached != on_disk {
        return Err("after the eviction the log is another one".to_owned());
    }
    start(cluster, running, i).await;
    Ok(format!("failed; restarted it has everything{lied}, and the same after the eviction"))
}

/// The log of a node that is down as text, from the page cache and then, where it is `evicted`, from the disk.
fn before_and_after_eviction(cluster: &Cluster, i: usize, evicted: bool) -> (String, String) {
    let dump = || segments(cluster, i).iter().map(|file| dump(file)).collect::<String>();
    let cached = dump();
    for file in segments(cluster, i).iter().filter(|_| evicted) {
        rig::evict(&std::fs::File::open(file).unwrap());
    }
    let on_disk = if evicted { dump() } else { direct(&segments(cluster, i)) };
    (cached, on_disk)
}

/// What the disk has of these files, past the page cache, as text. Nothing is dropped from the cache.
fn direct(files: &[PathBuf]) -> String {
    let copy = tempfile::tempdir().unwrap();
    let read = |file: &PathBuf| {
        let to = copy.path().join(file.file_name().unwrap());
        let status = Command::new("dd")
            .args(["iflag=direct", "bs=4096", "status=none"])
            .arg(format!("if={}", file.display()))
            .arg(format!("of={}", to.display()))
            .status();
        assert!(status.unwrap().success());
        dump(&to)
    };
    files.iter().map(read).collect()
}

fn dump(file: &Path) -> String {
    let output =
        Command::new(env!("CARGO_BIN_EXE_stemedb")).args(["wal", "dump", "--file"]).arg(file).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A disk that hangs until the process is fenced, and answers again.
async fn hang(cluster: &mut Cluster, running: &Running, i: usize) -> Result<String, String> {
    cluster.disks[i].hang().unwrap();
    cluster.leader(Some(i)).await;
    // Through the node that hangs as well, as long as it accepts.
    running.more().await;
    let address = cluster.endpoints[i].authority().to_owned();
    let refused = async || {
        let error = TcpStream::connect(&address).await.err();
        error.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    };
    until("it is fenced", refused).await;
    running.load.set_up(i, false);
    running.more().await;
    if !refused().await {
        return Err("a fenced process accepts again".to_owned());
    }
    cluster.disks[i].clear(Held::Done).unwrap();
    let ended = tokio::time::timeout(rig::HANG, cluster.processes.child_ended()).await;
    let ended = ended.map_err(|_| "the process goes on after its fence".to_owned())?.unwrap();
    if ended.node != i || ended.status.code() != Some(8) {
        return Err(format!("node {} ended with {}", ended.node, ended.status));
    }
    start(cluster, running, i).await;
    Ok("hands over, is fenced, ends with code 8 when the disk answers; started again it has everything".to_owned())
}
