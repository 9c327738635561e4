//! Serves checkpoints to nodes that rebuild.
//!
//! The receiver asks for each piece, so that it sets the pace. An offered checkpoint stays on the disk, by the links
//! in its folder, until nobody has asked for a piece of it for a while; a newer one may take its place meanwhile.
//! Reads are blocking and few at a time, away from the runtime that serves Raft. The sender says in each piece
//! whether it has clients to serve.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use openraft::{async_runtime::WatchReceiver, type_config::alias::LogIdOf};
use stemedb_net::Refusal;
use stemedb_raft::types::TypeConfig;
use tokio::sync::Semaphore;

use super::messages::{FetchRequest, Offer, OfferRequest, Piece};
use crate::{
    clock,
    node::{
        core::Shared,
        messages::{pack, unpack},
        rpc_server::{FAILED, REFUSED_BEFORE_EFFECT},
    },
    state::engine::checkpoint::Checkpoint,
};

/// Largest piece: beside it a message costs little, and 16 of them fit into memory easily.
pub const PIECE_BYTES_MAX: u32 = 1024 * 1024;
/// Pieces read from the disk at once.
const READS_MAX: usize = 4;
/// An offer that nobody asked about for this long is forgotten, milliseconds. A receiver that comes back later gets
/// another one, and keeps the files that are in both.
const IDLE_MS: u64 = 120_000;
/// Offers at once. One node rebuilds at a time; a restart of its process makes a second one.
const OFFERS_MAX: usize = 4;
/// How long a checkpoint may take to be made before an older one is offered.
const CHECKPOINT_MAX: Duration = Duration::from_secs(20);
/// Entries a second above which a node counts as busy. Heartbeats are no entries, and an idle cluster writes none.
const BUSY_ENTRIES_PER_S: u64 = 20;
/// How often the rate of entries is looked at, milliseconds.
const RATE_INTERVAL_MS: u64 = 250;

/// The offers of this process, over all incarnations.
#[derive(Default)]
pub struct Offers {
    table: Mutex<Table>,
    reads: OnceReads,
    rate: Mutex<Rate>,
}

struct OnceReads(Semaphore);

impl Default for OnceReads {
    fn default() -> Self {
        OnceReads(Semaphore::new(READS_MAX))
    }
}

#[derive(Default)]
struct Table {
    last_session: u64,
    open: BTreeMap<u64, (Checkpoint, u64)>,
}

#[derive(Default)]
struct Rate {
    at_ms: u64,
    index: u64,
    busy: bool,
}

impl Rate {
    /// Whether entries come at more than the rate of a quiet cluster.
    fn busy(&mut self, now_ms: u64, index: u64) -> bool {
        let since_ms = now_ms.saturating_sub(self.at_ms);
        if self.at_ms == 0 || since_ms >= RATE_INTERVAL_MS {
            let entries = index.saturating_sub(self.index);
            self.busy = self.at_ms != 0 && entries.saturating_mul(1_000) > BUSY_ENTRIES_PER_S.saturating_mul(since_ms);
            (self.at_ms, self.index) = (now_ms, index);
        }
        self.busy
    }
}

fn refused(why: impl ToString) -> Refusal {
    Refusal::new(REFUSED_BEFORE_EFFECT, why.to_string())
}

fn failed(why: impl ToString) -> Refusal {
    Refusal::new(FAILED, why.to_string())
}

impl Offers {
    /// Handles `Kind::CheckpointOffer`.
    pub async fn offer(self: Arc<Self>, shared: Arc<Shared>, body: Bytes) -> Result<Bytes, Refusal> {
        let OfferRequest { fresh } = unpack(&body).map_err(refused)?;
        if let Some(why) = shared.silenced() {
            return Err(refused(format!("this node cannot send a checkpoint: {why}")));
        }
        if let Some(why) = shared.tree_damage() {
            return Err(refused(format!("this node cannot send a checkpoint, its own tree is damaged: {why}")));
        }
        let checkpoint = checkpoint(&shared, fresh).await?;
        let manifest = checkpoint.manifest_bytes().map_err(failed)?;
        let covers: Option<LogIdOf<TypeConfig>> = checkpoint.applied().log_id;
        tracing::info!(
            total_bytes = checkpoint.total_bytes(),
            ?covers,
            "offering a checkpoint to a node that rebuilds"
        );
        let session = self.put(checkpoint);
        pack(&Offer { session, covers, manifest }).map_err(failed)
    }

