//! A disk in memory that loses, tears, fails, hangs and lies as real disks do.
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
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::{Rng, RngCore};

use super::Disk;

mod faults;
mod file;
mod mount;

use faults::{Action, CHANGES, EIO, ENOSPC, EROFS, Plans, errno};
pub use faults::{FileSystem, Kind, SyncFault};
use mount::SimMount;

/// What is lost together: real disks promise no more.
const SECTOR_BYTES: usize = 512;
/// What the page cache reads and writes at once.
const BLOCK_BYTES: usize = 4096;

/// Room on a disk whose room was not limited.
const ENDLESS_BYTES: u64 = 1 << 50;

#[derive(Clone, Default)]
struct SimInode {
    cached: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
    /// No read of the file works.
    read_error: bool,
    /// Blocks that the device cannot read, until each is written in full.
    unreadable: BTreeSet<usize>,
    /// Write-back errors so far; a handle that has seen fewer is told at its next sync.
    errors: u64,
    error_was_told: bool,
}

impl SimInode {
    fn check_readable(&self, start: usize, len: usize) -> io::Result<()> {
        let blocks = start / BLOCK_BYTES..(start + len).div_ceil(BLOCK_BYTES);
        match self.read_error || self.unreadable.range(blocks).next().is_some() {
            true => Err(errno(EIO)),
            false => Ok(()),
        }
    }

    /// Blocks written in full are good again; a part of one cannot be written without reading the rest.
    fn check_writable(&mut self, start: usize, len: usize) -> io::Result<()> {
        let end = start + len;
        let touched: Vec<usize> =
            self.unreadable.range(start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).copied().collect();
        for block in touched {
            if start > block * BLOCK_BYTES || end < (block + 1) * BLOCK_BYTES {
                return Err(errno(EIO));
            }
            self.unreadable.remove(&block);
        }
        Ok(())
    }

    fn evict(&mut self) {
        if self.dirty.is_empty() {
            self.cached = self.durable.clone();
        }
    }
}

#[derive(Clone)]
enum NameChange {
    Create(PathBuf, u64),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

#[derive(Clone, Default)]
struct State {
    inodes: BTreeMap<u64, SimInode>,
    names: BTreeMap<PathBuf, u64>,
    names_durable: BTreeMap<PathBuf, u64>,
    names_pending: Vec<NameChange>,
    inode_next: u64,
    /// Raised by a power cut: handles of the dead process answer errors from then on.
    boot: u64,
    locked: BTreeSet<PathBuf>,
    file_system: FileSystem,
    plans: Plans,
    /// Raised to let go of everything that hangs.
    releases: u64,
    hung: usize,
    is_read_only: bool,
    space_left: Option<u64>,
    inodes_left: Option<u64>,
    syncs: u64,
    /// Changes that are still carried out before the power goes.
    changes_left: Option<u64>,
    log: Vec<String>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    released: Condvar,
}

/// The disk. Clones share it.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Shared>);

impl State {
    /// The name that a file has now: the log renames its spare while it is open.
    fn name_of(&self, inode: u64) -> String {
        let path = self.names.iter().find(|(_, i)| **i == inode).map(|(path, _)| path);
        path.map(|p| file_name(p)).unwrap_or_default()
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

    fn take_space(&mut self, bytes: usize) -> io::Result<()> {
        let Some(left) = &mut self.space_left else {
            return Ok(());
        };
        match left.checked_sub(bytes as u64) {
            Some(rest) => *left = rest,
            None => return Err(errno(ENOSPC)),
        }
        Ok(())
    }

    /// Gives back the room of the file that loses its name. (A real one has it until its last handle closes.)
    fn free_replaced(&mut self, change: &NameChange) {
        let gone = match change {
            NameChange::Create(path, _) | NameChange::Rename(_, path) | NameChange::Remove(path) => path,
        };
        let bytes = self.names.get(gone).and_then(|inode| self.inodes.get(inode)).map(|i| i.cached.len() as u64);
        if let (Some(left), Some(bytes)) = (&mut self.space_left, bytes) {
            *left += bytes;
        }
    }

    /// A new process finds neither handles nor locks, and no fault that was meant for the one before.
    fn end_process(&mut self) {
        self.boot += 1;
        self.changes_left = None;
        self.locked.clear();
        self.plans.clear();
    }
}

fn power_lost() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "simulated power cut: the handle is dead")
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
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

impl SimDisk {
    /// An empty disk under ext4.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty disk under a file system of one's choice.
    pub fn with_file_system(file_system: FileSystem) -> Self {
        let disk = Self::default();
        disk.state().file_system = file_system;
        disk
    }

