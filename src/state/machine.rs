//! The Raft state machine: committed entries go through the applier into the engine.
//!
//! ```text
//! entry -> decode -> apply (pure) -> engine.write   | per entry
//! publish -> watch -> answer                        | per batch of entries that were ready together
//! ```
//!
//! An answer leaves only after its entry is published, and the tree is sealed only between entries.
//! A committed entry that cannot be decoded, or that a newer program wrote, stops the node: it is
//! never skipped. Snapshots are checkpoints of the tree (`engine::checkpoint`).

mod entry;
mod scrub;
mod shelf;
mod store;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use futures_util::{FutureExt, Stream, StreamExt};
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine};
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use stemedb_raft::types::{Entry, EntryOutcome, LogId, StoredMembership, TypeConfig};
use tokio::sync::watch;

use crate::clock;
use crate::state::command::{CommandOutcome, EntryBody};
use crate::state::engine::checkpoint::{Checkpoint, FlushHold};
use crate::state::engine::latch::Stage;
use crate::state::engine::lsm::{LsmEngine, LsmOptions};
use crate::state::engine::{
    AppliedState, EngineError, ErrorClass, Snapshot, StateRead, TreeDamage, WriteBatch, replace,
};

use shelf::Shelf;
pub use shelf::newest_checkpoint;
use store::StoreFolder;

/// Entries applied before they are published and answered together. Bounds how long the first of
/// them waits for the last, and how many outcomes are held in memory.
const BATCH_ENTRIES_MAX: usize = 64;
/// Entries above this size are applied with the runtime told that the thread will be busy.
const BUSY_ENTRY_BYTES: usize = 64 * 1024;
/// Room beside the memtable that must be free before an optional snapshot is begun, bytes; on a small disk a
/// sixteenth of it.
const SNAPSHOT_SPARE_BYTES: u64 = 64 * 1024 * 1024;

/// Who waits for an entry, and what it will hear.
type Answer = (ApplyResponder<TypeConfig>, EntryOutcome);

/// What decides over the commands of an entry. Deterministic; it reads, and returns what to write.
pub trait EntryApplier: Send + Sync + 'static {
    /// Applies the entry at `log_index`. Outcomes are in the order of the commands.
    fn apply(
        &mut self,
        read: &dyn StateRead,
        log_index: u64,
        body: &EntryBody,
    ) -> Result<(WriteBatch, Vec<CommandOutcome>), EngineError>;
    /// What it keeps in memory, as rows; written just before the memtable is sealed.
    fn save_keys(&mut self) -> Result<WriteBatch, EngineError>;
    /// Index of the last fact.
    fn fact_index(&self) -> u64;
    /// Log time, milliseconds.
    fn log_time_ms(&self) -> u64;
    /// The feature level that the cluster has reached.
    fn feature_level(&self) -> u32;
}

/// Makes the applier for a tree that was just opened: from its rows and its applied state.
pub type RestoreApplier<A> = Arc<dyn Fn(&dyn StateRead, &AppliedState) -> Result<A, EngineError> + Send + Sync>;

/// Where the state lives and how its engine is opened.
#[derive(Clone)]
pub struct MachineOptions {
    /// Holds `kv/`, `checkpoint/` and `kv.incoming/`.
    pub data_dir: PathBuf,
    /// For each engine that is opened; its flush gate waits for the local log.
    pub lsm: LsmOptions,
}

/// How far readers can see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublishedState {
    /// Raft log index of the last published entry; `None` before the first.
    pub applied_log_index: Option<u64>,
    /// Index of the last published fact.
    pub fact_index: u64,
    /// Log time of the last published entry, milliseconds.
    pub log_time_ms: u64,
    /// The feature level that the cluster had reached with that entry.
    pub feature_level: u32,
    /// When it was published, by this node's monotonic clock, milliseconds.
    pub at_monotonic_ms: u64,
}

/// A published state and the rows that belong to it, exactly.
#[derive(Debug)]
pub struct PublishedView {
    /// How far it goes.
    pub state: PublishedState,
    /// Its rows.
    pub snapshot: Snapshot,
}

/// What readers and the node hold of a state machine. Cheap to clone; follows the machine when a
/// snapshot replaces the tree.
#[derive(Clone)]
pub struct StateHandle {
    shared: Arc<Shared>,
}

