//! The rules one by one, and random orders of commands against what must always hold.
#![allow(clippy::unwrap_used)]

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::super::command::RebuildCommand;
use super::permits::{Book, PERMIT_MS};
use super::*;

fn intent(job: u128, change: Change) -> Intent {
    Intent {
        job,
        change,
        name: "d".into(),
        peer_addr: "d:1".into(),
        http_addr: "d:2".into(),
        forced: false,
        cause: "an operator".into(),
        began_unix_ms: 5,
        place: None,
        leaves: vec![],
        changing: false,
        cancelled: false,
    }
}

fn begin(job: u128, change: Change) -> MemberCommand {
    MemberCommand::Begin(Box::new(intent(job, change)))
}

fn add(job: u128) -> MemberCommand {
    begin(job, Change::Add { learner: false })
}

fn end(job: u128, end: End) -> MemberCommand {
    MemberCommand::End { job, end, detail: "over".into(), ended_unix_ms: 9 }
}

fn announce(job: u128) -> MemberCommand {
    MemberCommand::Announce { job, leaves: vec![3] }
}

fn take(job: u128, node_job: u128) -> MemberCommand {
    MemberCommand::TakePlace { job, node_job, id_min: 4 }
}

#[derive(Default)]
struct World {
    members: MemberBook,
    permits: Book,
    index: u64,
    now_ms: u64,
}

impl World {
    fn apply(&mut self, command: &MemberCommand) -> Result<Intent, Refusal> {
        self.index += 1;
        let before = (self.members.clone(), self.permits.clone());
        let applied = self.members.apply(command, &mut self.permits, self.index, self.now_ms);
        if applied.is_err() {
            assert_eq!((&self.members, &self.permits), (&before.0, &before.1), "a refusal changes nothing");
        }
        applied
    }

    fn grant(&mut self, name: &str, job: u128) -> Result<(), Refusal> {
        let grant = RebuildCommand::Grant { name: name.into(), job, old_id: 2, id_min: 4, automatic_max: None };
        self.index += 1;
        self.members.admits(&grant, &self.permits)?;
        self.permits.apply(&grant, self.index, self.now_ms).map(drop)
    }
}

#[test]
fn one_goes_on_at_a_time_and_its_order_may_come_again() {
    let mut world = World::default();
    world.apply(&add(1)).unwrap();
    world.apply(&add(1)).unwrap();
    let busy = Refusal::MembersBusy { job: 1, kind: "member-add".into(), name: "d".into() };
    assert_eq!(world.apply(&begin(2, Change::Remove)), Err(busy));
    assert_eq!(world.apply(&end(1, End::Finished)), Err(void(1)), "no voter was added");
    world.apply(&announce(1)).unwrap();
    world.apply(&end(1, End::Finished)).unwrap();
    world.apply(&end(1, End::Finished)).unwrap();
    world.apply(&add(1)).unwrap();
    assert!(world.members.current.is_none(), "an order that comes late begins nothing");
    world.apply(&begin(2, Change::Remove)).unwrap();
}

#[test]
fn another_way_in_has_another_id_until_the_voters_change() {
    let mut world = World { index: 20, ..World::default() };
    world.apply(&add(1)).unwrap();
    let first = world.apply(&take(1, 7)).unwrap().place.unwrap().fresh_id;
    assert_eq!(world.apply(&take(1, 7)).unwrap().place.unwrap().fresh_id, first);
    let second = world.apply(&take(1, 8)).unwrap().place.unwrap().fresh_id;
    assert!(second > first && world.permits.id_highest == second);
    world.apply(&announce(1)).unwrap();
    assert_eq!(world.apply(&take(1, 9)), Err(void(1)));
    assert_eq!(world.apply(&take(1, 8)).unwrap().place.unwrap().fresh_id, second);
    world.grant("a", 1).unwrap_err();
    world.apply(&end(1, End::Finished)).unwrap();
    world.grant("a", 1).unwrap();
    assert!(world.permits.permit.as_ref().unwrap().fresh_id > second, "rebuilds and members share their ids");
}

