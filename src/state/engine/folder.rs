//! Small steps on folders that survive a power cut: a name counts only once its folder is synced.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use super::error::synced;

/// Read size of hashing and copying, bytes.
const CHUNK_BYTES: usize = 256 * 1024;

/// Syncs a folder, so that names made or removed in it last.
pub fn sync(folder: &Path) -> io::Result<()> {
    synced(File::open(folder)?.sync_all())
}

/// Creates a folder with its parents and syncs the names that were made.
pub fn create_synced(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent {
        create_synced(parent)?;
    }
    match fs::create_dir(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
        Err(error) => return Err(error),
    }
    parent.map_or(Ok(()), sync)
}

/// Writes `path` so that it holds either its old content or `bytes`, never a part.
pub fn replace_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = folder.join(name);
    // A file of its own each time: the sync of one that is left there may have failed.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::create_new(&temporary)?;
    if let Err(error) = file.write_all(bytes).and_then(|()| synced(file.sync_all())) {
        // Best effort: what is half-written is in nobody's way.
        let _stays = fs::remove_file(&temporary);
        return Err(error);
    }
    drop(file);
    fs::rename(&temporary, path)?;
    sync(folder)
}

/// Writes a file that nobody reads before its folder is synced.
pub fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    synced(file.sync_all())
}

/// Hard-links `from` as `to`; copies and syncs when the file system cannot link them.
pub fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::CrossesDevices
                    | io::ErrorKind::Unsupported
                    | io::ErrorKind::TooManyLinks
                    | io::ErrorKind::PermissionDenied
            ) =>
        {
            fs::copy(from, to)?;
            synced(File::open(to)?.sync_all())
        }
        Err(error) => Err(error),
    }
}

/// Length and xxh3-128 of a file.
pub fn hash(path: &Path) -> io::Result<(u64, u128)> {
    let mut file = File::open(path)?;
    let mut hasher = Xxh3::new();
    let mut bytes = 0u64;
    let mut chunk = vec![0u8; CHUNK_BYTES];
    loop {
        let read = file.read(&mut chunk)?;
        let Some(part) = chunk.get(..read).filter(|part| !part.is_empty()) else {
            return Ok((bytes, hasher.digest128()));
        };
        hasher.update(part);
        bytes += part.len() as u64;
    }
}

/// Removes a folder with what is in it; it may be absent.
pub fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
