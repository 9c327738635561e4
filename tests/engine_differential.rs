//! The engine against a `BTreeMap`, with the same random operations.
//!
//! Few keys and many overwrites, because that is where lsm-tree once read stale values silently.
//! Rotations, flushes, compactions, snapshots that stay open, reopening and kills come in any order.
//! A kill drops the engine without a flush; what is then on disk must be exactly the state of one
//! of the sealed memtables, and the run goes on from there as a replay of the log would.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::state::engine::lsm::{LsmEngine, LsmOptions};
use stemedb::state::engine::{AppliedState, Snapshot, StateRead, WriteBatch};

/// Threads that share the seeds.
const LANES: u64 = 3;

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

struct Run {
    engine: LsmEngine,
    written: Rows,
    published: Rows,
    /// The rows at each rotation of this process and the one on disk before, by fact index.
    sealed: BTreeMap<u64, Rows>,
    /// Fact index up to which a flush was waited for.
    flushed: u64,
    fact_index: u64,
    open: Vec<(Snapshot, Rows)>,
}

fn options(compaction: bool) -> LsmOptions {
    LsmOptions { memtable_bytes_max: 4 * 1024, cache_bytes: 256 * 1024, compaction, ..LsmOptions::default() }
}

fn key(rng: &mut StdRng, keys: u32) -> Vec<u8> {
    let n = rng.random_range(0..keys);
    // Keys that are prefixes of each other, and long ones.
    match n % 4 {
        0 => format!("k{n}").into_bytes(),
        1 => format!("k{}\0x", n / 2).into_bytes(),
        2 => vec![b'k'; 1 + n as usize],
        _ => format!("m{n:05}/{}", "y".repeat(n as usize % 60)).into_bytes(),
    }
}

