//! A machine that is killed without a flush, again and again, against a twin that never is.
//!
//! Whatever the memtables, flushes, compactions, checkpoints and swaps of the killed one had reached,
//! the log from its persisted applied id on must lead to the same outcome of every command, the first
//! time and when it is replayed, and to the same rows.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)]

mod history;
mod killed;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use openraft::RaftSnapshotBuilder;
use openraft::storage::RaftStateMachine;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::node::{
    applier::{NodeApplier, restorer},
    vital::Vital,
};
use stemedb::state::apply::KeyLimits;
use stemedb::state::command::{CommandOutcome, EntryBody};
use stemedb::state::engine::lsm::LsmOptions;
use stemedb::state::engine::receive::CheckpointReceiver;
use stemedb::state::engine::{AppliedState, EngineError, StateRead, WriteBatch};
use stemedb::state::machine::{EntryApplier, MachineOptions, RestoreApplier, StateHandle, StateMachine};
use stemedb_raft::types::Entry;

use history::history;

/// Outcomes by the number of the entry's body.
#[derive(Default)]
pub struct Outcomes {
    /// As they were given first.
    first: Vec<Vec<CommandOutcome>>,
    /// Number of the next body.
    next: usize,
}

/// The node's applier, with every outcome compared to the one that was given first.
pub struct Recording {
    inner: NodeApplier,
    outcomes: Arc<Mutex<Outcomes>>,
}

impl EntryApplier for Recording {
    fn apply(
        &mut self,
        read: &dyn StateRead,
        log_index: u64,
        body: &EntryBody,
    ) -> Result<(WriteBatch, Vec<CommandOutcome>), EngineError> {
        let applied = self.inner.apply(read, log_index, body)?;
        let mut outcomes = self.outcomes.lock().unwrap();
        let number = outcomes.next;
        outcomes.next += 1;
        match outcomes.first.get(number) {
            Some(first) => assert_eq!(*first, applied.1, "replay of body {number}"),
            None => outcomes.first.push(applied.1.clone()),
        }
        Ok(applied)
    }
    fn save_keys(&mut self) -> Result<WriteBatch, EngineError> {
        self.inner.save_keys()
    }
    fn fact_index(&self) -> u64 {
        self.inner.fact_index()
    }
    fn log_time_ms(&self) -> u64 {
        self.inner.log_time_ms()
    }
    fn feature_level(&self) -> u32 {
        self.inner.feature_level()
    }
}

pub type Machine = StateMachine<Recording>;

/// A table small enough to fill: its bound is part of what must be the same.
const LIMITS: KeyLimits =
    KeyLimits { short_key_ms: 20_000, balancer_ms: 35_000, client_key_ms: 900_000, short_keys_max: 60 };

pub fn open(dir: &Path, memtable_bytes_max: u64, outcomes: &Arc<Mutex<Outcomes>>) -> Machine {
    let (inner, _) = restorer(LIMITS, Vital::default());
    let outcomes = Arc::clone(outcomes);
    let restore: RestoreApplier<Recording> = Arc::new(move |read: &dyn StateRead, applied: &AppliedState| {
        Ok(Recording { inner: inner(read, applied)?, outcomes: Arc::clone(&outcomes) })
    });
    let lsm = LsmOptions { memtable_bytes_max, ..LsmOptions::default() };
    StateMachine::open(MachineOptions { data_dir: dir.to_owned(), lsm }, restore).unwrap()
}

pub async fn apply(machine: &mut Machine, entries: &[Entry]) {
    let items = entries.iter().cloned().map(|entry| Ok((entry, None)));
    machine.apply(futures_util::stream::iter(items)).await.unwrap();
}

/// Number of bodies before log index `index`.
fn bodies(entries: &[Entry], index: u64) -> usize {
    let normal = |entry: &&Entry| matches!(entry.payload, openraft::EntryPayload::Normal(_));
    entries[..index as usize].iter().filter(normal).count()
}

/// Rows that every node has alike: not those that say what this one has saved, and when.
pub fn rows(handle: &StateHandle) -> BTreeMap<Bytes, Bytes> {
    let view = handle.view().unwrap();
    let rows = view.snapshot.scan(Bound::Unbounded, Bound::Unbounded).map(|row| row.unwrap());
    rows.filter(|(key, _)| !key.starts_with(b"mkeys") && !key.starts_with(b"m~engine/")).collect()
}

