//! Damaged logs with peers at hand: what is repaired, what is cut, what waits, and what must be rebuilt. Never other
//! data, never less than was acknowledged.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use common::{Found, SEGMENT_BYTES, append, ask_once, begin, close, contents, entry, open_sim, settle, slice};
use openraft::storage::RaftLogStorage;
use rand::{Rng, SeedableRng, rngs::StdRng};
use stemedb_raft::{
    EntrySource, PendingLog, Vote, WalStore,
    disk::sim::{SimDisk, SyncFault},
    frame::{MARK_OFFSETS, ROW_BYTES, ROWS_OFFSET, log_id},
    index::segment_name,
    scan::scan_segment,
};

/// Of the bits that are alike to a scan of the segment, every how many-th has the whole log opened and repaired.
const ALIKE_STEP: usize = 31;

fn full() -> bool {
    std::env::var_os("STEMEDB_TEST_FULL").is_some()
}

fn path(segment: u64) -> PathBuf {
    Path::new("/wal").join(segment_name(segment))
}

fn text(index: u64) -> String {
    format!("{index} {}", "t".repeat((index as usize * 977) % 6_000))
}

async fn closed(store: WalStore) {
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
}

/// A log of several segments, as a cluster at rest leaves it. Written once for each node: no two have the same bytes.
async fn written(entries: u64) -> SimDisk {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    store.save_vote(&Vote::new_committed(2, 1)).await.unwrap();
    for first in (0..entries).step_by(3) {
        append(&mut store, (first..(first + 3).min(entries)).map(|i| entry(2, i, &text(i))).collect()).await.unwrap();
    }
    store.save_committed(Some(log_id(2, entries - 1))).await.unwrap();
    closed(store).await;
    sim
}

async fn cluster(entries: u64) -> (Vec<SimDisk>, Vec<String>) {
    let sims = vec![written(entries).await, written(entries).await, written(entries).await];
    let store = open_sim(&sims[0].fork()).unwrap();
    let expected = contents(&store).unwrap();
    closed(store).await;
    (sims, expected)
}

fn forks(sims: &[SimDisk]) -> Vec<SimDisk> {
    sims.iter().map(SimDisk::fork).collect()
}

fn segments(sim: &SimDisk) -> Vec<u64> {
    let names = sim.shared().list(Path::new("/wal")).unwrap();
    names.iter().filter_map(|f| stemedb_raft::index::segment_number(&f.name)).collect()
}

fn bytes_of(sim: &SimDisk, path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    sim.corrupt(path, |b| bytes = b.clone()).unwrap();
    bytes
}

fn pending(sim: &SimDisk) -> PendingLog {
    match begin(sim) {
        Found::Waits(pending) => pending,
        Found::Ready(..) => panic!("the damage was not noticed"),
        Found::Lost(why) | Found::Refused(why) => panic!("{why}"),
    }
}

async fn sources(sims: &[SimDisk]) -> (Vec<WalStore>, Vec<(u64, EntrySource)>) {
    let stores: Vec<WalStore> = sims.iter().map(|sim| open_sim(sim).unwrap()).collect();
    let sources = (2..).zip(stores.iter().map(|store| store.handle().source())).collect();
    (stores, sources)
}

#[derive(Debug, Default)]
struct Tally {
    whole: usize,
    repaired: usize,
    waits: usize,
    lost: usize,
}

/// What came of a damage.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Came {
    Whole,
    Repaired,
    Waits,
    Lost,
}

impl Tally {
    fn add(&mut self, came: Came) {
        match came {
            Came::Whole => self.whole += 1,
            Came::Repaired => self.repaired += 1,
            Came::Waits => self.waits += 1,
            Came::Lost => self.lost += 1,
        }
    }

