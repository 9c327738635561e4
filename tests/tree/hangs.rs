//! A disk under the tree that does not answer reads: nothing else would say so.

use std::fs::{self, File};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use stemedb::cli::faulty_disk::wire::{Action, Held, Kind, Rule};
use stemedb::clock;
use stemedb::state::engine::lsm::{LsmEngine, LsmOptions};
use stemedb::state::engine::{AppliedState, StateRead, WriteBatch};
use stemedb_raft::io_times::{IoInFlight, Waits};

use crate::rig::{Rig, evict};

const PAUSE: Duration = Duration::from_millis(5);
/// Half a minute, for a tenth of a second.
const TRIES: usize = 6_000;
/// Between two reads that do not hang: shorter than any time for which one has to be seen.
const OTHERS_PAUSE: Duration = Duration::from_millis(1);
/// So many reads end while one hangs.
const OTHERS_MIN: usize = 10;
const FROM_MEMORY: &[u8] = b"k00010";

#[test]
fn a_read_that_hangs_is_seen_by_whoever_watches_the_disk() {
    let Some(rig) = Rig::new(64) else { return };
    let options = LsmOptions { compaction: false, ..LsmOptions::default() };
    let io_times = Arc::clone(&options.io_times);
    let engine = LsmEngine::open(&rig.path("kv"), options).unwrap();
    let mut batch = WriteBatch::default();
    for n in 0..2_000 {
        batch.put(Bytes::from(format!("k{n:05}")), Bytes::from(format!("{n} {}", "v".repeat(200))));
    }
    engine.write(&batch).unwrap();
    engine.rotate(&AppliedState::default(), &WriteBatch::default()).unwrap();
    engine.flush_blocking().unwrap();
    // From here on this row comes from memory.
    assert!(engine.written().get(FROM_MEMORY).unwrap().is_some());
    for table in fs::read_dir(rig.path("kv/tables")).unwrap() {
        evict(&File::open(table.unwrap().path()).unwrap());
    }
    let hang = Rule { on: vec![Kind::Read], ranges: Vec::new(), action: Action::Hang, times: None };
    rig.disk.add(hang).unwrap();
    // The readers of a node share the view of the last entry.
    engine.publish();
    let snapshot = engine.snapshot();
    let hangs_for = |ms| {
        let is_it = |io: &IoInFlight| (io.operation, io.waits) == ("read", Waits::ARow);
        io_times.all().iter().any(|io| is_it(io) && io.age_ms(clock::monotonic_ms()) >= ms)
    };
    let (others, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|threads| {
        let reading = threads.spawn(|| snapshot.get(b"k01000").unwrap());
        threads.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert!(snapshot.get(FROM_MEMORY).unwrap().is_some());
                others.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(OTHERS_PAUSE);
            }
        });
        // The disk answers again in any case, or the thread that reads would never end.
        let mut tries = 0;
        while !(hangs_for(100) && others.load(Ordering::Relaxed) >= OTHERS_MIN) && tries < TRIES {
            std::thread::sleep(PAUSE);
            tries += 1;
        }
        let others = others.load(Ordering::Relaxed);
        over.store(true, Ordering::Relaxed);
        rig.disk.clear(Held::Done).unwrap();
        assert!(reading.join().unwrap().is_some_and(|value| value.starts_with(b"1000 ")));
        assert!(tries < TRIES, "the read that hung was not seen beside {others} that did not");
    });
    assert!(!hangs_for(0), "it is said of a read that has ended");
    drop(snapshot);
    engine.close();
}
