//! Damage in sealed segments is found by the scrubber and by readers, and put right from another replica's copy,
//! without the log noticing: the frames behind the repaired one still continue it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

mod common;

use std::{
    collections::BTreeMap,
    future::Future,
    ops::ControlFlow,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex},
};

use common::{append, close, contents, entry, lockstep, open_sim, text_of};
use openraft::storage::RaftLogStorage;
use stemedb_raft::{
    EntryCopy, EntryHealer, EntryQuestion, EntryUnreadable, Pace, RepairError, WalOptions, WalStore,
    disk::sim::{Kind, SimDisk},
    frame::{EntryKind, FRAME_HEADER_BYTES, ROW_BYTES, ROWS_OFFSET, log_id},
    index::segment_name,
    scan::scan_segment,
};

fn path(segment: u64) -> PathBuf {
    Path::new("/wal").join(segment_name(segment))
}

fn text(index: u64) -> String {
    format!("entry {index} {}", "y".repeat(10_000 + index as usize))
}

fn copy_of(index: u64) -> EntryCopy {
    let (kind, payload) = (EntryKind::Normal.to_byte(), text(index).into_bytes().into());
    EntryCopy { index, term: 1, kind, payload, previous: None, has_anchor: false, committed: true }
}

/// Two sealed segments and a last one.
async fn written() -> (SimDisk, WalStore) {
    let sim = SimDisk::new();
    let (mut store, _) = WalStore::open(sim.shared(), lockstep(Path::new("/wal"), 5)).unwrap();
    for from in (0..12).step_by(3) {
        append(&mut store, (from..from + 3).map(|i| entry(1, i, &text(i))).collect()).await.unwrap();
    }
    assert_eq!(store.handle().sealed_segments().len(), 2);
    (sim, store)
}

fn bytes_of(sim: &SimDisk, segment: u64) -> Vec<u8> {
    let mut copy = Vec::new();
    sim.fork().corrupt(&path(segment), |b| copy = b.clone()).unwrap();
    copy
}

/// Where the frames of a segment lie: index, offset of the frame, offset of its row.
fn places(sim: &SimDisk, segment: u64) -> Vec<(u64, u64, u64)> {
    let scan = scan_segment(&bytes_of(sim, segment)).unwrap();
    let row = |i: usize| ROWS_OFFSET + (i * ROW_BYTES) as u64;
    scan.entries.iter().enumerate().map(|(i, e)| (e.index, e.offset.unwrap(), row(i))).collect()
}

