//! Every transition of a command's life.
use super::*;

const L1: Leader = Leader::Node { id: 1, term: 5 };
const L2: Leader = Leader::Node { id: 2, term: 6 };
const NONE: Leader = Leader::Unknown;

fn life() -> Life {
    Life::new(1_000, 10_000)
}
fn send(to: u64) -> Step {
    Step::Send { to, resend_until_ms: 11_000 }
}
fn applied(replayed: bool) -> CommandOutcome {
    CommandOutcome { outcome: Outcome::Applied(vec![]), replayed }
}
fn refused(refusal: Refusal) -> Event {
    Event::Ended(AttemptEnd::Outcome(CommandOutcome { outcome: Outcome::Refused(refusal), replayed: false }))
}
fn lost() -> Event {
    Event::Ended(AttemptEnd::Unknown("connection lost".into()))
}
fn is_unknown(step: &Step) -> bool {
    matches!(step, Step::Finish(Verdict::Unknown { .. }))
}
fn not_applied_status(step: Step) -> u16 {
    match step {
        Step::Finish(Verdict::NotApplied { status, .. }) => status,
        other => panic!("{other:?}"),
    }
}

#[test]
fn it_waits_for_a_leader_then_sends_then_finishes_with_the_outcome() {
    let mut life = life();
    assert_eq!(life.next(Event::Go, NONE, 1_000), Step::Wait);
    assert_eq!(life.next(Event::Go, L1, 1_000), send(1));
    let end = life.next(Event::Ended(AttemptEnd::Outcome(applied(false))), L1, 1_001);
    assert_eq!(end, Step::Finish(Verdict::Outcome(applied(false), 1)));
}

#[test]
fn the_deadline_in_the_park_is_not_applied() {
    let mut life = life();
    life.next(Event::Go, NONE, 1_000);
    assert_eq!(not_applied_status(life.next(Event::Deadline, NONE, 11_000)), 503);
}

#[test]
fn the_deadline_or_a_stop_during_an_attempt_is_unknown() {
    for event in [Event::Deadline, Event::Stopping] {
        let mut life = life();
        life.next(Event::Go, L1, 1_000);
        assert!(is_unknown(&life.next(event, L1, 11_000)));
    }
}

#[test]
fn refused_before_the_append_on_every_attempt_is_not_applied() {
    let ends = [(AttemptEnd::NotLeader, 503), (AttemptEnd::Busy, 429), (AttemptEnd::NotSent("refused".into()), 503)];
    for (end, status) in ends {
        let mut life = life();
        life.next(Event::Go, L1, 1_000);
        assert!(matches!(life.next(Event::Ended(end), L1, 1_000), Step::Pause { .. }));
        assert_eq!(not_applied_status(life.next(Event::Deadline, L1, 11_000)), status);
    }
}

#[test]
fn a_full_disk_is_said_at_once_and_only_while_nothing_is_unknown() {
    let full = || Event::Ended(AttemptEnd::Full(vec![]));
    let mut clean = life();
    clean.next(Event::Go, L1, 1_000);
    assert!(matches!(clean.next(Event::Ended(AttemptEnd::NotLeader), L1, 1_000), Step::Pause { .. }));
    assert_eq!(clean.next(Event::Go, L2, 1_000), send(2));
    assert_eq!(clean.next(full(), L2, 1_000), Step::Finish(Verdict::DiskFull(vec![])));
    // The first attempt may be in the log: it is asked for again, and never called not applied.
    let mut tainted = life();
    tainted.next(Event::Go, L1, 1_000);
    tainted.next(lost(), L1, 1_000);
    tainted.next(Event::Go, L2, 1_000);
    assert!(matches!(tainted.next(full(), L2, 1_000), Step::Pause { .. }));
    assert_eq!(tainted.next(Event::Go, L2, 1_000), send(2));
    assert!(is_unknown(&tainted.next(Event::Deadline, L2, 11_000)));
    let mut tainted = life();
    tainted.next(Event::Go, L1, 1_000);
    tainted.next(Event::LeaderChanged, L2, 1_000);
    assert!(matches!(tainted.next(full(), L2, 1_000), Step::Pause { .. }));
}

