//! A disk that is slow, and leadership that is better elsewhere.
//!
//! One slow sync says nothing; many of them make every write of the cluster slow, when they are the leader's. So the
//! 99th percentile of the log's syncs has to stay above the limit for a while before the disk counts as slow, and well
//! below it for longer before it does not. A slow leader gives leadership once to a voter whose syncs are clearly faster,
//! and then not again for long: what makes one disk slow may make the others slow in turn, and leadership must not wander
//! with it.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;

use super::{
    core::{Core, Role, Shared},
    disk::DiskState,
    handover, status,
};
use crate::clock;

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The percentile must stay above the limit for so long before the disk counts as slow.
const SLOW_AFTER_MS: u64 = 5_000;
/// It must stay below half of the limit for so long before it does not any more.
const WELL_AFTER_MS: u64 = 30_000;
/// A leader that gave leadership away for this reason does not do so again before.
const MOVE_AGAIN_AFTER_MS: u64 = 600_000;
/// Another node is clearly faster when its percentile is at most this part of the leader's.
const FASTER_BY: u64 = 3;

/// What is seen at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Of the monotonic clock, milliseconds.
    pub now_ms: u64,
    /// 99th percentile of this node's syncs, milliseconds; `None` without any.
    pub own_p99_ms: Option<u64>,
    /// Whether this node leads.
    pub leads: bool,
    /// The other voters that would take over, with theirs. Needed only of a slow leader.
    pub others: Vec<(u64, Option<u64>)>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Nothing new.
    Nothing,
    /// The disk counts as slow from now on.
    BecameSlow,
    /// It does not any more.
    BecameWell,
    /// Give leadership to this one.
    MoveTo(u64),
}

/// Memory of what was seen. Pure.
#[derive(Clone, Debug)]
pub struct Slowness {
    slow_ms: u64,
    is_slow: bool,
    /// Since when the other verdict would be right; `None`: it would not.
    otherwise_since_ms: Option<u64>,
    moved_at_ms: Option<u64>,
}

impl Slowness {
    /// A disk counts as slow when the percentile stays above `slow_ms`.
    pub fn new(slow_ms: u64) -> Slowness {
        Slowness { slow_ms, is_slow: false, otherwise_since_ms: None, moved_at_ms: None }
    }

    /// Whether the disk counts as slow.
    pub fn is_slow(&self) -> bool {
        self.is_slow
    }

    /// Whether a leader should ask the others how fast they are.
    pub fn wants_others(&self, now_ms: u64) -> bool {
        let may_move = self.moved_at_ms.is_none_or(|at| now_ms.saturating_sub(at) >= MOVE_AGAIN_AFTER_MS);
        self.is_slow && may_move
    }

    /// What to do, given what is seen.
    pub fn next(&mut self, seen: &Seen) -> Advice {
        let (otherwise, for_ms) = if self.is_slow {
            // Without syncs there is nothing that is slow.
            (seen.own_p99_ms.is_none_or(|p99| p99 <= self.slow_ms / 2), WELL_AFTER_MS)
        } else {
            (seen.own_p99_ms.is_some_and(|p99| p99 > self.slow_ms), SLOW_AFTER_MS)
        };
        if !otherwise {
            self.otherwise_since_ms = None;
        } else if seen.now_ms.saturating_sub(*self.otherwise_since_ms.get_or_insert(seen.now_ms)) >= for_ms {
            self.otherwise_since_ms = None;
            self.is_slow = !self.is_slow;
            return if self.is_slow { Advice::BecameSlow } else { Advice::BecameWell };
        }
        match self.faster(seen) {
            Some(id) if seen.leads && self.wants_others(seen.now_ms) => {
                self.moved_at_ms = Some(seen.now_ms);
                Advice::MoveTo(id)
            }
            _ => Advice::Nothing,
        }
    }

    /// The fastest of the others, if it is clearly faster and not slow itself.
    fn faster(&self, seen: &Seen) -> Option<u64> {
        let own = seen.own_p99_ms.filter(|own| *own > self.slow_ms)?;
        let known = seen.others.iter().filter_map(|(id, p99)| Some(((*p99)?, *id)));
        let (p99, id) = known.min()?;
        (p99 <= self.slow_ms && p99.saturating_mul(FASTER_BY) <= own).then_some(id)
    }
}

