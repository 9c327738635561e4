//! The rules of `may_grant` row by row, and a model that walks every order of the steps of several rebuilds.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::{BTreeSet, HashSet, VecDeque};

use super::*;

fn other(name: &str, flushed: u64) -> OtherVoter {
    OtherVoter { name: name.into(), unwell: None, flushed: Some(flushed) }
}

fn view() -> View {
    View {
        name: "a".into(),
        old_id: Some(1),
        still_runs: false,
        joint: false,
        voters: 3,
        others: vec![other("b", 9), other("c", 9)],
        committed: 9,
    }
}

fn waits_for(view: &View) -> String {
    let Err(Refusal::Waits(whom)) = may_grant(view) else { unreachable!("{view:?}") };
    whom.join("; ")
}

#[test]
fn a_permit_needs_every_other_voter_well_and_complete() {
    may_grant(&view()).unwrap();
    let lagging = View { others: vec![other("b", 9), other("c", 8)], ..view() };
    assert!(waits_for(&lagging).starts_with("c: it has flushed 8"), "{}", waits_for(&lagging));
    let mut empty = view();
    empty.others[0].flushed = None;
    assert!(waits_for(&empty).contains("b: it has flushed nothing"));
    let mut failed = view();
    failed.others[1].unwell = Some("its disk has failed (EIO)".into());
    assert!(waits_for(&failed).contains("c: its disk has failed (EIO)"));
    assert!(waits_for(&View { still_runs: true, ..view() }).contains("still runs"));
    assert!(waits_for(&View { joint: true, ..view() }).contains("change of the members"));
}

#[test]
fn without_a_quorum_of_others_only_an_operator_can_help() {
    let pair = View { voters: 2, others: vec![other("b", 9)], ..view() };
    assert!(matches!(may_grant(&pair), Err(Refusal::Operator(_))));
    let alone = View { voters: 1, others: vec![], ..view() };
    assert!(matches!(may_grant(&alone), Err(Refusal::Operator(_))));
    assert!(matches!(may_grant(&View { old_id: None, ..view() }), Err(Refusal::Operator(_))));
    let four = ["b", "c", "d", "e"].map(|name| other(name, 9));
    may_grant(&View { voters: 5, others: four.to_vec(), ..view() }).unwrap();
}

// ---------------------------------------------------------------------------------------------------------------
// The model: three nodes, entries by their number, every order of writing, replicating, failing, asking, granting,
// swapping, promoting, changing the leader and letting permits expire.

/// Entries written at most.
const ENTRIES_MAX: u8 = 2;
/// Disks that fail, and orders of operators, at most.
const TROUBLES_MAX: u8 = 2;
/// Ids given out at most: rebuilds that loop end here.
const IDS_MAX: u64 = 3 + 3;
/// Expiries of a permit.
const EXPIRIES_MAX: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Core {
    /// Runs under this id.
    Runs,
    /// Its disk has failed: nothing it holds counts.
    Failed,
    /// Ended for a rebuild, files in place; true: they are good.
    Ended(bool),
    /// The old files are put away: it runs, as a learner, under a fresh id.
    Fresh,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    id: u64,
    /// The voter's id that stands for it: its own, or the one it had before.
    seat: u64,
    core: Core,
    /// Entries flushed.
    flushed: u8,
    /// What the leader remembers of that; it is not told when the log goes.
    matched: u8,
    /// The rebuild's number and, once granted, its fresh id.
    job: u8,
    fresh: Option<u64>,
    /// Whether the leader was asked again after the files had come.
    looked: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    nodes: [Node; 3],
    voters: BTreeSet<u64>,
    leader: Option<usize>,
    /// The leader's log: entries.
    written: u8,
    /// The highest entry that a client was told about.
    acknowledged: u8,
    permit: Option<(usize, u8, u64)>,
    permit_expired: bool,
    id_highest: u64,
    /// A grant that a leader has decided on and that is not committed.
    pending: Option<(usize, u8)>,
    troubles: u8,
    expiries: u8,
}

/// The rule that a test leaves out, to see the model find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Without {
    Nothing,
    /// The node asks while its core runs.
    EndOfCore,
    /// The node puts its files away without asking.
    Permit,
}

