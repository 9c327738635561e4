//! Files in the folders of a tree that are not of it: `test.dat`, `7.corrupted`, `v3.gz`, an empty `x.tmp`.
//!
//! Operators leave them behind, and nothing of theirs is deleted. lsm-tree refuses to open a tree with
//! an unknown name among its tables, and deletes whatever begins with `v`; those get the prefix `._`,
//! under which it leaves them alone. The content stays as it is.

use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};

use super::folder;
use super::precheck::{CURRENT, TABLES};

/// lsm-tree passes over names that begin so.
const ASIDE: &str = "._";

/// Blocking. Sets aside what would keep the tree in `dir` from opening or would be deleted, and lists
/// everything that is not of the tree, under its name of now.
pub fn set_aside(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in entries(dir)? {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_tree_name(&name) || (name == TABLES && entry.path().is_dir()) {
            continue;
        }
        // `version` would make it take the tree for one of an older crate.
        found.push(if name.starts_with('v') { rename(dir, &entry)? } else { entry.path() });
    }
    let tables = dir.join(TABLES);
    for entry in entries(&tables)? {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_table = is_number(&name) && entry.file_type()?.is_file();
        if !is_table {
            found.push(if name.starts_with(ASIDE) { entry.path() } else { rename(&tables, &entry)? });
        }
    }
    found.sort();
    Ok(found)
}

/// Blocking. Lists what is in `dir` and is not `known`.
pub fn list(dir: &Path, known: impl Fn(&str) -> bool) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = entries(dir)?
        .into_iter()
        .filter(|entry| !known(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    Ok(found)
}

/// Blocking. Removes a tree or checkpoint and leaves what is not of it, with its folders.
pub fn remove_tree(dir: &Path) -> io::Result<()> {
    let tables = dir.join(TABLES);
    for (folder, is_ours) in [(&tables, is_number as fn(&str) -> bool), (&dir.to_owned(), is_tree_name)] {
        for entry in entries(folder)? {
            if is_ours(&entry.file_name().to_string_lossy()) && !entry.file_type()?.is_dir() {
                fs::remove_file(entry.path())?;
            }
        }
        match fs::remove_dir(folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                tracing::warn!(folder = %folder.display(), "files that are not of the database stay there");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Names of lsm-tree's and ours beside `tables`: leftovers of a write that was broken off, too.
fn is_tree_name(name: &str) -> bool {
    let base = name.strip_suffix(".new").unwrap_or(name);
    base == CURRENT
        || base == super::checkpoint::MANIFEST
        || name == "lock"
        || name.starts_with(".tmp") // the crate's atomic writes
        || base.strip_prefix('v').is_some_and(is_number)
}

/// A number as it is written, not merely as it parses: `007` and `+7` are names of somebody else.
pub(crate) fn is_number(name: &str) -> bool {
    name.parse::<u64>().is_ok_and(|number| number.to_string() == name)
}

fn entries(dir: &Path) -> io::Result<Vec<DirEntry>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn rename(dir: &Path, entry: &DirEntry) -> io::Result<PathBuf> {
    let name = entry.file_name().to_string_lossy().into_owned();
    let free = (0u32..).map(|n| match n {
        0 => dir.join(format!("{ASIDE}{name}")),
        n => dir.join(format!("{ASIDE}{n}.{name}")),
    });
    let mut free = free.filter(|path| !path.exists());
    let aside = free.next().ok_or_else(|| io::Error::other("no free name"))?;
    fs::rename(entry.path(), &aside)?;
    folder::sync(dir)?;
    tracing::warn!(from = %entry.path().display(), to = %aside.display(), "a file that is not of the tree is set aside");
    Ok(aside)
}
