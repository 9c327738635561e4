//! `stemedb-api --rebuild-from-wal`: the tree anew from checkpoint and log.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use openraft::storage::{RaftLogStorage, RaftLogStorageExt};
use stemedb::node::rebuild_from_wal::{Progress, RebuildError, Request, rebuild_from_wal};
use stemedb::state::engine::quarantine;
use stemedb_raft::disk::RealDisk;
use stemedb_raft::{WalOptions, WalStore};

use crate::support::*;

/// A log with the entries `0..count`, of which `committed` is known to be committed and everything up to
/// `purged` is gone.
async fn write_log(dir: &Path, count: u64, committed: u64, purged: Option<u64>) {
    let mut options = WalOptions::new(dir);
    options.segment_bytes = 1 << 20;
    let (mut log, _) = WalStore::open(RealDisk::new(), options).unwrap();
    for begin in (0..count).step_by(50) {
        log.blocking_append((begin..(begin + 50).min(count)).map(entry)).await.unwrap();
    }
    log.save_committed(Some(log_id(committed))).await.unwrap();
    if let Some(upto) = purged {
        log.purge(log_id(upto)).await.unwrap();
    }
    // The mark that carries the committed index.
    log.handle().close().unwrap();
}

fn request(dir: &Path) -> Request {
    Request { wal_dir: dir.join("wal"), kv_dir: dir.join("kv"), lock_timeout_ms: 500 }
}

async fn assert_rebuilt(dir: &Path, upto: u64) {
    let machine = open(dir).unwrap();
    assert_eq!(Some(upto), machine.handle().view().unwrap().state.applied_log_index);
    assert_eq!(rows_after(upto + 1).await, rows(&machine.handle()).unwrap());
    close(machine);
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_log_alone_from_a_checkpoint_and_again() {
    let dir = tempfile::tempdir().unwrap();
    write_log(&dir.path().join("wal"), 600, 550, None).await;
    closed(dir.path(), 600, None).await;
    fs::remove_file(&tables(dir.path())[1]).unwrap();
    refused(dir.path());
    let mut seen: Vec<Progress> = Vec::new();
    let rebuilt = rebuild_from_wal(&request(dir.path()), |progress| seen.push(progress)).await.unwrap();
    assert_eq!((None, Some(550), 551), (rebuilt.from, rebuilt.applied, rebuilt.entries));
    assert_eq!((Some(550), Some(550)), seen.last().map(|last| (last.applied, last.upto)).unwrap());
    assert!(rebuilt.old.unwrap().join("g1/tables").is_dir(), "the damaged one is kept");
    assert_rebuilt(dir.path(), 550).await;
    assert!(!dir.path().join("kv.rebuild").exists());

    // With a checkpoint, only what is behind it is applied.
    let mut machine = open(dir.path()).unwrap();
    drop(checkpoint(&mut machine).await);
    close(machine);
    let rebuilt = rebuild_from_wal(&request(dir.path()), |_| ()).await.unwrap();
    assert_eq!((Some(550), Some(550), 0), (rebuilt.from, rebuilt.applied, rebuilt.entries));
    assert_rebuilt(dir.path(), 550).await;
    assert_eq!(2, quarantine::list(dir.path(), None).unwrap().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_begins_behind_the_checkpoint_names_the_missing_index() {
    let dir = tempfile::tempdir().unwrap();
    write_log(&dir.path().join("wal"), 600, 599, Some(400)).await;
    closed(dir.path(), 600, Some(300)).await;
    let before = contents(&dir.path().join("kv"));
    let error = rebuild_from_wal(&request(dir.path()), |_| ()).await.unwrap_err();
    assert!(matches!(&error, RebuildError::Missing { first_missing: 300, log_first: 401, .. }), "{error}");
    assert!(error.to_string().contains("index 300") && error.to_string().contains("stemedb rebuild"), "{error}");
    assert_eq!(before, contents(&dir.path().join("kv")), "nothing was changed");

    // The same when the checkpoint that would reach far enough is damaged.
    let dir = tempfile::tempdir().unwrap();
    write_log(&dir.path().join("wal"), 600, 599, Some(250)).await;
    closed(dir.path(), 600, Some(300)).await;
    let shelf = fs::read_dir(dir.path().join("checkpoint")).unwrap().next().unwrap().unwrap().path();
    let table = fs::read_dir(shelf.join("tables")).unwrap().next().unwrap().unwrap().path();
    let good = fs::read(&table).unwrap();
    flip(&table, 999);
    let error = rebuild_from_wal(&request(dir.path()), |_| ()).await.unwrap_err();
    assert!(matches!(&error, RebuildError::Missing { first_missing: 0, .. }), "{error}");
    rewrite(&table, &good);
    rebuild_from_wal(&request(dir.path()), |_| ()).await.unwrap();
    assert_rebuilt(dir.path(), 599).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_in_use_and_paths_of_no_node_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_log(&dir.path().join("wal"), 20, 19, None).await;
    closed(dir.path(), 20, None).await;
    let held = stemedb::node::identity::lock_folder(dir.path(), 0).await.unwrap();
    let error = rebuild_from_wal(&Request { lock_timeout_ms: 0, ..request(dir.path()) }, |_| ()).await.unwrap_err();
    assert!(matches!(error, RebuildError::Locked(_)), "{error}");
    drop(held);
    let wrong = Request { kv_dir: dir.path().join("other"), ..request(dir.path()) };
    assert!(matches!(rebuild_from_wal(&wrong, |_| ()).await, Err(RebuildError::Paths(_))));
    let wrong = Request { wal_dir: dir.path().join("other"), ..request(dir.path()) };
    assert!(matches!(rebuild_from_wal(&wrong, |_| ()).await, Err(RebuildError::Paths(_))));
}

fn stemedb_api(dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stemedb-api"))
        .arg("--rebuild-from-wal")
        .arg("--wal-path")
        .arg(dir.join("wal"))
        .arg("--kv-path")
        .arg(dir.join("kv"))
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_does_it_as_the_runbooks_say() {
    let dir = tempfile::tempdir().unwrap();
    write_log(&dir.path().join("wal"), 300, 299, None).await;
    closed(dir.path(), 300, None).await;
    fs::remove_file(&tables(dir.path())[0]).unwrap();
    let output = stemedb_api(dir.path());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.lines().any(|line| line.contains("INFO") && line.contains("rebuild complete")), "{stderr}");
    assert_rebuilt(dir.path(), 299).await;

    let missing = tempfile::tempdir().unwrap();
    write_log(&missing.path().join("wal"), 300, 299, Some(200)).await;
    let output = stemedb_api(missing.path());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(Some(4), output.status.code(), "{stderr}");
    assert!(stderr.contains("index 0 is missing") && stderr.contains("stemedb rebuild NODE"), "{stderr}");
}

fn contents(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(contents(&path)),
            false => found.push((path.clone(), fs::read(&path).unwrap())),
        }
    }
    found.sort();
    found
}
