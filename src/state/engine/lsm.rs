//! The engine over lsm-tree: one tree, one writing thread, many readers.
//!
//! ```text
//! write(entry)* -> publish -> rotate(applied state) -> [flush gate] -> flush -> persisted()
//!   memtable        readers     seal the memtable       log durable    SST + manifest, synced
//! ```
//!
//! The apply thread alone calls `write`, `written`, `publish` and `rotate`; everything else may be
//! called by anybody. Sequence numbers come from the counter that is shared with lsm-tree and from
//! nowhere else. The first failed sync or manifest write latches the engine: from then on writes
//! are refused and nothing is flushed, compacted or checkpointed again.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use lsm_tree::SequenceNumberCounter;
use lsm_tree::config::{BlockSizePolicy, CompressionPolicy};
use lsm_tree::{AbstractTree, AnyTree, Cache, CompressionType, Config, DescriptorTable, Memtable};
use stemedb_raft::disk::folder_lock::KernelLock;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use super::options::{EngineStats, FailPoint, FlushGate, LsmOptions};

use super::applied::{APPLIED_KEY, AppliedState};
use super::guard::caught;
use super::snapshot::{Snapshot, SnapshotTable};
use super::{EngineError, ErrorClass, TreeDamage, WriteBatch};
use super::{background, folder, foreign, hidden, precheck};

/// lsm-tree panics on longer keys.
pub const KEY_BYTES_MAX: usize = 65_535;
/// Values are far smaller (1 MiB in the API); this keeps away from lsm-tree's panic at 4 GiB.
pub const VALUE_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Table files kept open. A node has fewer than 100.
const OPEN_FILES_MAX: usize = 256;
/// Larger blocks compress better, smaller ones cost less per point read.
const BLOCK_BYTES: u32 = 8 * 1024;
/// Sealed memtables from which writes are slowed: the flush thread is one behind.
const SEALED_SLOW: usize = 2;
/// Sealed memtables at which writes wait: bounds memory to this many memtables and the active one.
const SEALED_STOP: usize = 4;
/// Runs in level 0 from which writes are slowed; compaction starts at 4.
const L0_RUNS_SLOW: usize = 12;
/// Runs in level 0 at which writes wait. lsm-tree counts runs in one byte, so this also keeps the
/// manifest sound; a scan merges them all.
const L0_RUNS_STOP: usize = 24;
/// One step of slowing, per call of `wait_for_room`.
const SLOW_STEP: Duration = Duration::from_millis(1);

/// A memtable that waits to be written.
pub(crate) struct Sealed {
    pub(crate) ticket: u64,
    pub(crate) memtable: Arc<Memtable>,
    pub(crate) applied: AppliedState,
}

/// What the flush thread works from.
#[derive(Default)]
pub(crate) struct FlushQueue {
    pub(crate) sealed: VecDeque<Sealed>,
    pub(crate) ticket_last: u64,
    pub(crate) ticket_flushed: u64,
    /// Memtables with higher tickets stay in memory while a checkpoint is being linked.
    pub(crate) holds: Vec<u64>,
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) flushed_bytes: AtomicU64,
    pub(crate) flush_count: AtomicU64,
    pub(crate) compacted_bytes: AtomicU64,
    pub(crate) compaction_count: AtomicU64,
    pub(crate) disk_full: AtomicBool,
    pub(crate) compaction_full: AtomicBool,
    /// A compaction met damage: none is begun any more.
    pub(crate) compaction_stopped: AtomicBool,
}

/// Shared by the engine, its threads and its snapshots. Fields drop in this order: the tree before
/// the lock, the retired folder last.
pub(crate) struct Inner {
    pub(crate) tree: AnyTree,
    pub(crate) dir: PathBuf,
    pub(crate) options: LsmOptions,
    pub(crate) seqno: SequenceNumberCounter,
    pub(crate) visible: SequenceNumberCounter,
    pub(crate) snapshots: SnapshotTable,
    pub(crate) queue: Mutex<FlushQueue>,
    pub(crate) queue_changed: Condvar,
    pub(crate) compaction_wanted: Mutex<bool>,
    pub(crate) compaction_woken: Condvar,
    /// One at a time, so that whoever asks for a compaction finds it done and not just begun.
    pub(crate) compacting: Mutex<()>,
    /// Manifests written by flushes; changed under `persisted`.
    pub(crate) manifests_by_flush: AtomicU64,
    /// Held over a change of the manifest by a flush together with `persisted`, and while a
    /// checkpoint pins both.
    pub(crate) persisted: Mutex<AppliedState>,
    /// Read by whoever writes tables; written by whoever removes leftovers of failed writes.
    pub(crate) writing_tables: RwLock<()>,
    /// Ids of all tables that were ever part of the tree in this process.
    pub(crate) tables_seen: Mutex<std::collections::HashSet<u64>>,
    /// Ids of tables whose file was read and found equal to its hash.
    pub(crate) tables_verified: Mutex<std::collections::HashSet<u64>>,
    pub(crate) failed: OnceLock<Arc<EngineError>>,
    pub(crate) stop: CancellationToken,
    pub(crate) room: watch::Sender<u64>,
    pub(crate) counters: Counters,
    /// Files in its folder that are not of it.
    pub(crate) foreign: Vec<PathBuf>,
    _lock: KernelLock,
    retired: RetiredFolder,
}