struct Shared {
    options: MachineOptions,
    engine: ArcSwap<LsmEngine>,
    view: ArcSwapOption<PublishedView>,
    published: watch::Sender<PublishedState>,
    store: StoreFolder,
    shelf: Shelf,
}

impl StateHandle {
    /// The newest published view; `None` once the handle was closed. Nobody keeps one for long: it
    /// holds back garbage collection.
    pub fn view(&self) -> Option<Arc<PublishedView>> {
        self.shared.view.load_full()
    }

    /// Changes with every publication.
    pub fn published(&self) -> watch::Receiver<PublishedState> {
        self.shared.published.subscribe()
    }

    /// The engine of the moment.
    pub fn engine(&self) -> Arc<LsmEngine> {
        self.shared.engine.load_full()
    }

    /// The failure that latched the engine.
    pub fn failed(&self) -> Option<Arc<EngineError>> {
        self.shared.engine.load().failed()
    }

    /// Returns once the engine has latched; a snapshot that replaces the tree makes no difference.
    pub async fn wait_failed(&self) -> Arc<EngineError> {
        let mut latches = self.shared.options.lsm.latches.subscribe();
        loop {
            // Before the question, so that no latch falls between it and the wait.
            latches.mark_unchanged();
            if let Some(error) = self.failed() {
                return error;
            }
            // The sender lives in the options of this very handle.
            if latches.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// The first damage of the tree, found by whatever means: a read, a compaction, a checkpoint, the
    /// scrubber. `None` again once the tree was replaced.
    pub fn damage(&self) -> watch::Receiver<Option<TreeDamage>> {
        self.shared.options.lsm.damage.watch()
    }

    /// A write or sync of the state failed outside the engine, such as that of a checkpoint being
    /// received: nothing is written here any more. Damage is only reported.
    pub fn suffer(&self, error: &EngineError) {
        self.shared.engine.load().inner.suffer(Stage::Install, error);
    }

    /// Blocking. Files below `kv/` and `checkpoint/` that are not of the database. They are left alone.
    pub fn foreign_files(&self) -> Vec<PathBuf> {
        let mut found = self.shared.store.foreign_files();
        found.extend(self.shared.shelf.foreign_files());
        found.extend_from_slice(self.shared.engine.load().foreign_files());
        found.sort();
        found
    }

    /// The newest checkpoint.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        self.shared.shelf.newest()
    }

    /// Whether a checkpoint was put away for its damage: nobody can be sent that one.
    pub fn is_put_away(&self, checkpoint: &Checkpoint) -> bool {
        self.shared.shelf.is_lost(checkpoint.dir())
    }

    /// Blocking. Takes the view away and stops the engine's threads, so that the folder can be
    /// opened again once the last view is gone.
    pub fn close_blocking(&self) {
        self.shared.view.store(None);
        LsmEngine::clone(&self.shared.engine.load()).close();
    }
}

impl std::fmt::Debug for StateHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StateHandle({})", self.shared.options.data_dir.display())
    }
}

/// See the module.
pub struct StateMachine<A> {
    shared: Arc<Shared>,
    engine: LsmEngine,
    applier: A,
    applied: AppliedState,
    restore: RestoreApplier<A>,
}

impl<A: EntryApplier> StateMachine<A> {
    /// Blocking. Opens the state below `options.data_dir`, after finishing or discarding what a
    /// crash left half-done.
    ///
    /// Errors, by [`EngineError::class`]: `Damaged` names the file; the tree alone may then be replaced
    /// (`replace`), and nothing has been changed. `Busy`, `Newer` and `NotPermitted` are for the
    /// operator, and nothing may be replaced. `Disk`: the disk failed.
    pub fn open(options: MachineOptions, restore: RestoreApplier<A>) -> Result<StateMachine<A>, EngineError> {
        replace::finish_interrupted(&options.data_dir, &None)?;
        // Before anything is made: where there is a checkpoint, there was a tree.
        if let Some(covers) = newest_checkpoint(&options.data_dir).and_then(|c| c.applied().log_id)
            && !StoreFolder::has_tree(&options.data_dir)?
        {
            let why = format!("has no tree, and there is a checkpoint of it as of {covers}");
            return Err(EngineError::damaged_file("open", &options.data_dir.join("kv"), why));
        }
        let store = StoreFolder::open(&options.data_dir)?;
        let engine = LsmEngine::open(&store.active(), options.lsm.clone())?;
        store.remove_others();
        let shelf = Shelf::open(&options.data_dir)?;
        let applied = engine.applied().clone();
        let applier = restore(&engine.written(), &applied)?;
        let shared = Arc::new(Shared {
            options,
            engine: ArcSwap::from_pointee(engine.clone()),
            view: ArcSwapOption::empty(),
            published: watch::Sender::new(PublishedState::default()),
            store,
            shelf,
        });
        let machine = StateMachine { shared, engine, applier, applied, restore };
        machine.publish();
        Ok(machine)
    }

