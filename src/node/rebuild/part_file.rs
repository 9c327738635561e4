//! A file that is fetched: written front to back, around the page cache.
//!
//! A checkpoint of many gigabytes would otherwise lie in the page cache until the sync at the end of each file, which
//! then holds up the disk for seconds: other files on it, and the log of another node that shares it, wait for their
//! syncs meanwhile. Written directly, every piece is on its way to the medium when the next one comes, and the sync
//! has nothing left to write. Where a file system knows no direct writes they go through the cache.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

/// Largest block size that a device asks for in practice; buffer, offset and length are multiples.
const ALIGN: usize = 4096;

/// The file, and where the next piece goes.
pub struct PartFile {
    file: File,
    from: u64,
    at: u64,
    /// A buffer with room to begin at a multiple of `ALIGN`.
    room: Vec<u8>,
    direct: bool,
}

impl PartFile {
    /// Blocking. Opens or creates `path`, cut to `from` bytes, which is where the next piece goes.
    pub fn open(path: &Path, from: u64) -> io::Result<PartFile> {
        let mut how = OpenOptions::new();
        how.create(true).truncate(false).write(true);
        let direct = how.clone().custom_flags(libc::O_DIRECT).open(path);
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            Err(error) if refuses_direct(&error) => (how.open(path)?, false),
            Err(error) => return Err(error),
        };
        file.set_len(from)?;
        if direct && !from.is_multiple_of(ALIGN as u64) {
            return Ok(PartFile { file: how.open(path)?, from, at: from, room: Vec::new(), direct: false });
        }
        Ok(PartFile { file, from, at: from, room: Vec::new(), direct })
    }

    /// Blocking. Adds a piece. All but the last one are of the same length, a multiple of 4096 bytes.
    ///
    /// Errors: of the disk. Nothing may be written or synced any more then.
    pub fn add(&mut self, path: &Path, piece: &[u8]) -> io::Result<()> {
        if self.direct {
            match self.add_directly(piece) {
                Ok(()) => {
                    self.at += piece.len() as u64;
                    return Ok(());
                }
                // A file system may take the flag and refuse the write, before it has written anything.
                Err(error) if refuses_direct(&error) && self.at == self.from => {
                    self.file = OpenOptions::new().write(true).open(path)?;
                    self.direct = false;
                }
                Err(error) => return Err(error),
            }
        }
        self.file.write_all_at(piece, self.at)?;
        self.at += piece.len() as u64;
        Ok(())
    }

    fn add_directly(&mut self, piece: &[u8]) -> io::Result<()> {
        // The last piece is filled up with zeros, which `finish` cuts off.
        let length = piece.len().next_multiple_of(ALIGN);
        if self.room.len() < length + ALIGN {
            self.room = vec![0; length + ALIGN];
        }
        let aligned = self.room.as_ptr().align_offset(ALIGN).min(ALIGN);
        let no_room = || io::Error::other("no aligned buffer");
        let buffer = self.room.get_mut(aligned..aligned + length).ok_or_else(no_room)?;
        let (data, rest) = buffer.split_at_mut_checked(piece.len()).ok_or_else(no_room)?;
        data.copy_from_slice(piece);
        rest.fill(0);
        let buffer = self.room.get(aligned..aligned + length).ok_or_else(no_room)?;
        self.file.write_all_at(buffer, self.at)
    }

    /// Blocking. Makes what was added durable, with the length that it has.
    pub fn finish(self) -> io::Result<()> {
        self.file.set_len(self.at)?;
        self.file.sync_all()
    }
}

fn refuses_direct(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn files_of_every_odd_length_are_what_was_added_whether_begun_or_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        for length in [0, 1, 4095, 4096, 4097, 8192, 10_000] {
            for from in [0, 4096, 5000] {
                let content: Vec<u8> = (0..length).map(|n| (n * 31 % 251) as u8).collect();
                let path = dir.path().join(format!("{length}-{from}"));
                // What an earlier attempt left, and a torn piece behind it.
                std::fs::write(&path, vec![7; from + 100]).unwrap();
                let mut file = PartFile::open(&path, from as u64).unwrap();
                for piece in content.chunks(4096) {
                    file.add(&path, piece).unwrap();
                }
                file.finish().unwrap();
                let found = std::fs::read(&path).unwrap();
                assert_eq!(found.len(), from + length);
                assert!(found.iter().take(from).all(|byte| *byte == 7));
                assert_eq!(found.get(from..).unwrap(), content, "{length} from {from}");
            }
        }
    }
}
