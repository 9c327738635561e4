//! Writing a damaged entry again, in its place, from another replica's copy.
//!
//! The index in memory has what the entry was: term, place, length, payload checksum. The copy must agree with all
//! of that. Frame and row are written in whole blocks, because a block that cannot be read can be written only so,
//! synced, and read back past the page cache; whatever fails there latches.

use std::{collections::BTreeMap, io, sync::Arc};

use bytes::BytesMut;

use super::{Step, Writer};
use crate::{
    disk::DiskFile,
    error::RepairError,
    frame::{EntryKind, FRAME_HEADER_BYTES, FrameHeader, HEADER_OFFSETS, ROW_BYTES, ROWS_OFFSET, SegmentHeader},
    index::{Located, Lookup, OnDisk},
    io_times::Waits,
    open::row_of,
    patch::{BLOCK, Patch, is_media_error},
    reader::verify,
    repair::EntryCopy,
};

/// Where an entry lies, with what its neighbours in the segment tell.
struct Site {
    on_disk: OnDisk,
    segment: u64,
    row_at: u64,
    /// The entry before it, when it is in the same segment.
    before: Option<Located>,
    /// Where the frame behind it lies, in whatever segment.
    behind: Option<OnDisk>,
    /// The header of the segment behind this one, when the entry is the last of its segment.
    next_header: Option<Arc<dyn DiskFile>>,
}

impl Writer {
    /// Writes the entry again from a copy of it.
    pub(super) fn repair(&mut self, copy: &EntryCopy) -> Result<(), RepairError> {
        self.check()?;
        let Some(site) = self.site_of(copy.index) else {
            return Err(RepairError::Gone(copy.index));
        };
        if !copy.is_of(copy.index, &site.on_disk.located) {
            return Err(RepairError::OtherEntry(copy.index));
        }
        let Some(kind) = copy.kind() else {
            return Err(RepairError::OtherEntry(copy.index));
        };
        let OnDisk { file, segment: name, identity, located, .. } = &site.on_disk;
        let header = {
            let _seen = self.shared.io_times.enter("read", name, Waits::Somebody);
            if is_sound(&site) {
                // Several readers met the damage, and one of them was first.
                return Ok(());
            }
            if header_at(&site).is_some_and(|(header, _)| header.kind != kind) {
                return Err(RepairError::OtherEntry(copy.index));
            }
            self.header_of(&site, kind)
        };
        let mut frame = header.to_vec();
        frame.extend_from_slice(&copy.payload);
        let row = row_of(copy.index, located).encode(*identity);
        self.write_again(file, name, &[(u64::from(located.offset), &frame), (site.row_at, &row)])?;
        tracing::info!(segment = name, index = copy.index, "a damaged entry was written again from a copy");
        self.options.observer.entry_repaired(name, copy.index);
        Ok(())
    }

    /// Writes both copies of a segment's header again. They lie beside each other, and one accident may take both; what
    /// they said is in memory since the segment was opened.
    pub(super) fn repair_header(&mut self, number: u64) -> Result<(), RepairError> {
        self.check()?;
        let found = {
            let index = self.shared.index();
            index.segments.iter().find(|s| s.number == number).map(|s| (Arc::clone(&s.file), s.name(), s.header))
        };
        let Some((file, name, header)) = found else {
            return Err(RepairError::Gone(number));
        };
        let bytes = header.encode();
        self.write_again(&file, &name, &HEADER_OFFSETS.map(|at| (at, &bytes[..])))?;
        Ok(())
    }

    /// Writes pieces into a file of the log: once, synced, and looked at again past the page cache. A disk that drops
    /// what it took has failed.
    fn write_again(&self, file: &Arc<dyn DiskFile>, name: &str, pieces: &[(u64, &[u8])]) -> Step {
        let file: Arc<dyn DiskFile> = Arc::new(self.disk.file(Arc::clone(file), name));
        let read = || {
            let _seen = self.shared.io_times.enter("read", name, Waits::Somebody);
            let mut patch = Patch::new(Arc::clone(&file), &unreadable_blocks(&*file, pieces)?);
            pieces.iter().try_for_each(|(at, bytes)| patch.put(*at, bytes))?;
            Ok(patch)
        };
        let patch = read().map_err(|e| self.failed_on("repair", name, &e))?;
        patch.write().map_err(|e| self.failed_on("repair", name, &e))?;
        let _seen = self.shared.io_times.enter("read", name, Waits::Somebody);
        patch.verify().map_err(|e| self.failed_on("verify the repair of", name, &e))
    }

    fn site_of(&self, index: u64) -> Option<Site> {
        let log = self.shared.index();
        let Lookup::OnDisk(on_disk) = log.lookup_located(index)? else {
            return None;
        };
        let at = log.segments.iter().position(|s| s.identity == on_disk.identity)?;
        let segment = log.segments.get(at)?;
        let position = index.checked_sub(segment.first_index)?;
        let before = position.checked_sub(1).and_then(|p| segment.entries.get(usize::try_from(p).ok()?)).copied();
        let is_last = index + 1 == segment.end();
        let behind = match log.lookup_located(index + 1) {
            Some(Lookup::OnDisk(next)) if !is_last => Some(next),
            _ => None,
        };
        let next = log.segments.get(at + 1).filter(|next| is_last && next.first_index == index + 1);
        Some(Site {
            segment: segment.number,
            row_at: ROWS_OFFSET + position * ROW_BYTES as u64,
            before,
            behind,
            next_header: next.map(|next| Arc::clone(&next.file)),
            on_disk,
        })
    }

