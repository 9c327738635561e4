//! Collects what clients asked and what they were told.
//!
//! Each client records into its own lane; a lane's lock is uncontended except while somebody takes a
//! copy of the history, so recording costs well under a microsecond. An attempt that is begun and
//! never finished (its task was dropped) is recorded as unknown: it may have taken effect.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::time::Instant;

/// In place of a node: the attempt went through a load balancer, and which node got it is not known.
pub const BALANCER: u16 = u16::MAX;

/// How one attempt to write ended, as the client was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum WriteOutcome {
    /// A success answer.
    Acknowledged {
        /// The fact's sequence number from the answer.
        index: u64,
        /// The fact's id from the answer.
        id: u128,
        /// True when the server said that it repeated a first outcome.
        replayed: bool,
    },
    /// An answer that says that nothing was applied, or a request that never left the client.
    Refused {
        /// HTTP status; 0 when nothing was sent.
        status: u16,
    },
    /// No answer, or one that says that it does not know.
    Unknown {
        /// HTTP status of the answer; 0 when there was none.
        status: u16,
    },
}

/// One request to write one value, with its times in microseconds of the recorder's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct WriteAttempt {
    /// The client's number.
    pub client: u32,
    /// The node it talked to, counted from 0, or [`BALANCER`].
    pub node: u16,
    /// The key's number.
    pub key: u64,
    /// The value's number; attempts that repeat one idempotency key share it, no others do.
    pub value: u64,
    /// Before the request was sent.
    pub start_us: u64,
    /// After the answer was read; for unknown outcomes, when the client gave up.
    pub end_us: u64,
    /// How it ended.
    pub outcome: WriteOutcome,
}

/// A fact as a read showed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// The value's number.
    pub value: u64,
    /// The fact's sequence number.
    pub index: u64,
}

/// How one linearizable read ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ReadOutcome {
    /// The newest fact of the key, or none.
    Answered {
        /// What the answer showed.
        newest: Option<Seen>,
    },
    /// An error or no answer: says nothing about the state.
    Failed {
        /// HTTP status; 0 when there was no answer.
        status: u16,
    },
}

/// One linearizable read of the newest fact of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ReadAttempt {
    /// The client's number.
    pub client: u32,
    /// The node it talked to, counted from 0, or [`BALANCER`].
    pub node: u16,
    /// The key's number.
    pub key: u64,
    /// Before the request was sent, microseconds.
    pub start_us: u64,
    /// After the answer was read, microseconds.
    pub end_us: u64,
    /// How it ended.
    pub outcome: ReadOutcome,
}

/// Everything recorded so far, in no particular order.
#[derive(Clone, Debug, Default, Serialize)]
pub struct History {
    /// Attempts to write.
    pub writes: Vec<WriteAttempt>,
    /// Linearizable reads.
    pub reads: Vec<ReadAttempt>,
}

impl History {
    /// End times of acknowledged writes, ascending, microseconds. A repetition that the server marked
    /// as such is no progress and does not count.
    pub fn acknowledged_us(&self) -> Vec<u64> {
        let mut ends: Vec<u64> = self
            .writes
            .iter()
            .filter(|write| matches!(write.outcome, WriteOutcome::Acknowledged { replayed: false, .. }))
            .map(|write| write.end_us)
            .collect();
        ends.sort_unstable();
        ends
    }
}

/// Shared by all clients of one run.
pub struct Recorder {
    origin: Instant,
    lanes: Mutex<Vec<Arc<Mutex<History>>>>,
    values_issued: AtomicU64,
    acknowledged: AtomicU64,
}

impl Recorder {
    /// A recorder whose clock starts now, at 0 microseconds.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            origin: Instant::now(),
            lanes: Mutex::new(Vec::new()),
            values_issued: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
        })
    }

    /// Microseconds since the recorder was made, from the monotonic clock (a paused tokio clock too).
    pub fn now_us(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// A number that no other write carries.
    pub fn next_value(&self) -> u64 {
        self.values_issued.fetch_add(1, Ordering::Relaxed)
    }

    /// How many numbers `next_value` has given out.
    pub fn values_issued(&self) -> u64 {
        self.values_issued.load(Ordering::Relaxed)
    }

    /// Acknowledged writes so far, repetitions not counted.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// A lane for one client.
    pub fn lane(self: &Arc<Self>, client: u32) -> Lane {
        let records = Arc::new(Mutex::new(History::default()));
        locked(&self.lanes).push(Arc::clone(&records));
        Lane { recorder: Arc::clone(self), records, client }
    }

    /// A copy of what all lanes hold at this moment, of attempts that ended at `since_us` or later.
    pub fn history_since(&self, since_us: u64) -> History {
        let mut all = History::default();
        for lane in locked(&self.lanes).iter() {
            let records = locked(lane);
            let writes = records.writes.iter().filter(|w| w.end_us >= since_us);
            all.writes.extend(writes);
            let reads = records.reads.iter().filter(|r| r.end_us >= since_us);
            all.reads.extend(reads);
        }
        all
    }

    /// A copy of everything recorded so far.
    pub fn history(&self) -> History {
        self.history_since(0)
    }
}

/// The record of one client. Attempts of one client may overlap.
pub struct Lane {
    recorder: Arc<Recorder>,
    records: Arc<Mutex<History>>,
    client: u32,
}

impl Lane {
    /// Call right before sending a write. Finish what it returns; dropped, it counts as unknown.
    pub fn begin_write(&self, node: u16, key: u64, value: u64) -> PendingWrite<'_> {
        PendingWrite {
            lane: self,
            attempt: Some(WriteAttempt {
                client: self.client,
                node,
                key,
                value,
                start_us: self.recorder.now_us(),
                end_us: 0,
                outcome: WriteOutcome::Unknown { status: 0 },
            }),
        }
    }

    /// Call right before sending a linearizable read; give the answer to `finish_read`.
    pub fn begin_read(&self, node: u16, key: u64) -> ReadAttempt {
        ReadAttempt {
            client: self.client,
            node,
            key,
            start_us: self.recorder.now_us(),
            end_us: 0,
            outcome: ReadOutcome::Failed { status: 0 },
        }
    }

    /// Records a read as ended now.
    pub fn finish_read(&self, mut attempt: ReadAttempt, outcome: ReadOutcome) {
        attempt.end_us = self.recorder.now_us();
        attempt.outcome = outcome;
        locked(&self.records).reads.push(attempt);
    }
}

/// A write that was begun.
pub struct PendingWrite<'a> {
    lane: &'a Lane,
    attempt: Option<WriteAttempt>,
}

impl PendingWrite<'_> {
    /// Records the write as ended now.
    pub fn finish(mut self, outcome: WriteOutcome) {
        self.record(outcome);
    }

    fn record(&mut self, outcome: WriteOutcome) {
        let Some(mut attempt) = self.attempt.take() else {
            return;
        };
        attempt.end_us = self.lane.recorder.now_us();
        attempt.outcome = outcome;
        if matches!(outcome, WriteOutcome::Acknowledged { replayed: false, .. }) {
            self.lane.recorder.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
        locked(&self.lane.records).writes.push(attempt);
    }
}

impl Drop for PendingWrite<'_> {
    fn drop(&mut self) {
        self.record(WriteOutcome::Unknown { status: 0 });
    }
}

/// A lane holds plain records and every change is one push, so a panic elsewhere leaves it whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
