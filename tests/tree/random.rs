//! Random damage of every kind of file, as FAST'18 does it to the log: every read is right or an error.
//!
//! Blocks of 4 KiB that turn to noise or zeros, single bits, ends that are cut, blocks of another place,
//! reads that fail. A start that refuses is right as well; a checkpoint that does not verify is not used.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Bound;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::state::engine::checkpoint::Checkpoint;
use stemedb::state::engine::lsm::LsmEngine;
use stemedb::state::engine::{ErrorClass, Snapshot, StateRead, WriteBatch};
use tempfile::TempDir;

use crate::support::*;

type Model = BTreeMap<Bytes, Bytes>;

/// A folder in memory, where there is such a thing: each start syncs, and what a disk takes for that is hours for all
/// cases and says nothing here.
fn memory_dir() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A closed engine of several tables, and its rows.
fn tree_of(dir: &Path) -> Model {
    let engine = LsmEngine::open(dir, options()).unwrap();
    let mut model = Model::new();
    for round in 0..5u64 {
        let mut batch = WriteBatch::default();
        for n in 0..400u64 {
            let key = Bytes::from(format!("f{:04}", (n * 7 + round * 3) % 900));
            if (n + round) % 9 == 0 {
                model.remove(&key);
                batch.delete(key);
            } else {
                let noise = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round);
                let value = Bytes::from(format!("{round}-{n}-{noise:x}-{}", "z".repeat((n % 60) as usize)));
                model.insert(key.clone(), value.clone());
                batch.put(key, value);
            }
        }
        engine.write(&batch).unwrap();
        let applied = stemedb::state::engine::AppliedState { fact_index: round, ..Default::default() };
        engine.rotate(&applied, &WriteBatch::default()).unwrap();
    }
    engine.flush_blocking().unwrap();
    engine.close();
    model
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let current = fs::read(dir.join("current")).unwrap();
    let id = u64::from_le_bytes(current[..8].try_into().unwrap());
    let mut found = vec![dir.join("current"), dir.join(format!("v{id}"))];
    let mut tables: Vec<PathBuf> = fs::read_dir(dir.join("tables")).unwrap().map(|e| e.unwrap().path()).collect();
    tables.sort();
    found.extend(tables);
    found
}

const BLOCK: usize = 4096;

/// Damages the file; false when the damage changes nothing.
fn damage(rng: &mut StdRng, path: &Path, good: &[u8]) -> bool {
    let mut bad = good.to_vec();
    let blocks = bad.len().div_ceil(BLOCK);
    let at = rng.random_range(0..blocks) * BLOCK;
    let end = (at + BLOCK).min(bad.len());
    // Half of them are reads that fail.
    match if rng.random_bool(0.5) { 5 } else { rng.random_range(0..7) } {
        0 => rng.fill(&mut bad[at..end]),
        1 => bad[at..end].fill(0),
        2 => {
            let bit = rng.random_range(0..bad.len() * 8);
            bad[bit / 8] ^= 1 << (bit % 8);
        }
        3 => bad.truncate(rng.random_range(0..bad.len())),
        4 => {
            // A write that went elsewhere.
            let from = rng.random_range(0..blocks) * BLOCK;
            let length = (end - at).min(bad.len() - from);
            let block = good[from..from + length].to_vec();
            bad[at..at + length].copy_from_slice(&block);
        }
        5 => {
            fs::remove_file(path).unwrap();
            symlink("/proc/self/mem", path).unwrap(); // every read at its beginning is EIO
            return true;
        }
        _ => bad.extend_from_slice(&good[at..end]),
    }
    fs::write(path, &bad).unwrap();
    bad != good
}

/// How many reads were right, and how many were errors. Panics for a wrong one.
fn read_all(snapshot: &Snapshot, model: &Model, rng: &mut StdRng, what: &str) -> (usize, usize) {
    let (mut right, mut errors) = (0, 0);
    let mut count = |ok: bool| if ok { right += 1 } else { errors += 1 };
    for _ in 0..24 {
        let key = Bytes::from(format!("f{:04}", rng.random_range(0..920)));
        let found = snapshot.get(&key);
        if let Ok(found) = &found {
            assert_eq!(model.get(&key), found.as_ref(), "{what}: get {key:?}");
        }
        count(found.is_ok());
    }
    for _ in 0..3 {
        let from = format!("f{:04}", rng.random_range(0..900)).into_bytes();
        let to = format!("f{:04}", rng.random_range(0..900)).into_bytes();
        let bounds = (Bound::Included(from.as_slice()), Bound::Excluded(to.as_slice()));
        let mut expected =
            model.iter().filter(|(key, _)| key.as_ref() >= from.as_slice() && key.as_ref() < to.as_slice());
        let mut ended_well = true;
        for row in snapshot.scan(bounds.0, bounds.1) {
            let Ok((key, value)) = row else {
                ended_well = false;
                break;
            };
            assert_eq!(expected.next(), Some((&key, &value)), "{what}: scan");
        }
        assert!(!ended_well || expected.next().is_none(), "{what}: rows are missing from a scan");
        count(ended_well);
    }
    (right, errors)
}

#[derive(Debug, Default)]
struct Count {
    refused: usize,
    right: usize,
    errors: usize,
    harmless: usize,
}

