//! The only caller of fsync on the log.
//!
//! One thread takes everything that waits, writes the frames, then their rows, one sync, and then
//! completes callbacks in order. In that order a killed process can never leave a row without its
//! frame; only a power cut can. Votes, truncations and purges go through the same queue, because Raft
//! takes a durable vote as proof that all which was written before it is durable.
//!
//! On the first error the writer latches (see [`crate::log_disk`]): no retry, no second sync, and every later
//! request gets the same error. A sync that is repeated after a failure returns success and has written nothing.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::Duration,
};

use openraft::storage::IOFlushed;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::{
    clock::now,
    disk::{Disk, DiskFile, FolderLock},
    error::{Latched, RepairError},
    frame::{MARK_OFFSETS, Mark, ROW_BYTES, ROWS_OFFSET, SegmentHeader, frame_bytes},
    group::{Encoded, Group, Marks},
    hard_state::HardState,
    index::segment_name,
    log_disk::{LogDisk, LogFile, Role},
    open::Tail,
    options::{Pace, WalOptions},
    repair::EntryCopy,
    segment::Preparer,
    shared::Shared,
    types::{LogId, TypeConfig, Vote},
};

mod changes;
mod repair;

/// An idle writer marks what is durable after this long, so that after a power cut at most one group
/// lies above the last mark.
const MARK_AFTER_IDLE: Duration = Duration::from_millis(10);

/// Answer to a request that is waited for.
pub type Reply = oneshot::Sender<Result<(), Latched>>;

/// Answer to a repair.
pub type RepairReply = oneshot::Sender<Result<(), RepairError>>;

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
    /// Write a damaged entry again from a replica's copy.
    Repair(EntryCopy, RepairReply),
    /// Write a segment's header again from its other copy.
    RepairHeader(u64, RepairReply),
    /// Flush, mark and end.
    Close(Reply),
}

struct Current {
    header: SegmentHeader,
    file: Arc<LogFile>,
    rows_used: u32,
    offset: u64,
    mark_sequence: u64,
}

/// The writer's whole state; lives on its thread.
pub struct Writer {
    options: WalOptions,
    disk: LogDisk,
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
    /// The committed end that the last mark says.
    committed_end_marked: u64,
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
        let disk = LogDisk::new(disk, Arc::clone(&shared), Arc::clone(&options.observer), Role::Writer);
        let preparer = Preparer::start(&disk, &options.dir, options.pace == Pace::Background)?;
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
            committed_end_marked: 0,
            _lock: lock,
        };
        match tail {
            Some(tail) => {
                let Tail { header, file, rows_used, offset, mark_sequence } = tail;
                // A process that ended just after it had made this segment had not recorded it yet.
                writer.hard.segment_last = writer.hard.segment_last.max(header.number);
                let file = Arc::new(writer.disk.file(file, &segment_name(header.number)));
                writer.current = Some(Current { header, file, rows_used, offset, mark_sequence });
                writer.save_hard_state()?;
                writer.mark_due = true;
                writer.mark()?;
            }
            None => {
                // First, so that a log with segments always has a hard state, however early its first start ends.
                writer.save_hard_state()?;
                if writer.options.makes_room_gently {
                    writer.preparer.prepare_and_wait(writer.options.segment_bytes);
                }
                writer.begin_segment(0)?;
            }
        }
        writer.tell_room();
        // Room that is missing should be known before anybody needs it.
        writer.preparer.prepare(writer.options.segment_bytes);
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
                    let latched = self.failed("go on with", &io::Error::other("the writer panicked"));
                    self.complete(&Err(latched));
                }
            }
        }
    }

    /// Waits for a job and serves it, or marks what is durable when none comes. Whether to end.
    fn turn(&mut self, jobs: &Receiver<Job>) -> bool {
        if !self.mark_due || self.options.pace == Pace::Lockstep || self.shared.latched().is_some() {
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
                Job::Repair(copy, reply) => {
                    let done = self.repair(&copy);
                    if let Err(error) = &done {
                        tracing::warn!(index = copy.index, %error, "a damaged entry was not written again");
                    }
                    let _gone = reply.send(done);
                }
                Job::RepairHeader(number, reply) => {
                    let done = self.repair_header(number);
                    let _gone = reply.send(done);
                }
                Job::Close(reply) => {
                    // An idle log does not mark anew for what it learns to be committed. A log at rest says all of it: it may
                    // be the only source of a tree.
                    self.mark_due |= self.shared.committed_end() > self.committed_end_marked;
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
            let offset = u32::try_from(offset).map_err(|e| self.failed("append to", &io::Error::other(e)))?;
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
        let offset = current.offset;
        let write = || {
            file.write_at(&self.group.frames, offset)?;
            file.write_at(&self.group.rows, rows_at)?;
            file.sync_data()
        };
        write().map_err(|e| self.failed("write", &e))?;
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
        self.tell_room();
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
        file.write_at(&bytes, at).and_then(|()| file.sync_data()).map_err(|e| self.failed("mark", &e))?;
        self.mark_due = false;
        self.committed_end_marked = mark.committed_end;
        Ok(())
    }

    /// Tells how much the segment in use still takes.
    fn tell_room(&self) {
        let room = self.current.as_ref().map(|c| {
            let bytes = c.header.segment_bytes.saturating_sub(c.offset);
            (bytes, u64::from(c.header.rows.saturating_sub(c.rows_used)))
        });
        let (bytes, entries) = room.unwrap_or_default();
        self.shared.set_room(bytes, entries);
    }

    fn current_name(&self) -> String {
        segment_name(self.current.as_ref().map(|c| c.header.number).unwrap_or_default())
    }

    fn check(&self) -> Step {
        self.shared.latched().map_or(Ok(()), Err)
    }

    /// What a failed operation on the segment in use is answered with. The disk has latched the log already; other
    /// failures do so here.
    fn failed(&self, operation: &'static str, error: &io::Error) -> Latched {
        self.disk.latch(operation, &self.current_name(), error)
    }

    fn failed_on(&self, operation: &'static str, file: &str, error: &io::Error) -> Latched {
        self.disk.latch(operation, file, error)
    }
}

fn answer(reply: Reply, result: Step) {
    // Whoever asked may have gone; the result is on the disk and in the latch.
    let _gone = reply.send(result);
}

/// Bytes that an entry costs in the queue and in the cache.
pub fn cost_bytes(entry: &Encoded) -> usize {
    usize::try_from(frame_bytes(u32::try_from(entry.payload.len()).unwrap_or(u32::MAX))).unwrap_or(usize::MAX)
}
