//! `<data>/rebuild/tree`: which tree is known to be damaged, so that a process that is started again knows it too.
//!
//! Damage that a read has met would else be forgotten until the next one meets it. A mark of a tree that does not
//! count any more means nothing.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    node::files::{self, FileError},
    state::engine::folder,
};

/// The content of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Name of the folder below `kv/`.
    pub tree: String,
    /// What is damaged, one line.
    pub why: String,
}

fn file(data_dir: &Path) -> PathBuf {
    data_dir.join("rebuild").join("tree")
}

impl Mark {
    /// Writes the file; durable on return. Blocking.
    pub fn save(&self, data_dir: &Path) -> Result<(), FileError> {
        let path = file(data_dir);
        let dir = data_dir.join("rebuild");
        let failed = |source| FileError::Io { operation: "create", path: dir.clone(), source };
        folder::create_synced(&dir).map_err(failed)?;
        files::replace(&path, &format!("tree {}\nwhy {}\n", self.tree, self.why.replace('\n', " ")))
    }

    /// Reads the file; `None` when there is none. Blocking.
    pub fn load(data_dir: &Path) -> Result<Option<Mark>, FileError> {
        let path = file(data_dir);
        let Some(lines) = files::read(&path)? else { return Ok(None) };
        let value = |key: &str| lines.lines().find_map(|line| line.strip_prefix(key));
        match (value("tree "), value("why ")) {
            (Some(tree), Some(why)) => Ok(Some(Mark { tree: tree.to_owned(), why: why.to_owned() })),
            _ => Err(FileError::Damaged { path, why: "it names no tree".into() }),
        }
    }

    /// Removes the file; durable on return. Blocking.
    pub fn remove(data_dir: &Path) -> io::Result<()> {
        match fs::remove_file(file(data_dir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => folder::sync(&data_dir.join("rebuild")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_marked_is_read_until_it_is_removed_and_a_damaged_mark_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Mark::load(dir.path()).unwrap(), None);
        let mark = Mark { tree: "g3".into(), why: "a table\nis damaged".into() };
        mark.save(dir.path()).unwrap();
        assert_eq!(Mark::load(dir.path()).unwrap().unwrap().why, "a table is damaged");
        let path = file(dir.path());
        fs::write(&path, fs::read_to_string(&path).unwrap().replace("g3", "g4")).unwrap();
        assert!(Mark::load(dir.path()).is_err());
        Mark::remove(dir.path()).unwrap();
        Mark::remove(dir.path()).unwrap();
        assert_eq!(Mark::load(dir.path()).unwrap(), None);
    }
}
