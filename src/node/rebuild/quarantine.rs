//! `<data>/quarantine/<unix-ms>-<what>/`: files of nodes that were rebuilt. Listed, never used again, and removed by
//! age only.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::state::engine::folder;

const DAY_MS: u64 = 24 * 3_600_000;

/// One folder in the quarantine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quarantined {
    /// Name of the folder below `<data>/quarantine/`.
    pub name: String,
    /// Why it was put there: `node`.
    pub what: String,
    /// When, Unix milliseconds.
    pub since_unix_ms: u64,
    /// Bytes of its files.
    pub bytes: u64,
    /// When it will be removed, Unix milliseconds; `None`: never.
    pub expires_unix_ms: Option<u64>,
}

fn root(data_dir: &Path) -> PathBuf {
    data_dir.join("quarantine")
}

/// The folder for the files of one rebuild.
pub fn folder_of(data_dir: &Path, unix_ms: u64, what: &str) -> PathBuf {
    root(data_dir).join(format!("{unix_ms}-{what}"))
}

fn parse(name: &str) -> Option<(u64, &str)> {
    let (ms, what) = name.split_once('-')?;
    Some((ms.parse().ok()?, what))
}

fn bytes_in(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() { bytes_in(&entry.path())? } else { meta.len() };
    }
    Ok(bytes)
}

/// Blocking. What is there, the oldest first. Folders with other names are not ours and are left out.
pub fn list(data_dir: &Path, days: Option<u32>) -> io::Result<Vec<Quarantined>> {
    let root = root(data_dir);
    let entries = match fs::read_dir(&root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((since_unix_ms, what)) = parse(&name) else { continue };
        let expires_unix_ms = days.map(|days| since_unix_ms.saturating_add(u64::from(days).saturating_mul(DAY_MS)));
        found.push(Quarantined {
            what: what.to_owned(),
            since_unix_ms,
            bytes: bytes_in(&entry.path())?,
            expires_unix_ms,
            name,
        });
    }
    found.sort_by_key(|q| q.since_unix_ms);
    Ok(found)
}

/// Blocking. Removes what has expired.
pub fn expire(data_dir: &Path, days: Option<u32>, now_unix_ms: u64) -> io::Result<()> {
    if days.is_none() {
        return Ok(());
    }
    for old in list(data_dir, days)?.iter().filter(|q| q.expires_unix_ms.is_some_and(|at| at <= now_unix_ms)) {
        folder::remove(&root(data_dir).join(&old.name))?;
        tracing::info!(folder = old.name, bytes = old.bytes, "files in the quarantine have expired and were removed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn folders_are_listed_and_go_by_age_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(list(dir.path(), None).unwrap(), []);
        for (ms, text) in [(5, "one"), (DAY_MS, "three")] {
            let folder = folder_of(dir.path(), ms, "node").join("wal");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("f"), text).unwrap();
        }
        fs::create_dir_all(root(dir.path()).join("mine")).unwrap();
        let found = list(dir.path(), Some(1)).unwrap();
        assert_eq!(found.iter().map(|q| (q.since_unix_ms, q.bytes)).collect::<Vec<_>>(), [(5, 3), (DAY_MS, 5)]);
        assert_eq!(found.first().unwrap().expires_unix_ms, Some(DAY_MS + 5));
        expire(dir.path(), None, u64::MAX).unwrap();
        assert_eq!(list(dir.path(), None).unwrap().len(), 2);
        expire(dir.path(), Some(1), DAY_MS + 5).unwrap();
        assert_eq!(list(dir.path(), None).unwrap().len(), 1);
        assert!(root(dir.path()).join("mine").exists());
    }
}
