//! `<data>/checkpoint`: the newest checkpoint, which Raft calls the current snapshot.
//!
//! Folders are named `{number}-{log index}`; the highest number with a valid manifest counts. An
//! older one stays only while somebody still reads it, and a folder without a manifest was never
//! finished. Whatever has another name is somebody else's and left alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::state::engine::checkpoint::{Checkpoint, FlushHold, MANIFEST};
use crate::state::engine::lsm::lock;
use crate::state::engine::{AppliedState, EngineError, folder, foreign};

/// Digits of the number in a folder's name, at least.
const NUMBER_DIGITS: usize = 8;

pub(super) struct Shelf {
    dir: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    newest: Option<Checkpoint>,
    /// The one that was the newest when it was put away for its damage, until there is another one.
    lost: Option<Checkpoint>,
    number_next: u64,
}

/// Blocking, changes nothing. The newest checkpoint whose manifest reads well and whose files are
/// there. Their contents are not compared; see [`Checkpoint::verify_blocking`].
pub fn newest_checkpoint(data_dir: &Path) -> Option<Checkpoint> {
    let entries = fs::read_dir(data_dir.join("checkpoint")).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> =
        entries.filter_map(|entry| Some((number_of(&entry.file_name().to_string_lossy())?, entry.path()))).collect();
    found.sort();
    found.into_iter().rev().find_map(|(_, path)| Checkpoint::load(&path).ok())
}

