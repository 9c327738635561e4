//! What the log's users, its readers and its writer thread share.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    error::Latched,
    index::LogIndex,
    io_times::{FsyncWindow, IoTimes},
    repair::EntryHealer,
    segment::SpareDesk,
    types::Vote,
};

/// Told of everything that the operators watch. Called on the log's threads: it must be cheap.
pub trait WalObserver: Send + Sync + 'static {
    /// A sync returned Ok after `took`.
    fn fsync_done(&self, segment: &str, took: Duration);
    /// A sync failed, and the log has latched. Called once at most, and then `write_failed` never.
    fn fsync_failed(&self, segment: &str, error: &io::Error);
    /// Anything else failed, and the log has latched. Called once at most, and then `fsync_failed` never.
    fn write_failed(&self, operation: &'static str, file: &str, error: &io::Error);
    /// The log went on in a new segment.
    fn segment_rotated(&self);
    /// A damaged entry was written again in its place, and read back.
    fn entry_repaired(&self, _segment: &str, _index: u64) {}
}

/// An observer that looks away, for tools and tests.
#[derive(Debug, Default)]
pub struct NoObserver;

impl WalObserver for NoObserver {
    fn fsync_done(&self, _segment: &str, _took: Duration) {}
    fn fsync_failed(&self, _segment: &str, _error: &io::Error) {}
    fn write_failed(&self, _operation: &'static str, _file: &str, _error: &io::Error) {}
    fn segment_rotated(&self) {}
}

/// State behind one lock; nobody holds it across I/O or an await.
pub struct Shared {
    index: Mutex<LogIndex>,
    vote: Mutex<Option<Vote>>,
    /// One more than the last durable index.
    flushed_end: watch::Sender<u64>,
    latched: watch::Sender<Option<Latched>>,
    /// One more than the last index that Raft said is committed. A hint.
    committed_end: AtomicU64,
    /// Bytes of all segments.
    bytes_on_disk: AtomicU64,
    /// Bytes and entries that the segment in use still takes.
    room: [AtomicU64; 2],
    pub(crate) spare: SpareDesk,
    pub(crate) io_times: Arc<IoTimes>,
    pub(crate) fsyncs: FsyncWindow,
    healer: Mutex<Option<Arc<dyn EntryHealer>>>,
}

impl Shared {
    pub(crate) fn new(index: LogIndex, vote: Option<Vote>, committed_end: u64, io_times: Arc<IoTimes>) -> Arc<Self> {
        let flushed_end = index.end();
        let bytes = index.segments.iter().map(|s| s.header.segment_bytes).sum();
        Arc::new(Self {
            index: Mutex::new(index),
            vote: Mutex::new(vote),
            flushed_end: watch::Sender::new(flushed_end),
            latched: watch::Sender::new(None),
            committed_end: AtomicU64::new(committed_end),
            bytes_on_disk: AtomicU64::new(bytes),
            room: Default::default(),
            spare: SpareDesk::default(),
            io_times,
            fsyncs: FsyncWindow::default(),
            healer: Mutex::new(None),
        })
    }

    pub(crate) fn index(&self) -> MutexGuard<'_, LogIndex> {
        // The index is changed by short, panic-free sections; a poisoned one is still whole.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn vote(&self) -> Option<Vote> {
        *self.vote.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_vote(&self, vote: Option<Vote>) {
        *self.vote.lock().unwrap_or_else(PoisonError::into_inner) = vote;
    }

    pub(crate) fn healer(&self) -> Option<Arc<dyn EntryHealer>> {
        self.healer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_healer(&self, healer: Option<Arc<dyn EntryHealer>>) {
        *self.healer.lock().unwrap_or_else(PoisonError::into_inner) = healer;
    }

    pub(crate) fn flushed_end(&self) -> u64 {
        *self.flushed_end.borrow()
    }

    pub(crate) fn watch_flushed(&self) -> watch::Receiver<u64> {
        self.flushed_end.subscribe()
    }

    pub(crate) fn set_flushed_end(&self, end: u64) {
        self.flushed_end.send_replace(end);
    }

    pub(crate) fn latched(&self) -> Option<Latched> {
        self.latched.borrow().clone()
    }

    pub(crate) fn watch_latched(&self) -> watch::Receiver<Option<Latched>> {
        self.latched.subscribe()
    }

    /// Ends all writing. False when it had ended already: the first reason stays.
    pub(crate) fn latch(&self, latched: Latched) -> bool {
        self.latched.send_if_modified(|now| {
            let first = now.is_none();
            if first {
                *now = Some(latched);
            }
            first
        })
    }

    pub(crate) fn room(&self) -> (u64, u64) {
        let [bytes, entries] = &self.room;
        (bytes.load(Ordering::Relaxed), entries.load(Ordering::Relaxed))
    }

    pub(crate) fn set_room(&self, bytes: u64, entries: u64) {
        let [b, e] = &self.room;
        b.store(bytes, Ordering::Relaxed);
        e.store(entries, Ordering::Relaxed);
    }

    pub(crate) fn committed_end(&self) -> u64 {
        self.committed_end.load(Ordering::Relaxed)
    }

    pub(crate) fn set_committed_end(&self, end: u64) {
        self.committed_end.fetch_max(end, Ordering::Relaxed);
    }

    pub(crate) fn bytes_on_disk(&self) -> u64 {
        self.bytes_on_disk.load(Ordering::Relaxed)
    }

    pub(crate) fn set_bytes_on_disk(&self, bytes: u64) {
        self.bytes_on_disk.store(bytes, Ordering::Relaxed);
    }
}
