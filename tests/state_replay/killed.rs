//! kill -9 in the middle of flushes, compactions, checkpoints and swaps, in a process of its own.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::RaftSnapshotBuilder;
use openraft::storage::RaftStateMachine;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::history::history;
use super::{Machine, Outcomes, apply, assert_same, bodies, open};

const SEED: u64 = 77;
const ENTRIES: u64 = 6_000;
const MEMTABLE_BYTES: u64 = 24 * 1024;
const DIR: &str = "STEMEDB_KILLED_DIR";

/// Applies from the persisted applied id on, with everything going on at once.
async fn work(dir: &Path, upto: u64) -> Machine {
    let entries = history(SEED, ENTRIES);
    let outcomes = Arc::new(Mutex::new(Outcomes::default()));
    let mut machine = open(dir, MEMTABLE_BYTES, &outcomes);
    let mut at = machine.applied_state().await.unwrap().0.map_or(0, |id| id.index + 1);
    let mut rng = StdRng::seed_from_u64(at);
    while at < upto {
        let to = (at + rng.random_range(1..40)).min(upto);
        // The outcomes of this process alone: the parent compares rows.
        *outcomes.lock().unwrap() = Outcomes::default();
        apply(&mut machine, &entries[at as usize..to as usize]).await;
        at = to;
        match rng.random_range(0..12) {
            0 => {
                let mut builder = machine.try_create_snapshot_builder(true).await.unwrap();
                tokio::spawn(async move { builder.build_snapshot().await });
            }
            1 => {
                let mut builder = machine.try_create_snapshot_builder(true).await.unwrap();
                let built = builder.build_snapshot().await.unwrap();
                machine.install_snapshot(&built.meta, built.snapshot).await.unwrap();
            }
            2 => {
                let engine = machine.handle().engine();
                tokio::task::spawn_blocking(move || engine.compact_blocking(true));
            }
            _ => {}
        }
    }
    machine
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the process that is killed; started by the test below"]
async fn child() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    work(Path::new(&dir), ENTRIES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_any_moment_loses_and_doubles_nothing() {
    let kills = std::env::var("STEMEDB_REPLAY_KILLS").map_or(8, |text| text.parse().unwrap());
    let (twin_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut rng = StdRng::seed_from_u64(5);
    for _ in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::child", "--ignored"])
            .env(DIR, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lives = Duration::from_millis(rng.random_range(200..1_500));
        tokio::time::sleep(lives).await;
        let ended = child.try_wait().unwrap();
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(ended.is_none_or(|status| status.success()), "the child failed: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
    let outcomes = Arc::new(Mutex::new(Outcomes::default()));
    let entries = history(SEED, ENTRIES);
    let mut killed = open(dir.path(), MEMTABLE_BYTES, &outcomes);
    let reached = killed.applied_state().await.unwrap().0.map_or(0, |id| id.index + 1);
    println!("{kills} kills, {reached} of {ENTRIES} entries on disk");
    let upto = (reached + 300).min(ENTRIES);
    let mut twin = open(twin_dir.path(), 64 << 20, &outcomes);
    apply(&mut twin, &entries[..upto as usize]).await;
    outcomes.lock().unwrap().next = bodies(&entries, reached);
    apply(&mut killed, &entries[reached as usize..upto as usize]).await;
    assert_same(&mut twin, &mut killed).await;
}
