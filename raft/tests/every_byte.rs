//! A log is flipped at every bit that matters and cut at every length: each time it opens with
//! exactly what was written, or says what is wrong. Never with other data, never with less.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use common::{append, close, contents, entry, open_sim, options, slice};
use openraft::storage::RaftLogStorage;
use stemedb_raft::{OpenError, WalStore, disk::sim::SimDisk, index::segment_name, scan::scan_segment};

/// Every how many-th bit and length is tried when the run is not a full one.
const SAMPLE: usize = 13;

/// Of the bits that are alike to a scan of the segment, every how many-th has the whole log opened.
const ALIKE_STEP: usize = 31;

fn step() -> usize {
    if std::env::var_os("STEMEDB_TEST_FULL").is_some() { 1 } else { SAMPLE }
}

/// Lengths that end in the zeros behind the last frame are many and alike: fewer of them by default.
fn length_step() -> usize {
    if step() == 1 { 1 } else { step() * 7 }
}

fn path(segment: u64) -> PathBuf {
    Path::new("/wal").join(segment_name(segment))
}

/// Two sealed segments, one of them with a truncation, and a last one; cleanly closed.
async fn written() -> (SimDisk, Vec<String>) {
    let sim = SimDisk::new();
    let mut store = open_sim(&sim).unwrap();
    append(&mut store, (0..6).map(|i| entry(1, i, &format!("first {i}"))).collect()).await.unwrap();
    append(&mut store, (6..9).map(|i| entry(1, i, &"large ".repeat(50 + i as usize))).collect()).await.unwrap();
    store.truncate_after(Some(stemedb_raft::frame::log_id(1, 6))).await.unwrap();
    append(&mut store, (7..12).map(|i| entry(2, i, &format!("second {i}"))).collect()).await.unwrap();
    store.save_vote(&stemedb_raft::Vote::new_committed(2, 1)).await.unwrap();
    let expected = contents(&store).unwrap();
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    (sim, expected)
}

#[derive(Debug, Default)]
struct Tally {
    same: usize,
    refused: usize,
}

/// Whether it opens, with the same content.
fn check(sim: &SimDisk, expected: &[String], what: &str, tally: &mut Tally) -> bool {
    match WalStore::open(sim.shared(), options(Path::new("/wal"))) {
        Ok((store, _report)) => {
            assert_eq!(contents(&store).unwrap(), expected, "{what}: other entries");
            assert_eq!(store.reader().vote(), Some(stemedb_raft::Vote::new_committed(2, 1)), "{what}");
            close(store);
            tally.same += 1;
            true
        }
        Err(OpenError::Repair(_) | OpenError::Ask(_) | OpenError::Refuse(_)) => {
            tally.refused += 1;
            false
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_bit_is_harmless_or_refused() {
    let (sim, expected) = written().await;
    let (mut tally, mut started) = (Tally::default(), 0);
    for segment in 1..=2 {
        let mut bytes = Vec::new();
        sim.corrupt(&path(segment), |b| bytes = b.clone()).unwrap();
        // Zeros far from anything written are all alike: by default every bit near something, and few of the rest.
        let near = |at: usize| bytes[at.saturating_sub(80)..(at + 80).min(bytes.len())].iter().any(|b| *b != 0);
        let worth = |bit: &usize| step() == 1 || near(bit / 8) || bit.is_multiple_of(4099);
        let bits = (0..bytes.len() * 8).filter(worth).skip(slice().0).step_by(step() * slice().1);
        // Whoever opens a log sees a segment through a scan alone: where that finds the same, so does the whole start. The
        // first of each kind is started, and every so many-th after it.
        let mut kinds: HashMap<String, (usize, bool)> = HashMap::new();
        let mut flipped = bytes.clone();
        for bit in bits {
            flipped[bit / 8] ^= 1 << (bit % 8);
            let kind = format!("{:?}", scan_segment(&flipped));
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Some((alike, was_same)) = kinds.get_mut(&kind) {
                *alike += 1;
                if !alike.is_multiple_of(ALIKE_STEP) {
                    if *was_same {
                        tally.same += 1
                    } else {
                        tally.refused += 1
                    }
                    continue;
                }
            }
            let copy = sim.fork();
            copy.corrupt(&path(segment), |b| b[bit / 8] ^= 1 << (bit % 8)).unwrap();
            let what = format!("segment {segment}, bit {bit}");
            let is_same = check(&copy, &expected, &what, &mut tally);
            started += 1;
            let (_, was_same) = kinds.entry(kind).or_insert((1, is_same));
            assert_eq!(*was_same, is_same, "{what}: a scan does not tell all that a start depends on");
        }
    }
    println!("{tally:?}, every {}. bit; {started} starts of the whole log", step());
    // A piece of a long run may be a piece of zeros.
    assert!(slice().1 > 1 || tally.same > 100 && tally.refused > 100, "{tally:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_truncation_is_harmless_or_refused() {
    let (sim, expected) = written().await;
    let mut tally = Tally::default();
    for segment in 1..=2 {
        let mut len = 0;
        sim.corrupt(&path(segment), |b| len = b.len()).unwrap();
        for keep in (0..len).skip(slice().0).step_by(length_step() * slice().1) {
            let copy = sim.fork();
            copy.corrupt(&path(segment), |b| b.truncate(keep)).unwrap();
            check(&copy, &expected, &format!("segment {segment} cut to {keep}"), &mut tally);
        }
    }
    println!("{tally:?}, every {}. length", length_step());
    assert!(slice().1 > 1 || tally.same > 10 && tally.refused > 10, "{tally:?}");
}
