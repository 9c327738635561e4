//! A simulated disk under which the thread that writes the log can be made to die.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stemedb_raft::disk::{Disk, DiskFile, FolderLock, FoundFile};

/// A disk whose next sync of a segment panics when armed: the thread that called it dies.
pub struct PanicDisk {
    pub under: Arc<dyn Disk>,
    pub armed: Arc<AtomicBool>,
}

struct PanicFile {
    under: Arc<dyn DiskFile>,
    armed: Arc<AtomicBool>,
}

impl PanicDisk {
    fn file(&self, path: &Path, under: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        // The spare too: it becomes the next segment while it is open.
        match path.file_stem() {
            Some(stem) if stem.to_string_lossy().starts_with("segment") => {
                Arc::new(PanicFile { under, armed: Arc::clone(&self.armed) })
            }
            _ => under,
        }
    }
}

impl Disk for PanicDisk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.under.create_dir_all(dir)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<FoundFile>> {
        self.under.list(dir)
    }
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(path, self.under.open(path)?))
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(self.file(path, self.under.create(path)?))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.under.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.under.remove(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.under.sync_dir(dir)
    }
    fn space(&self, dir: &Path) -> io::Result<stemedb_raft::disk::Space> {
        self.under.space(dir)
    }
    fn lock(&self, path: &Path) -> io::Result<Box<dyn FolderLock>> {
        self.under.lock(path)
    }
}

impl DiskFile for PanicFile {
    fn bytes(&self) -> io::Result<u64> {
        self.under.bytes()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.under.read_at(buf, offset)
    }
    fn read_uncached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.under.read_uncached_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.under.write_at(buf, offset)
    }
    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.under.reserve(bytes)
    }
    fn sync_data(&self) -> io::Result<()> {
        assert!(!self.armed.load(Ordering::Acquire), "a planted panic");
        self.under.sync_data()
    }
}