impl World {
    fn new() -> World {
        let node =
            |id| Node { id, seat: id, core: Core::Runs, flushed: 0, matched: 0, job: 0, fresh: None, looked: false };
        World {
            nodes: [node(1), node(2), node(3)],
            voters: BTreeSet::from([1, 2, 3]),
            leader: Some(0),
            written: 0,
            acknowledged: 0,
            permit: None,
            permit_expired: false,
            id_highest: 3,
            pending: None,
            troubles: 0,
            expiries: 0,
        }
    }

    fn votes(&self, n: usize) -> bool {
        let node = &self.nodes[n];
        matches!(node.core, Core::Runs | Core::Fresh) && self.voters.contains(&node.id)
    }

    fn quorum(&self) -> usize {
        self.voters.len() / 2 + 1
    }

    /// Running voters that hold everything up to `entry`.
    fn holders(&self, entry: u8) -> usize {
        (0..3).filter(|n| self.votes(*n) && self.nodes[*n].flushed >= entry).count()
    }

    /// What the leader would see, by the rules of `look`.
    fn view(&self, asking: usize) -> View {
        let others = (0..3)
            .filter(|n| *n != asking)
            .map(|n| OtherVoter {
                name: n.to_string(),
                unwell: (!self.votes(n)).then(|| "it does not take part".to_owned()),
                flushed: Some(u64::from(self.nodes[n].matched)),
            })
            .collect();
        View {
            name: asking.to_string(),
            old_id: Some(self.nodes[asking].seat),
            still_runs: self.nodes[asking].core == Core::Runs,
            joint: false,
            voters: self.voters.len(),
            others,
            committed: u64::from(self.acknowledged),
        }
    }

    /// Every world that one step leads to, with its name.
    fn steps(&self, without: Without) -> Vec<(String, World)> {
        let mut next = Vec::new();
        let mut step = |name: String, world: World| next.push((name, world));
        if let Some(l) = self.leader {
            if self.votes(l) && self.written < ENTRIES_MAX {
                let mut w = self.clone();
                w.written += 1;
                w.nodes[l].flushed = w.written;
                w.nodes[l].matched = w.written;
                step("write".into(), w);
            }
            for n in 0..3 {
                let node = &self.nodes[n];
                if n != l
                    && self.votes(l)
                    && matches!(node.core, Core::Runs | Core::Fresh)
                    && node.flushed < self.written
                {
                    let mut w = self.clone();
                    w.nodes[n].flushed = self.written;
                    w.nodes[n].matched = self.written;
                    step(format!("replicate to {n}"), w);
                }
            }
            if self.votes(l) && self.acknowledged < self.written && self.holders(self.written) >= self.quorum() {
                let mut w = self.clone();
                w.acknowledged = self.written;
                step("acknowledge".into(), w);
            }
        }
        for n in 0..3 {
            self.node_steps(n, without, &mut step);
            // Whoever has a majority of the running voters not ahead of it may lead.
            let behind = (0..3).filter(|o| self.votes(*o) && self.nodes[*o].flushed <= self.nodes[n].flushed).count();
            if self.votes(n) && self.leader != Some(n) && behind >= self.quorum() {
                let mut w = self.clone();
                w.leader = Some(n);
                w.written = w.nodes[n].flushed;
                for node in &mut w.nodes {
                    // Its followers give up what it does not have, and it knows nothing of them yet.
                    node.flushed = node.flushed.min(w.written);
                    node.matched = 0;
                }
                w.nodes[n].matched = w.written;
                step(format!("elect {n}"), w);
            }
        }
        if self.permit.is_some() && !self.permit_expired && self.expiries < EXPIRIES_MAX {
            let mut w = self.clone();
            w.permit_expired = true;
            w.expiries += 1;
            step("expire".into(), w);
        }
        self.commit_grant(without, &mut step);
        next
    }