/// Removes the folder when the last reader of a replaced tree is gone.
#[derive(Default)]
struct RetiredFolder {
    dir: OnceLock<PathBuf>,
}

impl Drop for RetiredFolder {
    fn drop(&mut self) {
        if let Some(dir) = self.dir.get()
            && let Err(error) = foreign::remove_tree(dir)
        {
            // The next start removes it: the pointer names another folder.
            tracing::warn!(%error, dir = %dir.display(), "a replaced store could not be removed");
        }
    }
}

/// Takes a lock whose holder can only have panicked between independent changes.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    pub(crate) fn wake_all(&self) {
        // Each waiter checks its condition under the lock; passing through it loses no wake-up.
        drop(lock(&self.queue));
        self.queue_changed.notify_all();
        drop(lock(&self.compaction_wanted));
        self.compaction_woken.notify_all();
        self.room.send_modify(|n| *n = n.wrapping_add(1));
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.dir.get().is_some()
    }

    pub(crate) fn check(&self) -> Result<(), EngineError> {
        match self.failed.get() {
            Some(error) => Err(error.repeat()),
            None => Ok(()),
        }
    }

    pub(crate) fn note<T>(
        &self,
        operation: &'static str,
        began: tokio::time::Instant,
        result: Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        match &result {
            Ok(_) => self.options.observer.operation_done(operation, began.elapsed()),
            Err(error) => self.options.observer.operation_failed(operation, error),
        }
        result
    }
}

/// The engine. Clones share it; when the last one is dropped the threads stop, and the folder is
/// free once the last snapshot is gone too.
#[derive(Clone)]
pub struct LsmEngine {
    pub(crate) inner: Arc<Inner>,
    applied_at_open: Arc<AppliedState>,
    threads: Arc<Threads>,
}

struct Threads {
    inner: Arc<Inner>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.inner.stop.cancel();
        self.inner.wake_all();
    }
}

impl LsmEngine {
    /// Blocking. Opens or creates the tree in `dir`.
    ///
    /// Errors, by [`EngineError::class`]: `Damaged` names the file when `current`, the manifest, a
    /// table or the applied state are missing or not what was written; `Busy`, `Newer`,
    /// `NotPermitted` are for the operator; `Disk`.
    pub fn open(dir: &Path, options: LsmOptions) -> Result<LsmEngine, EngineError> {
        let began = tokio::time::Instant::now();
        let observer = Arc::clone(&options.observer);
        let result = Self::open_inner(dir, options);
        match &result {
            Ok(_) => observer.operation_done("open", began.elapsed()),
            Err(error) => {
                observer.operation_failed("open", error);
                if let Some(damage) = TreeDamage::of(error, dir) {
                    observer.damage_found(&damage);
                }
            }
        }
        result
    }

    fn open_inner(dir: &Path, options: LsmOptions) -> Result<LsmEngine, EngineError> {
        folder::create_synced(dir).map_err(|e| EngineError::io("open", e))?;
        let folder_lock = super::lock::take(dir, options.lock_timeout_ms)?;
        precheck::make_durable(dir, &precheck::check(dir)?)?;
        let found = precheck::check(dir)?;
        let foreign = foreign::set_aside(dir).map_err(|e| EngineError::io("open", e))?;
        if !foreign.is_empty() {
            tracing::warn!(?foreign, "files that are not of the tree are left alone");
        }
        Self::open_checked(dir, options, folder_lock, &found, foreign).map_err(|error| match (&error, &found) {
            // Whatever lsm-tree stumbled over, the tables say which of them it is.
            (
                EngineError::Damaged { file: None, .. } | EngineError::Io { .. },
                precheck::Found::Tree { tables, .. },
            ) if !matches!(error.class(), ErrorClass::Full | ErrorClass::Newer | ErrorClass::NotPermitted) => {
                precheck::find_damaged_table(dir, tables).unwrap_or(error)
            }
            _ => error,
        })
    }