#[test]
fn one_unknown_attempt_taints_all_that_follows() {
    let mut life = life();
    life.next(Event::Go, L1, 1_000);
    assert!(matches!(life.next(lost(), L1, 1_000), Step::Pause { .. }));
    assert_eq!(life.next(Event::Go, L2, 1_000), send(2));
    assert!(matches!(life.next(Event::Ended(AttemptEnd::NotLeader), L2, 1_000), Step::Pause { .. }));
    assert!(is_unknown(&life.next(Event::Deadline, NONE, 11_000)));
}

#[test]
fn a_leader_change_during_an_attempt_sends_the_same_key_to_the_new_one_and_notes_unknown() {
    let mut life = life();
    life.next(Event::Go, L1, 1_000);
    assert_eq!(life.next(Event::LeaderChanged, L2, 1_500), send(2));
    let end = life.next(Event::Ended(AttemptEnd::Outcome(applied(true))), L2, 1_500);
    assert_eq!(end, Step::Finish(Verdict::Outcome(applied(true), 2)));

    let mut life = Life::new(1_000, 10_000);
    life.next(Event::Go, L1, 1_000);
    assert_eq!(life.next(Event::LeaderChanged, NONE, 1_500), Step::Wait);
    let Step::Finish(Verdict::Unknown { why }) = life.next(Event::Deadline, NONE, 11_000) else { panic!() };
    assert_eq!(why, "the leader changed before it answered; then the deadline passed before an answer came");
}

#[test]
fn another_leader_is_tried_at_once_and_the_same_after_growing_pauses() {
    let mut life = life();
    life.next(Event::Go, L1, 1_000);
    assert_eq!(life.next(Event::Ended(AttemptEnd::NotLeader), L2, 1_000), send(2));
    let mut last = 0;
    for _ in 0..8 {
        let Step::Pause { ms } = life.next(Event::Ended(AttemptEnd::NotSent("down".into())), L2, 1_000) else {
            panic!()
        };
        assert!(ms >= last && ms <= PAUSE_MAX_MS);
        last = ms;
        assert_eq!(life.next(Event::Go, L2, 1_000), send(2));
    }
    assert_eq!(last, PAUSE_MAX_MS);
}

#[test]
fn nothing_is_sent_again_after_resend_until() {
    let mut clean = life();
    clean.next(Event::Go, L1, 1_000);
    clean.next(Event::Ended(AttemptEnd::NotLeader), L1, 1_000);
    assert_eq!(not_applied_status(clean.next(Event::Go, L1, 11_001)), 503);
    let mut tainted = life();
    tainted.next(Event::Go, L1, 1_000);
    tainted.next(lost(), L1, 1_000);
    assert!(is_unknown(&tainted.next(Event::Go, L2, 11_001)));
}

#[test]
fn an_estimate_behind_the_leader_is_corrected_once_and_only_while_nothing_is_unknown() {
    let expired = || Event::Ended(AttemptEnd::Expired { log_time_ms: 50_000 });
    let mut clean = life();
    clean.next(Event::Go, L1, 1_000);
    assert_eq!(clean.next(expired(), L1, 1_000), Step::Send { to: 1, resend_until_ms: 60_000 });
    assert_eq!(not_applied_status(clean.next(expired(), L1, 1_000)), 503);
    let mut tainted = life();
    tainted.next(Event::Go, L1, 1_000);
    tainted.next(lost(), L1, 1_000);
    tainted.next(Event::Go, L1, 1_000);
    assert!(is_unknown(&tainted.next(expired(), L1, 1_000)));
}

#[test]
fn a_refusal_by_apply_is_an_outcome_except_when_it_proves_nothing() {
    let mut life = life();
    life.next(Event::Go, L1, 1_000);
    assert!(matches!(life.next(refused(Refusal::Cycle), L1, 1_000), Step::Finish(Verdict::Outcome(..))));
    let mut late = Life::new(1_000, 10_000);
    late.next(Event::Go, L1, 1_000);
    assert_eq!(not_applied_status(late.next(refused(Refusal::Expired), L1, 1_000)), 503);
    for refusal in [Refusal::Expired, Refusal::KeyTableFull] {
        let mut tainted = Life::new(1_000, 10_000);
        tainted.next(Event::Go, L1, 1_000);
        tainted.next(lost(), L1, 1_000);
        tainted.next(Event::Go, L2, 1_000);
        assert!(is_unknown(&tainted.next(refused(refusal), L2, 1_000)));
    }
}
