//! The state machine with a small applier: restarts, snapshots, and entries it must stop at.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::fs;
use std::ops::Bound;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use openraft::storage::RaftStateMachine;
use openraft::{EntryPayload, Membership, RaftSnapshotBuilder};
use stemedb::model::NewAssertion;
use stemedb::state::command::{
    Command, CommandKey, CommandOutcome, ENTRY_FORMAT, EntryBody, KeySource, Operation, Outcome, Receipt,
};
use stemedb::state::engine::lsm::{FlushGate, LsmOptions};
use stemedb::state::engine::receive::CheckpointReceiver;
use stemedb::state::engine::{AppliedState, EngineError, StateRead, WriteBatch};
use stemedb::state::machine::{EntryApplier, MachineOptions, PublishedView, StateMachine};
use stemedb_raft::codec;
use stemedb_raft::types::{Entry, EntryData, LogId, Member, TypeConfig};
use uuid::Uuid;

/// Far above what any condition needs; only a hang ends a test by this.
const HANG: Duration = Duration::from_secs(60);

/// Keeps one row per assertion, and a count in memory that only `save_keys` carries over.
struct Counting {
    fact_index: u64,
    log_time_ms: u64,
    entries: u64,
}

impl EntryApplier for Counting {
    fn feature_level(&self) -> u32 {
        0
    }

    fn apply(
        &mut self,
        read: &dyn StateRead,
        _: u64,
        body: &EntryBody,
    ) -> Result<(WriteBatch, Vec<CommandOutcome>), EngineError> {
        self.log_time_ms = self.log_time_ms.max(body.log_time_ms);
        self.entries += 1;
        let mut batch = WriteBatch::default();
        let mut outcomes = Vec::new();
        for command in &body.commands {
            let mut receipts = Vec::new();
            if let Operation::Assert(items) = &command.op {
                for item in items {
                    let key = format!("f{}", item.concept_path);
                    let before = read.get(key.as_bytes())?.map_or(0, |v| v.len());
                    self.fact_index += 1;
                    batch.put(key, vec![b'v'; before + 1]);
                    let (index, created_at_ms) = (self.fact_index, command.created_at_ms);
                    receipts.push(Receipt { id: item.id, index, created_at_ms });
                }
            }
            outcomes.push(CommandOutcome { outcome: Outcome::Applied(receipts), replayed: false });
        }
        Ok((batch, outcomes))
    }
    fn save_keys(&mut self) -> Result<WriteBatch, EngineError> {
        let mut batch = WriteBatch::default();
        batch.put("mentries", self.entries.to_le_bytes().to_vec());
        Ok(batch)
    }
    fn fact_index(&self) -> u64 {
        self.fact_index
    }
    fn log_time_ms(&self) -> u64 {
        self.log_time_ms
    }
}

fn restore(read: &dyn StateRead, applied: &AppliedState) -> Result<Counting, EngineError> {
    let entries = read.get(b"mentries")?.map_or(0, |v| u64::from_le_bytes(v[..].try_into().unwrap()));
    let AppliedState { fact_index, log_time_ms, .. } = *applied;
    Ok(Counting { fact_index, log_time_ms, entries })
}

fn open(dir: &Path) -> StateMachine<Counting> {
    open_with(dir, LsmOptions { memtable_bytes_max: 8 * 1024, ..LsmOptions::default() })
}

fn open_with(dir: &Path, lsm: LsmOptions) -> StateMachine<Counting> {
    StateMachine::open(MachineOptions { data_dir: dir.to_owned(), lsm }, Arc::new(restore)).unwrap()
}

fn log_id(index: u64) -> LogId {
    openraft::testing::log_id::<TypeConfig>(1, 1, index)
}

fn membership(index: u64) -> Entry {
    let nodes = BTreeMap::from([(1, Member::default()), (2, Member::default())]);
    let payload = EntryPayload::Membership(Membership::new(vec![[1, 2].into()], nodes).unwrap());
    Entry { log_id: log_id(index), payload }
}

fn entry_of(index: u64, data: Vec<u8>) -> Entry {
    Entry { log_id: log_id(index), payload: EntryPayload::Normal(EntryData(data.into())) }
}

fn entry(index: u64, paths: &[&str]) -> Entry {
    let items = paths
        .iter()
        .map(|path| NewAssertion {
            id: Uuid::from_u128(u128::from(index)),
            concept_path: (*path).to_owned(),
            predicate: "p".into(),
            value_json: "1".into(),
            source: None,
            confidence: None,
            epoch: None,
            supersedes: None,
            valid_from_ms: None,
            valid_to_ms: None,
        })
        .collect();
    let command = Command {
        key: CommandKey { source: KeySource::Node, id: u128::from(index) },
        body_hash: 0,
        resend_until_ms: 0,
        created_at_ms: 5,
        op: Operation::Assert(items),
    };
    let body = EntryBody { format: ENTRY_FORMAT, log_time_ms: index * 10, commands: vec![command] };
    entry_of(index, codec::encode(&body).unwrap())
}

