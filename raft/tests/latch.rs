//! The first failed sync ends all writing: no retry, no second sync, no acknowledgement, ever.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod common;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use common::{ListMachine, append, contents, entry, lockstep, open_sim, options};
use openraft::{Config, Raft, storage::RaftLogStorage, type_config::async_runtime::WatchReceiver};
use stemedb_raft::{
    OpenError, Vote, WalObserver, WalOptions, WalStore,
    disk::sim::{FileSystem, SimDisk, SyncFault},
    frame::log_id,
};

async fn latched(sim: &SimDisk) -> WalStore {
    let mut store = open_sim(sim).unwrap();
    append(&mut store, vec![entry(1, 0, "durable")]).await.unwrap();
    // The next segment, which is prepared meanwhile, must not be taken for a write of the log. The idle mark may be the
    // sync that fails: the append that follows is refused alike.
    // The first two such syncs were those of segment 1, before it got its name.
    while sim.operations().iter().filter(|o| *o == "sync segment.spare").count() < 3 {
        tokio::task::yield_now().await;
    }
    sim.fail_next_sync("segment.001", SyncFault::PagesMarkedClean);
    let failed = append(&mut store, vec![entry(1, 1, "never acknowledged")]).await;
    assert!(failed.is_err(), "a group was acknowledged whose sync failed");
    store
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_or_synced_after_the_first_failure() {
    let sim = SimDisk::new();
    let mut store = latched(&sim).await;
    let before = sim.operations();
    assert!(append(&mut store, vec![entry(1, 2, "more")]).await.is_err());
    assert!(store.save_vote(&Vote::new(9, 9)).await.is_err());
    assert!(store.truncate_after(Some(log_id(1, 0))).await.is_err());
    assert!(store.purge(log_id(1, 0)).await.is_err());
    assert!(store.handle().wait_flushed(1).await.is_err());
    let latch = store.handle().latched().unwrap();
    assert_eq!((latch.operation, latch.file.as_str()), ("sync", "segment.001.wal"));
    assert!(store.handle().close().is_err());
    assert_eq!(sim.operations(), before, "the disk was touched after the latch");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_before_is_there_after_eviction_and_restart() {
    for fault in FileSystem::ALL.map(FileSystem::sync_fault) {
        let sim = SimDisk::new();
        let mut store = open_sim(&sim).unwrap();
        append(&mut store, vec![entry(1, 0, "durable")]).await.unwrap();
        sim.fail_next_sync("segment.001", fault);
        assert!(append(&mut store, vec![entry(1, 1, "lost")]).await.is_err());
        assert!(store.handle().close().is_err());
        sim.kill();
        // With or without the page cache's lie, a restart tells the same about what was acknowledged.
        for (evicted, junk) in [(false, false), (true, false), (false, true)] {
            let copy = sim.fork();
            if junk {
                // A file that is no segment, under a later number: the one before it is still the newest.
                copy.shared().create(Path::new("/wal/segment.900.wal")).unwrap().write_at(b"junk", 0).unwrap();
            }
            if evicted {
                copy.evict();
            }
            let reopened = open_sim(&copy).unwrap();
            let found = contents(&reopened).unwrap();
            assert_eq!(found[0], "0:1:durable", "{fault:?}, evicted: {evicted}");
            // An entry that is kept from the cache must have been written again by the restart.
            reopened.handle().close().unwrap();
            copy.evict();
            assert_eq!(contents(&open_sim(&copy).unwrap()).unwrap(), found, "{fault:?}, evicted: {evicted}");
        }
    }
}

/// One sync lied, and an entry was acknowledged that only the page cache has. It is missed before the cache is evicted
/// as after it, also where a file of a later number, which is no segment, lies behind its segment.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_sync_that_lied_has_left_in_the_page_cache_is_not_believed() {
    let sim = SimDisk::new();
    let (mut store, _) = WalStore::open(sim.shared(), lockstep(Path::new("/wal"), 3)).unwrap();
    append(&mut store, vec![entry(1, 0, "durable")]).await.unwrap();
    sim.fail_next_sync("segment.001", SyncFault::ReportedLate);
    append(&mut store, vec![entry(1, 1, "acknowledged")]).await.unwrap();
    // The mark that promises it is on the disk when its own sync hears of the error.
    assert!(store.handle().close().is_err());
    sim.kill();
    for (junk, evicted) in [(false, false), (false, true), (true, false), (true, true)] {
        let copy = sim.fork();
        if junk {
            copy.shared().create(Path::new("/wal/segment.900.wal")).unwrap().write_at(b"junk", 0).unwrap();
        }
        if evicted {
            copy.evict();
        }
        match open_sim(&copy).map(|store| contents(&store).unwrap()) {
            Err(OpenError::Repair(damage)) => assert_eq!(damage[0].index, 1, "{damage:?}"),
            other => panic!("junk: {junk}, evicted: {evicted}: {other:?}"),
        }
    }
}

/// Panics on the writer's thread once it is armed, when the next sync has returned.
#[derive(Default)]
struct Panics(AtomicBool);

impl WalObserver for Panics {
    fn fsync_done(&self, _segment: &str, _took: Duration) {
        assert!(!self.0.load(Ordering::SeqCst), "planted");
    }
    fn fsync_failed(&self, _segment: &str, _error: &std::io::Error) {}
    fn write_failed(&self, _operation: &'static str, _file: &str, _error: &std::io::Error) {}
    fn segment_rotated(&self) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_writer_latches_and_answers_everybody() {
    let sim = SimDisk::new();
    let panics = Arc::new(Panics::default());
    let options = WalOptions { observer: Arc::clone(&panics) as Arc<_>, ..options(Path::new("/wal")) };
    let (mut store, _) = WalStore::open(sim.shared(), options).unwrap();
    panics.0.store(true, Ordering::SeqCst);
    let patience = Duration::from_secs(60);
    let answer = tokio::time::timeout(patience, append(&mut store, vec![entry(1, 0, "x")])).await.unwrap();
    // The log's own words, not those of a callback that was dropped unanswered.
    assert!(answer.unwrap_err().to_string().contains("the writer panicked"));
    assert_eq!(store.handle().latched().unwrap().error, "the writer panicked");
    assert!(append(&mut store, vec![entry(1, 1, "after")]).await.is_err());
    assert!(store.save_vote(&Vote::new(9, 9)).await.is_err());
    assert!(store.handle().close().is_err());
}

struct Nowhere;

impl openraft::RaftNetworkFactory<stemedb_raft::TypeConfig> for Nowhere {
    type Network = Self;
    async fn new_client(&mut self, _target: u64, _node: &stemedb_raft::Member) -> Self {
        Self
    }
}

mod unreachable {
    //! A network on which nobody answers.
    use std::{future::Future, io};

    use openraft::{
        errors::{RPCError, ReplicationClosed, StreamingError, Unreachable},
        network::{RPCOption, v2::RaftNetworkV2},
        raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse},
        type_config::alias::SnapshotOf,
    };
    use stemedb_raft::{TypeConfig as C, Vote};

    fn nobody() -> Unreachable<C> {
        Unreachable::new(&io::Error::other("nobody is there"))
    }

    impl RaftNetworkV2<C> for super::Nowhere {
        type SnapshotData = <super::ListMachine as openraft::RaftSnapshotBuilder<C>>::SnapshotData;
        async fn append_entries(
            &mut self,
            _rpc: AppendEntriesRequest<C>,
            _option: RPCOption,
        ) -> Result<AppendEntriesResponse<C>, RPCError<C>> {
            Err(RPCError::Unreachable(nobody()))
        }
        async fn vote(&mut self, _rpc: VoteRequest<C>, _option: RPCOption) -> Result<VoteResponse<C>, RPCError<C>> {
            Err(RPCError::Unreachable(nobody()))
        }
        async fn full_snapshot(
            &mut self,
            _vote: Vote,
            _snapshot: SnapshotOf<C, Self::SnapshotData>,
            _cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
            _option: RPCOption,
        ) -> Result<SnapshotResponse<C>, StreamingError<C>> {
            Err(StreamingError::Unreachable(nobody()))
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_raft_core_ends_and_the_write_is_not_acknowledged() {
    let sim = SimDisk::new();
    let (store, _) = WalStore::open(sim.shared(), options(Path::new("/wal"))).unwrap();
    let config = Arc::new(Config::default().validate().unwrap());
    let raft = Raft::new(1, config, Nowhere, store.clone(), ListMachine::default()).await.unwrap();
    raft.initialize(std::collections::BTreeMap::from([(1, stemedb_raft::Member::default())])).await.unwrap();
    raft.wait(Some(Duration::from_secs(60))).metrics(|m| m.current_leader == Some(1), "leads").await.unwrap();
    sim.fail_next_sync("segment.001", SyncFault::PagesMarkedClean);
    let write = raft.client_write(stemedb_raft::EntryData("x".into())).await;
    assert!(write.is_err(), "acknowledged: {write:?}");
    let stopped = raft.wait(Some(Duration::from_secs(60))).metrics(|_| false, "never").await;
    assert!(matches!(stopped, Err(openraft::metrics::WaitError::ShuttingDown)), "the core goes on: {stopped:?}");
    let state = raft.metrics().borrow_watched().running_state.clone();
    assert!(matches!(state, Err(openraft::errors::Fatal::StorageError(_))), "{state:?}");
}
