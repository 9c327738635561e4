//! `<data>/quarantine`: what was taken out of use and is not deleted at once.
//!
//! ```text
//! quarantine/<unix-ms>-<what>/     kv: a damaged tree; checkpoint: a damaged one; node: everything of a rebuilt node
//! ```
//!
//! An operator, or whoever looks for the cause, finds there what the node no longer uses. Folders go
//! when they are older than a configured age; other names are somebody else's and stay.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::folder;

/// Name of the folder in the data folder.
pub const QUARANTINE: &str = "quarantine";

const DAY_MS: u64 = 24 * 3_600_000;

/// One folder in quarantine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quarantined {
    /// Its name below `<data>/quarantine/`.
    pub name: String,
    /// What it was: `kv`, `checkpoint`, `node`.
    pub what: String,
    /// Since when, Unix milliseconds.
    pub since_unix_ms: u64,
    /// Bytes of its files, with those that it shares with a checkpoint.
    pub bytes: u64,
    /// When it will be removed, Unix milliseconds; `None`: never.
    pub expires_unix_ms: Option<u64>,
}

/// The folder for what was put away at that time.
pub fn folder_of(data_dir: &Path, unix_ms: u64, what: &str) -> PathBuf {
    data_dir.join(QUARANTINE).join(format!("{unix_ms}-{what}"))
}

/// Blocking. Moves a file or folder of the same disk there; durable on return. Where it is now.
///
/// Errors: those of the disk; nothing was moved then, or it is moved and not yet durable.
pub fn put(data_dir: &Path, path: &Path, what: &str, now_unix_ms: u64) -> io::Result<PathBuf> {
    let quarantine = data_dir.join(QUARANTINE);
    folder::create_synced(&quarantine)?;
    // Two in one millisecond, or a clock that went back.
    let mut names = (now_unix_ms..).map(|ms| folder_of(data_dir, ms, what)).filter(|path| !path.exists());
    let to = names.next().ok_or_else(|| io::Error::other("no free name in quarantine"))?;
    fs::rename(path, &to)?;
    // Where it went first: a crash between the two may show it twice, never nowhere.
    folder::sync(&quarantine)?;
    path.parent().map_or(Ok(()), folder::sync)?;
    tracing::warn!(from = %path.display(), to = %to.display(), "kept in quarantine");
    Ok(to)
}

/// Blocking. Everything there, the oldest first; `days`: the age at which it goes. Folders with other names are not
/// ours and are left out.
pub fn list(data_dir: &Path, days: Option<u32>) -> io::Result<Vec<Quarantined>> {
    let entries = match fs::read_dir(data_dir.join(QUARANTINE)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((since_unix_ms, what)) = parse(&name) else { continue };
        found.push(Quarantined {
            what: what.to_owned(),
            since_unix_ms,
            bytes: bytes_of(&entry.path())?,
            expires_unix_ms: days.map(|days| since_unix_ms.saturating_add(u64::from(days).saturating_mul(DAY_MS))),
            name,
        });
    }
    found.sort_by(|a, b| (a.since_unix_ms, &a.name).cmp(&(b.since_unix_ms, &b.name)));
    Ok(found)
}

/// Blocking. Removes what has expired; what was removed. A clock that went back removes nothing.
pub fn expire(data_dir: &Path, days: Option<u32>, now_unix_ms: u64) -> io::Result<Vec<Quarantined>> {
    let mut removed = list(data_dir, days)?;
    removed.retain(|each| each.expires_unix_ms.is_some_and(|at| at <= now_unix_ms));
    for each in &removed {
        let path = data_dir.join(QUARANTINE).join(&each.name);
        match fs::symlink_metadata(&path)?.is_dir() {
            true => fs::remove_dir_all(&path)?,
            false => fs::remove_file(&path)?,
        }
        tracing::info!(name = each.name, bytes = each.bytes, "removed from quarantine");
    }
    Ok(removed)
}

fn parse(name: &str) -> Option<(u64, &str)> {
    let (since, what) = name.split_once('-')?;
    (super::foreign::is_number(since) && !what.is_empty()).then(|| Some((since.parse().ok()?, what)))?
}

fn bytes_of(path: &Path) -> io::Result<u64> {
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_dir() {
        return Ok(meta.len());
    }
    fs::read_dir(path)?.try_fold(0, |sum, entry| Ok(sum + bytes_of(&entry?.path())?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_listed_with_its_size_and_expires_by_age() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(dir.path(), None).unwrap().is_empty());
        for (what, bytes) in [("kv", 100), ("wal", 20)] {
            fs::create_dir_all(dir.path().join(what).join("inner")).unwrap();
            fs::write(dir.path().join(what).join("inner/file"), vec![0; bytes]).unwrap();
            put(dir.path(), &dir.path().join(what), what, 1_000).unwrap();
            assert!(!dir.path().join(what).exists());
        }
        fs::create_dir(dir.path().join("kv")).unwrap();
        put(dir.path(), &dir.path().join("kv"), "kv", 1_000).unwrap();
        fs::create_dir(dir.path().join("quarantine/notes of the operator")).unwrap();
        let listed = list(dir.path(), None).unwrap();
        let names: Vec<_> = listed.iter().map(|q| (q.name.as_str(), q.bytes)).collect();
        assert_eq!(vec![("1000-kv", 100), ("1000-wal", 20), ("1001-kv", 0)], names);

        assert!(expire(dir.path(), None, u64::MAX).unwrap().is_empty(), "nothing goes without an age");
        assert!(expire(dir.path(), Some(1), DAY_MS + 999).unwrap().is_empty(), "not as old as that");
        assert!(expire(dir.path(), Some(1), 0).unwrap().is_empty(), "the clock went back");
        let listed = list(dir.path(), Some(1)).unwrap();
        assert_eq!(Some(DAY_MS + 1_000), listed[0].expires_unix_ms);
        assert_eq!(2, expire(dir.path(), Some(1), DAY_MS + 1_000).unwrap().len());
        let left = list(dir.path(), None).unwrap();
        assert_eq!(vec!["1001-kv"], left.iter().map(|q| q.name.as_str()).collect::<Vec<_>>());
        assert!(dir.path().join("quarantine/notes of the operator").exists());
    }
}
