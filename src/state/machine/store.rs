//! `<data>/kv`: the folder of the tree, and how it is replaced in one step.
//!
//! ```text
//! kv/active        number of the folder that counts: u64 LE | xxh3-128 of those 8 bytes, LE
//! kv/g1/           the tree
//! ```
//!
//! A received tree is built in the next folder and counts from the moment `active` names it; a
//! crash before that leaves the old one, a crash after it the new one. Every tree has a path of its
//! own because lsm-tree opens and deletes tables by path: readers of a replaced tree would find, or
//! remove, the tables of its successor.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use xxhash_rust::xxh3::xxh3_128;

use crate::state::engine::lsm::lock;
use crate::state::engine::precheck::{self, Found};
use crate::state::engine::{EngineError, folder, foreign, replace};

const POINTER: &str = "active";
const POINTER_BYTES: usize = 24;

pub(super) struct StoreFolder {
    dir: PathBuf,
    numbers: Mutex<Numbers>,
}

struct Numbers {
    active: u64,
    /// Never used before in this folder, so that no path means two trees.
    next: u64,
}

/// A folder for a tree that does not count yet.
pub(super) struct NewFolder {
    pub(super) dir: PathBuf,
    number: u64,
}

impl StoreFolder {
    /// Blocking. Reads the pointer, or makes the first one.
    pub(super) fn open(data_dir: &Path) -> Result<StoreFolder, EngineError> {
        let failed = |e| EngineError::io("open", e);
        let dir = data_dir.join("kv");
        folder::create_synced(&dir).map_err(failed)?;
        let numbers = present(&dir).map_err(failed)?;
        let highest = numbers.iter().max().copied().unwrap_or(0);
        let active = match fs::read(dir.join(POINTER)) {
            Ok(bytes) => parse_pointer(&bytes).ok_or_else(|| {
                let why = format!("is not what its hash says ({} bytes)", bytes.len());
                EngineError::damaged_file("open", &dir.join(POINTER), why)
            })?,
            // The pointer is older than any tree, so trees without it have lost it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && highest == 0 => {
                write_pointer(&dir, 1).map_err(failed)?;
                1
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(EngineError::damaged_file("open", &dir.join(POINTER), "is missing, and there are trees"));
            }
            Err(error) => return Err(EngineError::read("open", &dir.join(POINTER), error)),
        };
        if highest > 0 && !numbers.contains(&active) {
            let tree = dir.join(format!("g{active}"));
            return Err(EngineError::damaged_file("open", &tree, "is the tree that counts, and missing"));
        }
        let next = highest.max(active) + 1;
        Ok(StoreFolder { dir, numbers: Mutex::new(Numbers { active, next }) })
    }

    /// Blocking, changes nothing. False when no tree was begun in the folder that counts, or no folder
    /// counts; true too when what is there is damaged.
    pub(super) fn has_tree(data_dir: &Path) -> Result<bool, EngineError> {
        let dir = data_dir.join("kv");
        let number = match fs::read(dir.join(POINTER)) {
            Ok(bytes) => parse_pointer(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return match present(&dir) {
                    Ok(numbers) => Ok(!numbers.is_empty()),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                    Err(error) => Err(EngineError::read("open", &dir, error)),
                };
            }
            Err(error) => return Err(EngineError::read("open", &dir.join(POINTER), error)),
        };
        let Some(number) = number else { return Ok(true) };
        precheck::check(&dir.join(format!("g{number}"))).map(|found| found != Found::Nothing)
    }

    /// The tree that counts.
    pub(super) fn active(&self) -> PathBuf {
        let number = lock(&self.numbers).active;
        self.tree(number)
    }

    /// Blocking. Removes trees that a crash left: half-made ones and replaced ones. Only with the
    /// active tree's lock held.
    pub(super) fn remove_others(&self) {
        let active = lock(&self.numbers).active;
        for number in present(&self.dir).unwrap_or_default() {
            if number != active
                && let Err(error) = foreign::remove_tree(&self.tree(number))
            {
                tracing::warn!(%error, number, "a replaced tree stays");
            }
        }
    }

    /// Blocking. An empty folder for the next tree.
    pub(super) fn new_folder(&self) -> Result<NewFolder, EngineError> {
        let number = {
            let mut numbers = lock(&self.numbers);
            numbers.next += 1;
            numbers.next - 1
        };
        let dir = self.tree(number);
        folder::create_synced(&dir).map_err(|e| EngineError::io("install", e))?;
        Ok(NewFolder { dir, number })
    }

    /// Blocking. From here on `folder` is the tree that counts.
    pub(super) fn activate(&self, folder: &NewFolder) -> Result<(), EngineError> {
        write_pointer(&self.dir, folder.number).map_err(|e| EngineError::io("install", e))?;
        lock(&self.numbers).active = folder.number;
        Ok(())
    }

    /// The file that names the tree that counts.
    pub(super) fn pointer_path(&self) -> PathBuf {
        self.dir.join(POINTER)
    }

    /// What it should hold.
    pub(super) fn pointer(&self) -> Vec<u8> {
        replace::pointer(lock(&self.numbers).active)
    }

    /// Blocking. True when the file holds a sound pointer that is not this one.
    pub(super) fn pointer_is_another(&self, expected: &[u8]) -> bool {
        fs::read(self.pointer_path()).is_ok_and(|found| found != expected && parse_pointer(&found).is_some())
    }

    /// Blocking. What is in the folder and not of it.
    pub(super) fn foreign_files(&self) -> Vec<PathBuf> {
        foreign::list(&self.dir, |name| name == POINTER || tree_number(name).is_some()).unwrap_or_default()
    }

    /// True when this many bytes are free, and when nobody can tell.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        rustix::fs::statvfs(&self.dir).map_or(true, |stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= bytes)
    }

    fn tree(&self, number: u64) -> PathBuf {
        self.dir.join(format!("g{number}"))
    }
}

