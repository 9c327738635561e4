//! A full disk is no failed disk as long as nothing but a reservation met it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

mod common;

use std::{path::Path, time::Duration};

use common::{SEGMENT_BYTES, append, close, contents, entry, open_sim};
use stemedb_raft::{disk::sim::SimDisk, open::SPARE_NAME};

fn large(range: std::ops::Range<u64>) -> Vec<stemedb_raft::Entry> {
    range.map(|i| entry(1, i, &"x".repeat(15_000))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn room_that_is_back_before_the_segment_ends_was_never_missed() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    sim.set_space_left(Some(SEGMENT_BYTES / 2));
    append(&mut store, large(0..2)).await.unwrap();
    // The spare was tried and given back.
    let spare_was_tried = || sim.operations().iter().any(|o| o == "reserve segment.spare");
    let patience = tokio::time::Instant::now() + Duration::from_secs(60);
    while !spare_was_tried() && tokio::time::Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(spare_was_tried());
    sim.set_space_left(None);
    append(&mut store, large(2..8)).await.unwrap();
    assert_eq!(contents(&store).unwrap().len(), 8);
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spare_of_an_earlier_process_is_used_on_a_full_disk() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    append(&mut store, large(0..2)).await.unwrap();
    // Closing waits for the spare.
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    assert!(sim.shared().list(Path::new("/wal")).unwrap().iter().any(|f| f.name == SPARE_NAME));
    sim.set_space_left(Some(0));
    let mut store = open_sim(&sim).unwrap();
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
