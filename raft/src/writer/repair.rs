//! Writing a damaged entry again, in its place, from another replica's copy.
//!
//! The index in memory has what the entry was: term, place, length, payload checksum. The copy must agree with all
//! of that. Frame and row are written, synced, and read back past the page cache; whatever fails there latches.

use std::{io, sync::Arc};

use super::{Step, Writer};
use crate::{
    disk::DiskFile,
    error::RepairError,
    frame::{
        EntryKind, FRAME_HEADER_BYTES, FrameHeader, HEADER_OFFSETS, ROW_BYTES, ROWS_OFFSET, SegmentHeader, payload_crc,
    },
    index::{Located, OnDisk},
    log_disk::LogFile,
    open::row_of,
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
        let (name, identity, located) = (&site.on_disk.segment, site.on_disk.identity, site.on_disk.located);
        let Some(kind) = copy.kind() else {
            return Err(RepairError::OtherEntry(copy.index));
        };
        let header = self.header_of(&site, copy, kind);
        let mut frame = header.to_vec();
        frame.extend_from_slice(&copy.payload);
        let row = row_of(copy.index, &located).encode(identity);
        let file = self.disk.file(Arc::clone(&site.on_disk.file), name);
        let offset = u64::from(located.offset);
        let write = || {
            file.write_at(&frame, offset)?;
            file.write_at(&row, site.row_at)?;
            file.sync_data()
        };
        write().map_err(|e| self.failed_on("repair", name, &e))?;
        self.read_back(&file, name, &[(&frame, offset), (&row, site.row_at)])?;
        tracing::info!(segment = name, index = copy.index, "a damaged entry was written again from a replica's copy");
        Ok(())
    }

    /// Writes both copies of a segment's header again, from the one that is intact.
    pub(super) fn repair_header(&mut self, number: u64) -> Result<(), RepairError> {
        self.check()?;
        let found = {
            let index = self.shared.index();
            index.segments.iter().find(|s| s.number == number).map(|s| (Arc::clone(&s.file), s.name()))
        };
        let Some((file, name)) = found else {
            return Err(RepairError::Gone(number));
        };
        let Some(header) = intact_header(&*file) else {
            return Err(RepairError::HeaderLost(number));
        };
        let (file, bytes) = (self.disk.file(file, &name), header.encode());
        let write = || {
            HEADER_OFFSETS.into_iter().try_for_each(|at| file.write_at(&bytes, at))?;
            file.sync_data()
        };
        write().map_err(|e| self.failed_on("repair", &name, &e))?;
        self.read_back(&file, &name, &HEADER_OFFSETS.map(|at| (&bytes[..], at)))?;
        Ok(())
    }

    /// What was written must be there: a disk that drops it has failed.
    fn read_back(&self, file: &LogFile, name: &str, written: &[(&[u8], u64)]) -> Step {
        let read = || -> io::Result<()> {
            file.drop_cache()?;
            for (bytes, at) in written {
                let mut found = vec![0; bytes.len()];
                let read = file.read_at(&mut found, *at)?;
                if read < bytes.len() || found != *bytes {
                    return Err(io::Error::other(format!("what was written at byte {at} is not there")));
                }
            }
            Ok(())
        };
        read().map_err(|e| self.failed_on("verify the repair of", name, &e))
    }

    fn site_of(&self, index: u64) -> Option<Site> {
        use crate::index::Lookup;
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

    /// The header's bytes: those that are there when they verify, else made anew so that the chain of checksums holds.
    fn header_of(&self, site: &Site, copy: &EntryCopy, kind: EntryKind) -> [u8; FRAME_HEADER_BYTES] {
        let identity = site.on_disk.identity;
        let bytes = frame_header(&*site.on_disk.file, site.on_disk.located.offset);
        if let Ok((header, _)) = FrameHeader::decode(&bytes, identity)
            && (header.index, header.term) == (copy.index, copy.term)
            && (Some(header.kind), header.payload_crc) == (Some(kind), payload_crc(&copy.payload))
        {
            return bytes;
        }
        let before = match site.before {
            Some(before) => FrameHeader::decode(&frame_header(&*site.on_disk.file, before.offset), identity).ok(),
            None => None,
        };
        // What the frame before it said of other entries still holds.
        let (previous_crc, synced_end, committed_end) = match (before, intact_header(&*site.on_disk.file)) {
            (Some((before, crc)), _) => (crc, before.synced_end, before.committed_end),
            (None, Some(header)) if site.before.is_none() => (header.previous_crc, header.first_index, 0),
            _ => (0, 0, 0),
        };
        let header = FrameHeader {
            kind,
            payload_bytes: site.on_disk.located.payload_bytes,
            previous_crc,
            term: copy.term,
            index: copy.index,
            synced_end,
            committed_end,
            payload_crc: payload_crc(&copy.payload),
        };
        match self.continued_by(site) {
            Some(link) => header.encode_repaired(link, identity),
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
