//! The two threads of an engine: one flushes sealed memtables, one compacts.
//!
//! A memtable is flushed alone, in order, and only after the log behind it is durable here. What
//! failed decides what happens next: no room while tables are being written is waited out (nothing
//! refers to the new files, and the next try writes new ones from memory); every other failure,
//! above all a failed sync and anything after the manifest was touched, latches the engine.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lsm_tree::AbstractTree;
use lsm_tree::compaction::Leveled;

use super::error::SyncFailed;
use super::guard::caught;
use super::latch::{Consequence, Stage, leftovers, was_the_sync};
use super::lsm::{Inner, Sealed, lock};
use super::manifest::ListedTable;
use super::precheck::TABLES;
use super::{EngineError, ErrorClass, hidden, precheck};

/// How often a flush or compaction that found no room is tried again.
const FULL_RETRY: Duration = Duration::from_secs(1);
/// Room that must be free beside the memtable before a flush begins: manifest, filters, index.
const FLUSH_SPARE_BYTES: u64 = 4 * 1024 * 1024;
/// Inodes that must be free: tables, the manifest, `current` beside its successor, and what others take meanwhile.
const SPARE_INODES: u64 = 16;
/// Without automatic compaction this many runs in level 0 are compacted all the same: the manifest
/// counts runs in one byte, and writes stop at 24.
const L0_RUNS_FORCED: usize = 16;
/// Size of a table, bytes: hard links, hashes and transfers work table by table.
const TABLE_BYTES: u64 = 64 * 1024 * 1024;
/// Flushes that collect in level 0 before they are merged.
const L0_RUNS_COMPACT: u8 = 4;

pub(crate) fn spawn(inner: &Arc<Inner>) -> io::Result<Vec<JoinHandle<()>>> {
    // The gate is a future; this drives it without needing the caller's runtime.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let flusher = Arc::clone(inner);
    let compactor = Arc::clone(inner);
    Ok(vec![
        thread::Builder::new()
            .name("lsm-flush".into())
            .spawn(move || latching(&flusher, "flush", || flush_loop(&flusher, &runtime)))?,
        thread::Builder::new()
            .name("lsm-compact".into())
            .spawn(move || latching(&compactor, "compact", || compact_loop(&compactor)))?,
    ])
}

/// A thread that panics (in the gate or the observer: the tree's own panics are caught where they
/// happen) must not leave writers waiting for it.
fn latching(inner: &Inner, operation: &'static str, work: impl FnOnce()) {
    let ended = caught(operation, || {
        work();
        Ok(())
    });
    if let Err(error) = ended {
        inner.latch(error);
    }
}

fn flush_loop(inner: &Arc<Inner>, runtime: &tokio::runtime::Runtime) {
    while let Some(sealed) = next_sealed(inner) {
        if !pass_gate(inner, runtime, &sealed) {
            return;
        }
        let began = tokio::time::Instant::now();
        let result = flush_one(inner, &sealed);
        inner.note_failure("flush", &result);
        match result {
            Ok(()) => {
                inner.options.observer.operation_done("flush", began.elapsed());
                inner.counters.disk_full.store(false, Ordering::Relaxed);
                let mut queue = lock(&inner.queue);
                queue.ticket_flushed = sealed.ticket;
                queue.sealed.pop_front();
                drop(queue);
                *lock(&inner.compaction_wanted) = true;
                inner.wake_all();
                crate::allocator::give_back();
            }
            Err((stage, error)) => match inner.suffer(stage, &error) {
                Consequence::Wait => wait_for_space(inner, "flush", &error),
                _ => return,
            },
        }
    }
}

