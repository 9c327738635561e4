//! A disk in memory that loses, tears and fails as real disks do.
//!
//! Every file has what its readers see (the page cache) and what would be there after a power cut
//! (the platter), in sectors of 512 bytes. A sync copies one to the other; a power cut keeps any
//! subset of the sectors that were never synced. Folders are journaled: a prefix of the renames,
//! creations and removals since the last folder sync survives. Everything random comes from the
//! caller's generator, so a seed is a whole story.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rand::{Rng, RngCore};

use super::{Disk, DiskFile, FolderLock, FoundFile};

/// What is lost together: real disks promise no more.
const SECTOR_BYTES: usize = 512;
/// What the page cache reads and writes at once.
const BLOCK_BYTES: usize = 4096;

/// What the next sync of a file does instead of succeeding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncFault {
    /// ext4 and XFS: the error is reported once, the pages count as clean, readers go on seeing the
    /// new data, and a second sync succeeds without having written anything.
    PagesMarkedClean,
    /// Btrfs: the error is reported and readers see the old data again.
    ContentsReverted,
}

#[derive(Default)]
struct SimInode {
    cached: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
    read_error: bool,
    /// Blocks that the device cannot read, until each is written in full.
    unreadable: BTreeSet<usize>,
}

impl SimInode {
    fn check_readable(&self, start: usize, len: usize, name: &str) -> io::Result<()> {
        let blocks = start / BLOCK_BYTES..(start + len).div_ceil(BLOCK_BYTES);
        match self.read_error || self.unreadable.range(blocks).next().is_some() {
            true => Err(io::Error::other(format!("Input/output error reading {name}"))),
            false => Ok(()),
        }
    }

    /// Blocks written in full are good again; a part of one cannot be written without reading the rest.
    fn check_writable(&mut self, start: usize, len: usize, name: &str) -> io::Result<()> {
        let end = start + len;
        let touched: Vec<usize> =
            self.unreadable.range(start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).copied().collect();
        for block in touched {
            if start > block * BLOCK_BYTES || end < (block + 1) * BLOCK_BYTES {
                return Err(io::Error::other(format!("Input/output error writing {name}")));
            }
            self.unreadable.remove(&block);
        }
        Ok(())
    }
}

