//! Every view of the leader, the ways that go well, and a model in which nodes fail and leaders die at any moment.
#![allow(clippy::unwrap_used)]

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

fn views() -> impl Iterator<Item = View> {
    [Kind::Add, Kind::Replace, Kind::Remove].into_iter().flat_map(|kind| {
        (0..4096u32).map(move |bits| View {
            kind,
            learner: bits & 1 != 0,
            changing: bits & 2 != 0,
            cancelled: bits & 4 != 0,
            joint: bits & 8 != 0,
            joined: bits & 16 != 0,
            near: bits & 32 != 0,
            votes: bits & 64 != 0,
            old_is_member: bits & 128 != 0,
            old_leads: bits & 256 != 0,
            safe: bits & 512 != 0,
            left_over: bits & 1024 != 0,
            at_work: bits & 2048 != 0,
        })
    })
}

#[test]
fn every_view_keeps_the_rules() {
    for view in views() {
        let step = next(&view);
        if view.joint {
            assert_eq!(step, Step::Complete, "{view:?}");
            continue;
        }
        match step {
            Step::Change => {
                assert!(view.changing && view.safe && !view.old_leads, "{view:?}");
                assert!(view.kind == Kind::Remove || (view.joined && (view.near || view.votes)), "{view:?}");
                assert!(!(view.kind == Kind::Add && view.learner), "a learner that comes changes no voter: {view:?}");
            }
            Step::Announce => assert!(!view.changing && !view.cancelled && view.safe, "{view:?}"),
            Step::Withdraw => assert!(view.changing && (!view.safe || !view.near), "{view:?}"),
            Step::TakeOut => {
                let undoes = view.cancelled && !view.changing;
                assert!(view.left_over || (undoes && view.joined && !view.votes), "{view:?}");
            }
            Step::Undone => {
                assert!(view.cancelled && !view.changing && (!view.joined || view.votes), "{view:?}");
                assert!(!view.left_over, "a learner would stay for ever: {view:?}");
            }
            Step::Finish => {
                assert!(!view.left_over, "a learner would stay for ever: {view:?}");
                assert!(!view.cancelled || view.changing, "{view:?}");
                assert!(view.kind == Kind::Add || !view.old_is_member, "{view:?}");
                assert!(view.kind == Kind::Remove || view.votes || (view.learner && view.joined), "{view:?}");
                assert!(view.changing || (view.kind == Kind::Add && view.learner), "unannounced: {view:?}");
            }
            Step::Leave => {
                assert!(view.old_leads && view.safe, "{view:?}");
                assert!(!view.cancelled || view.changing, "{view:?}");
            }
            Step::GiveUp => {
                assert!(view.at_work && !view.joined && !view.cancelled && !view.changing, "{view:?}");
                assert!(view.kind == Kind::Add && view.learner, "no voter stays away for good: {view:?}");
            }
            Step::AwaitJoin | Step::AwaitLog | Step::AwaitQuorum => {
                assert!(!view.cancelled || view.changing, "what is cancelled does not wait: {view:?}");
            }
            Step::Complete => unreachable!("{view:?}"),
        }
    }
}

/// What each step does when it comes to its end.
fn done(view: &mut View, step: Step) {
    match step {
        Step::AwaitJoin => view.joined = true,
        Step::GiveUp => view.cancelled = true,
        Step::AwaitLog => view.near = true,
        Step::AwaitQuorum => view.safe = true,
        Step::Leave => view.old_leads = false,
        Step::Announce => view.changing = true,
        Step::Withdraw => view.changing = false,
        Step::Change => view.joint = true,
        Step::Complete => {
            view.joint = false;
            view.old_is_member = false;
            view.votes = !view.learner && view.kind != Kind::Remove;
        }
        Step::TakeOut if view.cancelled => (view.joined, view.near, view.left_over) = (false, false, false),
        Step::TakeOut => view.left_over = false,
        Step::Finish | Step::Undone => {}
    }
}

fn walk(mut view: View) -> Vec<Step> {
    let mut steps = Vec::new();
    loop {
        let step = next(&view);
        steps.push(step);
        if matches!(step, Step::Finish | Step::Undone) {
            return steps;
        }
        assert!(steps.len() < 20, "{steps:?}");
        done(&mut view, step);
    }
}