/// The oldest sealed memtable that no checkpoint holds back; `None` to end the thread.
fn next_sealed(inner: &Inner) -> Option<Sealed> {
    let mut queue = lock(&inner.queue);
    loop {
        if inner.stop.is_cancelled() || inner.failed.get().is_some() {
            return None;
        }
        let held_after = queue.holds.iter().min().copied().unwrap_or(u64::MAX);
        if let Some(first) = queue.sealed.front().filter(|first| first.ticket <= held_after) {
            return Some(Sealed {
                ticket: first.ticket,
                memtable: Arc::clone(&first.memtable),
                applied: first.applied.clone(),
            });
        }
        queue = inner.queue_changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

/// False when the log will never be durable up to here, or the engine is being closed.
fn pass_gate(inner: &Inner, runtime: &tokio::runtime::Runtime, sealed: &Sealed) -> bool {
    let (Some(gate), Some(index)) = (&inner.options.flush_gate, sealed.applied.log_index()) else {
        return true;
    };
    let passed = runtime.block_on(async {
        tokio::select! {
            passed = gate(index) => passed,
            () = inner.stop.cancelled() => Err(String::new()),
        }
    });
    match passed {
        Ok(()) => true,
        Err(_) if inner.stop.is_cancelled() => false,
        Err(why) => {
            // The log has failed; what is in memory stays there, and the tree on disk is sound.
            inner.latch(EngineError::io(
                "flush",
                io::Error::other(format!("the log is not durable up to index {index}: {why}")),
            ));
            false
        }
    }
}

/// What failed, and how far it had come: that decides what is done about it.
type Failure = (Stage, EngineError);

impl Inner {
    fn note_failure<T>(&self, operation: &'static str, result: &Result<T, Failure>) {
        if let Err((_, error)) = result {
            self.options.observer.operation_failed(operation, error);
        }
    }
}

/// The failure of a write of tables, which began when there were these leftovers.
fn tables_failed(inner: &Inner, stage: Stage, before: &BTreeSet<u64>, error: EngineError) -> Failure {
    if error.is_disk_full() && was_the_sync(inner, before) {
        let operation = error.operation();
        let source = io::Error::other(SyncFailed(io::Error::other(error.to_string())));
        return (stage, EngineError::io(operation, source));
    }
    (stage, error)
}

fn flush_one(inner: &Inner, sealed: &Sealed) -> Result<(), Failure> {
    let at = |stage| move |error| (stage, error);
    let (room, inodes) = free_room(inner, "flush").map_err(at(Stage::FlushTables))?;
    let needed = sealed.memtable.size().saturating_add(FLUSH_SPARE_BYTES);
    if room < needed || inodes < SPARE_INODES {
        let why = format!("{room} bytes and {inodes} inodes are free, {needed} and {SPARE_INODES} are needed");
        let source = io::Error::new(io::ErrorKind::StorageFull, why);
        return Err((Stage::FlushTables, EngineError::io("flush", source)));
    }
    let watermark = inner.snapshots.watermark();
    let before = leftovers(inner);
    let writing = inner.writing_tables.read().unwrap_or_else(PoisonError::into_inner);
    let busy = inner.busy("flush", "kv/tables");
    let tables = inner
        .step("flush", "flush.tables")
        .and_then(|()| caught("flush", || hidden::write_tables(&inner.tree, &sealed.memtable, watermark)))
        .and_then(|tables| inner.step("flush", "flush.tables-written").map(|()| tables));
    let tables = match tables {
        Ok(tables) => tables,
        Err(error) => {
            drop(writing);
            return Err(tables_failed(inner, Stage::FlushTables, &before, error));
        }
    };
    drop(busy);
    // From here on nothing may be tried again: a manifest that failed half-way is on disk or not.
    let mut persisted = lock(&inner.persisted);
    let busy = inner.busy("flush", "kv/current");
    inner
        .step("flush", "flush.manifest")
        .and_then(|()| caught("flush", || hidden::register_tables(&inner.tree, &tables, &sealed.memtable, watermark)))
        .and_then(|()| inner.step("flush", "flush.manifest-written"))
        .map_err(at(Stage::Manifest))?;
    drop(busy);
    inner.manifests_by_flush.fetch_add(1, Ordering::Relaxed);
    lock(&inner.tables_seen).extend(hidden::table_ids(&tables));
    *persisted = sealed.applied.clone();
    drop(persisted);
    drop(writing);
    inner.counters.flush_count.fetch_add(1, Ordering::Relaxed);
    inner.counters.flushed_bytes.fetch_add(hidden::table_bytes(&tables), Ordering::Relaxed);
    Ok(())
}

/// Bytes and inodes that this process may still take below the folder.
fn free_room(inner: &Inner, operation: &'static str) -> Result<(u64, u64), EngineError> {
    let stat = rustix::fs::statvfs(&inner.dir).map_err(|e| EngineError::io(operation, e.into()))?;
    // A file system that makes inodes as it needs them counts none.
    let inodes = if stat.f_files == 0 { u64::MAX } else { stat.f_favail };
    Ok((stat.f_bavail.saturating_mul(stat.f_frsize), inodes))
}

/// A compaction's tables may fail for room as late as they like; its manifest may not.
fn check_room_for_manifest(inner: &Inner) -> Result<(), EngineError> {
    let (room, inodes) = free_room(inner, "compact")?;
    if room >= FLUSH_SPARE_BYTES && inodes >= SPARE_INODES {
        return Ok(());
    }
    let why = format!("{room} bytes and {inodes} inodes are free, {FLUSH_SPARE_BYTES} and {SPARE_INODES} are needed");
    Err(EngineError::io("compact", io::Error::new(io::ErrorKind::StorageFull, why)))
}

fn wait_for_space(inner: &Inner, operation: &'static str, error: &EngineError) {
    if !inner.counters.disk_full.swap(true, Ordering::Relaxed) {
        tracing::warn!(%error, operation, "no space on the disk, waiting for it");
    }
    remove_leftovers(inner);
    let queue = lock(&inner.queue);
    if inner.stop.is_cancelled() {
        return;
    }
    drop(inner.queue_changed.wait_timeout(queue, FULL_RETRY));
}

/// Removes tables that a failed write left half-made: on a full disk they are what fills it.
fn remove_leftovers(inner: &Inner) {
    // Only while nobody writes tables; otherwise the next failure or the next start does it.
    let Ok(_alone) = inner.writing_tables.try_write() else {
        return;
    };
    let Ok(entries) = fs::read_dir(inner.dir.join(TABLES)) else {
        return;
    };
    let mut seen = lock(&inner.tables_seen);
    let mut present = HashSet::new();
    for entry in entries.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()) else {
            continue; // not ours
        };
        if seen.contains(&id) {
            present.insert(id);
        } else if let Err(error) = fs::remove_file(entry.path()) {
            tracing::warn!(%error, id, "a half-written table could not be removed");
        }
    }
    *seen = present;
}

