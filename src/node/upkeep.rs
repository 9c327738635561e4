//! Takes checkpoints and purges the log behind them, by the bytes of the log.
//!
//! A checkpoint is taken when the log has grown by `wal.retain_mb` since the last one, and then the
//! log is purged up to the checkpoint before it: so between one and two times that much stays for
//! replicas that lag, which else would need a whole checkpoint. Nothing is purged that no checkpoint
//! covers; Raft itself makes sure of that. On a full disk room is worth more than what laggards are spared: a
//! checkpoint is taken for every segment that it allows to go, and the log is purged up to that very one.

use std::{sync::Arc, time::Duration};

use openraft::{async_runtime::WatchReceiver, metrics::WaitError};
use stemedb_raft::types::LogId;

use super::{core::Shared, space::Level};

/// How often the size of the log is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a checkpoint may take before it is given up until the next look: it writes one memtable
/// and links files, so this is far above what a working disk needs.
const CHECKPOINT_MAX: Duration = Duration::from_secs(300);

/// What to do next. Pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Todo {
    /// Nothing.
    Nothing,
    /// Take a checkpoint.
    Checkpoint,
}

/// Memory of the last checkpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Upkeep {
    /// Bytes of the log right after the last checkpoint and purge.
    mark_bytes: u64,
}

impl Upkeep {
    /// Decides from the bytes of frames that are not purged.
    pub fn next(&mut self, log_bytes: u64, retain_bytes: u64) -> Todo {
        // A purge finishes some time after it was asked for.
        self.mark_bytes = self.mark_bytes.min(log_bytes);
        if log_bytes - self.mark_bytes > retain_bytes { Todo::Checkpoint } else { Todo::Nothing }
    }

    /// A checkpoint was taken, and the purge behind it asked for, with this much in the log.
    pub fn done(&mut self, log_bytes: u64) {
        self.mark_bytes = log_bytes;
    }
}

/// Runs until the node stops or Raft ends.
pub async fn run(shared: Arc<Shared>) {
    let (Some(core), Some(wal)) = (shared.core.get(), shared.wal()) else { return };
    let retain_bytes = shared.config.wal.retain_mb.saturating_mul(1024 * 1024);
    let segment_bytes = shared.config.wal.segment_size_mb.saturating_mul(1024 * 1024);
    let mut upkeep = Upkeep::default();
    loop {
        tokio::select! {
            () = shared.core_stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        crate::fail_points::task("task.upkeep");
        let is_full = shared.space.report().borrow().level != Level::Room;
        // Whole segments go, so that less than one is not worth a checkpoint.
        let retain_bytes = if is_full { segment_bytes.min(retain_bytes) } else { retain_bytes };
        // Nothing is purged behind a tree that does not have it any more.
        if shared.tree_damage().is_some() {
            continue;
        }
        if upkeep.next(wal.bytes_since_purge(), retain_bytes) == Todo::Nothing {
            continue;
        }
        let before: Option<LogId> = core.raft.metrics().borrow_watched().snapshot;
        if core.raft.trigger().snapshot().await.is_err() {
            return;
        }
        let wait = core.raft.wait(Some(CHECKPOINT_MAX));
        let taken = tokio::select! {
            () = shared.core_stop.cancelled() => return,
            taken = wait.metrics(|m| m.snapshot > before, "a newer checkpoint") => taken,
        };
        match taken {
            Ok(metrics) => {
                tracing::info!(covers = ?metrics.snapshot, log_bytes = wal.bytes_since_purge(), "checkpoint taken");
                let upto = if is_full { metrics.snapshot } else { before };
                if let Some(upto) = upto
                    && core.raft.trigger().purge_log(upto.index).await.is_err()
                {
                    return;
                }
            }
            Err(WaitError::Timeout(..)) => {
                tracing::warn!("no checkpoint was taken within {CHECKPOINT_MAX:?}; trying again later")
            }
            Err(WaitError::ShuttingDown) => return,
        }
        upkeep.done(wal.bytes_since_purge());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_due_after_each_growth_by_the_bound_and_not_again_before() {
        let mut upkeep = Upkeep::default();
        assert_eq!(upkeep.next(100, 100), Todo::Nothing);
        assert_eq!(upkeep.next(101, 100), Todo::Checkpoint);
        upkeep.done(120);
        assert_eq!(upkeep.next(220, 100), Todo::Nothing);
        assert_eq!(upkeep.next(221, 100), Todo::Checkpoint);
    }

    #[test]
    fn a_purge_that_ends_late_moves_the_mark_down() {
        let mut upkeep = Upkeep::default();
        upkeep.done(250);
        assert_eq!(upkeep.next(130, 100), Todo::Nothing, "purged meanwhile");
        assert_eq!(upkeep.next(231, 100), Todo::Checkpoint);
    }
}