    /// The header's bytes: those that are there when they verify, else made anew so that the frame behind still
    /// continues this one.
    fn header_of(&self, site: &Site, kind: EntryKind) -> [u8; FRAME_HEADER_BYTES] {
        if let Some((_, bytes)) = header_at(site) {
            return bytes;
        }
        let OnDisk { file, identity, located, index, .. } = &site.on_disk;
        let identity = *identity;
        let before = match site.before {
            Some(before) => FrameHeader::decode(&frame_header(&**file, before.offset), identity).ok(),
            None => None,
        };
        // What the frame before it said of other entries still holds.
        let (previous_crc, synced_end) = match (before, intact_header(&**file)) {
            (Some((before, crc)), _) => (crc, before.synced_end),
            (None, Some(header)) if site.before.is_none() => (header.previous_crc, header.first_index),
            _ => (0, 0),
        };
        let header = FrameHeader {
            kind,
            payload_bytes: located.payload_bytes,
            previous_crc,
            term: located.term,
            index: *index,
            synced_end,
            committed_end: 0,
            payload_crc: located.payload_crc,
        };
        match self.continued_by(site) {
            Some(checksum) => header.encode_repaired(checksum, identity),
            None => header.encode(identity).0,
        }
    }

    /// The checksum that the next frame says it continues, when that can be read.
    fn continued_by(&self, site: &Site) -> Option<u32> {
        if let Some(behind) = &site.behind {
            let bytes = frame_header(&*behind.file, behind.located.offset);
            return FrameHeader::decode(&bytes, behind.identity).ok().map(|(header, _)| header.previous_crc);
        }
        if let Some(next) = &site.next_header {
            return intact_header(&**next).map(|header| header.previous_crc).filter(|crc| *crc != 0);
        }
        let is_newest = self.current.as_ref().is_some_and(|c| c.header.number == site.segment);
        (is_newest && site.on_disk.index + 1 == self.written_end).then_some(self.last_crc)
    }
}

/// Whether frame and row are as they should be, in the page cache and past it.
fn is_sound(site: &Site) -> bool {
    let OnDisk { file, identity, located, index, .. } = &site.on_disk;
    let frame_bytes = FRAME_HEADER_BYTES + located.payload_bytes as usize;
    let row = row_of(*index, located).encode(*identity);
    let is_right = |read: &dyn Fn(&mut [u8], u64) -> io::Result<usize>| {
        let mut frame = BytesMut::zeroed(frame_bytes);
        let mut found_row = [0; ROW_BYTES];
        let read = read(&mut frame, u64::from(located.offset)).is_ok() && read(&mut found_row, site.row_at).is_ok();
        read && found_row == row && verify(&site.on_disk, &frame.freeze()).is_ok()
    };
    is_right(&|to, at| file.read_at(to, at)) && is_right(&|to, at| file.read_uncached_at(to, at))
}

/// The blocks under the pieces that the device cannot read, as zeros. What else lay in them is lost already; it is
/// damaged from then on, and repaired in its turn.
fn unreadable_blocks(file: &dyn DiskFile, pieces: &[(u64, &[u8])]) -> io::Result<BTreeMap<u64, Vec<u8>>> {
    let mut zeros = BTreeMap::new();
    for (at, bytes) in pieces {
        for block in at / BLOCK..(at + bytes.len() as u64).div_ceil(BLOCK) {
            match file.read_at(&mut [0; BLOCK as usize], block * BLOCK) {
                Ok(_) => {}
                Err(e) if is_media_error(&e) => {
                    zeros.insert(block, vec![0; BLOCK as usize]);
                }
                Err(e) => return Err(e),
            }
        }
    }
    Ok(zeros)
}

/// The header of the entry, when it verifies, and its bytes. Then only the payload, or the row, is damaged.
fn header_at(site: &Site) -> Option<(FrameHeader, [u8; FRAME_HEADER_BYTES])> {
    let OnDisk { file, identity, located, index, .. } = &site.on_disk;
    let bytes = frame_header(&**file, located.offset);
    let (header, _) = FrameHeader::decode(&bytes, *identity).ok()?;
    let is_its = (header.index, header.term, header.payload_crc) == (*index, located.term, located.payload_crc);
    is_its.then_some((header, bytes))
}

/// The bytes where a frame's header should be; zeros where they cannot be read.
fn frame_header(file: &dyn DiskFile, offset: u32) -> [u8; FRAME_HEADER_BYTES] {
    let mut bytes = [0; FRAME_HEADER_BYTES];
    match file.read_at(&mut bytes, u64::from(offset)) {
        Ok(FRAME_HEADER_BYTES) => bytes,
        Ok(_) | Err(_) => [0; FRAME_HEADER_BYTES],
    }
}

fn intact_header(file: &dyn DiskFile) -> Option<SegmentHeader> {
    HEADER_OFFSETS.into_iter().find_map(|at| {
        let mut bytes = [0; crate::frame::HEADER_BYTES];
        file.read_at(&mut bytes, at).ok()?;
        SegmentHeader::decode(&bytes).ok()
    })
}
