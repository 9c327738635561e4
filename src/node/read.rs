//! Gives readers a state that is fresh enough.
//!
//! A linearizable read learns the log index it must see (`read_index`), waits until this node has
//! published that much, and then reads here. Failed rounds are tried again, at another leader if there
//! is one, until the deadline; a read never changes anything, so nothing is unknown about it.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    core::{Core, LeaderInfo, Shared, leader_change},
    kinds::Kind,
    messages::{ReadIndexReply, pack, unpack},
    read_index::RoundResult,
};
use crate::{
    clock,
    state::{
        engine::{EngineError, Row, StateRead},
        machine::PublishedView,
    },
    store_helpers::{StoreError, StoreView},
};

/// First pause before a failed round is tried again, milliseconds.
const PAUSE_MIN_MS: u64 = 5;
/// Longest pause.
const PAUSE_MAX_MS: u64 = 50;
/// How long a leader may take for a round: it gives up by itself after one lease.
const ROUND_REPLY_MAX: Duration = Duration::from_secs(1);
/// What `Retry-After` says.
const RETRY_AFTER_S: u64 = 1;

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consistency {
    /// Everything that was acknowledged before the read began.
    Linearizable,
    /// Answered as `Linearizable`: see `read_index`.
    Lease,
    /// Whatever this node has, if it is not older than this.
    Stale {
        /// Greatest age in milliseconds; `None`: any.
        max_staleness_ms: Option<u64>,
    },
}

/// Why there is no state to read.
#[derive(Debug)]
pub enum ReadError {
    /// No leader confirmed the index in time, or this node did not catch up with it in time.
    Unavailable {
        /// What was missing.
        detail: String,
        /// When it is worth trying again, seconds.
        retry_after_s: u64,
    },
    /// The state here is older than was asked for.
    TooStale {
        /// Its age, milliseconds.
        staleness_ms: u64,
        /// The age that was allowed.
        max_staleness_ms: u64,
    },
    /// The local store failed.
    Store(StoreError),
}

fn unavailable(detail: impl Into<String>) -> ReadError {
    ReadError::Unavailable { detail: detail.into(), retry_after_s: RETRY_AFTER_S }
}

/// A published view as a source of rows that can be shared.
struct ViewRead(Arc<PublishedView>);

impl StateRead for ViewRead {
    fn get(&self, key: &[u8]) -> Result<Option<bytes::Bytes>, EngineError> {
        self.0.snapshot.get(key)
    }

    fn scan<'a>(
        &'a self,
        from: std::ops::Bound<&[u8]>,
        to: std::ops::Bound<&[u8]>,
    ) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        self.0.snapshot.scan(from, to)
    }

    fn report_damage(&self, what: &str) {
        self.0.snapshot.report_damage(what);
    }
}

/// A view that satisfies `consistency`, by `deadline`.
pub async fn read(shared: &Shared, consistency: Consistency, deadline: Instant) -> Result<StoreView, ReadError> {
    match consistency {
        Consistency::Linearizable | Consistency::Lease => {
            let fresh = async {
                let index = read_index_until(shared, deadline).await?;
                wait_applied(shared, index, deadline).await
            };
            tokio::select! {
                biased;
                fresh = fresh => fresh?,
                // It will not get there any more, or nobody knows when.
                () = shared.silences() => return Err(gone(shared)),
            }
        }
        Consistency::Stale { max_staleness_ms: Some(max_staleness_ms) } => {
            let staleness_ms = staleness_ms(shared).ok_or_else(|| {
                unavailable(
                    "this node has not heard from a leader since it started, so the age of its state is not known",
                )
            })?;
            if staleness_ms > max_staleness_ms {
                return Err(ReadError::TooStale { staleness_ms, max_staleness_ms });
            }
        }
        Consistency::Stale { max_staleness_ms: None } => {}
    }
    current(shared)
}

/// The newest published state of this node, however old.
pub fn current(shared: &Shared) -> Result<StoreView, ReadError> {
    let core = shared.core.get().ok_or_else(|| unavailable("this node is still starting"))?;
    let view = core.state.view().ok_or_else(|| unavailable("this node is stopping"))?;
    let fact_index = view.state.fact_index;
    Ok(StoreView::new(Arc::new(ViewRead(view)), fact_index))
}