#[test]
fn what_is_cancelled_changes_no_voter_and_what_changes_voters_is_not_cancelled() {
    let mut world = World::default();
    world.apply(&add(1)).unwrap();
    assert_eq!(world.apply(&end(1, End::Cancelled)), Err(void(1)), "nobody has asked for that");
    world.apply(&MemberCommand::Cancel { job: 1 }).unwrap();
    assert_eq!(world.apply(&announce(1)), Err(void(1)));
    assert_eq!(world.apply(&take(1, 7)), Err(void(1)));
    world.apply(&end(1, End::Cancelled)).unwrap();
    world.apply(&add(2)).unwrap();
    world.apply(&announce(2)).unwrap();
    assert_eq!(world.apply(&MemberCommand::Cancel { job: 2 }), Err(void(2)));
    world.apply(&MemberCommand::Withdraw { job: 2 }).unwrap();
    world.apply(&MemberCommand::Cancel { job: 2 }).unwrap();
    assert!(world.members.removed.is_empty());
}

#[test]
fn a_rebuild_and_a_change_of_voters_exclude_each_other_and_the_one_that_leaves_holds_nothing() {
    let mut world = World::default();
    world.grant("a", 1).unwrap();
    world.apply(&begin(1, Change::Replace { old: "c".into(), learner: false })).unwrap();
    assert_eq!(world.apply(&announce(1)), Err(Refusal::RebuildHeld { by: "a".into(), expires_in_s: 3_600 }));
    world.now_ms = PERMIT_MS;
    world.apply(&announce(1)).unwrap();
    assert_eq!(world.permits.permit.as_ref().unwrap().name, "a", "an expired one may still be renewed");
    assert!(matches!(world.grant("b", 2), Err(Refusal::MembersBusy { job: 1, .. })));
    world.grant("a", 1).unwrap();
    world.apply(&end(1, End::Finished)).unwrap();
    assert_eq!(world.members.removed.iter().map(|gone| gone.id).collect::<Vec<_>>(), [3]);
    assert_eq!(world.members.removed.first().unwrap().replaced_by.as_deref(), Some("d"));

    let mut world = World::default();
    world.grant("c", 1).unwrap();
    world.apply(&begin(1, Change::Replace { old: "c".into(), learner: false })).unwrap();
    world.apply(&announce(1)).unwrap();
    assert_eq!(world.permits.permit, None);
}

/// A node that died in the middle of its rebuild is replaced, and comes back long after.
#[test]
fn who_was_removed_never_votes_again_by_a_permit_however_old() {
    let mut world = World { index: 2, ..World::default() };
    world.grant("c", 1).unwrap();
    let held = world.permits.permit.clone().unwrap();
    world.now_ms = PERMIT_MS + 1;
    world.apply(&begin(1, Change::Replace { old: "c".into(), learner: false })).unwrap();
    let leaves = vec![held.old_id, held.fresh_id];
    world.apply(&MemberCommand::Announce { job: 1, leaves: leaves.clone() }).unwrap();
    assert_eq!(world.permits.permit, None, "an expired permit of the one that leaves goes too");
    world.apply(&end(1, End::Finished)).unwrap();
    assert_eq!(world.grant("c", 1), Err(void(1)), "not by going on with the rebuild");
    assert_eq!(world.grant("c", 2), Err(void(2)), "not by another one, which the leader proposed before it knew");
    assert!(leaves.iter().all(|id| world.members.has_removed(*id)));
}

/// The ids that a cluster begins with were given out by nobody, and its log is short at first.
#[test]
fn an_id_that_leaves_is_never_given_out_again() {
    let mut world = World::default();
    world.apply(&begin(1, Change::Remove)).unwrap();
    world.apply(&MemberCommand::Announce { job: 1, leaves: vec![60] }).unwrap();
    world.apply(&end(1, End::Finished)).unwrap();
    world.apply(&add(2)).unwrap();
    assert_eq!(world.apply(&take(2, 7)).unwrap().place.unwrap().fresh_id, 61);
}

