//! What can go wrong on the simulated disk, and when.

use std::{io, time::Duration};

/// What the next sync of a file does instead of succeeding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncFault {
    /// ext4: the error is reported once, the pages count as clean, readers go on seeing the new data, and a second
    /// sync succeeds without having written anything.
    PagesMarkedClean,
    /// XFS: the same, and every other handle that was open then gets the error at its own next sync, once.
    ReportedPerOpenFile,
    /// Btrfs: the error is reported and readers see the old data again.
    ContentsReverted,
    /// This sync returns Ok and has written nothing; the error comes with the next one. What it covered is lost:
    /// one log alone cannot survive this, a quorum of three can.
    ReportedLate,
}

/// How a file system behaves after a sync that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileSystem {
    /// See [`SyncFault::PagesMarkedClean`].
    #[default]
    Ext4,
    /// See [`SyncFault::ReportedPerOpenFile`].
    Xfs,
    /// See [`SyncFault::ContentsReverted`].
    Btrfs,
}

impl FileSystem {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    /// What a failed sync does to the page cache.
    pub fn sync_fault(self) -> SyncFault {
        match self {
            Self::Ext4 => SyncFault::PagesMarkedClean,
            Self::Xfs => SyncFault::ReportedPerOpenFile,
            Self::Btrfs => SyncFault::ContentsReverted,
        }
    }
}

/// Kinds of operations. All but [`Kind::Read`] change the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Makes a file.
    Create,
    /// Takes space.
    Reserve,
    /// Writes bytes.
    Write,
    /// Makes a file's bytes durable.
    Sync,
    /// Renames a file; faults name its new name.
    Rename,
    /// Unlinks a file.
    Remove,
    /// Makes names durable; its file name is `folder`.
    SyncFolder,
    /// Reads bytes.
    Read,
}

/// Kinds that change the disk.
pub(super) const CHANGES: &[Kind] =
    &[Kind::Create, Kind::Reserve, Kind::Write, Kind::Sync, Kind::Rename, Kind::Remove, Kind::SyncFolder];

impl Kind {
    /// The kind alone.
    pub(super) fn only(self) -> &'static [Self] {
        match self {
            Self::Create => &[Self::Create],
            Self::Reserve => &[Self::Reserve],
            Self::Write => &[Self::Write],
            Self::Sync => &[Self::Sync],
            Self::Rename => &[Self::Rename],
            Self::Remove => &[Self::Remove],
            Self::SyncFolder => &[Self::SyncFolder],
            Self::Read => &[Self::Read],
        }
    }

    /// The word in [`super::SimDisk::operations`].
    pub fn word(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Reserve => "reserve",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Rename => "rename",
            Self::Remove => "remove",
            Self::SyncFolder => "sync",
            Self::Read => "read",
        }
    }
}

/// What an operation meets.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    /// It fails with this errno, once.
    Fail(i32),
    /// A sync goes wrong in this way, once.
    Sync(SyncFault),
    /// A write lands here instead, once.
    Misdirect(u64),
    /// It does not return until it is released. Every one of them.
    Hang,
    /// It takes this long. Every one of them.
    Delay(Duration),
}

impl Action {
    fn is_lasting(self) -> bool {
        matches!(self, Self::Hang | Self::Delay(_))
    }
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub kinds: &'static [Kind],
    /// Part of the file's name.
    pub name: String,
    /// Met by this many operations before it strikes.
    pub skip: u64,
    pub action: Action,
}

/// Faults that wait for their operation.
#[derive(Clone, Debug, Default)]
pub(super) struct Plans(Vec<Plan>);

impl Plans {
    pub fn add(&mut self, kinds: &'static [Kind], name: &str, skip: u64, action: Action) {
        self.0.push(Plan { kinds, name: name.to_owned(), skip, action });
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn release(&mut self) {
        self.0.retain(|plan| !plan.action.is_lasting());
    }

    /// What this operation meets.
    pub fn strike(&mut self, kind: Kind, name: &str) -> Option<Action> {
        let meets = |plan: &Plan| plan.kinds.contains(&kind) && name.contains(&plan.name);
        let mut struck = None;
        for (at, plan) in self.0.iter_mut().enumerate().filter(|(_, plan)| meets(plan)) {
            if plan.skip > 0 {
                plan.skip -= 1;
            } else if struck.is_none() {
                struck = Some((at, plan.action));
            }
        }
        let (at, action) = struck?;
        if !action.is_lasting() {
            self.0.remove(at);
        }
        Some(action)
    }
}

pub(super) const EIO: i32 = 5;
pub(super) const ENOSPC: i32 = 28;
pub(super) const EROFS: i32 = 30;

/// The error with the operating system's words.
pub(super) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