fn compact_loop(inner: &Arc<Inner>) {
    loop {
        {
            let mut wanted = lock(&inner.compaction_wanted);
            while !*wanted && !inner.stop.is_cancelled() && inner.failed.get().is_none() {
                wanted = inner.compaction_woken.wait(wanted).unwrap_or_else(PoisonError::into_inner);
            }
            *wanted = false;
        }
        if inner.stop.is_cancelled() || inner.failed.get().is_some() {
            return;
        }
        if !inner.options.compaction {
            match caught("compact", || Ok(inner.tree.l0_run_count())) {
                Ok(runs) if runs < L0_RUNS_FORCED => continue,
                _ => {}
            }
        }
        // A failure that is not for lack of room has latched the engine or stopped compaction.
        let done = compact_all(inner);
        if done.as_ref().is_err_and(EngineError::is_disk_full) && inner.failed.get().is_none() {
            if !inner.counters.compaction_full.swap(true, Ordering::Relaxed) {
                tracing::warn!("no space on the disk for a compaction, waiting for it");
            }
            let wanted = lock(&inner.compaction_wanted);
            if let Ok((mut wanted, _)) = inner.compaction_woken.wait_timeout(wanted, FULL_RETRY) {
                *wanted = true;
            }
        } else {
            inner.counters.compaction_full.store(false, Ordering::Relaxed);
        }
    }
}

/// Compacts step by step until a step changes nothing. True when one did.
pub(crate) fn compact_all(inner: &Inner) -> Result<bool, EngineError> {
    let strategy = Arc::new(Leveled::default().with_l0_threshold(L0_RUNS_COMPACT).with_table_target_size(TABLE_BYTES));
    let _turn = lock(&inner.compacting);
    let mut changed = false;
    while !inner.stop.is_cancelled() {
        let strategy = Arc::clone(&strategy);
        let step = compact_step(inner, |watermark| inner.tree.compact(strategy.clone(), watermark))?;
        if !step {
            break;
        }
        changed = true;
    }
    Ok(changed)
}

/// Rewrites the whole tree into its last level.
pub(crate) fn compact_major(inner: &Inner) -> Result<bool, EngineError> {
    inner.check()?;
    let _turn = lock(&inner.compacting);
    if caught("compact", || Ok(inner.tree.table_count()))? == 0 {
        return Ok(false);
    }
    compact_step(inner, |watermark| inner.tree.major_compact(TABLE_BYTES, watermark))
}

