//! The only caller of fsync on the log.
//!
//! One thread takes everything that waits, writes the frames, then their rows, one sync, and then
//! completes callbacks in order. In that order a killed process can never leave a row without its
//! frame; only a power cut can. Votes, truncations and purges go through the same queue, because Raft
//! takes a durable vote as proof that all which was written before it is durable.
//!
//! On the first error the writer latches: no retry, no second sync, and every later request gets the
//! same error. A sync that is repeated after a failure returns success and has written nothing.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use openraft::storage::IOFlushed;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::{
    disk::{Disk, DiskFile, FolderLock},
    error::Latched,
    frame::{MARK_OFFSETS, Mark, ROW_BYTES, ROWS_OFFSET, SegmentHeader, data_offset, frame_bytes, row_capacity},
    group::{Encoded, Group, Marks},
    hard_state::HardState,
    index::{SegmentIndex, segment_name},
    open::{Tail, previous_of},
    options::WalOptions,
    segment::{Preparer, adopt},
    shared::{Shared, WalObserver},
    types::{LogId, TypeConfig, Vote},
};

/// An idle writer marks what is durable after this long, so that after a power cut at most one group
/// lies above the last mark.
const MARK_AFTER_IDLE: Duration = Duration::from_millis(10);

/// Answer to a request that is waited for.
pub type Reply = oneshot::Sender<Result<(), Latched>>;

/// What the writer is asked to do, in the order of asking.
pub enum Job {
    /// Write entries; complete the callback when they are durable.
    Append {
        /// Consecutive entries.
        entries: Vec<Encoded>,
        /// Told once, in order.
        callback: IOFlushed<TypeConfig>,
        /// Bounds what is on its way; given back when the group is durable.
        permit: OwnedSemaphorePermit,
    },
    /// Make the vote durable.
    SaveVote(Vote, Reply),
    /// Forget entries at and above an index.
    Truncate {
        /// First index that goes.
        end: u64,
        /// When it is durable.
        reply: Reply,
    },
    /// Allow entries up to this one to be missing, and unlink segments that nobody needs.
    Purge(LogId, Reply),
    /// Flush, mark and end.
    Close(Reply),
}

struct Current {
    header: SegmentHeader,
    file: Arc<dyn DiskFile>,
    rows_used: u32,
    offset: u64,
    mark_sequence: u64,
}

/// The writer's whole state; lives on its thread.
pub struct Writer {
    options: WalOptions,
    disk: Arc<dyn Disk>,
    shared: Arc<Shared>,
    hard: HardState,
    preparer: Preparer,
    current: Option<Current>,
    group: Group,
    waiting: Vec<(IOFlushed<TypeConfig>, OwnedSemaphorePermit)>,
    /// One more than the last index put into the group or written.
    written_end: u64,
    last_crc: u32,
    /// Something was made durable since the last mark.
    mark_due: bool,
    _lock: Box<dyn FolderLock>,
}

type Step<T = ()> = Result<T, Latched>;

impl Writer {
    /// Takes over an opened log. Makes the hard state durable in both copies, and a first segment
    /// where the log cannot go on in its last one.
    pub fn new(
        options: WalOptions,
        disk: Arc<dyn Disk>,
        shared: Arc<Shared>,
        hard: HardState,
        tail: Option<Tail>,
        last_crc: u32,
        lock: Box<dyn FolderLock>,
    ) -> io::Result<Self> {
        let preparer = Preparer::start(Arc::clone(&disk), &options.dir)?;
        let written_end = shared.index().end();
        let mut writer = Self {
            options,
            disk,
            shared,
            hard,
            preparer,
            current: None,
            group: Group::default(),
            waiting: Vec::new(),
            written_end,
            last_crc,
            mark_due: false,
            _lock: lock,
        };
        match tail {
            Some(tail) => {
                let Tail { header, file, rows_used, offset, mark_sequence } = tail;
                // A process that ended just after it had made this segment had not recorded it yet.
                writer.hard.segment_last = writer.hard.segment_last.max(header.number);
                writer.current = Some(Current { header, file, rows_used, offset, mark_sequence });
                writer.save_hard_state()?;
                writer.mark_due = true;
                writer.mark()?;
            }
            None => {
                // First, so that a log with segments always has a hard state, however early its first start ends.
                writer.save_hard_state()?;
                writer.begin_segment(0)?;
            }
        }
        Ok(writer)
    }

