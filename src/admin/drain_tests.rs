//! Every view of a drain, every answer to each step, and every interleaving of two drains that begin at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::collections::BTreeSet;

use super::*;

const ANSWERS: [Option<Answer>; 4] = [None, Some(Answer::Free), Some(Answer::Held), Some(Answer::Contested)];

fn views() -> impl Iterator<Item = View> {
    let marked = Mark::ALL.into_iter().flat_map(|mark| ANSWERS.into_iter().map(move |claim| (mark, claim)));
    marked.flat_map(|(mark, claim)| {
        (0..512u32).map(move |bits| View {
            mark,
            claim,
            forced: bits & 1 != 0,
            cancelled: bits & 2 != 0,
            waited_out: bits & 4 != 0,
            risky: bits & 8 != 0,
            to_persist: bits & 16 != 0,
            leads: bits & 32 != 0,
            handed_over: bits & 64 != 0,
            noticed: bits & 128 != 0,
            busy: bits & 256 != 0,
        })
    })
}

#[test]
fn every_view_keeps_the_rules() {
    for view in views() {
        let step = next(&view);
        match step {
            Step::Close => {
                assert!(view.mark == Mark::Wants && !view.cancelled && !view.to_persist, "{view:?}");
                assert!(view.claim.is_some(), "nobody leaves traffic before the others were asked: {view:?}");
                assert!(view.forced || (view.claim == Some(Answer::Free) && !view.risky), "{view:?}");
            }
            Step::Finish => {
                assert!(view.noticed && !view.busy && (!view.leads || view.handed_over), "{view:?}");
                assert_eq!(view.mark, Mark::Draining);
            }
            Step::HandOver | Step::AwaitNotice | Step::AwaitRequests => {
                assert_eq!(view.mark, Mark::Draining, "readiness goes first: {view:?}");
                assert!(!view.cancelled);
            }
            Step::RefuseHeld => assert!(!view.forced && view.mark == Mark::Wants, "{view:?}"),
            Step::RefuseRisky => assert!(!view.forced && view.risky && view.claim == Some(Answer::Free), "{view:?}"),
            Step::Undo => assert!(view.cancelled && matches!(view.mark, Mark::Wants | Mark::Draining)),
            Step::RaiseFlag => assert_eq!(view.mark, Mark::None),
            Step::Ask => assert_eq!(view.mark, Mark::Wants),
            Step::Persist => assert!(view.to_persist && view.mark != Mark::None),
            Step::Rest => assert!(view.mark == Mark::Drained || (view.cancelled && view.mark == Mark::None)),
        }
    }
}

/// What may be after a step, whatever the world answers.
fn after(view: View, step: Step) -> Vec<View> {
    match step {
        Step::RaiseFlag => vec![View { mark: Mark::Wants, ..view }],
        Step::Ask => ANSWERS
            .into_iter()
            .flatten()
            .flat_map(|answer| [(answer, false), (answer, true)])
            .map(|(answer, risky)| View { claim: Some(answer), risky, waited_out: view.claim.is_some(), ..view })
            .collect(),
        // A disk that cannot note it ends the job.
        Step::Persist => vec![View { to_persist: false, ..view }],
        Step::Close => vec![View { mark: Mark::Draining, ..view }],
        // Somebody took over, or nobody did.
        Step::HandOver => {
            vec![View { leads: false, handed_over: true, ..view }, View { handed_over: true, ..view }]
        }
        Step::AwaitNotice => vec![View { noticed: true, ..view }],
        Step::AwaitRequests => vec![View { busy: false, ..view }],
        Step::Finish => vec![View { mark: Mark::Drained, ..view }],
        Step::Undo => vec![View { mark: Mark::None, ..view }],
        Step::RefuseHeld | Step::RefuseRisky | Step::Rest => vec![],
    }
}

#[test]
fn from_every_beginning_and_with_every_answer_it_ends_soon() {
    for start in views() {
        let mut paths = vec![(start, 0)];
        while let Some((view, length)) = paths.pop() {
            assert!(length < 16, "it does not end: {start:?}");
            let step = next(&view);
            for and_then in after(view, step) {
                paths.push((and_then, length + 1));
                // The operator may think better of it at any moment.
                if !view.cancelled {
                    paths.push((View { cancelled: true, ..and_then }, length + 1));
                }
            }
        }
    }
}

#[test]
fn a_drain_that_goes_well_takes_each_step_once_in_order() {
    let mut view = View { leads: true, busy: true, to_persist: true, ..View::default() };
    let mut steps = Vec::new();
    loop {
        let step = next(&view);
        steps.push(step);
        match after(view, step).into_iter().next() {
            Some(and_then) => view = and_then,
            None => break,
        }
    }
    use Step::*;
    let expected = [RaiseFlag, Ask, Persist, Close, HandOver, AwaitNotice, AwaitRequests, Finish, Rest];
    assert_eq!(steps, expected);
    let words: BTreeSet<&str> = expected.iter().map(|step| step.word()).collect();
    assert_eq!(words.len(), expected.len());
}