fn compact_step(inner: &Inner, compact: impl FnOnce(u64) -> lsm_tree::Result<()>) -> Result<bool, EngineError> {
    inner.check()?;
    if inner.counters.compaction_stopped.load(Ordering::Relaxed) {
        return Err(EngineError::damaged("compact", "an earlier compaction met damage; the tree is to be replaced"));
    }
    let began = tokio::time::Instant::now();
    let result = compact_step_inner(inner, compact);
    inner.note_failure("compact", &result);
    match result {
        Ok(changed) => {
            if changed {
                inner.options.observer.operation_done("compact", began.elapsed());
                inner.counters.compaction_count.fetch_add(1, Ordering::Relaxed);
                inner.wake_all();
            }
            Ok(changed)
        }
        Err((stage, error)) => {
            match inner.suffer(stage, &error) {
                Consequence::Report => {
                    tracing::error!("LSM tree compaction failed: {error}; none is begun before the tree is replaced");
                    inner.counters.compaction_stopped.store(true, Ordering::Relaxed);
                    inner.wake_all();
                }
                Consequence::Wait => remove_leftovers(inner),
                Consequence::GiveUp | Consequence::Latch => {}
            }
            Err(error)
        }
    }
}

fn compact_step_inner(inner: &Inner, compact: impl FnOnce(u64) -> lsm_tree::Result<()>) -> Result<bool, Failure> {
    let at = |stage| move |error| (stage, error);
    check_room_for_manifest(inner).map_err(at(Stage::CompactionTables))?;
    let left = leftovers(inner);
    let writing = inner.writing_tables.read().unwrap_or_else(PoisonError::into_inner);
    let before = manifests_by_compaction(inner).map_err(at(Stage::CompactionTables))?;
    let watermark = inner.snapshots.watermark();
    let compacted = inner.step("compact", "compact.tables").and_then(|()| caught("compact", || compact(watermark)));
    if let Err(error) = compacted {
        if manifest_was_begun(inner) {
            return Err((Stage::Manifest, error));
        }
        drop(writing);
        return Err(tables_failed(inner, Stage::CompactionTables, &left, locate(inner, error)));
    }
    inner.step("compact", "compact.manifest-written").map_err(at(Stage::Manifest))?;
    let after = caught("compact", || Ok(hidden::pin(&inner.tree))).map_err(at(Stage::Manifest))?.tables();
    let mut seen = lock(&inner.tables_seen);
    // A flush that ended meanwhile added its tables to `seen` itself.
    let written: u64 = after.iter().filter(|table| !seen.contains(&table.id)).map(|table| table.bytes).sum();
    seen.extend(after.iter().map(|table| table.id));
    drop(seen);
    drop(writing);
    inner.counters.compacted_bytes.fetch_add(written, Ordering::Relaxed);
    // `compact` does not say whether it did anything.
    Ok(manifests_by_compaction(inner).map_err(at(Stage::Manifest))? != before)
}

/// A compaction reads tables and writes others, and its error does not say which of the two failed:
/// when a table is not what the manifest says, it was the reading.
fn locate(inner: &Inner, error: EngineError) -> EngineError {
    if !matches!(error.class(), ErrorClass::Damaged | ErrorClass::Disk) {
        return error;
    }
    let Ok(pinned) = caught("compact", || Ok(hidden::pin(&inner.tree))) else { return error };
    let tables: Vec<ListedTable> =
        pinned.tables().iter().map(|table| ListedTable { id: table.id, xxh3: table.xxh3 }).collect();
    match precheck::find_damaged_table(&inner.dir, &tables) {
        Some(EngineError::Damaged { file, what, .. }) => EngineError::Damaged { operation: "compact", file, what },
        _ => error,
    }
}

/// Number of the newest manifest, not counting those that flushes wrote.
fn manifests_by_compaction(inner: &Inner) -> Result<u64, EngineError> {
    let _no_flush = lock(&inner.persisted);
    let id = caught("compact", || Ok(hidden::manifest_id(&inner.tree)))?;
    Ok(id.wrapping_sub(inner.manifests_by_flush.load(Ordering::Relaxed)))
}

/// lsm-tree writes `v{id + 1}` before anything else of a new manifest, so without that file the
/// failure came before the manifest was touched.
fn manifest_was_begun(inner: &Inner) -> bool {
    let _no_flush = lock(&inner.persisted);
    match caught("compact", || Ok(hidden::manifest_id(&inner.tree))) {
        Ok(id) => inner.dir.join(format!("v{}", id + 1)).try_exists().unwrap_or(true),
        Err(_) => true,
    }
}
