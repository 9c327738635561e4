//! Each single change that a log makes on its disk fails once, one run for each and for each errno. The log latches
//! at once, whatever the operation and whatever the errno; nothing is written, synced, renamed or removed after it;
//! nobody is answered Ok; the observer is told exactly once. Only a reservation of the spare may be *full* instead.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod common;

use std::{
    collections::BTreeSet,
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use common::{append, entry, lockstep, open_sim, options};
use openraft::storage::RaftLogStorage;
use stemedb_raft::{
    Vote, WalObserver, WalOptions, WalStore,
    disk::{
        Disk, DiskFile, FolderLock, FoundFile, Space,
        sim::{FileSystem, Kind, SimDisk},
    },
    frame::log_id,
};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;
const EDQUOT: i32 = 122;

/// More than all changes of [`life`].
const CHANGES_MAX: u64 = 400;

#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl WalObserver for Told {
    fn fsync_done(&self, _segment: &str, _took: Duration) {}
    fn fsync_failed(&self, segment: &str, error: &io::Error) {
        self.0.lock().unwrap().push(format!("sync {segment}: {error}"));
    }
    fn write_failed(&self, operation: &'static str, file: &str, error: &io::Error) {
        self.0.lock().unwrap().push(format!("{operation} {file}: {error}"));
    }
    fn segment_rotated(&self) {}
}

fn entries(term: u64, range: std::ops::Range<u64>) -> Vec<stemedb_raft::Entry> {
    range.map(|i| entry(term, i, &"x".repeat(15_000))).collect()
}

/// A first start, a roll in the middle of a group, a vote, a truncation, a roll, a purge, a vote, the mark of closing.
/// Returns whether each step was answered with Ok, up to and including the first that was not, and the store.
async fn life(sim: &SimDisk, told: &Arc<Told>) -> (Vec<bool>, Option<WalStore>) {
    let options = WalOptions { observer: Arc::clone(told) as Arc<_>, ..lockstep(Path::new("/wal"), 1) };
    let Ok((mut store, _)) = WalStore::open(sim.shared(), options) else {
        return (vec![false], None);
    };
    let mut steps = vec![true];
    for step in 0..8 {
        let done = match step {
            0 => append(&mut store, entries(1, 0..6)).await,
            1 => store.save_vote(&Vote::new(2, 1)).await,
            2 => store.truncate_after(Some(log_id(1, 4))).await,
            3 => append(&mut store, entries(2, 5..14)).await,
            4 => store.purge(log_id(2, 9)).await,
            5 => store.save_vote(&Vote::new(3, 1)).await,
            6 => append(&mut store, entries(2, 14..15)).await,
            _ => {
                let handle = store.handle();
                let closed = tokio::task::spawn_blocking(move || handle.close()).await.unwrap();
                closed.map_err(Into::into)
            }
        };
        steps.push(done.is_ok());
        if done.is_err() {
            break;
        }
    }
    (steps, Some(store))
}