async fn close_and_reopen(sim: &SimDisk, store: WalStore) {
    let expected = contents(&store).unwrap();
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    for number in 1..=2 {
        let scan = scan_segment(&bytes_of(sim, number)).unwrap();
        assert!(scan.entries.iter().all(|e| e.located.is_some()), "segment {number} is not whole: {scan:?}");
    }
    // From the platter.
    sim.lose_unsynced();
    let store = open_sim(sim).unwrap();
    assert_eq!(contents(&store).unwrap(), expected);
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrubber_finds_each_damage_and_a_copy_repairs_it() {
    let (sim, _store) = written().await;
    let expected = bytes_of(&sim, 1);
    for (position, (index, frame, row)) in places(&sim, 1).into_iter().enumerate() {
        let header = FRAME_HEADER_BYTES as u64;
        for (what, at) in [("frame header", frame + 20), ("payload", frame + header + 100), ("row", row + 5)] {
            let (sim, store) = written().await;
            let handle = store.handle();
            assert_eq!(handle.verify_segment(1).unwrap().damage, []);
            sim.corrupt(&path(1), |b| b[at as usize] ^= 0x40).unwrap();
            let check = handle.verify_segment(1).unwrap();
            assert_eq!(check.damage.len(), 1, "{what} of {index}: {check:?}");
            assert_eq!((check.damage[0].index, check.complete), (index, true), "{what}: {check:?}");
            assert_eq!(handle.verify_segment(2).unwrap().damage, []);
            // A copy of something else is not written.
            let operations = sim.operations();
            let other = EntryCopy { payload: "other".into(), ..copy_of(index) };
            assert_eq!(handle.repair_entry(index, other).await, Err(RepairError::OtherEntry(index)));
            assert_eq!(
                handle.repair_entry(index, EntryCopy { term: 9, ..copy_of(index) }).await,
                Err(RepairError::OtherEntry(index))
            );
            if what != "frame header" {
                let other = EntryCopy { kind: EntryKind::Membership.to_byte(), ..copy_of(index) };
                assert_eq!(handle.repair_entry(index, other).await, Err(RepairError::OtherEntry(index)));
            }
            assert_eq!(sim.operations(), operations);
            handle.repair_entry(index, copy_of(index)).await.unwrap();
            assert_eq!(handle.verify_segment(1).unwrap().damage, []);
            if what != "frame header" {
                assert_eq!(bytes_of(&sim, 1), expected, "{what} of entry {index}, {position}.");
            }
            // And where the device cannot even read what was there.
            sim.set_unreadable(&path(1), [at as usize / 4096]).unwrap();
            for damage in handle.verify_segment(1).unwrap().damage {
                handle.repair_entry(damage.index, copy_of(damage.index)).await.unwrap();
            }
            assert_eq!(handle.verify_segment(1).unwrap().damage, []);
            close_and_reopen(&sim, store).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_lost_frames_is_repaired_one_by_one() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]] {
        let (sim, store) = written().await;
        let all = places(&sim, 1);
        for (_, frame, row) in &all {
            sim.corrupt(&path(1), |b| {
                b[*frame as usize..*frame as usize + 4000].fill(0);
                b[*row as usize..*row as usize + ROW_BYTES].fill(0xff);
            })
            .unwrap();
        }
        for position in order.into_iter().filter(|p| *p < all.len()) {
            store.handle().repair_entry(all[position].0, copy_of(all[position].0)).await.unwrap();
        }
        assert_eq!(store.handle().verify_segment(1).unwrap().damage, []);
        close_and_reopen(&sim, store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_copy_of_a_header_is_written_again() {
    let (sim, store) = written().await;
    let expected = bytes_of(&sim, 2);
    for at in [0, 4096] {
        sim.corrupt(&path(2), |b| b[at + 30] ^= 1).unwrap();
        let check = store.handle().verify_segment(2).unwrap();
        assert_eq!((check.header_copies_damaged, check.damage.len()), (1, 1));
        store.handle().repair_header(2).await.unwrap();
        assert_eq!(bytes_of(&sim, 2), expected);
    }
    // Both lie in adjacent blocks, and what they said is in memory; rows are found all the same.
    let row = usize::try_from(places(&sim, 2)[1].2).unwrap();
    sim.corrupt(&path(2), |b| b[..8192].fill(0)).unwrap();
    sim.corrupt(&path(2), |b| b[row + 5] ^= 1).unwrap();
    let check = store.handle().verify_segment(2).unwrap();
    assert_eq!((check.header_copies_damaged, check.damage.len(), check.damaged_entries().len()), (2, 3, 1));
    store.handle().repair_header(2).await.unwrap();
    sim.corrupt(&path(2), |b| b[row + 5] ^= 1).unwrap();
    assert_eq!(bytes_of(&sim, 2), expected);
    assert_eq!(store.handle().latched(), None);
    close_and_reopen(&sim, store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrubber_keeps_the_pace_it_is_given_and_can_be_broken_off() {
    let (_sim, store) = written().await;
    let mut pieces = 0;
    let check = store.handle().verify_segment_paced(1, |bytes| {
        assert!(bytes > 0);
        pieces += 1;
        ControlFlow::Break(())
    });
    assert_eq!((pieces, check.unwrap().complete), (1, false));
    assert!(store.handle().verify_segment(3).is_err(), "the last segment is not sealed");
    assert!(store.handle().verify_segment(99).is_err());
}

/// Another replica that has everything.
#[derive(Default)]
struct Replica {
    asked: Mutex<Vec<EntryQuestion>>,
    instead: BTreeMap<u64, Option<EntryCopy>>,
}

impl EntryHealer for Replica {
    fn heal(&self, question: EntryQuestion) -> Pin<Box<dyn Future<Output = Option<EntryCopy>> + Send + '_>> {
        let index = question.index;
        self.asked.lock().unwrap().push(question);
        let answer = self.instead.get(&index).cloned().unwrap_or_else(|| Some(copy_of(index)));
        Box::pin(async move { answer })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_heals_what_it_cannot_read() {
    let (sim, store) = written().await;
    let replica = Arc::new(Replica::default());
    store.handle().set_healer(Some(Arc::clone(&replica) as Arc<_>));
    let (first, second) = (places(&sim, 1), places(&sim, 2));
    sim.corrupt(&path(1), |b| b[first[1].1 as usize + 500] ^= 2).unwrap();
    // A block at the border of two entries: both are lost with it.
    let (lost, at, _) = second[1];
    sim.set_unreadable(&path(2), [at as usize / 4096]).unwrap();
    let found = store.reader().read_async(0, 100, u64::MAX).await.unwrap();
    assert_eq!(found.iter().map(text_of).collect::<Vec<_>>(), (0..12).map(text).collect::<Vec<_>>());
    let asked: Vec<_> = replica.asked.lock().unwrap().iter().map(|q| (q.index, q.term, q.durable)).collect();
    assert_eq!(asked, [(first[1].0, Some(1), true), (lost - 1, Some(1), true), (lost, Some(1), true)]);
    // The writer has put both right: the sync reader, which asks nobody, finds them.
    let handle = store.handle();
    while handle.verify_segment(1).unwrap().damage.len() + handle.verify_segment(2).unwrap().damage.len() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(contents(&store).unwrap().len(), 12);
    assert_eq!(replica.asked.lock().unwrap().len(), 3);
    close_and_reopen(&sim, store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_right_copy_the_reader_names_the_entry() {
    for wrong in [None, Some(EntryCopy { payload: "other".into(), ..copy_of(1) }), Some(copy_of(2))] {
        let (sim, store) = written().await;
        let (index, at, _) = places(&sim, 1)[1];
        sim.corrupt(&path(1), |b| b[at as usize + 500] ^= 2).unwrap();
        let replica = Replica { instead: BTreeMap::from([(index, wrong)]), ..Replica::default() };
        store.handle().set_healer(Some(Arc::new(replica)));
        let error = store.reader().read_async(0, 100, u64::MAX).await.unwrap_err();
        let unreadable = EntryUnreadable::of(&error).unwrap();
        assert_eq!((unreadable.index, unreadable.offset), (index, at));
        assert!(error.to_string().starts_with(&format!("WAL segment.001.wal corrupt at byte {at}: entry {index}")));
        assert_eq!(store.handle().latched(), None, "reading is not writing");
    }
}

/// The log writes again what is damaged, once, and says so; and not what is sound.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_entry_is_healed_from_memory_or_from_a_replica_and_only_when_it_is_damaged() {
    let (sim, store) = written().await;
    let (handle, replica) = (store.handle(), Arc::new(Replica::default()));
    let places = places(&sim, 1);
    let writes = || sim.operations().iter().filter(|o| o.starts_with("write")).count();
    let before = writes();
    let index = places[1].0;
    handle.heal_entry(index).await.unwrap();
    handle.repair_entry(index, copy_of(index)).await.unwrap();
    assert_eq!(writes(), before, "a sound entry was written again");
    // Only the row is damaged: the frame is copy enough. Nobody else is there to ask.
    sim.corrupt(&path(1), |b| b[places[1].2 as usize] ^= 1).unwrap();
    handle.heal_entry(index).await.unwrap();
    assert_eq!(handle.verify_segment(1).unwrap().damage, []);
    sim.corrupt(&path(1), |b| b[places[0].1 as usize + 500] ^= 1).unwrap();
    assert_eq!(handle.heal_entry(places[0].0).await, Err(RepairError::NoCopy(places[0].0)));
    handle.set_healer(Some(Arc::clone(&replica) as Arc<_>));
    handle.heal_entry(places[0].0).await.unwrap();
    assert_eq!(handle.verify_segment(1).unwrap().damage, []);
    assert_eq!(handle.heal_entry(99).await, Err(RepairError::Gone(99)));
    assert_eq!(replica.asked.lock().unwrap().len(), 1);
    close_and_reopen(&sim, store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rots_under_the_page_cache_is_found_and_written_again_from_it() {
    let (sim, store) = written().await;
    let (index, at, _) = places(&sim, 1)[1];
    sim.corrupt_durable(&path(1), |b| b[at as usize + 500] ^= 2).unwrap();
    let handle = store.handle();
    assert_eq!(handle.verify_segment(1).unwrap().damage.len(), 1, "what the device has is not looked at");
    // Nobody else is there to ask.
    handle.heal_entry(index).await.unwrap();
    assert_eq!(handle.verify_segment(1).unwrap().damage, []);
    close_and_reopen(&sim, store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_of_entries_is_told_from_damage_of_the_header() {
    let (sim, store) = written().await;
    let places = places(&sim, 1);
    sim.corrupt(&path(1), |b| {
        b[30] ^= 1;
        b[places[1].2 as usize] ^= 1;
        b[places[1].1 as usize + 500] ^= 1;
    })
    .unwrap();
    let check = store.handle().verify_segment(1).unwrap();
    assert_eq!((check.damage.len(), check.header_copies_damaged), (3, 1));
    assert_eq!(check.damaged_entries().into_iter().collect::<Vec<_>>(), [places[1].0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_that_the_disk_does_not_take_latches() {
    for (kind, error) in [(Kind::Write, 5), (Kind::Sync, 5), (Kind::Write, 28)] {
        let (sim, mut store) = written().await;
        let (index, at, _) = places(&sim, 1)[1];
        sim.corrupt(&path(1), |b| b[at as usize + 500] ^= 2).unwrap();
        sim.fail_next(kind, "segment.001", error);
        assert!(matches!(store.handle().repair_entry(index, copy_of(index)).await, Err(RepairError::Latched(_))));
        assert!(store.save_vote(&stemedb_raft::Vote::new(9, 9)).await.is_err());
        let operations = sim.operations();
        assert!(store.handle().repair_entry(index, copy_of(index)).await.is_err());
        assert_eq!(sim.operations(), operations, "a second try on a file that had failed");
    }
    // A write that lands elsewhere and says Ok is found by reading back.
    let (sim, store) = written().await;
    let (index, _, row) = places(&sim, 1)[1];
    sim.corrupt(&path(1), |b| b[row as usize] ^= 2).unwrap();
    sim.misdirect_next_write("segment.001", 60_000);
    assert!(matches!(store.handle().repair_entry(index, copy_of(index)).await, Err(RepairError::Latched(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncation_at_a_damaged_entry_goes_on_and_the_entry_can_be_healed() {
    let (sim, mut store) = written().await;
    let (index, at, _) = places(&sim, 1)[2];
    sim.corrupt(&path(1), |b| b[at as usize + 20] ^= 2).unwrap();
    store.truncate_after(Some(log_id(1, index))).await.unwrap();
    append(&mut store, vec![entry(2, index + 1, "behind the cut")]).await.unwrap();
    store.handle().repair_entry(index, copy_of(index)).await.unwrap();
    let expected = contents(&store).unwrap();
    assert_eq!(expected.len() as u64, index + 2);
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    let store = open_sim(&sim).unwrap();
    assert_eq!(contents(&store).unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn repairing_does_not_hold_up_a_log_with_threads() {
    let sim = SimDisk::new();
    let options = WalOptions { pace: Pace::Background, ..lockstep(Path::new("/wal"), 5) };
    let (mut store, _) = WalStore::open(sim.shared(), options).unwrap();
    append(&mut store, (0..9).map(|i| entry(1, i, &text(i))).collect()).await.unwrap();
    let (index, at, _) = places(&sim, 1)[0];
    sim.corrupt(&path(1), |b| b[at as usize + 500] ^= 2).unwrap();
    let (handle, mut writing) = (store.handle(), store.clone());
    let write = tokio::spawn(async move { append(&mut writing, vec![entry(1, 9, "x")]).await });
    handle.repair_entry(index, copy_of(index)).await.unwrap();
    write.await.unwrap().unwrap();
    assert_eq!(handle.verify_segment(1).unwrap().damage, []);
}
