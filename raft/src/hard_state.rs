//! What Raft must never forget and no peer can restore: the vote, and how far the log was purged.
//!
//! Kept in two files, written and synced one after the other, so that one of them is always whole.
//! The newer valid copy wins at start and is written over the other before Raft runs.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    codec,
    disk::{Disk, read_all, read_all_uncached},
    types::{LogId, Vote},
};

/// Names of the two copies.
pub const COPY_NAMES: [&str; 2] = ["hard-state.1", "hard-state.2"];

const MAGIC: [u8; 8] = *b"STEMHARD";
const FORMAT_VERSION: u32 = 1;
/// Each copy fills one sector, which a disk writes whole.
const COPY_BYTES: usize = 512;
const HEADER_BYTES: usize = 16;
const CRC_AT: usize = COPY_BYTES - 4;

/// The state itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardState {
    /// Counts up with each save.
    pub sequence: u64,
    /// The vote, `None` before the first.
    pub vote: Option<Vote>,
    /// Entries up to this one may be missing.
    pub purged: Option<LogId>,
    /// Index of the first entry that the log ever held: 0 for every log that Raft itself began.
    pub start: u64,
    /// Number of the newest segment whose header was synced: a log that ends before it has lost files.
    pub segment_last: u64,
}

/// What was found at start.
#[derive(Debug, PartialEq, Eq)]
pub enum FoundState {
    /// Neither file was ever written: missing, empty, or zeros from end to end, as a first start leaves them
    /// that ends between the making of a file and its sync.
    Absent,
    /// The newest valid copy, and which copies must be written again before they count.
    Valid(HardState),
    /// At least one exists and none is valid.
    Damaged,
    /// A newer program wrote it.
    NewerFormat(u32),
}

impl HardState {
    fn encode(&self) -> io::Result<Vec<u8>> {
        let body = codec::encode(self).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(COPY_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        if bytes.len() > CRC_AT {
            return Err(io::Error::other("the hard state does not fit its sector"));
        }
        bytes.resize(CRC_AT, 0);
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        Ok(bytes)
    }

    fn decode(bytes: &[u8]) -> FoundState {
        if bytes.iter().all(|b| *b == 0) {
            return FoundState::Absent;
        }
        let parts = (bytes.get(..CRC_AT), bytes.get(CRC_AT..COPY_BYTES), bytes.get(8..12), bytes.get(12..16));
        let (Some(body), Some(sum), Some(format), Some(len)) = parts else {
            return FoundState::Damaged;
        };
        if bytes.get(..8) != Some(&MAGIC) || sum != crc32fast::hash(body).to_le_bytes() {
            return FoundState::Damaged;
        }
        let number = |b: &[u8]| b.try_into().map(u32::from_le_bytes).unwrap_or_default();
        if number(format) != FORMAT_VERSION {
            return FoundState::NewerFormat(number(format));
        }
        let body = body.get(HEADER_BYTES..HEADER_BYTES + number(len) as usize);
        match body.map(codec::decode) {
            Some(Ok(state)) => FoundState::Valid(state),
            Some(Err(_)) | None => FoundState::Damaged,
        }
    }

    /// Reads both copies.
    pub fn load(disk: &dyn Disk, dir: &Path) -> io::Result<FoundState> {
        let mut best: Option<HardState> = None;
        let mut damaged = false;
        for name in COPY_NAMES {
            let file = match disk.open(&dir.join(name)) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            // A copy that cannot be read is a lost copy; the other one decides.
            // Past the page cache: after a sync that failed it shows a vote that the device never got.
            let found = match read_all_uncached(&*file) {
                Ok(bytes) => Self::decode(&bytes),
                Err(error) => {
                    tracing::warn!(%error, name, "a copy of the hard state cannot be read");
                    FoundState::Damaged
                }
            };
            match found {
                FoundState::Valid(state) => {
                    if best.as_ref().is_none_or(|b| b.sequence < state.sequence) {
                        best = Some(state);
                    }
                }
                FoundState::NewerFormat(format) => return Ok(FoundState::NewerFormat(format)),
                FoundState::Damaged => damaged = true,
                FoundState::Absent => {}
            }
        }
        Ok(match best {
            Some(state) => FoundState::Valid(state),
            None if damaged => FoundState::Damaged,
            None => FoundState::Absent,
        })
    }

    fn copy_is_valid(disk: &dyn Disk, path: &Path) -> bool {
        let bytes = disk.open(path).and_then(|file| read_all(&*file));
        bytes.is_ok_and(|bytes| matches!(Self::decode(&bytes), FoundState::Valid(_)))
    }

    /// Writes and syncs one copy, then the other. Returns when both are durable.
    pub fn save(&self, disk: &dyn Disk, dir: &Path, timed_sync: &mut SyncFn<'_>) -> Result<(), (String, io::Error)> {
        let [first, second] = COPY_NAMES;
        // The only valid copy is overwritten last: a write that fails may leave anything.
        let second_is_lost = !Self::copy_is_valid(disk, &dir.join(second));
        let order = if second_is_lost { [second, first] } else { [first, second] };
        for name in order {
            let fail = |e| (name.to_owned(), e);
            let bytes = self.encode().map_err(fail)?;
            let path = dir.join(name);
            let (file, fresh) = match disk.open(&path) {
                // A part of a block that cannot be read cannot be written either: the copy is made anew.
                Ok(file) if read_all(&*file).is_err() => (disk.create(&path).map_err(fail)?, true),
                Ok(file) => (file, false),
                Err(e) if e.kind() == io::ErrorKind::NotFound => (disk.create(&path).map_err(fail)?, true),
                Err(e) => return Err(fail(e)),
            };
            file.write_at(&bytes, 0).map_err(fail)?;
            timed_sync(name, &mut || file.sync_data()).map_err(fail)?;
            if fresh {
                disk.sync_dir(dir).map_err(fail)?;
            }
        }
        Ok(())
    }
}

/// Runs a sync of the named file, so that every one of them is counted and timed in one place.
pub type SyncFn<'a> = dyn FnMut(&str, &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> + 'a;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::disk::sim::SimDisk;
    use crate::frame::log_id;

