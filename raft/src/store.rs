//! openraft's log storage over the write-ahead log.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use openraft::{
    OptionalSend,
    storage::{IOFlushed, LogState, RaftLogStorage},
};
use tokio::sync::{Semaphore, oneshot, watch};

use crate::{
    disk::Disk,
    entry,
    error::{Latched, OpenError},
    fail_point,
    open::{Opened, RecoveryReport},
    options::WalOptions,
    pending::{self, PendingLog},
    reader::WalReader,
    repair::LostLog,
    shared::Shared,
    source::EntrySource,
    types::{Entry, LogId, TypeConfig, Vote},
    writer::{Job, Writer, cost_bytes},
};

/// Bytes of entries on their way to the disk. More than a few groups only adds latency; less than the
/// largest entry would block it for ever.
pub(crate) const IN_FLIGHT_BYTES_MAX: usize = 64 << 20;

/// A disk that takes longer than this for the last sync and for letting go of the spare hangs.
pub const CLOSE_MAX: Duration = Duration::from_secs(10);

pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) jobs: mpsc::Sender<Job>,
    /// Bounds the queue: an append takes as many permits as it has bytes.
    pub(crate) in_flight: Arc<Semaphore>,
    thread: Mutex<Option<JoinHandle<()>>>,
    ended: Arc<Ended>,
}

/// Whether the log's threads have let go of the disk and of the folder.
#[derive(Default)]
struct Ended {
    is_so: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    fn wait(&self, limit: Duration) -> bool {
        let is_so = self.is_so.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(is_so, limit, |is_so| !*is_so);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Says so however the thread ends.
struct Ending(Arc<Ended>);

impl Drop for Ending {
    fn drop(&mut self) {
        *self.0.is_so.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}

/// The log, as openraft wants it. Clones share it.
#[derive(Clone)]
pub struct WalStore {
    inner: Arc<Inner>,
}

/// The log, as the node above wants it. Clones share it.
#[derive(Clone)]
pub struct WalHandle {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) fn writer_gone() -> Latched {
    Latched { operation: "reach the writer of", file: "the log".into(), error: "its thread has ended".into() }
}

/// What opening a log came to. Made once for each start: its size does not matter.
#[allow(clippy::large_enum_variant)]
pub enum OpenStep {
    /// The log is whole and its writer runs.
    Ready(WalStore, RecoveryReport),
    /// Entries are damaged, and only peers can give them back or say that they never were.
    AskPeers(PendingLog),
    /// Single entries cannot repair it: the node must be rebuilt under a fresh id.
    Rebuild(LostLog),
}

impl std::fmt::Debug for OpenStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready(_, report) => f.debug_tuple("Ready").field(report).finish(),
            Self::AskPeers(pending) => f.debug_tuple("AskPeers").field(pending).finish(),
            Self::Rebuild(lost) => f.debug_tuple("Rebuild").field(lost).finish(),
        }
    }
}

/// Starts the writer of an opened log.
pub(crate) fn start(step: pending::Step, disk: Arc<dyn Disk>, options: WalOptions) -> Result<OpenStep, OpenError> {
    let opened = match step {
        pending::Step::Opened(opened) => *opened,
        pending::Step::Ask(pending) => return Ok(OpenStep::AskPeers(*pending)),
        pending::Step::Lost(lost) => return Ok(OpenStep::Rebuild(lost)),
    };
    let failed = |operation| {
        let path = options.dir.clone();
        move |source| OpenError::Io { operation, path, source }
    };
    fail_point::own("recovery.writes");
    let Opened { lock, hard, index, tail, last_crc, committed_end, report } = opened;
    let shared = Shared::new(index, hard.vote, committed_end, Arc::clone(&options.io_times));
    let writer = Writer::new(options.clone(), disk, Arc::clone(&shared), hard, tail, last_crc, lock)
        .map_err(failed("start the log in"))?;
    let (jobs, inbox) = mpsc::channel();
    let ended = Arc::new(Ended::default());
    let ending = Ending(Arc::clone(&ended));
    let thread = std::thread::Builder::new()
        .name("wal-writer".into())
        .spawn(move || {
            // Behind the writer, which lets go of the folder last of all.
            let _ending = ending;
            writer.run(&inbox);
        })
        .map_err(failed("start the writer of"))?;
    let inner = Inner {
        shared,
        jobs,
        in_flight: Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX)),
        thread: Mutex::new(Some(thread)),
        ended,
    };
    Ok(OpenStep::Ready(WalStore { inner: Arc::new(inner) }, report))
}

