//! Checkpoints of a tree that is being written, and the gate before each flush.

#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::fs;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::state::engine::checkpoint::Checkpoint;
use stemedb::state::engine::lsm::{LsmEngine, LsmOptions};
use stemedb::state::engine::receive::CheckpointReceiver;
use stemedb::state::engine::{AppliedState, EngineError, StateRead, WriteBatch};
use stemedb_raft::types::LogId;
use tokio::sync::watch;

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

fn rows(engine: &LsmEngine) -> Rows {
    engine
        .snapshot()
        .scan(Bound::Unbounded, Bound::Unbounded)
        .map(|row| row.unwrap())
        .filter(|(key, _)| !key.starts_with(b"m~"))
        .map(|(key, value)| (key.to_vec(), value.to_vec()))
        .collect()
}

#[test]
fn a_checkpoint_holds_exactly_the_rows_of_its_applied_state() {
    let dir = tempfile::tempdir().unwrap();
    let options = LsmOptions { memtable_bytes_max: 16 * 1024, ..LsmOptions::default() };
    let engine = LsmEngine::open(&dir.path().join("kv"), options).unwrap();
    let sealed: Arc<Mutex<BTreeMap<u64, Rows>>> = Arc::default();
    sealed.lock().unwrap().insert(0, Rows::new());
    let done = Arc::new(AtomicBool::new(false));
    let writer = {
        let (engine, sealed, done) = (engine.clone(), Arc::clone(&sealed), Arc::clone(&done));
        thread::spawn(move || {
            let mut rng = StdRng::seed_from_u64(7);
            let mut model = Rows::new();
            let mut fact_index = 0;
            while !done.load(Ordering::Relaxed) {
                let mut batch = WriteBatch::default();
                for _ in 0..20 {
                    let key = format!("f{:03}", rng.random_range(0..500)).into_bytes();
                    let value = vec![rng.random::<u8>(); rng.random_range(0..200)];
                    model.insert(key.clone(), value.clone());
                    batch.put(key, value);
                }
                engine.write(&batch).unwrap();
                engine.publish();
                fact_index += 1;
                if engine.wants_rotation() {
                    sealed.lock().unwrap().insert(fact_index, model.clone());
                    let applied = AppliedState { fact_index, ..AppliedState::default() };
                    let ticket = engine.rotate(&applied, &WriteBatch::default()).unwrap();
                    // Not faster than the disk, as `wait_for_room` has it.
                    engine.wait_flushed_blocking(ticket.saturating_sub(2)).unwrap();
                }
            }
        })
    };
    let checkpoints: Vec<Checkpoint> =
        (0..12).map(|n| engine.checkpoint(&dir.path().join(format!("c{n}"))).unwrap()).collect();
    done.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    let mut last = 0;
    for checkpoint in &checkpoints {
        checkpoint.verify_blocking().unwrap();
        let at = checkpoint.applied().fact_index;
        assert!(at >= last);
        last = at;
        let opened = LsmEngine::open(checkpoint.dir(), LsmOptions::default()).unwrap();
        assert_eq!(checkpoint.applied(), opened.applied());
        assert_eq!(sealed.lock().unwrap()[&at], rows(&opened), "checkpoint at {at}");
    }
    // The source has not noticed.
    engine.compact_blocking(true).unwrap();
    assert!(engine.failed().is_none());
}

fn checkpointed(dir: &std::path::Path) -> (LsmEngine, Checkpoint) {
    let engine = LsmEngine::open(&dir.join("kv"), LsmOptions::default()).unwrap();
    for round in 0..3u64 {
        let mut batch = WriteBatch::default();
        for n in 0..2_000 {
            batch.put(format!("f{n:05}"), format!("{round}-{n}"));
        }
        engine.write(&batch).unwrap();
        let applied = AppliedState { fact_index: round, ..AppliedState::default() };
        engine.rotate(&applied, &WriteBatch::default()).unwrap();
    }
    engine.flush_blocking().unwrap();
    let checkpoint = engine.checkpoint(&dir.join("c")).unwrap();
    (engine, checkpoint)
}

