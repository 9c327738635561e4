//! Tasks without which the node only looks alive.
//!
//! A panic ends one task and nothing else: a leader without its proposer would go on sending
//! heartbeats and refuse every write. So a panic in one of these ends the node, with the reason in
//! its log: readiness goes, leadership is handed over, and the process ends with a code of its own.

use std::{future::Future, panic::AssertUnwindSafe};

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// Starts such tasks. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Vital {
    fatal: watch::Sender<Option<String>>,
    tasks: TaskTracker,
}

impl Vital {
    /// Tasks of their own, and the same end: a panic in either ends the node.
    pub fn sibling(&self) -> Vital {
        Vital { fatal: self.fatal.clone(), tasks: TaskTracker::new() }
    }

    /// Starts `task`. `what` names it in the reason why the node ends.
    pub fn spawn(&self, what: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let vital = self.clone();
        self.tasks.spawn(async move {
            // The panic itself has been logged by the hook.
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                vital.end(format!("{what} has died of a defect; the lines before say where"));
            }
        });
    }

    /// The node cannot go on. The first reason stays.
    pub fn end(&self, why: String) {
        self.fatal.send_if_modified(|known| {
            if known.is_some() {
                return false;
            }
            tracing::error!("this node cannot go on: {why}");
            *known = Some(why);
            true
        });
    }

    /// Why the node cannot go on, if so.
    pub fn ended(&self) -> Option<String> {
        self.fatal.borrow().clone()
    }

    /// Returns once the node cannot go on, with the reason.
    pub async fn wait_ended(&self) -> String {
        let mut fatal = self.fatal.subscribe();
        match fatal.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Returns once every task has ended. They are told to by other means.
    pub async fn finished(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_the_node_and_the_first_reason_stays() {
        let vital = Vital::default();
        vital.spawn("the first task", async {});
        vital.spawn("the second task", async { panic!("planted") });
        assert!(vital.wait_ended().await.contains("the second task"));
        vital.end("later".into());
        assert!(vital.ended().is_some_and(|why| why.contains("the second task")));
        vital.finished().await;
    }
}