impl WalStore {
    /// Recovers the log of a folder and starts its writer, for those who cannot ask peers: damage is refused.
    /// Blocking: reads the whole log.
    pub fn open(disk: Arc<dyn Disk>, options: WalOptions) -> Result<(Self, RecoveryReport), OpenError> {
        match Self::begin_open(disk, options)? {
            OpenStep::Ready(store, report) => Ok((store, report)),
            OpenStep::AskPeers(pending) => Err(pending.into_error()),
            OpenStep::Rebuild(LostLog { why, damage }) if damage.is_empty() => Err(OpenError::Refuse(why)),
            OpenStep::Rebuild(LostLog { damage, .. }) => Err(OpenError::Repair(damage)),
        }
    }

    /// Looks at the log of a folder, and starts its writer if nothing is missing. Nothing is written before
    /// everything is decided. Blocking: reads the whole log.
    pub fn begin_open(disk: Arc<dyn Disk>, options: WalOptions) -> Result<OpenStep, OpenError> {
        start(pending::begin(Arc::clone(&disk), options.clone())?, disk, options)
    }

    /// Whether nothing was ever kept here: no vote, no entry, nothing purged.
    pub fn is_empty(&self) -> bool {
        let index = self.inner.shared.index();
        self.inner.shared.vote().is_none() && index.end() == 0 && index.purged.is_none()
    }

    /// The node's view of the log.
    pub fn handle(&self) -> WalHandle {
        WalHandle { inner: Arc::clone(&self.inner) }
    }

    /// A reader of its entries.
    pub fn reader(&self) -> WalReader {
        WalReader { shared: Arc::clone(&self.inner.shared), log: Arc::downgrade(&self.inner) }
    }

    async fn ask(&self, job: impl FnOnce(oneshot::Sender<Result<(), Latched>>) -> Job) -> io::Result<()> {
        let (reply, answer) = oneshot::channel();
        self.inner.jobs.send(job(reply)).map_err(|_| writer_gone())?;
        answer.await.map_err(|_| writer_gone())??;
        Ok(())
    }
}

impl WalHandle {
    /// Answers other nodes' questions about entries.
    pub fn source(&self) -> EntrySource {
        EntrySource::running(Arc::clone(&self.inner.shared))
    }

    /// The last entry, or the purged one where there is none.
    pub fn last_log_id(&self) -> Option<LogId> {
        self.inner.shared.index().last_log_id()
    }

    /// The last purged entry.
    pub fn purged(&self) -> Option<LogId> {
        self.inner.shared.index().purged
    }

    /// The last durable index.
    pub fn index_flushed(&self) -> Option<u64> {
        self.inner.shared.flushed_end().checked_sub(1)
    }

    /// Waits until the entry at `index` is durable here.
    pub async fn wait_flushed(&self, index: u64) -> Result<(), Latched> {
        let mut flushed = self.inner.shared.watch_flushed();
        let mut latched = self.inner.shared.watch_latched();
        loop {
            if *flushed.borrow_and_update() > index {
                return Ok(());
            }
            if let Some(latched) = latched.borrow_and_update().clone() {
                return Err(latched);
            }
            tokio::select! {
                changed = flushed.changed() => changed.map_err(|_| writer_gone())?,
                changed = latched.changed() => changed.map_err(|_| writer_gone())?,
            }
        }
    }

    /// The error that stopped the writer.
    pub fn latched(&self) -> Option<Latched> {
        self.inner.shared.latched()
    }

    /// Changes once, when the writer stops.
    pub fn watch_latched(&self) -> watch::Receiver<Option<Latched>> {
        self.inner.shared.watch_latched()
    }

