//! Damage met by a start, a read or a compaction: an error that names the file, and the board.

use std::fs;
use std::ops::Bound;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use stemedb::state::engine::lsm::LsmEngine;
use stemedb::state::engine::{AppliedState, EngineError, ErrorClass, StateRead, WriteBatch};

use crate::support::*;

#[tokio::test]
async fn a_start_names_the_file_that_is_missing_short_or_changed() {
    let dir = tempfile::tempdir().unwrap();
    let rows_before = closed(dir.path(), 600, Some(300)).await;
    let (pointer, folder) = (dir.path().join("kv/active"), tree(dir.path()));
    let (first, last) = (tables(dir.path())[0].clone(), tables(dir.path()).pop().unwrap());
    for path in [pointer, tree(dir.path()).join("current"), manifest(dir.path()), first, last] {
        let good = fs::read(&path).unwrap();
        // At the file's end lies what a start reads of a table.
        let damages: [(&str, &dyn Fn()); 4] = [
            ("missing", &|| fs::remove_file(&path).unwrap()),
            ("empty", &|| rewrite(&path, b"")),
            ("short", &|| rewrite(&path, &good[..good.len() / 2])),
            ("changed", &|| {
                let mut bad = good.clone();
                let at = bad.len() - 20; // in a table and a manifest, the checksum of its contents
                bad[at] ^= 1;
                rewrite(&path, &bad);
            }),
        ];
        for (what, damage) in damages {
            damage();
            let error = refused(dir.path());
            assert_eq!(ErrorClass::Damaged, error.class(), "{} {what}: {error}", path.display());
            let named = file_of(&error).unwrap_or_else(|| panic!("{} {what}: {error}", path.display()));
            // `current` and its manifest are one another's witness.
            let of_manifest = |path: &Path| path.parent() == Some(&folder);
            assert!(named == path || (of_manifest(&path) && of_manifest(named)), "{} {what}: {error}", path.display());
            rewrite(&path, &good);
        }
    }
    let machine = open(dir.path()).unwrap();
    assert_eq!(rows_before, rows(&machine.handle()).unwrap(), "being refused so often has changed nothing");
    close(machine);
}

#[tokio::test]
async fn a_tree_that_is_gone_is_not_an_empty_one() {
    for gone in ["kv", "kv/g1", "kv/g1/tables"] {
        let dir = tempfile::tempdir().unwrap();
        closed(dir.path(), 200, Some(100)).await;
        fs::remove_dir_all(dir.path().join(gone)).unwrap();
        for _ in 0..2 {
            let error = refused(dir.path());
            assert_eq!(ErrorClass::Damaged, error.class(), "{gone}: {error}");
        }
    }
    // `active` alone, and everything in the tree's folder.
    let dir = tempfile::tempdir().unwrap();
    closed(dir.path(), 200, Some(100)).await;
    fs::remove_dir_all(dir.path().join("kv/g1")).unwrap();
    fs::create_dir(dir.path().join("kv/g1")).unwrap();
    for _ in 0..2 {
        assert_eq!(ErrorClass::Damaged, refused(dir.path()).class());
    }
}

#[tokio::test]
async fn tables_that_were_exchanged_are_damage() {
    let dir = tempfile::tempdir().unwrap();
    closed(dir.path(), 600, None).await;
    let found = tables(dir.path());
    let (a, b) = (fs::read(&found[0]).unwrap(), fs::read(&found[1]).unwrap());
    rewrite(&found[0], &b);
    let error = refused(dir.path());
    assert_eq!((ErrorClass::Damaged, Some(found[0].as_path())), (error.class(), file_of(&error)), "{error}");
    rewrite(&found[1], &a);
    let error = refused(dir.path());
    assert_eq!(ErrorClass::Damaged, error.class(), "{error}");
}

#[tokio::test]
async fn what_the_operator_has_to_settle_is_told_apart_from_damage() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = open(dir.path()).unwrap();
    fill(&mut machine, 0..20).await;
    let busy = open_with(dir.path(), stemedb::state::engine::lsm::LsmOptions { lock_timeout_ms: 0, ..options() });
    assert!(matches!(busy, Err(error) if error.class() == ErrorClass::Busy));
    close(machine);
    // A newer program's checkpoint is not touched, and stops nothing: the tree is sound.
    let machine = open(dir.path()).unwrap();
    close(machine);
}

/// The tables and rows of an open machine whose block cache has seen nothing of them.
async fn cold(dir: &std::path::Path) -> (Machine, Vec<PathBuf>) {
    closed(dir, 600, None).await;
    let machine = open(dir).unwrap();
    (machine, tables(dir))
}