    fn commit_grant(&self, without: Without, step: &mut impl FnMut(String, World)) {
        let (Some((n, job)), Some(l)) = (self.pending, self.leader) else { return };
        let mut dropped = self.clone();
        dropped.pending = None;
        step("lose the grant".into(), dropped);
        if !self.votes(l) {
            return;
        }
        // Its entry lies behind everything that was written, and whoever counts for it has flushed all of that.
        let running: Vec<usize> = (0..3).filter(|o| self.votes(*o)).collect();
        if running.len() < self.quorum() {
            return;
        }
        // Any quorum of those that run may be the one that commits it.
        for left_out in running.iter().map(|o| Some(*o)).chain([None]) {
            let counted: Vec<usize> = running.iter().copied().filter(|o| Some(*o) != left_out).collect();
            if counted.len() < self.quorum() || !counted.contains(&l) {
                continue;
            }
            let mut w = self.clone();
            w.pending = None;
            for o in counted {
                w.nodes[o].flushed = w.nodes[o].flushed.max(w.written);
                w.nodes[o].matched = w.written;
            }
            w.acknowledged = w.written;
            let free = match self.permit {
                Some((holder, ..)) => holder == n || self.permit_expired,
                None => true,
            };
            if free {
                let fresh = match self.permit {
                    Some((holder, held_job, id)) if holder == n && held_job == job => id,
                    _ => self.id_highest + 1,
                };
                w.id_highest = w.id_highest.max(fresh);
                w.permit = Some((n, job, fresh));
                w.permit_expired = false;
                // The answer reaches the rebuild that asked, if it is still the same.
                let listens = matches!(w.nodes[n].core, Core::Ended(_)) || without == Without::EndOfCore;
                if w.nodes[n].job == job && listens {
                    let again = w.nodes[n].fresh == Some(fresh);
                    w.nodes[n].looked = again;
                    w.nodes[n].fresh = Some(fresh);
                }
            }
            step(format!("commit the grant for {n} without {left_out:?}"), w);
        }
    }

    fn node_steps(&self, n: usize, without: Without, step: &mut impl FnMut(String, World)) {
        let node = &self.nodes[n];
        let ended = matches!(node.core, Core::Ended(_));
        if matches!(node.core, Core::Runs) && self.troubles < TROUBLES_MAX {
            let mut w = self.clone();
            w.nodes[n].core = Core::Failed;
            w.troubles += 1;
            step(format!("fail {n}"), w);
            let mut w = self.clone();
            w.nodes[n].core = Core::Ended(true);
            w.nodes[n].job += 1;
            w.troubles += 1;
            step(format!("end {n} for an operator"), w);
            if without == Without::EndOfCore && self.leader.is_some_and(|l| l != n) && self.pending.is_none() {
                let mut w = self.clone();
                w.nodes[n].job += 1;
                w.troubles += 1;
                w.pending = Some((n, w.nodes[n].job));
                step(format!("ask for {n} while it runs"), w);
            }
        }
        if node.core == Core::Runs && node.fresh.is_some() {
            let mut w = self.clone();
            w.nodes[n].core = Core::Ended(true);
            w.nodes[n].looked = true;
            step(format!("end {n} after the grant"), w);
        }
        if node.core == Core::Failed {
            let mut w = self.clone();
            w.nodes[n].core = Core::Ended(false);
            w.nodes[n].job += 1;
            step(format!("end {n} after its failure"), w);
        }
        // Back to work with its old files: given up, or started again.
        if node.core == Core::Ended(true) {
            let mut w = self.clone();
            w.nodes[n].core = Core::Runs;
            (w.nodes[n].fresh, w.nodes[n].looked) = (None, false);
            step(format!("{n} goes back to work"), w);
        }
        let led = self.leader.is_some_and(|l| l != n && self.votes(l));
        if ended && led && self.pending.is_none() && self.id_highest < IDS_MAX {
            let held_by_other = self.permit.is_some_and(|(holder, ..)| holder != n) && !self.permit_expired;
            if may_grant(&self.view(n)).is_ok() && !held_by_other {
                let mut w = self.clone();
                w.pending = Some((n, node.job));
                step(format!("{n} asks"), w);
            }
        }
        // The old files go, and what was fetched from any replica that runs comes in their place.
        let unasked = without == Without::Permit && self.id_highest < IDS_MAX;
        if ended && ((node.fresh.is_some() && node.looked) || unasked) {
            for source in (0..3).filter(|o| *o != n && matches!(self.nodes[*o].core, Core::Runs | Core::Fresh)) {
                let mut w = self.clone();
                w.nodes[n].core = Core::Fresh;
                w.nodes[n].id = node.fresh.unwrap_or(self.id_highest + 1);
                w.id_highest = w.id_highest.max(w.nodes[n].id);
                w.nodes[n].flushed = w.nodes[source].flushed.min(w.acknowledged);
                w.nodes[n].matched = 0;
                step(format!("swap {n} from {source}"), w);
            }
        }
        if node.core == Core::Fresh && !self.voters.contains(&node.id) {
            let holds = self.permit == Some((n, node.job, node.id));
            if let Some(l) = self.leader
                && holds
                && self.votes(l)
                && node.matched >= self.written
            {
                // The change of the members commits with a quorum of the old and of the new ones.
                let mut voters = self.voters.clone();
                voters.remove(&node.seat);
                voters.insert(node.id);
                let mut w = self.clone();
                w.voters = voters;
                let before = self.holders(self.written);
                let after = w.holders(w.written);
                if before >= self.quorum() && after >= w.quorum() {
                    w.acknowledged = w.written;
                    w.permit = None;
                    w.nodes[n].core = Core::Runs;
                    w.nodes[n].seat = node.id;
                    (w.nodes[n].fresh, w.nodes[n].looked) = (None, false);
                    step(format!("promote {n}"), w);
                }
            }
            if !holds && self.id_highest < IDS_MAX {
                let mut w = self.clone();
                w.nodes[n].core = Core::Ended(false);
                w.nodes[n].job += 1;
                (w.nodes[n].fresh, w.nodes[n].looked) = (None, false);
                step(format!("{n} starts over"), w);
            }
        }
    }

