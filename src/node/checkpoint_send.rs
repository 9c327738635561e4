//! Sends a checkpoint to a node whose log lies before everything that is kept here.
//!
//! The manifest goes first, then the files in pieces with a few under way at once, then the order to
//! install. The other side compares every hash before it installs, so a broken transfer costs time
//! and never data; openraft starts it again. A checkpoint that was not accepted is compared with its own hashes
//! here before that: a damaged one would be sent for ever.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use openraft::{
    errors::{StreamingError, Unreachable},
    raft::SnapshotResponse,
    type_config::alias::{SnapshotMetaOf, SnapshotOf},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use stemedb_net::Peer;
use stemedb_raft::types::{TypeConfig, Vote};

use super::{
    kinds::Kind,
    messages::{pack, unpack},
    transport::rpc_error,
};
use crate::state::engine::checkpoint::Checkpoint;

/// Bytes of one piece: large enough that a message costs little beside it, small enough that those
/// under way fit into memory many times.
const CHUNK_BYTES: usize = 512 * 1024;
/// Pieces under way at once: 4 MiB, which keeps a link of 1 Gbit/s with 30 ms busy.
const CHUNKS_IN_FLIGHT_MAX: usize = 8;
/// How long the other side may take for one piece.
const CHUNK_REPLY_MAX: Duration = Duration::from_secs(30);
/// How long it may take to compare and install everything: minutes for tens of gigabytes.
const INSTALL_REPLY_MAX: Duration = Duration::from_secs(600);

/// Opens a transfer. A transfer with a higher vote ends one with a lower.
#[derive(Debug, Serialize, Deserialize)]
pub struct CheckpointOpen {
    /// The sending leader's vote.
    pub vote: Vote,
    /// What the checkpoint covers.
    pub meta: SnapshotMetaOf<TypeConfig>,
    /// Its manifest as stored.
    pub manifest: Bytes,
}

/// The transfer is open.
#[derive(Debug, Serialize, Deserialize)]
pub struct CheckpointAccepted {
    /// Names it in the messages that follow.
    pub session: u64,
}

/// One piece.
#[derive(Debug, Serialize, Deserialize)]
pub struct CheckpointChunk {
    /// The transfer.
    pub session: u64,
    /// Name of the file in the manifest.
    pub file: String,
    /// Where in the file, bytes.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
}

/// Everything was sent.
#[derive(Debug, Serialize, Deserialize)]
pub struct CheckpointInstall {
    /// The transfer.
    pub session: u64,
}

type Error = StreamingError<TypeConfig>;

fn unreachable(error: impl std::error::Error + 'static) -> Error {
    StreamingError::Unreachable(Unreachable::new(&error))
}

/// Why a checkpoint did not arrive.
pub struct SendFailed {
    /// For Raft, which tries again. Never a storage error: a checkpoint that cannot be read is no reason to end the core,
    /// as long as the tree is sound.
    pub error: Error,
    /// Whether the checkpoint itself may be damaged: it could not be read, or what arrived was not accepted.
    pub doubtful: bool,
}

impl From<Error> for SendFailed {
    fn from(error: Error) -> SendFailed {
        SendFailed { error, doubtful: false }
    }
}

fn unreadable(error: impl std::error::Error + 'static) -> SendFailed {
    SendFailed { error: unreachable(error), doubtful: true }
}

async fn call<A: DeserializeOwned>(
    peer: &Peer,
    kind: Kind,
    request: &impl Serialize,
    within: Duration,
) -> Result<A, Error> {
    let body = pack(request).map_err(unreachable)?;
    let answer = peer.call(kind.number(), body, within).await.map_err(|e| Error::from(rpc_error(e)))?;
    unpack(&answer).map_err(unreachable)
}

/// Sends and has it installed; the answer is the other side's vote.
pub async fn send(
    peer: &Peer,
    vote: Vote,
    snapshot: SnapshotOf<TypeConfig, Checkpoint>,
) -> Result<SnapshotResponse<TypeConfig>, SendFailed> {
    let checkpoint = snapshot.snapshot;
    let manifest = checkpoint.manifest_bytes().map_err(unreadable)?;
    let total_bytes = checkpoint.total_bytes();
    tracing::info!(total_bytes, covers = ?snapshot.meta.last_log_id, "sending a checkpoint");
    let open = CheckpointOpen { vote, meta: snapshot.meta, manifest };
    let accepted: CheckpointAccepted = call(peer, Kind::CheckpointOpen, &open, CHUNK_REPLY_MAX).await?;
    let session = accepted.session;
    let pieces = checkpoint
        .files()
        .iter()
        .flat_map(|file| (0..file.bytes).step_by(CHUNK_BYTES).map(move |offset| (file.name.clone(), offset)));
    stream::iter(pieces.collect::<Vec<_>>())
        .map(|(file, offset)| {
            let checkpoint = checkpoint.clone();
            async move {
                let name = file.clone();
                let read = move || checkpoint.read_chunk(&name, offset, CHUNK_BYTES);
                let bytes = tokio::task::spawn_blocking(read).await.map_err(unreachable)?.map_err(unreadable)?;
                let chunk = CheckpointChunk { session, file, offset, bytes };
                call::<()>(peer, Kind::CheckpointChunk, &chunk, CHUNK_REPLY_MAX).await.map_err(SendFailed::from)
            }
        })
        .buffer_unordered(CHUNKS_IN_FLIGHT_MAX)
        .try_collect::<()>()
        .await?;
    let installed = call(peer, Kind::CheckpointInstall, &CheckpointInstall { session }, INSTALL_REPLY_MAX).await;
    installed.map_err(|error| SendFailed { error, doubtful: true })
}
