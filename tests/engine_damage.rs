//! What the engine does when its files are not what it wrote: refuse, or answer with the same rows.
//! Never fewer.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

use std::fs;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::state::engine::lsm::{LsmEngine, LsmOptions};
use stemedb::state::engine::{AppliedState, EngineError, Row, StateRead, WriteBatch};

fn options() -> LsmOptions {
    LsmOptions { cache_bytes: 64 * 1024, compaction: false, lock_timeout_ms: 0, ..LsmOptions::default() }
}

/// A closed tree of several tables, and its rows.
fn tree(dir: &Path) -> Vec<Row> {
    let engine = LsmEngine::open(dir, options()).unwrap();
    for round in 0..5u64 {
        let mut batch = WriteBatch::default();
        for n in 0..300u64 {
            batch.put(format!("f{:04}", (n * 7 + round) % 600), format!("{round}-{n}-{}", "z".repeat(90)));
        }
        engine.write(&batch).unwrap();
        let applied = AppliedState { fact_index: round, ..AppliedState::default() };
        engine.rotate(&applied, &WriteBatch::default()).unwrap();
    }
    engine.flush_blocking().unwrap();
    let rows = rows(&engine).unwrap();
    engine.close();
    rows
}

fn rows(engine: &LsmEngine) -> Result<Vec<Row>, EngineError> {
    engine.snapshot().scan(Bound::Unbounded, Bound::Unbounded).collect()
}

fn file(dir: &Path, prefix: &str) -> PathBuf {
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| name(path).starts_with(prefix))
        .max_by_key(|path| (name(path).len(), name(path))) // the newest manifest has the highest id
        .unwrap()
}

fn is_refused(dir: &Path) -> bool {
    matches!(LsmEngine::open(dir, options()), Err(EngineError::Damaged { .. }))
}

fn flip(bytes: &[u8], bit: usize) -> Vec<u8> {
    let mut flipped = bytes.to_vec();
    flipped[bit / 8] ^= 1 << (bit % 8);
    flipped
}

#[test]
fn every_flipped_bit_of_current_and_of_the_manifest_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let before = tree(dir.path());
    for (path, every) in [(dir.path().join("current"), 1), (file(dir.path(), "v"), 3)] {
        let good = fs::read(&path).unwrap();
        for bit in (0..good.len() * 8).step_by(every) {
            fs::write(&path, flip(&good, bit)).unwrap();
            assert!(is_refused(dir.path()), "{} bit {bit}", path.display());
        }
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            assert!(is_refused(dir.path()), "{} cut to {length}", path.display());
        }
        fs::write(&path, &good).unwrap();
    }
    // Being refused so often has changed nothing.
    let engine = LsmEngine::open(dir.path(), options()).unwrap();
    assert_eq!(before, rows(&engine).unwrap());
}

#[test]
fn a_missing_current_or_manifest_is_not_an_empty_tree() {
    for prefix in ["current", "v"] {
        let dir = tempfile::tempdir().unwrap();
        tree(dir.path());
        fs::remove_file(file(dir.path(), prefix)).unwrap();
        assert!(is_refused(dir.path()), "{prefix}");
        assert!(fs::read_dir(dir.path().join("tables")).unwrap().count() > 0, "nothing is deleted");
    }
}

#[test]
fn a_missing_table_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    fs::remove_file(file(&dir.path().join("tables"), "")).unwrap();
    assert!(is_refused(dir.path()));
}

#[test]
fn a_flipped_bit_in_a_table_is_an_error_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let before = tree(dir.path());
    let path = file(&dir.path().join("tables"), "");
    let good = fs::read(&path).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let (mut refused, mut errors, mut harmless) = (0, 0, 0);
    for _ in 0..300 {
        let bit = rng.random_range(0..good.len() * 8);
        fs::write(&path, flip(&good, bit)).unwrap();
        match LsmEngine::open(dir.path(), options()) {
            Err(_) => refused += 1,
            Ok(engine) => {
                match rows(&engine) {
                    Err(_) => errors += 1,
                    Ok(found) => {
                        assert_eq!(before, found, "bit {bit} changed rows silently");
                        harmless += 1;
                    }
                }
                engine.close();
            }
        }
    }
    assert!(errors + refused > harmless, "{refused} refused, {errors} errors, {harmless} harmless");
}

#[test]
fn a_second_process_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let first = LsmEngine::open(dir.path(), options()).unwrap();
    let second = LsmEngine::open(dir.path(), options());
    assert!(
        matches!(&second, Err(EngineError::Io { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy),
        "{second:?}"
    );
    first.close();
    LsmEngine::open(dir.path(), options()).unwrap();
}

#[test]
fn a_failed_flush_latches_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let engine = LsmEngine::open(dir.path(), options()).unwrap();
    let mut batch = WriteBatch::default();
    batch.put("fa", "1");
    engine.write(&batch).unwrap();
    fs::remove_dir(dir.path().join("tables")).unwrap();
    engine.rotate(&AppliedState::default(), &WriteBatch::default()).unwrap();
    assert!(engine.flush_blocking().is_err());
    assert!(engine.failed().is_some());
    assert!(engine.write(&batch).is_err(), "a latched engine takes nothing");
    assert!(engine.compact_blocking(true).is_err());
    assert!(engine.checkpoint(&dir.path().join("c")).is_err());
    // What was published can still be read.
    engine.publish();
    assert_eq!(Some(Bytes::from("1")), engine.snapshot().get(b"fa").unwrap());
}

#[test]
fn rows_that_lsm_tree_cannot_hold_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let engine = LsmEngine::open(dir.path(), options()).unwrap();
    for key in [Vec::new(), vec![b'x'; 65_536]] {
        let mut batch = WriteBatch::default();
        batch.put("good", "1");
        batch.put(key.clone(), "2");
        assert!(engine.write(&batch).is_err());
        assert_eq!(None, engine.written().get(b"good").unwrap());
        assert_eq!(None, engine.written().get(&key).unwrap());
    }
    let mut batch = WriteBatch::default();
    batch.put(vec![b'x'; 65_535], "3");
    engine.write(&batch).unwrap();
    assert!(engine.failed().is_none());
}