    /// Serves jobs until it is told to close or everybody has gone.
    pub fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            // A broken invariant ends writing as a broken disk does: nobody may go on waiting for an answer.
            match catch_unwind(AssertUnwindSafe(|| self.turn(jobs))) {
                Ok(false) => {}
                Ok(true) => break,
                Err(_) => {
                    let latched = self.latch("go on with", &io::Error::other("the writer panicked"));
                    self.complete(&Err(latched));
                }
            }
        }
    }

    /// Waits for a job and serves it, or marks what is durable when none comes. Whether to end.
    fn turn(&mut self, jobs: &Receiver<Job>) -> bool {
        if !self.mark_due || self.shared.latched().is_some() {
            return jobs.recv().map_or(true, |job| self.serve(job, jobs));
        }
        match jobs.recv_timeout(MARK_AFTER_IDLE) {
            Ok(job) => self.serve(job, jobs),
            Err(RecvTimeoutError::Timeout) => {
                // A failed mark latches like any other failure; there is nobody to answer here.
                let _latched = self.mark();
                false
            }
            Err(RecvTimeoutError::Disconnected) => true,
        }
    }

    /// Tells all that wait for the group what became of it, in order.
    fn complete(&mut self, result: &Step) {
        for (callback, permit) in self.waiting.drain(..) {
            callback.io_completed(result.clone().map_err(io::Error::from));
            drop(permit);
        }
    }

    /// Serves one job and, when it is an append, all that wait behind it. Whether to end.
    fn serve(&mut self, job: Job, jobs: &Receiver<Job>) -> bool {
        let mut next = Some(job);
        while let Some(job) = next.take() {
            match job {
                Job::Append { .. } => next = self.append_group(job, jobs),
                Job::SaveVote(vote, reply) => {
                    let done = self.save_vote(vote);
                    answer(reply, done);
                }
                Job::Truncate { end, reply } => {
                    let done = self.truncate(end);
                    answer(reply, done);
                }
                Job::Purge(upto, reply) => {
                    let done = self.purge(upto);
                    answer(reply, done);
                }
                Job::Close(reply) => {
                    let done = self.check().and_then(|()| self.mark());
                    answer(reply, done);
                    return true;
                }
            }
        }
        false
    }

    /// Collects a group, commits it, and returns the job that did not belong to it.
    fn append_group(&mut self, first: Job, jobs: &Receiver<Job>) -> Option<Job> {
        let deadline = now() + self.options.group_commit_max_wait;
        let mut bytes = 0;
        let mut next = Some(first);
        let mut left_over = None;
        let mut result = self.check();
        while let Some(job) = next.take() {
            let Job::Append { entries, callback, permit } = job else {
                left_over = Some(job);
                break;
            };
            bytes += entries.iter().map(cost_bytes).sum::<usize>();
            self.waiting.push((callback, permit));
            for entry in &entries {
                if result.is_ok() {
                    result = self.add(entry);
                }
            }
            if bytes < self.options.group_commit_max_bytes {
                next = match jobs.try_recv() {
                    Ok(job) => Some(job),
                    Err(TryRecvError::Disconnected) => None,
                    Err(TryRecvError::Empty) => {
                        let wait = deadline.saturating_duration_since(now());
                        if wait.is_zero() { None } else { jobs.recv_timeout(wait).ok() }
                    }
                };
            }
        }
        let result = result.and_then(|()| self.commit());
        self.complete(&result);
        left_over
    }

    /// Puts an entry into the group; commits the group first when the segment is full.
    fn add(&mut self, entry: &Encoded) -> Step {
        if self.written_end == 0 && entry.index > 0 {
            self.start_at(entry.index)?;
        }
        assert_eq!(entry.index, self.written_end, "a hole in what is appended");
        let needed = entry.frame_bytes();
        let full = self.current.as_ref().is_none_or(|c| {
            let used = c.offset + self.group.frames.len() as u64;
            let rows = u64::from(c.rows_used) + self.group.located.len() as u64;
            used + needed > c.header.segment_bytes || rows >= u64::from(c.header.rows)
        });
        if full {
            self.commit()?;
            self.begin_segment(needed)?;
        }
        let marks = Marks { synced_end: self.shared.flushed_end(), committed_end: self.shared.committed_end() };
        if let Some(current) = &self.current {
            let offset = current.offset + self.group.frames.len() as u64;
            let offset = u32::try_from(offset).map_err(|e| self.latch("append to", &io::Error::other(e)))?;
            self.last_crc = self.group.push(entry, current.header.identity, offset, self.last_crc, marks);
        }
        self.written_end = entry.index + 1;
        Ok(())
    }

    /// An empty log may begin anywhere. What lies below counts as never written, not as lost.
    fn start_at(&mut self, index: u64) -> Step {
        self.hard.start = index;
        self.written_end = index;
        self.shared.set_flushed_end(index);
        self.begin_segment(0)
    }

    /// Frames, rows, one sync; then the entries are durable and get their places.
    fn commit(&mut self) -> Step {
        self.check()?;
        if self.group.located.is_empty() {
            return Ok(());
        }
        let Some(current) = &self.current else {
            return Ok(());
        };
        let file = Arc::clone(&current.file);
        let rows_at = ROWS_OFFSET + u64::from(current.rows_used) * ROW_BYTES as u64;
        file.write_at(&self.group.frames, current.offset).map_err(|e| self.latch("write frames to", &e))?;
        file.write_at(&self.group.rows, rows_at).map_err(|e| self.latch("write rows to", &e))?;
        self.sync_segment(&*file)?;
        let budget = self.options.tail_cache_bytes;
        let number = match &mut self.current {
            Some(current) => {
                current.offset += self.group.frames.len() as u64;
                current.rows_used += u32::try_from(self.group.located.len()).unwrap_or(u32::MAX);
                current.header.number
            }
            None => return Ok(()),
        };
        self.shared.index().located(number, self.group.located.drain(..), budget);
        self.group.clear();
        self.shared.set_flushed_end(self.written_end);
        self.mark_due = true;
        // From a segment's first group on its successor is kept ready: a roll or a truncation must not wait for
        // it, nor meet a full disk.
        self.preparer.prepare(self.options.segment_bytes);
        Ok(())
    }

    /// Says on the disk that everything so far is durable.
    fn mark(&mut self) -> Step {
        if !self.mark_due {
            return Ok(());
        }
        let synced_end = self.shared.flushed_end();
        assert!(synced_end <= self.written_end, "marked {synced_end} beyond {}", self.written_end);
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        current.mark_sequence += 1;
        let mark = Mark { sequence: current.mark_sequence, synced_end, committed_end: self.shared.committed_end() };
        // The two marks take turns, so that a torn one leaves the one before it.
        let [even, odd] = MARK_OFFSETS;
        let at = if mark.sequence.is_multiple_of(2) { even } else { odd };
        let file = Arc::clone(&current.file);
        let bytes = mark.encode(current.header.identity);
        file.write_at(&bytes, at).map_err(|e| self.latch("write mark to", &e))?;
        self.sync_segment(&*file)?;
        self.mark_due = false;
        Ok(())
    }

    /// Goes on in a new segment that begins at the end of what is written. Everything before it is
    /// durable by now: that is what its header asserts.
    fn begin_segment(&mut self, needed: u64) -> Step {
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
            identity: rand::random(),
            segment_bytes,
            rows,
            first_index,
            previous,
            previous_crc: self.last_crc,
        };
        let name = segment_name(header.number);
        let observer = Arc::clone(&self.options.observer);
        let mut sync = |file: &dyn DiskFile| timed_sync(&*observer, &name, &mut || file.sync_data());
        let made = adopt(&mut self.preparer, &self.options.dir, &header, &mut sync);
        let file = made.map_err(|e| self.latch_named("begin", &name, &e))?;
        self.current = Some(Current {
            header,
            file: Arc::clone(&file),
            rows_used: 0,
            offset: data_offset(header.rows),
            mark_sequence: 0,
        });
        let bytes = {
            let mut index = self.shared.index();
            index.segments.push_back(SegmentIndex {
                number: header.number,
                identity: header.identity,
                segment_bytes,
                file,
                first_index,
                entries: Default::default(),
            });
            index.segments.iter().map(|s| s.segment_bytes).sum()
        };
        self.shared.set_bytes_on_disk(bytes);
        // From here on a log without this segment is known to have lost it.
        self.hard.segment_last = header.number;
        self.save_hard_state()?;
        self.options.observer.segment_rotated();
        Ok(())
    }

    fn save_vote(&mut self, vote: Vote) -> Step {
        self.check()?;
        self.hard.vote = Some(vote);
        self.save_hard_state()?;
        self.shared.set_vote(Some(vote));
        Ok(())
    }

    fn truncate(&mut self, end: u64) -> Step {
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
        self.last_crc = self.header_crc_at(end)?;
        // The new segment's header voids what is above `end` in older ones, for good.
        self.begin_segment(0)?;
        self.shared.set_flushed_end(end);
        // Segments without a live entry would stay until the next purge, one for each change of leader.
        let void = self.shared.index().take_void();
        self.unlink(void)
    }

    /// Header checksum of the entry below `end`, read back from its segment; 0 when it is not there.
    fn header_crc_at(&self, end: u64) -> Step<u32> {
        use crate::{frame::FrameHeader, index::Lookup};
        let Some(last) = end.checked_sub(1) else {
            return Ok(0);
        };
        let found = self.shared.index().lookup_located(last);
        let Some(Lookup::OnDisk(on_disk)) = found else {
            return Ok(0);
        };
        let mut bytes = [0; crate::frame::FRAME_HEADER_BYTES];
        on_disk
            .file
            .read_at(&mut bytes, u64::from(on_disk.located.offset))
            .map_err(|e| self.latch_named("read", &on_disk.segment, &e))?;
        match FrameHeader::decode(&bytes, on_disk.identity) {
            Ok((_, crc)) => Ok(crc),
            Err(_) => {
                let error = io::Error::other("the last kept frame does not verify");
                Err(self.latch_named("read", &on_disk.segment, &error))
            }
        }
    }

    fn purge(&mut self, upto: LogId) -> Step {
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
                Err(e) => return Err(self.latch_named("unlink", &name, &e)),
            }
            let dir = self.disk.sync_dir(&self.options.dir);
            dir.map_err(|e| self.latch_named("unlink", &name, &e))?;
        }
        let bytes = self.shared.index().segments.iter().map(|s| s.segment_bytes).sum();
        self.shared.set_bytes_on_disk(bytes);
        Ok(())
    }

    fn save_hard_state(&mut self) -> Step {
        self.hard.sequence += 1;
        let observer = Arc::clone(&self.options.observer);
        let mut sync = |name: &str, f: &mut dyn FnMut() -> io::Result<()>| timed_sync(&*observer, name, f);
        let saved = self.hard.save(&*self.disk, &self.options.dir, &mut sync);
        saved.map_err(|(name, e)| self.latch_named("save", &name, &e))
    }

    fn sync_segment(&self, file: &dyn DiskFile) -> Step {
        let name = self.current_name();
        let synced = timed_sync(&*self.options.observer, &name, &mut || file.sync_data());
        synced.map_err(|e| self.latch_named("sync", &name, &e))
    }

    fn current_name(&self) -> String {
        segment_name(self.current.as_ref().map(|c| c.header.number).unwrap_or_default())
    }

    fn check(&self) -> Step {
        self.shared.latched().map_or(Ok(()), Err)
    }

    fn latch(&self, operation: &'static str, error: &io::Error) -> Latched {
        self.latch_named(operation, &self.current_name(), error)
    }

    fn latch_named(&self, operation: &'static str, file: &str, error: &io::Error) -> Latched {
        let latched = Latched { operation, file: file.to_owned(), error: error.to_string() };
        self.options.observer.fsync_failed(file, error);
        self.shared.latch(latched.clone());
        latched
    }
}

fn answer(reply: Reply, result: Step) {
    // Whoever asked may have gone; the result is on the disk and in the latch.
    let _gone = reply.send(result);
}

/// How long a sync takes, and how long a group waits, is real time even on a simulated disk; nothing that is
/// written depends on it.
#[allow(clippy::disallowed_methods)]
fn now() -> Instant {
    Instant::now()
}

fn timed_sync(observer: &dyn WalObserver, name: &str, sync: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
    let start = now();
    sync()?;
    observer.fsync_done(name, start.elapsed());
    Ok(())
}

/// Bytes that an entry costs in the queue and in the cache.
pub fn cost_bytes(entry: &Encoded) -> usize {
    usize::try_from(frame_bytes(u32::try_from(entry.payload.len()).unwrap_or(u32::MAX))).unwrap_or(usize::MAX)
}
