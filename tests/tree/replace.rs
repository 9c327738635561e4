//! Replacing the tree alone, stopped after each step and started again.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use stemedb::state::engine::lsm::FailPoint;
use stemedb::state::engine::replace::{STEPS, finish_interrupted, replace};
use stemedb::state::engine::{ErrorClass, quarantine};
use stemedb::state::machine::newest_checkpoint;

use crate::support::*;

fn stop_at(step: &'static str) -> Option<FailPoint> {
    Some(Arc::new(move |name| if name == step { Err(io::Error::other("stopped here")) } else { Ok(()) }))
}

/// A state with a checkpoint at 300, whose tree is damaged behind it.
async fn damaged(dir: &Path) {
    closed(dir, 600, Some(300)).await;
    flip(&tables(dir).pop().unwrap(), 800);
}

/// It opens at the checkpoint, and ends where it should when the log is applied again.
async fn goes_on(dir: &Path, from: u64) {
    let mut machine = open(dir).unwrap();
    let at = machine.handle().view().unwrap().state.applied_log_index;
    assert_eq!(Some(from), at);
    fill(&mut machine, from + 1..600).await;
    assert_eq!(rows_after(600).await, rows(&machine.handle()).unwrap());
    close(machine);
}

#[tokio::test]
async fn the_tree_comes_from_the_newest_checkpoint_and_the_old_one_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    damaged(dir.path()).await;
    let old_tables = tables(dir.path()).len();
    let newest = newest_checkpoint(dir.path()).unwrap();
    let old = replace(dir.path(), &newest, 1_234, Some(0), &None).unwrap().unwrap();
    assert_eq!(dir.path().join("quarantine/1234-kv"), old);
    assert_eq!(old_tables, fs::read_dir(old.join("g1/tables")).unwrap().count());
    assert!(tree(dir.path()).ends_with("g2"), "no path means two trees");
    goes_on(dir.path(), 299).await;
    let listed = quarantine::list(dir.path(), None).unwrap();
    assert_eq!(1, listed.len());
    assert!(listed[0].bytes > 0 && listed[0].what == "kv");
    // And again: the next one has another name and number.
    let newest = newest_checkpoint(dir.path()).unwrap();
    replace(dir.path(), &newest, 1_234, Some(0), &None).unwrap();
    assert_eq!(2, quarantine::list(dir.path(), None).unwrap().len());
    goes_on(dir.path(), 299).await;
}

#[tokio::test]
async fn stopped_after_any_step_it_recovers() {
    for step in STEPS {
        for then in ["start", "replace again", "stopped again, then start"] {
            let dir = tempfile::tempdir().unwrap();
            damaged(dir.path()).await;
            let newest = newest_checkpoint(dir.path()).unwrap();
            let stopped = replace(dir.path(), &newest, 50, Some(0), &stop_at(step));
            assert!(stopped.is_err(), "{step}");
            let counts = STEPS.iter().position(|s| *s == step) >= STEPS.iter().position(|s| *s == "replace.marked");
            match then {
                // Before the mark the damaged tree is where it was, and says so.
                "start" if !counts => {
                    let machine = open(dir.path()).unwrap();
                    assert!(rows(&machine.handle()).is_err(), "{step}: still the damaged one");
                    close(machine);
                    replace(dir.path(), &newest, 60, Some(0), &None).unwrap();
                }
                "start" => {}
                "stopped again, then start" => {
                    let _ = finish_interrupted(dir.path(), &stop_at("replace.quarantined"));
                    let _ = finish_interrupted(dir.path(), &stop_at("replace.moved"));
                    let _ = replace(dir.path(), &newest, 60, Some(0), &stop_at("replace.marked"));
                }
                _ => drop(replace(dir.path(), &newest, 60, Some(0), &None).unwrap()),
            }
            goes_on(dir.path(), 299).await;
            assert!(!dir.path().join("kv.new").exists(), "{step}, {then}");
            assert!(!dir.path().join("kv/replacement").exists(), "{step}, {then}");
            assert!(!quarantine::list(dir.path(), None).unwrap().is_empty(), "{step}, {then}: nothing is deleted");
        }
    }
}

#[tokio::test]
async fn nothing_is_changed_for_a_damaged_checkpoint_or_while_the_tree_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    damaged(dir.path()).await;
    let newest = newest_checkpoint(dir.path()).unwrap();
    let machine = open(dir.path()).unwrap();
    let error = replace(dir.path(), &newest, 50, Some(0), &None).unwrap_err();
    assert_eq!(ErrorClass::Busy, error.class(), "{error}");
    close(machine);
    let bad = fs::read_dir(newest.dir().join("tables")).unwrap().next().unwrap().unwrap().path();
    flip(&bad, 999);
    let error = replace(dir.path(), &newest, 50, Some(0), &None).unwrap_err();
    assert_eq!((ErrorClass::Damaged, Some(bad.as_path())), (error.class(), file_of(&error)), "{error}");
    assert!(!dir.path().join("kv.new").exists() && quarantine::list(dir.path(), None).unwrap().is_empty());
}

#[tokio::test]
async fn a_received_checkpoint_serves_as_well() {
    use stemedb::state::engine::receive::CheckpointReceiver;
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    closed(from.path(), 400, Some(400)).await;
    damaged(dir.path()).await;
    let sent = newest_checkpoint(from.path()).unwrap();
    let mut receiver = CheckpointReceiver::begin(dir.path(), &sent.manifest_bytes().unwrap()).unwrap();
    for file in sent.files() {
        receiver.write(&file.name, 0, &sent.read_chunk(&file.name, 0, usize::MAX).unwrap()).unwrap();
    }
    let received = receiver.finish().unwrap();
    replace(dir.path(), &received, 50, Some(0), &None).unwrap();
    goes_on(dir.path(), 399).await;
}
