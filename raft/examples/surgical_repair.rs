//! Prints how long one damaged entry of a log of 30,000 takes to repair on this machine's disk, from the peer's answer to
//! a log that is open, and how many bytes travel.
//!
//! `cargo run --release -p stemedb-raft --example surgical_repair [FOLDER]`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::disallowed_methods)]

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use bytes::Bytes;
use openraft::{
    storage::{IOFlushed, RaftLogStorage},
    type_config::TypeConfigExt,
};
use stemedb_raft::{
    Electorate, Entry, EntryData, OpenStep, TypeConfig, Vote, WalOptions, WalStore, codec, disk::RealDisk,
    frame::log_id, scan::scan_segment,
};

const ENTRIES: u64 = 30_000;
const DAMAGED: u64 = 17_321;
const PAYLOAD_BYTES: usize = 1_000;

async fn write(dir: PathBuf) {
    let (mut store, _) = WalStore::open(RealDisk::new(), WalOptions::new(dir)).unwrap();
    store.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    let payload = openraft::EntryPayload::Normal(EntryData(Bytes::from(vec![b'x'; PAYLOAD_BYTES])));
    let entries: Vec<Entry> =
        (0..ENTRIES).map(|index| Entry { log_id: log_id(1, index), payload: payload.clone() }).collect();
    let (tx, rx) = TypeConfig::oneshot();
    store.append(entries, IOFlushed::signal(tx)).await.unwrap();
    rx.await.unwrap().unwrap();
    tokio::task::spawn_blocking(move || store.handle().close()).await.unwrap().unwrap();
}

#[tokio::main]
async fn main() {
    let root = std::env::args_os().nth(1).map(PathBuf::from).unwrap_or_else(std::env::temp_dir);
    let root = tempfile::tempdir_in(root).unwrap();
    let (own, healthy) = (root.path().join("own"), root.path().join("peer"));
    write(own.clone()).await;
    write(healthy.clone()).await;
    let segment = own.join("segment.001.wal");
    let bytes = std::fs::read(&segment).unwrap();
    let at = scan_segment(&bytes).unwrap().entries.get(DAMAGED as usize).unwrap().offset.unwrap();
    // What has rotted lies on the disk: a page cache full of new bytes would be written by the first sync of the repair.
    let disk = RealDisk::new();
    let file = disk.open(&segment).unwrap();
    file.write_at(&[0; 500], at).unwrap();
    file.sync_data().unwrap();
    drop((file, bytes));
    let (peer, _) = WalStore::open(disk, WalOptions::new(healthy)).unwrap();
    // A peer that has run for a while does not prepare its next segment just now.
    while !peer.handle().room().spare_ready {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let begun = Instant::now();
    let OpenStep::AskPeers(pending) = WalStore::begin_open(RealDisk::new(), WalOptions::new(own)).unwrap() else {
        panic!("the damage was not noticed")
    };
    println!("reading the log and finding the damage: {:?}", begun.elapsed());
    let begun = Instant::now();
    let questions = pending.questions();
    let answers = peer.handle().source().answer_all(&questions, usize::MAX);
    let travelled = codec::encode(&questions).unwrap().len() + codec::encode(&answers).unwrap().len();
    let answered = begun.elapsed();
    let answers: Vec<_> = answers.into_iter().map(|(index, answer)| (2, index, answer)).collect();
    let electorate = Electorate { own: Some(1), voters: (1..=3).collect() };
    let OpenStep::Ready(store, report) = pending.resolve(&answers, &electorate).unwrap() else {
        panic!("not repaired")
    };
    println!(
        "entry {:?} of {ENTRIES}: {travelled} bytes, answered in {answered:?}, repaired and open after {:?}",
        report.repaired,
        begun.elapsed()
    );
    for store in [store, peer] {
        tokio::task::spawn_blocking(move || store.handle().close()).await.unwrap().unwrap();
    }
}