    /// For readers and the node.
    pub fn handle(&self) -> StateHandle {
        StateHandle { shared: Arc::clone(&self.shared) }
    }

    /// Blocking. Writes everything applied to the disk. Between entries, as every call of a machine.
    pub fn seal_blocking(&mut self) -> Result<(), EngineError> {
        let keys = self.applier.save_keys()?;
        let ticket = self.engine.rotate(&self.applied, &keys)?;
        self.publish();
        self.engine.wait_flushed_blocking(ticket)
    }

    fn publish(&self) {
        self.engine.publish();
        let state = PublishedState {
            applied_log_index: self.applied.log_index(),
            fact_index: self.applied.fact_index,
            log_time_ms: self.applied.log_time_ms,
            feature_level: self.applied.feature_level,
            at_monotonic_ms: clock::monotonic_ms(),
        };
        let view = PublishedView { state, snapshot: self.engine.snapshot() };
        self.shared.view.store(Some(Arc::new(view)));
        // The watch last: whoever it wakes finds at least that view.
        self.shared.published.send_replace(state);
    }

    fn apply_entry(&mut self, entry: Entry) -> Result<EntryOutcome, io::Error> {
        // An entry taken twice would make this node differ from the others for ever. (That none is
        // left out is for Raft: its own suite leaves some out.)
        if let Some(last) = &self.applied.log_id
            && entry.log_id.index <= last.index
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("entry {} cannot be applied after {last}", entry.log_id),
            ));
        }
        let outcome = match entry.payload {
            EntryPayload::Blank => EntryOutcome::default(),
            EntryPayload::Membership(membership) => {
                self.applied.membership = StoredMembership::new(Some(entry.log_id), membership);
                EntryOutcome::default()
            }
            EntryPayload::Normal(data) => {
                if data.0.len() > BUSY_ENTRY_BYTES && on_threaded_runtime() {
                    tokio::task::block_in_place(|| self.apply_commands(&entry.log_id, &data.0))?
                } else {
                    self.apply_commands(&entry.log_id, &data.0)?
                }
            }
        };
        self.applied.log_id = Some(entry.log_id);
        Ok(outcome)
    }

    fn apply_commands(&mut self, log_id: &LogId, data: &[u8]) -> Result<EntryOutcome, io::Error> {
        let body = entry::decode(log_id, data)?;
        let (batch, outcomes) = self.applier.apply(&self.engine.written(), log_id.index, &body).map_err(|error| {
            tracing::error!("Index update failed: entry {log_id}: {error}");
            self.engine.inner.report(&error);
            io::Error::other(error)
        })?;
        // Encoded before anything is written: an entry is applied whole or not at all.
        let outcome = entry::encode_outcomes(log_id, &outcomes)?;
        self.engine.write(&batch).map_err(io::Error::other)?;
        self.applied.fact_index = self.applier.fact_index();
        self.applied.log_time_ms = self.applier.log_time_ms();
        self.applied.feature_level = self.applier.feature_level();
        Ok(outcome)
    }

    /// Applies one entry; its answer, if somebody waits for it, joins `answers`. True when the
    /// memtable has been sealed behind it.
    fn apply_item(&mut self, item: EntryResponder<TypeConfig>, answers: &mut Vec<Answer>) -> Result<bool, io::Error> {
        let (entry, responder) = item;
        let level_before = self.applied.feature_level;
        let outcome = self.apply_entry(entry)?;
        answers.extend(responder.map(|responder| (responder, outcome)));
        // A program that knows less must find the level in the tree, and not by stumbling over the log behind it.
        self.rotate_if(self.engine.wants_rotation() || self.applied.feature_level != level_before)
    }

    /// Seals the memtable. Between entries only.
    fn rotate_if(&mut self, wanted: bool) -> Result<bool, io::Error> {
        if !wanted {
            return Ok(false);
        }
        let keys = self.applier.save_keys().map_err(io::Error::other)?;
        self.engine.rotate(&self.applied, &keys).map_err(io::Error::other)?;
        Ok(true)
    }

    /// Raft has purged its log up to a checkpoint, which is gone, and ends for good when it gets none. So another one is
    /// made; where that cannot be, it gets the one that is gone, which nobody can send: that is tried again later.
    async fn instead_of_lost(&mut self) -> Result<Option<SnapshotOf<TypeConfig, Checkpoint>>, io::Error> {
        let Some(lost) = self.shared.shelf.lost() else { return Ok(None) };
        // A tree with damage would hand it on.
        if self.shared.options.lsm.damage.known().is_some() {
            return Ok(Some(to_snapshot(lost)));
        }
        let mut builder = self.get_snapshot_builder().await;
        match builder.build_snapshot().await {
            Err(error) if self.engine.failed().is_none() => {
                tracing::warn!(%error, "no checkpoint could be made in the place of a damaged one yet");
                Ok(Some(to_snapshot(lost)))
            }
            built => built.map(Some),
        }
    }

    /// Whether an optional snapshot is better left for later.
    fn defers_snapshot(&self) -> bool {
        match self.engine.stats() {
            Ok(stats) => stats.disk_full || !self.shared.store.has_room(stats.memtable_bytes, SNAPSHOT_SPARE_BYTES),
            Err(_) => false, // building it reports the failure
        }
    }
}

