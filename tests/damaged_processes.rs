//! The experiment of FAST'18 with three real processes: random ones of the 4,096 combinations of damaged copies of four
//! entries on three nodes (`recovery_from_peers.rs` has all of them in one process). Where an intact copy of each entry
//! is left, all nodes come back with everything; where one is left nowhere, the nodes halt and say for what they wait.
//!
//! A few by default, 100 with `STEMEDB_TEST_FULL=1`; `STEMEDB_TEST_SEED` repeats one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod rig;

use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rig::three::{FRAME_HEADER_BYTES, Three};
use stemedb_raft::frame::{ROW_BYTES, ROWS_OFFSET};
use stemedb_raft::scan::scan_segment;

const ENTRIES: usize = 4;

/// In the bytes of each write.
const CONCEPT: &[u8] = b"test/numbers";

/// A copy of a folder with everything in it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// Log indexes of the last entries that carry writes.
fn last_entries(file: &Path) -> Vec<u64> {
    let bytes = std::fs::read(file).unwrap();
    let scan = scan_segment(&bytes).unwrap();
    let is_write = |offset: u32, payload_bytes: u32| {
        let at = offset as usize + FRAME_HEADER_BYTES;
        let payload = &bytes[at..at + payload_bytes as usize];
        payload.windows(CONCEPT.len()).any(|window| window == CONCEPT)
    };
    let writes = scan.entries.iter().filter(|f| f.located.is_some_and(|l| is_write(l.offset, l.payload_bytes)));
    let mut indexes: Vec<u64> = writes.map(|found| found.index).collect();
    indexes.split_off(indexes.len() - ENTRIES)
}

/// Damages one entry's copy in one of several ways.
fn damage(file: &Path, index: u64, rng: &mut StdRng) {
    let mut bytes = std::fs::read(file).unwrap();
    let scan = scan_segment(&bytes).unwrap();
    let (place, found) = scan.entries.iter().enumerate().find(|(_, found)| found.index == index).unwrap();
    let located = found.located.unwrap();
    let at = located.offset as usize;
    let end = at + FRAME_HEADER_BYTES + located.payload_bytes as usize;
    let row = ROWS_OFFSET as usize + place * ROW_BYTES;
    match rng.random_range(0..5) {
        0 => bytes[at + FRAME_HEADER_BYTES + 3] ^= 4,
        1 => bytes[at + 20] ^= 1,
        2 => bytes[at..end].fill(0),
        3 => {
            rng.fill(&mut bytes[at..end]);
            bytes[row + 9] ^= 0x40;
        }
        _ => bytes[at + 40..end.min(at + 90)].fill(0x55),
    }
    std::fs::write(file, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_combinations_as_processes_are_recovered_or_halted_honestly() {
    let full = std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1");
    let only: Option<u64> = std::env::var("STEMEDB_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let seeds: Vec<u64> = only.map_or_else(|| (0..if full { 100 } else { 6 }).collect(), |seed| vec![seed]);
    println!("{} of 4,096 combinations as processes (100 with STEMEDB_TEST_FULL=1)", seeds.len());
    let mut three = Three::start().await;
    for number in 0..8 {
        three.write(number % 3).await;
    }
    three.assert_all_there("before").await;
    assert_eq!(three.processes.stop_all().await.unwrap(), Vec::<String>::new());
    let saved = three.dir().join("saved");
    (0..3).for_each(|i| copy(three.folder(i), &saved.join(i.to_string())));
    let segment = |three: &Three, i: usize| three.folder(i).join("wal/segment.001.wal");
    // The same entries everywhere: what one node has not, no node must need.
    let indexes: Vec<u64> = last_entries(&segment(&three, 0));
    (1..3).for_each(|i| assert_eq!(last_entries(&segment(&three, i)), indexes, "the logs differ at rest"));
    let (mut recovered, mut halted) = (0, 0);
    for seed in seeds {
        let mut rng = StdRng::seed_from_u64(seed);
        let combination: u32 = rng.random_range(0..1 << (3 * ENTRIES));
        let is_damaged = |node: usize, entry: usize| combination >> (node * ENTRIES + entry) & 1 == 1;
        for node in 0..3 {
            let folder = three.folder(node).to_owned();
            std::fs::remove_dir_all(&folder).unwrap();
            copy(&saved.join(node.to_string()), &folder);
            for entry in (0..ENTRIES).filter(|entry| is_damaged(node, *entry)) {
                damage(&segment(&three, node), indexes[entry], &mut rng);
            }
        }
        let lost: Vec<usize> = (0..ENTRIES).filter(|entry| (0..3).all(|node| is_damaged(node, *entry))).collect();
        three.processes.start_all().unwrap();
        let what = format!("seed {seed}, combination {combination:012b}");
        if lost.is_empty() {
            three.ready().await;
            three.assert_all_there(&what).await;
            recovered += 1;
            assert_eq!(three.processes.stop_all().await.unwrap(), Vec::<String>::new());
            println!("{what}: recovered");
            continue;
        }
        // Everybody has the same entries, and each of these is damaged everywhere: all must wait for them.
        let first = format!("{} entries are missing, the first at log index {};", lost.len(), indexes[lost[0]]);
        for node in 0..3 {
            three
                .until(&format!("{what}: node {node} says that {first}"), async |three| {
                    let Some(health) = three.health(node).await else { return false };
                    assert_ne!(health["role"], "leader", "{what}: a leader without {first}");
                    health["status"] == "repairing"
                        && health["repairing"].as_str().is_some_and(|why| why.contains(&first))
                })
                .await;
        }
        halted += 1;
        (0..3).for_each(|node| assert!(three.processes.pid(node).is_some(), "{what}: a process has ended"));
        three.processes.stop_all().await.unwrap();
        println!("{what}: halted, {first}");
    }
    println!("{recovered} recovered, {halted} halted honestly, 0 unsafe");
}
