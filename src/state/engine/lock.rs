//! One process per folder: lsm-tree takes no lock of its own, and two processes in one folder
//! delete each other's tables.

use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use stemedb_raft::disk::folder_lock::{KernelLock, try_lock};

use super::EngineError;
use crate::clock;

/// How often a taken lock is tried again.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// Blocking. Takes a tree's folder, waiting up to `wait_ms` for another holder to let go.
pub(crate) fn take(folder: &Path, wait_ms: u64) -> Result<KernelLock, EngineError> {
    let path = folder.join("lock");
    let give_up_at_ms = clock::monotonic_ms().saturating_add(wait_ms);
    loop {
        if let Some(lock) = try_lock(&path).map_err(|e| EngineError::io("open", e))? {
            return Ok(lock);
        }
        if clock::monotonic_ms() >= give_up_at_ms {
            let why = format!("{} is held by another process (waited {wait_ms} ms)", path.display());
            return Err(EngineError::io("open", io::Error::new(io::ErrorKind::ResourceBusy, why)));
        }
        thread::sleep(RETRY_EVERY);
    }
}