/// A withdrawal that was proposed and not heard of is followed by another announcement, when some may have left.
#[test]
fn who_was_announced_to_leave_stays_named() {
    let mut world = World::default();
    world.apply(&begin(1, Change::Remove)).unwrap();
    world.apply(&MemberCommand::Announce { job: 1, leaves: vec![3, 9] }).unwrap();
    world.apply(&MemberCommand::Withdraw { job: 1 }).unwrap();
    world.apply(&MemberCommand::Announce { job: 1, leaves: vec![9] }).unwrap();
    world.apply(&MemberCommand::Announce { job: 1, leaves: vec![11] }).unwrap();
    world.apply(&end(1, End::Finished)).unwrap();
    assert_eq!(world.members.removed.iter().map(|gone| gone.id).collect::<Vec<_>>(), [3, 9, 11]);
}

#[test]
fn random_orders_keep_the_rules() {
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut world = World::default();
        let mut ids = std::collections::BTreeSet::new();
        for _ in 0..120 {
            let job = rng.random_range(0..4u128);
            world.now_ms += rng.random_range(0..PERMIT_MS / 8);
            let before = world.members.clone();
            let command = match rng.random_range(0..9) {
                0 => add(job),
                1 => begin(job, Change::Remove),
                2 => begin(job, Change::Add { learner: true }),
                3 => take(job, rng.random_range(0..4)),
                4 => announce(job),
                5 => MemberCommand::Withdraw { job },
                6 => MemberCommand::Cancel { job },
                7 => end(job, if rng.random() { End::Finished } else { End::Cancelled }),
                _ => {
                    let name = ["a", "b", "d"].get(rng.random_range(0..3)).copied().unwrap_or("a");
                    let held = world.permits.permit.clone();
                    if world.grant(name, rng.random_range(0..3)).is_ok() {
                        let permit = world.permits.permit.clone().unwrap();
                        let renewed = held.is_some_and(|held| held.job == permit.job && held.name == permit.name);
                        assert!(renewed || ids.insert(permit.fresh_id), "seed {seed}: an id twice");
                        let changing = world.members.current.as_ref().is_some_and(|intent| intent.changing);
                        assert!(renewed || !changing, "seed {seed}: a rebuild began while voters change");
                    }
                    continue;
                }
            };
            let applied = world.apply(&command);
            if let Some(place) = applied.as_ref().ok().and_then(|intent| intent.place) {
                let known = |book: &MemberBook| {
                    let ended = book.ended.iter().map(|ended| &ended.intent);
                    book.current.iter().chain(ended).any(|intent| intent.place == Some(place))
                };
                assert!(known(&before) || ids.insert(place.fresh_id), "seed {seed}: an id twice");
            }
            let (old, new) = (before.current, &world.members.current);
            if let (Some(old), Some(new)) = (&old, new) {
                assert_eq!(old.job, new.job, "seed {seed}: one drops out for another");
                assert!(!(new.changing && new.cancelled), "seed {seed}");
                assert!(!(old.changing && new.changing) || old.place == new.place, "seed {seed}: its id has changed");
            }
            if let (Some(old), None) = (&old, new) {
                let last = world.members.ended.last().unwrap();
                assert_eq!(last.intent.job, old.job);
                assert!(last.end == End::Finished || old.cancelled, "seed {seed}");
                assert!(last.end == End::Cancelled || old.changing || old.stays_learner(), "seed {seed}");
            }
            let row = world.members.encode().unwrap();
            assert_eq!(MemberBook::decode(Some(&row)), Ok(world.members.clone()));
        }
    }
}

#[test]
fn what_has_ended_is_kept_for_a_while() {
    let mut world = World::default();
    for job in 0..2 * ENDED_MAX as u128 {
        world.apply(&begin(job, Change::Remove)).unwrap();
        world.apply(&MemberCommand::Announce { job, leaves: (0..8).map(|n| 8 * job as u64 + n).collect() }).unwrap();
        world.apply(&end(job, End::Finished)).unwrap();
    }
    assert_eq!((world.members.ended.len(), world.members.removed.len()), (ENDED_MAX, REMOVED_MAX));
    assert!(world.members.ended(0).is_none() && world.members.ended(127).is_some());
    let row = world.members.encode().unwrap();
    for length in 0..row.len() {
        assert!(MemberBook::decode(row.get(..length)).is_err(), "{length} bytes");
    }
}
