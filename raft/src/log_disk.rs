//! The disk as the running log uses it.
//!
//! Every change that the writer or the preparer of segments makes goes through here. Before it begins, the log must
//! not have latched; while it runs, a watchdog can see it; when it fails, whatever the errno, the log latches at
//! once and for good. That is decided by the call: only a reservation, or the making of a file that holds nothing
//! yet, may say that the disk is full instead. So a second write or sync of a file that has failed cannot happen.

use std::{io, path::Path, sync::Arc, time::Duration};

use crate::{
    clock::{monotonic_ms, now},
    disk::{Disk, DiskFile, FolderLock, FoundFile, Space, is_full},
    error::Latched,
    io_times::Waits,
    shared::{Shared, WalObserver},
};

/// Who changes the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The writer: its syncs are the log's.
    Writer,
    /// The preparer of segments: what it makes is no part of the log yet.
    Preparer,
}

impl Role {
    fn waits(self) -> Waits {
        match self {
            Role::Writer => Waits::Somebody,
            Role::Preparer => Waits::Nobody,
        }
    }
}

/// A disk that latches the log. Clones are the same.
#[derive(Clone)]
pub struct LogDisk {
    disk: Arc<dyn Disk>,
    shared: Arc<Shared>,
    observer: Arc<dyn WalObserver>,
    role: Role,
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn never(_error: &io::Error) -> bool {
    false
}

fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

impl LogDisk {
    /// A view of the disk for one of the log's threads.
    pub fn new(disk: Arc<dyn Disk>, shared: Arc<Shared>, observer: Arc<dyn WalObserver>, role: Role) -> Self {
        Self { disk, shared, observer, role }
    }

    /// The same disk, used by somebody else.
    pub fn of(&self, role: Role) -> Self {
        Self { role, ..self.clone() }
    }

    /// What is shared by all of the log.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// A file opened elsewhere, under the name that it has for operators.
    pub fn file(&self, file: Arc<dyn DiskFile>, name: &str) -> LogFile {
        LogFile { file, name: name.into(), disk: self.clone() }
    }

    /// Ends all writing, unless it has ended already; returns why it ended. Tells the observer once.
    pub fn latch(&self, operation: &'static str, file: &str, error: &io::Error) -> Latched {
        let latched = Latched { operation, file: file.to_owned(), error: error.to_string() };
        if self.shared.latch(latched.clone()) {
            match operation {
                SYNC | SYNC_FOLDER => self.observer.fsync_failed(file, error),
                _ => self.observer.write_failed(operation, file, error),
            }
            return latched;
        }
        self.shared.latched().unwrap_or(latched)
    }

    /// Carries out one operation on a file. `spares` tells the errors that change nothing and mean no failure.
    fn change<T>(
        &self,
        operation: &'static str,
        file: &str,
        spares: fn(&io::Error) -> bool,
        act: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.check()?;
        let started = now();
        let result = {
            let _seen = self.shared.io_times.enter(operation, file, self.role.waits());
            act()
        };
        match result {
            Ok(done) => {
                if operation == SYNC && self.role == Role::Writer {
                    self.synced(file, started.elapsed());
                }
                // Whoever gave this log up while the operation hung must not see an acknowledgement come after it.
                self.check()?;
                Ok(done)
            }
            Err(error) if spares(&error) => Err(error),
            Err(error) => Err(self.latch(operation, file, &error).into()),
        }
    }

    fn synced(&self, file: &str, took: Duration) {
        self.shared.fsyncs.add(monotonic_ms(), took);
        self.observer.fsync_done(file, took);
    }

    fn check(&self) -> Result<(), Latched> {
        self.shared.latched().map_or(Ok(()), Err)
    }

    /// As [`Disk::open`].
    pub fn open_file(&self, path: &Path) -> io::Result<LogFile> {
        let name = file_name(path);
        let file = self.change("open", &name, is_missing, || self.disk.open(path))?;
        Ok(self.file(file, &name))
    }

    /// As [`Disk::create`].
    pub fn create_file(&self, path: &Path) -> io::Result<LogFile> {
        let name = file_name(path);
        let file = self.change("create", &name, is_full, || self.disk.create(path))?;
        Ok(self.file(file, &name))
    }

    /// [`Disk::sync_dir`], on behalf of one of the folder's files.
    pub fn sync_dir_of(&self, dir: &Path, file: &str) -> io::Result<()> {
        self.change(SYNC_FOLDER, file, never, || self.disk.sync_dir(dir))
    }
}

impl Disk for LogDisk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        self.change("create folder", &file_name(dir), never, || self.disk.create_dir_all(dir))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<FoundFile>> {
        self.disk.list(dir)
    }

    /// Latches, unless there is no such file.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(self.open_file(path)?))
    }

    /// Latches, unless there is no room: then nothing was made.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(self.create_file(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change("rename", &file_name(to), never, || self.disk.rename(from, to))
    }

    /// Latches, unless there was no such file.
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change("unlink", &file_name(path), is_missing, || self.disk.remove(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.sync_dir_of(dir, &file_name(dir))
    }

    fn space(&self, dir: &Path) -> io::Result<Space> {
        self.disk.space(dir)
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn FolderLock>> {
        self.disk.lock(path)
    }
}

/// A sync of a file: what the metric counts.
pub const SYNC: &str = "sync";
/// A sync of the folder, named by the file it was done for.
pub const SYNC_FOLDER: &str = "sync folder of";

/// A file of the running log.
pub struct LogFile {
    file: Arc<dyn DiskFile>,
    name: Arc<str>,
    disk: LogDisk,
}

impl LogFile {
    /// The file itself, for readers and for whoever changes it next under another name.
    pub fn into_inner(self) -> Arc<dyn DiskFile> {
        self.file
    }
}

impl DiskFile for LogFile {
    fn bytes(&self) -> io::Result<u64> {
        self.file.bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn read_uncached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_uncached_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.disk.change("write", &self.name, never, || self.file.write_at(buf, offset))
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.disk.change("reserve", &self.name, is_full, || self.file.reserve(bytes))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.change(SYNC, &self.name, never, || self.file.sync_data())
    }
}