fn on_threaded_runtime() -> bool {
    tokio::runtime::Handle::try_current()
        .is_ok_and(|h| h.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread)
}

impl<A: EntryApplier> RaftStateMachine<TypeConfig> for StateMachine<A> {
    type SnapshotData = Checkpoint;
    type SnapshotBuilder = CheckpointBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied.log_id, self.applied.membership.clone()))
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut entries = entries.fuse();
        while let Some(first) = entries.next().await {
            let mut answers = Vec::new();
            let mut next = Some(first);
            let mut count = 0;
            let applied = loop {
                let Some(item) = next else { break Ok(()) };
                match item.and_then(|item| self.apply_item(item, &mut answers)) {
                    Ok(false) => count += 1,
                    // A sealed memtable ends the batch: replaying a log finds every entry ready at
                    // once, and what waits to be flushed is bounded only by `wait_for_room`.
                    Ok(true) => break Ok(()),
                    Err(error) => break Err(error),
                }
                if count == BATCH_ENTRIES_MAX {
                    break Ok(());
                }
                next = entries.next().now_or_never().flatten();
            };
            // Entries before a failed one are applied and may be answered.
            self.publish();
            for (responder, outcome) in answers {
                responder.send(outcome);
            }
            applied?;
            self.engine.wait_for_room().await;
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<CheckpointBuilder> {
        if !force && self.defers_snapshot() {
            tracing::warn!("no room for a checkpoint, it is put off");
            return None;
        }
        Some(self.get_snapshot_builder().await)
    }

    async fn get_snapshot_builder(&mut self) -> CheckpointBuilder {
        // Sealed here, between entries; written and linked by the builder. The hold keeps later
        // memtables out of it, so that it is exactly this applied state.
        let sealed = self.applier.save_keys().and_then(|keys| self.engine.rotate_and_hold(&self.applied, &keys, true));
        self.publish();
        CheckpointBuilder {
            shared: Arc::clone(&self.shared),
            applied: self.applied.clone(),
            hold: Some(sealed.map(|ticket| FlushHold::of(self.engine.clone(), ticket))),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMetaOf<TypeConfig>,
        snapshot: Checkpoint,
    ) -> Result<(), io::Error> {
        let applied = snapshot.applied().clone();
        if (&applied.log_id, &applied.membership) != (&meta.last_log_id, &meta.last_membership) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the checkpoint ends with {:?}, its announcement with {:?}", applied.log_id, meta.last_log_id),
            ));
        }
        if applied.log_id < self.applied.log_id {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "the checkpoint ends with {:?}, before {:?}, which is applied here",
                    applied.log_id, self.applied.log_id
                ),
            ));
        }
        let shared = Arc::clone(&self.shared);
        let restore = Arc::clone(&self.restore);
        let (engine, applier) = blocking("install", move || {
            shared.install(&restore, snapshot).inspect_err(|error| {
                // Damage is the received tree's; it is not this one's.
                if error.class() != ErrorClass::Damaged {
                    shared.engine.load().inner.suffer(Stage::Install, error);
                }
            })
        })
        .await?;
        let old = std::mem::replace(&mut self.engine, engine);
        self.applier = applier;
        self.applied = applied;
        self.shared.engine.store(Arc::new(self.engine.clone()));
        self.publish();
        // Its folder goes when the last reader of an old view has finished.
        old.retire();
        self.shared.options.lsm.damage.forget(old.dir());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf<TypeConfig, Checkpoint>>, io::Error> {
        let shared = Arc::clone(&self.shared);
        let newest = blocking("checkpoint", move || Ok(shared.shelf.newest_checked())).await?;
        match newest {
            Some(newest) => Ok(Some(to_snapshot(newest))),
            None => self.instead_of_lost().await,
        }
    }
}

