//! The disk itself: a file that does what it is asked, unless a rule says otherwise, and notes both.
//!
//! Requests come from the kernel one by one and are answered at once or, when they hang or are
//! delayed, by whoever ends them; nothing here waits while holding up other requests.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuser::{Errno, ReplyData, ReplyEmpty, ReplyWrite};
use rustix::fs::FallocateFlags;
use stemedb::cli::faulty_disk::now_us;
use stemedb::cli::faulty_disk::wire::{Action, Counts, Failure, Held, IoLine, IoResult, Kind, Rule, overlaps};

/// The image, the faults and the log.
pub struct Disk {
    image: File,
    pub image_bytes: u64,
    state: Mutex<State>,
}

struct State {
    rules: Vec<Rule>,
    held: Vec<Operation>,
    counts: Counts,
    log: File,
}

/// A request with the way to answer it.
pub struct Operation {
    place: Place,
    work: Work,
}

#[derive(Clone, Copy)]
struct Place {
    kind: Kind,
    offset: u64,
    bytes: u64,
}

enum Work {
    Read(ReplyData),
    Write(Vec<u8>, ReplyWrite),
    /// Zeroes or discards, by the flags of fallocate.
    Free(FallocateFlags, ReplyEmpty),
    Sync(ReplyEmpty),
}

impl Operation {
    pub fn read(offset: u64, bytes: u64, reply: ReplyData) -> Self {
        Self { place: Place { kind: Kind::Read, offset, bytes }, work: Work::Read(reply) }
    }

    pub fn write(offset: u64, data: Vec<u8>, reply: ReplyWrite) -> Self {
        let bytes = data.len() as u64;
        Self { place: Place { kind: Kind::Write, offset, bytes }, work: Work::Write(data, reply) }
    }

    pub fn free(offset: u64, bytes: u64, flags: FallocateFlags, reply: ReplyEmpty) -> Self {
        Self { place: Place { kind: Kind::Write, offset, bytes }, work: Work::Free(flags, reply) }
    }

    pub fn sync(reply: ReplyEmpty) -> Self {
        Self { place: Place { kind: Kind::Sync, offset: 0, bytes: 0 }, work: Work::Sync(reply) }
    }

    fn fail(self, errno: Errno) {
        match self.work {
            Work::Read(reply) => reply.error(errno),
            Work::Write(_, reply) => reply.error(errno),
            Work::Free(_, reply) | Work::Sync(reply) => reply.error(errno),
        }
    }
}

fn errno_of(failure: Failure) -> Errno {
    match failure {
        Failure::Eio => Errno::EIO,
        Failure::Enospc => Errno::ENOSPC,
    }
}

impl Disk {
    pub fn new(image: File, log: File) -> io::Result<Self> {
        let image_bytes = image.metadata()?.len();
        let state = State { rules: Vec::new(), held: Vec::new(), counts: Counts::default(), log };
        Ok(Self { image, image_bytes, state: Mutex::new(state) })
    }

    pub fn add(&self, rule: Rule) {
        self.state().rules.push(rule);
    }

    pub fn counts(&self) -> Counts {
        let state = self.state();
        Counts { held: state.held.len() as u64, ..state.counts }
    }

    /// Ends all faults, and what hangs.
    pub fn clear(&self, ending: Held) {
        let held = {
            let mut state = self.state();
            state.rules.clear();
            std::mem::take(&mut state.held)
        };
        for operation in held {
            match ending {
                Held::Done => self.perform(operation),
                Held::Failed => self.refuse(operation, Errno::EIO),
            }
        }
    }

    /// Takes a request of the kernel.
    pub fn take(self: &Arc<Self>, operation: Operation) {
        let place = operation.place;
        let mut state = self.state();
        let count = match place.kind {
            Kind::Read => &mut state.counts.reads,
            Kind::Write => &mut state.counts.writes,
            Kind::Sync => &mut state.counts.syncs,
        };
        *count += 1;
        let Some(action) = state.action(place) else {
            drop(state);
            return self.perform(operation);
        };
        state.counts.faults += 1;
        match action {
            Action::Fail(failure) => {
                drop(state);
                self.refuse(operation, errno_of(failure));
            }
            Action::Hang => {
                state.note(place, IoResult::Held);
                state.held.push(operation);
            }
            Action::DelayMs(ms) => {
                state.note(place, IoResult::Held);
                drop(state);
                let disk = Arc::clone(self);
                // As many threads at most as the loop device has requests: 128.
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(ms));
                    disk.perform(operation);
                });
            }
            Action::Lose => {
                state.note(place, IoResult::Lost);
                drop(state);
                match operation.work {
                    Work::Read(reply) => reply.error(Errno::EIO),
                    Work::Write(data, reply) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
                    Work::Free(_, reply) | Work::Sync(reply) => reply.ok(),
                }
            }
        }
    }

    fn perform(&self, operation: Operation) {
        let Operation { place, work } = operation;
        // Noted before it is answered: what the log lacks has not happened.
        match work {
            Work::Read(reply) => {
                let mut buffer = vec![0; usize::try_from(place.bytes).unwrap_or(0)];
                let end = self.image_bytes.saturating_sub(place.offset);
                buffer.truncate(usize::try_from(end).unwrap_or(usize::MAX).min(buffer.len()));
                match self.image.read_exact_at(&mut buffer, place.offset) {
                    Ok(()) => {
                        self.state().note(place, IoResult::Done);
                        reply.data(&buffer);
                    }
                    Err(error) => self.refuse(Operation { place, work: Work::Read(reply) }, error.into()),
                }
            }
            Work::Write(data, reply) => match self.image.write_all_at(&data, place.offset) {
                Ok(()) => {
                    self.state().note(place, IoResult::Done);
                    reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX));
                }
                Err(error) => self.refuse(Operation { place, work: Work::Write(data, reply) }, error.into()),
            },
            Work::Free(flags, reply) => {
                match rustix::fs::fallocate(&self.image, flags, place.offset, place.bytes).map_err(io::Error::from) {
                    Ok(()) => {
                        self.state().note(place, IoResult::Done);
                        reply.ok();
                    }
                    Err(error) => self.refuse(Operation { place, work: Work::Free(flags, reply) }, error.into()),
                }
            }
            // The image need not outlive this machine; the kernel above cannot tell.
            Work::Sync(reply) => {
                self.state().note(place, IoResult::Done);
                reply.ok();
            }
        }
    }

    fn refuse(&self, operation: Operation, errno: Errno) {
        self.state().note(operation.place, IoResult::Failed(errno.code()));
        operation.fail(errno);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What the first rule that fits says; rules that are used up go.
    fn action(&mut self, place: Place) -> Option<Action> {
        let fits = |rule: &Rule| {
            let somewhere = rule.ranges.is_empty() || place.kind == Kind::Sync;
            rule.on.contains(&place.kind) && (somewhere || overlaps(&rule.ranges, place.offset, place.bytes))
        };
        let at = self.rules.iter().position(fits)?;
        let rule = self.rules.get_mut(at)?;
        let action = rule.action;
        if let Some(times) = &mut rule.times {
            *times = times.saturating_sub(1);
            if *times == 0 {
                self.rules.remove(at);
            }
        }
        Some(action)
    }

    fn note(&mut self, place: Place, result: IoResult) {
        let Place { kind, offset, bytes } = place;
        let line = IoLine { at_us: now_us(), kind, offset, bytes, result }.text();
        if let Err(error) = self.log.write_all(format!("{line}\n").as_bytes()) {
            // A rig whose log has holes proves nothing.
            crate::give_up(&format!("the log cannot be written: {error}"));
        }
    }
}
