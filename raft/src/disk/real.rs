//! Files of the operating system.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use super::{Disk, DiskFile, FolderLock, FoundFile, Space, folder_lock::try_lock};

/// The operating system's file system.
#[derive(Debug, Default)]
pub struct RealDisk;

impl RealDisk {
    /// The disk, shared as the log wants it.
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> Arc<dyn Disk> {
        Arc::new(Self)
    }
}

impl RealDisk {
    /// Opens a file that this process may not write.
    pub(crate) fn open_read_only(path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(RealFile(File::open(path)?)))
    }
}

struct RealFile(File);

impl Disk for RealDisk {
    fn create_dir_all(&self, dir: &Path) -> io::Result<()> {
        let missing: Vec<_> = dir.ancestors().take_while(|d| !d.as_os_str().is_empty() && !d.exists()).collect();
        fs::create_dir_all(dir)?;
        // A folder whose own name is lost in a power cut takes all with it that was synced inside.
        for made in missing {
            let parent = made.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            self.sync_dir(parent)?;
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<FoundFile>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_file() {
                let name = entry.file_name().to_string_lossy().into_owned();
                found.push(FoundFile { name, bytes: meta.len() });
            }
        }
        found.sort();
        Ok(found)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        rustix::fs::fsync(&File::open(dir)?)?;
        Ok(())
    }

    fn space(&self, dir: &Path) -> io::Result<Space> {
        let found = rustix::fs::statvfs(dir)?;
        // Btrfs makes inodes as it needs them, and says so by a total of zero.
        let inodes_free = if found.f_files == 0 { u64::MAX } else { found.f_favail };
        Ok(Space {
            bytes_free: found.f_bavail.saturating_mul(found.f_frsize),
            bytes_total: found.f_blocks.saturating_mul(found.f_frsize),
            inodes_free,
        })
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn FolderLock>> {
        match try_lock(path)? {
            Some(lock) => Ok(Box::new(lock)),
            None => Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                format!("{} is locked by another process", path.display()),
            )),
        }
    }
}

/// Memory, offsets and lengths of direct reads are multiples of this; no device asks for more.
const DIRECT_ALIGN: usize = 4096;
/// Direct reads are made in pieces of this size.
const DIRECT_BYTES: usize = 1 << 20;

impl RealFile {
    fn read_direct(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        use rustix::fs::{Mode, OFlags};
        use std::os::fd::AsRawFd;
        // By its descriptor, because a segment may be renamed while it is open.
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let direct =
            File::from(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())?);
        let mut memory = vec![0; DIRECT_BYTES + DIRECT_ALIGN];
        let shift = memory.as_ptr().align_offset(DIRECT_ALIGN);
        let aligned = memory.get_mut(shift..shift + DIRECT_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let mut read = 0;
        while read < buf.len() {
            let at = offset + read as u64;
            let begin = at - at % DIRECT_ALIGN as u64;
            let skip = usize::try_from(at - begin).map_err(io::Error::other)?;
            let wanted = (skip + buf.len() - read).next_multiple_of(DIRECT_ALIGN).min(DIRECT_BYTES);
            let piece = aligned.get_mut(..wanted).unwrap_or_default();
            let got = match direct.read_at(piece, begin) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                got => got?,
            };
            let fresh = piece.get(skip..got).unwrap_or_default();
            let n = fresh.len().min(buf.len() - read);
            let Some((to, from)) = buf.get_mut(read..read + n).zip(fresh.get(..n)).filter(|_| n > 0) else { break };
            to.copy_from_slice(from);
            read += n;
            // A short direct read is the end of the file.
            if got < wanted {
                break;
            }
        }
        Ok(read)
    }
}

impl DiskFile for RealFile {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut read = 0;
        while let Some(rest) = buf.get_mut(read..).filter(|rest| !rest.is_empty()) {
            match self.0.read_at(rest, offset + read as u64) {
                Ok(0) => break,
                Ok(n) => read += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(read)
    }

    fn read_uncached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self.read_direct(buf, offset) {
            // Not every file system can; dropping the clean pages first is the next best.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
                rustix::fs::fadvise(&self.0, 0, None, rustix::fs::Advice::DontNeed)?;
                self.read_at(buf, offset)
            }
            read => read,
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buf, offset)
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        use rustix::{
            fs::{FallocateFlags, fallocate},
            io::Errno,
        };
        loop {
            match fallocate(&self.0, FallocateFlags::empty(), 0, bytes) {
                Err(Errno::INTR) => {}
                // Where a file system cannot reserve, the zeros that follow are all the reservation there is.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        // Not `File::sync_data`: the standard library calls again what a signal interrupted, and a second sync lies.
        rustix::fs::fdatasync(&self.0)?;
        Ok(())
    }
}