    fn put(&self, checkpoint: Checkpoint) -> u64 {
        let now_ms = clock::monotonic_ms();
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.open.retain(|_, (_, used_ms)| now_ms.saturating_sub(*used_ms) < IDLE_MS);
        while table.open.len() >= OFFERS_MAX {
            table.open.pop_first();
        }
        table.last_session += 1;
        let session = table.last_session;
        table.open.insert(session, (checkpoint, now_ms));
        session
    }

    fn get(&self, session: u64) -> Result<Checkpoint, Refusal> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let (checkpoint, used_ms) =
            table.open.get_mut(&session).ok_or_else(|| refused("this offer has ended: ask for another"))?;
        *used_ms = clock::monotonic_ms();
        Ok(checkpoint.clone())
    }

    /// Handles `Kind::CheckpointFetch`.
    pub async fn fetch(self: Arc<Self>, shared: Arc<Shared>, body: Bytes) -> Result<Bytes, Refusal> {
        let FetchRequest { session, file, offset, bytes } = unpack(&body).map_err(refused)?;
        let checkpoint = self.get(session)?;
        let index = shared.wal().and_then(|wal| wal.last_log_id()).map_or(0, |id| id.index);
        let busy = {
            let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
            rate.busy(clock::monotonic_ms(), index)
        };
        let _slot = self.reads.0.acquire().await.map_err(failed)?;
        let length = bytes.min(PIECE_BYTES_MAX) as usize;
        tokio::task::spawn_blocking(move || {
            let bytes = checkpoint.read_chunk(&file, offset, length).map_err(failed)?;
            pack(&Piece { bytes, busy }).map_err(failed)
        })
        .await
        .map_err(failed)?
    }

    /// Forgets offers that nobody uses, so that their folders can go.
    pub fn tidy(&self) {
        let now_ms = clock::monotonic_ms();
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.open.retain(|_, (_, used_ms)| now_ms.saturating_sub(*used_ms) < IDLE_MS);
    }
}

/// A checkpoint of what is applied now, or the newest there is.
async fn checkpoint(shared: &Shared, fresh: bool) -> Result<Checkpoint, Refusal> {
    let core = shared.core.get().ok_or_else(|| refused("this node is still starting"))?;
    let applied = core.published().applied_log_index;
    let newest = core.state.checkpoint();
    let is_current = newest.as_ref().is_some_and(|c| c.applied().log_index() >= applied);
    if !is_current && (fresh || newest.is_none()) {
        core.raft.trigger().snapshot().await.map_err(failed)?;
        let goal = core.raft.metrics().borrow_watched().last_applied;
        let wait = core.raft.wait(Some(CHECKPOINT_MAX));
        if let Err(error) = wait.metrics(|m| m.snapshot.is_some() && m.snapshot >= goal, "a checkpoint").await {
            tracing::warn!(%error, "no new checkpoint was made in time");
        }
    }
    core.state.checkpoint().ok_or_else(|| refused("this node has no checkpoint"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_busy_while_entries_come_fast() {
        let mut rate = Rate::default();
        assert!(!rate.busy(1_000, 500), "one look says nothing about a rate");
        assert!(!rate.busy(1_100, 900), "too early to tell");
        assert!(rate.busy(2_000, 900), "400 entries within a second");
        assert!(rate.busy(2_100, 900));
        assert!(!rate.busy(3_000, 905));
    }
}
