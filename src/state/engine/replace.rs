//! Replaces the tree alone, where log and vote are sound: the damaged one goes to quarantine, and a new
//! one is made of a verified checkpoint.
//!
//! ```text
//!   step                       a crash after it leaves                the next start
//!   build kv.new/g{n}, active  kv, half of kv.new                     discards kv.new
//!   kv.new/replacement         kv, a whole kv.new     <- it counts    goes on with the next step
//!   kv -> quarantine/…-kv      no kv, a whole kv.new                  goes on
//!   kv.new -> kv               kv with `replacement`                  goes on
//!   remove kv/replacement      kv                                     -
//! ```
//!
//! `replacement` is written last into the new folder and moves with it, so that one name says where
//! things stand. Only with the Raft core stopped, and only when [`allowed`] says so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use stemedb_raft::disk::folder_lock::KernelLock;
use stemedb_raft::types::LogId;
use xxhash_rust::xxh3::xxh3_128;

use super::checkpoint::Checkpoint;
use super::foreign::is_number;
use super::latch::{FailPoint, step};
use super::precheck::{self, Found};
use super::{EngineError, folder, quarantine};

/// The new folder before it counts.
const NEW: &str = "kv.new";
/// In a folder that is whole and on its way to be `kv`.
const MARK: &str = "replacement";
const MARK_TEXT: &[u8] = b"This tree is whole and takes the place of the one in kv.\n";
/// Names the tree that counts; see `machine::store`.
const POINTER: &str = "active";

/// The steps at which a fail point is asked, in order.
pub const STEPS: [&str; 7] = [
    "replace.begin",
    "replace.built",
    "replace.pointed",
    "replace.marked",
    "replace.quarantined",
    "replace.moved",
    "replace.done",
];

/// What of the log bears on a replacement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogExtent {
    /// The last purged entry.
    pub purged: Option<LogId>,
    /// The last entry, or the purged one where there is none.
    pub last: Option<LogId>,
    /// What the log holds at the index of the checkpoint's last entry.
    pub at_checkpoint: Option<LogId>,
}

/// Why the tree alone may not be replaced by this checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAllowed {
    /// A checkpoint that reaches further would do.
    #[error("{0}")]
    Behind(String),
    /// Checkpoint and log do not belong together: the whole node has to be rebuilt.
    #[error("{0}")]
    OtherHistory(String),
}

/// Whether the tree alone may be replaced by one that ends with `applied`. Pure.
pub fn allowed(applied: Option<LogId>, log: LogExtent) -> Result<(), NotAllowed> {
    if log.purged > applied {
        return Err(NotAllowed::Behind(format!(
            "the log begins after {:?}, and the checkpoint ends with {applied:?}: entries between them are missing",
            log.purged
        )));
    }
    match (applied, log.at_checkpoint) {
        (None, _) => Ok(()),
        (Some(applied), Some(found)) if applied == found => Ok(()),
        // Purged exactly up to there.
        (applied, None) if log.purged == applied => Ok(()),
        (Some(applied), None) if log.last.is_none_or(|last| last.index < applied.index) => Ok(()),
        (Some(applied), found) => Err(NotAllowed::OtherHistory(format!(
            "the checkpoint ends with {applied}, and the log holds {found:?} there: one of them is another history"
        ))),
    }
}

/// Blocking. Replaces `<data>/kv` by a tree made of `checkpoint`, which is verified first. Where the
/// old one is now. The old tree must be closed; `lock_timeout_ms`: how long to wait for that. `None`: the caller has
/// closed it itself, and late readers may still hold it open: they find nothing under its old path.
///
/// Errors: `Damaged` names the checkpoint's file, and nothing was changed; `Busy` when the old tree is
/// still in use; else the disk's, and the next call, or the next start, goes on or begins anew.
pub fn replace(
    data_dir: &Path,
    checkpoint: &Checkpoint,
    now_unix_ms: u64,
    lock_timeout_ms: Option<u64>,
    fail_point: &Option<FailPoint>,
) -> Result<Option<PathBuf>, EngineError> {
    checkpoint.verify_blocking()?;
    let at = |name| step(fail_point, name).map_err(|e| EngineError::io("install", e));
    let failed = |e| EngineError::io("install", e);
    // Nobody opens or still uses the old tree while it moves.
    let _locks = match lock_timeout_ms {
        Some(wait_ms) => lock_trees(&data_dir.join("kv"), wait_ms)?,
        None => Vec::new(),
    };
    finish_locked(data_dir, now_unix_ms, fail_point)?;
    at("replace.begin")?;
    let new = data_dir.join(NEW);
    // No path means two trees: late readers of the old one open its tables by name.
    let number = highest_tree(&data_dir.join("kv")).map_err(failed)? + 1;
    let tree = new.join(format!("g{number}"));
    checkpoint.link_into(&tree, false)?;
    at("replace.built")?;
    point_to(&new, number).map_err(failed)?;
    complete(data_dir, now_unix_ms, fail_point)
}

