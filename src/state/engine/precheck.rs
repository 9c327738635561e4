//! Reads `current` and the manifest it names before lsm-tree does.
//!
//! lsm-tree writes a checksum of its manifest into `current` and does not check it: single flipped
//! bits there lost rows silently or aborted the process. Nothing is opened before this has passed.
//!
//! ```text
//! current: manifest id u64 LE | xxh3-128 of the file v{id}, LE | checksum type, 0 = xxh3
//! ```

use std::fs;
use std::io;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_128;

use super::EngineError;

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
            bytes.try_into().map_err(|_| format!("{} bytes instead of {CURRENT_BYTES}", bytes.len()))?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, hash @ .., kind] = bytes;
        if *kind != 0 {
            return Err(format!("checksum type {kind}, only 0 (xxh3) is known"));
        }
        let hash: [u8; 16] = hash.as_slice().try_into().map_err(|_| "the checksum is cut short".to_owned())?;
        Ok(Current {
            manifest_id: u64::from_le_bytes([*a0, *a1, *a2, *a3, *a4, *a5, *a6, *a7]),
            manifest_xxh3: u128::from_le_bytes(hash),
        })
    }
}

/// Checks `folder` as far as `current` and the manifest go.
///
/// Errors: `Damaged` names the file and what does not match; `Io` when it cannot be read.
pub fn check(folder: &Path) -> Result<Found, EngineError> {
    let current = match fs::read(folder.join(CURRENT)) {
        Ok(bytes) => Current::parse(&bytes)
            .map_err(|why| EngineError::damaged("open", format!("{}: {why}", folder.join(CURRENT).display())))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return check_without(folder),
        Err(error) => return Err(EngineError::io("open", error)),
    };
    let manifest = folder.join(format!("v{}", current.manifest_id));
    let bytes = match fs::read(&manifest) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(EngineError::damaged(
                "open",
                format!("{} is named by `current` and missing", manifest.display()),
            ));
        }
        Err(error) => return Err(EngineError::io("open", error)),
    };
    if xxh3_128(&bytes) != current.manifest_xxh3 {
        return Err(EngineError::damaged(
            "open",
            format!("{} and its checksum in `current` do not match", manifest.display()),
        ));
    }
    Ok(Found::Tree { manifest_id: current.manifest_id })
}

/// Writes `current` and its manifest again, and syncs them.
///
/// The sync that was to make them durable may have failed just before the last process ended: then
/// they were read from the page cache, and the next power cut takes them back, after the log behind
/// them has been purged. Syncing them again would prove nothing, only writing does. Tables need none
/// of this: a manifest is written only after the sync of its tables has returned well.
pub(crate) fn make_durable(folder: &Path, found: &Found) -> Result<(), EngineError> {
    let Found::Tree { manifest_id } = found else {
        return Ok(());
    };
    for name in [format!("v{manifest_id}"), CURRENT.to_owned()] {
        let path = folder.join(name);
        let again = fs::read(&path).and_then(|bytes| super::folder::replace_synced(&path, &bytes));
        match again.map_err(|e| EngineError::io("open", e)) {
            Ok(()) => {}
            // A node starts with no room at all; what follows a full disk is not a failed sync.
            Err(error) if error.is_disk_full() => {
                tracing::warn!(%error, path = %path.display(), "no room to write it again");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// No `current`: either nothing was ever here, or a crash hit the creation of the empty tree. Any
/// table or later manifest means that `current` was lost, and lsm-tree would begin an empty tree
/// and delete the rest.
fn check_without(folder: &Path) -> Result<Found, EngineError> {
    for name in names(folder)? {
        let later = name.strip_prefix('v').is_some_and(|id| id != "0" && id.parse::<u64>().is_ok());
        if later {
            return Err(EngineError::damaged(
                "open",
                format!("{} has a manifest {name} and no `current`", folder.display()),
            ));
        }
    }
    if let Some(table) = names(&folder.join(TABLES))?.first() {
        return Err(EngineError::damaged(
            "open",
            format!("{} has tables ({table}, …) and no `current`", folder.display()),
        ));
    }
    Ok(Found::Nothing)
}

/// Names in a folder, sorted; none when it does not exist.
fn names(folder: &Path) -> Result<Vec<String>, EngineError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(EngineError::io("open", error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| EngineError::io("open", e))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
