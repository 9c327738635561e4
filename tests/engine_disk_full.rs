//! A disk without room: flushes wait for it, nothing is lost, nothing is latched.
//!
//! Needs a file system of 24 to 64 MiB of its own, for example
//! `mount -t tmpfs -o size=40m tmpfs /mnt/small && STEMEDB_TEST_SMALL_DISK=/mnt/small cargo test
//! --test engine_disk_full -- --ignored`. `scripts/test.sh --full` mounts one where it may.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use stemedb::state::engine::lsm::{LsmEngine, LsmOptions};
use stemedb::state::engine::{AppliedState, EngineError, EngineObserver, StateRead, WriteBatch};

/// Passes on the name of each operation that failed.
struct Failures(Mutex<mpsc::Sender<String>>);

impl EngineObserver for Failures {
    fn operation_done(&self, _: &'static str, _: Duration) {}
    fn operation_failed(&self, operation: &'static str, error: &EngineError) {
        let text = format!("{operation} {} {error}", error.is_disk_full());
        let _ = self.0.lock().unwrap().send(text);
    }
}

#[test]
#[ignore = "needs a small file system in STEMEDB_TEST_SMALL_DISK"]
fn a_full_disk_is_waited_out() {
    let Some(disk) = std::env::var_os("STEMEDB_TEST_SMALL_DISK") else {
        println!("SKIPPED: STEMEDB_TEST_SMALL_DISK names no small file system");
        return;
    };
    let dir = Path::new(&disk).join("engine");
    let _ = fs::remove_dir_all(&dir);
    let (sender, failures) = mpsc::channel();
    let observer = Arc::new(Failures(Mutex::new(sender)));
    let options = LsmOptions { observer, ..LsmOptions::default() };
    let engine = LsmEngine::open(&dir, options.clone()).unwrap();
    let ballast = Path::new(&disk).join("ballast");
    // 5 MiB that do not compress, so that a flush that passes the look at the free space can
    // still meet the end of the disk. Room left: less than looked for, then more than it but too
    // little for a compaction beside it.
    let mut noise = 1u64;
    for (round, left) in [1u64 << 20, 6 << 20].into_iter().enumerate() {
        let mut batch = WriteBatch::default();
        for n in 0..5_000u32 {
            let value: Vec<u8> = (0..128)
                .flat_map(|_| {
                    noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    noise.to_be_bytes()
                })
                .collect();
            batch.put(format!("f{round}-{n:05}"), value);
        }
        engine.write(&batch).unwrap();
        let mut file = fs::File::create(&ballast).unwrap();
        let stat = rustix::fs::statvfs(&dir).unwrap();
        let fill = (stat.f_bavail * stat.f_frsize).saturating_sub(left);
        file.write_all(&vec![1u8; usize::try_from(fill).unwrap()]).unwrap();
        let applied = AppliedState { fact_index: round as u64 + 1, ..AppliedState::default() };
        engine.rotate(&applied, &WriteBatch::default()).unwrap();
        let failure = failures.recv().unwrap();
        assert!(failure.starts_with("flush true"), "{failure}");
        assert!(engine.failed().is_none());
        assert!(engine.snapshot().get(b"f0-00000").unwrap().is_some(), "reads go on");
        drop(file); // an open file keeps its room
        fs::remove_file(&ballast).unwrap();
        engine.flush_blocking().unwrap();
        assert_eq!(applied, engine.persisted());
    }
    // A compaction needs as much again: it fails whole and leaves nothing behind.
    let before = engine.stats().unwrap();
    let mut file = fs::File::create(&ballast).unwrap();
    let stat = rustix::fs::statvfs(&dir).unwrap();
    let fill = (stat.f_bavail * stat.f_frsize).saturating_sub(2 << 20);
    file.write_all(&vec![1u8; usize::try_from(fill).unwrap()]).unwrap();
    let error = engine.compact_blocking(true).unwrap_err();
    assert!(error.is_disk_full(), "{error}");
    assert!(engine.failed().is_none());
    assert_eq!(before.table_count, engine.stats().unwrap().table_count);
    assert_eq!(before.table_count, fs::read_dir(dir.join("tables")).unwrap().count());
    drop(file);
    fs::remove_file(&ballast).unwrap();
    assert!(engine.compact_blocking(true).unwrap());
    engine.close();
    let engine = LsmEngine::open(&dir, options).unwrap();
    assert_eq!(2, engine.applied().fact_index);
    assert!(engine.snapshot().get(b"f1-04999").unwrap().is_some());
}