/// Blocking. Takes over a tree that was built in `<data>/<name>/g1`: the same steps with another source.
/// The tree must be closed. Where the old one is now.
pub fn adopt_built(
    data_dir: &Path,
    built: &Path,
    now_unix_ms: u64,
    lock_timeout_ms: u64,
    fail_point: &Option<FailPoint>,
) -> Result<Option<PathBuf>, EngineError> {
    let at = |name| step(fail_point, name).map_err(|e| EngineError::io("install", e));
    let failed = |e| EngineError::io("install", e);
    let _locks = lock_trees(&data_dir.join("kv"), lock_timeout_ms)?;
    finish_locked(data_dir, now_unix_ms, fail_point)?;
    at("replace.begin")?;
    let new = data_dir.join(NEW);
    let number = highest_tree(&data_dir.join("kv")).map_err(failed)? + 1;
    folder::create_synced(&new).map_err(failed)?;
    let tree = new.join(format!("g{number}"));
    fs::rename(built, &tree).map_err(failed)?;
    folder::sync(&new).map_err(failed)?;
    if precheck::check(&tree)? == Found::Nothing {
        return Err(EngineError::damaged_file("install", &tree, "holds no tree"));
    }
    at("replace.built")?;
    point_to(&new, number).map_err(failed)?;
    complete(data_dir, now_unix_ms, fail_point)
}

/// Blocking. Makes `<data_dir>/kv` with a tree of this checkpoint, which was verified. The folder must
/// not hold one.
pub fn make_tree(data_dir: &Path, checkpoint: &Checkpoint) -> Result<(), EngineError> {
    let kv = data_dir.join("kv");
    folder::create_synced(&kv).map_err(|e| EngineError::io("install", e))?;
    checkpoint.link_into(&kv.join("g1"), false)?;
    point_to(&kv, 1).map_err(|e| EngineError::io("install", e))
}

fn complete(data_dir: &Path, now_unix_ms: u64, fail_point: &Option<FailPoint>) -> Result<Option<PathBuf>, EngineError> {
    let failed = |e| EngineError::io("install", e);
    step(fail_point, "replace.pointed").map_err(failed)?;
    folder::replace_synced(&data_dir.join(NEW).join(MARK), &mark()).map_err(failed)?;
    folder::sync(data_dir).map_err(failed)?;
    step(fail_point, "replace.marked").map_err(failed)?;
    swap(data_dir, now_unix_ms, fail_point)
}

/// Blocking. Finishes, or discards, a replacement that a crash interrupted. Called before the tree is
/// opened, with the data folder locked. True when a new tree has taken its place.
pub fn finish_interrupted(data_dir: &Path, fail_point: &Option<FailPoint>) -> Result<bool, EngineError> {
    if !data_dir.join(NEW).exists() && !data_dir.join("kv").join(MARK).exists() {
        return Ok(false);
    }
    let _locks = lock_trees(&data_dir.join("kv"), 0)?;
    finish_locked(data_dir, crate::clock::unix_ms(), fail_point)
}

fn finish_locked(data_dir: &Path, now_unix_ms: u64, fail_point: &Option<FailPoint>) -> Result<bool, EngineError> {
    let failed = |e| EngineError::io("install", e);
    let new = data_dir.join(NEW);
    if is_marked(&new) || is_marked(&data_dir.join("kv")) {
        tracing::warn!("a replacement of the tree was interrupted; going on with it");
        return swap(data_dir, now_unix_ms, fail_point).map(|_| true);
    }
    if new.exists() {
        tracing::warn!(folder = %new.display(), "a replacement of the tree was interrupted before it was whole; beginning anew");
        fs::remove_dir_all(&new).map_err(failed)?;
        folder::sync(data_dir).map_err(failed)?;
    }
    Ok(false)
}

