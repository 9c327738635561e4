//! The only way by which this crate touches storage.
//!
//! Two implementations: [`RealDisk`] is files, [`sim::SimDisk`] is memory with a page cache that
//! loses, tears and fails as real ones do. The log above is the same code on both.

use std::{io, path::Path, sync::Arc};

pub mod folder_lock;
mod real;
pub mod sim;

pub use real::RealDisk;

/// One name found in a folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FoundFile {
    /// File name without its folder.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
}

/// Held while a folder is in use; dropping it, or the death of the process, releases the folder.
pub trait FolderLock: Send + Sync {}

/// How much room a file system has.
///
/// Not seen here: user and group quotas, which the file system tells nobody in advance, and thin volumes or sparse
/// images that have promised more than they have. The first shows when a reservation fails, the second as a failed
/// write. A project quota (XFS, ext4) is seen, since the file system answers for the folder as if it ended there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that a process without privileges may still take.
    pub bytes_free: u64,
    /// Bytes in all.
    pub bytes_total: u64,
    /// Files that a process without privileges may still make; `u64::MAX` where the file system has no such limit.
    pub inodes_free: u64,
}

/// A file system. Names become durable by [`Disk::sync_dir`] only.
pub trait Disk: Send + Sync + 'static {
    /// Makes the folder and its parents.
    fn create_dir_all(&self, dir: &Path) -> io::Result<()>;
    /// The plain files of a folder, sorted by name.
    fn list(&self, dir: &Path) -> io::Result<Vec<FoundFile>>;
    /// Opens an existing file for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// Makes an empty file, replacing one of that name.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// Renames, replacing the target.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Unlinks.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in the folder durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Room on the file system that holds the folder.
    fn space(&self, dir: &Path) -> io::Result<Space>;
    /// Takes the folder for this process alone; `WouldBlock` when another one has it.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn FolderLock>>;
}

/// An open file. Written bytes become durable by [`DiskFile::sync_data`] only.
pub trait DiskFile: Send + Sync {
    /// Length in bytes.
    fn bytes(&self) -> io::Result<u64>;
    /// Reads until `buf` is full or the file ends; how many bytes were read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// The same past the page cache: what the device has, or will have of writes that nobody synced yet. After a sync
    /// that failed the two may differ. Proves nothing about what a power cut leaves: only a sync does.
    fn read_uncached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `buf`.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Makes the file at least that long, zeros where nothing was written, and takes the space for it. An error
    /// leaves nothing behind but the file: only here, and in [`Disk::create`], does a full disk mean no more than
    /// that it is full (see [`is_full`]). A write or a sync that finds no room has failed like any other.
    fn reserve(&self, bytes: u64) -> io::Result<()>;
    /// Makes the written bytes durable. After an error nothing is known of them, and calling it
    /// again would lie.
    fn sync_data(&self) -> io::Result<()>;
}

/// Whether a reservation, or the making of a file, failed for want of room or quota.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Reads a whole file into a buffer that is used again and again.
pub fn read_into(file: &dyn DiskFile, buf: &mut Vec<u8>) -> io::Result<()> {
    let bytes = usize::try_from(file.bytes()?).map_err(io::Error::other)?;
    buf.resize(bytes, 0);
    let read = file.read_at(buf, 0)?;
    buf.truncate(read);
    Ok(())
}

/// Reads a whole file.
pub fn read_all(file: &dyn DiskFile) -> io::Result<Vec<u8>> {
    let mut buf = Vec::new();
    read_into(file, &mut buf)?;
    Ok(buf)
}

/// Reads a whole file past the page cache.
pub fn read_all_uncached(file: &dyn DiskFile) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; usize::try_from(file.bytes()?).map_err(io::Error::other)?];
    let read = file.read_uncached_at(&mut buf, 0)?;
    buf.truncate(read);
    Ok(buf)
}
