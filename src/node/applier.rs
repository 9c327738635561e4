//! The applier as the state machine wants it, and the sign that the state machine is gone.
//!
//! `Raft::shutdown` does not wait for the task that owns the state machine. The applier lives and
//! dies with it, so its end says that no file of the state is touched any more.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::vital::Vital;
use crate::state::{
    apply::{Applier, KeyLimits},
    command::{CommandOutcome, EntryBody},
    engine::{AppliedState, EngineError, StateRead, WriteBatch},
    machine::{EntryApplier, RestoreApplier},
};

/// Dropped with the last applier of a state machine.
type Alive = Arc<oneshot::Sender<()>>;

/// The rules of `state::apply` behind the state machine's trait.
pub struct NodeApplier {
    applier: Applier,
    vital: Vital,
    _alive: Alive,
}

impl Drop for NodeApplier {
    fn drop(&mut self) {
        // Raft notices the end of this task with the next commit only, and takes it for the disk's.
        if std::thread::panicking() {
            self.vital.end("the task that applies entries has died of a defect; the lines before say where".into());
        }
    }
}

impl EntryApplier for NodeApplier {
    fn apply(
        &mut self,
        read: &dyn StateRead,
        log_index: u64,
        body: &EntryBody,
    ) -> Result<(WriteBatch, Vec<CommandOutcome>), EngineError> {
        crate::fail_points::task("task.apply");
        self.applier.apply(read, log_index, body)
    }

    fn save_keys(&mut self) -> Result<WriteBatch, EngineError> {
        self.applier.save_keys()
    }

    fn fact_index(&self) -> u64 {
        self.applier.fact_index()
    }

    fn log_time_ms(&self) -> u64 {
        self.applier.log_time_ms()
    }

    fn feature_level(&self) -> u32 {
        self.applier.feature_level()
    }
}

/// Makes appliers for a state machine. The receiver ends once the machine and all of them are gone.
/// An applier that dies of a panic ends the node.
pub fn restorer(limits: KeyLimits, vital: Vital) -> (RestoreApplier<NodeApplier>, oneshot::Receiver<()>) {
    let (sender, gone) = oneshot::channel();
    let alive: Alive = Arc::new(sender);
    let restore = move |read: &dyn StateRead, applied: &AppliedState| {
        let applier = Applier::restore(read, applied, limits)?;
        Ok(NodeApplier { applier, vital: vital.clone(), _alive: Arc::clone(&alive) })
    };
    (Arc::new(restore), gone)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    struct Empty;

    impl StateRead for Empty {
        fn get(&self, _: &[u8]) -> Result<Option<bytes::Bytes>, EngineError> {
            Ok(None)
        }

        fn scan<'a>(
            &'a self,
            _: std::ops::Bound<&[u8]>,
            _: std::ops::Bound<&[u8]>,
        ) -> Box<dyn Iterator<Item = Result<crate::state::engine::Row, EngineError>> + 'a> {
            Box::new(std::iter::empty())
        }
    }

    #[tokio::test]
    async fn the_death_of_its_task_ends_the_node_and_its_end_does_not() {
        let vital = Vital::default();
        let limits = KeyLimits::default();
        let (restore, _gone) = restorer(limits, vital.clone());
        let applied = AppliedState::default();
        drop(restore(&Empty, &applied).unwrap());
        assert_eq!(vital.ended(), None);
        let applier = restore(&Empty, &applied).unwrap();
        let task = tokio::spawn(async move {
            let _applier = applier;
            tokio::task::yield_now().await;
            panic!("planted");
        });
        assert!(task.await.is_err());
        assert!(vital.ended().is_some_and(|why| why.contains("applies entries")));
    }
}