/// What both must agree on, at the end.
pub async fn assert_same(twin: &mut Machine, killed: &mut Machine) {
    assert_eq!(twin.applied_state().await.unwrap(), killed.applied_state().await.unwrap());
    let (twin, killed) = (twin.handle(), killed.handle());
    let (a, b) = (twin.view().unwrap().state, killed.view().unwrap().state);
    assert_eq!((a.fact_index, a.log_time_ms), (b.fact_index, b.log_time_ms));
    let (a, b) = (rows(&twin), rows(&killed));
    for (key, value) in &a {
        assert_eq!(Some(value), b.get(key), "row {:?}", key);
    }
    assert_eq!(a.len(), b.len());
}

/// Moves the twin's newest state over, as a node that fell behind gets it.
async fn install(twin: &mut Machine, killed: &mut Machine, dir: &Path) {
    let built = twin.try_create_snapshot_builder(true).await.unwrap().build_snapshot().await.unwrap();
    let mut receiver = CheckpointReceiver::begin(dir, &built.snapshot.manifest_bytes().unwrap()).unwrap();
    for file in built.snapshot.files() {
        let chunk = built.snapshot.read_chunk(&file.name, 0, usize::MAX).unwrap();
        receiver.write(&file.name, 0, &chunk).unwrap();
    }
    let received = receiver.finish().unwrap();
    killed.install_snapshot(&built.meta, received).await.unwrap();
}

async fn run(seed: u64) {
    const ENTRIES: u64 = 400;
    let entries = history(seed, ENTRIES);
    let mut rng = StdRng::seed_from_u64(seed ^ 0xABCD);
    let (twin_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let outcomes = Arc::new(Mutex::new(Outcomes::default()));
    let mut twin = open(twin_dir.path(), 64 << 20, &outcomes);
    let memtable_bytes = *[2 << 10, 16 << 10, 200 << 10].get(rng.random_range(0..3)).unwrap();
    let mut killed = open(dir.path(), memtable_bytes, &outcomes);
    let (mut twin_at, mut killed_at) = (0u64, 0u64);
    let (mut kills, mut replayed, mut installs) = (0, 0, 0);
    while killed_at < ENTRIES {
        let to = (killed_at + rng.random_range(1..60)).min(ENTRIES);
        if twin_at < to {
            outcomes.lock().unwrap().next = bodies(&entries, twin_at);
            apply(&mut twin, &entries[twin_at as usize..to as usize]).await;
            twin_at = to;
        }
        if rng.random_range(0..8) == 0 {
            install(&mut twin, &mut killed, dir.path()).await;
            (killed_at, installs) = (twin_at, installs + 1);
        } else {
            outcomes.lock().unwrap().next = bodies(&entries, killed_at);
            apply(&mut killed, &entries[killed_at as usize..to as usize]).await;
            killed_at = to;
        }
        match rng.random_range(0..6) {
            0 => killed.handle().engine().flush_blocking().unwrap(),
            1 => drop(killed.handle().engine().compact_blocking(true).unwrap()),
            2 => {
                let mut builder = killed.try_create_snapshot_builder(true).await.unwrap();
                if rng.random() {
                    builder.build_snapshot().await.unwrap();
                }
            }
            3 | 4 => {
                let handle = killed.handle();
                handle.close_blocking();
                drop((killed, handle));
                killed = open(dir.path(), memtable_bytes, &outcomes);
                let from = killed.applied_state().await.unwrap().0.map_or(0, |id| id.index + 1);
                assert!(from <= killed_at, "the tree is ahead of what was applied");
                (kills, replayed, killed_at) = (kills + 1, replayed + (killed_at - from), from);
            }
            _ => {}
        }
    }
    assert_same(&mut twin, &mut killed).await;
    println!("seed {seed}: {kills} kills, {replayed} entries replayed, {installs} checkpoints installed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_machine_ends_like_its_twin() {
    let seeds = std::env::var("STEMEDB_REPLAY_SEEDS").map_or(12, |text| text.parse().unwrap());
    for seed in 0..seeds {
        run(seed).await;
    }
}