/// The steps from the mark on. Each looks at what is there, so that it can be called again.
fn swap(data_dir: &Path, now_unix_ms: u64, fail_point: &Option<FailPoint>) -> Result<Option<PathBuf>, EngineError> {
    let failed = |e| EngineError::io("install", e);
    let (kv, new) = (data_dir.join("kv"), data_dir.join(NEW));
    let mut old = None;
    if is_marked(&new) {
        if kv.exists() {
            old = Some(quarantine::put(data_dir, &kv, "kv", now_unix_ms).map_err(failed)?);
        }
        step(fail_point, "replace.quarantined").map_err(failed)?;
        fs::rename(&new, &kv).map_err(failed)?;
        folder::sync(data_dir).map_err(failed)?;
    }
    step(fail_point, "replace.moved").map_err(failed)?;
    fs::remove_file(kv.join(MARK)).map_err(failed)?;
    folder::sync(&kv).map_err(failed)?;
    step(fail_point, "replace.done").map_err(failed)?;
    tracing::info!("the tree was replaced");
    Ok(old)
}

fn mark() -> Vec<u8> {
    let mut bytes = MARK_TEXT.to_vec();
    bytes.extend_from_slice(format!("{:032x}\n", xxh3_128(MARK_TEXT)).as_bytes());
    bytes
}

/// An empty or torn file means nothing.
fn is_marked(kv: &Path) -> bool {
    fs::read(kv.join(MARK)).is_ok_and(|found| found == mark())
}

/// Blocking. Makes `number` the tree that counts in a `kv` folder.
fn point_to(kv: &Path, number: u64) -> io::Result<()> {
    folder::replace_synced(&kv.join(POINTER), &pointer(number))?;
    folder::sync(kv)
}

/// The file `active`: number, and its hash.
pub(crate) fn pointer(number: u64) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend_from_slice(&xxh3_128(&bytes).to_le_bytes());
    bytes
}

fn tree_numbers(kv: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(kv) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<io::Result<_>>()?;
    Ok(names.iter().filter_map(|name| name.strip_prefix('g').filter(|n| is_number(n))?.parse().ok()).collect())
}

fn highest_tree(kv: &Path) -> io::Result<u64> {
    Ok(tree_numbers(kv)?.into_iter().max().unwrap_or(0))
}

fn lock_trees(kv: &Path, wait_ms: u64) -> Result<Vec<KernelLock>, EngineError> {
    let numbers = tree_numbers(kv).map_err(|e| EngineError::read("install", kv, e))?;
    numbers.into_iter().map(|number| super::lock::take(&kv.join(format!("g{number}")), wait_ms)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use stemedb_raft::types::TypeConfig;

    fn id(term: u64, index: u64) -> Option<LogId> {
        Some(openraft::testing::log_id::<TypeConfig>(term, 1, index))
    }

    #[test]
    fn the_tree_alone_is_replaced_only_where_checkpoint_and_log_meet() {
        let log = |purged, last, at_checkpoint| LogExtent { purged, last, at_checkpoint };
        for (applied, extent, may) in [
            (id(2, 50), log(id(1, 10), id(2, 90), id(2, 50)), true),
            (id(2, 50), log(id(2, 50), id(2, 90), None), true),
            (id(2, 50), log(id(1, 10), id(1, 40), None), true),
            (None, log(None, id(2, 90), None), true),
            (None, log(None, None, None), true),
            (id(2, 50), log(None, None, None), true),
            // Entries between are missing.
            (id(2, 50), log(id(2, 60), id(2, 90), None), false),
            (None, log(id(1, 1), id(2, 90), None), false),
            // Another history, or a hole.
            (id(2, 50), log(id(1, 10), id(3, 90), id(3, 50)), false),
            (id(2, 50), log(id(1, 10), id(2, 90), None), false),
        ] {
            assert_eq!(may, allowed(applied, extent).is_ok(), "{applied:?} {extent:?}");
        }
    }

    #[test]
    fn an_empty_or_torn_mark_means_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [Vec::new(), mark()[..20].to_vec()] {
            fs::write(dir.path().join(MARK), bytes).unwrap();
            assert!(!is_marked(dir.path()));
        }
        fs::write(dir.path().join(MARK), mark()).unwrap();
        assert!(is_marked(dir.path()));
    }
}
