//! The requests of clients that this process has taken and not yet answered, so that a drain can wait for those that
//! came before a moment without waiting for those that come after it.

use std::sync::{Mutex, PoisonError};

use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

/// The requests under way.
#[derive(Default)]
pub struct Traffic {
    now: Mutex<TaskTracker>,
}

impl Traffic {
    /// A request begins; it ends when the token is dropped.
    pub fn begin(&self) -> TaskTrackerToken {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).token()
    }

    /// The requests that have begun so far; later ones are not among them.
    pub fn so_far(&self) -> TaskTracker {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *now);
        before.close();
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_those_before_are_waited_for() {
        let traffic = Traffic::default();
        let before = traffic.begin();
        let so_far = traffic.so_far();
        let _after = traffic.begin();
        assert_eq!(so_far.len(), 1);
        drop(before);
        so_far.wait().await;
        assert_eq!(traffic.so_far().len(), 1);
    }
}
