//! Log time on one node, and on three of which one is cut off.
use super::*;
use crate::node::submit_rules::{AttemptEnd, Event, Leader, Life, Step};

const START_MS: u64 = 1_000_000;

/// What three nodes know; time is handed in. Leadership is whose stamps are committed.
struct Nodes {
    now_ms: u64,
    applied: [Applied; 3],
    estimates: [Estimate; 3],
    stampers: [Stamper; 3],
    /// From its stamp until an entry is applied.
    latency_ms: u64,
}

impl Nodes {
    fn new(latency_ms: u64) -> Nodes {
        let start = Applied { log_time_ms: START_MS, at_monotonic_ms: 0 };
        let mut nodes = Nodes {
            now_ms: 0,
            applied: [start; 3],
            estimates: Default::default(),
            stampers: Default::default(),
            latency_ms,
        };
        for node in 0..3 {
            nodes.estimate(node);
        }
        nodes
    }

    fn estimate(&mut self, node: usize) -> u64 {
        self.estimates[node].now(self.applied[node], self.now_ms)
    }

    /// What a command is taken at.
    fn for_command(&mut self, node: usize) -> u64 {
        self.estimates[node].for_command(self.applied[node], self.now_ms)
    }

    fn stamp(&mut self, leader: usize, term: u64) -> u64 {
        let estimate_ms = self.estimate(leader);
        self.stampers[leader].stamp(term, estimate_ms)
    }

    /// One entry after the other for so long, applied by `by`.
    fn write_for(&mut self, ms: u64, leader: usize, term: u64, by: &[usize]) {
        let end_ms = self.now_ms + ms;
        while self.now_ms < end_ms {
            let stamp_ms = self.stamp(leader, term);
            self.now_ms += self.latency_ms;
            self.apply(stamp_ms, by);
        }
    }

    fn apply(&mut self, stamp_ms: u64, by: &[usize]) {
        for node in by {
            let log_time_ms = stamp_ms.max(self.applied[*node].log_time_ms);
            self.applied[*node] = Applied { log_time_ms, at_monotonic_ms: self.now_ms };
            self.estimate(*node);
        }
    }
}

#[test]
fn it_advances_with_the_monotonic_clock_and_a_stamp_never_goes_back_in_its_term() {
    let (mut estimate, mut stamper) = (Estimate::default(), Stamper::default());
    let applied = Applied { log_time_ms: 1_000, at_monotonic_ms: 50 };
    assert_eq!(stamper.stamp(1, estimate.now(applied, 60)), 1_010);
    assert_eq!(stamper.stamp(1, estimate.now(applied, 55)), 1_010);
    assert_eq!(stamper.stamp(2, estimate.now(applied, 55)), 1_005);
}

#[test]
fn a_long_idle_time_counts_as_one_step() {
    let applied = Applied { log_time_ms: 1_000, at_monotonic_ms: 0 };
    assert_eq!(Estimate::default().now(applied, 24 * 3_600_000), 1_000 + IDLE_STEP_MS);
}

#[test]
fn extremes_do_not_overflow() {
    let applied = Applied { log_time_ms: u64::MAX, at_monotonic_ms: 9 };
    assert_eq!(Estimate::default().now(applied, u64::MAX), u64::MAX);
    assert_eq!(Estimate::default().now(applied, 0), u64::MAX);
}

#[test]
fn a_publication_without_an_entry_changes_nothing() {
    let mut estimate = Estimate::default();
    let applied = |at_monotonic_ms| Applied { log_time_ms: 1_000, at_monotonic_ms };
    assert_eq!(estimate.now(applied(0), 500), 1_500);
    assert_eq!(estimate.now(applied(500), 700), 1_700);
}

#[test]
fn entries_hold_an_estimate_from_both_sides() {
    let mut estimate = Estimate::default();
    let mut after =
        |log_time_ms, at_monotonic_ms| estimate.now(Applied { log_time_ms, at_monotonic_ms }, at_monotonic_ms);
    assert_eq!(after(10_000, 0), 10_000);
    assert_eq!(after(10_400, 500), 10_500, "what an entry took is not lost");
    assert_eq!(after(12_000, 600), 12_000, "never below an entry");
    assert_eq!(after(12_100, 9_000), 12_100 + AHEAD_MS_MAX, "an entry of long ago, or a clock that runs fast");
}