fn user_rows(read: &dyn StateRead, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Vec<(Vec<u8>, Vec<u8>)> {
    read.scan(from, to)
        .map(|row| row.unwrap())
        .filter(|(key, _)| !key.starts_with(b"m~"))
        .map(|(key, value)| (key.to_vec(), value.to_vec()))
        .collect()
}

fn check_all(read: &dyn StateRead, rows: &Rows, what: &str) {
    let found = user_rows(read, Bound::Unbounded, Bound::Unbounded);
    let expected: Vec<_> = rows.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    assert_eq!(expected, found, "{what}");
}

impl Run {
    fn entry(&mut self, rng: &mut StdRng, keys: u32) {
        for _ in 0..rng.random_range(1..3) {
            let mut batch = WriteBatch::default();
            for _ in 0..rng.random_range(1..12) {
                let key = key(rng, keys);
                if rng.random_bool(0.25) {
                    self.written.remove(&key);
                    batch.delete(key);
                } else {
                    let value = vec![rng.random::<u8>(); rng.random_range(0..80)];
                    self.written.insert(key.clone(), value.clone());
                    batch.put(key, value);
                }
            }
            self.engine.write(&batch).unwrap();
            // Readers see nothing of it, the apply thread all of it.
            if rng.random_bool(0.1) {
                check_all(&self.engine.snapshot(), &self.published, "unpublished rows");
                check_all(&self.engine.written(), &self.written, "written rows");
            }
        }
        self.fact_index += 1;
        self.engine.publish();
        self.published.clone_from(&self.written);
    }

    fn rotate(&mut self) {
        let applied = AppliedState { fact_index: self.fact_index, ..AppliedState::default() };
        self.engine.rotate(&applied, &WriteBatch::default()).unwrap();
        self.sealed.insert(self.fact_index, self.written.clone());
    }

    fn read(&mut self, rng: &mut StdRng, keys: u32) {
        let (from, to) = (key(rng, keys), key(rng, keys));
        let bound = |key: &[u8], kind: u32| match kind {
            0 => Bound::Included(key.to_vec()),
            1 => Bound::Excluded(key.to_vec()),
            _ => Bound::Unbounded,
        };
        let (from, to) = (bound(&from, rng.random_range(0..3)), bound(&to, rng.random_range(0..3)));
        let slices = |b: &Bound<Vec<u8>>| -> Bound<Vec<u8>> { b.clone() };
        let point = key(rng, keys);
        let fresh = self.engine.snapshot();
        let held = self.open.iter().map(|(snapshot, rows)| (snapshot, rows));
        for (read, rows) in held.chain([(&fresh, &self.published)]) {
            assert_eq!(rows.get(&point).cloned().map(Bytes::from), read.get(&point).unwrap(), "get {point:?}");
            let expected: Vec<_> = rows
                .iter()
                .filter(|(k, _)| {
                    let after = match &from {
                        Bound::Included(f) => *k >= f,
                        Bound::Excluded(f) => *k > f,
                        Bound::Unbounded => true,
                    };
                    let before = match &to {
                        Bound::Included(t) => *k <= t,
                        Bound::Excluded(t) => *k < t,
                        Bound::Unbounded => true,
                    };
                    after && before
                })
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
            let (from, to) = (slices(&from), slices(&to));
            let found = user_rows(read, from.as_ref().map(Vec::as_slice), to.as_ref().map(Vec::as_slice));
            assert_eq!(expected, found, "scan {from:?} {to:?}");
        }
    }

    /// Ends the engine without a flush and opens what is on disk.
    fn reopen(&mut self, dir: &Path, options: LsmOptions) {
        self.open.clear();
        self.engine.clone().close();
        let placeholder = LsmEngine::open(tempfile::tempdir().unwrap().path(), options.clone());
        drop(std::mem::replace(&mut self.engine, placeholder.unwrap()));
        self.engine = LsmEngine::open(dir, options).unwrap();
        let at = self.engine.applied().fact_index;
        assert!(at >= self.flushed, "a flush that was waited for is lost: {at} < {}", self.flushed);
        let rows = self.sealed.get(&at).unwrap_or_else(|| panic!("no memtable ended at {at}")).clone();
        check_all(&self.engine.snapshot(), &rows, "after reopening");
        self.sealed = BTreeMap::from([(at, rows.clone())]);
        self.written.clone_from(&rows);
        self.published = rows;
        (self.fact_index, self.flushed) = (at, at);
    }
}

fn run(seed: u64, steps: u32) {
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let keys = [3, 12, 60, 400][seed as usize % 4];
    // With and without the background thread, so that compactions also come at chosen moments.
    let options = options(seed.is_multiple_of(2));
    let mut run = Run {
        engine: LsmEngine::open(dir.path(), options.clone()).unwrap(),
        written: Rows::new(),
        published: Rows::new(),
        sealed: BTreeMap::from([(0, Rows::new())]),
        flushed: 0,
        fact_index: 0,
        open: Vec::new(),
    };
    for step in 0..steps {
        match rng.random_range(0..100) {
            0..55 => run.entry(&mut rng, keys),
            55..75 => run.read(&mut rng, keys),
            75..83 => run.rotate(),
            83..86 => {
                run.engine.flush_blocking().unwrap();
                run.flushed = run.engine.persisted().fact_index;
            }
            86..90 => {
                run.engine.compact_blocking(rng.random_bool(0.4)).unwrap();
            }
            90..96 => {
                if run.open.len() >= 5 {
                    let (snapshot, rows) = run.open.remove(rng.random_range(0..run.open.len()));
                    check_all(&snapshot, &rows, "a snapshot held for long");
                }
                run.open.push((run.engine.snapshot(), run.published.clone()));
            }
            96..98 => run.open.clear(),
            98 => {
                run.rotate();
                run.engine.flush_blocking().unwrap();
                run.flushed = run.fact_index;
                run.reopen(dir.path(), options.clone());
            }
            _ => run.reopen(dir.path(), options.clone()), // a kill
        }
        if run.engine.wants_rotation() {
            run.rotate();
        }
        assert!(run.engine.failed().is_none(), "step {step}: {:?}", run.engine.failed());
    }
    check_all(&run.engine.snapshot(), &run.published, "at the end");
}

#[test]
fn the_engine_is_a_sorted_map() {
    let (seeds, steps) = if std::env::var_os("STEMEDB_TEST_FULL").is_some() { (200, 3_000) } else { (12, 500) };
    println!("{seeds} seeds of {steps} steps");
    // They wait for their disks more than they compute, and no seed knows of another one.
    std::thread::scope(|scope| {
        for lane in 0..LANES {
            scope.spawn(move || {
                for seed in (lane..seeds).step_by(LANES as usize) {
                    println!("seed {seed}");
                    run(seed, steps);
                }
            });
        }
    });
}
