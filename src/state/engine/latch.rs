//! What a failure of flush, compaction, checkpoint or apply does to the engine.
//!
//! | what failed | full | damage | else |
//! |---|---|---|---|
//! | tables of a flush | wait, then write new ones | latch | latch |
//! | tables of a compaction | wait, then write new ones | report, compact no more | latch |
//! | manifest of either | latch | latch | latch |
//! | files of a checkpoint | give it up | report | latch |
//! | pointer, install | latch | report | latch |
//!
//! "Full" is a write that found no room; a sync that says so is a failed disk (`error::synced`). A
//! latched engine writes and syncs nothing any more.

use std::collections::BTreeSet;
use std::sync::Arc;

use stemedb_raft::io_times::{IoGuard, Waits};

use super::damage::TreeDamage;
use super::lsm::{Inner, lock};
use super::precheck::TABLES;
use super::{EngineError, ErrorClass, receive};

/// What was being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Tables of a flush, to which nothing refers yet.
    FlushTables,
    /// Tables of a compaction, to which nothing refers yet.
    CompactionTables,
    /// `v{id}` and `current`: half of it may be on the disk.
    Manifest,
    /// A folder that is no checkpoint before its manifest is there.
    Checkpoint,
    /// A received tree, and the file that makes it count.
    Install,
}

/// What to do then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// Wait for room and begin anew, with new files.
    Wait,
    /// Give this one up; the tree goes on.
    GiveUp,
    /// Tell whoever repairs; the tree goes on as well as it can.
    Report,
    /// For good.
    Latch,
}

/// The table above.
pub fn consequence(stage: Stage, class: ErrorClass) -> Consequence {
    match (stage, class) {
        (Stage::FlushTables | Stage::CompactionTables, ErrorClass::Full) => Consequence::Wait,
        (Stage::Checkpoint, ErrorClass::Full) => Consequence::GiveUp,
        (Stage::CompactionTables | Stage::Checkpoint | Stage::Install, ErrorClass::Damaged) => Consequence::Report,
        (Stage::FlushTables | Stage::Manifest, ErrorClass::Damaged)
        | (Stage::Manifest | Stage::Install, ErrorClass::Full)
        | (_, ErrorClass::Busy | ErrorClass::Newer | ErrorClass::NotPermitted | ErrorClass::Disk) => Consequence::Latch,
    }
}

impl Inner {
    /// Remembers the first failure for good.
    pub(crate) fn latch(&self, error: EngineError) -> Arc<EngineError> {
        let error = Arc::new(error);
        if self.failed.set(Arc::clone(&error)).is_ok() {
            let dir = self.dir.display();
            match error.operation() {
                "compact" => tracing::error!(%dir, "LSM tree compaction failed: {error}; the store is latched"),
                "put" | "flush" => tracing::error!(%dir, "Failed to write to KV store: {error}; the store is latched"),
                _ => tracing::error!(%dir, "{error}; the store is latched"),
            }
            self.options.latches.send_modify(|n| *n = n.wrapping_add(1));
        }
        self.wake_all();
        Arc::clone(self.failed.get().unwrap_or(&error))
    }

    /// Tells of damage. Nothing is told of a tree that was replaced.
    pub(crate) fn report(&self, error: &EngineError) {
        if self.is_retired() {
            return;
        }
        if let Some(damage) = TreeDamage::of(error, &self.dir) {
            self.options.observer.damage_found(&damage);
            self.options.damage.report(damage);
        }
    }

    /// Does what the table says, short of waiting.
    pub(crate) fn suffer(&self, stage: Stage, error: &EngineError) -> Consequence {
        let consequence = consequence(stage, error.class());
        match consequence {
            Consequence::Wait | Consequence::GiveUp => {}
            Consequence::Report => self.report(error),
            Consequence::Latch => {
                self.report(error);
                self.latch(error.repeat());
            }
        }
        consequence
    }

    /// Notes a call that writes or syncs, until the answer is dropped. No client waits for it: it may take long on a
    /// healthy disk, and is noticed when it does not return for longer than anything may.
    pub(crate) fn busy(&self, operation: &'static str, file: &str) -> IoGuard<'_> {
        self.options.io_times.enter(operation, file, Waits::Nobody)
    }

    /// A named step, at which tests let the disk fail, or hang.
    pub(crate) fn step(&self, operation: &'static str, name: &'static str) -> Result<(), EngineError> {
        step(&self.options.fail_point, name).map_err(|source| EngineError::io(operation, source))
    }
}

/// Called with the name of each step before it is taken; its error is taken for the step's own.
pub type FailPoint = Arc<dyn Fn(&'static str) -> std::io::Result<()> + Send + Sync>;

/// Every named step. Server processes of tests are killed at each (`stemedb_raft::fail_point`).
pub const POINTS: &[&str] = &[
    "flush.tables",
    "flush.tables-written",
    "flush.manifest",
    "flush.manifest-written",
    "compact.tables",
    "compact.manifest-written",
    "checkpoint.begin",
    "checkpoint.linked",
    "checkpoint.manifest",
    "checkpoint.manifest-written",
    "replace.begin",
    "replace.built",
    "replace.pointed",
    "replace.marked",
    "replace.quarantined",
    "replace.moved",
    "replace.done",
];

pub(crate) fn step(fail_point: &Option<FailPoint>, name: &'static str) -> std::io::Result<()> {
    debug_assert!(POINTS.contains(&name) || receive::STEPS.contains(&name), "{name} is in no list");
    stemedb_raft::fail_point::pass(name);
    fail_point.as_ref().map_or(Ok(()), |fails| fails(name))
}

/// Ids of table files to which nothing refers: being written, or left by a write that failed.
pub(crate) fn leftovers(inner: &Inner) -> BTreeSet<u64> {
    let present = std::fs::read_dir(inner.dir.join(TABLES)).into_iter().flatten().flatten();
    let ids = present.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
    let seen = lock(&inner.tables_seen);
    ids.filter(|id| !seen.contains(id)).collect()
}

/// After a write of tables that found no room: true when it was the sync that did. Then every write
/// has gone well, so that the newest file is whole. `before`: the leftovers when it began.
///
/// While somebody else writes tables nobody can tell whose is which; a new try is safe all the same,
/// because it writes new files.
pub(crate) fn was_the_sync(inner: &Inner, before: &BTreeSet<u64>) -> bool {
    let Ok(_alone) = inner.writing_tables.try_write() else { return false };
    let newest = leftovers(inner).difference(before).max().copied();
    newest.is_some_and(|id| sfa::Reader::new(inner.dir.join(TABLES).join(id.to_string())).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_and_class_has_its_consequence() {
        use Consequence::*;
        for (stage, full, damaged) in [
            (Stage::FlushTables, Wait, Latch),
            (Stage::CompactionTables, Wait, Report),
            (Stage::Manifest, Latch, Latch),
            (Stage::Checkpoint, GiveUp, Report),
            (Stage::Install, Latch, Report),
        ] {
            assert_eq!(consequence(stage, ErrorClass::Full), full, "{stage:?}");
            assert_eq!(consequence(stage, ErrorClass::Damaged), damaged, "{stage:?}");
            assert_eq!(consequence(stage, ErrorClass::Disk), Latch, "{stage:?}");
            assert_eq!(consequence(stage, ErrorClass::NotPermitted), Latch, "{stage:?}");
        }
    }
}
