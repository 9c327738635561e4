//! Writing into segments at start: whole blocks, one sync, and a look past the page cache at what is there then.
//!
//! Whole blocks, because a block that cannot be read can be written only as a whole. Nothing is ever tried twice.

use std::{collections::BTreeMap, io, sync::Arc};

use crate::disk::{Disk, DiskFile};

/// A block of a file.
pub const BLOCK: u64 = 4096;
/// Files are read in pieces of this size.
const PIECE_BYTES: usize = 1 << 20;
/// What stands for a block that cannot be read: it verifies as nothing, and is not taken for zeros.
const UNREADABLE: u8 = 0xA5;

/// Whether an error is about the medium under some bytes, and not about the file or the process.
pub fn is_media_error(error: &io::Error) -> bool {
    // EIO, EBADMSG, EUCLEAN, EILSEQ, ENODATA, EREMOTEIO: what file systems say of sectors and checksums.
    const CODES: [i32; 6] = [5, 74, 117, 84, 61, 121];
    match error.raw_os_error() {
        Some(code) => CODES.contains(&code),
        None => error.kind() == io::ErrorKind::Other,
    }
}

/// A file as read block by block.
#[derive(Default)]
pub struct Blocks {
    /// Numbers of the blocks that could not be read, ascending.
    pub unreadable: Vec<u64>,
}

/// Reads a whole file into `buf`, past the page cache or through it. Blocks that cannot be read are filled with
/// something that does not verify.
pub fn read_blocks(file: &dyn DiskFile, buf: &mut Vec<u8>, uncached: bool) -> io::Result<Blocks> {
    let bytes = usize::try_from(file.bytes()?).map_err(io::Error::other)?;
    buf.clear();
    buf.resize(bytes, 0);
    let read = |to: &mut [u8], at: u64| match uncached {
        true => file.read_uncached_at(to, at),
        false => file.read_at(to, at),
    };
    let mut found = Blocks::default();
    let mut at = 0;
    for piece in buf.chunks_mut(PIECE_BYTES) {
        match read(piece, at) {
            // Shorter than a moment ago: what is not there reads as zeros.
            Ok(_) => {}
            Err(e) if is_media_error(&e) => {
                for (n, block) in (at / BLOCK..).zip(piece.chunks_mut(BLOCK as usize)) {
                    if let Err(error) = read(block, n * BLOCK) {
                        if !is_media_error(&error) {
                            return Err(error);
                        }
                        block.fill(UNREADABLE);
                        found.unreadable.push(n);
                    }
                }
            }
            Err(e) => return Err(e),
        }
        at += piece.len() as u64;
    }
    Ok(found)
}

/// Blocks of which the page cache shows something else than `device`, with what the device has.
pub fn stale_blocks(file: &dyn DiskFile, device: &[u8]) -> io::Result<BTreeMap<u64, Vec<u8>>> {
    let mut cached = Vec::new();
    read_blocks(file, &mut cached, false)?;
    let blocks = device.chunks(BLOCK as usize).zip(cached.chunks(BLOCK as usize));
    let differ = (0..).zip(blocks).filter(|(_, (device, cached))| device != cached);
    Ok(differ.map(|(n, (device, _))| (n, device.to_vec())).collect())
}

/// Blocks of one file that are to be written.
pub struct Patch {
    file: Arc<dyn DiskFile>,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl Patch {
    /// Of nothing yet, but of blocks whose content is known better than by reading them.
    pub fn new(file: Arc<dyn DiskFile>, known: &BTreeMap<u64, Vec<u8>>) -> Self {
        Self { file, blocks: known.clone() }
    }

    /// Sets a block to zeros; what is put into it later stays.
    pub fn clear_block(&mut self, block: u64) {
        self.blocks.insert(block, vec![0; BLOCK as usize]);
    }

    fn block(&mut self, number: u64) -> io::Result<&mut Vec<u8>> {
        let file = &self.file;
        let block = match self.blocks.entry(number) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                let mut bytes = vec![0; BLOCK as usize];
                file.read_at(&mut bytes, number * BLOCK)?;
                new.insert(bytes)
            }
        };
        block.resize(BLOCK as usize, 0);
        Ok(block)
    }

    /// Puts bytes at an offset.
    pub fn put(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        let mut at = offset;
        while !rest.is_empty() {
            let skip = usize::try_from(at % BLOCK).map_err(io::Error::other)?;
            let n = rest.len().min(BLOCK as usize - skip);
            let (now, later) = rest.split_at(n);
            if let Some(to) = self.block(at / BLOCK)?.get_mut(skip..skip + n) {
                to.copy_from_slice(now);
            }
            rest = later;
            at += n as u64;
        }
        Ok(())
    }

    /// Writes again what is there.
    pub fn touch(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        for number in offset / BLOCK..(offset + bytes).div_ceil(BLOCK) {
            self.block(number)?;
        }
        Ok(())
    }

    /// Writes all, and syncs. After an error nothing is known of the file.
    pub fn write(&self) -> io::Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut start = 0;
        for (number, bytes) in &self.blocks {
            if !run.is_empty() && start + run.len() as u64 != number * BLOCK {
                self.file.write_at(&run, start)?;
                run.clear();
            }
            if run.is_empty() {
                start = number * BLOCK;
            }
            run.extend_from_slice(bytes);
        }
        if !run.is_empty() {
            self.file.write_at(&run, start)?;
        }
        self.file.sync_data()
    }

    /// Reads back, past the page cache, what was written.
    pub fn verify(&self) -> io::Result<()> {
        for (number, bytes) in &self.blocks {
            let mut back = vec![0; bytes.len()];
            let read = self.file.read_uncached_at(&mut back, number * BLOCK)?;
            if back.get(..read) != Some(bytes) {
                return Err(io::Error::other(format!("block {number} is not what was just written and synced there")));
            }
        }
        Ok(())
    }
}

/// Writes a whole file under a name of no meaning, syncs it and gives it its name.
pub fn place_file(disk: &dyn Disk, from: &std::path::Path, to: &std::path::Path, bytes: &[u8]) -> io::Result<()> {
    let file = disk.create(from)?;
    file.reserve(bytes.len() as u64)?;
    file.write_at(bytes, 0)?;
    file.sync_data()?;
    let mut back = vec![0; bytes.len()];
    file.read_uncached_at(&mut back, 0)?;
    if back != bytes {
        return Err(io::Error::other("it is not what was just written and synced"));
    }
    disk.rename(from, to)?;
    to.parent().map_or(Ok(()), |dir| disk.sync_dir(dir))
}
