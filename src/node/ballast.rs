//! `<data>/ballast`: room that is taken while there is plenty, to be let go when there is none.
//!
//! Really allocated, piece by piece and only while the disk has room; its content means nothing. A node that
//! starts or runs without room removes it and says so; it is made again when there is room for it and for
//! clients. Losing it harms nothing: it is never synced, and whoever needs its bytes at once may delete it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use super::space::{Level, Marks, Space};
use crate::config::Config;

const MIB: u64 = 1024 * 1024;

/// Name of the file in the data folder.
pub const FILE: &str = "ballast";

/// Part of the disk that the ballast takes at most.
const PART_MAX: u64 = 100;

/// Taken with one step, so that neither the disk's other users nor a slow file system notice it much.
const STEP_BYTES: u64 = 16 * MIB;

/// Zeros are written in pieces of this size where a file system cannot allocate.
const ZERO_BYTES: u64 = MIB;

/// What to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Leave it as it is.
    Keep,
    /// Make it this long.
    Grow {
        /// Bytes.
        to: u64,
    },
    /// Remove it.
    LetGo,
}

/// Bytes that the ballast should have on a disk of this size.
pub fn wanted_bytes(config: &Config, space: &Space) -> u64 {
    (space.bytes_total / PART_MAX).min(config.storage.ballast_mb.saturating_mul(MIB))
}

/// Decides. `present`: its bytes now. Pure.
pub fn decide(space: &Space, marks: &Marks, level: Level, present: u64, wanted: u64) -> Step {
    let critical = space.bytes_free < marks.critical_bytes || space.inodes_free < marks.critical_inodes;
    if critical {
        return if present > 0 { Step::LetGo } else { Step::Keep };
    }
    if level != Level::Room || present >= wanted {
        return Step::Keep;
    }
    let to = wanted.min(present.saturating_add(STEP_BYTES));
    // Half as much again as low water stays free: the ballast must never be what makes a disk full.
    if space.bytes_free.saturating_sub(to - present) < marks.clear_bytes {
        return Step::Keep;
    }
    Step::Grow { to }
}

/// The file.
#[derive(Debug)]
pub struct Ballast {
    path: PathBuf,
    bytes: u64,
    /// A file system error that was no want of room: it is not tried again in this process.
    gave_up: bool,
}

impl Ballast {
    /// Finds what an earlier process left.
    pub fn find(data_dir: &Path) -> Ballast {
        use std::os::unix::fs::MetadataExt;
        let path = data_dir.join(FILE);
        // As many bytes as the disk really keeps for it.
        let bytes = fs::symlink_metadata(&path).map_or(0, |meta| meta.len().min(meta.blocks() * 512));
        Ballast { path, bytes, gave_up: false }
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocking. Does the step; true when it was let go.
    pub fn perform(&mut self, step: Step) -> bool {
        match step {
            Step::Keep => false,
            Step::Grow { .. } if self.gave_up => false,
            Step::Grow { to } => {
                match self.grow(to) {
                    Ok(()) => self.bytes = to,
                    Err(error) if super::files::is_full(&error) => {
                        tracing::debug!(%error, "the ballast could not be made longer");
                    }
                    Err(error) => {
                        self.gave_up = true;
                        tracing::warn!(%error, path = %self.path.display(), "there is no ballast: it cannot be made");
                    }
                }
                false
            }
            Step::LetGo => match fs::remove_file(&self.path) {
                Ok(()) => {
                    self.bytes = 0;
                    true
                }
                Err(error) => {
                    if error.kind() == io::ErrorKind::NotFound {
                        self.bytes = 0;
                    }
                    tracing::warn!(%error, path = %self.path.display(), "the ballast could not be let go");
                    false
                }
            },
        }
    }

    fn grow(&self, to: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let file = File::options().create(true).truncate(false).write(true).open(&self.path)?;
        match fallocate(&file, FallocateFlags::empty(), self.bytes, to - self.bytes) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let zeros = vec![0; usize::try_from(ZERO_BYTES).unwrap_or_default()];
                let mut at = self.bytes;
                while at < to {
                    let n = usize::try_from((to - at).min(ZERO_BYTES)).unwrap_or_default();
                    file.write_all_at(zeros.get(..n).unwrap_or_default(), at)?;
                    at += n as u64;
                }
                Ok(())
            }
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TOTAL: u64 = 4_000 * MIB;

    fn space(free_mib: u64, inodes_free: u64) -> Space {
        Space { bytes_free: free_mib * MIB, bytes_total: TOTAL, inodes_free, inodes_total: 10_000 }
    }

    fn marks() -> Marks {
        Marks::of(&Config::default(), &space(0, 0))
    }

    #[test]
    fn it_is_one_percent_of_the_disk_and_at_most_as_configured() {
        let mut config = Config::default();
        assert_eq!(wanted_bytes(&config, &space(0, 0)), 40 * MIB);
        config.storage.ballast_mb = 16;
        assert_eq!(wanted_bytes(&config, &space(0, 0)), 16 * MIB);
        config.storage.ballast_mb = 0;
        assert_eq!(wanted_bytes(&config, &space(0, 0)), 0);
    }

    #[test]
    fn it_grows_step_by_step_while_there_is_room_and_never_makes_the_disk_full() {
        let wanted = 40 * MIB;
        let decide =
            |free_mib, level, present_mib| decide(&space(free_mib, 900), &marks(), level, present_mib * MIB, wanted);
        assert_eq!(decide(3_000, Level::Room, 0), Step::Grow { to: 16 * MIB });
        assert_eq!(decide(3_000, Level::Room, 32), Step::Grow { to: wanted });
        assert_eq!(decide(3_000, Level::Room, 40), Step::Keep);
        assert_eq!(decide(3_000, Level::Low, 0), Step::Keep);
        let clear_mib = marks().clear_bytes / MIB;
        assert_eq!(decide(clear_mib + 15, Level::Room, 0), Step::Keep);
        assert_eq!(decide(clear_mib + 16, Level::Room, 0), Step::Grow { to: 16 * MIB });
    }

    #[test]
    fn it_is_let_go_when_bytes_or_inodes_run_out_and_not_before() {
        let low_mib = marks().low_bytes / MIB;
        for (free_mib, inodes, present, expected) in [
            (low_mib - 1, 900, 9, Step::Keep),
            (1, 900, 9, Step::LetGo),
            (3_000, 0, 9, Step::LetGo),
            (0, 0, 0, Step::Keep),
        ] {
            assert_eq!(decide(&space(free_mib, inodes), &marks(), Level::Low, present, 40 * MIB), expected);
        }
    }

    #[test]
    fn its_bytes_are_really_taken_and_given_back() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let mut ballast = Ballast::find(dir.path());
        assert_eq!(ballast.bytes(), 0);
        for to in [MIB, 3 * MIB] {
            assert!(!ballast.perform(Step::Grow { to }));
            assert_eq!(ballast.bytes(), to);
        }
        let meta = fs::metadata(dir.path().join(FILE)).unwrap();
        assert!(meta.len() == 3 * MIB && meta.blocks() * 512 >= 3 * MIB, "sparse: {} blocks", meta.blocks());
        assert_eq!(Ballast::find(dir.path()).bytes(), 3 * MIB);
        assert!(ballast.perform(Step::LetGo));
        assert_eq!((ballast.bytes(), Ballast::find(dir.path()).bytes()), (0, 0));
    }
}
