//! What this node knows about its own disk.
//!
//! A disk is `ok`; or `full` for as long as it has no room, which ends by itself (`space`); or it has `failed`
//! once and for all: an error of the log's writer or of the tree ends the Raft core, and the node goes on as a
//! proxy.

use serde::{Deserialize, Serialize};

/// State of the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// Every write and sync so far was good.
    #[default]
    Ok,
    /// Too little room is left for writes of clients; everything else goes on.
    Full,
    /// A write or a sync failed; nothing is acknowledged by this node any more.
    Failed,
}

impl DiskState {
    /// The word in answers and metrics.
    pub fn word(&self) -> &'static str {
        match self {
            DiskState::Ok => "ok",
            DiskState::Full => "full",
            DiskState::Failed => "failed",
        }
    }
}

/// The disk as `/v1/health` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskHealth {
    /// `ok`, `full` or `failed`.
    pub state: DiskState,
    /// Why it failed, in the words of the failed call; or how much room there is and how much is needed.
    pub reason: Option<String>,
}

impl DiskHealth {
    /// A failed disk.
    pub fn failed(reason: impl Into<String>) -> Self {
        DiskHealth { state: DiskState::Failed, reason: Some(reason.into()) }
    }

    /// Why nothing may be acknowledged with this disk, if so.
    pub fn silences(&self) -> Option<&str> {
        match self.state {
            DiskState::Ok | DiskState::Full => None,
            DiskState::Failed => Some(self.reason.as_deref().unwrap_or("the disk has failed")),
        }
    }

    /// The same disk when `reason` says that it is full, or that it is not: every graver state stays.
    pub fn with_room(&self, full: Option<&str>) -> DiskHealth {
        match (&self.state, full) {
            (DiskState::Ok | DiskState::Full, Some(reason)) => {
                DiskHealth { state: DiskState::Full, reason: Some(reason.to_owned()) }
            }
            (DiskState::Full, None) => DiskHealth::default(),
            (DiskState::Ok | DiskState::Failed, _) => self.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_not_silenced_and_a_failed_one_is_never_called_full() {
        let ok = DiskHealth::default();
        let full = ok.with_room(Some("no room"));
        assert_eq!((full.state.clone(), full.silences()), (DiskState::Full, None));
        assert_eq!(full.with_room(None), ok);
        let failed = DiskHealth::failed("fsync failed");
        assert_eq!(failed.silences(), Some("fsync failed"));
        assert_eq!(failed.with_room(Some("no room")), failed);
        assert_eq!(failed.with_room(None), failed);
    }
}