#[tokio::test]
async fn a_read_that_meets_damage_names_the_table_and_the_board_keeps_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let expected = closed(dir.path(), 600, None).await;
    type Damage = fn(&std::path::Path);
    let damages: [(&str, Damage); 3] = [
        ("a changed block", |path| {
            // The first block of data; rewritten in place, because the file is open.
            let mut bytes = fs::read(path).unwrap();
            bytes[100] ^= 4;
            fs::write(path, bytes).unwrap();
        }),
        ("a zeroed block", |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[..4096].fill(0);
            fs::write(path, bytes).unwrap();
        }),
        ("a short table", |path| {
            fs::File::options().write(true).open(path).unwrap().set_len(50).unwrap();
        }),
    ];
    for (what, damage) in damages {
        let path = tables(dir.path())[1].clone();
        let good = fs::read(&path).unwrap();
        let machine = open(dir.path()).unwrap();
        let handle = machine.handle();
        let board = handle.damage();
        assert!(board.borrow().is_none());
        damage(&path);
        let error = rows(&handle).err().unwrap_or_else(|| panic!("{what} was not met"));
        assert_eq!(Some(path.as_path()), file_of(&error), "{what}: {error}");
        // Each point read is right, or an error.
        let mut errors = 0;
        let view = handle.view().unwrap();
        for (key, value) in &expected {
            match view.snapshot.get(key) {
                Ok(found) => assert_eq!(Some(value), found.as_ref(), "{what}"),
                Err(EngineError::Damaged { file, .. }) => {
                    assert_eq!(Some(&path), file.as_ref(), "{what}");
                    errors += 1;
                }
                Err(error) => panic!("{what}: {error}"),
            }
        }
        assert!(errors > 0, "{what}");
        let known = board.borrow().clone().unwrap();
        assert_eq!((Some(&path), "scan"), (known.file.as_ref(), known.operation), "{what}: the first stays");
        assert!(handle.failed().is_none(), "the tree still serves what it can read");
        drop((view, handle));
        close(machine);
        let _ = fs::remove_file(&path);
        fs::write(&path, good).unwrap();
    }
}

/// While the file is not open yet; an open one is read on, whatever became of its name.
#[test]
fn a_missing_table_and_a_read_that_fails_are_damage_too() {
    let dir = tempfile::tempdir().unwrap();
    let engine = LsmEngine::open(dir.path(), options()).unwrap();
    for round in 0..3u64 {
        let mut batch = WriteBatch::default();
        batch.put(format!("f{round}"), "x".repeat(100));
        engine.write(&batch).unwrap();
        engine.rotate(&AppliedState { fact_index: round, ..Default::default() }, &WriteBatch::default()).unwrap();
    }
    engine.flush_blocking().unwrap();
    engine.close();
    let path = dir.path().join("tables/0");
    let good = fs::read(&path).unwrap();
    for fails in [false, true] {
        let engine = LsmEngine::open(dir.path(), options()).unwrap();
        fs::remove_file(&path).unwrap();
        if fails {
            symlink("/proc/self/mem", &path).unwrap(); // EIO at address 0
        }
        let error = engine.snapshot().get(b"f0").unwrap_err();
        assert_eq!(Some(path.as_path()), file_of(&error), "{error}");
        assert!(engine.damage().borrow().is_some());
        assert!(engine.snapshot().get(b"f2").unwrap().is_some());
        engine.close();
        let _ = fs::remove_file(&path);
        fs::write(&path, &good).unwrap();
    }
}

#[tokio::test]
async fn a_row_that_does_not_decode_is_reported_too() {
    use std::sync::Arc;
    use stemedb::store_helpers::StoreView;

    let dir = tempfile::tempdir().unwrap();
    let mut machine = open(dir.path()).unwrap();
    fill(&mut machine, 0..5).await;
    let handle = machine.handle();
    let mut batch = WriteBatch::default();
    batch.put(stemedb::state::keys::COUNTERS.to_vec(), Bytes::from_static(b"\xff"));
    handle.engine().write(&batch).unwrap();
    handle.engine().publish();
    let view = StoreView::new(Arc::new(handle.engine().snapshot()), 16);
    let error = view.count_assertions().unwrap_err();
    assert!(error.is_damage(), "{error}");
    assert!(handle.damage().borrow().is_some());
}

#[tokio::test]
async fn a_compaction_that_meets_damage_stops_and_the_tree_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (mut machine, found) = cold(dir.path()).await;
    let mut bytes = fs::read(&found[0]).unwrap();
    bytes[100] ^= 4;
    fs::write(&found[0], bytes).unwrap();
    let handle = machine.handle();
    let error = handle.engine().compact_blocking(true).unwrap_err();
    assert_eq!((true, Some(found[0].as_path())), (error.is_damage(), file_of(&error)), "{error}");
    assert_eq!("compact", handle.damage().borrow().clone().unwrap().operation);
    assert!(handle.failed().is_none());
    assert!(handle.engine().compact_blocking(true).is_err(), "none is begun any more");
    // Writes and flushes go on.
    fill(&mut machine, 600..700).await;
    machine.seal_blocking().unwrap();
    let view = handle.view().unwrap();
    let newest = view.snapshot.scan(Bound::Unbounded, Bound::Unbounded).last();
    assert!(newest.is_some());
    // A checkpoint of it would be no good, and says so.
    assert!(machine_checkpoint_fails(&mut machine).await.contains("damage"));
    assert!(handle.failed().is_none());
}

async fn machine_checkpoint_fails(machine: &mut Machine) -> String {
    use openraft::RaftSnapshotBuilder;
    use openraft::storage::RaftStateMachine;
    let mut builder = machine.try_create_snapshot_builder(true).await.unwrap();
    builder.build_snapshot().await.err().unwrap().to_string()
}