/// Age of the state in milliseconds; `None`: not known.
pub fn staleness_ms(shared: &Shared) -> Option<u64> {
    let core = shared.core.get()?;
    if let Some(since_quorum_ms) = super::status::ms_since_quorum(shared, core) {
        return Some(since_quorum_ms);
    }
    let applied = core.published().applied_log_index;
    let mut freshness = shared.freshness.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    freshness.age_ms(clock::monotonic_ms(), applied)
}

/// The log index that a read which begins now must see.
pub async fn read_index_until(shared: &Shared, deadline: Instant) -> Result<u64, ReadError> {
    let mut view = shared.view.subscribe();
    let mut pause_ms = PAUSE_MIN_MS;
    let mut last_why = "no leader is known".to_owned();
    loop {
        let (leader, known) = {
            let view = view.borrow_and_update();
            (view.leader.clone(), view.leader_key())
        };
        let round = async {
            match &leader {
                Some(leader) => one_round(shared, leader).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            result = round => match result {
                Ok(index) => return Ok(index),
                Err(why) => last_why = why,
            },
            () = shared.stop.cancelled() => return Err(unavailable("this node is stopping")),
            () = tokio::time::sleep_until(deadline) => return Err(unavailable(last_why)),
            () = leader_change(&mut view, known) => continue,
        }
        let pause_until = (Instant::now() + Duration::from_millis(pause_ms)).min(deadline);
        pause_ms = (pause_ms * 2).min(PAUSE_MAX_MS);
        tokio::select! {
            () = tokio::time::sleep_until(pause_until) => {}
            () = leader_change(&mut view, known) => {}
        }
    }
}

async fn one_round(shared: &Shared, leader: &LeaderInfo) -> RoundResult {
    let Some(core) = shared.core.get() else { return Err("this node is still starting".into()) };
    if leader.here { core.leader_rounds.join().await } else { core.remote_rounds.join().await }
}

/// One shared question to the leader of the moment, when it is another node.
pub async fn remote_round(shared: Arc<Shared>) -> RoundResult {
    let mut view = shared.view.subscribe();
    let (leader, known) = {
        let view = view.borrow_and_update();
        (view.leader.clone().filter(|l| !l.here), view.leader_key())
    };
    let leader = leader.ok_or_else(|| "the leader has just changed".to_owned())?;
    let peer = shared.peers.to(leader.id, &leader.addr, stemedb_net::Lane::Control);
    let body = pack(&()).map_err(|e| e.to_string())?;
    let answer = tokio::select! {
        biased;
        answer = peer.call(Kind::ReadIndex.number(), body, ROUND_REPLY_MAX) => answer.map_err(|e| e.to_string())?,
        // A leader that hangs must not hold back the reads that could go to the next one.
        () = leader_change(&mut view, known) => return Err("the leader has just changed".into()),
    };
    match unpack(&answer).map_err(|e| e.to_string())? {
        ReadIndexReply::Index(index) => Ok(index),
        ReadIndexReply::NotLeader(why) => Err(why),
    }
}

/// Nothing more is applied by this incarnation.
fn gone(shared: &Shared) -> ReadError {
    unavailable(match shared.silenced() {
        Some(why) => format!("this node answers nothing by itself ({why})"),
        None => "this node is stopping".into(),
    })
}

/// Waits until this node has published everything up to `index`.
pub async fn wait_applied(shared: &Shared, index: u64, deadline: Instant) -> Result<(), ReadError> {
    let core: &Core = shared.core.get().ok_or_else(|| unavailable("this node is still starting"))?;
    let mut published = core.state.published();
    let reached = published.wait_for(|state| state.applied_log_index >= Some(index));
    match tokio::time::timeout_at(deadline, reached).await.map(|ended| ended.is_ok()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(gone(shared)),
        Err(_) => Err(unavailable(format!(
            "this node has applied log index {:?}, and the read must see {index}",
            core.published().applied_log_index
        ))),
    }
}
