//! Takes in a checkpoint that a leader sends, and has Raft install it.
//!
//! There is one transfer at a time. A new one by the same or a later leader takes the place of the
//! one before; pieces of an older transfer are refused. Nothing counts before every file was compared
//! with its hash, and the state in use is untouched until Raft installs the whole. A write or sync that fails meanwhile
//! is the failure of this node's disk.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf};
use stemedb_net::Refusal;
use stemedb_raft::types::{TypeConfig, Vote};

use super::{
    checkpoint_send::{CheckpointAccepted, CheckpointChunk, CheckpointInstall, CheckpointOpen},
    core::Shared,
    disk::DiskState,
    messages::{pack, unpack},
    rebuild::fail_point,
    rpc_server::{FAILED, REFUSED_BEFORE_EFFECT},
};
use crate::state::engine::{
    EngineError,
    checkpoint::Checkpoint,
    receive::{CheckpointReceiver, is_failed_disk},
};

struct Transfer {
    session: u64,
    vote: Vote,
    meta: SnapshotMetaOf<TypeConfig>,
    receiver: Arc<Mutex<Option<CheckpointReceiver>>>,
}

/// The transfer of the moment.
pub struct CheckpointInbox {
    data_dir: PathBuf,
    current: Mutex<Option<Transfer>>,
    /// Held while the folder is cleared and while its content is installed: neither may meet the
    /// other. Counts the transfers.
    folder: Arc<tokio::sync::Mutex<u64>>,
}

fn refused(why: impl ToString) -> Refusal {
    Refusal::new(REFUSED_BEFORE_EFFECT, why.to_string())
}

fn failed(why: impl ToString) -> Refusal {
    Refusal::new(FAILED, why.to_string())
}

/// Nothing is written any more on a disk that has failed, nor while the folder's content changes hands.
fn may_receive(shared: &Shared) -> Result<(), Refusal> {
    match (shared.silenced(), shared.core.get()) {
        (Some(why), _) => Err(refused(format!("this node takes no checkpoint: {why}"))),
        (None, None) => Err(refused("this node is still starting")),
        (None, Some(_)) => Ok(()),
    }
}

/// A disk that has failed under a received checkpoint has failed for all: the second sync of a file may lie, and there
/// is only one disk.
fn suffer(shared: &Shared, error: &EngineError) {
    if !is_failed_disk(error) {
        return;
    }
    match shared.core.get() {
        Some(core) => core.state.suffer(error),
        None => shared.disk.set(DiskState::Failed, error.to_string()),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

impl CheckpointInbox {
    /// Receives below `data_dir`.
    pub fn new(data_dir: PathBuf) -> CheckpointInbox {
        CheckpointInbox { data_dir, current: Mutex::default(), folder: Arc::default() }
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Option<Transfer>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles `Kind::CheckpointOpen`.
    pub async fn open(self: Arc<Self>, shared: Arc<Shared>, body: Bytes) -> Result<Bytes, Refusal> {
        let CheckpointOpen { vote, meta, manifest } = unpack(&body).map_err(refused)?;
        may_receive(&shared)?;
        let mut sessions = self.folder.lock().await;
        if let Some(transfer) = &*self.current()
            && vote < transfer.vote
        {
            return Err(refused(format!("a checkpoint of {} is being received", transfer.vote)));
        }
        let data_dir = self.data_dir.clone();
        let fail_point = fail_point::of_folder(&data_dir);
        let begin = move || CheckpointReceiver::begin_with(&data_dir, &manifest, Some(fail_point));
        let receiver = blocking(begin).await?.map_err(|error| {
            suffer(&shared, &error);
            refused(error)
        })?;
        tracing::info!(
            total_bytes = receiver.announced().total_bytes(),
            covers = ?meta.last_log_id,
            "receiving a checkpoint"
        );
        *sessions += 1;
        let session = *sessions;
        let receiver = Arc::new(Mutex::new(Some(receiver)));
        *self.current() = Some(Transfer { session, vote, meta, receiver });
        pack(&CheckpointAccepted { session }).map_err(failed)
    }

    fn receiver_of(&self, session: u64) -> Result<Arc<Mutex<Option<CheckpointReceiver>>>, Refusal> {
        match &*self.current() {
            Some(transfer) if transfer.session == session => Ok(Arc::clone(&transfer.receiver)),
            _ => Err(refused("this transfer has ended")),
        }
    }

    /// Handles `Kind::CheckpointChunk`.
    pub async fn chunk(self: Arc<Self>, shared: Arc<Shared>, body: Bytes) -> Result<Bytes, Refusal> {
        let CheckpointChunk { session, file, offset, bytes } = unpack(&body).map_err(refused)?;
        may_receive(&shared)?;
        let receiver = self.receiver_of(session)?;
        let write = move || match &mut *receiver.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(receiver) => receiver.write(&file, offset, &bytes).map_err(|error| {
                suffer(&shared, &error);
                failed(error)
            }),
            None => Err(refused("this transfer is being installed")),
        };
        blocking(write).await??;
        pack(&()).map_err(failed)
    }

    /// Handles `Kind::CheckpointInstall`. Runs to its end even when the connection is lost meanwhile.
    pub async fn install(self: Arc<Self>, shared: Arc<Shared>, body: Bytes) -> Result<Bytes, Refusal> {
        let CheckpointInstall { session } = unpack(&body).map_err(refused)?;
        tokio::spawn(self.install_session(shared, session)).await.map_err(failed)?
    }

    async fn install_session(self: Arc<Self>, shared: Arc<Shared>, session: u64) -> Result<Bytes, Refusal> {
        let _folder = Arc::clone(&self.folder).lock_owned().await;
        may_receive(&shared)?;
        let Some(transfer) = self.current().take_if(|t| t.session == session) else {
            return Err(refused("this transfer has ended"));
        };
        let receiver = transfer.receiver;
        let suffering = Arc::clone(&shared);
        let finish = move || {
            let receiver = receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
            receiver.ok_or_else(|| refused("this transfer is being installed"))?.finish().map_err(|error| {
                suffer(&suffering, &error);
                failed(error)
            })
        };
        let checkpoint: Checkpoint = blocking(finish).await??;
        let core = shared.core.get().ok_or_else(|| refused("this node is still starting"))?;
        let snapshot = SnapshotOf::<TypeConfig, Checkpoint> { meta: transfer.meta, snapshot: checkpoint };
        let response = core.raft.install_full_snapshot(transfer.vote, snapshot).await.map_err(failed)?;
        tracing::info!(last_log = ?shared.wal().and_then(stemedb_raft::WalHandle::last_log_id), "checkpoint installed");
        pack(&response).map_err(failed)
    }
}
