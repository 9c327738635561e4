//! One process per folder: lsm-tree takes no lock of its own, and two processes in one folder
//! delete each other's tables.

use std::fs::File;
use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use super::EngineError;
use super::error::is_full;
use crate::clock;

/// How often a taken lock is tried again.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// Held for as long as the value lives; the kernel lets go of it when the process ends.
#[derive(Debug)]
pub(crate) struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Blocking. Takes `<folder>/lock`, waiting up to `wait_ms` for another holder to let go.
    pub(crate) fn take(folder: &Path, wait_ms: u64) -> Result<FolderLock, EngineError> {
        let path = folder.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            // No inode left for the file: the folder itself can be locked as well.
            .or_else(|error| if is_full(&error) { File::open(folder) } else { Err(error) })
            .map_err(|e| EngineError::io("open", e))?;
        let give_up_at_ms = clock::monotonic_ms().saturating_add(wait_ms);
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(FolderLock { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    if clock::monotonic_ms() >= give_up_at_ms {
                        return Err(EngineError::io(
                            "open",
                            io::Error::new(
                                io::ErrorKind::ResourceBusy,
                                format!("{} is held by another process (waited {wait_ms} ms)", path.display()),
                            ),
                        ));
                    }
                    thread::sleep(RETRY_EVERY);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(EngineError::io("open", errno.into())),
            }
        }
    }
}