    /// The disk as a process that starts now sees it, until the next power cut or kill.
    pub fn shared(&self) -> Arc<dyn Disk> {
        let boot = self.state().boot;
        Arc::new(SimMount { disk: self.clone(), boot })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operation begins: the process must be alive, a change is counted and logged, then it waits as long as
    /// it is made to. Returns what else it meets.
    fn begin<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        boot: u64,
        kind: Kind,
        name: &str,
    ) -> io::Result<(MutexGuard<'a, State>, Option<Action>)> {
        if state.boot != boot {
            return Err(power_lost());
        }
        if kind != Kind::Read {
            state.change()?;
            state.log.push(format!("{} {name}", kind.word()));
            if state.is_read_only {
                return Err(errno(EROFS));
            }
        }
        let action = state.plans.strike(kind, name);
        match action {
            Some(Action::Hang) => {
                let ticket = state.releases;
                state.hung += 1;
                while state.releases == ticket && state.boot == boot {
                    state = self.0.released.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.hung -= 1;
            }
            Some(Action::Delay(delay)) => {
                let ticket = state.releases;
                let waits = |s: &mut State| s.releases == ticket && s.boot == boot;
                let waited = self.0.released.wait_timeout_while(state, delay, waits);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            other => return Ok((state, other)),
        }
        if state.boot == boot { Ok((state, None)) } else { Err(power_lost()) }
    }

    /// Cuts the power: of what was not synced any subset of sectors and any prefix of name changes
    /// survives. Open handles die and locks are gone.
    pub fn power_cut(&self, rng: &mut dyn RngCore) {
        let mut state = self.state();
        state.end_process();
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
        self.0.released.notify_all();
    }

    /// Cuts the power in the worst way: nothing that was not synced survives, neither bytes nor names.
    pub fn lose_unsynced(&self) {
        let mut state = self.state();
        state.end_process();
        state.names_pending.clear();
        state.names = state.names_durable.clone();
        for inode in state.inodes.values_mut() {
            inode.dirty.clear();
            inode.cached = inode.durable.clone();
        }
        self.0.released.notify_all();
    }

    /// Kills the process: nothing that was written is lost, handles and locks are gone.
    pub fn kill(&self) {
        self.state().end_process();
        self.0.released.notify_all();
    }

    /// Lets this many more writes, syncs and name changes happen; then every handle answers errors, until
    /// [`SimDisk::power_cut`] decides what was lost or [`SimDisk::kill`] says that nothing was.
    pub fn lose_power_after(&self, changes: u64) {
        self.state().changes_left = Some(changes);
    }

    /// Drops the page cache: readers see what is on the platter, as after memory pressure.
    pub fn evict(&self) {
        self.state().inodes.values_mut().for_each(SimInode::evict);
    }

    fn plan(&self, kinds: &'static [Kind], name: &str, skip: u64, action: Action) {
        self.state().plans.add(kinds, name, skip, action);
    }

    /// The next sync of a file whose name contains `name` fails once.
    pub fn fail_next_sync(&self, name: &str, fault: SyncFault) {
        self.plan(&[Kind::Sync, Kind::SyncFolder], name, 0, Action::Sync(fault));
    }

    /// After this many more syncs, of whatever files or folders, one fails.
    pub fn fail_sync_after(&self, syncs: u64, fault: SyncFault) {
        self.plan(&[Kind::Sync, Kind::SyncFolder], "", syncs, Action::Sync(fault));
    }

    /// The next operation of a kind on a file whose name contains `name` fails once, with an error number of
    /// Linux. A write that fails has written half; a sync that fails does what the file system does.
    pub fn fail_next(&self, kind: Kind, name: &str, error: i32) {
        self.plan(kind.only(), name, 0, Action::Fail(error));
    }

    /// After this many more changes, of whatever kind, one fails with an error number of Linux.
    pub fn fail_change_after(&self, changes: u64, error: i32) {
        self.plan(CHANGES, "", changes, Action::Fail(error));
    }

    /// Syncs of files whose name contains `name` do not return, until [`SimDisk::release`].
    pub fn hang_sync(&self, name: &str) {
        self.hang(Kind::Sync, name);
    }

    /// Operations of a kind on files whose name contains `name` do not return, until [`SimDisk::release`].
    pub fn hang(&self, kind: Kind, name: &str) {
        self.hang_after(0, kind, name);
    }

    /// As [`SimDisk::hang`], after so many operations of that kind on such files.
    pub fn hang_after(&self, operations: u64, kind: Kind, name: &str) {
        self.plan(kind.only(), name, operations, Action::Hang);
    }

    /// Operations of a kind on files whose name contains `name` take so much longer, until [`SimDisk::release`].
    pub fn delay(&self, kind: Kind, name: &str, delay: Duration) {
        self.plan(kind.only(), name, 0, Action::Delay(delay));
    }

    /// Lets go of everything that hangs or is slow, for good.
    pub fn release(&self) {
        let mut state = self.state();
        state.releases += 1;
        state.plans.release();
        self.0.released.notify_all();
    }

    /// How many operations hang now.
    pub fn hung(&self) -> usize {
        self.state().hung
    }

    /// The next write to a file whose name contains `name` lands at `offset` instead, and says Ok.
    pub fn misdirect_next_write(&self, name: &str, offset: u64) {
        self.plan(Kind::Write.only(), name, 0, Action::Misdirect(offset));
    }

    /// The kernel writes back what is dirty in a file, and the disk fails: the pages count as clean (or go back
    /// to what they were, on Btrfs), and the next sync reports it.
    pub fn fail_write_back(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        let reverted = state.file_system == FileSystem::Btrfs;
        state.inode_at(path)?.lose_dirty(reverted);
        Ok(())
    }

    /// Every change fails with EROFS, or works again: what ext4 does after its journal failed.
    pub fn set_read_only(&self, is_read_only: bool) {
        self.state().is_read_only = is_read_only;
    }

    /// Takes back all faults that wait for their operation; what hangs goes on.
    pub fn heal(&self) {
        let mut state = self.state();
        state.releases += 1;
        state.plans.clear();
        state.is_read_only = false;
        self.0.released.notify_all();
    }

    /// From now on writes that make files grow by more than this many bytes in all fail with ENOSPC. What is
    /// removed gives its bytes back.
    pub fn set_space_left(&self, bytes: Option<u64>) {
        self.state().space_left = bytes;
    }

    /// From now on no more than this many files can be made.
    pub fn set_inodes_left(&self, inodes: Option<u64>) {
        self.state().inodes_left = inodes;
    }

    /// Every read of the file fails, or works again.
    pub fn set_read_error(&self, path: &Path, fails: bool) -> io::Result<()> {
        self.state().inode_at(path)?.read_error = fails;
        Ok(())
    }

    /// Blocks of 4,096 bytes of the file cannot be read any more, until each is written in full.
    pub fn set_unreadable(&self, path: &Path, blocks: impl IntoIterator<Item = usize>) -> io::Result<()> {
        self.state().inode_at(path)?.unreadable.extend(blocks);
        Ok(())
    }

    /// Changes durable and cached bytes behind everybody's back.
    pub fn corrupt(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut state = self.state();
        let inode = state.inode_at(path)?;
        change(&mut inode.cached);
        inode.durable = inode.cached.clone();
        inode.dirty.clear();
        Ok(())
    }

    /// Changes durable bytes under a page cache that goes on showing what they were.
    pub fn corrupt_durable(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        change(&mut self.state().inode_at(path)?.durable);
        Ok(())
    }

    /// How many file syncs succeeded or failed so far.
    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// Changes in their order, as `write segment.001.wal` and `sync segment.001.wal`; also those that failed.
    pub fn operations(&self) -> Vec<String> {
        self.state().log.clone()
    }

    /// A disk with the same durable and cached contents that shares nothing with this one, and has no faults.
    pub fn fork(&self) -> Self {
        let state = self.state();
        let copy = State {
            locked: BTreeSet::new(),
            plans: Plans::default(),
            hung: 0,
            is_read_only: false,
            space_left: None,
            inodes_left: None,
            syncs: 0,
            changes_left: None,
            log: Vec::new(),
            ..state.clone()
        };
        Self(Arc::new(Shared { state: Mutex::new(copy), released: Condvar::new() }))
    }
}

impl State {
    fn inode_at(&mut self, path: &Path) -> io::Result<&mut SimInode> {
        let inode = *self.names.get(path).ok_or_else(|| not_found(path))?;
        self.inodes.get_mut(&inode).ok_or_else(|| not_found(path))
    }
}
