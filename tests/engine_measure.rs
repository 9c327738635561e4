//! Disk and memory of a million rows like assertions. Prints, asserts nothing; run by hand:
//! `cargo test --release --test engine_measure -- --ignored --nocapture`.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::state::engine::lsm::{LsmEngine, LsmOptions};
use stemedb::state::engine::{AppliedState, WriteBatch};

const ASSERTIONS: u64 = 1_000_000;

fn status(field: &str) -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find(|line| line.starts_with(field)).unwrap_or_default().to_owned()
}

#[test]
#[ignore = "takes a minute; prints figures"]
fn a_million_assertions() {
    let dir = tempfile::tempdir().unwrap();
    let engine = LsmEngine::open(dir.path(), LsmOptions::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let mut user_bytes = 0u64;
    let began = tokio::time::Instant::now();
    for entry in 0..ASSERTIONS / 100 {
        let mut batch = WriteBatch::default();
        for n in 0..100 {
            let index = entry * 100 + n;
            let id: u128 = rng.random();
            let path = format!("debian/section-{}/package-{}", index % 60, index / 8);
            let key = format!("f{path}\0predicate-{}\0", index % 8);
            let mut key = key.into_bytes();
            key.extend(index.to_be_bytes());
            // 150 bytes of which a third does not compress.
            let noise: String = (0..50).map(|_| char::from(rng.random_range(b'!'..b'~'))).collect();
            let value = format!("{id:x}{noise}{}", "the value of an assertion, in plain words ".repeat(2));
            user_bytes += (key.len() + value.len()) as u64;
            let mut id_key = b"i".to_vec();
            id_key.extend(id.to_be_bytes());
            batch.put(id_key, key.clone());
            batch.put(key, value);
        }
        engine.write(&batch).unwrap();
        engine.publish();
        if engine.wants_rotation() {
            let applied = AppliedState { fact_index: entry, ..AppliedState::default() };
            engine.rotate(&applied, &WriteBatch::default()).unwrap();
        }
        runtime.block_on(engine.wait_for_room());
    }
    println!("written in {:?}; {} {}", began.elapsed(), status("VmRSS"), status("VmHWM"));
    engine.rotate(&AppliedState::default(), &WriteBatch::default()).unwrap();
    engine.flush_blocking().unwrap();
    engine.compact_blocking(false).unwrap();
    println!("compacted in {:?}; {} {}", began.elapsed(), status("VmRSS"), status("VmHWM"));
    let stats = engine.stats().unwrap();
    println!(
        "{} bytes per assertion on disk, {} given (without the id row); {stats:?}",
        stats.table_bytes / ASSERTIONS,
        user_bytes / ASSERTIONS
    );
    engine.compact_blocking(true).unwrap();
    let stats = engine.stats().unwrap();
    println!("after a major compaction {} bytes per assertion", stats.table_bytes / ASSERTIONS);
}
