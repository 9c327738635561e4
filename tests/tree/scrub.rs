//! The scrubber over a real tree and checkpoint: a flipped bit in each kind of file, and exactly that file.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use stemedb::state::engine::scrub::{PassEnd, RealClock, ScrubObserver, ScrubSource, Scrubber};
use stemedb::state::engine::{EngineObserver, TreeDamage};
use stemedb::state::machine::StateHandle;
use tokio_util::sync::CancellationToken;

use crate::support::*;

#[derive(Default)]
struct Heard {
    damaged: Mutex<Vec<&'static str>>,
}

impl ScrubObserver for Heard {
    fn bytes_read(&self, _: u64) {}
    fn damaged(&self, kind: &'static str) {
        self.damaged.lock().unwrap().push(kind);
    }
    fn progress(&self, part: f64) {
        assert!((0.0..=1.0).contains(&part));
    }
    fn pass_done(&self, _: u64) {}
}

fn scrub(dir: &Path, sources: Vec<Arc<dyn ScrubSource>>) -> (PassEnd, Vec<&'static str>) {
    let heard = Arc::new(Heard::default());
    let observer = Arc::clone(&heard) as Arc<dyn ScrubObserver>;
    let mut scrubber = Scrubber::new(dir, sources, u64::MAX, observer, Arc::new(RealClock), CancellationToken::new());
    let end = scrubber.pass();
    (end, std::mem::take(&mut *heard.damaged.lock().unwrap()))
}

/// Damages reported, each with its file.
#[derive(Default)]
struct Reports(Mutex<Vec<PathBuf>>);

impl EngineObserver for Reports {
    fn operation_done(&self, _: &'static str, _: Duration) {}
    fn operation_failed(&self, _: &'static str, _: &stemedb::state::engine::EngineError) {}
    fn damage_found(&self, damage: &TreeDamage) {
        self.0.lock().unwrap().push(damage.file.clone().unwrap());
    }
}

#[tokio::test]
async fn a_flipped_bit_in_each_kind_of_file_is_found_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let reports = Arc::new(Reports::default());
    let observer = Arc::clone(&reports) as Arc<dyn EngineObserver>;
    let mut machine = open_with(dir.path(), stemedb::state::engine::lsm::LsmOptions { observer, ..options() }).unwrap();
    fill(&mut machine, 0..600).await;
    machine.seal_blocking().unwrap();
    let handle = machine.handle();
    assert_eq!((PassEnd::Complete { damaged: 0 }, vec![]), scrub(dir.path(), handle.scrub_sources()));

    let found = tables(dir.path());
    let kinds = [
        dir.path().join("kv/active"),
        tree(dir.path()).join("current"),
        manifest(dir.path()),
        found[0].clone(),
        found[found.len() / 2].clone(),
        found[found.len() - 1].clone(),
    ];
    for path in &kinds {
        let good = fs::read(path).unwrap();
        for bit in [0, good.len() * 4, good.len() * 8 - 1] {
            flip(path, bit);
            let (end, kinds) = scrub(dir.path(), handle.scrub_sources());
            assert_eq!((PassEnd::Complete { damaged: 1 }, vec!["tree"]), (end, kinds), "{}", path.display());
            let named = std::mem::take(&mut *reports.0.lock().unwrap());
            // `current` and its manifest witness for one another.
            assert!(named.len() == 1 && (named[0] == *path || !kinds_are_tables(path)), "{named:?}");
            rewrite(path, &good);
        }
        // Shorter, and gone.
        rewrite(path, &good[..good.len() - 1]);
        assert_eq!(PassEnd::Complete { damaged: 1 }, scrub(dir.path(), handle.scrub_sources()).0);
        fs::remove_file(path).unwrap();
        assert_eq!(PassEnd::Complete { damaged: 1 }, scrub(dir.path(), handle.scrub_sources()).0, "{}", path.display());
        rewrite(path, &good);
        reports.0.lock().unwrap().clear();
    }
    let first = handle.damage().borrow().clone().unwrap();
    assert_eq!((Some(&kinds[0]), "scrub"), (first.file.as_ref(), first.operation));
    assert!(handle.failed().is_none());
}

fn kinds_are_tables(path: &Path) -> bool {
    path.parent().is_some_and(|folder| folder.ends_with("tables"))
}

#[tokio::test]
async fn a_damaged_checkpoint_goes_to_quarantine_and_the_tree_is_not_to_blame() {
    for kind in ["checkpoint.manifest", "current", "v", "tables"] {
        let dir = tempfile::tempdir().unwrap();
        let mut machine = open(dir.path()).unwrap();
        fill(&mut machine, 0..300).await;
        let made = checkpoint(&mut machine).await;
        let handle = machine.handle();
        assert_eq!(PassEnd::Complete { damaged: 0 }, scrub(dir.path(), handle.scrub_sources()).0);
        let path = match kind {
            "tables" => fs::read_dir(made.dir().join("tables")).unwrap().next().unwrap().unwrap().path(),
            "v" => made.dir().join(&made.files().iter().find(|file| file.name.starts_with('v')).unwrap().name),
            name => made.dir().join(name),
        };
        flip(&path, 77);
        let (end, kinds) = scrub(dir.path(), handle.scrub_sources());
        assert_eq!((PassEnd::Complete { damaged: 1 }, vec!["checkpoint"]), (end, kinds), "{kind}");
        assert!(handle.damage().borrow().is_none() && handle.failed().is_none(), "{kind}");
        assert!(handle.checkpoint().is_none(), "{kind}: Raft asks for another one");
        let kept = stemedb::state::engine::quarantine::list(dir.path(), None).unwrap();
        assert_eq!(vec!["checkpoint"], kept.iter().map(|each| each.what.as_str()).collect::<Vec<_>>());
        drop(checkpoint(&mut machine).await);
        assert_eq!(PassEnd::Complete { damaged: 0 }, scrub(dir.path(), handle.scrub_sources()).0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn scrubbing_beside_writes_flushes_and_compactions_finds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let lsm = stemedb::state::engine::lsm::LsmOptions { memtable_bytes_max: 16 * 1024, compaction: true, ..options() };
    let mut machine = open_with(dir.path(), lsm).unwrap();
    fill(&mut machine, 0..50).await;
    let handle = machine.handle();
    let stop = CancellationToken::new();
    let scrubbing = {
        let (dir, handle, stop): (PathBuf, StateHandle, _) = (dir.path().to_owned(), handle.clone(), stop.clone());
        tokio::task::spawn_blocking(move || {
            let mut passes = 0;
            while !stop.is_cancelled() || passes < 3 {
                assert_eq!((PassEnd::Complete { damaged: 0 }, vec![]), scrub(&dir, handle.scrub_sources()));
                passes += 1;
            }
        })
    };
    for round in 0..12 {
        fill(&mut machine, 50 + round * 50..100 + round * 50).await;
        if round % 4 == 3 {
            drop(checkpoint(&mut machine).await);
        }
    }
    stop.cancel();
    scrubbing.await.unwrap();
    assert!(handle.damage().borrow().is_none());
}
