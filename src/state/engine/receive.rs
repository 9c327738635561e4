//! Takes in a checkpoint that another node sends, chunk by chunk.
//!
//! The sender's manifest comes first and says what is allowed: only listed files, only inside their
//! lengths. Nothing counts before [`CheckpointReceiver::finish`] has compared every hash and written
//! the manifest last. A receive that is broken off leaves a folder that the next one clears.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::checkpoint::{self, Checkpoint, MANIFEST};
use super::error::synced;
use super::latch::{FailPoint, step};
use super::precheck::TABLES;
use super::{EngineError, ErrorClass, folder};

/// A checkpoint being received into `<data>/kv.incoming`.
pub struct CheckpointReceiver {
    dir: PathBuf,
    manifest: Vec<u8>,
    announced: Checkpoint,
    open: HashMap<String, File>,
    bytes_received: u64,
    fail_point: Option<FailPoint>,
}

/// The steps at which a fail point is asked, in order.
pub const STEPS: [&str; 4] = ["receive.begin", "receive.write", "receive.sync", "receive.manifest"];

/// Whether an error of a receiver says that the disk has failed: a write or a sync went wrong. No room, damage of what
/// came, and a chunk that belongs nowhere say nothing of the kind.
pub fn is_failed_disk(error: &EngineError) -> bool {
    let refused = matches!(error, EngineError::Io { source, .. } if source.kind() == io::ErrorKind::InvalidInput);
    !refused && error.class() == ErrorClass::Disk
}

impl CheckpointReceiver {
    /// Blocking. Checks the manifest and clears the folder.
    ///
    /// Errors: `Damaged` for a manifest that is none; `Io`.
    pub fn begin(data_dir: &Path, manifest: &[u8]) -> Result<CheckpointReceiver, EngineError> {
        Self::begin_with(data_dir, manifest, None)
    }

    /// The same; the disk fails where the fail point says so.
    pub fn begin_with(
        data_dir: &Path,
        manifest: &[u8],
        fail_point: Option<FailPoint>,
    ) -> Result<CheckpointReceiver, EngineError> {
        let dir = data_dir.join("kv.incoming");
        let announced = checkpoint::announced(&dir, manifest)?;
        let failed = |e| EngineError::io("receive", e);
        step(&fail_point, "receive.begin").map_err(failed)?;
        folder::remove(&dir).map_err(failed)?;
        folder::create_synced(&dir.join(TABLES)).map_err(failed)?;
        let mut open = HashMap::with_capacity(announced.files().len());
        for file in announced.files() {
            let path = dir.join(&file.name);
            open.insert(file.name.clone(), File::create_new(path).map_err(failed)?);
        }
        Ok(CheckpointReceiver { dir, manifest: manifest.to_vec(), announced, open, bytes_received: 0, fail_point })
    }

    /// What is being received.
    pub fn announced(&self) -> &Checkpoint {
        &self.announced
    }

    /// Bytes written so far; with repeated chunks more than the checkpoint has.
    pub fn bytes_received(&self) -> u64 {
        self.bytes_received
    }

    /// Blocking. Writes a chunk; chunks may come in any order and repeatedly.
    ///
    /// Errors: `Io(InvalidInput)` for a file or range that the manifest does not list.
    pub fn write(&mut self, file: &str, offset: u64, chunk: &[u8]) -> Result<(), EngineError> {
        let length = self.announced.files().iter().find(|f| f.name == file).map(|f| f.bytes);
        let end = offset.checked_add(chunk.len() as u64);
        let (Some(length), Some(end), Some(opened)) = (length, end, self.open.get(file)) else {
            return Err(refused(format!("{file:?} is not in the manifest")));
        };
        if end > length {
            return Err(refused(format!("{file:?} ends at {length}, the chunk at {end}")));
        }
        step(&self.fail_point, "receive.write")
            .and_then(|()| opened.write_all_at(chunk, offset))
            .map_err(|e| EngineError::io("receive", e))?;
        self.bytes_received += chunk.len() as u64;
        Ok(())
    }

    /// Blocking. Syncs everything, compares every hash, writes the manifest last.
    ///
    /// Errors: `Damaged` names the file that is not what the sender listed.
    pub fn finish(self) -> Result<Checkpoint, EngineError> {
        let failed = |e| EngineError::io("receive", e);
        step(&self.fail_point, "receive.sync").map_err(failed)?;
        for file in self.open.values() {
            synced(file.sync_all()).map_err(failed)?;
        }
        drop(self.open);
        self.announced.verify_blocking()?;
        folder::sync(&self.dir.join(TABLES)).map_err(failed)?;
        folder::sync(&self.dir).map_err(failed)?;
        step(&self.fail_point, "receive.manifest").map_err(failed)?;
        folder::replace_synced(&self.dir.join(MANIFEST), &self.manifest).map_err(failed)?;
        self.dir.parent().map_or(Ok(()), folder::sync).map_err(failed)?;
        Checkpoint::load(&self.dir)
    }
}

fn refused(why: String) -> EngineError {
    EngineError::io("receive", io::Error::new(io::ErrorKind::InvalidInput, why))
}
