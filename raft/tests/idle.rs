//! An idle writer marks once what is durable, and then costs nothing. One that is closed says what it knows to be committed.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::Duration;

use common::{append, close, entry, open_sim};
use openraft::storage::RaftLogStorage;
use stemedb_raft::disk::sim::SimDisk;

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_log_is_marked_once_and_then_left_alone() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    append(&mut store, vec![entry(1, 0, "x")]).await.unwrap();
    // The first sync under this name is that of the group.
    let marks = || sim.operations().iter().filter(|o| *o == "sync segment.001.wal").skip(1).count();
    let patience = tokio::time::Instant::now() + Duration::from_secs(60);
    while marks() == 0 && tokio::time::Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(marks(), 1, "what is durable was never marked");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let all = sim.operations();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((marks(), sim.operations()), (1, all), "an idle log touches its disk");
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_closed_says_what_is_committed_although_its_end_was_marked_before() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    append(&mut store, vec![entry(1, 0, "x"), entry(1, 1, "y")]).await.unwrap();
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    // Opening marks the end. What is committed is learnt afterwards, and nothing more is written.
    let mut store = open_sim(&sim).unwrap();
    assert_eq!(store.read_committed().await.unwrap(), None);
    let last = store.handle().last_log_id();
    store.save_committed(last).await.unwrap();
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    let mut store = open_sim(&sim).unwrap();
    assert_eq!((store.read_committed().await.unwrap(), last.map(|id| id.index)), (last, Some(1)));
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
}
