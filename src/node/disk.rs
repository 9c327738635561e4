//! What this node knows about its own disk.
//!
//! So far a disk is `ok`, or it has `failed` once and for all in the life of this process: an error
//! of the log's writer or of the tree ends the Raft core, and the node goes on as a proxy. Watching
//! for stalls and for a full disk belongs here too.

use serde::{Deserialize, Serialize};

/// State of the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// Every write and sync so far was good.
    #[default]
    Ok,
    /// A write or a sync failed; nothing is acknowledged by this node any more.
    Failed,
}

/// The disk as `/v1/health` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskHealth {
    /// `ok` or `failed`.
    pub state: DiskState,
    /// Why it failed, in the words of the failed call.
    pub reason: Option<String>,
}

impl DiskHealth {
    /// A failed disk.
    pub fn failed(reason: impl Into<String>) -> Self {
        DiskHealth { state: DiskState::Failed, reason: Some(reason.into()) }
    }
}
