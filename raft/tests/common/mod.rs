//! What the log's tests share: entries with known contents, and a small state machine.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

use std::{io, path::Path, sync::Arc};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use openraft::{
    EntryPayload, RaftSnapshotBuilder,
    storage::{EntryResponder, IOFlushed, RaftLogStorage, RaftStateMachine},
    type_config::{
        TypeConfigExt,
        alias::{SnapshotMetaOf, SnapshotOf},
    },
};
use rand::{RngCore, SeedableRng, rngs::StdRng};
use stemedb_raft::{
    Entry, EntryData, EntryOutcome, LogId, Pace, StoredMembership, TypeConfig, WalOptions, WalStore,
    disk::{Disk, sim::SimDisk},
    frame::log_id,
};

/// Small segments, so that tests roll often.
pub const SEGMENT_BYTES: u64 = 64 * 1024;

pub fn options(dir: &Path) -> WalOptions {
    WalOptions { segment_bytes: SEGMENT_BYTES, tail_cache_bytes: 0, ..WalOptions::new(dir) }
}

pub fn open_sim(sim: &SimDisk) -> Result<WalStore, stemedb_raft::OpenError> {
    WalStore::open(sim.shared(), options(Path::new("/wal"))).map(|(store, _)| store)
}

/// Everything in lockstep, identities from a seed: the same work gives the same bytes.
pub fn lockstep(dir: &Path, seed: u64) -> WalOptions {
    let rng = std::sync::Mutex::new(StdRng::seed_from_u64(seed));
    let identities = Arc::new(move || rng.lock().unwrap().next_u64());
    WalOptions { pace: Pace::Lockstep, identities, ..options(dir) }
}

pub fn entry(term: u64, index: u64, text: &str) -> Entry {
    let data = EntryData(Bytes::copy_from_slice(text.as_bytes()));
    Entry { log_id: log_id(term, index), payload: EntryPayload::Normal(data) }
}

pub fn text_of(entry: &Entry) -> String {
    match &entry.payload {
        EntryPayload::Normal(data) => String::from_utf8_lossy(&data.0).into_owned(),
        other => format!("{other:?}"),
    }
}

/// Appends and waits until the entries are durable.
pub async fn append(store: &mut WalStore, entries: Vec<Entry>) -> io::Result<()> {
    let (tx, rx) = TypeConfig::oneshot();
    store.append(entries, IOFlushed::signal(tx)).await?;
    rx.await.map_err(io::Error::other)?
}

/// Everything in the log, as `index:term:text`.
pub fn contents(store: &WalStore) -> io::Result<Vec<String>> {
    let entries = store.reader().read(0, u64::MAX, u64::MAX)?;
    let show = |e: &Entry| format!("{}:{}:{}", e.log_id.index(), e.log_id.leader_id.term, text_of(e));
    Ok(entries.iter().map(show).collect())
}

pub fn close(store: WalStore) {
    store.handle().close().unwrap();
}

/// A state machine that keeps the applied texts in memory; its snapshot is their list.
#[derive(Default, Clone)]
pub struct ListMachine {
    pub state: Arc<std::sync::Mutex<ListState>>,
}

type KeptSnapshot = (SnapshotMetaOf<TypeConfig>, Vec<(LogId, Bytes)>);

#[derive(Default, Clone)]
pub struct ListState {
    pub applied: Option<LogId>,
    pub membership: StoredMembership,
    pub texts: Vec<(LogId, Bytes)>,
    pub snapshot: Option<KeptSnapshot>,
}

impl RaftSnapshotBuilder<TypeConfig> for ListMachine {
    type SnapshotData = Vec<(LogId, Bytes)>;

    async fn build_snapshot(&mut self) -> Result<SnapshotOf<TypeConfig, Self::SnapshotData>, io::Error> {
        let mut state = self.state.lock().unwrap();
        let meta =
            SnapshotMetaOf::<TypeConfig> { last_log_id: state.applied, last_membership: state.membership.clone() };
        let texts = state.texts.clone();
        state.snapshot = Some((meta.clone(), texts.clone()));
        Ok(SnapshotOf::<TypeConfig, Self::SnapshotData> { meta, snapshot: texts })
    }
}

