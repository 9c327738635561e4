//! How old the state of this node may be, for stale reads.
//!
//! A message of the leader says what it had committed when it was sent. Once this node has applied
//! that much, its state is at most as old as that message. So the age is not the time since the last
//! contact alone: a node that is in contact and far behind is stale too. A leader's state is as fresh
//! as its last acknowledgement by a quorum.

/// Memory of the last contacts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freshness {
    /// Monotonic time of the newest contact whose commit is applied here; 0 for never.
    fresh_at_ms: u64,
    /// A later contact whose commit is not applied yet.
    pending: Option<(u64, u64)>,
    /// Monotonic time of the newest contact; 0 for never.
    contact_at_ms: u64,
}

impl Freshness {
    /// A leader's message arrived at `now_ms`: it has committed up to `commit_index`, and this node has
    /// applied up to `applied_index`. `None`: nothing yet.
    pub fn contact(&mut self, now_ms: u64, commit_index: Option<u64>, applied_index: Option<u64>) {
        self.settle(applied_index);
        self.contact_at_ms = self.contact_at_ms.max(now_ms);
        if applied_index >= commit_index {
            self.fresh_at_ms = self.fresh_at_ms.max(now_ms);
            self.pending = None;
        } else if let (None, Some(commit)) = (self.pending, commit_index) {
            // The oldest one that is not applied yet: it is reached first.
            self.pending = Some((now_ms, commit));
        }
    }

    /// Age of the state in milliseconds at `now_ms`; `None`: it was never known to be fresh.
    pub fn age_ms(&mut self, now_ms: u64, applied_index: Option<u64>) -> Option<u64> {
        self.settle(applied_index);
        (self.fresh_at_ms > 0).then(|| now_ms.saturating_sub(self.fresh_at_ms))
    }

    /// Milliseconds since the last message of a leader; `None`: there was none.
    pub fn silence_ms(&self, now_ms: u64) -> Option<u64> {
        (self.contact_at_ms > 0).then(|| now_ms.saturating_sub(self.contact_at_ms))
    }

    fn settle(&mut self, applied_index: Option<u64>) {
        if let Some((at_ms, commit)) = self.pending
            && applied_index >= Some(commit)
        {
            self.fresh_at_ms = self.fresh_at_ms.max(at_ms);
            self.pending = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_as_old_as_the_last_contact_whose_commit_is_applied() {
        let mut f = Freshness::default();
        assert_eq!(f.age_ms(5, None), None);
        f.contact(100, Some(7), Some(7));
        assert_eq!(f.age_ms(130, Some(7)), Some(30));
        f.contact(200, Some(9), Some(7));
        f.contact(250, Some(10), Some(8));
        assert_eq!(f.age_ms(260, Some(8)), Some(160), "in contact and behind is stale");
        assert_eq!(f.age_ms(260, Some(9)), Some(60), "commit 9 is applied, as told at 200");
        assert_eq!(f.silence_ms(260), Some(10));
    }

    #[test]
    fn an_empty_log_in_contact_is_fresh() {
        let mut f = Freshness::default();
        f.contact(100, None, None);
        assert_eq!(f.age_ms(101, None), Some(1));
    }
}