#[test]
fn what_goes_well_takes_each_step_once_in_order() {
    use Step::*;
    let view = View { safe: true, old_is_member: true, ..View::default() };
    let add = View { old_is_member: false, ..view };
    assert_eq!(walk(add), [AwaitJoin, AwaitLog, Announce, Change, Complete, Finish]);
    assert_eq!(walk(View { learner: true, ..add }), [AwaitJoin, AwaitLog, Finish]);
    let replace = View { kind: Kind::Replace, ..view };
    assert_eq!(walk(replace), [AwaitJoin, AwaitLog, Announce, Change, Complete, Finish]);
    let leads = View { old_leads: true, ..replace };
    assert_eq!(walk(leads), [AwaitJoin, AwaitLog, Leave, Announce, Change, Complete, Finish]);
    let remove = View { kind: Kind::Remove, ..view };
    assert_eq!(walk(remove), [Announce, Change, Complete, Finish]);
    assert_eq!(walk(View { safe: false, ..remove }), [AwaitQuorum, Announce, Change, Complete, Finish]);
    let cancelled = View { cancelled: true, ..add };
    assert_eq!(walk(cancelled), [Undone]);
    assert_eq!(walk(View { joined: true, near: true, ..cancelled }), [TakeOut, Undone]);
    // It had joined, started over under another id, and has not joined under that.
    assert_eq!(walk(View { left_over: true, ..cancelled }), [TakeOut, Undone]);
    // A learner was to come again, and has gone back to work: it is not taken out, and not waited for.
    assert_eq!(walk(View { learner: true, at_work: true, ..add }), [GiveUp, Undone]);
    assert_eq!(
        walk(View { left_over: true, ..add }),
        [AwaitJoin, AwaitLog, Announce, Change, Complete, TakeOut, Finish]
    );
}

#[test]
fn a_voter_that_lags_far_behind_does_not_count_as_working() {
    assert_eq!(lags(Some((0, 0))), None);
    assert_eq!(lags(Some((VOTER_LAG_ENTRIES_MAX, VOTER_LAG_BYTES_MAX))), None);
    assert!(lags(Some((VOTER_LAG_ENTRIES_MAX + 1, 0))).unwrap().contains("10001 entries"));
    assert!(lags(Some((1, VOTER_LAG_BYTES_MAX + 1))).unwrap().contains("67108865 bytes"));
    assert!(lags(None).unwrap().contains("checkpoint"));
}

fn voters(now: &[&str], comes: Option<&str>, leaves: Option<&str>, ill: &[&str]) -> Outlook {
    Outlook::of(Voters {
        now: now.iter().map(|name| (*name).to_owned()).collect(),
        comes: comes.map(str::to_owned),
        leaves: leaves.map(str::to_owned),
        ill: ill.iter().map(|name| ((*name).to_owned(), "it does not answer".to_owned())).collect(),
    })
}

