//! What this node knows about its own disk.
//!
//! Several things can be true of a disk at once: it may be full, and slow, and then stall. Each is set and cleared by
//! whoever watches for it, with the reason, and the gravest one is the state that everybody sees. A failure is never
//! taken back in the life of an incarnation: what was not written then is not written now.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// State of the disk. The later in this list, the graver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// Every write and sync so far was good.
    #[default]
    Ok,
    /// Syncs take long. The node works, and had better not lead.
    Slow,
    /// No room for new data. Reads and deletes work; the node had better not lead.
    Full,
    /// A write or a sync has not returned for a while. Nothing is acknowledged until it does.
    Stalled,
    /// A write or a sync failed; nothing is acknowledged by this incarnation any more.
    Failed,
    /// The node's files are being made anew from a replica.
    Rebuilding,
    /// A write or a sync has not returned for so long that this process has closed its doors.
    Fenced,
}

impl DiskState {
    /// Every state, the best first.
    pub const ALL: [DiskState; 7] = [
        DiskState::Ok,
        DiskState::Slow,
        DiskState::Full,
        DiskState::Stalled,
        DiskState::Failed,
        DiskState::Rebuilding,
        DiskState::Fenced,
    ];

    /// The word in answers and figures.
    pub fn word(self) -> &'static str {
        match self {
            DiskState::Ok => "ok",
            DiskState::Slow => "slow",
            DiskState::Full => "full",
            DiskState::Stalled => "stalled",
            DiskState::Failed => "failed",
            DiskState::Rebuilding => "rebuilding",
            DiskState::Fenced => "fenced",
        }
    }

    /// Whether a node in this state acknowledges nothing, leads nothing, and answers through others.
    pub fn silences(self) -> bool {
        match self {
            DiskState::Ok | DiskState::Slow | DiskState::Full => false,
            DiskState::Stalled | DiskState::Failed | DiskState::Rebuilding | DiskState::Fenced => true,
        }
    }

    /// Whether what brought this state about may pass.
    fn may_pass(self) -> bool {
        match self {
            DiskState::Ok | DiskState::Slow | DiskState::Full | DiskState::Stalled | DiskState::Rebuilding => true,
            DiskState::Failed | DiskState::Fenced => false,
        }
    }
}

/// The disk as `/v1/health` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskHealth {
    /// The gravest of what is true of it.
    pub state: DiskState,
    /// Why, in the words of the call that failed or hangs; `None` when it is well.
    pub reason: Option<String>,
}

impl DiskHealth {
    /// Why nothing may be acknowledged, if so.
    pub fn silenced(&self) -> Option<String> {
        self.state.silences().then(|| self.reason.clone().unwrap_or_else(|| self.state.word().to_owned()))
    }
}

/// Everything that is true of the disk, and the health that follows from it.
#[derive(Debug, Default)]
pub struct DiskWatch {
    true_now: Mutex<BTreeMap<DiskState, String>>,
    health: watch::Sender<DiskHealth>,
}

impl DiskWatch {
    /// `state` is true of it from now on. The first reason stays. `Ok` says nothing.
    pub fn set(&self, state: DiskState, reason: impl Into<String>) {
        if state != DiskState::Ok {
            self.change(|true_now| {
                true_now.entry(state).or_insert_with(|| reason.into());
            });
        }
    }

    /// `state` is true of it, now for this reason.
    pub fn update(&self, state: DiskState, reason: impl Into<String>) {
        if state != DiskState::Ok {
            self.change(|true_now| {
                true_now.insert(state, reason.into());
            });
        }
    }

    /// `state` is not true of it any more. What cannot pass stays.
    pub fn clear(&self, state: DiskState) {
        if state.may_pass() {
            self.change(|true_now| {
                true_now.remove(&state);
            });
        }
    }

    /// The health now.
    pub fn health(&self) -> DiskHealth {
        self.health.borrow().clone()
    }

    /// The state now.
    pub fn state(&self) -> DiskState {
        self.health.borrow().state
    }

    /// Whether `state` is true of it, also behind a graver one.
    pub fn is(&self, state: DiskState) -> bool {
        self.true_now.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&state)
    }

    /// Changes with the health.
    pub fn subscribe(&self) -> watch::Receiver<DiskHealth> {
        self.health.subscribe()
    }

    /// Returns once the node must be silent.
    pub async fn silences(&self) {
        let mut health = self.subscribe();
        // Never an error: the sender lives as long as this borrow.
        let _silent = health.wait_for(|health| health.state.silences()).await;
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<DiskState, String>)) {
        // Held while the watch is told, so that two changes cannot be told in the wrong order.
        let mut true_now = self.true_now.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut true_now);
        let gravest = true_now.last_key_value();
        let new = gravest.map_or_else(DiskHealth::default, |(state, reason)| DiskHealth {
            state: *state,
            reason: Some(reason.clone()),
        });
        self.health.send_if_modified(|old| {
            let changed = *old != new;
            if changed {
                *old = new;
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gravest_is_seen_and_what_lies_behind_it_comes_back() {
        let disk = DiskWatch::default();
        assert_eq!(disk.health(), DiskHealth::default());
        disk.set(DiskState::Slow, "p99 150 ms");
        disk.set(DiskState::Stalled, "sync of segment.001.wal for 600 ms");
        disk.set(DiskState::Full, "no room");
        assert_eq!(disk.state(), DiskState::Stalled);
        assert!(disk.health().silenced().is_some_and(|why| why.contains("600 ms")));
        disk.clear(DiskState::Stalled);
        assert_eq!((disk.state(), disk.health().silenced()), (DiskState::Full, None));
        assert!(disk.is(DiskState::Slow));
        disk.clear(DiskState::Full);
        disk.clear(DiskState::Slow);
        assert_eq!(disk.health(), DiskHealth::default());
    }

    #[test]
    fn a_failure_stays_with_its_first_reason() {
        let disk = DiskWatch::default();
        disk.set(DiskState::Failed, "first");
        disk.set(DiskState::Failed, "second");
        disk.clear(DiskState::Failed);
        assert_eq!(disk.health().reason.as_deref(), Some("first"));
        disk.set(DiskState::Fenced, "closed");
        disk.clear(DiskState::Fenced);
        assert_eq!(disk.state(), DiskState::Fenced);
    }

    #[test]
    fn words_are_those_of_the_answers() {
        for state in DiskState::ALL {
            assert_eq!(serde_json::to_value(state).ok(), Some(state.word().into()));
        }
        assert_eq!(DiskState::ALL.map(DiskState::word), crate::metrics::DISK_STATES);
        let silent: Vec<&str> = DiskState::ALL.into_iter().filter(|s| s.silences()).map(DiskState::word).collect();
        assert_eq!(silent, ["stalled", "failed", "rebuilding", "fenced"]);
    }
}