impl RaftStateMachine<TypeConfig> for ListMachine {
    type SnapshotData = Vec<(LogId, Bytes)>;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let state = self.state.lock().unwrap();
        Ok((state.applied, state.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            {
                let mut state = self.state.lock().unwrap();
                state.applied = Some(entry.log_id);
                match &entry.payload {
                    EntryPayload::Blank => {}
                    EntryPayload::Normal(data) => state.texts.push((entry.log_id, data.0.clone())),
                    EntryPayload::Membership(m) => {
                        state.membership = StoredMembership::new(Some(entry.log_id), m.clone());
                    }
                }
            }
            if let Some(responder) = responder {
                responder.send(EntryOutcome::default());
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMetaOf<TypeConfig>,
        snapshot: Self::SnapshotData,
    ) -> Result<(), io::Error> {
        let mut state = self.state.lock().unwrap();
        state.applied = meta.last_log_id;
        state.membership = meta.last_membership.clone();
        state.texts = snapshot.clone();
        state.snapshot = Some((meta.clone(), snapshot));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf<TypeConfig, Self::SnapshotData>>, io::Error> {
        let state = self.state.lock().unwrap();
        Ok(state
            .snapshot
            .clone()
            .map(|(meta, snapshot)| SnapshotOf::<TypeConfig, Self::SnapshotData> { meta, snapshot }))
    }
}

pub fn real_disk() -> Arc<dyn Disk> {
    stemedb_raft::disk::RealDisk::new()
}

#[allow(clippy::large_enum_variant)]
pub enum Found {
    Ready(WalStore, stemedb_raft::RecoveryReport),
    Waits(stemedb_raft::PendingLog),
    Lost(String),
    Refused(String),
}

impl Found {
    pub fn of(step: Result<stemedb_raft::OpenStep, stemedb_raft::OpenError>) -> Self {
        match step {
            Ok(stemedb_raft::OpenStep::Ready(store, report)) => Self::Ready(store, report),
            Ok(stemedb_raft::OpenStep::AskPeers(pending)) => Self::Waits(pending),
            Ok(stemedb_raft::OpenStep::Rebuild(lost)) => Self::Lost(lost.why),
            Err(error) => Self::Refused(error.to_string()),
        }
    }

    pub fn source(&self) -> stemedb_raft::EntrySource {
        match self {
            Self::Ready(store, _) => store.handle().source(),
            Self::Waits(pending) => pending.source(),
            Self::Lost(_) | Self::Refused(_) => stemedb_raft::EntrySource::lost(),
        }
    }
}

pub fn begin(sim: &SimDisk) -> Found {
    Found::of(WalStore::begin_open(sim.shared(), options(Path::new("/wal"))))
}

/// Asks the given others everything, once.
pub fn ask_once(
    pending: stemedb_raft::PendingLog,
    own: u64,
    voters: &[u64],
    others: &[(u64, stemedb_raft::EntrySource)],
) -> Found {
    let questions = pending.questions();
    let answers: Vec<_> =
        others.iter().flat_map(|(id, source)| questions.iter().map(|q| (*id, q.index, source.answer(q)))).collect();
    let electorate = stemedb_raft::Electorate { own: Some(own), voters: voters.iter().copied().collect() };
    Found::of(pending.resolve(&answers, &electorate))
}

/// Opens all logs; those that lack something ask the others until nothing changes. Ids are 1, 2, 3 …
pub fn settle(sims: &[SimDisk]) -> Vec<Found> {
    let mut nodes: Vec<Found> = sims.iter().map(begin).collect();
    let voters: Vec<u64> = (1..=sims.len() as u64).collect();
    loop {
        let mut moved = false;
        for at in 0..nodes.len() {
            let sources: Vec<_> =
                (1..).zip(nodes.iter().map(Found::source)).filter(|(id, _)| *id != at as u64 + 1).collect();
            if !matches!(nodes[at], Found::Waits(_)) {
                continue;
            }
            let Found::Waits(pending) = std::mem::replace(&mut nodes[at], Found::Lost(String::new())) else { continue };
            let before = pending.progress();
            nodes[at] = ask_once(pending, at as u64 + 1, &voters, &sources);
            moved |= !matches!(&nodes[at], Found::Waits(pending) if pending.progress() == before);
        }
        if !moved {
            return nodes;
        }
    }
}

/// `STEMEDB_TEST_SLICE=2/8`: of a long run only each eighth case, from the third on. (which, of how many)
pub fn slice() -> (usize, usize) {
    let Ok(text) = std::env::var("STEMEDB_TEST_SLICE") else { return (0, 1) };
    let (which, of) = text.split_once('/').expect("two numbers with a slash between them");
    (which.parse().unwrap(), of.parse().unwrap())
}
