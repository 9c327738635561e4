//! The simulated disk as one process sees it: a power cut or kill ends that view.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, MutexGuard},
};

use super::{
    super::{Disk, DiskFile, FolderLock, FoundFile, Space},
    NameChange, SimDisk, SimInode, State, apply_name,
    faults::{Action, ENOSPC, Kind, errno},
    file::SimFile,
    file_name, not_found, power_lost,
};

pub(super) struct SimMount {
    pub(super) disk: SimDisk,
    pub(super) boot: u64,
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

impl SimMount {
    fn live(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.state();
        if state.boot == self.boot { Ok(state) } else { Err(power_lost()) }
    }

    /// A change begins; see [`SimDisk::begin`].
    fn change(&self, kind: Kind, name: &str) -> io::Result<MutexGuard<'_, State>> {
        let (state, action) = self.disk.begin(self.disk.state(), self.boot, kind, name)?;
        match action {
            Some(Action::Fail(number)) => Err(errno(number)),
            Some(Action::Sync(_)) => Err(errno(super::faults::EIO)),
            _ => Ok(state),
        }
    }

    fn rename_known(state: &mut State, change: NameChange) {
        state.free_replaced(&change);
        apply_name(&mut state.names, &change);
        state.names_pending.push(change);
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
            let bytes = state.inodes.get(inode).map(|i| i.cached.len() as u64).unwrap_or_default();
            found.push(FoundFile { name: file_name(path), bytes });
        }
        found.sort();
        Ok(found)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.live()?;
        let inode = *state.names.get(path).ok_or_else(|| not_found(path))?;
        Ok(SimFile::open(&self.disk, &state, inode))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.change(Kind::Create, &file_name(path))?;
        let is_new = !state.names.contains_key(path);
        match &mut state.inodes_left {
            Some(0) if is_new => return Err(errno(ENOSPC)),
            Some(left) if is_new => *left -= 1,
            _ => {}
        }
        let inode = state.inode_next;
        state.inode_next += 1;
        Self::rename_known(&mut state, NameChange::Create(path.to_owned(), inode));
        state.inodes.insert(inode, SimInode::default());
        Ok(SimFile::open(&self.disk, &state, inode))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.change(Kind::Rename, &file_name(to))?;
        if !state.names.contains_key(from) {
            return Err(not_found(from));
        }
        Self::rename_known(&mut state, NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.change(Kind::Remove, &file_name(path))?;
        if !state.names.contains_key(path) {
            return Err(not_found(path));
        }
        Self::rename_known(&mut state, NameChange::Remove(path.to_owned()));
        if let Some(left) = &mut state.inodes_left {
            *left += 1;
        }
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        let mut state = self.change(Kind::SyncFolder, "folder")?;
        state.names_pending.clear();
        state.names_durable = state.names.clone();
        Ok(())
    }

    fn space(&self, _dir: &Path) -> io::Result<Space> {
        let state = self.live()?;
        let used: u64 = state.names.values().filter_map(|i| state.inodes.get(i)).map(|i| i.cached.len() as u64).sum();
        let bytes_free = state.space_left.unwrap_or(super::ENDLESS_BYTES);
        Ok(Space {
            bytes_free,
            bytes_total: bytes_free.saturating_add(used),
            inodes_free: state.inodes_left.unwrap_or(u64::MAX),
        })
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn FolderLock>> {
        let mut state = self.live()?;
        if !state.locked.insert(path.to_owned()) {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, format!("{} is locked", path.display())));
        }
        Ok(Box::new(SimLock { disk: self.disk.clone(), path: path.to_owned(), boot: state.boot }))
    }
}
