//! One log under random work that ends between any two changes of its disk, the changes of its own start
//! included: by a power cut, by kill -9 (and a power cut later), by a sync that fails, or by any other change that
//! fails, on ext4, XFS and Btrfs; now and then one copy of the hard state rots meanwhile. What was acknowledged is there, what is there was asked for, and a refusal to start is only ever *ask*.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod common;

use std::{collections::BTreeMap, path::Path};

use common::{append, contents, entry, lockstep, options};
use openraft::storage::RaftLogStorage;
use rand::{Rng, SeedableRng, rngs::StdRng};
use stemedb_raft::{
    OpenError, Vote, WalStore,
    disk::sim::{FileSystem, SimDisk, SyncFault},
    frame::log_id,
};

fn seeds() -> u64 {
    if std::env::var_os("STEMEDB_TEST_FULL").is_some() { 4000 } else { 400 }
}

/// What the log promised.
#[derive(Default)]
struct Promises {
    /// Acknowledged contents by index.
    acked: BTreeMap<u64, String>,
    /// Everything that was ever asked for, by index.
    asked: BTreeMap<u64, Vec<String>>,
    /// A truncation or purge whose answer was never seen may have happened.
    maybe_cut: Option<u64>,
    purged_acked: u64,
    purged_maybe: u64,
    vote_acked: Option<Vote>,
    vote_maybe: Option<Vote>,
    next: u64,
    term: u64,
    never_opened: bool,
}

async fn work(store: &mut WalStore, promises: &mut Promises, rng: &mut StdRng) -> bool {
    match rng.random_range(0..10) {
        0 if promises.next > promises.purged_maybe + 2 => {
            let end = rng.random_range(promises.purged_maybe + 1..promises.next);
            promises.maybe_cut = Some(end);
            let last = log_id(promises.term, end - 1);
            if store.truncate_after(Some(last)).await.is_err() {
                return false;
            }
            promises.acked.retain(|index, _| *index < end);
            promises.maybe_cut = None;
            promises.next = end;
            promises.term += 1;
        }
        1 if promises.next > promises.purged_maybe + 1 => {
            let end = rng.random_range(promises.purged_maybe + 1..promises.next);
            promises.purged_maybe = end;
            let Some(id) = store.reader().log_id_at(end - 1) else { panic!("entry {} is gone", end - 1) };
            if store.purge(id).await.is_err() {
                return false;
            }
            promises.purged_acked = end;
        }
        2 => {
            let vote = Vote::new(promises.term, rng.random_range(1..4));
            promises.vote_maybe = Some(vote);
            if store.save_vote(&vote).await.is_err() {
                return false;
            }
            promises.vote_acked = Some(vote);
        }
        _ => {
            let count = rng.random_range(1..8);
            let term = promises.term;
            let make = |i: u64| {
                let text = format!("{term}/{i}/{}", "y".repeat((i as usize * 977) % 12_000));
                entry(term, i, &text)
            };
            let entries: Vec<_> = (promises.next..promises.next + count).map(make).collect();
            let lines: Vec<_> = entries.iter().map(|e| (e.log_id.index(), common::text_of(e))).collect();
            for (index, text) in &lines {
                promises.asked.entry(*index).or_default().push(text.clone());
            }
            promises.next += count;
            if append(store, entries).await.is_err() {
                return false;
            }
            promises.acked.extend(lines);
        }
    }
    true
}

/// False when the log cannot even be read: its disk is gone already.
fn check(store: &WalStore, promises: &mut Promises, seed: u64) -> bool {
    let mut found = BTreeMap::new();
    let Ok(lines) = contents(store) else { return false };
    for line in lines {
        let mut parts = line.splitn(3, ':');
        let index: u64 = parts.next().unwrap().parse().unwrap();
        parts.next();
        found.insert(index, parts.next().unwrap().to_owned());
    }
    for (index, text) in &promises.acked {
        let may_miss = promises.maybe_cut.is_some_and(|end| *index >= end) || *index < promises.purged_maybe;
        match found.get(index) {
            Some(there) => assert_eq!(there, text, "seed {seed}: entry {index} has other contents"),
            None => assert!(may_miss, "seed {seed}: acknowledged entry {index} is lost"),
        }
    }
    for (index, text) in &found {
        assert!(promises.asked[index].contains(text), "seed {seed}: entry {index} was never asked for");
    }
    let vote = store.reader().vote();
    assert!(vote == promises.vote_acked || vote == promises.vote_maybe, "seed {seed}: vote {vote:?}");
    promises.vote_acked = vote;
    promises.vote_maybe = vote;
    promises.maybe_cut = None;
    promises.acked = found;
    let end = promises.acked.keys().last().map(|i| i + 1);
    promises.next = end.unwrap_or(0).max(store.handle().purged().map(|id| id.index() + 1).unwrap_or(0));
    promises.purged_maybe = promises.purged_maybe.max(promises.purged_acked);
    true
}