#[derive(Clone)]
enum NameChange {
    Create(PathBuf, u64),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

#[derive(Default)]
struct State {
    inodes: BTreeMap<u64, SimInode>,
    names: BTreeMap<PathBuf, u64>,
    names_durable: BTreeMap<PathBuf, u64>,
    names_pending: Vec<NameChange>,
    inode_next: u64,
    /// Raised by a power cut: handles of the dead process answer errors from then on.
    boot: u64,
    locked: BTreeSet<PathBuf>,
    sync_faults: BTreeMap<String, SyncFault>,
    /// After this many more syncs of any file one fails.
    sync_fault_after: Option<(u64, SyncFault)>,
    space_left: Option<u64>,
    syncs: u64,
    /// Changes that are still carried out before the power goes.
    changes_left: Option<u64>,
    sync_log: Vec<String>,
}

/// The disk. Clones share it.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

impl State {
    /// The name that a file has now: the log renames its spare while it is open.
    fn name_of(&self, inode: u64) -> String {
        let path = self.names.iter().find(|(_, i)| **i == inode).map(|(path, _)| path);
        path.and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// Counts a change; fails when the power goes before it.
    fn change(&mut self) -> io::Result<()> {
        match &mut self.changes_left {
            None => Ok(()),
            Some(0) => {
                self.boot += 1;
                Err(power_lost())
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    /// The fault that the sync of this file meets now, if any.
    fn sync_fault(&mut self, name: &str) -> Option<SyncFault> {
        if let Some((left, fault)) = self.sync_fault_after {
            self.sync_fault_after = left.checked_sub(1).map(|left| (left, fault));
            if left == 0 {
                return Some(fault);
            }
        }
        let part = self.sync_faults.keys().find(|part| name.contains(*part)).cloned()?;
        self.sync_faults.remove(&part)
    }
}

fn power_lost() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "simulated power cut: the handle is dead")
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

fn apply_name(names: &mut BTreeMap<PathBuf, u64>, change: &NameChange) {
    match change {
        NameChange::Create(path, inode) => {
            names.insert(path.clone(), *inode);
        }
        NameChange::Rename(from, to) => {
            if let Some(inode) = names.remove(from) {
                names.insert(to.clone(), inode);
            }
        }
        NameChange::Remove(path) => {
            names.remove(path);
        }
    }
}

impl SimDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk as a process that starts now sees it, until the next power cut or kill.
    pub fn shared(&self) -> Arc<dyn Disk> {
        let boot = self.state().boot;
        Arc::new(SimMount { disk: self.clone(), boot })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power: of what was not synced any subset of sectors and any prefix of name changes
    /// survives. Open handles die and locks are gone.
    pub fn power_cut(&self, rng: &mut dyn RngCore) {
        let mut state = self.state();
        state.boot += 1;
        state.changes_left = None;
        state.locked.clear();
        state.sync_faults.clear();
        state.sync_fault_after = None;
        let kept = rng.random_range(0..=state.names_pending.len());
        let pending = std::mem::take(&mut state.names_pending);
        let mut names = std::mem::take(&mut state.names_durable);
        for change in pending.iter().take(kept) {
            apply_name(&mut names, change);
        }
        state.names = names.clone();
        state.names_durable = names;
        for inode in state.inodes.values_mut() {
            // Nothing, everything, or each sector by itself: the first two are the likely ones on
            // real machines and would be rare among independent coins.
            let mode = rng.random_range(0..4);
            let dirty = std::mem::take(&mut inode.dirty);
            for sector in dirty {
                let keep = match mode {
                    0 => false,
                    1 => true,
                    _ => rng.random_bool(0.5),
                };
                if keep {
                    copy_sector(&inode.cached, &mut inode.durable, sector);
                }
            }
            inode.cached = inode.durable.clone();
        }
    }

    /// Cuts the power in the worst way: nothing that was not synced survives, neither bytes nor names.
    pub fn lose_unsynced(&self) {
        let mut state = self.state();
        state.boot += 1;
        state.changes_left = None;
        state.locked.clear();
        state.names_pending.clear();
        state.names = state.names_durable.clone();
        for inode in state.inodes.values_mut() {
            inode.dirty.clear();
            inode.cached = inode.durable.clone();
        }
    }

    /// Kills the process: nothing that was written is lost, handles and locks are gone.
    pub fn kill(&self) {
        let mut state = self.state();
        state.boot += 1;
        state.changes_left = None;
        state.sync_fault_after = None;
        state.locked.clear();
    }

    /// Lets this many more writes, syncs and name changes happen; then every handle answers errors, until
    /// [`SimDisk::power_cut`] decides what was lost or [`SimDisk::kill`] says that nothing was.
    pub fn lose_power_after(&self, changes: u64) {
        self.state().changes_left = Some(changes);
    }

    /// Drops the page cache: readers see what is on the platter, as after memory pressure.
    pub fn evict(&self) {
        for inode in self.state().inodes.values_mut() {
            if inode.dirty.is_empty() {
                inode.cached = inode.durable.clone();
            }
        }
    }

    /// The next sync of a file whose name contains `name` fails once.
    pub fn fail_next_sync(&self, name: &str, fault: SyncFault) {
        self.state().sync_faults.insert(name.to_owned(), fault);
    }

    /// After this many more syncs, of whatever files or folders, one fails.
    pub fn fail_sync_after(&self, syncs: u64, fault: SyncFault) {
        self.state().sync_fault_after = Some((syncs, fault));
    }

    /// From now on writes that make files grow by more than this many bytes in all fail with ENOSPC.
    pub fn set_space_left(&self, bytes: Option<u64>) {
        self.state().space_left = bytes;
    }

    /// Every read of the file fails, or works again.
    pub fn set_read_error(&self, path: &Path, fails: bool) -> io::Result<()> {
        let mut state = self.state();
        let inode = *state.names.get(path).ok_or_else(|| not_found(path))?;
        if let Some(inode) = state.inodes.get_mut(&inode) {
            inode.read_error = fails;
        }
        Ok(())
    }

    /// Blocks of 4,096 bytes of the file cannot be read any more, until each is written in full.
    pub fn set_unreadable(&self, path: &Path, blocks: impl IntoIterator<Item = usize>) -> io::Result<()> {
        let mut state = self.state();
        let inode = *state.names.get(path).ok_or_else(|| not_found(path))?;
        if let Some(inode) = state.inodes.get_mut(&inode) {
            inode.unreadable.extend(blocks);
        }
        Ok(())
    }

    /// Changes durable and cached bytes behind everybody's back.
    pub fn corrupt(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut state = self.state();
        let inode = *state.names.get(path).ok_or_else(|| not_found(path))?;
        if let Some(inode) = state.inodes.get_mut(&inode) {
            change(&mut inode.cached);
            inode.durable = inode.cached.clone();
            inode.dirty.clear();
        }
        Ok(())
    }

    /// How many file syncs succeeded or failed so far.
    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Reservations, writes and syncs in their order, as `write segment.001.wal` and `sync segment.001.wal`.
    pub fn operations(&self) -> Vec<String> {
        self.state().sync_log.clone()
    }

    /// A disk with the same durable and cached contents that shares nothing with this one.
    pub fn fork(&self) -> Self {
        let state = self.state();
        let mut copy = State {
            names: state.names.clone(),
            names_durable: state.names_durable.clone(),
            names_pending: state.names_pending.clone(),
            inode_next: state.inode_next,
            boot: state.boot,
            ..State::default()
        };
        for (id, inode) in &state.inodes {
            copy.inodes.insert(
                *id,
                SimInode {
                    cached: inode.cached.clone(),
                    durable: inode.durable.clone(),
                    dirty: inode.dirty.clone(),
                    read_error: inode.read_error,
                    unreadable: inode.unreadable.clone(),
                },
            );
        }
        Self(Arc::new(Mutex::new(copy)))
    }
}

fn copy_sector(from: &[u8], to: &mut Vec<u8>, sector: usize) {
    let start = sector * SECTOR_BYTES;
    let end = (start + SECTOR_BYTES).min(from.len());
    let Some(source) = from.get(start..end) else {
        return;
    };
    if to.len() < end {
        to.resize(end, 0);
    }
    if let Some(target) = to.get_mut(start..end) {
        target.copy_from_slice(source);
    }
}

fn take_space(left: &mut Option<u64>, bytes: usize) -> io::Result<()> {
    let Some(left) = left else {
        return Ok(());
    };
    match left.checked_sub(bytes as u64) {
        Some(rest) => *left = rest,
        None => return Err(io::Error::new(io::ErrorKind::StorageFull, "No space left on device")),
    }
    Ok(())
}

struct SimFile {
    disk: SimDisk,
    inode: u64,
    boot: u64,
    name: String,
}

impl SimFile {
    fn with<T>(&self, f: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.disk.state();
        if state.boot != self.boot {
            return Err(power_lost());
        }
        f(&mut state)
    }

    fn missing(&self) -> io::Error {
        io::Error::other(format!("{} has no inode", self.name))
    }
}

impl DiskFile for SimFile {
    fn bytes(&self) -> io::Result<u64> {
        self.with(|state| {
            let inode = state.inodes.get(&self.inode).ok_or_else(|| self.missing())?;
            Ok(inode.cached.len() as u64)
        })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|state| {
            let inode = state.inodes.get(&self.inode).ok_or_else(|| self.missing())?;
            let start = usize::try_from(offset).map_err(io::Error::other)?;
            let rest = inode.cached.get(start..).unwrap_or_default();
            let n = rest.len().min(buf.len());
            inode.check_readable(start, n, &self.name)?;
            if let (Some(to), Some(from)) = (buf.get_mut(..n), rest.get(..n)) {
                to.copy_from_slice(from);
            }
            Ok(n)
        })
    }

    fn read_uncached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        // Dirty pages are written to the device before it is read, as by `O_DIRECT`; they are not synced by that.
        let read = self.read_at(buf, offset)?;
        self.with(|state| {
            let inode = state.inodes.get(&self.inode).ok_or_else(|| self.missing())?;
            let start = usize::try_from(offset).map_err(io::Error::other)?;
            let mut at = start;
            for piece in buf.get_mut(..read).unwrap_or_default().chunk_by_mut({
                let mut next = start;
                move |_, _| {
                    next += 1;
                    !next.is_multiple_of(SECTOR_BYTES)
                }
            }) {
                if !inode.dirty.contains(&(at / SECTOR_BYTES)) {
                    let durable = inode.durable.get(at..).unwrap_or_default();
                    let known = durable.len().min(piece.len());
                    let (from, zeros) = piece.split_at_mut(known);
                    from.copy_from_slice(durable.get(..known).unwrap_or_default());
                    zeros.fill(0);
                }
                at += piece.len();
            }
            Ok(read)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.with(|state| {
            state.change()?;
            let name = state.name_of(self.inode);
            state.sync_log.push(format!("write {name}"));
            let inode = state.inodes.get_mut(&self.inode).ok_or_else(|| self.missing())?;
            let start = usize::try_from(offset).map_err(io::Error::other)?;
            let end = start + buf.len();
            take_space(&mut state.space_left, end.saturating_sub(inode.cached.len()))?;
            inode.check_writable(start, buf.len(), &self.name)?;
            if inode.cached.len() < end {
                inode.cached.resize(end, 0);
            }
            if let Some(target) = inode.cached.get_mut(start..end) {
                target.copy_from_slice(buf);
            }
            if !buf.is_empty() {
                inode.dirty.extend(start / SECTOR_BYTES..=(end - 1) / SECTOR_BYTES);
            }
            Ok(())
        })
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.with(|state| {
            state.change()?;
            let name = state.name_of(self.inode);
            state.sync_log.push(format!("reserve {name}"));
            let inode = state.inodes.get_mut(&self.inode).ok_or_else(|| self.missing())?;
            let end = usize::try_from(bytes).map_err(io::Error::other)?;
            take_space(&mut state.space_left, end.saturating_sub(inode.cached.len()))?;
            if inode.cached.len() < end {
                inode.cached.resize(end, 0);
            }
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|state| {
            state.change()?;
            state.syncs += 1;
            let name = state.name_of(self.inode);
            state.sync_log.push(format!("sync {name}"));
            let fault = state.sync_fault(&name);
            let inode = state.inodes.get_mut(&self.inode).ok_or_else(|| self.missing())?;
            match fault {
                None => {
                    for sector in std::mem::take(&mut inode.dirty) {
                        copy_sector(&inode.cached, &mut inode.durable, sector);
                    }
                    return Ok(());
                }
                Some(SyncFault::PagesMarkedClean) => inode.dirty.clear(),
                Some(SyncFault::ContentsReverted) => {
                    inode.dirty.clear();
                    inode.cached = inode.durable.clone();
                }
            }
            Err(io::Error::other(format!("Input/output error syncing {}", self.name)))
        })
    }
}

struct SimLock {
    disk: SimDisk,
    path: PathBuf,
    boot: u64,
}

impl FolderLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if state.boot == self.boot {
            state.locked.remove(&self.path);
        }
    }
}

impl SimDisk {
    fn handle(&self, state: &State, path: &Path, inode: u64) -> Arc<dyn DiskFile> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Arc::new(SimFile { disk: self.clone(), inode, boot: state.boot, name })
    }
}

/// The disk as one process sees it: a power cut or kill ends that view.
struct SimMount {
    disk: SimDisk,
    boot: u64,
}

impl SimMount {
    fn live(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.state();
        if state.boot == self.boot { Ok(state) } else { Err(power_lost()) }
    }
}

impl Disk for SimMount {
    fn create_dir_all(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<FoundFile>> {
        let state = self.live()?;
        let mut found = Vec::new();
        for (path, inode) in &state.names {
            if path.parent() != Some(dir) {
                continue;
            }
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let bytes = state.inodes.get(inode).map(|i| i.cached.len() as u64).unwrap_or_default();
            found.push(FoundFile { name, bytes });
        }
        found.sort();
        Ok(found)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.live()?;
        let inode = *state.names.get(path).ok_or_else(|| not_found(path))?;
        Ok(self.disk.handle(&state, path, inode))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.live()?;
        state.change()?;
        let inode = state.inode_next;
        state.inode_next += 1;
        state.inodes.insert(inode, SimInode::default());
        let change = NameChange::Create(path.to_owned(), inode);
        apply_name(&mut state.names, &change);
        state.names_pending.push(change);
        Ok(self.disk.handle(&state, path, inode))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.live()?;
        state.change()?;
        if !state.names.contains_key(from) {
            return Err(not_found(from));
        }
        let change = NameChange::Rename(from.to_owned(), to.to_owned());
        apply_name(&mut state.names, &change);
        state.names_pending.push(change);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.live()?;
        state.change()?;
        if !state.names.contains_key(path) {
            return Err(not_found(path));
        }
        let change = NameChange::Remove(path.to_owned());
        apply_name(&mut state.names, &change);
        state.names_pending.push(change);
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        let mut state = self.live()?;
        state.change()?;
        if state.sync_fault("folder").is_some() {
            return Err(io::Error::other("Input/output error syncing the folder"));
        }
        state.names_pending.clear();
        state.names_durable = state.names.clone();
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn FolderLock>> {
        let mut state = self.live()?;
        if !state.locked.insert(path.to_owned()) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, format!("{} is locked", path.display())));
        }
        Ok(Box::new(SimLock { disk: self.disk.clone(), path: path.to_owned(), boot: state.boot }))
    }
}
