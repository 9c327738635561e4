//! Making segments: a prepared spare, and its adoption as the next `segment.NNN.wal`.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use crate::{
    disk::{Disk, DiskFile},
    frame::{HEADER_OFFSETS, SegmentHeader},
    index::segment_name,
    open::SPARE_NAME,
};

/// Zeros are written in pieces of this size.
const ZERO_BYTES: usize = 1 << 20;

/// Reserves a file's space, writes it full of zeros and syncs it. A later sync of bytes written into it changes
/// no metadata, and a full disk shows here, not in the middle of a group.
///
/// [`is_full`] of the error: there was no room, nothing was written, and nothing is kept of the try.
fn zero_fill(disk: &dyn Disk, path: &Path, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
    // A spare that an earlier process left is used again: on a full disk it may be the only room there is.
    let file = match disk.open(path) {
        Ok(file) if file.bytes()? == bytes => file,
        Ok(_) => disk.create(path)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => disk.create(path)?,
        Err(e) => return Err(e),
    };
    if let Err(full) = file.reserve(bytes) {
        drop(file);
        disk.remove(path)?;
        return Err(full);
    }
    fill(&*file, bytes).map_err(|e| match is_full(&e) {
        // The room was promised: a disk that breaks this promise is a failed disk.
        true => io::Error::other(format!("in reserved space: {e}")),
        false => e,
    })?;
    Ok(file)
}

fn fill(file: &dyn DiskFile, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; ZERO_BYTES];
    let mut at = 0;
    while at < bytes {
        let n = usize::try_from(bytes - at).unwrap_or(ZERO_BYTES).min(ZERO_BYTES);
        file.write_at(zeros.get(..n).unwrap_or_default(), at)?;
        at += n as u64;
    }
    file.sync_data()
}

/// Whether a reservation failed for want of room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Prepares the next segment's file while the writer goes on, on a thread of its own. The file is no
/// part of the log until it is adopted, so its syncs are not the log's.
pub struct Preparer {
    requests: Option<mpsc::SyncSender<u64>>,
    results: mpsc::Receiver<io::Result<Spare>>,
    under_way: bool,
    thread: Option<JoinHandle<()>>,
    disk: Arc<dyn Disk>,
    path: PathBuf,
}

struct Spare {
    file: Arc<dyn DiskFile>,
    bytes: u64,
}

impl Preparer {
    /// Starts the thread.
    pub fn start(disk: Arc<dyn Disk>, dir: &Path) -> io::Result<Self> {
        let path = dir.join(SPARE_NAME);
        let (requests, inbox) = mpsc::sync_channel::<u64>(1);
        let (outbox, results) = mpsc::sync_channel(1);
        let thread = {
            let (disk, path) = (Arc::clone(&disk), path.clone());
            std::thread::Builder::new().name("wal-prepare".into()).spawn(move || {
                for bytes in inbox {
                    let made = zero_fill(&*disk, &path, bytes).map(|file| Spare { file, bytes });
                    if outbox.send(made).is_err() {
                        break;
                    }
                }
            })?
        };
        Ok(Self { requests: Some(requests), results, under_way: false, thread: Some(thread), disk, path })
    }

    /// Asks for a spare, unless one is there or under way.
    pub fn prepare(&mut self, bytes: u64) {
        if !self.under_way
            && let Some(requests) = &self.requests
        {
            self.under_way = requests.try_send(bytes).is_ok();
        }
    }

    /// The spare, made now if there is none of that size.
    fn take(&mut self, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
        if self.under_way {
            self.under_way = false;
            match self.results.recv().map_err(io::Error::other)? {
                Ok(spare) if spare.bytes == bytes => return Ok(spare.file),
                Ok(_) => {}
                // Nothing of the log was in it, and there may be room by now.
                Err(error) if is_full(&error) => tracing::warn!(%error, "there was no room for the next WAL segment"),
                Err(error) => return Err(error),
            }
        }
        zero_fill(&*self.disk, &self.path, bytes)
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that prepares WAL segments panicked");
        }
    }
}

/// Turns the spare into a segment. Header first, then the name, then the folder: when this returns,
/// the segment counts, and everything below `header.first_index` had been durable before.
pub fn adopt(
    preparer: &mut Preparer,
    dir: &Path,
    header: &SegmentHeader,
    sync: &mut dyn FnMut(&dyn DiskFile) -> io::Result<()>,
) -> io::Result<Arc<dyn DiskFile>> {
    let file = preparer.take(header.segment_bytes)?;
    for at in HEADER_OFFSETS {
        file.write_at(&header.encode(), at)?;
    }
    sync(&*file)?;
    preparer.disk.rename(&preparer.path, &dir.join(segment_name(header.number)))?;
    preparer.disk.sync_dir(dir)?;
    Ok(file)
}