async fn apply(machine: &mut StateMachine<Counting>, entries: Vec<Entry>) -> std::io::Result<()> {
    let stream = futures_util::stream::iter(entries.into_iter().map(|entry| Ok((entry, None))));
    machine.apply(stream).await
}

fn rows(view: &PublishedView) -> Vec<(Bytes, Bytes)> {
    let rows = view.snapshot.scan(Bound::Included(b"f"), Bound::Excluded(b"g"));
    rows.map(|row| row.unwrap()).collect()
}

async fn fill(machine: &mut StateMachine<Counting>, indexes: std::ops::Range<u64>) {
    let entries = indexes
        .map(|index| match index {
            0 => membership(0),
            1 => Entry { log_id: log_id(1), payload: EntryPayload::Blank },
            _ => entry(index, &[&format!("a/{}", index % 50), &format!("b/{index}")]),
        })
        .collect();
    apply(machine, entries).await.unwrap();
}

#[tokio::test]
async fn what_is_applied_is_published_with_its_index() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = open(dir.path());
    let handle = machine.handle();
    let mut published = handle.published();
    assert_eq!((None, Default::default()), machine.applied_state().await.unwrap());
    assert_eq!(None, published.borrow_and_update().applied_log_index);
    fill(&mut machine, 0..4).await;
    assert!(published.has_changed().unwrap());
    let state = *published.borrow_and_update();
    assert_eq!((Some(3), 4, 30), (state.applied_log_index, state.fact_index, state.log_time_ms));
    let view = handle.view().unwrap();
    assert_eq!(state, view.state);
    assert_eq!(4, rows(&view).len());
    let (last, members) = machine.applied_state().await.unwrap();
    assert_eq!((Some(log_id(3)), Some(&log_id(0))), (last, members.log_id().as_ref()));
    // An old view keeps its rows.
    fill(&mut machine, 4..6).await;
    assert_eq!(4, rows(&view).len());
}

#[tokio::test]
async fn a_killed_machine_goes_on_from_what_it_has_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = open(dir.path());
    fill(&mut machine, 0..900).await;
    let handle = machine.handle();
    let expected = rows(&handle.view().unwrap());
    handle.engine().flush_blocking().unwrap();
    handle.close_blocking();
    drop((machine, handle));

    let mut machine = open(dir.path());
    let (last, members) = machine.applied_state().await.unwrap();
    let last = last.unwrap().index;
    assert!(last > 0 && last < 899, "some memtables were on disk and one was not: {last}");
    assert_eq!(Some(&log_id(0)), members.log_id().as_ref());
    fill(&mut machine, last + 1..900).await;
    let view = machine.handle().view().unwrap();
    assert_eq!(expected, rows(&view));
    assert_eq!((Some(899), 898 * 2), (view.state.applied_log_index, view.state.fact_index));
}

#[tokio::test]
async fn a_snapshot_is_the_state_at_its_making_and_moves_to_another_node() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut from = open(a.path());
    assert!(from.get_current_snapshot().await.unwrap().is_none());
    fill(&mut from, 0..300).await;
    let at_300 = rows(&from.handle().view().unwrap());
    let mut builder = from.try_create_snapshot_builder(true).await.unwrap();
    let building = tokio::spawn(async move { builder.build_snapshot().await });
    fill(&mut from, 300..600).await; // goes on, with rotations of its own
    let built = building.await.unwrap().unwrap();
    assert_eq!(Some(log_id(299)), built.meta.last_log_id);
    let current = from.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(built.meta, current.meta);

    // Received in chunks, installed over other rows while a reader keeps its view.
    let mut to = open(b.path());
    fill(&mut to, 0..20).await;
    let handle = to.handle();
    let old_view = handle.view().unwrap();
    let old_rows = rows(&old_view);
    let manifest = current.snapshot.manifest_bytes().unwrap();
    let mut receiver = CheckpointReceiver::begin(b.path(), &manifest).unwrap();
    for file in current.snapshot.files() {
        let chunk = current.snapshot.read_chunk(&file.name, 0, usize::MAX).unwrap();
        receiver.write(&file.name, 0, &chunk).unwrap();
    }
    let received = receiver.finish().unwrap();
    to.install_snapshot(&current.meta, received).await.unwrap();
    assert_eq!(Some(log_id(299)), to.applied_state().await.unwrap().0);
    assert_eq!(at_300, rows(&handle.view().unwrap()));
    assert_eq!(old_rows, rows(&old_view));
    let old_folder = b.path().join("kv/g1");
    assert!(old_folder.exists(), "a reader still uses it");
    drop(old_view);
    assert_eq!(current.meta, to.get_current_snapshot().await.unwrap().unwrap().meta);
    assert!(!b.path().join("kv.incoming").exists());
    // It can go on, be restarted, and ends where the other one is.
    fill(&mut to, 300..600).await;
    assert_eq!(rows(&from.handle().view().unwrap()), rows(&handle.view().unwrap()));
    handle.close_blocking();
    drop((to, handle));
    let to = open(b.path());
    assert!(rows(&to.handle().view().unwrap()).len() >= at_300.len());
    assert!(!old_folder.exists());
}