impl Shelf {
    /// Blocking. Removes what was never finished and what is superseded.
    pub(super) fn open(data_dir: &Path) -> Result<Shelf, EngineError> {
        let dir = data_dir.join("checkpoint");
        let failed = |e| EngineError::io("open", e);
        folder::create_synced(&dir).map_err(failed)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let is_dir = entry.file_type().map_err(failed)?.is_dir();
            if let Some(number) = number_of(&entry.file_name().to_string_lossy()).filter(|_| is_dir) {
                found.push((number, entry.path()));
            }
        }
        found.sort();
        let number_next = found.last().map_or(1, |(number, _)| number + 1);
        let mut newest: Option<Checkpoint> = None;
        for (_, path) in found.into_iter().rev() {
            if newest.is_some() || !path.join(MANIFEST).exists() {
                foreign::remove_tree(&path).map_err(failed)?;
                continue;
            }
            match Checkpoint::load(&path) {
                Ok(checkpoint) => newest = Some(checkpoint),
                // Left for the operator; the next checkpoint is made from the tree.
                Err(error) => {
                    tracing::error!(%error, dir = %path.display(), "a checkpoint is damaged");
                }
            }
        }
        Ok(Shelf { dir, inner: Mutex::new(Inner { newest, lost: None, number_next }) })
    }

    /// Blocking. What is in the folder beside the newest checkpoint, and what is in that and not of it.
    pub(super) fn foreign_files(&self) -> Vec<PathBuf> {
        let newest = self.newest();
        let is_newest = |name: &str| newest.as_ref().is_some_and(|newest| newest.dir().ends_with(name));
        let mut found = foreign::list(&self.dir, is_newest).unwrap_or_default();
        if let Some(newest) = &newest {
            let is_its =
                |name: &str| name == MANIFEST || name == "tables" || newest.files().iter().any(|f| f.name == name);
            found.extend(foreign::list(newest.dir(), is_its).unwrap_or_default());
            let is_table = |name: &str| newest.files().iter().any(|f| f.name == format!("tables/{name}"));
            found.extend(foreign::list(&newest.dir().join("tables"), is_table).unwrap_or_default());
        }
        found
    }

    pub(super) fn newest(&self) -> Option<Checkpoint> {
        lock(&self.inner).newest.clone()
    }

    /// Blocking. The newest checkpoint if its manifest still reads as it did and its files are
    /// there; `None` makes Raft ask for a new one.
    pub(super) fn newest_checked(&self) -> Option<Checkpoint> {
        let newest = self.newest()?;
        match Checkpoint::load(newest.dir()) {
            Ok(read) if read.applied() == newest.applied() && read.files() == newest.files() => Some(newest),
            Ok(_) => {
                tracing::error!(dir = %newest.dir().display(), "a checkpoint was changed on disk");
                None
            }
            Err(error) => {
                tracing::error!(%error, dir = %newest.dir().display(), "a checkpoint is damaged");
                None
            }
        }
    }

    /// Blocking. Makes a checkpoint of exactly `applied`, whose memtable `hold` has sealed.
    ///
    /// With no room on the disk the last checkpoint is answered again: Raft then purges nothing
    /// and asks later, instead of stopping. The same when a received checkpoint has replaced the
    /// tree meanwhile: that one reaches further.
    pub(super) fn build(&self, hold: FlushHold, applied: &AppliedState) -> Result<Checkpoint, EngineError> {
        let dir = self.next_dir(applied);
        let engine = hold.engine().clone();
        let built = engine
            .wait_flushed_blocking(hold.ticket)
            .and_then(|()| engine.checkpoint_observed(&dir, move || drop(hold)));
        match built {
            Ok(checkpoint) if checkpoint.applied() == applied => Ok(self.put(checkpoint)),
            Ok(checkpoint) => Err(EngineError::damaged(
                "checkpoint",
                format!("it ends with {:?}, not {:?}", checkpoint.applied().log_id, applied.log_id),
            )),
            Err(error) => {
                if let Err(left) = foreign::remove_tree(&dir) {
                    tracing::warn!(error = %left, "an unfinished checkpoint stays until the next start");
                }
                match self.newest().filter(|_| error.is_disk_full() || engine.is_retired()) {
                    Some(last) => {
                        tracing::warn!(%error, "no checkpoint could be made, the last one stays");
                        Ok(last)
                    }
                    None => Err(error),
                }
            }
        }
    }

    /// Blocking. Takes over a complete checkpoint: its own (again), one in `kv.incoming` on the
    /// same disk by renaming it, any other by linking or copying its files.
    pub(super) fn adopt(&self, checkpoint: Checkpoint) -> Result<Checkpoint, EngineError> {
        if let Some(newest) = self.newest().filter(|newest| newest.dir() == checkpoint.dir()) {
            return Ok(newest);
        }
        let dir = self.next_dir(checkpoint.applied());
        let incoming = self.dir.with_file_name("kv.incoming");
        let adopted = if checkpoint.dir() == incoming {
            checkpoint.moved_to(&dir)?
        } else {
            folder::create_synced(&dir).map_err(|e| EngineError::io("install", e))?;
            checkpoint.link_into(&dir, true)?;
            Checkpoint::load(&dir)?
        };
        Ok(self.put(adopted))
    }

    /// Nobody gets this one any more. False when another one has taken its place already.
    pub(super) fn condemn(&self, dir: &Path) -> bool {
        let mut inner = lock(&self.inner);
        let is_newest = inner.newest.as_ref().is_some_and(|newest| newest.dir() == dir);
        if is_newest {
            inner.lost = inner.newest.take();
        }
        is_newest
    }

    /// What Raft takes for its snapshot and is of no use any more: the one that was put away, or one that does not read
    /// as it did. `None`: there has been none since the shelf was opened.
    pub(super) fn lost(&self) -> Option<Checkpoint> {
        let inner = lock(&self.inner);
        inner.lost.clone().or_else(|| inner.newest.clone())
    }

    /// Whether the checkpoint in `dir` was put away.
    pub(super) fn is_lost(&self, dir: &Path) -> bool {
        lock(&self.inner).lost.as_ref().is_some_and(|lost| lost.dir() == dir)
    }

    fn next_dir(&self, applied: &AppliedState) -> PathBuf {
        let mut inner = lock(&self.inner);
        let number = inner.number_next;
        inner.number_next += 1;
        self.dir.join(format!("{number:08}-{}", applied.log_index().unwrap_or(0)))
    }

    fn put(&self, checkpoint: Checkpoint) -> Checkpoint {
        let mut inner = lock(&self.inner);
        // Two builds may end in either order; the one that reaches further stays.
        if let Some(newer) = &inner.newest
            && newer.applied().log_id > checkpoint.applied().log_id
        {
            checkpoint.supersede();
            return checkpoint;
        }
        inner.lost = None;
        if let Some(old) = inner.newest.replace(checkpoint.clone()) {
            old.supersede();
        }
        checkpoint
    }
}

fn number_of(name: &str) -> Option<u64> {
    let (number, index) = name.split_once('-')?;
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (number.len() >= NUMBER_DIGITS && is_digits(number) && is_digits(index)).then(|| number.parse().ok())?
}