    /// What opened has everything, and the vote; what did not open says so.
    async fn count(&mut self, found: Found, expected: &[String], what: &str) -> Came {
        let came = match found {
            Found::Ready(store, report) => {
                assert_eq!(contents(&store).unwrap(), expected, "{what}: other entries");
                assert_eq!(store.reader().vote(), Some(Vote::new_committed(2, 1)), "{what}: another vote");
                closed(store).await;
                if report.repaired.is_empty() { Came::Whole } else { Came::Repaired }
            }
            Found::Waits(_) => Came::Waits,
            Found::Lost(_) => Came::Lost,
            Found::Refused(why) => panic!("{what}: {why}"),
        };
        self.add(came);
        came
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_bit_is_repaired_refused_or_harmless() {
    let step = if full() { 1 } else { 97 };
    let (sims, expected) = cluster(24).await;
    let (stores, sources) = sources(&sims[1..]).await;
    let newest = *segments(&sims[0]).last().unwrap();
    assert!(newest >= 2, "nothing is sealed");
    let (mut tally, mut started) = (Tally::default(), 0);
    for segment in [1, newest] {
        let mut bytes = bytes_of(&sims[0], &path(segment));
        // As in `every_byte.rs`: what a scan tells apart is started, and every so many-th of what is alike to it.
        let mut kinds: HashMap<String, (usize, Came)> = HashMap::new();
        let near = |at: usize| bytes[at.saturating_sub(80)..(at + 80).min(bytes.len())].iter().any(|b| *b != 0);
        let worth = |bit: &usize| step == 1 || near(bit / 8) || bit.is_multiple_of(4099);
        let bits = (0..bytes.len() * 8).filter(worth).skip(slice().0).step_by(step * slice().1);
        for bit in bits.collect::<Vec<_>>() {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let kind = format!("{:?}", scan_segment(&bytes));
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Some((alike, came)) = kinds.get_mut(&kind) {
                *alike += 1;
                if !alike.is_multiple_of(ALIKE_STEP) {
                    tally.add(*came);
                    continue;
                }
            }
            let sim = sims[0].fork();
            sim.corrupt(&path(segment), |b| b[bit / 8] ^= 1 << (bit % 8)).unwrap();
            let found = match begin(&sim) {
                Found::Waits(pending) => ask_once(pending, 1, &[1, 2, 3], &sources),
                found => found,
            };
            let what = format!("segment {segment}, bit {bit}");
            let came = tally.count(found, &expected, &what).await;
            started += 1;
            assert_eq!(kinds.entry(kind).or_insert((1, came)).1, came, "{what}: a scan does not tell all that matters");
        }
    }
    println!("{tally:?}, every {step}. bit; {started} starts of the whole log");
    assert!(slice().1 > 1 || tally.repaired > 100 && tally.whole > 10, "{tally:?}");
    assert_eq!((tally.waits, tally.lost), (0, 0), "a single bit cost more than its entry");
    for store in stores {
        closed(store).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn random_damage_is_never_served_and_never_spreads() {
    // Half of them blocks with other content, half of them blocks that cannot be read.
    let seeds = if full() { 10_000 } else { 120 };
    let (sims, expected) = cluster(30).await;
    let (mut tally, mut cases) = (Tally::default(), 0);
    for seed in (0..seeds).skip(slice().0).step_by(slice().1) {
        let mut rng = StdRng::seed_from_u64(seed);
        let nodes = forks(&sims);
        let victims = rng.random_range(1..=3);
        for sim in nodes.iter().take(victims) {
            for _ in 0..rng.random_range(1..4) {
                let files = sim.shared().list(Path::new("/wal")).unwrap();
                let files: Vec<_> = files.into_iter().filter(|f| f.bytes > 0 && f.name != "segment.spare").collect();
                let file = &files[rng.random_range(0..files.len())];
                let target = Path::new("/wal").join(&file.name);
                let block = if rng.random_bool(0.5) { 512 } else { 4096 };
                let at = rng.random_range(0..(file.bytes as usize).div_ceil(block)) * block;
                match if seed % 2 == 0 { rng.random_range(0..2) } else { rng.random_range(2..5) } {
                    0 => sim.set_unreadable(&target, [at / 4096]).unwrap(),
                    1 => sim.set_unreadable(&target, (at / 4096)..(at / 4096 + 3)).unwrap(),
                    how => {
                        let noise: Vec<u8> = (0..block).map(|_| rng.random()).collect();
                        let put = |b: &mut Vec<u8>| {
                            let end = (at + block).min(b.len());
                            match how {
                                2 => b[at..end].fill(0),
                                3 => b[at..end].copy_from_slice(&noise[..end - at]),
                                // Another block's content was written here.
                                _ => b.copy_within(0..end - at, at),
                            }
                        };
                        sim.corrupt(&target, put).unwrap();
                    }
                }
            }
        }
        cases += 1;
        for (node, found) in settle(&nodes).into_iter().enumerate() {
            tally.count(found, &expected, &format!("seed {seed}, node {}", node + 1)).await;
        }
    }
    println!("{cases} cases: {tally:?}");
    assert!(tally.repaired > tally.waits + tally.lost, "{tally:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_runbook_tells_people_to_do_is_survived() {
    let (sims, expected) = cluster(30).await;
    let newest = *segments(&sims[0]).last().unwrap();
    type Action = (&'static str, fn(&SimDisk, u64), &'static str);
    let actions: [Action; 8] = [
        (
            "delete empty files and *.tmp",
            |sim, _| drop(sim.shared().create(&Path::new("/wal").join("left.tmp"))),
            "whole",
        ),
        (
            "leave test.dat and *.corrupted behind",
            |sim, _| {
                for name in ["test.dat", "segment.001.wal.corrupted"] {
                    sim.shared().create(&Path::new("/wal").join(name)).unwrap().write_at(b"not ours", 0).unwrap();
                }
            },
            "whole",
        ),
        (
            "gzip the first segment",
            |sim, _| {
                sim.shared().rename(&path(1), Path::new("/wal/segment.001.wal.gz")).unwrap();
            },
            "repaired",
        ),
        (
            "move a segment away",
            |sim, _| sim.shared().rename(&path(2), Path::new("/backup/segment.002.wal")).unwrap(),
            "repaired",
        ),
        ("delete a segment", |sim, _| sim.shared().remove(&path(2)).unwrap(), "repaired"),
        ("empty a segment", |sim, _| sim.corrupt(&path(2), Vec::clear).unwrap(), "repaired"),
        ("cut a segment short", |sim, _| sim.corrupt(&path(2), |b| b.truncate(30_000)).unwrap(), "repaired"),
        ("delete the newest segment", |sim, newest| sim.shared().remove(&path(newest)).unwrap(), "lost"),
    ];
    for (what, action, outcome) in actions {
        let nodes = forks(&sims);
        action(&nodes[0], newest);
        let mut found = settle(&nodes);
        for healthy in found.drain(1..) {
            Tally::default().count(healthy, &expected, what).await;
        }
        let mut tally = Tally::default();
        let unknown = match &found[0] {
            Found::Ready(_, report) => report.unknown_files.clone(),
            _ => vec![],
        };
        tally.count(found.remove(0), &expected, what).await;
        let got = [("whole", tally.whole), ("repaired", tally.repaired), ("waits", tally.waits), ("lost", tally.lost)];
        assert_eq!(got.iter().find(|(_, n)| *n == 1).unwrap().0, outcome, "{what}");
        if what.starts_with("leave") {
            assert_eq!(unknown, ["segment.001.wal.corrupted", "test.dat"], "{what}");
        }
        if outcome == "repaired" {
            // It needs nobody the next time, whatever was not synced.
            nodes[0].lose_unsynced();
            let store = open_sim(&nodes[0]).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(contents(&store).unwrap(), expected, "{what}");
            closed(store).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_failed_sync_means_the_same_before_and_after_the_page_cache_is_evicted() {
    for fault in [SyncFault::PagesMarkedClean, SyncFault::ContentsReverted] {
        for target in ["segment.001", "hard-state.1", "hard-state.2"] {
            let sim = SimDisk::new();
            let mut store = open_sim(&sim).unwrap();
            store.save_vote(&Vote::new(1, 1)).await.unwrap();
            append(&mut store, vec![entry(1, 0, "acknowledged")]).await.unwrap();
            tokio::task::spawn_blocking(move || close(store)).await.unwrap();
            let mut store = open_sim(&sim).unwrap();
            sim.fail_next_sync(target, fault);
            let failed = match target {
                "segment.001" => append(&mut store, vec![entry(1, 1, "never acknowledged")]).await,
                _ => store.save_vote(&Vote::new(5, 1)).await,
            };
            assert!(failed.is_err(), "{target}: acknowledged");
            let _latched = tokio::task::spawn_blocking(move || store.handle().close()).await.unwrap();
            sim.kill();
            let mut states = Vec::new();
            for evicted in [false, true] {
                let copy = sim.fork();
                if evicted {
                    copy.evict();
                }
                let store = open_sim(&copy).unwrap();
                // And it stays what it is when the power goes right after the start.
                copy.kill();
                let seen = (contents(&store).unwrap_or_default(), store.reader().vote());
                drop(store);
                let cut = copy.fork();
                cut.lose_unsynced();
                let store = open_sim(&cut).unwrap();
                states.push((contents(&store).unwrap(), store.reader().vote(), seen.1));
                closed(store).await;
            }
            assert_eq!(states[0], states[1], "{target}, {fault:?}: the state depends on the page cache");
            assert_eq!(states[0].0[0], "0:1:acknowledged");
        }
    }
}

/// Five entries, the last two in a group above D; entry 4's frame is torn and its row is there: only peers can tell.
async fn torn() -> SimDisk {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    store.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    append(&mut store, (0..3).map(|i| entry(1, i, &text(i))).collect()).await.unwrap();
    append(&mut store, (3..5).map(|i| entry(1, i, &text(i))).collect()).await.unwrap();
    closed(store).await;
    sim.corrupt(&path(1), |b| {
        let at = scan_segment(b).unwrap().entries[4].offset.unwrap() as usize;
        b[at..at + 72].fill(0);
        for mark in MARK_OFFSETS {
            b[mark as usize..mark as usize + 48].fill(0);
        }
    })
    .unwrap();
    sim
}

async fn peer(entries: std::ops::Range<u64>, term_of_last: u64) -> WalStore {
    let mut store = open_sim(&SimDisk::new()).unwrap();
    let last = entries.end - 1;
    let term = |i| if i == last { term_of_last } else { 1 };
    append(&mut store, entries.map(|i| entry(term(i), i, &text(i))).collect()).await.unwrap();
    store
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_is_cut_only_when_every_other_voter_never_had_it() {
    let (ends, differs, has) = (peer(0..4, 1).await, peer(0..5, 2).await, peer(0..5, 1).await);
    let [ends_at, differs_there, has_it] = [&ends, &differs, &has].map(|store| store.handle().source());
    let sim = torn().await;
    let try_with = |voters: &[u64], others: &[(u64, EntrySource)]| {
        let copy = sim.fork();
        let before = bytes_of(&copy, &path(1));
        let found = ask_once(pending(&copy), 1, voters, others);
        if matches!(found, Found::Waits(_)) {
            assert_eq!(bytes_of(&copy, &path(1)), before, "something was written before the decision");
        }
        found
    };
    let cut = try_with(&[1, 2, 3], &[(2, ends_at.clone()), (3, differs_there.clone())]);
    let Found::Ready(store, report) = cut else { panic!("it was not cut") };
    assert_eq!((contents(&store).unwrap().len(), report.tail_cut_from), (4, Some(4)));
    closed(store).await;
    let whole = try_with(&[1, 2, 3], &[(2, ends_at.clone()), (3, has_it.clone())]);
    let Found::Ready(store, report) = whole else { panic!("it was not repaired") };
    assert_eq!((contents(&store).unwrap().len(), report.repaired), (5, vec![4]));
    closed(store).await;
    let waits = |found| assert!(matches!(found, Found::Waits(_)));
    // One voter is silent; one that answers is no voter; nobody knows who votes.
    waits(try_with(&[1, 2, 3], &[(2, ends_at.clone())]));
    waits(try_with(&[1, 2, 3], &[(2, ends_at.clone()), (7, differs_there.clone())]));
    waits(try_with(&[], &[(2, ends_at.clone()), (3, differs_there.clone())]));
    waits(try_with(&[1, 2, 3], &[(2, ends_at), (3, EntrySource::lost())]));
    // Two torn logs and one that ends before: all three come up without it.
    let both = [sim.fork(), sim.fork()];
    let torn_there = pending(&both[1]).source();
    let found = ask_once(pending(&both[0]), 1, &[1, 2, 3], &[(2, torn_there), (3, ends.handle().source())]);
    let Found::Ready(store, _) = found else { panic!("torn above D counts as never") };
    closed(store).await;
    for store in [ends, differs, has] {
        closed(store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_hide_a_change_of_the_voters_is_not_decided_by_the_old_ones() {
    let sim = torn().await;
    // Entry 1 was durable, and nothing is left of what it was.
    sim.corrupt(&path(1), |b| {
        let at = scan_segment(b).unwrap().entries[1].offset.unwrap() as usize;
        b[at..at + 72].fill(0);
        b[ROWS_OFFSET as usize + ROW_BYTES..ROWS_OFFSET as usize + 2 * ROW_BYTES].fill(0);
    })
    .unwrap();
    // They have neither entry 4 nor anything that proves entry 1.
    let others = [peer(0..1, 1).await, peer(0..1, 1).await];
    let sources: Vec<_> = (2..).zip(others.iter().map(|store| store.handle().source())).collect();
    assert!(matches!(ask_once(pending(&sim), 1, &[1, 2, 3], &sources), Found::Waits(_)));
    for store in others {
        closed(store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_is_only_in_checkpoints_means_a_rebuild() {
    let (sims, _) = cluster(30).await;
    sims[0]
        .corrupt(&path(1), |b| {
            let at = scan_segment(b).unwrap().entries[2].offset.unwrap() as usize;
            b[at + 75] ^= 1;
        })
        .unwrap();
    let (mut stores, sources) = sources(&sims[1..]).await;
    for store in &mut stores {
        store.purge(log_id(2, 20)).await.unwrap();
    }
    assert!(matches!(ask_once(pending(&sims[0]), 1, &[1, 2, 3], &sources), Found::Lost(_)));
    for store in stores {
        closed(store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_that_cannot_be_written_is_not_tried_again() {
    let (sims, _) = cluster(12).await;
    sims[0]
        .corrupt(&path(1), |b| {
            let at = scan_segment(b).unwrap().entries[2].offset.unwrap() as usize;
            b[at + 75] ^= 1;
        })
        .unwrap();
    let (stores, sources) = sources(&sims[1..]).await;
    let waiting = pending(&sims[0]);
    sims[0].fail_next_sync("segment.001", SyncFault::PagesMarkedClean);
    let before = sims[0].operations().len();
    assert!(matches!(ask_once(waiting, 1, &[1, 2, 3], &sources), Found::Lost(_)));
    let after = sims[0].operations()[before..].to_vec();
    assert_eq!(after, ["write segment.001.wal", "sync segment.001.wal"], "the disk was touched again");
    for store in stores {
        closed(store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_that_is_killed_at_any_step_is_done_again() {
    let (sims, expected) = cluster(30).await;
    let (stores, sources) = sources(&sims[1..]).await;
    for broken in [
        |sim: &SimDisk| sim.shared().remove(&path(2)).unwrap(),
        |sim: &SimDisk| {
            sim.corrupt(&path(1), |b| {
                let at = scan_segment(b).unwrap().entries[2].offset.unwrap() as usize;
                b[at..at + 3000].fill(0);
            })
            .unwrap()
        },
    ] {
        for changes in 0..12 {
            let sim = sims[0].fork();
            broken(&sim);
            let waiting = pending(&sim);
            sim.lose_power_after(changes);
            let _ended = ask_once(waiting, 1, &[1, 2, 3], &sources);
            let mut rng = StdRng::seed_from_u64(changes);
            sim.power_cut(&mut rng);
            let found = match begin(&sim) {
                Found::Waits(waiting) => ask_once(waiting, 1, &[1, 2, 3], &sources),
                found => found,
            };
            let Found::Ready(store, _) = found else { panic!("killed after {changes} changes") };
            assert_eq!(contents(&store).unwrap(), expected, "killed after {changes} changes");
            closed(store).await;
        }
    }
    for store in stores {
        closed(store).await;
    }
    assert_eq!(SEGMENT_BYTES, 64 * 1024);
}