#[tokio::test]
async fn only_the_newest_snapshot_is_kept_except_under_a_reader() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = open(dir.path());
    fill(&mut machine, 0..10).await;
    let build = async |machine: &mut StateMachine<Counting>| {
        machine.try_create_snapshot_builder(true).await.unwrap().build_snapshot().await.unwrap()
    };
    let first = build(&mut machine).await;
    fill(&mut machine, 10..20).await;
    let second = build(&mut machine).await;
    first.snapshot.verify_blocking().unwrap(); // still being sent
    let kept = first.snapshot.dir().to_owned();
    drop(first);
    assert!(!kept.exists());
    assert_eq!(1, fs::read_dir(dir.path().join("checkpoint")).unwrap().count());
    // The same again without an entry between, and a builder that builds nothing.
    let third = build(&mut machine).await;
    assert_eq!(second.meta, third.meta);
    drop(machine.try_create_snapshot_builder(true).await);
    fill(&mut machine, 20..400).await;
    machine.handle().engine().flush_blocking().unwrap();
    // After a restart the newest is found; an unfinished one is cleared away.
    let newest = third.meta.clone();
    let handle = machine.handle();
    handle.close_blocking();
    drop((second, third, machine, handle));
    fs::create_dir(dir.path().join("checkpoint/00000099-7")).unwrap();
    let mut machine = open(dir.path());
    assert_eq!(newest, machine.get_current_snapshot().await.unwrap().unwrap().meta);
    assert!(!dir.path().join("checkpoint/00000099-7").exists());
}

#[tokio::test]
async fn a_damaged_checkpoint_is_neither_sent_nor_installed() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut from = open(a.path());
    fill(&mut from, 0..300).await;
    let mut builder = from.try_create_snapshot_builder(true).await.unwrap();
    let built = builder.build_snapshot().await.unwrap();
    let mut to = open(b.path());
    fill(&mut to, 0..5).await;
    let before = rows(&to.handle().view().unwrap());

    let table = built.snapshot.files().iter().find(|f| f.name.starts_with("tables/")).unwrap();
    let path = built.snapshot.dir().join(&table.name);
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 4;
    // A file of its own: the tree is hard-linked to it.
    fs::remove_file(&path).unwrap();
    fs::write(&path, &bad).unwrap();
    let error = to.install_snapshot(&built.meta, built.snapshot.clone()).await.unwrap_err();
    assert!(error.to_string().contains("damage"), "{error}");
    assert_eq!(before, rows(&to.handle().view().unwrap()));
    assert_eq!(Some(log_id(4)), to.applied_state().await.unwrap().0);

    fs::write(&path, &good[..good.len() - 1]).unwrap();
    let instead = from.get_current_snapshot().await.unwrap().unwrap();
    assert_ne!(instead.snapshot.dir(), built.snapshot.dir(), "one with a file that is too short");
    instead.snapshot.verify_blocking().unwrap();
    assert_eq!(instead.meta, built.meta);
    // An older one than what is applied is refused too.
    fill(&mut from, 300..310).await;
    assert!(from.install_snapshot(&built.meta, built.snapshot).await.is_err());
}

#[tokio::test]
async fn an_entry_from_the_future_or_of_nobody_stops_the_machine_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = open(dir.path());
    let mut newer = codec::encode(&(ENTRY_FORMAT + 1)).unwrap();
    newer.extend(b"whatever a newer program writes");
    for (bad, text) in [(newer, "format 2"), (b"\x01garbage".to_vec(), "cannot be read")] {
        let next = machine.applied_state().await.unwrap().0.map_or(0, |id| id.index + 1);
        let entries = vec![membership(next), entry_of(next + 1, bad), entry(next + 2, &["x"])];
        let error = apply(&mut machine, entries).await.unwrap_err().to_string();
        assert!(error.contains(text) && error.contains("up to 1"), "{error}");
        assert_eq!(Some(log_id(next)), machine.applied_state().await.unwrap().0);
        assert!(rows(&machine.handle().view().unwrap()).is_empty(), "nothing after it is applied");
    }
}