    fn open_checked(
        dir: &Path,
        options: LsmOptions,
        folder_lock: KernelLock,
        found: &precheck::Found,
        foreign: Vec<PathBuf>,
    ) -> Result<LsmEngine, EngineError> {
        let seqno = SequenceNumberCounter::new(1);
        let visible = SequenceNumberCounter::new(1);
        let tree = caught("open", || {
            Config::new(dir, seqno.clone(), visible.clone())
                .use_cache(Arc::new(Cache::with_capacity_bytes(options.cache_bytes)))
                .use_descriptor_table(Some(Arc::new(DescriptorTable::new(OPEN_FILES_MAX))))
                .data_block_compression_policy(CompressionPolicy::all(CompressionType::Lz4))
                .data_block_size_policy(BlockSizePolicy::all(BLOCK_BYTES))
                .open()
        })?;
        if let precheck::Found::Tree { manifest_id, .. } = found {
            let opened = caught("open", || Ok(hidden::manifest_id(&tree)))?;
            if opened != *manifest_id {
                return Err(EngineError::damaged(
                    "open",
                    format!("manifest {manifest_id} was checked and {opened} was opened"),
                ));
            }
        }
        if let Some(table) = caught("open", || Ok(hidden::misnamed(&tree)))? {
            return Err(EngineError::damaged_file("open", &table, "is another table under this name"));
        }
        // Flushes and compactions take numbers too, so the counter continues behind all of them.
        let next = caught("open", || Ok(tree.get_highest_seqno()))?.map_or(1, |s| s + 1);
        seqno.fetch_max(next);
        visible.fetch_max(next);

        let applied = match caught("open", || tree.get(APPLIED_KEY, u64::MAX))? {
            Some(row) => AppliedState::from_row(&row)?,
            None => {
                // Every flushed memtable carries the row, so tables without it lost it.
                if caught("open", || Ok(tree.table_count()))? > 0 {
                    return Err(EngineError::damaged(
                        "open",
                        format!("{} has tables and no applied state", dir.display()),
                    ));
                }
                AppliedState::default()
            }
        };
        let seen = caught("open", || Ok(hidden::pin(&tree)))?.tables();

        let inner = Arc::new(Inner {
            tree,
            dir: dir.to_owned(),
            options,
            snapshots: SnapshotTable::new(visible.get()),
            seqno,
            visible,
            queue: Mutex::default(),
            queue_changed: Condvar::new(),
            // Level 0 may be full from the last run.
            compaction_wanted: Mutex::new(true),
            compaction_woken: Condvar::new(),
            compacting: Mutex::default(),
            manifests_by_flush: AtomicU64::new(0),
            persisted: Mutex::new(applied.clone()),
            writing_tables: RwLock::new(()),
            tables_seen: Mutex::new(seen.iter().map(|table| table.id).collect()),
            tables_verified: Mutex::default(),
            failed: OnceLock::new(),
            stop: CancellationToken::new(),
            room: watch::Sender::new(0),
            counters: Counters::default(),
            foreign,
            _lock: folder_lock,
            retired: RetiredFolder::default(),
        });
        let threads = Threads { inner: Arc::clone(&inner), handles: Mutex::default() };
        let handles = background::spawn(&inner).map_err(|e| EngineError::io("open", e))?;
        *lock(&threads.handles) = handles;
        Ok(LsmEngine { inner, applied_at_open: Arc::new(applied), threads: Arc::new(threads) })
    }

    /// The folder of the tree.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// What the tree held when it was opened: the log is applied again from here on.
    pub fn applied(&self) -> &AppliedState {
        &self.applied_at_open
    }

    /// Apply thread only. Writes to memory; all rows or none.
    ///
    /// Errors: the latched failure; `Io(InvalidInput)` for a key or value that the tree cannot
    /// hold.
    pub fn write(&self, batch: &WriteBatch) -> Result<(), EngineError> {
        if batch.rows.is_empty() {
            return self.inner.check();
        }
        let began = tokio::time::Instant::now();
        let result = self.write_rows(&batch.rows);
        self.inner.note("put", began, result)
    }

