//! The log index that a linearizable read must see.
//!
//! A leader that wants to serve a read first confirms, by a round of heartbeats, that it still leads,
//! and then serves everything committed before the round. Rounds are shared: a read joins only a
//! round that starts after it arrived, so that one round serves all reads that waited for it. A
//! follower asks the leader for the index, with its own questions shared in the same way, and then
//! waits until it has applied that much itself. `lease` reads are answered in the same way: a lease
//! is void after a follower restarts, since it may then vote at once, and nothing here prevents that.

use std::{future::Future, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use openraft::{
    ReadPolicy,
    errors::{LinearizableReadError, RaftError},
};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{core::RaftNode, vital::Vital};

/// Rounds under way at once. A round lasts as long as a follower's sync; with a second and a third one
/// a read waits for its own round only, and not for the one before.
const ROUNDS_IN_FLIGHT_MAX: usize = 4;

/// A round without an end is given up after this: a few of them would hold every slot, and with them
/// all reads. Far above a lease, after which a leader gives up by itself.
const ROUND_MAX: Duration = Duration::from_secs(3);

/// Reads that wait for a round. The HTTP side holds far fewer connections than this; at the bound
/// reads are refused.
const WAITING_MAX: usize = 16_384;

/// What a round brings: the log index, or why there is none.
pub type RoundResult = Result<u64, String>;

/// Shares rounds among the reads that wait. Cheap to clone.
#[derive(Clone)]
pub struct Rounds {
    queue: mpsc::Sender<oneshot::Sender<RoundResult>>,
}

impl Rounds {
    /// Starts the task. `round` runs one round. The task ends with `stop` or when the last clone is gone.
    pub fn start<F>(vital: &Vital, stop: CancellationToken, round: impl Fn() -> F + Send + Sync + 'static) -> Rounds
    where
        F: Future<Output = RoundResult> + Send + 'static,
    {
        let (queue, waiting) = mpsc::channel(WAITING_MAX);
        let task = run(Box::new(move || Box::pin(round())), waiting);
        vital.spawn("the task that shares read rounds", async move {
            stop.run_until_cancelled(task).await;
        });
        Rounds { queue }
    }

    /// The result of a round that starts after this call.
    pub async fn join(&self) -> RoundResult {
        let (reply, result) = oneshot::channel();
        self.queue.try_send(reply).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => format!("{WAITING_MAX} reads wait already"),
            mpsc::error::TrySendError::Closed(_) => "the node is stopping".to_owned(),
        })?;
        result.await.unwrap_or_else(|_| Err("the node is stopping".into()))
    }
}

type BoxedRound = Box<dyn Fn() -> BoxFuture<'static, RoundResult> + Send + Sync>;

async fn run(round: BoxedRound, mut waiting: mpsc::Receiver<oneshot::Sender<RoundResult>>) {
    let slots = Arc::new(Semaphore::new(ROUNDS_IN_FLIGHT_MAX));
    loop {
        // First a slot, then the reads: all that arrived while every slot was taken share the next round.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let Some(first) = waiting.recv().await else { return };
        let mut reads = vec![first];
        while let Ok(next) = waiting.try_recv() {
            reads.push(next);
        }
        reads.retain(|read| !read.is_closed());
        if reads.is_empty() {
            continue;
        }
        let under_way = round();
        tokio::spawn(async move {
            let given_up = |_| Err(format!("the leader was not confirmed within {ROUND_MAX:?}"));
            let result = tokio::time::timeout(ROUND_MAX, under_way).await.unwrap_or_else(given_up);
            drop(slot);
            for read in reads {
                // The reader is gone when its deadline passed.
                let _ = read.send(result.clone());
            }
        });
    }
}

/// One round at the leader: everything up to the answered index was committed when it began. `silenced`: why this node
/// must not speak as a leader, if so.
pub async fn leader_round(raft: RaftNode, silenced: impl Fn() -> Option<String>) -> RoundResult {
    if let Some(why) = silenced() {
        return Err(why);
    }
    match (raft.get_read_linearizer(ReadPolicy::ReadIndex).await, silenced()) {
        (Ok(linearizer), None) => Ok(linearizer.read_log_id().index()),
        (Ok(_), Some(why)) => Err(why),
        (Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(few))), _) => {
            Err(format!("too few voters confirm that this node still leads ({}, itself among them)", few.got.len()))
        }
        (Err(error), _) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::watch;

    use super::*;

    /// Rounds that are numbered when they start and end when `open` reaches their number.
    fn gated(open: watch::Receiver<u64>) -> (Rounds, Arc<AtomicU64>) {
        let started = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&started);
        let rounds = Rounds::start(&Vital::default(), CancellationToken::new(), move || {
            let number = counter.fetch_add(1, Ordering::SeqCst) + 1;
            let mut open = open.clone();
            async move {
                open.wait_for(|n| *n >= number).await.unwrap();
                Ok(number)
            }
        });
        (rounds, started)
    }

    #[tokio::test]
    async fn a_read_joins_only_a_round_that_starts_after_it_arrived() {
        let (gate, open) = watch::channel(0);
        let (rounds, started) = gated(open);
        let mut early = Vec::new();
        for n in 1..=ROUNDS_IN_FLIGHT_MAX as u64 {
            let rounds = rounds.clone();
            early.push(tokio::spawn(async move { rounds.join().await }));
            while started.load(Ordering::SeqCst) < n {
                tokio::task::yield_now().await;
            }
        }
        let late: Vec<_> = (0..50)
            .map(|_| {
                let rounds = rounds.clone();
                tokio::spawn(async move { rounds.join().await })
            })
            .collect();
        while rounds.queue.capacity() > WAITING_MAX - late.len() {
            tokio::task::yield_now().await;
        }
        gate.send_replace(u64::MAX);
        for (n, read) in (1..).zip(early) {
            assert_eq!(read.await.unwrap(), Ok(n));
        }
        for read in late {
            assert_eq!(read.await.unwrap(), Ok(ROUNDS_IN_FLIGHT_MAX as u64 + 1), "all late reads share one round");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn rounds_without_an_end_do_not_keep_later_reads_out() {
        let started = Arc::new(AtomicU64::new(0));
        let rounds = Rounds::start(&Vital::default(), CancellationToken::new(), move || {
            let number = started.fetch_add(1, Ordering::SeqCst);
            async move { if number < ROUNDS_IN_FLIGHT_MAX as u64 { std::future::pending().await } else { Ok(number) } }
        });
        let mut stuck = Vec::new();
        for _ in 0..ROUNDS_IN_FLIGHT_MAX {
            let rounds = rounds.clone();
            stuck.push(tokio::spawn(async move { rounds.join().await }));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(rounds.join().await, Ok(ROUNDS_IN_FLIGHT_MAX as u64));
        for read in stuck {
            assert!(read.await.unwrap().unwrap_err().contains("not confirmed"));
        }
    }

    #[tokio::test]
    async fn a_task_that_dies_ends_the_node() {
        let vital = Vital::default();
        #[allow(clippy::panic)]
        let round = || -> std::future::Ready<RoundResult> { panic!("planted") };
        let rounds = Rounds::start(&vital, CancellationToken::new(), round);
        assert!(rounds.join().await.is_err());
        assert!(vital.wait_ended().await.contains("read rounds"));
    }

    #[tokio::test]
    async fn a_failed_round_is_told_to_each_of_its_reads() {
        let rounds =
            Rounds::start(&Vital::default(), CancellationToken::new(), || async { Err("no quorum".to_owned()) });
        assert_eq!(rounds.join().await, Err("no quorum".into()));
    }
}
