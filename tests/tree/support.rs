//! A state machine over a folder, filled with the same entries every time.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use openraft::storage::RaftStateMachine;
use openraft::{EntryPayload, Membership, RaftSnapshotBuilder};
use stemedb::model::NewAssertion;
use stemedb::node::applier::{NodeApplier, restorer};
use stemedb::node::vital::Vital;
use stemedb::state::apply::KeyLimits;
use stemedb::state::command::{Command, CommandKey, ENTRY_FORMAT, EntryBody, KeySource, Operation};
use stemedb::state::engine::checkpoint::Checkpoint;
use stemedb::state::engine::lsm::LsmOptions;
use stemedb::state::engine::{EngineError, Row, StateRead};
use stemedb::state::machine::{MachineOptions, StateHandle, StateMachine};
use stemedb_raft::types::{Entry, EntryData, LogId, Member, TypeConfig};
use uuid::Uuid;

pub type Machine = StateMachine<NodeApplier>;

pub fn log_id(index: u64) -> LogId {
    openraft::testing::log_id::<TypeConfig>(1, 1, index)
}

/// Entry 0 is the membership, every other one has four assertions.
pub fn entry(index: u64) -> Entry {
    let payload = match index {
        0 => {
            let nodes = BTreeMap::from([(1, Member::default())]);
            EntryPayload::Membership(Membership::new(vec![nodes.keys().copied().collect()], nodes).unwrap())
        }
        _ => EntryPayload::Normal(EntryData(body(index).encode().unwrap().into())),
    };
    Entry { log_id: log_id(index), payload }
}

fn body(index: u64) -> EntryBody {
    let now_ms = 1_700_000_000_000 + index;
    let item = |n: u64| NewAssertion {
        id: Uuid::from_u128((u128::from(now_ms) << 80) | (0x7 << 76) | (0x8 << 60) | u128::from(index * 8 + n)),
        concept_path: format!("a/{}", (index * 7 + n) % 97),
        predicate: format!("p{n}"),
        value_json: format!("\"{index}-{n}-{}\"", "x".repeat(((index * 31) % 120) as usize)),
        source: None,
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
    };
    let command = Command {
        key: CommandKey { source: KeySource::Node, id: u128::from(index) << 3 },
        body_hash: 7,
        resend_until_ms: now_ms + 10_000,
        created_at_ms: now_ms,
        op: Operation::Assert((0..4).map(item).collect()),
    };
    EntryBody { format: ENTRY_FORMAT, log_time_ms: now_ms, commands: vec![command] }
}

/// Small memtables, so that there are several tables, and no compaction unless asked for.
pub fn options() -> LsmOptions {
    LsmOptions {
        memtable_bytes_max: 64 * 1024,
        cache_bytes: 64 * 1024,
        compaction: false,
        lock_timeout_ms: 2_000,
        ..LsmOptions::default()
    }
}

pub fn open_with(dir: &Path, lsm: LsmOptions) -> Result<Machine, EngineError> {
    let (restore, _gone) = restorer(KeyLimits::default(), Vital::default());
    StateMachine::open(MachineOptions { data_dir: dir.to_owned(), lsm }, restore)
}

pub fn open(dir: &Path) -> Result<Machine, EngineError> {
    open_with(dir, options())
}

pub async fn fill(machine: &mut Machine, indexes: std::ops::Range<u64>) {
    let entries: Vec<_> = indexes.map(|index| Ok((entry(index), None))).collect();
    machine.apply(futures_util::stream::iter(entries)).await.unwrap();
}

pub async fn checkpoint(machine: &mut Machine) -> Checkpoint {
    machine.try_create_snapshot_builder(true).await.unwrap().build_snapshot().await.unwrap().snapshot
}

/// Every row that says something about the facts: not those about what this process has saved, and when.
pub fn rows(handle: &StateHandle) -> Result<Vec<Row>, EngineError> {
    let view = handle.view().unwrap();
    let rows: Result<Vec<Row>, EngineError> = view.snapshot.scan(Bound::Unbounded, Bound::Unbounded).collect();
    Ok(rows?.into_iter().filter(|(key, _)| !key.starts_with(b"mkeys") && !key.starts_with(b"m~engine/")).collect())
}

pub fn close(machine: Machine) {
    let handle = machine.handle();
    handle.close_blocking();
    drop((machine, handle));
}

/// A closed state after `count` entries, everything of it on the disk, and its rows. With a checkpoint
/// in the middle when wanted.
pub async fn closed(dir: &Path, count: u64, checkpoint_at: Option<u64>) -> Vec<Row> {
    let mut machine = open(dir).unwrap();
    let middle = checkpoint_at.unwrap_or(0);
    fill(&mut machine, 0..middle).await;
    if checkpoint_at.is_some() {
        drop(checkpoint(&mut machine).await);
    }
    fill(&mut machine, middle..count).await;
    machine.seal_blocking().unwrap();
    let rows = rows(&machine.handle()).unwrap();
    close(machine);
    rows
}

/// The rows after `count` entries. Made once: the same entries make the same rows.
pub async fn rows_after(count: u64) -> Vec<Row> {
    static MADE: Mutex<BTreeMap<u64, Vec<Row>>> = Mutex::new(BTreeMap::new());
    if let Some(rows) = MADE.lock().unwrap().get(&count) {
        return rows.clone();
    }
    let dir = tempfile::tempdir().unwrap();
    let rows = closed(dir.path(), count, None).await;
    MADE.lock().unwrap().insert(count, rows.clone());
    rows
}

/// The tree that counts.
pub fn tree(dir: &Path) -> PathBuf {
    let active = fs::read(dir.join("kv/active")).unwrap();
    dir.join(format!("kv/g{}", u64::from_le_bytes(active[..8].try_into().unwrap())))
}

/// Its tables, by number.
pub fn tables(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<(u64, PathBuf)> = fs::read_dir(tree(dir).join("tables"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path)))
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// Its newest manifest.
pub fn manifest(dir: &Path) -> PathBuf {
    let current = fs::read(tree(dir).join("current")).unwrap();
    tree(dir).join(format!("v{}", u64::from_le_bytes(current[..8].try_into().unwrap())))
}

/// Replaces a file by one of its own: tables are hard-linked to checkpoints.
pub fn rewrite(path: &Path, bytes: &[u8]) {
    let temporary = path.with_file_name(format!(".tmp-{}", path.file_name().unwrap().to_string_lossy()));
    fs::write(&temporary, bytes).unwrap();
    fs::rename(&temporary, path).unwrap();
}

pub fn flip(path: &Path, bit: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[bit / 8] ^= 1 << (bit % 8);
    rewrite(path, &bytes);
}

/// The error of a start that must not succeed.
pub fn refused(dir: &Path) -> EngineError {
    match open(dir) {
        Ok(machine) => panic!("it opened: {:?}", machine.handle()),
        Err(error) => error,
    }
}

pub fn file_of(error: &EngineError) -> Option<&Path> {
    match error {
        EngineError::Damaged { file, .. } => file.as_deref(),
        EngineError::Io { .. } => None,
    }
}

/// `STEMEDB_TEST_SLICE=2/8`: of a long run only each eighth case, from the third on. (which, of how many)
pub fn slice() -> (usize, usize) {
    let Ok(text) = std::env::var("STEMEDB_TEST_SLICE") else { return (0, 1) };
    let (which, of) = text.split_once('/').expect("two numbers with a slash between them");
    (which.parse().unwrap(), of.parse().unwrap())
}
