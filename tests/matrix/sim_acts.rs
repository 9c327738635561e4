//! What is done to the cells on simulated disks, and what is looked at.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::cli::http_client::{Call, Client, Endpoint};
use stemedb::node::Node;
use stemedb::state::engine::checkpoint::MANIFEST;
use stemedb::state::machine::newest_checkpoint;
use stemedb_raft::disk::sim::{Kind, SimDisk, SyncFault};

use super::load::{Running, until};
use super::sim::{Cluster, copy_folder};
use super::table::{Act, Harm, Outcome, Victim};

const EIO: i32 = 5;

/// A dozen of these fill a segment of the cells.
const FILL_BYTES: usize = 100_000;

/// Where a node that has failed must stay what it is, because it is looked at.
fn stays_failed(act: Act) -> bool {
    use Act::*;
    matches!(act, SyncFails(_) | RollFails | FolderFails | VoteFails | WriterDies)
}

pub async fn run(act: Act, victim: Victim, seed: u64) -> Outcome {
    let mut cluster = Cluster::new(!stays_failed(act)).await;
    let addresses: Vec<String> = cluster.peers.iter().map(|peer| peer.http.clone()).collect();
    let running = Running::start(&addresses, seed);
    running.more().await;
    let leader = cluster.leader(None).await;
    let i = if victim == Victim::Leader { leader } else { (leader + 1) % 3 };
    let mut rng = StdRng::seed_from_u64(seed);
    let seen = act_out(act, &mut cluster, &running, i, &mut rng).await;
    running.more().await;
    let outcome = running.judge(&cluster.up(), seen).await;
    for i in 0..3 {
        cluster.stop(i).await;
    }
    outcome
}

async fn act_out(
    act: Act,
    cluster: &mut Cluster,
    running: &Running,
    i: usize,
    rng: &mut StdRng,
) -> Result<String, String> {
    match act {
        Act::SyncFails(fault) => {
            let term = cluster.node(i).health().term;
            cluster.disks[i].fail_next_sync(".wal", fault);
            until("the failure is known", async || cluster.node(i).has_failed()).await;
            proxies(cluster, running, i, term).await
        }
        Act::RollFails => {
            let term = cluster.node(i).health().term;
            // The segment that comes after the first: nothing else is synced under its name before.
            cluster.disks[i].fail_next_sync("segment.002.wal", SyncFault::PagesMarkedClean);
            fill(cluster, (i + 1) % 3, |cluster| cluster.node(i).has_failed()).await;
            proxies(cluster, running, i, term).await
        }
        Act::FolderFails => {
            let term = cluster.node(i).health().term;
            cluster.disks[i].fail_next(Kind::SyncFolder, "", EIO);
            fill(cluster, (i + 1) % 3, |cluster| cluster.node(i).has_failed()).await;
            proxies(cluster, running, i, term).await
        }
        Act::VoteFails => {
            let term = cluster.node(i).health().term;
            cluster.disks[i].fail_next_sync("hard-state", SyncFault::PagesMarkedClean);
            // Whoever follows or gives way saves a vote of the next term.
            while !cluster.node(i).has_failed() {
                let leader = cluster.leader(None).await;
                cluster.node(leader).hand_over().await;
                tokio::task::yield_now().await;
            }
            proxies(cluster, running, i, term).await
        }
        Act::PowerCut => {
            down(cluster, running, i, async |cluster| cluster.disks[i].power_cut(rng)).await;
            back(cluster, running, i).await
        }
        Act::AtRest(harm) => {
            if harm.needs_tables() {
                let has_checkpoint = |cluster: &Cluster| newest_checkpoint(&cluster.folder(i)).is_some();
                fill(cluster, i, has_checkpoint).await;
            }
            down(cluster, running, i, async |_| ()).await;
            inflict(cluster, i, harm, rng);
            running.more().await;
            back(cluster, running, i).await
        }
        Act::WriteLandsElsewhere => {
            let places = cluster.durable_bytes(i);
            let at = places[rng.random_range(0..places.len())] as u64;
            cluster.disks[i].misdirect_next_write("segment.001.wal", at);
            running.more().await;
            down(cluster, running, i, async |_| ()).await;
            back(cluster, running, i).await
        }
        Act::DamageAndOneDown => {
            let other = (i + 1) % 3;
            let third = (i + 2) % 3;
            down(cluster, running, i, async |_| ()).await;
            inflict(cluster, i, Harm::RandomBlock, rng);
            running.load.set_up(other, false);
            cluster.stop(other).await;
            begin(cluster, i).await?;
            let node = Arc::clone(cluster.node(i));
            let waits = || node.health().repairing.is_some_and(|why| why.contains("waiting for"));
            // The word that ended the wait counts: the next moment it may be another one.
            let waited = Cell::new(false);
            until("it is whole, or says for whom it waits", async || {
                waited.set(waits());
                waited.get() || node.is_ready().is_ok()
            })
            .await;
            let waited = waited.get();
            running.load.set_up(i, true);
            if !waited {
                // Two of three: it counts.
                running.more().await;
            }
            cluster.start(other).await.map_err(|error| error.to_string())?;
            running.load.set_up(other, true);
            cluster.ready().await;
            assert!(cluster.node(third).is_ready().is_ok());
            let how = if waited { "waited for the other one, and came back" } else { "comes back without it" };
            Ok(format!("{how}, with everything"))
        }
        Act::OldCopy => {
            down(cluster, running, i, async |_| ()).await;
            let (copy, disk) = (cluster.dir.path().join("old"), cluster.disks[i].fork());
            copy_folder(&cluster.folder(i), &copy);
            back(cluster, running, i).await?;
            running.more().await;
            down(cluster, running, i, async |_| ()).await;
            std::fs::remove_dir_all(cluster.folder(i)).unwrap();
            std::fs::rename(&copy, cluster.folder(i)).unwrap();
            cluster.disks[i] = disk;
            let said = refused(cluster, i, "old copy").await;
            running.more().await;
            cluster.stop(i).await;
            said
        }
        Act::Wiped => {
            down(cluster, running, i, async |_| ()).await;
            wipe(cluster, i);
            back(cluster, running, i).await
        }
        Act::WipedAndOneDown => {
            let other = (i + 1) % 3;
            down(cluster, running, i, async |_| ()).await;
            wipe(cluster, i);
            running.load.set_up(other, false);
            cluster.stop(other).await;
            begin(cluster, i).await?;
            let waits = |node: &Node| node.jobs().current().is_some_and(|job| !job.detail.is_empty());
            until("it waits, and says so", async || waits(cluster.node(i))).await;
            if cluster.node(i).is_ready().is_ok() {
                return Err("an emptied node calls itself ready".to_owned());
            }
            cluster.start(other).await.map_err(|error| error.to_string())?;
            running.load.set_up(other, true);
            cluster.ready().await;
            running.load.set_up(i, true);
            Ok("waits until the other one is back, and is rebuilt under a fresh id".to_owned())
        }
        Act::WriterDies => {
            cluster.panics[i].store(true, Ordering::Release);
            let said = gives_up(cluster, i).await?;
            running.more().await;
            // A process would end now; its memory, which this one shares, with it. So there is no coming back here.
            down(cluster, running, i, async |_| ()).await;
            Ok(said)
        }
        other => Err(format!("{other:?} has no simulated ground")),
    }
}

