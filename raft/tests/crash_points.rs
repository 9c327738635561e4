//! A process is killed before each single change that it makes on the disk, one run for each, from the first
//! start of an empty folder on. Nothing that it wrote is lost then, so the next start must always succeed.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

mod common;

use std::path::Path;

use common::{append, close, contents, entry, open_sim};
use openraft::storage::RaftLogStorage;
use stemedb_raft::{
    OpenError, Vote,
    disk::{Disk, sim::SimDisk},
    frame::log_id,
    index::segment_number,
};

/// More than all changes of [`life`]; those of the thread that prepares segments come on top.
const CHANGES: u64 = 110;

/// A first start, a roll in the middle of a group, a vote, a truncation, a purge.
async fn life(sim: &SimDisk) -> Result<(), std::io::Error> {
    let mut store = open_sim(sim).map_err(std::io::Error::other)?;
    let large = "x".repeat(15_000);
    let work = async {
        append(&mut store, (0..6).map(|i| entry(1, i, &large)).collect()).await?;
        store.save_vote(&Vote::new(2, 1)).await?;
        store.truncate_after(Some(log_id(1, 4))).await?;
        append(&mut store, (5..9).map(|i| entry(2, i, &large)).collect()).await?;
        store.purge(log_id(1, 3)).await
    };
    let done = work.await;
    let closed = tokio::task::spawn_blocking(move || store.handle().close()).await.unwrap();
    done.and_then(|()| Ok(closed?))
}

fn newest(disk: &dyn Disk) -> String {
    let names = disk.list(Path::new("/wal")).unwrap().into_iter().map(|f| f.name);
    names.filter(|name| segment_number(name).is_some()).max_by_key(|name| segment_number(name)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_process_that_is_killed_anywhere_starts_again() {
    for changes in 0..CHANGES {
        let sim = SimDisk::new();
        sim.lose_power_after(changes);
        let ended = life(&sim).await;
        assert!(changes + 1 < CHANGES || ended.is_ok(), "{CHANGES} changes are too few: {ended:?}");
        sim.kill();
        // It goes on, in whatever segment it was killed.
        let mut store = open_sim(&sim).unwrap_or_else(|e| panic!("killed after {changes} changes: {e}"));
        let next = store.handle().last_log_id().map(|id| id.index() + 1).unwrap_or_default();
        append(&mut store, vec![entry(3, next, "acknowledged")]).await.unwrap();
        let expected = contents(&store).unwrap();
        tokio::task::spawn_blocking(move || close(store)).await.unwrap();
        // What it acknowledged is there after a power cut that loses everything that was not synced, names too.
        let cut = sim.fork();
        cut.lose_unsynced();
        let store = open_sim(&cut).unwrap_or_else(|e| panic!("killed after {changes} changes, then no power: {e}"));
        assert_eq!(contents(&store).unwrap(), expected, "killed after {changes} changes");
        tokio::task::spawn_blocking(move || close(store)).await.unwrap();
        // And the loss of the segment that has it is noticed.
        let disk = sim.shared();
        disk.remove(&Path::new("/wal").join(newest(&*disk))).unwrap();
        match open_sim(&sim) {
            Err(OpenError::Repair(_)) => {}
            Err(other) => panic!("killed after {changes} changes: {other}"),
            Ok(_) => panic!("killed after {changes} changes: a log without its newest segment opened"),
        }
    }
}
