//! Every view of a failover with every answer, and every reason to refuse one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::*;

fn views() -> impl Iterator<Item = View> {
    (0..3).flat_map(|left| {
        (0..128u32).map(move |bits| View {
            left,
            leads: bits & 1 != 0,
            elsewhere: bits & 2 != 0,
            confirmed: bits & 4 != 0,
            came_back: bits & 8 != 0,
            triggered: bits & 16 != 0,
            missed: bits & 32 != 0,
            over: bits & 64 != 0,
        })
    })
}

#[test]
fn every_view_keeps_the_rules() {
    for view in views() {
        match next(&view) {
            Step::Done => assert!(view.elsewhere && view.confirmed, "{view:?}"),
            Step::Trigger => {
                assert!(view.leads && view.left > 0 && !view.elsewhere && !view.over, "{view:?}");
                assert!(!view.triggered || view.missed, "one candidate at a time: {view:?}");
            }
            Step::Await => assert!(view.triggered && !view.missed && !view.elsewhere, "{view:?}"),
            Step::Confirm => assert!(view.elsewhere && !view.confirmed, "{view:?}"),
            Step::AwaitElection => assert!(!view.elsewhere && (!view.leads || view.left == 0), "{view:?}"),
            Step::GiveUp => assert!(view.over || view.came_back, "{view:?}"),
        }
    }
}

/// What may be after a step, whatever the world answers. Time passes with each.
fn after(view: View, step: Step) -> Vec<View> {
    match step {
        Step::Trigger => vec![View { left: view.left - 1, triggered: true, missed: false, ..view }],
        Step::Await => vec![
            View { leads: false, elsewhere: true, ..view },
            View { missed: true, ..view },
            // It has lost its term, and nobody is known yet.
            View { leads: false, missed: true, ..view },
            View { leads: false, came_back: true, ..view },
        ],
        Step::AwaitElection => vec![
            View { leads: false, elsewhere: true, ..view },
            View { leads: false, came_back: true, ..view },
            View { over: true, ..view },
        ],
        Step::Confirm => vec![
            View { confirmed: true, ..view },
            // It was gone before it answered.
            View { elsewhere: false, missed: true, ..view },
            View { over: true, ..view },
        ],
        Step::Done | Step::GiveUp => vec![],
    }
}

#[test]
fn from_every_beginning_it_ends_as_soon_as_time_or_candidates_do() {
    for start in views() {
        let mut paths = vec![(start, 0)];
        while let Some((view, length)) = paths.pop() {
            // `over` comes at the latest here, as the clock would have it.
            let view = if length > 8 { View { over: true, ..view } } else { view };
            assert!(length < 12, "it does not end: {start:?}");
            paths.extend(after(view, next(&view)).into_iter().map(|and_then| (and_then, length + 1)));
        }
    }
}

#[test]
fn a_candidate_that_misses_its_deadline_is_followed_by_the_next_and_the_last_by_an_election() {
    let mut view = View { leads: true, left: 2, ..View::default() };
    let mut steps = Vec::new();
    loop {
        let step = next(&view);
        steps.push(step);
        view = match step {
            Step::Trigger => View { left: view.left - 1, triggered: true, missed: false, ..view },
            Step::Await => View { missed: true, ..view },
            Step::AwaitElection => View { leads: false, elsewhere: true, ..view },
            Step::Confirm => View { confirmed: true, ..view },
            Step::Done | Step::GiveUp => break,
        };
    }
    use Step::*;
    assert_eq!(steps, [Trigger, Await, Trigger, Await, AwaitElection, Confirm, Done]);
}

fn other(id: u64) -> Other {
    Other { id, name: format!("node-{id}"), voter: true, lag: Some((id, id * 100)), ..Other::default() }
}

#[test]
fn the_target_comes_first_and_then_who_lacks_least() {
    let others = [other(4), other(3), other(2)];
    assert_eq!(choose("node-1", &others, None).unwrap(), [2, 3, 4]);
    assert_eq!(choose("node-1", &others, Some("node-4")).unwrap(), [4, 2, 3]);
    let drained = [other(2), Other { drain: Mark::Drained, ..other(3) }];
    assert_eq!(choose("node-1", &drained, None).unwrap(), [2]);
    let wants = [Other { drain: Mark::Wants, ..other(2) }];
    assert_eq!(choose("node-1", &wants, None).unwrap(), [2], "a flag alone is no drain");
}

#[test]
fn every_reason_to_refuse_is_named() {
    let unfit = [
        (Other { voter: false, ..other(2) }, "learner"),
        (Other { silent: Some("timed out".into()), ..other(2) }, "timed out"),
        (Other { drain: Mark::Draining, ..other(2) }, "draining; undrain it first"),
        (Other { drain: Mark::Drained, ..other(2) }, "drained; undrain it first"),
        (Other { may_not_lead: Some("its disk failed".into()), ..other(2) }, "its disk failed"),
        (Other { lag: Some((LAG_ENTRIES_MAX + 1, 5)), ..other(2) }, "1001 entries"),
        (Other { lag: Some((1, LAG_BYTES_MAX + 1)), ..other(2) }, "8388609 bytes"),
        (Other { lag: None, ..other(2) }, "not known"),
    ];
    for (ill, why) in unfit {
        let others = [ill, other(3)];
        let refused = choose("node-1", &others, Some("node-2")).unwrap_err();
        assert!(matches!(refused, Refusal::Target { .. }) && refused.to_string().contains(why), "{refused}");
        assert_eq!(choose("node-1", &others, None).unwrap(), [3], "another is taken");
        let alone = choose("node-1", &others[..1], None).unwrap_err().to_string();
        assert!(alone.contains(why) || alone.contains("only voter"), "{alone}");
    }
    assert_eq!(choose("node-1", &[other(2)], Some("node-1")), Err(Refusal::AlreadyLeads("node-1".into())));
    assert_eq!(choose("node-1", &[], None), Err(Refusal::OnlyVoter("node-1".into())));
    let unknown = choose("node-1", &[other(2)], Some("node-9")).unwrap_err().to_string();
    assert!(unknown.contains("node-9") && unknown.contains("node-1, node-2"), "{unknown}");
    let just_fit = Other { lag: Some((LAG_ENTRIES_MAX, LAG_BYTES_MAX)), ..other(2) };
    assert_eq!(choose("node-1", &[just_fit], Some("node-2")).unwrap(), [2]);
}
