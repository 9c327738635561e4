//! How much room there is in the data folder, and what may still be written into it.
//!
//! ```text
//!            clear  low water      reserve      critical                     0
//!   ──────────┼────────┼──────────────┼────────────┼─────────────────────────┤ bytes or inodes free
//!     Room    │ (as before)│   Low    │        Reserved                      │
//!                                                  the ballast is let go
//! ```
//!
//! The process looks several times a second. Below low water clients' writes are refused before anything is
//! proposed, because every replica has to take what was proposed; retractions and what the cluster writes about
//! itself go on down to the reserve; below it only what Raft itself needs. All of it ends by itself once there is
//! half as much again as low water. Room that the ballast still wants counts as taken, so that letting it go
//! changes nothing for clients.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use crate::config::Config;

const MIB: u64 = 1024 * 1024;

/// Low water is at most this part of the disk, so that a small disk is not full when it is empty.
const LOW_PART_MAX: u64 = 4;
/// Low water without `storage.low_water_mb`: this part of the disk, at most [`LOW_BYTES_MAX`].
const LOW_PART: u64 = 50;
/// See [`LOW_PART`].
const LOW_BYTES_MAX: u64 = 1024 * MIB;
/// What a flush of the tree needs beside the memtable, with its manifest.
const FLUSH_BYTES: u64 = 8 * MIB;
/// Inodes: a flush with its checkpoint takes about ten, a segment one.
const LOW_INODES_MIN: u64 = 16;
/// Beyond this many more inodes help nobody.
const LOW_INODES_MAX: u64 = 1_000;
/// Low water for inodes between the two: this part of what there is.
const LOW_INODES_PART: u64 = 100;

/// What a file system has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this process may still write.
    pub bytes_free: u64,
    /// Bytes of the whole file system.
    pub bytes_total: u64,
    /// Inodes that may still be made; `u64::MAX` where there is no such number.
    pub inodes_free: u64,
    /// Inodes of the whole file system; 0 where there is no such number.
    pub inodes_total: u64,
}

/// Asks for it.
pub trait SpaceProbe: Send + Sync + 'static {
    /// What the file system of `dir` has now.
    fn look(&self, dir: &Path) -> io::Result<Space>;
}

/// The operating system's word.
#[derive(Debug, Default)]
pub struct RealSpace;

impl SpaceProbe for RealSpace {
    fn look(&self, dir: &Path) -> io::Result<Space> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(Space {
            bytes_free: stat.f_bavail.saturating_mul(stat.f_frsize),
            bytes_total: stat.f_blocks.saturating_mul(stat.f_frsize),
            // File systems that make inodes as they are needed say 0 of 0.
            inodes_free: if stat.f_files == 0 { u64::MAX } else { stat.f_favail },
            inodes_total: stat.f_files,
        })
    }
}

/// How much may be written. In this order: each takes what the next one refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Level {
    /// Everything.
    #[default]
    Room,
    /// Retractions, and what the cluster writes about itself.
    Low,
    /// Only what Raft writes by itself, and what other nodes have proposed.
    Reserved,
}

/// Where the levels begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Clients' writes are refused below this.
    pub low_bytes: u64,
    /// And taken again from this on.
    pub clear_bytes: u64,
    /// Below this nothing new is proposed.
    pub reserve_bytes: u64,
    /// Below this the ballast is let go.
    pub critical_bytes: u64,
    /// The same for inodes.
    pub low_inodes: u64,
    /// The same for inodes.
    pub clear_inodes: u64,
    /// The same for inodes.
    pub reserve_inodes: u64,
    /// The same for inodes.
    pub critical_inodes: u64,
}