/// A gate that lets memtables up to a log index pass.
fn gate() -> (tokio::sync::watch::Sender<u64>, FlushGate) {
    let (durable, seen) = tokio::sync::watch::channel(0);
    let gate = move |index| -> BoxFuture<'static, Result<(), String>> {
        let mut seen = seen.clone();
        Box::pin(async move { seen.wait_for(|upto| *upto >= index).await.map(drop).map_err(|e| e.to_string()) })
    };
    (durable, Arc::new(gate))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_replay_does_not_outrun_the_flushes() {
    let dir = tempfile::tempdir().unwrap();
    let (durable, gate) = gate();
    let lsm = LsmOptions { memtable_bytes_max: 1, flush_gate: Some(gate), ..LsmOptions::default() };
    let mut machine = open_with(dir.path(), lsm);
    let handle = machine.handle();
    let applying = tokio::spawn(async move {
        fill(&mut machine, 0..60).await;
        machine
    });
    let mut published = handle.published();
    published.wait_for(|p| p.applied_log_index.is_some()).await.unwrap();
    // Time for what must not happen: nothing is flushed, so sealing more would show.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let sealed = handle.engine().stats().unwrap().sealed_memtables;
    assert!(sealed <= 5, "{sealed} memtables wait");
    durable.send_replace(u64::MAX);
    let mut machine = applying.await.unwrap();
    assert_eq!(Some(log_id(59)), machine.applied_state().await.unwrap().0);
}

#[tokio::test]
async fn an_entry_that_was_applied_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = open(dir.path());
    fill(&mut machine, 0..5).await;
    for index in [3, 4] {
        let error = apply(&mut machine, vec![entry(index, &["x"])]).await.unwrap_err();
        assert!(error.to_string().contains("cannot be applied after"), "{error}");
        assert_eq!(Some(log_id(4)), machine.applied_state().await.unwrap().0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_begun_before_another_one_is_installed_is_that_one() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut from = open(a.path());
    fill(&mut from, 0..40).await;
    let newer = from.try_create_snapshot_builder(true).await.unwrap().build_snapshot().await.unwrap();

    // Its memtable never passes the gate, so the build is under way when the tree is replaced.
    let (_durable, gate) = gate();
    let mut to = open_with(b.path(), LsmOptions { flush_gate: Some(gate), ..LsmOptions::default() });
    fill(&mut to, 0..10).await;
    let mut builder = to.try_create_snapshot_builder(true).await.unwrap();
    let building = tokio::spawn(async move { builder.build_snapshot().await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    to.install_snapshot(&newer.meta, newer.snapshot).await.unwrap();
    let built = building.await.unwrap().unwrap();
    assert_eq!(newer.meta, built.meta, "an error here would end the node");
    assert_eq!(newer.meta, to.get_current_snapshot().await.unwrap().unwrap().meta);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_flush_thread_latches_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let gate: FlushGate = Arc::new(|index| panic!("gate {index}"));
    let lsm = LsmOptions { memtable_bytes_max: 1, flush_gate: Some(gate), ..LsmOptions::default() };
    let mut machine = open_with(dir.path(), lsm);
    let entries = (1..20).map(|index| entry(index, &["x"])).collect();
    let handle = machine.handle();
    let told = tokio::spawn(async move { handle.wait_failed().await });
    let applied = tokio::time::timeout(HANG, apply(&mut machine, entries)).await;
    assert!(applied.expect("nobody waits for a dead thread").is_err());
    let told = tokio::time::timeout(HANG, told).await.expect("who waits for a failure is told").unwrap();
    assert!(told.to_string().contains("gate"), "{told}");
    assert!(machine.handle().failed().unwrap().to_string().contains("gate"), "{:?}", machine.handle().failed());
}

#[tokio::test]
async fn a_start_writes_again_what_names_the_tables() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = open(dir.path());
    fill(&mut machine, 0..300).await;
    let handle = machine.handle();
    handle.engine().flush_blocking().unwrap();
    handle.close_blocking();
    let before = handle.engine().persisted();
    drop((machine, handle));
    // Held open, so that no new file gets the number of an old one.
    let kv = dir.path().join("kv/g1");
    let old = fs::File::open(kv.join("current")).unwrap();
    let bytes = fs::read(kv.join("current")).unwrap();
    let id = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let old_manifest = fs::File::open(kv.join(format!("v{id}"))).unwrap();

    let lsm = LsmOptions { compaction: false, ..LsmOptions::default() };
    let machine = open_with(dir.path(), lsm);
    let inode = |file: &fs::File| file.metadata().unwrap().ino();
    for (name, old) in [("current".to_owned(), old), (format!("v{id}"), old_manifest)] {
        let new = fs::File::open(kv.join(&name)).unwrap();
        assert_ne!(inode(&old), inode(&new), "{name} is read from memory that may never reach the disk");
    }
    assert_eq!(bytes, fs::read(kv.join("current")).unwrap());
    assert_eq!(before, machine.handle().engine().persisted());
}