/// Runs until the core ends.
pub async fn watch_slowness(shared: Arc<Shared>) {
    let (Some(core), Some(wal)) = (shared.core.get(), shared.wal()) else { return };
    let mut slowness = Slowness::new(shared.config.cluster.slow_fsync_ms);
    loop {
        tokio::select! {
            () = shared.core_stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let now_ms = clock::monotonic_ms();
        let leads = shared.silenced().is_none() && shared.view.borrow().role == Role::Leader;
        let others = if leads && slowness.wants_others(now_ms) { others(&shared, core).await } else { Vec::new() };
        let own_p99_ms = wal.fsync_p99_ms().map(status::whole_ms);
        let p99 = own_p99_ms.unwrap_or_default();
        match slowness.next(&Seen { now_ms, own_p99_ms, leads, others }) {
            Advice::Nothing => {}
            Advice::BecameSlow => {
                tracing::warn!(p99_ms = p99, "slow fsync: the disk of this node is slow");
                shared.disk.set(DiskState::Slow, format!("99 of 100 syncs take up to {p99} ms"));
            }
            Advice::BecameWell => {
                tracing::info!(p99_ms = p99, "the disk of this node is not slow any more");
                shared.disk.clear(DiskState::Slow);
            }
            Advice::MoveTo(id) => handover::pass_on_to(&shared, core, id, "its disk is slow").await,
        }
    }
}

async fn others(shared: &Shared, core: &Core) -> Vec<(u64, Option<u64>)> {
    let asked = handover::voters(&core.raft_metrics())
        .into_iter()
        .map(|(id, _, addr)| async move { (id, status::ask_status(shared, id, &addr).await.ok()) });
    let answers = join_all(asked).await;
    let willing = answers.into_iter().filter_map(|(id, status)| Some((id, status.filter(handover::is_well)?)));
    willing.map(|(id, status)| (id, status.fsync_p99_ms)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(now_ms: u64, own: u64, others: &[(u64, Option<u64>)]) -> Seen {
        Seen { now_ms, own_p99_ms: Some(own), leads: true, others: others.to_vec() }
    }

    fn slow() -> Slowness {
        Slowness { is_slow: true, ..Slowness::new(100) }
    }

    #[test]
    fn slow_is_what_stays_slow_and_well_what_stays_well() {
        let mut disk = Slowness::new(100);
        assert_eq!(disk.next(&seen(1_000, 150, &[])), Advice::Nothing);
        assert_eq!(disk.next(&seen(4_000, 90, &[])), Advice::Nothing, "not sustained");
        assert_eq!(disk.next(&seen(5_000, 150, &[])), Advice::Nothing);
        assert_eq!(disk.next(&seen(9_999, 150, &[])), Advice::Nothing);
        assert_eq!(disk.next(&seen(10_000, 150, &[])), Advice::BecameSlow);
        assert_eq!(disk.next(&seen(11_000, 60, &[])), Advice::Nothing, "neither slow nor well");
        assert_eq!(disk.next(&seen(12_000, 50, &[])), Advice::Nothing);
        assert_eq!(disk.next(&seen(41_999, 10, &[])), Advice::Nothing);
        assert_eq!(disk.next(&seen(42_000, 10, &[])), Advice::BecameWell);
        assert!(!disk.is_slow());
    }

    #[test]
    fn leadership_goes_to_one_that_is_clearly_faster_and_only_then() {
        /// Own percentile, whether it leads, the others', and what follows.
        type Row = (u64, bool, &'static [(u64, Option<u64>)], Advice);
        let table: &[Row] = &[
            (300, true, &[(2, Some(90)), (3, Some(20))], Advice::MoveTo(3)),
            (300, true, &[(2, Some(100))], Advice::MoveTo(2)),
            (300, true, &[(2, Some(101))], Advice::Nothing),
            (150, true, &[(2, Some(51))], Advice::Nothing),
            (150, true, &[(2, Some(50))], Advice::MoveTo(2)),
            (300, true, &[(2, None)], Advice::Nothing),
            (300, true, &[], Advice::Nothing),
            (300, false, &[(2, Some(1))], Advice::Nothing),
            // It was slow a moment ago and is not now.
            (99, true, &[(2, Some(1))], Advice::Nothing),
        ];
        for (own, leads, others, advice) in table {
            let at = Seen { leads: *leads, ..seen(1_000, *own, others) };
            assert_eq!(slow().next(&at), *advice, "{at:?}");
        }
    }

    #[test]
    fn it_moves_once_and_never_back_and_forth() {
        let mut disk = slow();
        let others = [(2, Some(5))];
        assert_eq!(disk.next(&seen(1_000, 300, &others)), Advice::MoveTo(2));
        assert_eq!(disk.next(&seen(2_000, 300, &others)), Advice::Nothing, "it did not work, or came back");
        assert_eq!(disk.next(&seen(1_000 + MOVE_AGAIN_AFTER_MS - 1, 300, &others)), Advice::Nothing);
        assert_eq!(disk.next(&seen(1_000 + MOVE_AGAIN_AFTER_MS, 300, &others)), Advice::MoveTo(2));
        // Two disks that are slow in turn: whoever leads sees the other as slow as itself.
        let mut other = slow();
        assert_eq!(other.next(&seen(3_000, 300, &[(1, Some(290))])), Advice::Nothing);
    }
}
