//! Reads files around the page cache.
//!
//! What the page cache holds proves nothing about the medium: it may be newer than the disk (a sync
//! that failed) or hide rot. With `O_DIRECT` the bytes come from the device; where a file system
//! refuses that, the cached pages are dropped before the read.

use std::alloc::Layout;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{Advice, fadvise};
use xxhash_rust::xxh3::Xxh3;

use super::error::synced;

/// Largest block size that a device asks for in practice; buffer, offset and length are multiples.
const ALIGN: usize = 4096;
/// Read size, bytes: large enough for a disk that seeks, small enough for a throttle.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// Whether the hash of a file was finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hashed {
    /// Length and xxh3-128.
    Whole(u64, u128),
    /// The caller stopped it.
    Stopped,
}

/// Blocking. Hashes a file from the medium. `after` is told of each chunk read, and may wait or stop it.
pub fn hash(path: &Path, mut after: impl FnMut(u64) -> ControlFlow<()>) -> io::Result<Hashed> {
    let mut file = open(path)?;
    let mut room = vec![0u8; CHUNK_BYTES + ALIGN];
    let aligned = room.as_ptr().align_offset(ALIGN).min(ALIGN);
    let buffer = room.get_mut(aligned..aligned + CHUNK_BYTES).ok_or_else(|| io::Error::other("no buffer"))?;
    let mut hasher = Xxh3::new();
    let mut bytes = 0u64;
    loop {
        let read = match file.read(buffer) {
            Ok(0) => return Ok(Hashed::Whole(bytes, hasher.digest128())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // A file system may take the flag and refuse the read.
            Err(error) if bytes == 0 && error.raw_os_error() == Some(libc::EINVAL) => {
                file = open_dropped(path)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        hasher.update(buffer.get(..read).unwrap_or_default());
        bytes += read as u64;
        if after(read as u64).is_break() {
            return Ok(Hashed::Stopped);
        }
    }
}

/// Blocking. Hashes a file from the medium and then syncs it, so that what was compared is durable.
///
/// The order matters: the direct read flushes dirty pages into the device, the sync flushes the device.
pub fn hash_and_sync(path: &Path) -> io::Result<(u64, u128)> {
    let found = match hash(path, |_| ControlFlow::Continue(()))? {
        Hashed::Whole(bytes, xxh3) => (bytes, xxh3),
        Hashed::Stopped => return Err(io::ErrorKind::Interrupted.into()),
    };
    synced(File::open(path)?.sync_all())?;
    Ok(found)
}

fn open(path: &Path) -> io::Result<File> {
    debug_assert!(Layout::from_size_align(CHUNK_BYTES, ALIGN).is_ok());
    match OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path) {
        Ok(file) => Ok(file),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => open_dropped(path),
        Err(error) => Err(error),
    }
}

/// Pages that are clean go; dirty ones stay, and are the truth of the next sync anyway.
fn open_dropped(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if let Err(error) = fadvise(&file, 0, None, Advice::DontNeed) {
        tracing::debug!(%error, path = %path.display(), "the page cache could not be passed by");
    }
    Ok(file)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use xxhash_rust::xxh3::xxh3_128;

    #[test]
    fn files_of_every_odd_length_hash_as_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        for length in [0, 1, 511, 4095, 4096, 4097, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 77]
        {
            let content: Vec<u8> = (0..length).map(|n| (n * 31 % 251) as u8).collect();
            let path = dir.path().join(length.to_string());
            std::fs::write(&path, &content).unwrap();
            assert_eq!((length as u64, xxh3_128(&content)), hash_and_sync(&path).unwrap(), "{length}");
        }
    }

    #[test]
    fn it_can_be_stopped_between_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1u8; 3 * CHUNK_BYTES]).unwrap();
        let mut seen = 0;
        let stopped = hash(&path, |bytes| {
            seen += bytes;
            if seen > CHUNK_BYTES as u64 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!((Hashed::Stopped, 2 * CHUNK_BYTES as u64), (stopped.unwrap(), seen));
    }
}
