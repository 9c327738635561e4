//! A disk that hangs is seen while it hangs, and what it says when it comes back is no acknowledgement any more.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

mod common;

use std::{path::Path, sync::Arc, time::Duration};

use common::{append, entry, open_sim, options};
use openraft::storage::RaftLogStorage;
use stemedb_raft::{
    IoInFlight, IoTimes, Vote, Waits, WalHandle, WalOptions, WalStore,
    clock::monotonic_ms,
    disk::sim::{Kind, SimDisk},
    io_times::guard,
};

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let patience = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(tokio::time::Instant::now() < patience, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What somebody waits for.
fn seen(handle: &WalHandle) -> Option<IoInFlight> {
    handle.io_in_flight().filter(|io| io.waits == Waits::Somebody)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_that_hangs_is_seen_and_not_acknowledged_after_the_log_was_given_up() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    let handle = store.handle();
    until("a spare", || handle.room().spare_ready.then_some(())).await;
    let before_ms = monotonic_ms();
    sim.hang_sync("segment.001.wal");
    let mut writing = store.clone();
    let write = tokio::spawn(async move { append(&mut writing, vec![entry(1, 0, "x")]).await });
    until("the hang", || (sim.hung() == 1).then_some(())).await;
    let io = seen(&handle).unwrap();
    assert_eq!((io.operation, io.file.as_str()), ("sync", "segment.001.wal"));
    assert!(io.since_ms >= before_ms && io.age_ms(monotonic_ms()) <= monotonic_ms() - before_ms);
    // A watchdog on a plain thread sees the same.
    let watch = handle.clone();
    assert_eq!(std::thread::spawn(move || seen(&watch)).join().unwrap(), Some(io));
    assert!(!write.is_finished());
    assert!(handle.latch("wait for", "segment.001.wal", "the watchdog gave up"));
    assert!(!handle.latch("wait for", "segment.001.wal", "once more"), "the first reason stays");
    let operations = sim.operations();
    sim.release();
    assert!(write.await.unwrap().unwrap_err().to_string().contains("the watchdog gave up"));
    until("rest", || seen(&handle).is_none().then_some(())).await;
    assert!(store.save_vote(&Vote::new(9, 9)).await.is_err());
    assert_eq!(sim.operations(), operations, "written after it was given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_operation_is_seen_while_it_hangs() {
    for (kind, part, expected) in [
        (Kind::Write, "segment.001", ("write", "segment.001.wal")),
        (Kind::Write, "hard-state.2", ("write", "hard-state.2")),
        (Kind::Sync, "hard-state.1", ("sync", "hard-state.1")),
        (Kind::Rename, "segment.002", ("rename", "segment.002.wal")),
        (Kind::SyncFolder, "folder", ("sync folder of", "segment.002.wal")),
        (Kind::Remove, "segment.001", ("unlink", "segment.001.wal")),
        (Kind::Read, "segment.001", ("read", "segment.001.wal")),
    ] {
        let sim = SimDisk::new();
        let mut store = open_sim(&sim).unwrap();
        let handle = store.handle();
        until("a spare", || handle.room().spare_ready.then_some(())).await;
        append(&mut store, vec![entry(1, 0, "x")]).await.unwrap();
        sim.hang(kind, part);
        let mut working = store.clone();
        let work = tokio::spawn(async move {
            let _read = working.reader().read_async(0, 1, u64::MAX).await?;
            working.save_vote(&Vote::new(2, 1)).await?;
            append(&mut working, (1..6).map(|i| entry(1, i, &"x".repeat(15_000))).collect()).await?;
            working.purge(stemedb_raft::frame::log_id(1, 4)).await
        });
        until("the hang", || (sim.hung() == 1).then_some(())).await;
        let io = seen(&handle).unwrap();
        assert_eq!((io.operation, io.file.as_str()), expected);
        sim.release();
        work.await.unwrap().unwrap();
        until("rest", || seen(&handle).is_none().then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn preparing_a_segment_is_seen_as_something_nobody_waits_for() {
    let sim = SimDisk::new();
    let io_times = Arc::new(IoTimes::default());
    let options = WalOptions { io_times: Arc::clone(&io_times), ..options(Path::new("/wal")) };
    let (mut store, _) = WalStore::open(sim.shared(), options).unwrap();
    until("a spare", || store.handle().room().spare_ready.then_some(())).await;
    sim.hang(Kind::Reserve, "segment.spare");
    append(&mut store, (0..3).map(|i| entry(1, i, &"x".repeat(15_000))).collect()).await.unwrap();
    until("the hang", || (sim.hung() == 1).then_some(())).await;
    let io = store.handle().io_in_flight().unwrap();
    assert_eq!((io.operation, io.file.as_str(), io.waits), ("reserve", "segment.spare", Waits::Nobody));
    // The log goes on, and another part of the process is seen before it.
    append(&mut store, vec![entry(1, 3, "x")]).await.unwrap();
    {
        let _flush = guard(&io_times, "sync", "v7");
        assert_eq!(store.handle().io_in_flight().unwrap().file, "v7");
    }
    sim.release();
    until("rest", || store.handle().io_in_flight().is_none().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_syncs_show_in_the_figures() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    let handle = store.handle();
    sim.delay(Kind::Sync, "segment.001", Duration::from_millis(30));
    append(&mut store, vec![entry(1, 0, "x")]).await.unwrap();
    let figures = handle.fsync_figures();
    assert!(figures.count >= 1 && figures.max_ms >= 30.0, "{figures:?}");
    assert!(handle.fsync_p99_ms().unwrap() >= 30.0);
}

/// Whatever hangs: closing ends, the folder stays locked until the disk lets go, and nothing is changed after that.
#[tokio::test(flavor = "multi_thread")]
async fn closing_does_not_wait_for_a_disk_that_hangs() {
    // A spare is synced by the writer, which makes a segment of it, then the next one by the thread that prepares it.
    for (kind, part, skip, hangs) in [
        (Kind::Reserve, "segment.spare", 0, "segment.spare"),
        (Kind::Sync, "segment.spare", 0, "segment.002.wal"),
        (Kind::Sync, "segment.spare", 1, "segment.spare"),
        (Kind::Sync, "segment.001", 0, "segment.001.wal"),
    ] {
        let sim = SimDisk::new();
        let store = open_sim(&sim).unwrap();
        let handle = store.handle();
        until("a spare", || handle.room().spare_ready.then_some(())).await;
        sim.hang_after(skip, kind, part);
        let mut writing = store.clone();
        let entries = (0..4).map(|i| entry(1, i, &"x".repeat(15_000))).collect();
        let mut write = Some(tokio::spawn(async move { append(&mut writing, entries).await }));
        until("the hang", || (sim.hung() == 1).then_some(())).await;
        if (kind, skip) != (Kind::Sync, 0) {
            // It is the preparing thread that hangs: the writer goes on.
            write.take().unwrap().await.unwrap().unwrap();
        }
        let closing = handle.clone();
        let closed = tokio::task::spawn_blocking(move || closing.close_within(Duration::from_millis(50))).await;
        let latched = closed.unwrap().unwrap_err();
        assert!(latched.operation == "close" && latched.error.contains(hangs), "{latched}");
        assert!(!handle.wait_ended(Duration::ZERO));
        assert!(open_sim(&sim).is_err(), "{part}: the folder was given back while a thread may change it");
        let operations = sim.operations();
        sim.release();
        let ending = handle.clone();
        assert!(tokio::task::spawn_blocking(move || ending.wait_ended(Duration::from_secs(60))).await.unwrap());
        assert_eq!(sim.operations(), operations, "{part}: changed after the log was given up");
        if let Some(write) = write {
            assert!(write.await.unwrap().is_err(), "{part}: acknowledged after the log was given up");
        }
        drop(store);
        let again = open_sim(&sim).unwrap();
        tokio::task::spawn_blocking(move || again.handle().close()).await.unwrap().unwrap();
    }
}