    fn write_rows(&self, rows: &[(bytes::Bytes, Option<bytes::Bytes>)]) -> Result<(), EngineError> {
        self.inner.check()?;
        for (key, value) in rows {
            let value_bytes = value.as_ref().map_or(0, bytes::Bytes::len);
            if key.is_empty() || key.len() > KEY_BYTES_MAX || value_bytes > VALUE_BYTES_MAX {
                return Err(EngineError::io(
                    "put",
                    std::io::Error::new(
                        std::io::ErrorKind::InvalidInput,
                        format!(
                            "a key of {} bytes (1 to {KEY_BYTES_MAX}) with a value of {value_bytes} \
                             bytes (at most {VALUE_BYTES_MAX})",
                            key.len()
                        ),
                    ),
                ));
            }
        }
        let written = caught("put", || {
            // Two rows of one key must not share a number, so a repeated key starts a new one.
            // Readers see none of them before `publish`.
            let mut seqno = self.inner.seqno.next();
            let mut in_this = std::collections::HashSet::with_capacity(rows.len());
            for (key, value) in rows {
                if !in_this.insert(key.as_ref()) {
                    seqno = self.inner.seqno.next();
                    in_this.clear();
                    in_this.insert(key.as_ref());
                }
                match value {
                    Some(value) => {
                        self.inner.tree.insert(key.as_ref(), value.as_ref(), seqno);
                    }
                    None => {
                        self.inner.tree.remove(key.as_ref(), seqno);
                    }
                }
            }
            self.inner.visible.fetch_max(seqno + 1);
            Ok(())
        });
        written.map_err(|error| self.inner.latch(error).repeat())
    }

    /// Apply thread only: reads that see unpublished rows.
    pub fn written(&self) -> Snapshot {
        Snapshot::written(Arc::clone(&self.inner))
    }

    /// Apply thread only, between entries: what was written becomes visible.
    pub fn publish(&self) {
        self.inner.snapshots.publish(self.inner.visible.get());
    }

