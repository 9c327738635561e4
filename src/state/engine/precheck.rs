//! Reads `current` and the manifest it names before lsm-tree does, and looks for the tables.
//!
//! lsm-tree writes a checksum of its manifest into `current` and does not check it: single flipped
//! bits there lost rows silently or aborted the process. Nothing is opened before this has passed.
//! When the tree then does not open all the same, [`find_damaged_table`] says which file it is.
//!
//! ```text
//! current: manifest id u64 LE | xxh3-128 of the file v{id}, LE | checksum type, 0 = xxh3
//! ```

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_128;

use super::direct::{self, Hashed};
use super::error::{is_full, synced};
use super::foreign::is_number;
use super::manifest::{self, ListedTable};
use super::{EngineError, folder};

/// Name of the file that names the manifest.
pub(crate) const CURRENT: &str = "current";
/// Name of the folder of tables.
pub(crate) const TABLES: &str = "tables";
/// Length of `current`, bytes.
const CURRENT_BYTES: usize = 25;

/// What was found in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No tree was ever here, or only its first empty manifest.
    Nothing,
    /// A tree with a sound manifest.
    Tree {
        /// The manifest's id.
        manifest_id: u64,
        /// The tables it names. Each has a file that is not empty.
        tables: Vec<ListedTable>,
    },
}

/// The content of `current`, checked for its form only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Current {
    pub(crate) manifest_id: u64,
    pub(crate) manifest_xxh3: u128,
}

impl Current {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Current, String> {
        let bytes: &[u8; CURRENT_BYTES] =
            bytes.try_into().map_err(|_| format!("has {} bytes instead of {CURRENT_BYTES}", bytes.len()))?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, hash @ .., kind] = bytes;
        if *kind != 0 {
            return Err(format!("has checksum type {kind}, only 0 (xxh3) is known"));
        }
        let hash: [u8; 16] = hash.as_slice().try_into().map_err(|_| "has a checksum that is cut short".to_owned())?;
        Ok(Current {
            manifest_id: u64::from_le_bytes([*a0, *a1, *a2, *a3, *a4, *a5, *a6, *a7]),
            manifest_xxh3: u128::from_le_bytes(hash),
        })
    }
}

/// The file of a table.
pub(crate) fn table_path(tree: &Path, id: u64) -> PathBuf {
    tree.join(TABLES).join(id.to_string())
}

/// Checks `folder` as far as `current`, the manifest and the presence of tables go.
///
/// Errors: `Damaged` names the file and what does not match; `Io` when it cannot be read for a reason
/// that is not the file's.
pub fn check(folder: &Path) -> Result<Found, EngineError> {
    let path = folder.join(CURRENT);
    let current = match fs::read(&path) {
        Ok(bytes) => Current::parse(&bytes).map_err(|why| EngineError::damaged_file("open", &path, why))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return check_without(folder),
        Err(error) => return Err(EngineError::read("open", &path, error)),
    };
    let path = folder.join(format!("v{}", current.manifest_id));
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(EngineError::damaged_file("open", &path, "is named by `current` and missing"));
        }
        Err(error) => return Err(EngineError::read("open", &path, error)),
    };
    if xxh3_128(&bytes) != current.manifest_xxh3 {
        return Err(EngineError::damaged_file("open", &path, "and its checksum in `current` do not match"));
    }
    let tables = manifest::tables(&bytes).map_err(|why| EngineError::damaged_file("open", &path, why))?;
    for table in &tables {
        check_present(&table_path(folder, table.id))?;
    }
    Ok(Found::Tree { manifest_id: current.manifest_id, tables })
}

fn check_present(path: &Path) -> Result<(), EngineError> {
    let damaged = |why| Err(EngineError::damaged_file("open", path, why));
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() => damaged("is in the manifest and is no file"),
        Ok(meta) if meta.len() == 0 => damaged("is in the manifest and empty"),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => damaged("is in the manifest and missing"),
        Err(error) => Err(EngineError::read("open", path, error)),
    }
}

/// Blocking. Reads the tables until one is not what the manifest says: the tree did not open, or
/// something in it could not be read, and lsm-tree does not say where. `None` when all are sound.
pub fn find_damaged_table(folder: &Path, tables: &[ListedTable]) -> Option<EngineError> {
    tables.iter().find_map(|table| {
        let path = table_path(folder, table.id);
        match direct::hash(&path, |_| ControlFlow::Continue(())) {
            Ok(Hashed::Whole(_, xxh3)) if xxh3 == table.xxh3 => None,
            Ok(_) => Some(EngineError::damaged_file("open", &path, "is not what its hash in the manifest says")),
            Err(error) => Some(EngineError::read("open", &path, error)),
        }
    })
}

/// Writes `current` and its manifest again, and syncs them.
///
/// The sync that was to make them durable may have failed just before the last process ended: then
/// they were read from the page cache, and the next power cut takes them back, after the log behind
/// them has been purged. Syncing them again would prove nothing, only writing does. Tables need none
/// of this: a manifest is written only after the sync of its tables has returned well.
///
/// With no room to write, the old file stays if the medium itself has these bytes: a node starts with
/// 0 bytes and 0 inodes free.
pub(crate) fn make_durable(folder: &Path, found: &Found) -> Result<(), EngineError> {
    let Found::Tree { manifest_id, .. } = found else {
        return Ok(());
    };
    for name in [format!("v{manifest_id}"), CURRENT.to_owned()] {
        let path = folder.join(name);
        let bytes = fs::read(&path).map_err(|e| EngineError::read("open", &path, e))?;
        match folder::replace_synced(&path, &bytes) {
            Ok(()) => {}
            Err(error) if is_full(&error) => keep_if_on_disk(&path, &bytes, &error)?,
            Err(error) => return Err(EngineError::io("open", error)),
        }
    }
    Ok(())
}

fn keep_if_on_disk(path: &Path, bytes: &[u8], full: &io::Error) -> Result<(), EngineError> {
    let (length, xxh3) = direct::hash_and_sync(path).map_err(|e| EngineError::read("open", path, e))?;
    if (length, xxh3) != (bytes.len() as u64, xxh3_128(bytes)) {
        return Err(EngineError::damaged_file("open", path, "reads otherwise from the disk than from memory"));
    }
    if let Some(folder) = path.parent() {
        synced(folder::sync(folder)).map_err(|e| EngineError::io("open", e))?;
    }
    tracing::warn!(error = %full, path = %path.display(), "no space to write it again; what is on the disk was compared");
    Ok(())
}

/// No `current`: either nothing was ever here, or a crash hit the creation of the empty tree. Any
/// table or later manifest means that `current` was lost, and lsm-tree would begin an empty tree
/// and delete the rest.
fn check_without(folder: &Path) -> Result<Found, EngineError> {
    let current = folder.join(CURRENT);
    for name in names(folder)? {
        if name.strip_prefix('v').is_some_and(|id| id != "0" && is_number(id)) {
            let why = format!("is missing, and there is a manifest {name}");
            return Err(EngineError::damaged_file("open", &current, why));
        }
    }
    if let Some(table) = names(&folder.join(TABLES))?.iter().find(|name| is_number(name)) {
        let why = format!("is missing, and there are tables ({table}, …)");
        return Err(EngineError::damaged_file("open", &current, why));
    }
    Ok(Found::Nothing)
}

/// Names in a folder, sorted; none when it does not exist.
fn names(folder: &Path) -> Result<Vec<String>, EngineError> {
    let failed = |e| EngineError::read("open", folder, e);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