#[test]
fn what_a_change_does_to_fault_tolerance_is_counted_and_a_quorum_is_never_given_away() {
    let all = ["a", "b", "c"];
    let fourth = voters(&all, Some("d"), None, &[]);
    assert_eq!((fourth.failures_now, fourth.failures_during, fourth.failures_after), (1, 1, 1));
    assert_eq!((fourth.needed_now, fourth.needed_after), (2, 3));
    assert_eq!(fourth.refusal(Kind::Add, false), None);
    assert!(voters(&all, Some("d"), None, &["d", "c"]).refusal(Kind::Add, true).is_some());

    let removed = voters(&all, None, Some("c"), &[]);
    assert_eq!((removed.failures_now, removed.failures_after), (1, 0));
    let why = removed.refusal(Kind::Remove, false).unwrap();
    assert!(why.contains("Of 3 voters 2 must work now and 1 more may fail") && why.contains("no further"), "{why}");
    assert_eq!(removed.refusal(Kind::Remove, true), None);
    // The dead one may go: it gave nothing.
    assert_eq!(voters(&all, None, Some("c"), &["c"]).refusal(Kind::Remove, false), None);
    let lost = voters(&all, None, Some("b"), &["c"]);
    assert!(lost.refusal(Kind::Remove, true).unwrap().contains("nothing could be written"));
    assert!(lost.refusal(Kind::Remove, true).unwrap().contains("c: it does not answer"));
    assert!(voters(&["a"], None, Some("a"), &[]).refusal(Kind::Remove, true).unwrap().contains("last voter"));
    assert_eq!(voters(&["a", "b", "c", "d"], None, Some("d"), &[]).refusal(Kind::Remove, false), None);

    let replaced = voters(&all, Some("d"), Some("c"), &["c"]);
    assert_eq!((replaced.failures_now, replaced.failures_during, replaced.failures_after), (0, 0, 1));
    assert_eq!(replaced.refusal(Kind::Replace, false), None);
    assert!(voters(&all, Some("d"), Some("c"), &["c", "d"]).refusal(Kind::Replace, false).is_none(), "no worse");
    assert!(voters(&all, Some("d"), Some("c"), &["d"]).refusal(Kind::Replace, true).is_some(), "less than now");
}

/// Adding or replacing by a node that works never lowers fault tolerance, whoever else has failed.
#[test]
fn a_node_that_works_never_lowers_fault_tolerance() {
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    for size in 1..=6 {
        let now = names.get(..size).unwrap();
        for bits in 0..1u32 << size {
            let ill: Vec<&str> =
                now.iter().enumerate().filter(|(n, _)| bits & (1 << n) != 0).map(|(_, name)| *name).collect();
            let added = voters(now, Some("x"), None, &ill);
            assert!(added.failures_during >= added.failures_now, "{added:?}");
            for old in now {
                let replaced = voters(now, Some("x"), Some(old), &ill);
                assert!(replaced.failures_during >= replaced.failures_now, "{replaced:?}");
            }
        }
    }
}

/// Nodes a to e, of which some vote; x comes.
struct Model {
    kind: Kind,
    learner: bool,
    voters: BTreeSet<String>,
    next_voters: Option<BTreeSet<String>>,
    down: BTreeSet<String>,
    leader: String,
    joined: bool,
    near: bool,
    changing: bool,
    cancelled: bool,
    forced: bool,
    left_over: bool,
    /// A learner that was to come again has gone back to work.
    at_work: bool,
    over: Option<Step>,
}

impl Model {
    fn has_quorum(&self, set: &BTreeSet<String>) -> bool {
        set.iter().filter(|name| !self.down.contains(*name)).count() > set.len() / 2
    }

    /// Whether an entry can be committed.
    fn commits(&self) -> bool {
        self.has_quorum(&self.voters) && self.next_voters.as_ref().is_none_or(|next| self.has_quorum(next))
    }

    fn outlook(&self) -> Outlook {
        Outlook::of(Voters {
            now: self.voters.clone(),
            comes: (self.kind != Kind::Remove && !self.learner).then(|| "x".to_owned()),
            leaves: (self.kind != Kind::Add).then(|| "a".to_owned()),
            ill: self.down.iter().map(|name| (name.clone(), "down".to_owned())).collect(),
        })
    }

    fn view(&self) -> View {
        View {
            kind: self.kind,
            learner: self.learner,
            changing: self.changing,
            cancelled: self.cancelled,
            joint: self.next_voters.is_some(),
            joined: self.joined,
            near: self.near,
            votes: self.voters.contains("x"),
            old_is_member: self.kind != Kind::Add && self.voters.contains("a"),
            old_leads: self.kind != Kind::Add && self.leader == "a",
            safe: self.outlook().refusal(self.kind, self.forced).is_none(),
            left_over: self.left_over,
            at_work: self.at_work && !self.joined,
        }
    }

