//! What is done to the cells on simulated disks, and what is looked at.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::cli::http_client::{Call, Client, Endpoint};
use stemedb::node::Node;
use stemedb::node::disk::DiskState;
use stemedb::state::machine::newest_checkpoint;
use stemedb_raft::disk::sim::{Kind, SimDisk, SyncFault};

use super::harm::{bit_of_entry, inflict};
use super::load::{Running, until};
use super::sim::{Cluster, copy_folder};
use super::table::{Act, Harm, Outcome, Victim};

const EIO: i32 = 5;

/// Of each sync of a node that lags.
const LAGS_BY: Duration = Duration::from_millis(300);

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
            let sound = inflict(cluster, i, harm, rng);
            running.more().await;
            match (back(cluster, running, i).await, sound) {
                // A file that nothing replaces: the start names it, and works once it is put back.
                (Err(why), Some((path, sound))) if why.contains(&path.display().to_string()) => {
                    std::fs::remove_file(&path).unwrap();
                    std::fs::rename(sound, &path).unwrap();
                    back(cluster, running, i).await?;
                    let name = path.file_name().unwrap().display();
                    Ok(format!("does not start, and names `{name}`; with a good one it comes back with everything"))
                }
                (came, _) => came,
            }
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
        Act::DamageAndOneLagging => {
            let other = (i + 1) % 3;
            down(cluster, running, i, async |_| ()).await;
            inflict(cluster, i, Harm::RandomBlock, rng);
            cluster.disks[other].delay(Kind::Sync, "", LAGS_BY);
            let came = back(cluster, running, i).await;
            running.more().await;
            cluster.disks[other].release();
            came
        }
        Act::EachInAnotherEntry => {
            for node in 0..3 {
                running.load.set_up(node, false);
                cluster.stop(node).await;
                bit_of_entry(cluster, node, 3 + node * 2, rng);
            }
            for node in 0..3 {
                begin(cluster, node).await?;
            }
            cluster.ready().await;
            (0..3).for_each(|node| running.load.set_up(node, true));
            Ok("all come back with everything".to_owned())
        }
        Act::Quota => {
            cluster.disks[i].set_inodes_left(Some(0));
            let is_full = |cluster: &Cluster| cluster.node(i).health().disk.state == DiskState::Full;
            fill(cluster, (i + 1) % 3, is_full).await;
            until("another leader", async || !cluster.node(i).is_leader_with_quorum()).await;
            cluster.leader(Some(i)).await;
            running.more().await;
            cluster.disks[i].set_inodes_left(None);
            until("it says that it has room", async || cluster.node(i).health().disk.state == DiskState::Ok).await;
            Ok("says full, another leads, clears itself".to_owned())
        }
        Act::AllOldCopies => all_old_copies(cluster, running).await,
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
        Act::WipedAndOneLagging => {
            let other = (i + 1) % 3;
            down(cluster, running, i, async |_| ()).await;
            wipe(cluster, i);
            cluster.disks[other].delay(Kind::Sync, "", LAGS_BY);
            let came = back(cluster, running, i).await;
            cluster.disks[other].release();
            came
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

/// Each node is stopped, copied and started again, one after the other; then all get their copies back. Each of them but
/// the last was seen by a later copy in a newer run. The real files bring everything back.
async fn all_old_copies(cluster: &mut Cluster, running: &Running) -> Result<String, String> {
    let of = |cluster: &Cluster, what: &str, i: usize| cluster.dir.path().join(format!("{what}-{i}"));
    let mut disks = Vec::new();
    for i in 0..3 {
        down(cluster, running, i, async |_| ()).await;
        copy_folder(&cluster.folder(i), &of(cluster, "old", i));
        disks.push(cluster.disks[i].fork());
        back(cluster, running, i).await?;
        running.more().await;
    }
    for (i, disk) in disks.iter_mut().enumerate() {
        running.load.set_up(i, false);
        cluster.stop(i).await;
        std::fs::rename(cluster.folder(i), of(cluster, "real", i)).unwrap();
        std::fs::rename(of(cluster, "old", i), cluster.folder(i)).unwrap();
        std::mem::swap(&mut cluster.disks[i], disk);
    }
    let mut refused = [true; 3];
    for (i, refused) in refused.iter_mut().enumerate() {
        // One whose peers are there already may be refused at once.
        *refused = cluster.start(i).await.is_err();
    }
    let fatal = async |i: usize| match refused[i] {
        true => true,
        false => tokio::time::timeout(crate::rig::HANG, cluster.node(i).wait_fatal()).await.is_ok(),
    };
    let (first, second) = tokio::join!(fatal(0), fatal(1));
    let serves = cluster.up().into_iter().any(|i| cluster.node(i).is_leader_with_quorum());
    for (i, disk) in disks.iter_mut().enumerate() {
        cluster.stop(i).await;
        std::fs::remove_dir_all(cluster.folder(i)).unwrap();
        std::fs::rename(of(cluster, "real", i), cluster.folder(i)).unwrap();
        std::mem::swap(&mut cluster.disks[i], disk);
    }
    for i in 0..3 {
        begin(cluster, i).await?;
    }
    cluster.ready().await;
    (0..3).for_each(|i| running.load.set_up(i, true));
    match (first, second, serves) {
        (true, true, false) => {
            Ok("two are refused, and the third leads nobody; the real files bring all back".to_owned())
        }
        other => Err(format!("refused, refused, serves: {other:?}")),
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
