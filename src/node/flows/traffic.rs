//! The requests of clients that this process has taken and not yet answered, so that a drain can wait for those that
//! came before a moment without waiting for those that come after it.

use std::sync::{Mutex, PoisonError};

use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};

/// The requests under way.
#[derive(Default)]
pub struct Traffic(Mutex<UnderWay>);

#[derive(Default)]
struct UnderWay {
    now: TaskTracker,
    /// Those before each earlier moment, as long as one of them is under way: whoever waited for them may have gone away,
    /// and the next one waits for them too. There are never more of these than requests.
    before: Vec<TaskTracker>,
}

/// The requests that had begun at a moment.
pub struct Before(Vec<TaskTracker>);

impl Before {
    /// Until all of them have ended.
    pub async fn wait(&self) {
        for requests in &self.0 {
            requests.wait().await;
        }
    }

    /// How many of them are under way.
    pub fn count(&self) -> usize {
        self.0.iter().map(TaskTracker::len).sum()
    }
}

impl Traffic {
    /// A request begins; it ends when the token is dropped.
    pub fn begin(&self) -> TaskTrackerToken {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).now.token()
    }

    /// The requests that have begun so far; later ones are not among them.
    pub fn so_far(&self) -> Before {
        let mut under_way = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = std::mem::take(&mut under_way.now);
        last.close();
        under_way.before.push(last);
        under_way.before.retain(|requests| !requests.is_empty());
        Before(under_way.before.clone())
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
        assert_eq!(so_far.count(), 1);
        drop(before);
        so_far.wait().await;
        assert_eq!(traffic.so_far().count(), 1);
    }

    #[tokio::test]
    async fn whoever_waits_next_waits_for_those_that_nobody_has_waited_out() {
        let traffic = Traffic::default();
        let first = traffic.begin();
        // A drain that is cancelled while it waits.
        drop(traffic.so_far());
        let second = traffic.begin();
        let so_far = traffic.so_far();
        assert_eq!(so_far.count(), 2);
        drop(second);
        assert_eq!(so_far.count(), 1, "one of before the cancelled drain is under way");
        drop(first);
        so_far.wait().await;
        assert_eq!(traffic.so_far().count(), 0);
        assert!(traffic.0.lock().unwrap_or_else(PoisonError::into_inner).before.is_empty());
    }
}
