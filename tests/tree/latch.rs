//! Every write and sync of the tree, failing in each way: what latches and what is tried again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use openraft::RaftSnapshotBuilder;
use openraft::storage::RaftStateMachine;
use stemedb::state::engine::lsm::{FailPoint, LsmOptions};

use crate::support::*;

/// Fails `times` times at a step. Counts how often it was asked after the first failure.
fn fails(step: &'static str, times: usize, errno: i32) -> (FailPoint, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let point: FailPoint = Arc::new(move |name| {
        if name != step {
            return Ok(());
        }
        match count.fetch_add(1, Ordering::SeqCst) < times {
            true => Err(io::Error::from_raw_os_error(errno)),
            false => Ok(()),
        }
    });
    (point, asked)
}

const ERRNOS: [i32; 4] = [libc::EIO, libc::EROFS, libc::ENOSPC, libc::EDQUOT];

fn is_room(errno: i32) -> bool {
    errno == libc::ENOSPC || errno == libc::EDQUOT
}

#[tokio::test]
async fn a_flush_is_tried_again_only_for_room_and_only_before_the_manifest() {
    for step in ["flush.tables", "flush.manifest", "flush.manifest-written"] {
        for errno in ERRNOS {
            let dir = tempfile::tempdir().unwrap();
            let (fail_point, asked) = fails(step, 1, errno);
            let mut machine = open_with(dir.path(), LsmOptions { fail_point: Some(fail_point), ..options() }).unwrap();
            fill(&mut machine, 0..20).await;
            let sealed = machine.seal_blocking();
            let retried = step == "flush.tables" && is_room(errno);
            assert_eq!(retried, sealed.is_ok(), "{step} errno {errno}: {sealed:?}");
            assert_eq!(retried, machine.handle().failed().is_none(), "{step} errno {errno}");
            assert_eq!(if retried { 2 } else { 1 }, asked.load(Ordering::SeqCst), "{step} errno {errno}");
            // Reads go on.
            assert_eq!(rows_after(20).await, rows(&machine.handle()).unwrap());
            if !retried {
                assert!(machine.seal_blocking().is_err(), "a latched tree takes nothing");
                assert!(machine.handle().engine().compact_blocking(true).is_err());
                assert_eq!(1, asked.load(Ordering::SeqCst), "and tries nothing again");
            }
        }
    }
}

#[tokio::test]
async fn no_room_reported_once_the_table_is_whole_is_a_failed_sync() {
    // The table was written to its end; what then reports "no space" can only be its sync.
    for errno in ERRNOS {
        let dir = tempfile::tempdir().unwrap();
        let (fail_point, asked) = fails("flush.tables-written", 1, errno);
        let mut machine = open_with(dir.path(), LsmOptions { fail_point: Some(fail_point), ..options() }).unwrap();
        fill(&mut machine, 0..20).await;
        let error = machine.seal_blocking().unwrap_err();
        assert!(!error.is_disk_full(), "errno {errno}: {error}");
        assert!(machine.handle().failed().is_some());
        assert_eq!(1, asked.load(Ordering::SeqCst));
    }
}

#[tokio::test]
async fn a_compaction_is_tried_again_only_for_room_and_only_before_the_manifest() {
    for step in ["compact.tables", "compact.manifest-written"] {
        for errno in ERRNOS {
            let dir = tempfile::tempdir().unwrap();
            closed(dir.path(), 600, None).await;
            let (fail_point, _) = fails(step, 1, errno);
            let machine = open_with(dir.path(), LsmOptions { fail_point: Some(fail_point), ..options() }).unwrap();
            let handle = machine.handle();
            assert!(handle.engine().compact_blocking(true).is_err());
            let again = step == "compact.tables" && is_room(errno);
            assert_eq!(again, handle.failed().is_none(), "{step} errno {errno}");
            assert_eq!(again, handle.engine().compact_blocking(true).is_ok(), "{step} errno {errno}");
        }
    }
}

#[tokio::test]
async fn a_checkpoint_is_given_up_for_room_and_latches_for_everything_else() {
    for step in ["checkpoint.begin", "checkpoint.linked", "checkpoint.manifest", "checkpoint.manifest-written"] {
        for errno in ERRNOS {
            let dir = tempfile::tempdir().unwrap();
            closed(dir.path(), 100, Some(50)).await;
            let (fail_point, _) = fails(step, 1, errno);
            let mut machine = open_with(dir.path(), LsmOptions { fail_point: Some(fail_point), ..options() }).unwrap();
            fill(&mut machine, 100..120).await;
            let mut builder = machine.try_create_snapshot_builder(true).await.unwrap();
            let built = builder.build_snapshot().await;
            let handle = machine.handle();
            assert_eq!(is_room(errno), handle.failed().is_none(), "{step} errno {errno}");
            // For lack of room the last one is answered again, and Raft purges nothing.
            assert_eq!(is_room(errno), built.is_ok(), "{step} errno {errno}");
            if let Ok(built) = built {
                assert_eq!(Some(log_id(49)), built.meta.last_log_id);
                assert_eq!(Some(log_id(119)), checkpoint(&mut machine).await.applied().log_id, "and then it works");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_in_the_background_goes_on_by_itself_when_there_is_room_again() {
    let dir = tempfile::tempdir().unwrap();
    closed(dir.path(), 600, None).await;
    let before = tables(dir.path()).len();
    assert!((4..16).contains(&before), "{before} tables: none has been compacted yet, and there is something to do");
    let (fail_point, asked) = fails("compact.tables", 1, libc::ENOSPC);
    let lsm = LsmOptions { compaction: true, fail_point: Some(fail_point), ..options() };
    let machine = open_with(dir.path(), lsm).unwrap();
    let handle = machine.handle();
    // Nobody asks for it again.
    while handle.engine().stats().unwrap().compaction_count == 0 {
        assert!(handle.failed().is_none());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(asked.load(Ordering::SeqCst) >= 2);
    while handle.engine().stats().unwrap().disk_full {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(rows_after(600).await, rows(&handle).unwrap());
}
