//! Makes the tree anew from what this machine has: the newest local checkpoint and the log.
//!
//! ```text
//! lock ─► open the log ─► checkpoint -> kv.rebuild ─► apply up to the committed index ─► old kv to quarantine, new one in
//! ```
//!
//! For a node that does not run (`stemedb-api --rebuild-from-wal`). The entries go through the same code
//! that applies them in a running node. Until the new tree is complete, nothing of the old one is touched;
//! then it goes to quarantine. What the log no longer holds only another replica has.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use openraft::storage::{RaftLogStorage, RaftStateMachine};
use stemedb_raft::disk::RealDisk;
use stemedb_raft::types::LogId;
use stemedb_raft::{OpenError, WalOptions, WalStore};

use super::applier;
use super::identity::{Identity, LockError, lock_folder};
use super::vital::Vital;
use crate::clock;
use crate::state::apply::KeyLimits;
use crate::state::engine::checkpoint::Checkpoint;
use crate::state::engine::lsm::LsmOptions;
use crate::state::engine::{EngineError, folder, replace};
use crate::state::machine::{MachineOptions, StateMachine, newest_checkpoint};

/// The folder in which the new tree is made.
const SCRATCH: &str = "kv.rebuild";
/// Bytes of entries read at once.
const READ_BYTES: u64 = 4 * 1024 * 1024;

/// Where things are.
#[derive(Clone, Debug)]
pub struct Request {
    /// Folder of the log.
    pub wal_dir: PathBuf,
    /// Folder of the tree: `<data folder>/kv`.
    pub kv_dir: PathBuf,
    /// How long to wait for another process to leave the folders, milliseconds.
    pub lock_timeout_ms: u64,
}

/// How far it is. Log indexes; `None` before the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Where the checkpoint ended.
    pub from: Option<u64>,
    /// The last one applied.
    pub applied: Option<u64>,
    /// The last one to apply.
    pub upto: Option<u64>,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// Last index of the checkpoint that it began with.
    pub from: Option<u64>,
    /// Last index that it holds.
    pub applied: Option<u64>,
    /// Entries applied.
    pub entries: u64,
    /// Where the old tree is now; `None` when there was none.
    pub old: Option<PathBuf>,
}

