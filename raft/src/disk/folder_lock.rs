//! Keeps a folder for one process.
//!
//! Two things are locked: the folder itself, and the file `lock` in it, which tells people what holds it. The file alone
//! would not do. It is empty, and runbooks delete the empty files of a node that runs: whoever came next would lock a
//! new file of that name, and two processes would write one log.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    path::Path,
};

use super::{FolderLock, is_full};

/// Held for as long as the value lives; the kernel lets go of it when the process ends.
#[derive(Debug)]
#[must_use = "the folder is free again when this is dropped"]
pub struct KernelLock {
    /// At least one of them.
    _held: [Option<File>; 2],
}

impl FolderLock for KernelLock {}

/// Takes the folder in which `file` lies; `None` while another process, or somebody else in this one, has it. Makes the
/// file, unless there is no room for it.
pub fn try_lock(file: &Path) -> io::Result<Option<KernelLock>> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = File::open(folder)?;
    let folder = match folder.try_lock() {
        Ok(()) => Some(folder),
        Err(TryLockError::WouldBlock) => return Ok(None),
        // Some file systems of networks lock only what is open for writing.
        Err(TryLockError::Error(_)) => None,
    };
    let file = match OpenOptions::new().write(true).create(true).truncate(false).open(file) {
        Ok(file) => file,
        Err(error) if is_full(&error) && folder.is_some() => return Ok(Some(KernelLock { _held: [folder, None] })),
        Err(error) => return Err(error),
    };
    match file.try_lock() {
        Ok(()) => Ok(Some(KernelLock { _held: [folder, Some(file)] })),
        // A process of an earlier build locks only the file.
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_folder_is_kept_although_its_empty_files_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lock");
        let held = try_lock(&file).unwrap().unwrap();
        assert!(try_lock(&file).unwrap().is_none());
        std::fs::remove_file(&file).unwrap();
        assert!(try_lock(&file).unwrap().is_none(), "a new file of that name is no new folder");
        drop(held);
        let held = try_lock(&file).unwrap().unwrap();
        assert!(file.exists());
        drop(held);
        // As an earlier build holds it.
        let earlier = File::open(&file).unwrap();
        earlier.lock().unwrap();
        assert!(try_lock(&file).unwrap().is_none());
        drop(earlier);
        assert!(try_lock(&file).unwrap().is_some());
    }
}