/// One of several nodes that drain at once.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Racer {
    name: &'static str,
    mark: Mark,
    claim: Option<Claim2>,
    /// Answers collected in the question under way, in the order of the others.
    heard: Vec<Mark>,
    asks: usize,
    gave_up: bool,
}

type Claim2 = u8;

/// Every interleaving of nodes that begin at once, where asking is one message to each other node, and a node that
/// waits for another asks again up to three times. Never are two out of traffic, and never do all give way.
#[test]
fn of_several_that_begin_at_once_one_drains_whatever_the_order() {
    for names in [vec!["a", "b"], vec!["a", "b", "c"]] {
        let start: Vec<Racer> = names
            .iter()
            .map(|name| Racer { name, mark: Mark::None, claim: None, heard: vec![], asks: 0, gave_up: false })
            .collect();
        let mut seen = BTreeSet::new();
        let mut paths = vec![start];
        while let Some(racers) = paths.pop() {
            if !seen.insert(racers.clone()) {
                continue;
            }
            let out = racers.iter().filter(|racer| racer.mark.is_out()).count();
            assert!(out <= 1, "two drain at once: {racers:?}");
            let mut is_over = true;
            for at in 0..racers.len() {
                if let Some(moved) = moved(&racers, at) {
                    is_over = false;
                    paths.push(moved);
                }
            }
            // With patience for only a few questions all may give way in the end; nobody may hang, though.
            assert!(!is_over || racers.iter().all(|racer| racer.gave_up || racer.mark.is_out()), "{racers:?}");
        }
        assert!(seen.iter().any(|racers| racers.iter().any(|racer| racer.mark.is_out())));
    }
}

/// `racers` after one move of the one at `at`; `None` when it has ended.
fn moved(racers: &[Racer], at: usize) -> Option<Vec<Racer>> {
    let mut racers = racers.to_vec();
    let others: Vec<(&str, Mark)> =
        racers.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, r)| (r.name, r.mark)).collect();
    let racer = racers.get_mut(at)?;
    if racer.gave_up {
        return None;
    }
    let claim = match racer.claim {
        None => None,
        Some(0) => Some(Answer::Free),
        Some(1) => Some(Answer::Held),
        Some(_) => Some(Answer::Contested),
    };
    let view = View { mark: racer.mark, claim, waited_out: racer.asks >= 3, noticed: true, ..View::default() };
    match next(&view) {
        Step::RaiseFlag => racer.mark = Mark::Wants,
        Step::Ask => {
            // One answer at a time: the world may change between two of them.
            racer.heard.push(others[racer.heard.len()].1);
            if racer.heard.len() == others.len() {
                let heard = std::mem::take(&mut racer.heard);
                let named = others.iter().zip(heard).map(|((name, _), mark)| (*name, mark));
                racer.claim = Some(match claim_of(racer.name, named).answer() {
                    Answer::Free => 0,
                    Answer::Held => 1,
                    Answer::Contested => 2,
                });
                racer.asks += 1;
            }
        }
        Step::RefuseHeld => (racer.mark, racer.gave_up) = (Mark::None, true),
        Step::Close => racer.mark = Mark::Draining,
        Step::Finish => racer.mark = Mark::Drained,
        Step::Rest => return None,
        step => panic!("{step:?}"),
    }
    Some(racers)
}

fn claim_of<'a>(own: &str, others: impl IntoIterator<Item = (&'a str, Mark)>) -> Claim {
    super::claim(own, others)
}

#[test]
fn the_holder_is_named_and_the_own_name_never_counts() {
    assert_eq!(claim("b", [("b", Mark::Drained), ("c", Mark::None)]), Claim::Free);
    assert_eq!(claim("b", [("c", Mark::Wants)]), Claim::Contested { by: "c".into() });
    assert_eq!(claim("b", [("a", Mark::Wants)]), Claim::Held { by: "a".into(), mark: Mark::Wants });
    let held = claim("b", [("c", Mark::Wants), ("d", Mark::Drained)]);
    assert_eq!(held, Claim::Held { by: "d".into(), mark: Mark::Drained });
}

#[test]
fn what_is_left_without_a_node_is_counted_and_said() {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let whole = Tolerance::of(names(&["a", "b", "c"]), vec![], "a");
    assert_eq!((whole.needed, whole.failures_now, whole.failures_without, whole.is_risky()), (2, 1, 0, false));
    let ill = Tolerance::of(names(&["a", "b"]), names(&["c does not answer"]), "a");
    assert_eq!((ill.failures_now, ill.failures_without, ill.is_risky()), (0, -1, true));
    let words = ill.words("a");
    assert_eq!(
        words,
        "Of 3 voters 2 must work; without a 1 would (c does not answer): nothing could be written while it is away"
    );
    // Draining the one that does not work takes nothing away.
    assert!(!Tolerance::of(names(&["a", "b"]), names(&["c: its disk failed"]), "c").is_risky());
    assert!(Tolerance::of(names(&["a"]), vec![], "a").is_risky(), "the only node");
    let five = Tolerance::of(names(&["a", "b", "c", "d", "e"]), vec![], "a");
    assert_eq!((five.failures_now, five.failures_without), (2, 1));
}
