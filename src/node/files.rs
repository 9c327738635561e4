//! Small files that are replaced as a whole: identity, and the boot counts of the others.
//!
//! Each has a partner `*.spare` of the same size on the disk. A new version is written into the partner and
//! synced, then the two change names in one step, and the folder is synced: so a replacement needs neither a
//! byte nor an inode more than there was, and a node starts on a disk without any. What stands in a partner
//! never counts, and neither does its absence: it is made again with the next replacement. The last line of
//! such a file is a checksum over all before it, so that a file that was edited or damaged is refused instead
//! of believed.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with},
    io::Errno,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::state::engine::{folder, synced};

/// Space taken for each file and each partner, bytes: more than any of them ever holds, and one block of most
/// file systems.
const RESERVED_BYTES: u64 = 4096;

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
    /// There was no room, or no memory or descriptor left, and nothing has changed. Never said by a sync: that has failed,
    /// whatever it says.
    #[error("write {}: {source}", path.display())]
    Full {
        /// Which file.
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

/// Replaces `path` by `lines` and a checksum line. Returns once it is durable. Needs no room on the disk unless
/// this is the first time, or somebody removed the partner.
pub fn replace(path: &Path, lines: &str) -> Result<(), FileError> {
    let io = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| FileError::Io { operation, path, source }
    };
    let text = format!("{lines}{CHECKSUM}{:016x}\n", xxh3_64(lines.as_bytes()));
    let partner = path.with_extension("spare");
    let full = |source| FileError::Full { path: partner.clone(), source };
    let file = match open_reserved(&partner) {
        Ok(file) => file,
        Err(error) if is_full(&error) || is_short(&error) => return Err(full(error)),
        Err(error) => return Err(io("create", &partner)(error)),
    };
    let written = file.write_all_at(text.as_bytes(), 0).and_then(|()| file.set_len(text.len() as u64));
    if let Err(failed) = written.and_then(|()| synced(file.sync_all())) {
        // Room that was taken beforehand is no promise where a file system writes elsewhere what it changes. `synced` has
        // taken this kind from what a sync says.
        if is_full(&failed) {
            return Err(full(failed));
        }
        // Nothing is written or synced twice on a file that failed: the next replacement takes a new one.
        if let Err(error) = fs::remove_file(&partner) {
            tracing::warn!(%error, path = %partner.display(), "a file that could not be written stays");
        }
        return Err(io("write", &partner)(failed));
    }
    drop(file);
    exchange(&partner, path).map_err(io("rename to", path))?;
    let parent = path.parent().unwrap_or(Path::new("."));
    folder::sync(parent).map_err(io("sync folder", parent))?;
    if let Err(error) = open_reserved(&partner) {
        tracing::debug!(%error, path = %partner.display(), "no room for the partner of a small file");
    }
    Ok(())
}

/// Opens or makes a file and takes its space beforehand, where the file system can do that.
fn open_reserved(path: &Path) -> io::Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    // Without room for it the write says so, if it needs any.
    if let Err(error) = fallocate(&file, FallocateFlags::KEEP_SIZE, 0, RESERVED_BYTES) {
        tracing::debug!(%error, path = %path.display(), "no room was taken beforehand");
    }
    Ok(file)
}

/// Gives `partner` the name `path`, and what had it before the name of the partner.
fn exchange(partner: &Path, path: &Path) -> io::Result<()> {
    match renameat_with(CWD, partner, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        // There is no such file yet, or the file system cannot exchange names: then the partner is used up.
        Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => fs::rename(partner, path),
        Err(errno) => Err(errno.into()),
    }
}

/// ENOSPC, or a quota.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// No descriptor or no memory: the disk was not asked.
fn is_short(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
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
    fn what_stands_in_the_partner_means_nothing_and_neither_does_its_absence() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(path.with_extension("spare"), "half of something much longer than what follows").unwrap();
        assert!(read(&path).unwrap().is_none());
        for (round, lines) in ["a\n", "b and more\n", "c\n"].into_iter().enumerate() {
            replace(&path, lines).unwrap();
            assert_eq!(read(&path).unwrap().as_deref(), Some(lines));
            if round == 1 {
                fs::remove_file(path.with_extension("spare")).unwrap();
            }
        }
    }

    #[test]
    fn the_two_files_change_names_and_no_third_appears() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace(&path, "first\n").unwrap();
        let inodes = || {
            let mut found: Vec<u64> = [path.clone(), path.with_extension("spare")]
                .iter()
                .map(|path| fs::metadata(path).unwrap().ino())
                .collect();
            found.sort_unstable();
            found
        };
        let before = inodes();
        // Held open, so that a file that is let go does not lend its number to the next one.
        let _held = [File::open(&path).unwrap(), File::open(path.with_extension("spare")).unwrap()];
        for round in 0..20 {
            replace(&path, &"line\n".repeat(round)).unwrap();
            assert_eq!(inodes(), before);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        }
    }
}