    /// What must hold after `name` has led from `before` to here.
    fn broken(&self, before: &World, name: &str) -> Option<String> {
        if name.starts_with("elect") && self.written < before.acknowledged {
            return Some(format!("a leader without entry {}", before.acknowledged));
        }
        // A disk that fails takes a copy away, whatever we do; a rebuild must not.
        let too_few = self.holders(self.acknowledged) < self.quorum();
        let another_is_out = |swapped: usize| (0..3).any(|n| n != swapped && !matches!(self.nodes[n].core, Core::Runs));
        let swapped = name.strip_prefix("swap ").and_then(|rest| rest.get(..1)?.parse().ok());
        match swapped {
            Some(n) if too_few && !another_is_out(n) => {
                Some(format!("entry {} is on {} voters", self.acknowledged, self.holders(self.acknowledged)))
            }
            _ => None,
        }
    }
}

/// Walks every order; how many worlds there are, and the first broken rule with the steps that led to it.
fn walk(without: Without) -> (usize, Option<String>) {
    let mut seen = HashSet::from([World::new()]);
    // Each step with the one before it.
    let mut trail: Vec<(usize, String)> = vec![(0, "the beginning".into())];
    let mut open = VecDeque::from([(World::new(), 0)]);
    while let Some((world, at)) = open.pop_front() {
        for (name, next) in world.steps(without) {
            if let Some(why) = next.broken(&world, &name) {
                let mut path = vec![name];
                let mut at = at;
                while at != 0 {
                    path.push(trail[at].1.clone());
                    at = trail[at].0;
                }
                path.reverse();
                return (seen.len(), Some(format!("{why} after {}", path.join(" / "))));
            }
            if !seen.contains(&next) {
                seen.insert(next.clone());
                trail.push((at, name));
                open.push_back((next, trail.len() - 1));
            }
        }
    }
    (seen.len(), None)
}

#[test]
fn no_order_of_the_steps_leaves_fewer_copies_than_a_quorum_needs() {
    let (worlds, broken) = walk(Without::Nothing);
    assert_eq!(broken, None);
    assert!(worlds > 1_000, "only {worlds} worlds were reached");
    println!("{worlds} worlds");
}

#[test]
fn the_model_finds_what_each_rule_is_for() {
    for without in [Without::EndOfCore, Without::Permit] {
        let (worlds, broken) = walk(without);
        assert!(broken.is_some(), "{without:?} was not missed in {worlds} worlds");
        println!("without {without:?}: {}", broken.unwrap_or_default());
    }
}