/// Why no tree was made. The old one is where it was.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The paths are not those of a node.
    #[error("{0}")]
    Paths(String),
    /// Somebody uses the folder.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// The log cannot be opened as it is.
    #[error("the log cannot be read: {0}. Start the node: it repairs its log from its peers")]
    Log(#[from] OpenError),
    /// Neither checkpoint nor log has these entries.
    #[error(
        "index {first_missing} is missing: {checkpoint}, and the log begins with index {log_first}. Only another replica \
         has the entries between: `stemedb rebuild {node}`"
    )]
    Missing {
        /// The first missing log index.
        first_missing: u64,
        /// What the checkpoint reaches, or that there is none.
        checkpoint: String,
        /// The first index in the log.
        log_first: u64,
        /// This node's name.
        node: String,
    },
    /// The checkpoint and the log do not belong together.
    #[error("{why}. Make this node anew from another replica: `stemedb rebuild {node}`")]
    NotOfOneHistory {
        /// What does not fit.
        why: String,
        /// This node's name.
        node: String,
    },
    /// An entry could not be read.
    #[error("reading the log: {0}")]
    Read(#[source] io::Error),
    /// An entry could not be applied.
    #[error("applying the log: {0}")]
    Apply(#[source] io::Error),
    /// The new tree could not be written.
    #[error(transparent)]
    State(#[from] EngineError),
}

/// Makes the tree anew; takes the folder's lock. `progress` is called now and then.
///
/// Errors: see [`RebuildError`]; in every case the old tree is where it was, and a new call begins anew.
pub async fn rebuild_from_wal(request: &Request, mut progress: impl FnMut(Progress)) -> Result<Rebuilt, RebuildError> {
    let data_dir = match request.kv_dir.parent() {
        Some(parent) if request.kv_dir.file_name().is_some_and(|name| name == "kv") => parent.to_owned(),
        _ => {
            let shown = request.kv_dir.display();
            return Err(RebuildError::Paths(format!(
                "{shown} is no <data folder>/kv, which is where a node's tree is"
            )));
        }
    };
    if !request.wal_dir.is_dir() {
        return Err(RebuildError::Paths(format!("{} is no folder of a log", request.wal_dir.display())));
    }
    let _lock = lock_folder(&data_dir, request.lock_timeout_ms).await?;
    let node = Identity::load(&data_dir).ok().flatten().map_or_else(|| "NODE".to_owned(), |identity| identity.name);
    replace::finish_interrupted(&data_dir, &None)?;
    let (log, report) = WalStore::open(RealDisk::new(), WalOptions::new(&request.wal_dir))?;
    tracing::info!(?report, "write-ahead log opened");
    let result = with_log(request, &data_dir, &node, log.clone(), &mut progress).await;
    if let Err(error) = log.handle().close() {
        tracing::warn!(%error, "the log was not closed well");
    }
    let rebuilt = result?;
    let (applied, entries) = (rebuilt.applied.unwrap_or_default(), rebuilt.entries);
    tracing::info!(applied, entries, "rebuild complete");
    Ok(rebuilt)
}

async fn with_log(
    request: &Request,
    data_dir: &Path,
    node: &str,
    mut log: WalStore,
    progress: &mut impl FnMut(Progress),
) -> Result<Rebuilt, RebuildError> {
    let committed = log.read_committed().await.map_err(RebuildError::Read)?;
    let checkpoint = sound_checkpoint(data_dir);
    let from = checkpoint.as_ref().and_then(|checkpoint| checkpoint.applied().log_id);
    check_reach(&log, from, node)?;

    let scratch = data_dir.join(SCRATCH);
    let failed = |e| EngineError::io("install", e);
    folder::remove(&scratch).map_err(failed)?;
    if let Some(checkpoint) = &checkpoint {
        replace::make_tree(&scratch, checkpoint)?;
    }
    let (restore, _gone) = applier::restorer(KeyLimits::default(), Vital::default());
    let lsm = LsmOptions { lock_timeout_ms: request.lock_timeout_ms, ..LsmOptions::default() };
    let mut machine = StateMachine::open(MachineOptions { data_dir: scratch.clone(), lsm }, restore)?;

    let end = committed.map_or(0, |id| id.index + 1);
    let begin = from.map_or(0, |id| id.index + 1);
    let mut next = begin;
    let reader = log.reader();
    let shown = |next: u64| Progress {
        from: from.map(|id| id.index),
        applied: next.checked_sub(1),
        upto: end.max(begin).checked_sub(1),
    };
    while next < end {
        progress(shown(next));
        let entries = reader.read(next, end, READ_BYTES).map_err(RebuildError::Read)?;
        let Some(last) = entries.last().map(|entry| entry.log_id.index) else {
            let why = format!("the log ends before index {next}, which it says is committed");
            return Err(RebuildError::Read(io::Error::new(io::ErrorKind::UnexpectedEof, why)));
        };
        let items = entries.into_iter().map(|entry| Ok((entry, None)));
        machine.apply(futures_util::stream::iter(items)).await.map_err(RebuildError::Apply)?;
        next = last + 1;
    }
    machine.seal_blocking()?;
    let applied = machine.applied_state().await.map_err(RebuildError::Apply)?.0.map(|id| id.index);
    progress(shown(next));
    let handle = machine.handle();
    let built = handle.engine().dir().to_owned();
    handle.close_blocking();
    drop((machine, handle));
    let old = replace::adopt_built(data_dir, &built, clock::unix_ms(), request.lock_timeout_ms, &None)?;
    if let Err(error) = fs::remove_dir_all(&scratch) {
        tracing::warn!(%error, "{} could not be removed", scratch.display());
    }
    Ok(Rebuilt { from: from.map(|id| id.index), applied, entries: next.saturating_sub(begin), old })
}

/// The newest checkpoint, if every file of it is what its hash says.
fn sound_checkpoint(data_dir: &Path) -> Option<Checkpoint> {
    let checkpoint = newest_checkpoint(data_dir)?;
    match checkpoint.verify_blocking() {
        Ok(()) => Some(checkpoint),
        Err(error) => {
            tracing::error!(%error, "the newest checkpoint is damaged, going on without it");
            None
        }
    }
}

fn check_reach(log: &WalStore, from: Option<LogId>, node: &str) -> Result<(), RebuildError> {
    let (handle, node) = (log.handle(), node.to_owned());
    let purged = handle.purged();
    if purged > from {
        return Err(RebuildError::Missing {
            first_missing: from.map_or(0, |id| id.index + 1),
            checkpoint: match from {
                Some(id) => format!("the newest sound checkpoint ends with index {}", id.index),
                None => "there is no sound checkpoint".to_owned(),
            },
            log_first: purged.map_or(0, |id| id.index + 1),
            node,
        });
    }
    let at_checkpoint = from.and_then(|id| log.reader().log_id_at(id.index));
    let extent = replace::LogExtent { purged, last: handle.last_log_id(), at_checkpoint };
    replace::allowed(from, extent).map_err(|why| RebuildError::NotOfOneHistory { why: why.to_string(), node })
}
