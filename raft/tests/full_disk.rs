//! A full disk is no failed disk as long as nothing but a reservation met it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod common;

use std::{path::Path, time::Duration};

use common::{SEGMENT_BYTES, append, close, contents, entry, open_sim, options};
use stemedb_raft::{
    Waits, WalHandle, WalOptions, WalStore,
    disk::{
        RealDisk,
        sim::{Kind, SimDisk},
    },
    open::SPARE_NAME,
};

const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;

fn large(range: std::ops::Range<u64>) -> Vec<stemedb_raft::Entry> {
    range.map(|i| entry(1, i, &"x".repeat(15_000))).collect()
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let patience = tokio::time::Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(tokio::time::Instant::now() < patience, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn until_spare(handle: &WalHandle) {
    until("a spare", || handle.room().spare_ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn room_that_is_back_before_the_segment_ends_was_never_missed() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    let handle = store.handle();
    until_spare(&handle).await;
    append(&mut store, large(0..2)).await.unwrap();
    sim.set_space_left(Some(SEGMENT_BYTES / 2));
    // Takes the spare.
    append(&mut store, large(2..3)).await.unwrap();
    until("a refusal", || handle.room().refuse_clients().is_some()).await;
    let room = handle.room();
    assert!(!room.spare_ready && room.bytes_before_new_segment_needed > 0 && !room.writer_waits, "{room:?}");
    // What was replicated already is taken all the same.
    append(&mut store, vec![entry(1, 3, "small")]).await.unwrap();
    sim.set_space_left(None);
    until_spare(&handle).await;
    assert_eq!(handle.room().refuse_clients(), None, "it did not clear itself");
    append(&mut store, large(4..9)).await.unwrap();
    assert_eq!(contents(&store).unwrap().len(), 9);
    assert_eq!(handle.latched(), None);
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_at_the_wall_waits_and_goes_on() {
    let sim = SimDisk::new();
    let patient = WalOptions { room_patience: Duration::from_secs(600), ..options(Path::new("/wal")) };
    let (mut store, _) = WalStore::open(sim.shared(), patient).unwrap();
    let handle = store.handle();
    until_spare(&handle).await;
    sim.set_inodes_left(Some(0));
    let mut writing = store.clone();
    let write = tokio::spawn(async move { append(&mut writing, large(0..12)).await });
    until("the wall", || handle.room().writer_waits).await;
    assert!(handle.room().refuse_clients().is_some_and(|why| why.contains("No space left")));
    assert_eq!(
        handle.io_in_flight().filter(|io| io.waits == Waits::Somebody),
        None,
        "a full disk is no disk that hangs"
    );
    assert!(!write.is_finished());
    sim.set_inodes_left(None);
    write.await.unwrap().unwrap();
    assert_eq!(handle.latched(), None);
    assert_eq!(contents(&store).unwrap().len(), 12);
    // Closing does not wait for room.
    sim.set_inodes_left(Some(0));
    let write = tokio::spawn(async move { append(&mut store, large(12..24)).await });
    until("the wall again", || handle.room().writer_waits).await;
    let closed = tokio::task::spawn_blocking(move || handle.close()).await.unwrap();
    assert_eq!(closed.unwrap_err().operation, "begin");
    assert!(write.await.unwrap().is_err(), "acknowledged without room");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spare_of_an_earlier_process_is_used_on_a_full_disk() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    append(&mut store, large(0..2)).await.unwrap();
    until_spare(&store.handle()).await;
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    assert!(sim.shared().list(Path::new("/wal")).unwrap().iter().any(|f| f.name == SPARE_NAME));
    sim.set_space_left(Some(0));
    sim.set_inodes_left(Some(0));
    let hasty = WalOptions { room_patience: Duration::ZERO, ..options(Path::new("/wal")) };
    let (mut store, _) = WalStore::open(sim.shared(), hasty).unwrap();
    append(&mut store, large(2..4)).await.unwrap();
    // That was the reserve; a second segment cannot be had, and what it should have held is not acknowledged.
    assert!(append(&mut store, large(4..8)).await.is_err());
    assert_eq!(store.handle().latched().unwrap().operation, "begin");
    assert_eq!(contents(&store).unwrap().len(), 8, "readable, but neither durable nor acknowledged");
    assert!(tokio::task::spawn_blocking(move || store.handle().close()).await.unwrap().is_err());
    // A start on the full disk finds what was acknowledged.
    let store = open_sim(&sim).unwrap();
    assert!(contents(&store).unwrap().len() >= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_reservation_may_be_full() {
    // The same errno: from a reservation it is a full disk, from anything else a failed one.
    for error in [ENOSPC, EDQUOT] {
        let sim = SimDisk::new();
        sim.fail_next(Kind::Write, "segment.001", error);
        let mut store = open_sim(&sim).unwrap();
        assert!(append(&mut store, large(0..1)).await.is_err());
        assert_eq!(store.handle().latched().unwrap().operation, "write");

        let sim = SimDisk::new();
        let mut store = open_sim(&sim).unwrap();
        until_spare(&store.handle()).await;
        sim.fail_next(Kind::Reserve, "segment.spare", error);
        // Rolls, and prepares again: the first try fails, the next one does not.
        append(&mut store, large(0..6)).await.unwrap();
        until("two tries", || sim.operations().iter().filter(|o| *o == "reserve segment.spare").count() >= 4).await;
        until_spare(&store.handle()).await;
        assert_eq!(store.handle().latched(), None);

        // In space that was reserved there is room: a disk that has none there breaks its promise.
        let sim = SimDisk::new();
        let mut store = open_sim(&sim).unwrap();
        until_spare(&store.handle()).await;
        sim.fail_next(Kind::Write, "segment.spare", error);
        append(&mut store, large(0..2)).await.unwrap();
        let _rolls = append(&mut store, large(2..6)).await;
        until("the latch", || store.handle().latched().is_some()).await;
    }
}

/// Appends until the spare is in use; the next index.
async fn until_rolled(store: &mut WalStore, mut next: u64) -> u64 {
    let segments = store.handle().segment_count();
    while store.handle().segment_count() == segments {
        append(store, large(next..next + 1)).await.unwrap();
        next += 1;
    }
    next
}

/// Runs this test again in a mount namespace of its own, so that nothing stays mounted however it ends.
fn in_own_namespace(test: &str) -> bool {
    if std::env::var_os("STEMEDB_TEST_IN_NAMESPACE").is_some() {
        return true;
    }
    let mut again = std::process::Command::new("unshare");
    again.args(["--mount", "--propagation", "private"]).arg(std::env::current_exe().unwrap());
    again.args(["--exact", test, "--nocapture"]).env("STEMEDB_TEST_IN_NAMESPACE", "1");
    let probe = std::process::Command::new("unshare").args(["--mount", "true"]).output();
    if !probe.is_ok_and(|p| p.status.success()) {
        let why = "no mount namespaces here (needs root and unshare)";
        assert!(std::env::var_os("STEMEDB_TEST_NO_SKIPS").is_none(), "{test}: {why}");
        println!("SKIPPED: {test}: {why}");
        return false;
    }
    assert!(again.status().unwrap().success(), "{test} failed in its namespace");
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_tmpfs_refuses_and_goes_on_without_a_restart() {
    if !in_own_namespace("a_full_tmpfs_refuses_and_goes_on_without_a_restart") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut mount = std::process::Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=1m,nr_inodes=16", "tmpfs"]).arg(dir.path());
    assert!(mount.status().unwrap().success());
    let disk = RealDisk::new();
    let total = disk.space(dir.path()).unwrap();
    assert_eq!((total.bytes_total, total.inodes_free), (1 << 20, 15));
    let wal = dir.path().join("wal");
    let (mut store, _) = WalStore::open(RealDisk::new(), options(&wal)).unwrap();
    let handle = store.handle();
    until_spare(&handle).await;
    // Somebody else fills the disk to the last page.
    let ballast = dir.path().join("ballast");
    let file = disk.create(&ballast).unwrap();
    while file.reserve(file.bytes().unwrap() + 4096).is_ok() {}
    assert_eq!(disk.space(dir.path()).unwrap().bytes_free, 0);
    assert!(file.write_at(&[1; 8192], file.bytes().unwrap()).is_err());
    let mut next = until_rolled(&mut store, 0).await;
    until("a refusal", || handle.room().refuse_clients().is_some()).await;
    // What is on its way already still has room.
    append(&mut store, vec![entry(1, next, "replicated")]).await.unwrap();
    drop(file);
    disk.remove(&ballast).unwrap();
    until_spare(&handle).await;
    append(&mut store, large(next + 1..next + 8)).await.unwrap();
    next += 8;
    until_spare(&handle).await;
    assert_eq!(handle.latched(), None);
    // No inode for the next segment: the same.
    let mut made = 0;
    while disk.create(&dir.path().join(format!("f{made}"))).is_ok() {
        made += 1;
    }
    until_rolled(&mut store, next).await;
    until("a refusal for want of inodes", || handle.room().refuse_clients().is_some()).await;
    disk.remove(&dir.path().join("f0")).unwrap();
    until_spare(&handle).await;
    let expected = contents(&store).unwrap();
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    let (store, _) = WalStore::open(RealDisk::new(), options(&wal)).unwrap();
    assert_eq!(contents(&store).unwrap(), expected);
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
}