    /// The leader decides and its step takes effect, unless nothing can be committed.
    fn step(&mut self) {
        let (view, before) = (self.view(), self.outlook());
        let step = next(&view);
        if !self.commits() {
            return;
        }
        match step {
            Step::AwaitJoin | Step::AwaitLog | Step::AwaitQuorum => {}
            Step::Leave => {
                let next = self.voters.iter().find(|name| *name != "a" && !self.down.contains(*name)).cloned();
                self.leader = next.unwrap_or_else(|| "a".to_owned());
            }
            Step::GiveUp => self.cancelled = true,
            Step::Announce => self.changing = true,
            Step::Withdraw => self.changing = false,
            Step::Change => {
                assert!(before.failures_during >= 0, "a quorum is given away: {before:?}");
                let keeps = before.failures_after >= before.failures_now;
                match self.kind {
                    Kind::Remove => {
                        assert!(self.forced || keeps || before.failures_after > 0, "not ordered: {before:?}")
                    }
                    Kind::Add | Kind::Replace => assert!(keeps, "{before:?}"),
                }
                self.next_voters = Some(before.voters_after.into_iter().collect());
            }
            Step::Complete => self.voters = self.next_voters.take().unwrap(),
            Step::TakeOut if self.cancelled && !self.changing => {
                (self.joined, self.near, self.left_over) = (false, false, false);
            }
            Step::TakeOut => self.left_over = false,
            Step::Finish | Step::Undone => self.over = Some(step),
        }
        assert!(!self.voters.is_empty());
    }

    fn chance(&mut self, rng: &mut StdRng) {
        let names = ["a", "b", "c", "d", "e", "x"];
        let name = names.get(rng.random_range(0..names.len())).unwrap().to_string();
        match rng.random_range(0..9) {
            0 => drop(self.down.insert(name)),
            1 | 2 => drop(self.down.remove(&name)),
            3 if self.voters.contains(&name) && !self.down.contains(&name) => self.leader = name,
            4 if self.kind != Kind::Remove && !self.cancelled => self.joined = true,
            5 if self.joined => self.near = rng.random(),
            6 if !self.changing && rng.random_range(0..6) == 0 => self.cancelled = true,
            8 => self.at_work = rng.random(),
            // It starts over under another id.
            7 if self.joined
                && !self.changing
                && !self.cancelled
                && !self.voters.contains("x")
                && self.over.is_none() =>
            {
                (self.joined, self.near, self.left_over) = (false, false, true);
            }
            _ => {}
        }
    }
}

#[test]
fn whoever_fails_and_whoever_leads_it_ends_and_never_gives_a_quorum_away() {
    for seed in 0..2_000 {
        let mut rng = StdRng::seed_from_u64(seed);
        let kind = [Kind::Add, Kind::Replace, Kind::Remove].get(rng.random_range(0..3)).copied().unwrap();
        let size = rng.random_range(2..=5);
        let voters: BTreeSet<String> = ["a", "b", "c", "d", "e"].iter().take(size).map(|n| (*n).to_owned()).collect();
        let mut model = Model {
            kind,
            learner: kind == Kind::Add && rng.random(),
            voters: voters.clone(),
            next_voters: None,
            down: BTreeSet::new(),
            leader: "a".to_owned(),
            joined: false,
            near: false,
            changing: false,
            cancelled: false,
            forced: rng.random(),
            left_over: false,
            at_work: false,
            over: None,
        };
        // What would be refused is not begun.
        model.forced |= model.outlook().refusal(kind, false).is_some();
        for _ in 0..60 {
            model.chance(&mut rng);
            if model.over.is_none() {
                model.step();
            }
        }
        // Everybody comes back, and it ends.
        model.down.clear();
        for _ in 0..20 {
            (model.joined, model.near) = (model.joined || kind != Kind::Remove && !model.cancelled, true);
            if model.over.is_none() {
                model.step();
            }
        }
        let mut wanted = voters;
        if model.over == Some(Step::Finish) {
            if kind != Kind::Remove && !model.learner {
                wanted.insert("x".to_owned());
            }
            if kind != Kind::Add {
                wanted.remove("a");
            }
        }
        assert!(model.over.is_some() && model.next_voters.is_none(), "seed {seed}: it never ends");
        assert!(!model.left_over, "seed {seed}: a learner stays for ever");
        assert_eq!(model.voters, wanted, "seed {seed}: {:?}", model.over);
    }
}