/// How a life of the process ends.
#[derive(Clone, Copy, Debug)]
enum Ending {
    PowerCut,
    Kill,
    FailedSync(SyncFault),
    FailedChange,
}

impl Ending {
    fn random(rng: &mut StdRng, file_system: FileSystem) -> Self {
        match rng.random_range(0..5) {
            0 | 1 => Self::PowerCut,
            2 => Self::Kill,
            3 => Self::FailedSync(file_system.sync_fault()),
            _ => Self::FailedChange,
        }
    }

    /// Arranges for it, some changes from now.
    fn arm(self, sim: &SimDisk, rng: &mut StdRng) {
        // A start makes about ten changes: a third of the lives ends in it.
        let changes = if rng.random_bool(0.3) { rng.random_range(0..14) } else { rng.random_range(0..80) };
        match self {
            Self::PowerCut | Self::Kill => sim.lose_power_after(changes),
            Self::FailedSync(fault) => sim.fail_sync_after(changes / 3, fault),
            Self::FailedChange => sim.fail_change_after(changes, 5),
        }
    }

    /// What is left when the next process starts.
    fn leave(self, sim: &SimDisk, rng: &mut StdRng) {
        match self {
            Self::PowerCut => sim.power_cut(rng),
            Self::Kill => sim.kill(),
            Self::FailedSync(_) | Self::FailedChange => {
                sim.kill();
                if rng.random_bool(0.5) {
                    sim.evict();
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_acknowledged_is_lost() {
    let (mut opened, mut asks, mut ends) = (0, 0, 0);
    for seed in 0..seeds() {
        let mut rng = StdRng::seed_from_u64(seed);
        let file_system = FileSystem::ALL[seed as usize % 3];
        let sim = SimDisk::with_file_system(file_system);
        let mut promises = Promises { term: 1, never_opened: true, ..Promises::default() };
        let mut halved = false;
        for life in 0..8 {
            let ending = Ending::random(&mut rng, file_system);
            // Half of the seeds are whole stories; the other half has the log's threads beside each other.
            let options = match seed % 2 {
                0 => lockstep(Path::new("/wal"), seed * 8 + life),
                _ => options(Path::new("/wal")),
            };
            ending.arm(&sim, &mut rng);
            let mut has_both_copies = false;
            match WalStore::open(sim.shared(), options) {
                Ok((mut store, _)) => {
                    opened += 1;
                    promises.never_opened = false;
                    has_both_copies = true;
                    if check(&store, &mut promises, seed) {
                        promises.term += 1;
                        while work(&mut store, &mut promises, &mut rng).await {}
                    }
                    let closing = tokio::task::spawn_blocking(move || store.handle().close());
                    assert!(closing.await.unwrap().is_err(), "seed {seed}: a log without a disk closed cleanly");
                }
                Err(OpenError::Ask(_)) => {
                    asks += 1;
                    break;
                }
                // The very first write of an empty folder failed half way. Nobody can tell that from a vote that is lost.
                Err(OpenError::Refuse(_)) if promises.never_opened && halved => break,
                // The life ended during the start.
                Err(OpenError::Io { .. }) => {}
                Err(other) => panic!("seed {seed}: {other}\n{:?}", sim.operations()),
            }
            ends += 1;
            halved = matches!(ending, Ending::FailedChange);
            ending.leave(&sim, &mut rng);
            // A write that failed may have left half of one copy: the other must not rot then, too.
            if has_both_copies && !matches!(ending, Ending::FailedChange) && rng.random_bool(0.2) {
                // Whatever was acknowledged is in either copy of the hard state.
                let copy = if rng.random_bool(0.5) { "/wal/hard-state.1" } else { "/wal/hard-state.2" };
                sim.corrupt(Path::new(copy), |bytes| bytes.fill(0x5a)).unwrap();
            }
        }
    }
    println!("{} seeds, {ends} ends, {opened} opened, {asks} asked the peers", seeds());
    assert!(opened > seeds(), "most starts were refused: {asks} of {ends}");
}