    fn state(sequence: u64) -> HardState {
        HardState { sequence, vote: Some(Vote::new(7, 2)), purged: Some(log_id(3, 41)), start: 0, segment_last: 9 }
    }

    fn sync(_: &str, f: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        f()
    }

    #[test]
    fn each_single_flipped_bit_in_one_copy_leaves_the_other() {
        let dir = Path::new("/wal");
        let sim = SimDisk::new();
        let disk = sim.shared();
        state(5).save(&*disk, dir, &mut sync).unwrap();
        for name in COPY_NAMES {
            for bit in 0..COPY_BYTES * 8 {
                let copy = sim.fork();
                copy.corrupt(&dir.join(name), |b| b[bit / 8] ^= 1 << (bit % 8)).unwrap();
                assert_eq!(HardState::load(&*copy.shared(), dir).unwrap(), FoundState::Valid(state(5)));
            }
        }
    }

    #[test]
    fn both_copies_damaged_are_not_mistaken_for_none() {
        let dir = Path::new("/wal");
        let sim = SimDisk::new();
        state(5).save(&*sim.shared(), dir, &mut sync).unwrap();
        let [first, second] = COPY_NAMES;
        sim.corrupt(&dir.join(first), |b| b.clear()).unwrap();
        sim.corrupt(&dir.join(second), |b| b.truncate(100)).unwrap();
        assert_eq!(HardState::load(&*sim.shared(), dir).unwrap(), FoundState::Damaged);
    }

    #[test]
    fn the_only_valid_copy_is_overwritten_last() {
        let dir = Path::new("/wal");
        for (lost, kept) in [(0, 1), (1, 0)] {
            let sim = SimDisk::new();
            let disk = sim.shared();
            state(5).save(&*disk, dir, &mut sync).unwrap();
            sim.corrupt(&dir.join(COPY_NAMES[lost]), |b| b.fill(9)).unwrap();
            let before = sim.operations().len();
            state(6).save(&*disk, dir, &mut sync).unwrap();
            let order = [lost, kept].map(|c| [format!("write {}", COPY_NAMES[c]), format!("sync {}", COPY_NAMES[c])]);
            assert_eq!(sim.operations()[before..], order.concat());
        }
    }

    #[test]
    fn a_power_cut_while_saving_leaves_the_old_or_the_new_state() {
        use rand::{SeedableRng, rngs::StdRng};
        let dir = Path::new("/wal");
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let sim = SimDisk::new();
            let disk = sim.shared();
            state(5).save(&*disk, dir, &mut sync).unwrap();
            let mut left = seed % 3;
            let _ = state(6).save(&*disk, dir, &mut |_, f| {
                if left == 0 {
                    return Err(io::Error::other("cut"));
                }
                left -= 1;
                f()
            });
            sim.power_cut(&mut rng);
            let found = HardState::load(&*sim.shared(), dir).unwrap();
            let FoundState::Valid(found) = found else { panic!("lost: {found:?}") };
            assert!(found == state(5) || found == state(6));
            assert!(seed % 3 != 2 || found == state(6), "saved and lost");
        }
    }
}
