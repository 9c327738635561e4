//! What the node asks of a running log beyond its marks: what the disk is busy with, how much room there is, whether
//! what was written is still there.

use std::{io, ops::ControlFlow, sync::Arc};

use openraft::type_config::alias::LogIdOf;
use tokio::sync::oneshot;

use crate::{
    clock::monotonic_ms,
    error::{Latched, RepairError},
    io_times::{FsyncFigures, IoInFlight},
    repair::{EntryCopy, EntryHealer},
    scrub::{self, SealedSegment, SegmentCheck},
    store::{IN_FLIGHT_BYTES_MAX, WalHandle, writer_gone},
    types::TypeConfig,
    writer::{Job, RepairReply},
};

/// How much the log can still take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogRoom {
    /// Bytes of frames that fit before a new segment is needed, less what is queued already.
    pub bytes_before_new_segment_needed: u64,
    /// Entries that fit before a new segment is needed, whatever their size.
    pub entries_before_new_segment_needed: u64,
    /// The next segment lies ready.
    pub spare_ready: bool,
    /// Why the next segment cannot be reserved; it is tried again about once a second, and this goes away by itself.
    pub reserve_failing: Option<String>,
    /// The segment is full and the writer waits for room: nothing becomes durable until there is some, and after
    /// `room_patience` the log latches.
    pub writer_waits: bool,
}

impl LogRoom {
    /// Whether new commands of clients must be refused, and why: what is left, the spare too, is for blank entries,
    /// memberships, and what was replicated already.
    pub fn refuse_clients(&self) -> Option<&str> {
        self.reserve_failing.as_deref()
    }
}

impl WalHandle {
    /// The operation of the disk that has been running for the longest time, those that somebody waits for first.
    /// Of all that register with the [`crate::io_times::IoTimes`] of this log's options. Waits for no I/O.
    pub fn io_in_flight(&self) -> Option<IoInFlight> {
        self.inner.shared.io_times.oldest()
    }

    /// How long the log's syncs took within the last ten seconds.
    pub fn fsync_figures(&self) -> FsyncFigures {
        self.inner.shared.fsyncs.figures(monotonic_ms())
    }

    /// 99th percentile of the log's syncs within the last ten seconds, in milliseconds; `None` without any.
    pub fn fsync_p99_ms(&self) -> Option<f64> {
        let figures = self.fsync_figures();
        (figures.count > 0).then_some(figures.p99_ms)
    }

    /// How much the log can still take.
    pub fn room(&self) -> LogRoom {
        let (bytes, entries) = self.inner.shared.room();
        let queued = IN_FLIGHT_BYTES_MAX.saturating_sub(self.inner.in_flight.available_permits());
        let spare = self.inner.shared.spare.status();
        LogRoom {
            bytes_before_new_segment_needed: bytes.saturating_sub(queued as u64),
            entries_before_new_segment_needed: entries,
            spare_ready: spare.ready,
            reserve_failing: spare.failing,
            writer_waits: spare.awaited,
        }
    }

    /// Ends all writing for good because something else has failed, or because the node gives this log up. Returns at
    /// once, even while an operation hangs: when that comes back, nothing is acknowledged. False when the log had
    /// latched already. The observer is not told.
    pub fn latch(&self, operation: &'static str, file: &str, error: &str) -> bool {
        self.inner.shared.latch(Latched { operation, file: file.into(), error: error.into() })
    }

    /// Who finds entries that cannot be read here.
    pub fn set_healer(&self, healer: Option<Arc<dyn EntryHealer>>) {
        self.inner.shared.set_healer(healer);
    }

    /// The segments that are not written any more and hold live entries, oldest first.
    pub fn sealed_segments(&self) -> Vec<SealedSegment> {
        scrub::sealed_segments(&self.inner.shared.index())
    }

    /// Reads a sealed segment past the page cache and says what is not as it was written. Blocking.
    /// `NotFound`: there is no such sealed segment, any more or yet.
    pub fn verify_segment(&self, number: u64) -> io::Result<SegmentCheck> {
        self.verify_segment_paced(number, |_| ControlFlow::Continue(()))
    }

    /// The same, at the caller's pace: `pace` is told how many bytes each piece had (about 256 KiB) and may sleep, or
    /// break off.
    pub fn verify_segment_paced(
        &self,
        number: u64,
        mut pace: impl FnMut(u64) -> ControlFlow<()>,
    ) -> io::Result<SegmentCheck> {
        scrub::verify_segment(&self.inner.shared, number, &mut pace).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Writes a damaged entry again, frame and row, from another replica's copy. The copy must be of the entry that
    /// was here: term, length and payload checksum. Returns when it is synced and was read back.
    pub async fn repair_entry(&self, index: u64, copy: EntryCopy) -> Result<(), RepairError> {
        if copy.index != index {
            return Err(RepairError::OtherEntry(index));
        }
        self.repair(|reply| Job::Repair(copy, reply)).await
    }

    /// Writes both copies of a segment's header again, from the intact one. Returns when they are synced and were
    /// read back.
    pub async fn repair_header(&self, segment: u64) -> Result<(), RepairError> {
        self.repair(|reply| Job::RepairHeader(segment, reply)).await
    }

    async fn repair(&self, job: impl FnOnce(RepairReply) -> Job) -> Result<(), RepairError> {
        let (reply, answer) = oneshot::channel();
        self.inner.jobs.send(job(reply)).map_err(|_| writer_gone())?;
        answer.await.map_err(|_| writer_gone())?
    }

    /// The log id at an index, when the log holds it.
    pub fn log_id_at(&self, index: u64) -> Option<LogIdOf<TypeConfig>> {
        self.inner.shared.index().log_id_at(index)
    }
}