#[test]
fn under_load_it_keeps_the_pace_of_clocks() {
    for latency_ms in [1, 20, 900] {
        let mut nodes = Nodes::new(latency_ms);
        nodes.write_for(60_000, 0, 1, &[0, 1, 2]);
        for node in 0..3 {
            let passed_ms = nodes.estimate(node) - START_MS;
            assert!((59_000..=61_000).contains(&passed_ms), "{passed_ms} of 60,000 ms, latency {latency_ms}");
        }
    }
}

/// Node 0 leads alone and stamps what nobody commits, the others go on without it; then it comes back, and leads again.
/// A command that was under way to the leader before it is not called too old.
#[test]
fn a_command_outlives_the_return_of_a_leader_that_was_alone() {
    // Short, and beyond what estimates bridge.
    for latency_ms in [2, 3_000] {
        let mut nodes = Nodes::new(latency_ms);
        nodes.write_for(5_000, 0, 1, &[0, 1, 2]);
        let began_ms = nodes.now_ms;
        nodes.write_for(30_000, 1, 2, &[1, 2]);
        let ended_ms = nodes.now_ms;
        for now_ms in (began_ms..ended_ms).step_by(100) {
            nodes.now_ms = now_ms;
            nodes.stamp(0, 1);
        }
        nodes.now_ms = ended_ms;
        nodes.applied[0] = Applied { at_monotonic_ms: ended_ms, ..nodes.applied[1] };
        nodes.write_for(1_000, 1, 2, &[0, 1, 2]);

        let taken_ms = nodes.estimate(2);
        let mut life = Life::new(taken_ms, 3_000);
        let before = Leader::Node { id: 1, term: 2 };
        assert!(matches!(life.next(Event::Go, before, taken_ms), Step::Send { to: 1, .. }));
        // An election later: the attempt has no outcome and is made again.
        nodes.now_ms += 600;
        let now_ms = nodes.estimate(2);
        let Step::Send { to: 0, resend_until_ms } =
            life.next(Event::LeaderChanged, Leader::Node { id: 0, term: 3 }, now_ms)
        else {
            panic!("not sent again")
        };
        let stamp_ms = nodes.stamp(0, 3);
        assert!(stamp_ms <= resend_until_ms, "too old by {} ms, latency {latency_ms}", stamp_ms - resend_until_ms);
    }
}

/// Node 2 has lost its files, or its core has ended, and its clients go on.
#[test]
fn a_node_that_applies_nothing_hears_log_time_with_the_first_command_that_is_late() {
    let mut nodes = Nodes::new(20);
    nodes.write_for(600_000, 0, 1, &[0, 1]);
    let leader = Leader::Node { id: 0, term: 1 };
    let next = Leader::Node { id: 1, term: 2 };
    let sent = |step| match step {
        Step::Send { resend_until_ms, .. } => resend_until_ms,
        other => panic!("{other:?}"),
    };
    let taken_ms = nodes.for_command(2);
    let mut late = Life::new(taken_ms, 3_000);
    let resend_until_ms = sent(late.next(Event::Go, leader, taken_ms));
    let at_leader_ms = nodes.stamp(0, 1);
    assert!(resend_until_ms < at_leader_ms, "it stands still here");
    nodes.estimates[2].hear(at_leader_ms, nodes.now_ms);
    let now_ms = nodes.for_command(2);
    let expired = Event::Ended(AttemptEnd::Expired { log_time_ms: at_leader_ms });
    assert_eq!(sent(late.next(expired, leader, now_ms)), at_leader_ms + 3_000);
    // The leader freezes under a later one, which the next leader takes all the same.
    nodes.write_for(30_000, 0, 1, &[0, 1]);
    let taken_ms = nodes.for_command(2);
    let mut life = Life::new(taken_ms, 3_000);
    sent(life.next(Event::Go, leader, taken_ms));
    nodes.now_ms += 600;
    let now_ms = nodes.for_command(2);
    let resend_until_ms = sent(life.next(Event::LeaderChanged, next, now_ms));
    let stamp_ms = nodes.stamp(1, 2);
    assert!(stamp_ms <= resend_until_ms, "too old by {} ms", stamp_ms - resend_until_ms);
    // What it would stamp comes from entries, and so does all of it once one is applied again.
    assert_eq!(nodes.estimate(2), START_MS + IDLE_STEP_MS);
    nodes.estimates[2].hear(u64::MAX / 2, nodes.now_ms);
    assert_eq!(nodes.for_command(2), u64::MAX / 2);
    nodes.write_for(20, 1, 2, &[1, 2]);
    let (own_ms, entries_ms) = (nodes.for_command(2), nodes.applied[2].log_time_ms);
    assert!((entries_ms..=entries_ms + AHEAD_MS_MAX).contains(&own_ms), "{own_ms} after {entries_ms}");
}