/// One damage of a file before the start, or between start and reads. Everything is as before afterwards.
fn round(rng: &mut StdRng, dir: &Path, path: &Path, model: &Model, before_start: bool, count: &mut Count) {
    let good = fs::read(path).unwrap();
    let what = format!("{} {}", path.display(), if before_start { "before the start" } else { "while it runs" });
    let opened_before = (!before_start).then(|| LsmEngine::open(dir, options()).unwrap());
    if !damage(rng, path, &good) {
        count.harmless += 1;
    }
    let engine = opened_before.map_or_else(|| LsmEngine::open(dir, options()), Ok);
    match engine {
        Err(error) => {
            assert_eq!(ErrorClass::Damaged, error.class(), "{what}: {error}");
            assert!(file_of(&error).is_some(), "{what}: {error} names no file");
            count.refused += 1;
        }
        Ok(engine) => {
            let (right, errors) = read_all(&engine.snapshot(), model, rng, &what);
            if errors > 0 {
                assert!(engine.damage().borrow().as_ref().is_some_and(|d| d.file.as_deref() == Some(path)), "{what}");
            }
            count.right += right;
            count.errors += errors;
            assert!(engine.failed().is_none());
            engine.close();
        }
    }
    let _ = fs::remove_file(path);
    fs::write(path, good).unwrap();
}

#[test]
fn random_damage_never_gives_a_wrong_answer() {
    let rounds = if std::env::var_os("STEMEDB_TEST_FULL").is_some() { 10_000 } else { 400 };
    let dir = memory_dir();
    let model = tree_of(dir.path());
    let mut count = Count::default();
    for seed in (0..rounds).skip(slice().0).step_by(slice().1) {
        let mut rng = StdRng::seed_from_u64(seed);
        let all = files(dir.path());
        let path = all[rng.random_range(0..all.len())].clone();
        let before_start = rng.random();
        round(&mut rng, dir.path(), &path, &model, before_start, &mut count);
    }
    println!("{rounds} damages: {count:?}");
    assert!(count.refused > 0 && count.errors > 0 && count.right > 0);
}

/// Every bit of a table, sampled unless `STEMEDB_TEST_FULL`.
#[test]
fn flipped_bits_of_a_table_never_give_a_wrong_answer() {
    let dir = memory_dir();
    let model = tree_of(dir.path());
    let path = files(dir.path()).pop().unwrap();
    let good = fs::read(&path).unwrap();
    let every = if std::env::var_os("STEMEDB_TEST_FULL").is_some() { 1 } else { good.len() * 8 / 150 };
    let (mut refused, mut errors, mut silent) = (0, 0, 0);
    for bit in (0..good.len() * 8).skip(slice().0).step_by(every * slice().1) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, bad).unwrap();
        match LsmEngine::open(dir.path(), options()) {
            Err(error) => {
                assert_eq!(Some(path.as_path()), file_of(&error), "bit {bit}: {error}");
                refused += 1;
            }
            Ok(engine) => {
                let rows: Result<Vec<_>, _> =
                    engine.snapshot().scan(Bound::Included(b"f"), Bound::Excluded(b"g")).collect();
                match rows {
                    Ok(rows) => {
                        assert!(rows.iter().map(|(k, v)| (k, v)).eq(model.iter()), "bit {bit}");
                        silent += 1;
                    }
                    Err(error) => {
                        assert_eq!(Some(path.as_path()), file_of(&error), "bit {bit}: {error}");
                        errors += 1;
                    }
                }
                engine.close();
            }
        }
        fs::write(&path, &good).unwrap();
    }
    println!(
        "every {every}th of {} bits: {refused} refused, {errors} errors, {silent} in what a scan does not read",
        good.len() * 8
    );
}

#[test]
fn a_randomly_damaged_checkpoint_is_never_used() {
    let rounds = if std::env::var_os("STEMEDB_TEST_FULL").is_some() { 5_000 } else { 150 };
    let dir = memory_dir();
    tree_of(&dir.path().join("g1"));
    let engine = LsmEngine::open(&dir.path().join("g1"), options()).unwrap();
    let made = engine.checkpoint(&dir.path().join("c")).unwrap();
    engine.close();
    let mut paths: Vec<PathBuf> = made.files().iter().map(|file| made.dir().join(&file.name)).collect();
    paths.push(made.dir().join("checkpoint.manifest"));
    let (mut harmless, mut refused) = (0, 0);
    for seed in (0..rounds).skip(slice().0).step_by(slice().1) {
        let mut rng = StdRng::seed_from_u64(seed);
        let path = &paths[rng.random_range(0..paths.len())];
        let good = fs::read(path).unwrap();
        let changed = damage(&mut rng, path, &good);
        let sound = Checkpoint::load(made.dir()).and_then(|loaded| loaded.verify_blocking());
        match sound {
            Ok(()) => {
                assert!(!changed, "seed {seed}: {} was damaged and passed", path.display());
                harmless += 1;
            }
            Err(error) => {
                assert_eq!(ErrorClass::Damaged, error.class(), "seed {seed}: {error}");
                refused += 1;
            }
        }
        let _ = fs::remove_file(path);
        fs::write(path, good).unwrap();
    }
    println!("{rounds} damages of a checkpoint: {refused} refused, {harmless} changed nothing");
}