/// Numbers of the trees in a `kv` folder.
pub(super) fn present(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            numbers.extend(tree_number(&entry.file_name().to_string_lossy()));
        }
    }
    Ok(numbers)
}

fn tree_number(name: &str) -> Option<u64> {
    name.strip_prefix('g').filter(|number| foreign::is_number(number))?.parse().ok()
}

fn write_pointer(dir: &Path, number: u64) -> io::Result<()> {
    folder::replace_synced(&dir.join(POINTER), &replace::pointer(number))
}

fn parse_pointer(bytes: &[u8]) -> Option<u64> {
    let bytes: &[u8; POINTER_BYTES] = bytes.try_into().ok()?;
    let (number, hash) = bytes.split_first_chunk::<8>()?;
    (xxh3_128(number).to_le_bytes().as_slice() == hash).then(|| u64::from_le_bytes(*number))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_the_pointer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = StoreFolder::open(dir.path()).unwrap();
        fs::create_dir(store.active()).unwrap();
        let path = dir.path().join("kv/active");
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, flipped).unwrap();
            assert!(StoreFolder::open(dir.path()).is_err(), "bit {bit}");
        }
        fs::remove_file(&path).unwrap();
        assert!(StoreFolder::open(dir.path()).is_err(), "a tree without a pointer");
    }

    #[test]
    fn a_half_made_tree_is_discarded_and_its_number_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = StoreFolder::open(dir.path()).unwrap();
        fs::create_dir(store.active()).unwrap();
        let half = store.new_folder().unwrap();
        assert!(half.dir.ends_with("g2"));
        let store = StoreFolder::open(dir.path()).unwrap();
        assert!(store.active().ends_with("g1"));
        let next = store.new_folder().unwrap();
        assert!(next.dir.ends_with("g3"));
        store.remove_others();
        assert!(!half.dir.exists() && store.active().exists());
        let whole = store.new_folder().unwrap();
        store.activate(&whole).unwrap();
        let store = StoreFolder::open(dir.path()).unwrap();
        assert!(store.active().ends_with("g4"));
        store.remove_others();
        assert!(!dir.path().join("kv/g1").exists());
    }
}