impl Shared {
    /// Blocking. Puts a checkpoint on the shelf and makes a new tree of it. Until the last step,
    /// which names the new folder, a crash leaves the old tree in place.
    fn install<A>(&self, restore: &RestoreApplier<A>, checkpoint: Checkpoint) -> Result<(LsmEngine, A), EngineError> {
        checkpoint.verify_blocking()?;
        let expected = checkpoint.applied().clone();
        let checkpoint = self.shelf.adopt(checkpoint)?;
        let folder = self.store.new_folder()?;
        checkpoint.link_into(&folder.dir, false)?;
        let engine = LsmEngine::open(&folder.dir, self.options.lsm.clone())?;
        if *engine.applied() != expected {
            return Err(EngineError::damaged(
                "install",
                format!("the rows end with {:?}, the manifest with {:?}", engine.applied().log_id, expected.log_id),
            ));
        }
        let applier = restore(&engine.written(), &expected)?;
        self.store.activate(&folder)?;
        Ok((engine, applier))
    }
}

/// Blocking. Makes the state of a node that starts afresh from the checkpoint in `kv.incoming`: `checkpoint/` and `kv/`
/// below `data_dir`, which must not be there. The applied state is the checkpoint's.
pub fn install_fresh(data_dir: &std::path::Path) -> Result<(), EngineError> {
    let incoming = Checkpoint::load(&data_dir.join("kv.incoming"))?;
    let checkpoint = Shelf::open(data_dir)?.adopt(incoming)?;
    let store = StoreFolder::open(data_dir)?;
    checkpoint.link_into(&store.active(), false)
}

/// Blocking. Puts a complete checkpoint, which was verified, on the shelf of a node whose state is closed, as the newest
/// one. `None`: the newest one there reaches further, and nothing was changed.
pub fn shelve(data_dir: &std::path::Path, checkpoint: Checkpoint) -> Result<Option<Checkpoint>, EngineError> {
    let shelf = Shelf::open(data_dir)?;
    if shelf.newest().is_some_and(|newest| newest.applied().log_id > checkpoint.applied().log_id) {
        return Ok(None);
    }
    shelf.adopt(checkpoint).map(Some)
}

fn to_snapshot(checkpoint: Checkpoint) -> SnapshotOf<TypeConfig, Checkpoint> {
    let applied = checkpoint.applied();
    SnapshotOf::<TypeConfig, Checkpoint> {
        meta: SnapshotMetaOf::<TypeConfig> { last_log_id: applied.log_id, last_membership: applied.membership.clone() },
        snapshot: checkpoint,
    }
}

async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, io::Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| io::Error::other(format!("{operation}: {error}")))?
        .map_err(io::Error::other)
}

/// Builds one checkpoint of the applied state at the moment it was made.
pub struct CheckpointBuilder {
    shared: Arc<Shared>,
    applied: AppliedState,
    /// Taken by the build. Dropped unused, it lets flushes go on.
    hold: Option<Result<FlushHold, EngineError>>,
}

impl RaftSnapshotBuilder<TypeConfig> for CheckpointBuilder {
    type SnapshotData = Checkpoint;

    async fn build_snapshot(&mut self) -> Result<SnapshotOf<TypeConfig, Checkpoint>, io::Error> {
        let hold = self
            .hold
            .take()
            .ok_or_else(|| io::Error::other("a checkpoint builder builds once"))?
            .map_err(io::Error::other)?;
        let (shared, applied) = (Arc::clone(&self.shared), self.applied.clone());
        blocking("checkpoint", move || shared.shelf.build(hold, &applied)).await.map(to_snapshot)
    }
}
