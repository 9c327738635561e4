//! The decision on one entry, over every case and every pair of votes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use super::*;

fn votes() -> Vec<Vote> {
    let mut votes = vec![Vote::Covered, Vote::Contradicts, Vote::Never, Vote::Unknown];
    for proof in [Proof::None, Proof::Continues, Proof::Same] {
        for term in [1, 2] {
            votes.extend([true, false].map(|committed| Vote::Copy { proof, term, committed }));
        }
    }
    votes
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for durable in [true, false] {
        for voters_are_known in [true, false] {
            cases.extend([true, false].map(|nameless| Case { durable, voters_are_known, nameless }));
        }
    }
    cases
}

#[test]
fn each_decision_has_its_proof() {
    let mut seen = std::collections::HashSet::new();
    for case in cases() {
        for first in votes() {
            for second in votes() {
                for others in 0..=2 {
                    let said = [first, second];
                    let all_never = others == 2 && said == [Vote::Never; 2] || others == 1 && first == Vote::Never;
                    let decision = resolve(case, &said, others);
                    match decision {
                        Resolution::Cut => {
                            assert!(!case.durable && case.voters_are_known && all_never, "{case:?} {said:?}");
                        }
                        Resolution::Take(at) => {
                            let Vote::Copy { proof, term, committed } = said[at] else { panic!("{case:?} {said:?}") };
                            let by_all = at < others && !said[..others].contains(&Vote::Unknown);
                            assert!(
                                proof == Proof::Same
                                    || case.nameless && proof == Proof::Continues && (committed || by_all),
                                "{case:?} {said:?}"
                            );
                            let later = |v: &Vote| matches!(v, Vote::Copy { proof: Proof::Continues, term: t, .. } if *t > term);
                            assert!(proof == Proof::Same || committed || !said[..others].iter().any(later));
                        }
                        Resolution::Rebuild => {
                            assert!(said.contains(&Vote::Covered) || said.contains(&Vote::Contradicts));
                        }
                        Resolution::Wait => assert!(!said.contains(&Vote::Covered), "{case:?} {said:?}"),
                    }
                    seen.insert(std::mem::discriminant(&decision));
                }
            }
        }
    }
    assert_eq!(seen.len(), 4, "a decision is never made");
}

#[test]
fn alone_is_who_votes_and_nobody_else_does() {
    let of = |own, voters: &[u64]| Electorate { own, voters: voters.iter().copied().collect() };
    assert!(of(Some(1), &[1]).is_alone());
    assert!(!of(Some(1), &[1, 2]).is_alone() && !of(None, &[1]).is_alone());
    // Nobody known is not nobody there.
    assert!(!of(Some(1), &[]).is_alone());
}
