//! Open files of the simulated disk.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    super::DiskFile,
    SECTOR_BYTES, SimDisk, SimInode, State, copy_sector,
    faults::{Action, EIO, Kind, SyncFault, errno},
    power_lost,
};

pub(super) struct SimFile {
    disk: SimDisk,
    inode: u64,
    boot: u64,
    /// Errors of the file that this handle has been told of.
    errors_seen: AtomicU64,
}

impl SimFile {
    pub(super) fn open(disk: &SimDisk, state: &State, inode: u64) -> Arc<dyn DiskFile> {
        // As the kernel does: an error that nobody was told of yet is new to whoever opens the file.
        let seen = state.inodes.get(&inode).map_or(0, |i| if i.error_was_told { i.errors } else { 0 });
        Arc::new(Self { disk: disk.clone(), inode, boot: state.boot, errors_seen: AtomicU64::new(seen) })
    }

    /// The operation begins: it is counted, may hang, and meets its fault. Then `act` runs.
    fn with<T>(
        &self,
        kind: Option<Kind>,
        act: impl FnOnce(&mut State, Option<Action>) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.disk.state();
        let name = state.name_of(self.inode);
        let action = match kind {
            Some(kind) => {
                let (now, action) = self.disk.begin(state, self.boot, kind, &name)?;
                state = now;
                action
            }
            None if state.boot != self.boot => return Err(power_lost()),
            None => None,
        };
        act(&mut state, action)
    }

    fn inode<'a>(&self, state: &'a mut State) -> io::Result<&'a mut SimInode> {
        state.inodes.get_mut(&self.inode).ok_or_else(power_lost)
    }
}

fn at(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(io::Error::other)
}

impl SimInode {
    fn put(&mut self, buf: &[u8], start: usize) {
        let end = start + buf.len();
        if self.cached.len() < end {
            self.cached.resize(end, 0);
        }
        if let Some(target) = self.cached.get_mut(start..end) {
            target.copy_from_slice(buf);
        }
        if !buf.is_empty() {
            self.dirty.extend(start / SECTOR_BYTES..=(end - 1) / SECTOR_BYTES);
        }
    }

    /// The pages are not written and count as clean.
    pub(super) fn lose_dirty(&mut self, reverted: bool) {
        self.dirty.clear();
        self.errors += 1;
        self.error_was_told = false;
        if reverted {
            self.cached = self.durable.clone();
        }
    }
}

impl DiskFile for SimFile {
    fn bytes(&self) -> io::Result<u64> {
        self.with(None, |state, _| Ok(self.inode(state)?.cached.len() as u64))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(Some(Kind::Read), |state, action| {
            let inode = self.inode(state)?;
            if let Some(Action::Fail(number)) = action {
                return Err(errno(number));
            }
            let start = at(offset)?;
            let rest = inode.cached.get(start..).unwrap_or_default();
            let n = rest.len().min(buf.len());
            inode.check_readable(start, n)?;
            if let (Some(to), Some(from)) = (buf.get_mut(..n), rest.get(..n)) {
                to.copy_from_slice(from);
            }
            Ok(n)
        })
    }

    fn read_uncached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        // Dirty pages are written to the device before it is read, as by `O_DIRECT`; they are not synced by that.
        let read = self.read_at(buf, offset)?;
        self.with(None, |state, _| {
            let inode = self.inode(state)?;
            let start = at(offset)?;
            let end = start + read;
            for sector in start / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES) {
                if inode.dirty.contains(&sector) {
                    continue;
                }
                let (from, to) = ((sector * SECTOR_BYTES).max(start), ((sector + 1) * SECTOR_BYTES).min(end));
                let piece = buf.get_mut(from - start..to - start).unwrap_or_default();
                let durable = inode.durable.get(from..).unwrap_or_default();
                let (known, zeros) = piece.split_at_mut(durable.len().min(piece.len()));
                known.copy_from_slice(durable.get(..known.len()).unwrap_or_default());
                zeros.fill(0);
            }
            Ok(read)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.with(Some(Kind::Write), |state, action| {
            let mut start = at(offset)?;
            if let Some(Action::Misdirect(to)) = action {
                start = at(to)?;
            }
            let before = self.inode(state)?.cached.len();
            state.take_space((start + buf.len()).saturating_sub(before))?;
            let inode = self.inode(state)?;
            if let Some(Action::Fail(number)) = action {
                // A write that fails may have done any part of its work.
                inode.put(buf.get(..buf.len() / 2).unwrap_or_default(), start);
                return Err(errno(number));
            }
            // New bytes lie in new sectors: a disk maps bad ones out when they are written.
            inode.check_writable(start, buf.len())?;
            inode.put(buf, start);
            Ok(())
        })
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.with(Some(Kind::Reserve), |state, action| {
            if let Some(Action::Fail(number)) = action {
                return Err(errno(number));
            }
            let end = at(bytes)?;
            let before = self.inode(state)?.cached.len();
            state.take_space(end.saturating_sub(before))?;
            let inode = self.inode(state)?;
            if inode.cached.len() < end {
                inode.cached.resize(end, 0);
            }
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(Some(Kind::Sync), |state, action| {
            state.syncs += 1;
            let of_file_system = state.file_system.sync_fault();
            let inode = self.inode(state)?;
            let (fault, number) = match action {
                Some(Action::Sync(fault)) => (fault, EIO),
                Some(Action::Fail(number)) => (of_file_system, number),
                _ => {
                    for sector in std::mem::take(&mut inode.dirty) {
                        copy_sector(&inode.cached, &mut inode.durable, sector);
                    }
                    // Truncation is not modelled: files of the log never shrink.
                    if inode.errors > self.errors_seen.swap(inode.errors, Ordering::Relaxed) {
                        inode.error_was_told = true;
                        return Err(errno(EIO));
                    }
                    return Ok(());
                }
            };
            inode.lose_dirty(fault == SyncFault::ContentsReverted);
            if fault == SyncFault::ReportedLate {
                return Ok(());
            }
            inode.error_was_told = true;
            match fault {
                SyncFault::ReportedPerOpenFile => {
                    self.errors_seen.store(inode.errors, Ordering::Relaxed);
                }
                // Told once in all: this handle's next sync succeeds, and so does everybody else's.
                _ => inode.errors -= 1,
            }
            Err(errno(number))
        })
    }
}