impl Marks {
    /// The marks for a disk of this size.
    pub fn of(config: &Config, space: &Space) -> Marks {
        let segment_bytes = config.wal.segment_size_mb.saturating_mul(MIB);
        let low_bytes = match config.storage.low_water_mb {
            // The next segment and a flush must fit whatever the size of the disk, if that is possible at all.
            0 => (space.bytes_total / LOW_PART)
                .min(LOW_BYTES_MAX)
                .max(segment_bytes.saturating_add(config.storage.memtable_mb * MIB).saturating_add(FLUSH_BYTES)),
            mib => mib.saturating_mul(MIB),
        }
        .min(space.bytes_total / LOW_PART_MAX);
        let low_inodes = (space.inodes_total / LOW_INODES_PART)
            .clamp(LOW_INODES_MIN, LOW_INODES_MAX)
            .min(space.inodes_total / LOW_PART_MAX);
        Marks {
            low_bytes,
            clear_bytes: low_bytes + low_bytes / 2,
            reserve_bytes: low_bytes / 2,
            critical_bytes: segment_bytes.saturating_add(FLUSH_BYTES).min(low_bytes / 4),
            low_inodes,
            clear_inodes: low_inodes + low_inodes / 2,
            reserve_inodes: low_inodes / 2,
            critical_inodes: (low_inodes / 4).max(1),
        }
    }

    /// The level after `before`. `bytes_free`: without what the ballast still wants. `blocked`: something
    /// could not get the room it asked for, whatever the numbers say (a quota, for example).
    pub fn next(&self, before: Level, bytes_free: u64, inodes_free: u64, blocked: bool) -> Level {
        let (low, reserve) = (
            bytes_free < self.low_bytes || inodes_free < self.low_inodes,
            bytes_free < self.reserve_bytes || inodes_free < self.reserve_inodes,
        );
        let is_clear = bytes_free >= self.clear_bytes && inodes_free >= self.clear_inodes && !blocked;
        match (before, reserve, low || blocked) {
            (_, true, _) => Level::Reserved,
            (_, false, true) => Level::Low,
            (Level::Room, false, false) => Level::Room,
            (Level::Low | Level::Reserved, false, false) if is_clear => Level::Room,
            (Level::Low | Level::Reserved, false, false) => Level::Low,
        }
    }
}

/// What one node lacks, as other nodes and clients are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortage {
    /// Name of the node.
    pub node: String,
    /// Its data folder.
    pub data_dir: String,
    /// Bytes free there, less what the ballast wants.
    pub bytes_free: u64,
    /// Bytes that must be free before writes are taken again.
    pub bytes_wanted: u64,
    /// Inodes free there; `None` where there is no such number.
    pub inodes_free: Option<u64>,
    /// Inodes that must be free.
    pub inodes_wanted: u64,
    /// What could not get room although the numbers allow it.
    pub blocked: Option<String>,
}

impl Shortage {
    /// Bytes to be freed before writes go on.
    pub fn bytes_needed(&self) -> u64 {
        self.bytes_wanted.saturating_sub(self.bytes_free)
    }

    /// Inodes to be freed before writes go on.
    pub fn inodes_needed(&self) -> u64 {
        self.inodes_free.map_or(0, |free| self.inodes_wanted.saturating_sub(free))
    }
}

impl std::fmt::Display for Shortage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shortage { node, data_dir, bytes_free, bytes_wanted, .. } = self;
        write!(f, "the disk of {node} is full: ")?;
        if let Some(inodes_free) = self.inodes_free.filter(|_| self.inodes_needed() > 0) {
            write!(f, "{inodes_free} inodes are free and {} are needed, ", self.inodes_wanted)?;
        }
        write!(f, "{bytes_free} bytes are free and {bytes_wanted} are needed")?;
        if let Some(blocked) = &self.blocked {
            write!(f, "; {blocked}")?;
        }
        match (self.bytes_needed(), self.inodes_needed()) {
            // Something that asked for room has not asked again yet; or a quota holds it back.
            (0, 0) => return write!(f, " (`df -h {data_dir}; df -i {data_dir}`, and quotas)"),
            (0, inodes) => write!(f, ". Remove at least {inodes} files")?,
            (bytes, 0) => write!(f, ". Free at least {bytes} bytes")?,
            (bytes, inodes) => write!(f, ". Free at least {bytes} bytes and remove at least {inodes} files")?,
        }
        write!(f, " on the disk of {data_dir} (`df -h {data_dir}; df -i {data_dir}`)")
    }
}

