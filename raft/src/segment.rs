//! Making segments: a prepared spare, and its adoption as the next `segment.NNN.wal`.
//!
//! The spare is reserved, zero-filled and synced beside the writer, so that a roll waits for nothing. A reservation
//! that fails means that the disk is full: it is given back and tried again, with pauses, until there is room. Any
//! other failure latches the log. What the writer and the preparing thread say to each other lies on a [`SpareDesk`],
//! where the node reads it too: without a spare, and with a reservation that fails, clients are refused before
//! their entries run into the end of the segment.

use std::{
    io,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{
    clock::now,
    disk::{Disk, DiskFile, is_full},
    error::Latched,
    frame::{HEADER_OFFSETS, SegmentHeader},
    index::segment_name,
    log_disk::{LogDisk, LogFile},
    open::SPARE_NAME,
};

/// Zeros are written and synced in pieces of this size.
const ZERO_BYTES: usize = 1 << 20;

/// Rests after each piece for this many times as long as the piece took, unless somebody waits for the file: writing a
/// segment at the disk's full speed keeps the log's own syncs waiting, and, on a small machine, everything else.
const REST_FACTOR: u32 = 3;

/// No rest is longer: on a disk or machine that is slow for a while a segment must come to its end all the same.
const REST_MAX: Duration = Duration::from_millis(50);

/// Pauses between two reservations that fail: the first and the longest. Room that is back is used within the longest.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// The writer, while it waits for room, looks this often whether it was told to end.
const LOOK_AROUND: Duration = Duration::from_millis(20);

/// Reserves a file's space, writes it full of zeros and syncs it. A later sync of bytes written into it changes
/// no metadata, and a full disk shows here, not in the middle of a group.
///
/// `None`: the log is being closed, and nobody needs it; the next start fills it anew.
/// [`is_full`] of the error: there was no room, nothing was written, and nothing is kept of the try. Any other error
/// has latched the log.
fn zero_fill(disk: &LogDisk, path: &Path, bytes: u64, rest: Rest<'_>) -> io::Result<Option<LogFile>> {
    // A spare that an earlier process left is used again: on a full disk it may be the only room there is.
    let file = match disk.open_file(path) {
        Ok(file) if file.bytes().is_ok_and(|b| b == bytes) => file,
        Ok(_) => disk.create_file(path)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => disk.create_file(path)?,
        Err(e) => return Err(e),
    };
    if let Err(full) = file.reserve(bytes) {
        drop(file);
        if is_full(&full) {
            disk.remove(path)?;
        }
        return Err(full);
    }
    Ok(fill(&file, bytes, rest)?.is_continue().then_some(file))
}

/// Called after each piece with the time that it took; says whether to go on.
type Rest<'a> = &'a dyn Fn(Duration) -> ControlFlow<()>;

/// On the caller's thread nothing rests: the caller waits for the file.
const NO_REST: Rest<'static> = &|_took| ControlFlow::Continue(());

fn fill(file: &dyn DiskFile, bytes: u64, rest: Rest<'_>) -> io::Result<ControlFlow<()>> {
    let zeros = vec![0; usize::try_from(bytes).unwrap_or(ZERO_BYTES).min(ZERO_BYTES)];
    let mut at = 0;
    while at < bytes {
        let began = now();
        let n = usize::try_from(bytes - at).unwrap_or(ZERO_BYTES).min(ZERO_BYTES);
        file.write_at(zeros.get(..n).unwrap_or_default(), at)?;
        file.sync_data()?;
        at += n as u64;
        if at < bytes && rest(now().saturating_duration_since(began)).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

struct Spare {
    file: Arc<dyn DiskFile>,
    bytes: u64,
}

/// What lies between the writer, the preparing thread and whoever asks for room. Its lock is never held across I/O.
#[derive(Default)]
pub struct SpareDesk {
    state: Mutex<DeskState>,
    changed: Condvar,
}

#[derive(Default)]
struct DeskState {
    /// Make one of that size.
    wanted: Option<u64>,
    /// Do not wait for the end of the pause.
    is_urgent: bool,
    spare: Option<Spare>,
    /// Why the last reservation failed.
    failing: Option<String>,
    /// Tries that ended, well or badly.
    tries: u64,
    /// The writer stands at the end of its segment and waits for room.
    is_awaited: bool,
    /// The log is to be closed: the writer waits for room no longer.
    is_impatient: bool,
    /// The writer has ended: make no more.
    closing: bool,
    /// The preparing thread has ended.
    ended: bool,
}

/// What the desk says of the next segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpareStatus {
    /// It lies ready.
    pub ready: bool,
    /// Why it cannot be reserved now.
    pub failing: Option<String>,
    /// The writer waits for it.
    pub awaited: bool,
}

impl SpareDesk {
    fn state(&self) -> MutexGuard<'_, DeskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the next segment stands.
    pub fn status(&self) -> SpareStatus {
        let state = self.state();
        SpareStatus { ready: state.spare.is_some(), failing: state.failing.clone(), awaited: state.is_awaited }
    }

    /// From now on the writer does not wait for room: what needs it fails.
    pub fn hurry(&self) {
        self.state().is_impatient = true;
        self.changed.notify_all();
    }

    /// After a piece of a spare that took so long. A spare that somebody waits for is made without rests. Break: the
    /// log is closed, and nobody needs it; until the writer has ended, one may be needed.
    fn rest(&self, took: Duration) -> ControlFlow<()> {
        let until = now() + took.saturating_mul(REST_FACTOR).min(REST_MAX);
        let mut state = self.state();
        while !state.closing && !state.is_urgent && !state.is_awaited {
            let left = until.saturating_duration_since(now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.closing { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn close(&self) {
        self.state().closing = true;
        self.changed.notify_all();
    }

    /// What became of a try. An error has latched the log; a want of room has not.
    fn tried(&self, bytes: u64, made: io::Result<Option<LogFile>>) -> Result<(), Latched> {
        let mut state = self.state();
        state.tries += 1;
        state.is_urgent = false;
        let was_failing = state.failing.is_some();
        let result = match made {
            Ok(None) => Ok(()),
            Ok(Some(file)) => {
                if was_failing {
                    tracing::info!("there is room for the next WAL segment again");
                }
                state.spare = Some(Spare { file: file.into_inner(), bytes });
                state.wanted = None;
                state.failing = None;
                Ok(())
            }
            Err(error) if is_full(&error) => {
                if !was_failing {
                    tracing::warn!(%error, "there is no room for the next WAL segment; it is tried again");
                }
                state.failing = Some(error.to_string());
                Ok(())
            }
            Err(error) => Err(Latched { operation: "prepare", file: SPARE_NAME.into(), error: error.to_string() }),
        };
        drop(state);
        self.changed.notify_all();
        result
    }

    /// The preparing thread waits here for something to do. `None`: it ends.
    fn next_order(&self, not_before: Option<Instant>) -> Option<u64> {
        let mut state = self.state();
        loop {
            if state.closing {
                return None;
            }
            let pause = not_before.map(|at| at.saturating_duration_since(now())).unwrap_or_default();
            match state.wanted.filter(|_| state.spare.is_none()) {
                Some(bytes) if pause.is_zero() || state.is_urgent => return Some(bytes),
                Some(_) => {
                    let waited = self.changed.wait_timeout(state, pause);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// Prepares the next segment's file while the writer goes on.
pub struct Preparer {
    disk: LogDisk,
    path: PathBuf,
    /// `None`: spares are made where they are asked for, on the caller's thread.
    thread: Option<JoinHandle<()>>,
}

impl Preparer {
    /// Starts the thread, unless everything is to happen in lockstep.
    pub fn start(disk: &LogDisk, dir: &Path, in_background: bool) -> io::Result<Self> {
        let path = dir.join(SPARE_NAME);
        let disk = disk.of(crate::log_disk::Role::Preparer);
        let thread = match in_background {
            true => {
                let (disk, path) = (disk.clone(), path.clone());
                Some(std::thread::Builder::new().name("wal-prepare".into()).spawn(move || prepare_all(&disk, &path))?)
            }
            false => None,
        };
        Ok(Self { disk, path, thread })
    }

    fn desk(&self) -> &SpareDesk {
        &self.disk.shared().spare
    }

    /// Asks for a spare, unless one is there or under way.
    pub fn prepare(&mut self, bytes: u64) {
        let bytes = {
            let mut state = self.desk().state();
            if state.spare.is_some() {
                return;
            }
            *state.wanted.get_or_insert(bytes)
        };
        match self.thread {
            Some(_) => self.desk().changed.notify_all(),
            None => {
                // A failure has latched the log.
                let _latched = self.desk().tried(bytes, zero_fill(&self.disk, &self.path, bytes, NO_REST));
            }
        }
    }

    /// As `prepare`, and waits for the end of the try, which goes on as gently as if nobody did.
    pub fn prepare_and_wait(&mut self, bytes: u64) {
        let seen = self.desk().state().tries;
        self.prepare(bytes);
        let mut state = self.desk().state();
        while state.spare.is_none() && state.tries == seen && !state.ended {
            state = self.desk().changed.wait_timeout(state, LOOK_AROUND).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The spare, made now if there is none of that size. Waits up to `patience` for room.
    fn take(&mut self, bytes: u64, patience: Duration) -> io::Result<Arc<dyn DiskFile>> {
        let deadline = now() + patience;
        let taken = loop {
            if let Some(file) = self.take_ready(bytes) {
                break Ok(file);
            }
            if let Err(error) = self.try_once(bytes) {
                break Err(error);
            }
            let mut state = self.desk().state();
            if state.spare.is_none()
                && let Some(failing) = state.failing.clone()
                && (state.is_impatient || self.thread.is_none() || now() >= deadline)
            {
                break Err(io::Error::new(io::ErrorKind::StorageFull, failing));
            }
            state.is_awaited = true;
        };
        self.desk().state().is_awaited = false;
        taken
    }

    fn take_ready(&self, bytes: u64) -> Option<Arc<dyn DiskFile>> {
        let mut state = self.desk().state();
        // A spare of another size is made anew.
        state.spare.take().filter(|spare| spare.bytes == bytes).map(|spare| spare.file)
    }

    /// Waits for the end of one try; the first one does not wait for its pause.
    fn try_once(&self, bytes: u64) -> io::Result<()> {
        if self.thread.is_none() {
            self.desk().tried(bytes, zero_fill(&self.disk, &self.path, bytes, NO_REST))?;
            return Ok(());
        }
        let mut state = self.desk().state();
        let seen = state.tries;
        state.wanted = Some(bytes);
        state.is_urgent = !state.is_awaited;
        self.desk().changed.notify_all();
        while state.spare.is_none() && state.tries == seen {
            if state.is_impatient && state.is_awaited {
                break;
            }
            if state.ended {
                return Err(self.latched("its thread has ended").into());
            }
            if let Some(latched) = self.disk.shared().latched() {
                return Err(latched.into());
            }
            let waited = self.desk().changed.wait_timeout(state, LOOK_AROUND);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn latched(&self, why: &str) -> Latched {
        self.disk.latch("prepare", SPARE_NAME, &io::Error::other(why.to_owned()))
    }
}

/// Says that the thread has ended, however that came, so that nobody waits for it.
struct Ending<'a>(&'a LogDisk);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let desk = &self.0.shared().spare;
        desk.state().ended = true;
        desk.changed.notify_all();
    }
}

fn prepare_all(disk: &LogDisk, path: &Path) {
    let _ending = Ending(disk);
    let [first, longest] = RETRY_PAUSES;
    let (mut pause, mut not_before) = (first, None);
    let desk = &disk.shared().spare;
    while let Some(bytes) = desk.next_order(not_before) {
        // The death of this thread must not go unnoticed until a segment is full: it ends the log at once.
        let tried =
            catch_unwind(AssertUnwindSafe(|| desk.tried(bytes, zero_fill(disk, path, bytes, &|took| desk.rest(took)))));
        match tried {
            Ok(Ok(())) if desk.status().failing.is_some() => {
                not_before = Some(now() + pause);
                pause = (pause * 2).min(longest);
            }
            Ok(Ok(())) => (pause, not_before) = (first, None),
            Ok(Err(_latched)) => return,
            Err(_panic) => {
                disk.latch("prepare", SPARE_NAME, &io::Error::other("the thread that prepares segments panicked"));
                return;
            }
        }
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.desk().close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that prepares WAL segments panicked");
        }
    }
}

/// Turns the spare into a segment. Header first, then the name, then the folder: when this returns,
/// the segment counts, and everything below `header.first_index` had been durable before.
///
/// [`is_full`] of the error: there was no room for as long as `patience`, and nothing was changed. Any other error
/// has latched the log.
pub fn adopt(
    preparer: &mut Preparer,
    disk: &LogDisk,
    dir: &Path,
    header: &SegmentHeader,
    patience: Duration,
) -> io::Result<Arc<dyn DiskFile>> {
    let raw = preparer.take(header.segment_bytes, patience)?;
    let name = segment_name(header.number);
    let file = disk.file(Arc::clone(&raw), &name);
    for at in HEADER_OFFSETS {
        file.write_at(&header.encode(), at)?;
    }
    file.sync_data()?;
    disk.rename(&preparer.path, &dir.join(&name))?;
    disk.sync_dir_of(dir, &name)?;
    Ok(raw)
}