    /// The published state.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::published(Arc::clone(&self.inner))
    }

    /// True when the active memtable is full.
    pub fn wants_rotation(&self) -> bool {
        self.memtable_bytes() >= self.inner.options.memtable_bytes_max
    }

    /// Bytes in the active memtable.
    pub fn memtable_bytes(&self) -> u64 {
        caught("put", || Ok(self.inner.tree.active_memtable().size())).unwrap_or(0)
    }

    /// Apply thread only, between entries: writes `extra` and the applied state, publishes, seals
    /// the memtable and wakes the flush thread. The memtable then holds exactly what leads to
    /// `applied`. The returned ticket says when it is on disk, see [`Self::wait_flushed_blocking`].
    pub fn rotate(&self, applied: &AppliedState, extra: &WriteBatch) -> Result<u64, EngineError> {
        self.rotate_and_hold(applied, extra, false)
    }

    pub(crate) fn rotate_and_hold(
        &self,
        applied: &AppliedState,
        extra: &WriteBatch,
        hold: bool,
    ) -> Result<u64, EngineError> {
        let mut batch = extra.clone();
        batch.put(APPLIED_KEY, applied.to_row()?);
        self.write(&batch)?;
        self.publish();
        // Under the queue's lock, so that the flush thread sees the memtable with its state.
        let mut queue = lock(&self.inner.queue);
        let memtable = caught("put", || Ok(self.inner.tree.rotate_memtable()))
            .and_then(|sealed| sealed.ok_or_else(|| EngineError::damaged("put", "a written memtable is empty")));
        let memtable = match memtable {
            Ok(memtable) => memtable,
            Err(error) => {
                drop(queue);
                return Err(self.inner.latch(error).repeat());
            }
        };
        queue.ticket_last += 1;
        let ticket = queue.ticket_last;
        queue.sealed.push_back(Sealed { ticket, memtable, applied: applied.clone() });
        if hold {
            queue.holds.push(ticket);
        }
        drop(queue);
        self.inner.queue_changed.notify_all();
        Ok(ticket)
    }

    /// Blocking. Waits until the memtable of a rotation is on disk.
    ///
    /// Errors: the latched failure; `Io(Interrupted)` when the engine is being closed.
    pub fn wait_flushed_blocking(&self, ticket: u64) -> Result<(), EngineError> {
        let mut queue = lock(&self.inner.queue);
        loop {
            if queue.ticket_flushed >= ticket {
                return Ok(());
            }
            self.inner.check()?;
            if self.inner.stop.is_cancelled() {
                return Err(EngineError::io("flush", std::io::ErrorKind::Interrupted.into()));
            }
            queue = self.inner.queue_changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Blocking. Waits until every sealed memtable is on disk.
    pub fn flush_blocking(&self) -> Result<(), EngineError> {
        let ticket = lock(&self.inner.queue).ticket_last;
        self.wait_flushed_blocking(ticket)
    }

    /// The applied state of what is on disk: the log may be purged up to it and no further.
    pub fn persisted(&self) -> AppliedState {
        lock(&self.inner.persisted).clone()
    }

    /// Slows the caller when flush or compaction fall behind, and stops it when they are far
    /// behind. Returns at once when the engine has failed: the next write says so.
    pub async fn wait_for_room(&self) {
        let mut room = self.inner.room.subscribe();
        loop {
            room.borrow_and_update();
            if self.inner.failed.get().is_some() || self.inner.stop.is_cancelled() {
                return;
            }
            let sealed = lock(&self.inner.queue).sealed.len();
            let runs = caught("put", || Ok(self.inner.tree.l0_run_count())).unwrap_or(0);
            if runs >= L0_RUNS_STOP && self.inner.counters.compaction_stopped.load(Ordering::Relaxed) {
                // Nobody will make room before this tree is replaced.
                self.inner.latch(EngineError::damaged("compact", "compaction met damage, and there is no room left"));
                return;
            }
            if sealed < SEALED_STOP && runs < L0_RUNS_STOP {
                let steps = sealed.saturating_sub(SEALED_SLOW - 1).max(runs.saturating_sub(L0_RUNS_SLOW - 1));
                if let Ok(steps @ 1..) = u32::try_from(steps) {
                    tokio::time::sleep(SLOW_STEP * steps).await;
                }
                return;
            }
            if room.changed().await.is_err() {
                return;
            }
        }
    }

    /// The failure that latched the engine.
    pub fn failed(&self) -> Option<Arc<EngineError>> {
        self.inner.failed.get().cloned()
    }

    /// Blocking. Compacts until there is nothing left to do; `major` rewrites everything into the
    /// last level. True when something changed.
    pub fn compact_blocking(&self, major: bool) -> Result<bool, EngineError> {
        if major { background::compact_major(&self.inner) } else { background::compact_all(&self.inner) }
    }

    /// Numbers for the metrics and the admin API. Errors: damage inside lsm-tree.
    pub fn stats(&self) -> Result<EngineStats, EngineError> {
        let inner = &self.inner;
        let levels = caught("stats", || Ok(hidden::pin(&inner.tree)))?.levels();
        let l0_runs = caught("stats", || Ok(inner.tree.l0_run_count()))?;
        let counters = &inner.counters;
        Ok(EngineStats {
            table_count: levels.iter().map(|level| level.tables).sum(),
            table_bytes: levels.iter().map(|level| level.bytes).sum(),
            level_tables: levels.iter().map(|level| level.tables).collect(),
            level_bytes: levels.iter().map(|level| level.bytes).collect(),
            l0_runs,
            sealed_memtables: lock(&inner.queue).sealed.len(),
            memtable_bytes: self.memtable_bytes(),
            pending_compaction_bytes: levels.first().map_or(0, |level| level.bytes),
            flushed_bytes: counters.flushed_bytes.load(Ordering::Relaxed),
            flush_count: counters.flush_count.load(Ordering::Relaxed),
            compacted_bytes: counters.compacted_bytes.load(Ordering::Relaxed),
            compaction_count: counters.compaction_count.load(Ordering::Relaxed),
            snapshots: inner.snapshots.open_count(),
            disk_full: counters.disk_full.load(Ordering::Relaxed) || counters.compaction_full.load(Ordering::Relaxed),
        })
    }

    /// Blocking. Stops the threads without flushing and waits for them. What was not flushed is in
    /// the log.
    pub fn close(self) {
        self.inner.stop.cancel();
        self.inner.wake_all();
        let handles = std::mem::take(&mut *lock(&self.threads.handles));
        for handle in handles {
            if handle.join().is_err() {
                tracing::error!("a thread of the store panicked");
            }
        }
    }

    /// The first damage found, by whatever means. Nothing wrong is ever answered; see `damage`.
    pub fn damage(&self) -> watch::Receiver<Option<TreeDamage>> {
        self.inner.options.damage.watch()
    }

    /// Files in the tree's folder that are not of it; they are left alone.
    pub fn foreign_files(&self) -> &[PathBuf] {
        &self.inner.foreign
    }

    /// Another tree has taken its place.
    pub(crate) fn is_retired(&self) -> bool {
        self.inner.is_retired()
    }

    /// The tree was replaced: its folder is removed once nobody reads it any more.
    pub(crate) fn retire(&self) {
        // Only the first call can set it, and a second one means the same.
        let _ = self.inner.retired.dir.set(self.inner.dir.clone());
        self.inner.stop.cancel();
        self.inner.wake_all();
    }
}

impl std::fmt::Debug for LsmEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LsmEngine({})", self.inner.dir.display())
    }
}