/// What a node says about its room: to its peers, and to itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomReport {
    /// What may be written.
    pub level: Level,
    /// What is lacking, unless the level is `Room`.
    pub shortage: Option<Shortage>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes_free: u64, bytes_total: u64) -> Space {
        Space { bytes_free, bytes_total, inodes_free: 900, inodes_total: 1_000 }
    }

    fn marks(bytes_total: u64, low_water_mb: u64) -> Marks {
        let mut config = Config::default();
        config.storage.low_water_mb = low_water_mb;
        Marks::of(&config, &disk(0, bytes_total))
    }

    #[test]
    fn low_water_grows_with_the_disk_between_what_is_needed_and_a_gib() {
        assert_eq!(marks(40 * MIB, 0).low_bytes, 10 * MIB, "a quarter of a very small disk");
        assert_eq!(marks(1024 * MIB, 0).low_bytes, 88 * MIB, "a segment, a memtable and 8 MiB");
        assert_eq!(marks(20 * 1024 * MIB, 0).low_bytes, 20 * 1024 * MIB / 50);
        assert_eq!(marks(9_000 * 1024 * MIB, 0).low_bytes, 1024 * MIB);
        assert_eq!(marks(9_000 * 1024 * MIB, 7).low_bytes, 7 * MIB, "as configured");
    }

    #[test]
    fn the_marks_lie_in_their_order_whatever_the_disk() {
        for total in [0, 1, MIB, 40 * MIB, 3 << 30, 1 << 50] {
            let m = marks(total, 0);
            assert!(m.critical_bytes <= m.reserve_bytes && m.reserve_bytes <= m.low_bytes, "{m:?}");
            assert!(m.low_bytes <= m.clear_bytes && m.clear_bytes <= total, "{m:?}");
            assert!(m.critical_inodes <= m.low_inodes && m.low_inodes <= m.clear_inodes, "{m:?}");
        }
    }

    #[test]
    fn full_comes_at_low_water_and_goes_only_at_half_as_much_again() {
        let m = marks(40 * MIB, 0);
        let mut level = Level::Room;
        for (free_mib, expected) in [
            (12, Level::Room),
            (10, Level::Room),
            (9, Level::Low),
            (4, Level::Reserved),
            (6, Level::Low),
            (14, Level::Low),
            (15, Level::Room),
            (11, Level::Room),
            (0, Level::Reserved),
            (40, Level::Room),
        ] {
            level = m.next(level, free_mib * MIB, 900, false);
            assert_eq!(level, expected, "{free_mib} MiB free");
        }
    }

    #[test]
    fn inodes_count_like_bytes_and_so_does_a_reservation_that_fails() {
        let m = marks(40 * MIB, 0);
        assert_eq!(m.next(Level::Room, 40 * MIB, 15, false), Level::Low);
        assert_eq!(m.next(Level::Low, 40 * MIB, 23, false), Level::Low);
        assert_eq!(m.next(Level::Low, 40 * MIB, 24, false), Level::Room);
        assert_eq!(m.next(Level::Room, 40 * MIB, 0, false), Level::Reserved);
        assert_eq!(m.next(Level::Room, 40 * MIB, 900, true), Level::Low);
        assert_eq!(m.next(Level::Low, 40 * MIB, 900, true), Level::Low);
    }

    #[test]
    fn a_file_system_without_a_number_of_inodes_never_lacks_any() {
        let space = Space { bytes_free: 5, bytes_total: 40 * MIB, inodes_free: u64::MAX, inodes_total: 0 };
        let m = Marks::of(&Config::default(), &space);
        assert_eq!(m.next(Level::Room, 40 * MIB, space.inodes_free, false), Level::Room);
    }

    #[test]
    fn a_shortage_names_what_is_free_what_is_needed_and_the_next_command() {
        let mut shortage = Shortage {
            node: "node-2".into(),
            data_dir: "/data".into(),
            bytes_free: 100,
            bytes_wanted: 150,
            inodes_free: Some(3),
            inodes_wanted: 24,
            blocked: None,
        };
        let text = shortage.to_string();
        for part in
            ["node-2", "100 bytes are free and 150", "3 inodes are free and 24", "at least 50 bytes", "21 files"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains("df -h /data; df -i /data"), "{text}");
        shortage.bytes_free = 150;
        shortage.inodes_free = None;
        shortage.blocked = Some("the tree waits".into());
        assert!(
            shortage.to_string().ends_with("; the tree waits (`df -h /data; df -i /data`, and quotas)"),
            "{shortage}"
        );
        assert!(!shortage.to_string().contains("inodes"), "{shortage}");
    }
}