/// A log that has latched answers nothing but its error, and touches nothing.
async fn all_fails(store: &mut WalStore) {
    let next = store.handle().last_log_id().map(|id| id.index() + 1).unwrap_or_default();
    assert!(append(store, entries(9, next..next + 1)).await.is_err());
    assert!(store.save_vote(&Vote::new(9, 9)).await.is_err());
    assert!(store.truncate_after(None).await.is_err());
    assert!(store.purge(log_id(2, 13)).await.is_err());
    assert!(store.handle().repair_header(1).await.is_err());
    assert!(store.handle().wait_flushed(next + 100).await.is_err());
    let handle = store.handle();
    assert!(tokio::task::spawn_blocking(move || handle.close()).await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_change_that_fails_is_the_last_one() {
    let mut failed = BTreeSet::new();
    for (file_system, error) in FileSystem::ALL
        .map(|f| (f, EIO))
        .into_iter()
        .chain([EROFS, ENOSPC, EDQUOT].map(|errno| (FileSystem::Ext4, errno)))
    {
        for changes in 0.. {
            assert!(changes < CHANGES_MAX, "this life does not end");
            let sim = SimDisk::with_file_system(file_system);
            sim.fail_change_after(changes, error);
            let told = Arc::new(Told::default());
            let (steps, store) = life(&sim, &told).await;
            let operations = sim.operations();
            let Some(struck) = operations.get(changes as usize).cloned() else {
                assert!(steps.iter().all(|ok| *ok), "nothing failed, and {steps:?}");
                break;
            };
            let what = format!("errno {error}, change {changes}: {struck}");
            let told = told.0.lock().unwrap().clone();
            let may_be_full = ["reserve segment.spare", "create segment.spare"].contains(&&*struck);
            if may_be_full && [ENOSPC, EDQUOT].contains(&error) {
                // Full, not failed: at the wall it ends all the same, elsewhere nobody notices.
                let at_the_wall = told.len() == 1 && (told[0].starts_with("begin") || told[0].starts_with("create"));
                assert!(told.is_empty() && steps.iter().all(|ok| *ok) || at_the_wall, "{what}: {told:?}");
                continue;
            }
            assert_eq!(operations.len() as u64, changes + 1, "{what}: then {:?}", &operations[changes as usize + 1..]);
            assert_eq!(steps.last(), Some(&false), "{what}: everybody was answered with Ok");
            // The very first changes are those of opening, which tells its caller and nobody else.
            if let Some(mut store) = store {
                assert_eq!(told.len(), 1, "{what}: {told:?}");
                let latched = store.handle().latched().unwrap();
                assert_eq!(struck.starts_with("sync"), latched.operation.starts_with("sync"), "{what}: {latched}");
                assert_eq!(struck.starts_with("sync"), told[0].starts_with("sync"), "{what}: {told:?}");
                assert!(latched.error.contains(&format!("os error {error}")), "{what}: {latched}");
                all_fails(&mut store).await;
                drop(store);
            } else {
                assert!(told.len() <= 1, "{what}: {told:?}");
            }
            assert_eq!(sim.operations(), operations, "{what}: the disk was touched after the latch");
            failed.insert(struck);
        }
    }
    for must in [
        "create hard-state.1",
        "write hard-state.1",
        "sync hard-state.1",
        "write hard-state.2",
        "sync hard-state.2",
        "create segment.spare",
        "reserve segment.spare",
        "write segment.spare",
        "sync segment.spare",
        "rename segment.002.wal",
        "sync folder",
        "write segment.001.wal",
        "sync segment.001.wal",
        "remove segment.001.wal",
    ] {
        assert!(failed.contains(must), "{must} never failed: {failed:?}");
    }
}

async fn until_latched(store: &WalStore) -> stemedb_raft::Latched {
    let mut latched = store.handle().watch_latched();
    let patience = Duration::from_secs(60);
    let found = tokio::time::timeout(patience, latched.wait_for(Option::is_some)).await.unwrap();
    found.unwrap().clone().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_the_preparing_thread_latches_at_once() {
    for kind in [Kind::Create, Kind::Reserve, Kind::Write, Kind::Sync] {
        let sim = SimDisk::new();
        let told = Arc::new(Told::default());
        let options = WalOptions { observer: Arc::clone(&told) as Arc<_>, ..options(Path::new("/wal")) };
        let (mut store, _) = WalStore::open(sim.shared(), options).unwrap();
        while !store.handle().room().spare_ready {
            tokio::task::yield_now().await;
        }
        // The header of the next segment is written and synced under the spare's name too: only the spare behind it
        // is meant, so its making is held up until the roll is over.
        match kind {
            Kind::Create | Kind::Reserve => sim.fail_next(kind, "segment.spare", EIO),
            _ => sim.hang(Kind::Reserve, "segment.spare"),
        }
        append(&mut store, entries(1, 0..3)).await.unwrap();
        if ![Kind::Create, Kind::Reserve].contains(&kind) {
            while sim.hung() == 0 {
                tokio::task::yield_now().await;
            }
            sim.fail_next(kind, "segment.spare", EIO);
            sim.release();
        }
        // Nobody asks for the spare, and nothing else happens.
        let latched = until_latched(&store).await;
        assert_eq!(latched.file, "segment.spare", "{kind:?}: {latched}");
        while told.0.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        all_fails(&mut store).await;
        assert_eq!(told.0.lock().unwrap().len(), 1);
    }
}

/// A disk under which the thread that prepares segments panics once it is armed.
struct Panicking {
    disk: Arc<dyn Disk>,
    armed: Arc<AtomicBool>,
}

impl Disk for Panicking {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.disk.create_dir_all(dir)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<FoundFile>> {
        self.disk.list(dir)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.disk.open(path)
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        assert!(!self.armed.load(Ordering::SeqCst), "planted");
        self.disk.create(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }
    fn space(&self, dir: &Path) -> io::Result<Space> {
        self.disk.space(dir)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn FolderLock>> {
        self.disk.lock(path)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_preparing_thread_latches_at_once() {
    let sim = SimDisk::new();
    let armed = Arc::new(AtomicBool::new(false));
    let disk = Arc::new(Panicking { disk: sim.shared(), armed: Arc::clone(&armed) });
    let (mut store, _) = WalStore::open(disk, options(Path::new("/wal"))).unwrap();
    while !store.handle().room().spare_ready {
        tokio::task::yield_now().await;
    }
    armed.store(true, Ordering::SeqCst);
    let _either = append(&mut store, entries(1, 0..6)).await;
    let latched = until_latched(&store).await;
    assert!(latched.error.contains("panicked"), "{latched}");
    all_fails(&mut store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_comes_late_latches_too_and_loses_only_what_it_covered() {
    for file_system in FileSystem::ALL {
        let sim = SimDisk::with_file_system(file_system);
        let mut store = open_sim(&sim).unwrap();
        append(&mut store, entries(1, 0..1)).await.unwrap();
        // The idle mark is written back by the kernel, which fails; the next sync says so.
        store.handle().wait_flushed(0).await.unwrap();
        sim.fail_write_back(Path::new("/wal/segment.001.wal")).unwrap();
        let mut answers = Vec::new();
        for index in 1..3 {
            answers.push(append(&mut store, entries(1, index..index + 1)).await.is_ok());
        }
        assert_eq!(answers, [false, false], "{file_system:?}");
        sim.kill();
        sim.evict();
        let store = open_sim(&sim).unwrap();
        assert!(!common::contents(&store).unwrap().is_empty(), "{file_system:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_turns_read_only_latches() {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    append(&mut store, entries(1, 0..1)).await.unwrap();
    sim.set_read_only(true);
    assert!(append(&mut store, entries(1, 1..2)).await.is_err());
    assert!(until_latched(&store).await.error.contains("Read-only"));
    all_fails(&mut store).await;
    assert_eq!(common::contents(&store).unwrap().len() as u64, store.handle().last_log_id().unwrap().index() + 1);
}