    /// Bytes of all segments, preallocated space included.
    pub fn bytes_on_disk(&self) -> u64 {
        self.inner.shared.bytes_on_disk()
    }

    /// How many segments there are.
    pub fn segment_count(&self) -> usize {
        self.inner.shared.index().segments.len()
    }

    /// Bytes of frames that are not purged.
    pub fn bytes_since_purge(&self) -> u64 {
        self.inner.shared.index().live_bytes()
    }

    /// Bytes of frames from the entry at `index`, or the oldest that is not purged, to the newest.
    pub fn bytes_from(&self, index: u64) -> u64 {
        self.inner.shared.index().bytes_from(index)
    }

    /// Flushes, marks and ends the writer, and gives the folder back. Blocks for as long as that takes, but no longer
    /// than [`CLOSE_MAX`]: on a disk that hangs the log then latches, and its folder remains locked until the disk
    /// lets go ([`WalHandle::wait_ended`]). What was acknowledged was durable before.
    pub fn close(&self) -> Result<(), Latched> {
        self.close_within(CLOSE_MAX)
    }

    /// The same with another limit.
    pub fn close_within(&self, limit: Duration) -> Result<(), Latched> {
        let thread = self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return self.latched().map_or(Ok(()), Err) };
        // A writer that waits for room would keep this waiting too, and so would a spare that nobody will need.
        self.inner.shared.spare.hurry();
        let (reply, mut answer) = oneshot::channel();
        self.inner.jobs.send(Job::Close(reply)).map_err(|_| writer_gone())?;
        if !self.inner.ended.wait(limit) {
            let hangs = self.io_in_flight().map(|io| format!("{} {} does not return", io.operation, io.file));
            let why = hangs.unwrap_or_else(|| "its threads do not end".to_owned());
            self.latch("close", "the log", &why);
            return Err(self.latched().unwrap_or_else(writer_gone));
        }
        thread.join().map_err(|_| writer_gone())?;
        // The thread answers before it ends.
        answer.try_recv().map_err(|_| writer_gone())?
    }

    /// Whether nothing of the log touches its folder any more; waits so long for it. Blocking.
    pub fn wait_ended(&self, limit: Duration) -> bool {
        self.inner.ended.wait(limit)
    }
}

impl RaftLogStorage<TypeConfig> for WalStore {
    type LogReader = WalReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let index = self.inner.shared.index();
        Ok(LogState { last_purged_log_id: index.purged, last_log_id: index.last_log_id() })
    }

    async fn get_log_reader(&mut self) -> WalReader {
        self.reader()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = *vote;
        self.ask(|reply| Job::SaveVote(vote, reply)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Carried by the next frame or mark: a hint needs no sync of its own.
        self.inner.shared.set_committed_end(committed.map(|id| id.index() + 1).unwrap_or_default());
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let index = self.inner.shared.index();
        let committed_end = self.inner.shared.committed_end().min(index.end());
        Ok(committed_end.checked_sub(1).and_then(|last| index.log_id_at(last)))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        if let Some(latched) = self.inner.shared.latched() {
            return Err(latched.into());
        }
        fail_point::own("task.raft");
        let entries: Vec<Entry> = entries.into_iter().collect();
        let encoded = entries.iter().map(entry::encode).collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
        let bytes: usize = encoded.iter().map(cost_bytes).sum();
        let permits = u32::try_from(bytes.min(IN_FLIGHT_BYTES_MAX)).map_err(io::Error::other)?;
        let in_flight = Arc::clone(&self.inner.in_flight);
        let permit = in_flight.acquire_many_owned(permits).await.map_err(io::Error::other)?;
        {
            let mut index = self.inner.shared.index();
            for (entry, encoded) in entries.into_iter().zip(&encoded) {
                index.push(entry, cost_bytes(encoded));
            }
        }
        let job = Job::Append { entries: encoded, callback, permit };
        self.inner.jobs.send(job).map_err(|_| writer_gone().into())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let end = last_log_id.map(|id| id.index() + 1).unwrap_or_default();
        self.ask(|reply| Job::Truncate { end, reply }).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.ask(|reply| Job::Purge(log_id, reply)).await
    }
}
