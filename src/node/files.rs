//! Small files that are replaced as a whole: identity, and the boot counts of the others.
//!
//! A new version is written beside the old one, synced, renamed over it, and the folder is synced.
//! What a crash leaves under `*.tmp` never counts. The last line of such a file is a checksum over
//! all before it, so that a file that was edited or damaged is refused instead of believed.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::xxh3_64;

/// Prefix of the last line.
const CHECKSUM: &str = "checksum ";

/// Why such a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The disk answered with an error.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The content is not what was written.
    #[error("{} is damaged: {why}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// Replaces `path` by `lines` and a checksum line. Returns once it is durable.
pub fn replace(path: &Path, lines: &str) -> Result<(), FileError> {
    let io = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| FileError::Io { operation, path, source }
    };
    let text = format!("{lines}{CHECKSUM}{:016x}\n", xxh3_64(lines.as_bytes()));
    let beside = path.with_extension("tmp");
    let mut file = File::create(&beside).map_err(io("create", &beside))?;
    file.write_all(text.as_bytes()).map_err(io("write", &beside))?;
    file.sync_all().map_err(io("sync", &beside))?;
    drop(file);
    fs::rename(&beside, path).map_err(io("rename to", path))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(io("sync folder", folder))
}

/// The lines of `path` without the checksum line; `None` when there is no such file.
pub fn read(path: &Path) -> Result<Option<String>, FileError> {
    let damaged = |why: &str| FileError::Damaged { path: path.to_owned(), why: why.into() };
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(FileError::Io { operation: "read", path: path.to_owned(), source }),
    };
    let text = String::from_utf8(bytes).map_err(|_| damaged("not text"))?;
    let body = text.strip_suffix('\n').ok_or_else(|| damaged("the last line is incomplete"))?;
    let (lines, sum) = match body.rsplit_once('\n') {
        Some((lines, last)) => (format!("{lines}\n"), last),
        None => (String::new(), body),
    };
    let sum = sum.strip_prefix(CHECKSUM).ok_or_else(|| damaged("no checksum in the last line"))?;
    if sum != format!("{:016x}", xxh3_64(lines.as_bytes())) {
        return Err(damaged("the checksum does not fit the content"));
    }
    Ok(Some(lines))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
    use super::*;

    #[test]
    fn what_was_written_is_read_and_every_flipped_bit_or_cut_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert!(read(&path).unwrap().is_none());
        replace(&path, "one 1\ntwo 2\n").unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some("one 1\ntwo 2\n"));
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(read(&path).is_err(), "flip at byte {at}");
            fs::write(&path, &good[..at]).unwrap();
            assert!(read(&path).is_err(), "cut to {at} bytes");
        }
    }

    #[test]
    fn an_abandoned_tmp_file_means_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(path.with_extension("tmp"), "half").unwrap();
        assert!(read(&path).unwrap().is_none());
        replace(&path, "a\n").unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some("a\n"));
    }
}
