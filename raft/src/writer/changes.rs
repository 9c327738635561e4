//! What the writer does besides appending: new segments, votes, truncations, purges.

use std::{io, sync::Arc};

use super::{Current, Step, Writer};
use crate::{
    disk::Disk,
    frame::{FRAME_HEADER_BYTES, FrameHeader, SegmentHeader, data_offset, row_capacity},
    index::{Lookup, SegmentIndex, segment_name},
    open::previous_of,
    segment::adopt,
    types::{LogId, Vote},
};

impl Writer {
    /// Goes on in a new segment that begins at the end of what is written. Everything before it is
    /// durable by now: that is what its header asserts.
    pub(super) fn begin_segment(&mut self, needed: u64) -> Step {
        self.check()?;
        assert!(self.group.located.is_empty(), "a group straddles two segments");
        let first_index = self.written_end;
        let (previous, newest) = {
            let index = self.shared.index();
            (previous_of(&index, first_index), index.segments.back().map(|s| s.number).unwrap_or_default())
        };
        let mut segment_bytes = self.options.segment_bytes;
        let rows = row_capacity(segment_bytes);
        segment_bytes = segment_bytes.max(data_offset(rows) + needed);
        let header = SegmentHeader {
            number: newest.max(self.hard.segment_last) + 1,
            identity: (self.options.identities)(),
            segment_bytes,
            rows,
            first_index,
            previous,
            previous_crc: self.last_crc,
        };
        let name = segment_name(header.number);
        let made = adopt(&mut self.preparer, &self.disk, &self.options.dir, &header, self.options.room_patience);
        // Here, at the end of the segment, a full disk has failed too: what was proposed cannot be taken back.
        let file = made.map_err(|e| self.failed_on("begin", &name, &e))?;
        self.current = Some(Current {
            header,
            file: Arc::new(self.disk.file(Arc::clone(&file), &name)),
            rows_used: 0,
            offset: data_offset(header.rows),
            mark_sequence: 0,
        });
        let bytes = {
            let mut index = self.shared.index();
            index.segments.push_back(SegmentIndex {
                number: header.number,
                identity: header.identity,
                header,
                file,
                first_index,
                entries: Default::default(),
            });
            index.segments.iter().map(|s| s.header.segment_bytes).sum()
        };
        self.shared.set_bytes_on_disk(bytes);
        self.tell_room();
        // From here on a log without this segment is known to have lost it.
        self.hard.segment_last = header.number;
        self.save_hard_state()?;
        self.options.observer.segment_rotated();
        Ok(())
    }

    pub(super) fn save_vote(&mut self, vote: Vote) -> Step {
        self.check()?;
        self.hard.vote = Some(vote);
        self.save_hard_state()?;
        self.shared.set_vote(Some(vote));
        Ok(())
    }

    pub(super) fn truncate(&mut self, end: u64) -> Step {
        self.check()?;
        if end >= self.written_end {
            return Ok(());
        }
        let purged_end = self.hard.purged.map(|id| id.index() + 1).unwrap_or_default();
        assert!(end >= purged_end, "truncated to {end}, below the purged end {purged_end}");
        let committed_end = self.shared.committed_end();
        assert!(end >= committed_end, "truncated to {end}, below the committed end {committed_end}");
        self.shared.index().truncate(end);
        self.written_end = end;
        self.last_crc = self.header_crc_at(end);
        // The new segment's header voids what is above `end` in older ones, for good.
        self.begin_segment(0)?;
        self.shared.set_flushed_end(end);
        // Segments without a live entry would stay until the next purge, one for each change of leader.
        let void = self.shared.index().take_void();
        self.unlink(void)
    }

    /// Header checksum of the entry below `end`, read back from its segment; 0 when it is not there or cannot be
    /// read. Then the next frame does not say what it continues, and the damaged one is found when it is read.
    fn header_crc_at(&self, end: u64) -> u32 {
        let Some(last) = end.checked_sub(1) else {
            return 0;
        };
        let found = self.shared.index().lookup_located(last);
        let Some(Lookup::OnDisk(on_disk)) = found else {
            return 0;
        };
        let mut bytes = [0; FRAME_HEADER_BYTES];
        let read = on_disk.file.read_at(&mut bytes, u64::from(on_disk.located.offset));
        match read.map(|_| FrameHeader::decode(&bytes, on_disk.identity)) {
            Ok(Ok((_, crc))) => crc,
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(segment = on_disk.segment, index = last, "the last kept entry's frame cannot be read");
                0
            }
        }
    }

    pub(super) fn purge(&mut self, upto: LogId) -> Step {
        self.check()?;
        if self.hard.purged.is_some_and(|old| old >= upto) {
            return Ok(());
        }
        // First the record that allows entries to be missing, then the unlinking, oldest first.
        self.hard.purged = Some(upto);
        self.save_hard_state()?;
        let mut gone = self.shared.index().purge(upto);
        if upto.index() >= self.written_end {
            self.written_end = upto.index() + 1;
            self.last_crc = 0;
            self.begin_segment(0)?;
            self.shared.set_flushed_end(self.written_end);
            gone.extend(self.shared.index().purge(upto));
        }
        self.unlink(gone)
    }

    /// Unlinks segments that nobody needs, one after the other.
    fn unlink(&self, gone: Vec<SegmentIndex>) -> Step {
        for segment in gone {
            let name = segment.name();
            let path = self.options.dir.join(&name);
            match self.disk.remove(&path) {
                Ok(()) => {}
                // An operator moved it away: it is gone, which is what was wanted.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    tracing::warn!(segment = name, "a WAL segment that was to be removed was already gone");
                }
                Err(e) => return Err(self.failed_on("unlink", &name, &e)),
            }
            let dir = self.disk.sync_dir_of(&self.options.dir, &name);
            dir.map_err(|e| self.failed_on("unlink", &name, &e))?;
        }
        let bytes = self.shared.index().segments.iter().map(|s| s.header.segment_bytes).sum();
        self.shared.set_bytes_on_disk(bytes);
        Ok(())
    }

    pub(super) fn save_hard_state(&mut self) -> Step {
        self.hard.sequence += 1;
        // Each sync is counted and timed below this.
        let saved = self.hard.save(&self.disk, &self.options.dir, &mut |_, sync| sync());
        saved.map_err(|(name, e)| self.failed_on("save", &name, &e))
    }
}