/// What the node says when it cannot go on.
async fn gives_up(cluster: &Cluster, i: usize) -> Result<String, String> {
    let node = Arc::clone(cluster.node(i));
    let fatal = async { tokio::time::timeout(crate::rig::HANG, node.wait_fatal()).await };
    tokio::select! {
        said = fatal => said.map_err(|_| "the node never said that it cannot go on".to_owned()),
        () = until("the disk counts as failed", async || node.has_failed()) => {
            Ok(format!("its disk counts as failed: {}", node.health().disk.reason.unwrap_or_default()))
        }
    }
}

/// The victim has failed: another one leads, and requests are answered through it.
async fn proxies(cluster: &Cluster, running: &Running, i: usize, term: u64) -> Result<String, String> {
    let next = cluster.leader(Some(i)).await;
    running.more().await;
    let failed = cluster.node(i);
    if failed.is_leader_with_quorum() || failed.is_ready().is_ok() {
        return Err("the failed node leads or calls itself ready".to_owned());
    }
    let moved = if cluster.node(next).health().term > term { ", in a later term" } else { "" };
    Ok(format!("failed, and goes on as a proxy; another node leads{moved}"))
}

/// Writes large values through a node until `condition` holds, so that the log goes on to its next segment.
async fn fill(cluster: &Cluster, through: usize, condition: impl Fn(&Cluster) -> bool) {
    let mut client = Client::new(Endpoint::parse(&cluster.peers[through].http).unwrap());
    let text = "x".repeat(FILL_BYTES);
    let mut number = 0;
    until("the log has rolled", async || {
        if condition(cluster) {
            return true;
        }
        number += 1;
        let body = format!(r#"{{"concept_path":"matrix/fill","predicate":"{number}","value":"{text}"}}"#);
        // Whatever comes of it: only room is taken.
        let _answer = client.call(&Call::post("/v1/assert", body), crate::rig::HANG).await;
        condition(cluster)
    })
    .await;
}

fn wipe(cluster: &mut Cluster, i: usize) {
    std::fs::remove_dir_all(cluster.folder(i)).unwrap();
    cluster.disks[i] = SimDisk::new();
}

/// Damages the files of a node that is down.
fn inflict(cluster: &Cluster, i: usize, harm: Harm, rng: &mut StdRng) {
    let segment = cluster.segment(i);
    let places = cluster.durable_bytes(i);
    let at = places[rng.random_range(0..places.len())];
    let bit = 1 << rng.random_range(0..8);
    let mut noise = vec![0u8; 512];
    rng.fill(&mut noise[..]);
    let disk = &cluster.disks[i];
    let hard_state = |n: u32| cluster.wal(i).join(format!("hard-state.{n}"));
    let flip_all = |bytes: &mut Vec<u8>| bytes.iter_mut().for_each(|byte| *byte ^= bit);
    match harm {
        Harm::RandomBlock => {
            disk.corrupt(&segment, |bytes| bytes[at..at + noise.len()].copy_from_slice(&noise)).unwrap();
        }
        Harm::BitFlip => disk.corrupt(&segment, |bytes| bytes[at] ^= bit).unwrap(),
        Harm::SegmentMissing => disk.shared().remove(&segment).unwrap(),
        Harm::SegmentShort => disk.corrupt(&segment, |bytes| bytes.truncate(bytes.len() / 2)).unwrap(),
        Harm::SegmentLong => disk.corrupt(&segment, |bytes| bytes.extend(&noise)).unwrap(),
        Harm::SegmentUnreadable => disk.set_read_error(&segment, true).unwrap(),
        Harm::BlocksUnreadable => disk.set_unreadable(&segment, at / 4096..at / 4096 + 2).unwrap(),
        Harm::OneHardState => disk.corrupt(&hard_state(1 + rng.random_range(0..2)), flip_all).unwrap(),
        Harm::BothHardStates => (1..=2).for_each(|n| disk.corrupt(&hard_state(n), flip_all).unwrap()),
        Harm::IdentityMissing => {
            for name in ["identity", "identity.spare"] {
                let _there = std::fs::remove_file(cluster.folder(i).join(name));
            }
        }
        Harm::TableBlock => overwrite_middle(&largest_table(&cluster.folder(i)), &noise),
        // Its other name, in the checkpoint, stays.
        Harm::TableMissing => std::fs::remove_file(largest_table(&cluster.folder(i))).unwrap(),
        Harm::CheckpointBlock => {
            let checkpoint = newest_checkpoint(&cluster.folder(i)).unwrap();
            overwrite_middle(&checkpoint.dir().join(MANIFEST), &noise);
        }
    }
}

/// The folder of the tree that counts: the file `active` begins with its number.
fn tree(kv: &Path) -> std::path::PathBuf {
    let active = std::fs::read(kv.join("active")).unwrap();
    let number = u64::from_le_bytes(active[..8].try_into().unwrap());
    kv.join(format!("g{number}"))
}

fn largest_table(folder: &Path) -> std::path::PathBuf {
    let files = std::fs::read_dir(tree(&folder.join("kv")).join("tables")).unwrap().map(|entry| entry.unwrap().path());
    files.max_by_key(|path| path.metadata().unwrap().len()).expect("a table")
}

/// A hard link of the file elsewhere keeps its content: another name's damage is another row.
fn overwrite_middle(path: &Path, noise: &[u8]) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.len() / 2;
    let end = (at + noise.len()).min(bytes.len());
    bytes[at..end].copy_from_slice(&noise[..end - at]);
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Takes a node down after `before`, under load, and waits until the others have served without it.
async fn down(cluster: &mut Cluster, running: &Running, i: usize, mut before: impl AsyncFnMut(&Cluster)) {
    running.load.set_up(i, false);
    before(cluster).await;
    cluster.stop(i).await;
    running.more().await;
}

async fn begin(cluster: &mut Cluster, i: usize) -> Result<(), String> {
    cluster.start(i).await.map_err(|error| format!("did not come back: {error}"))
}

/// Starts a node again, by itself as it would be by its operator: it must come back.
async fn back(cluster: &mut Cluster, running: &Running, i: usize) -> Result<String, String> {
    let old_id = raft_id(cluster, i);
    begin(cluster, i).await?;
    let node = Arc::clone(cluster.node(i));
    tokio::select! {
        why = node.wait_fatal() => {
            cluster.stop(i).await;
            return Err(format!("did not come back: {why}"));
        }
        () = until("it is ready", async || node.is_ready().is_ok()) => running.load.set_up(i, true),
    }
    match raft_id(cluster, i) == old_id {
        true => Ok("comes back with everything".to_owned()),
        false => Ok("comes back with everything, rebuilt under a fresh id".to_owned()),
    }
}

/// The id in a node's folder, if there is one.
fn raft_id(cluster: &Cluster, i: usize) -> Option<String> {
    let text = std::fs::read_to_string(cluster.folder(i).join("identity")).ok()?;
    text.lines().find(|line| line.starts_with("raft_id")).map(str::to_owned)
}

/// Starts a node that must not come back, and whose refusal has `words`.
async fn refused(cluster: &mut Cluster, i: usize, words: &str) -> Result<String, String> {
    let honest = |why: String| {
        if why.contains(words) { Ok(format!("refused: {why}")) } else { Err(format!("did not come back: {why}")) }
    };
    if let Err(error) = cluster.start(i).await {
        return honest(error.to_string());
    }
    let node = Arc::clone(cluster.node(i));
    tokio::select! {
        why = node.wait_fatal() => honest(why),
        () = until("it is ready", async || node.is_ready().is_ok()) => Err("it was taken back".to_owned()),
    }
}