#[test]
fn a_checkpoint_travels_in_chunks_of_any_order() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (engine, checkpoint) = checkpointed(from.path());
    let manifest = checkpoint.manifest_bytes().unwrap();
    let mut receiver = CheckpointReceiver::begin(to.path(), &manifest).unwrap();
    for file in checkpoint.files().iter().rev() {
        let mut offsets: Vec<u64> = (0..file.bytes).step_by(1_000).collect();
        offsets.reverse();
        for offset in offsets {
            let chunk = checkpoint.read_chunk(&file.name, offset, 1_000).unwrap();
            receiver.write(&file.name, offset, &chunk).unwrap();
        }
        assert!(checkpoint.read_chunk(&file.name, file.bytes, 1_000).unwrap().is_empty());
    }
    assert_eq!(checkpoint.total_bytes(), receiver.bytes_received());
    let received = receiver.finish().unwrap();
    assert_eq!(checkpoint.files(), received.files());
    let opened = LsmEngine::open(received.dir(), LsmOptions::default()).unwrap();
    assert_eq!(rows(&engine), rows(&opened));
}

#[test]
fn what_does_not_fit_the_manifest_is_refused() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_engine, checkpoint) = checkpointed(from.path());
    assert!(checkpoint.read_chunk("../kv/lock", 0, 10).is_err());
    let manifest = checkpoint.manifest_bytes().unwrap();
    assert!(CheckpointReceiver::begin(to.path(), &manifest[1..]).is_err());
    let mut receiver = CheckpointReceiver::begin(to.path(), &manifest).unwrap();
    let file = checkpoint.files().last().unwrap().clone();
    assert!(receiver.write("../x", 0, b"x").is_err());
    assert!(receiver.write(&file.name, file.bytes, b"x").is_err());
    assert!(receiver.write(&file.name, u64::MAX, b"xx").is_err());
    for file in checkpoint.files() {
        let mut bytes = fs::read(checkpoint.dir().join(&file.name)).unwrap();
        if file.name.starts_with("tables/") {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        receiver.write(&file.name, 0, &bytes).unwrap();
    }
    assert!(matches!(receiver.finish(), Err(EngineError::Damaged { .. })));
    assert!(Checkpoint::load(&to.path().join("kv.incoming")).is_err(), "without its manifest");
}

fn log_id(index: u64) -> LogId {
    openraft::testing::log_id::<stemedb_raft::types::TypeConfig>(1, 1, index)
}

#[test]
fn the_flush_never_runs_ahead_of_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let (durable, seen) = watch::channel(0u64);
    let (asked_tx, asked) = std::sync::mpsc::channel();
    let options = LsmOptions {
        flush_gate: Some(Arc::new(move |index| {
            let mut seen = seen.clone();
            asked_tx.send(index).unwrap();
            Box::pin(async move {
                seen.wait_for(|durable| *durable >= index).await.map_err(|e| e.to_string())?;
                Ok(())
            })
        })),
        ..LsmOptions::default()
    };
    let engine = LsmEngine::open(dir.path(), options).unwrap();
    let seal = |index: u64| {
        let mut batch = WriteBatch::default();
        batch.put(format!("f{index}"), "x");
        engine.write(&batch).unwrap();
        let applied = AppliedState { log_id: Some(log_id(index)), ..AppliedState::default() };
        engine.rotate(&applied, &WriteBatch::default()).unwrap()
    };
    let (first, second) = (seal(5), seal(9));
    assert_eq!(5, asked.recv().unwrap());
    assert_eq!(None, engine.persisted().log_id);
    durable.send_replace(7);
    engine.wait_flushed_blocking(first).unwrap();
    assert_eq!(9, asked.recv().unwrap());
    assert_eq!(Some(log_id(5)), engine.persisted().log_id);
    // The second one never becomes durable: the log has failed, and so the engine latches.
    drop(durable);
    assert!(engine.wait_flushed_blocking(second).is_err());
    assert!(engine.failed().is_some());
    engine.close();
    let engine = LsmEngine::open(dir.path(), LsmOptions::default()).unwrap();
    assert_eq!(Some(log_id(5)), engine.applied().log_id);
    assert_eq!(None, engine.snapshot().get(b"f9").unwrap());
}
