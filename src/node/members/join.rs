//! The leader's answers to a node that comes: the same questions as those of a rebuild, another right.

use std::collections::BTreeSet;

use openraft::ChangeMembers;
use stemedb_net::ClusterId;
use stemedb_raft::types::{Member, StoredMembership};

use super::{
    book,
    candidate::{Candidate, candidate},
    is_joint,
};
use crate::{
    clock,
    node::{
        core::{Core, Role, Shared},
        level,
        rebuild::{
            grant::{bounded, members_of, propose_op},
            messages::{Ask, AskReply, Granted, LeaderStep, Refusal, StepReply},
        },
        status,
    },
    state::{
        command::{MemberCommand, Operation, Outcome},
        members::{Change, End, Ended, Intent, MemberBook},
        permits::Permit,
    },
};

/// A learner that lacks at most this many entries may become a voter: it gets them within milliseconds, and under load
/// it always lacks some.
pub const BEHIND_ENTRIES_MAX: u64 = 256;

/// The cause of what a learner has begun by itself.
const CAME_BY_ITSELF: &str = "the node itself";
/// The cause of what it has begun because an operator has ordered its rebuild.
const COMES_FOR_AN_OPERATOR: &str = "an operator, at the node itself";
const DAY_MS: u64 = 24 * 3_600 * 1_000;

/// Entries of the leader's log that a member has not acknowledged, and whether it has acknowledged anything.
pub fn behind(core: &Core, id: u64) -> (u64, bool) {
    let metrics = core.raft_metrics();
    let end = metrics.last_log_index.map_or(0, |last| last + 1);
    let matched = metrics.replication.as_ref().and_then(|r| r.get(&id).copied().flatten());
    (end.saturating_sub(matched.map_or(0, |id| id.index + 1)), matched.is_some())
}

fn awaited(intent: Option<Intent>, name: &str) -> Option<Intent> {
    intent.filter(|intent| intent.coming() == Some(name) && !intent.cancelled)
}

/// Answers a node that is no member and asks for its place. The state has been applied up to what is committed.
pub async fn place(
    shared: &Shared,
    core: &Core,
    membership: &StoredMembership,
    ask: Ask,
    cluster_id: ClusterId,
    leader: u64,
) -> AskReply {
    let name = ask.name.clone();
    let known = match book(shared).await {
        Ok(known) => known,
        Err(why) => return AskReply::Failed(why),
    };
    let mut granted = Granted { permit: None, cluster_id, leader, members: members_of(membership) };
    let listed = membership.nodes().find(|(_, member)| member.name == name).map(|(id, member)| (*id, member.clone()));
    let comes = awaited(known.current.clone(), &name);
    let addr = comes.as_ref().map(|intent| &intent.peer_addr).or(listed.as_ref().map(|(_, member)| &member.peer_addr));
    if let Some(addr) = addr
        && let Some(why) = level::keeps_out(shared, core, &name, addr).await
    {
        return AskReply::Refused(Refusal::Waits(vec![why]));
    }
    let intent = match (comes, listed) {
        (Some(intent), _) => intent,
        (None, Some((id, member))) => match come_again(shared, core, &known, id, member, &ask).await {
            Ok(Some(intent)) => intent,
            Ok(None) => return AskReply::Granted(Box::new(granted)),
            Err(refused) => return refused,
        },
        (None, None) => {
            let why = format!(
                "{name} is no member of this cluster: add it with `stemedb member add {name} --addr HOST:PORT`"
            );
            return AskReply::Refused(match ask.dry_run {
                true => Refusal::Operator(why),
                false => Refusal::Waits(vec![why]),
            });
        }
    };
    if ask.dry_run {
        return AskReply::Granted(Box::new(granted));
    }
    if !ask.automatic {
        shared.members.forget_ways();
    } else {
        // Each way fetches a checkpoint and takes an id: those of this job count as the jobs before it do. One that an
        // operator has ordered is not counted, and those that the node begins in it by itself are.
        let by_itself = u64::from(intent.cause == CAME_BY_ITSELF);
        let before = times_today(&known, &name, clock::unix_ms()).saturating_add(by_itself);
        let more = shared.config.rebuild.automatic_per_day.saturating_sub(before);
        let known_way = intent.place.map(|place| place.node_job);
        if !shared.members.begins_way(intent.job, ask.job, known_way, more) {
            return too_often(&name);
        }
    }
    let id_max = membership.nodes().map(|(id, _)| *id).max().unwrap_or_default();
    let take = MemberCommand::TakePlace { job: intent.job, node_job: ask.job, id_min: id_max.saturating_add(1) };
    match propose_op(shared, core, Operation::Members(take)).await {
        Ok(Outcome::Member(intent)) => {
            let Some(place) = intent.place else { return AskReply::Failed("no place was given".into()) };
            tracing::warn!(node = name, fresh_id = place.fresh_id, "a node comes: it was given its Raft id");
            granted.permit = Some(Permit {
                name,
                job: place.node_job,
                old_id: 0,
                fresh_id: place.fresh_id,
                granted_at_ms: 0,
                renewed_at_ms: 0,
                automatic: ask.automatic,
            });
            shared.members.wake.notify_one();
            AskReply::Granted(Box::new(granted))
        }
        // The voters are about to change to a node of that name which has its place already, or it was cancelled.
        Ok(Outcome::Refused(_)) => {
            AskReply::Refused(Refusal::Waits(vec![format!("the change of the members about {name} to end")]))
        }
        Ok(other) => AskReply::Failed(format!("the place ended with {other:?}")),
        Err(why) => AskReply::Failed(why),
    }
}

/// A learner has lost its files, or is made anew: it comes once more, under another id. Nobody counts on what it has, so
/// that it needs no permit, and no order of an operator beyond the first. `None` after a dry run: it may.
async fn come_again(
    shared: &Shared,
    core: &Core,
    known: &MemberBook,
    listed_id: u64,
    member: Member,
    ask: &Ask,
) -> Result<Option<Intent>, AskReply> {
    let name = &ask.name;
    if let Some(current) = &known.current {
        let why = format!("the {} of {} to end", current.change.word(), current.name);
        return Err(AskReply::Refused(Refusal::Waits(vec![why])));
    }
    let times = times_today(known, name, clock::unix_ms());
    if ask.automatic && times >= shared.config.rebuild.automatic_per_day {
        return Err(too_often(name));
    }
    if ask.dry_run {
        return Ok(None);
    }
    let addr = &member.peer_addr;
    let runs = runs_under(shared, listed_id, addr).await;
    if let Err(why) = is_at_its_address(&candidate(shared, addr).await, runs, name, addr) {
        return Err(AskReply::Refused(Refusal::Waits(vec![why])));
    }
    let intent = Intent {
        job: uuid::Uuid::now_v7().as_u128(),
        change: Change::Add { learner: true },
        name: member.name,
        peer_addr: member.peer_addr,
        http_addr: member.http_addr,
        forced: false,
        cause: if ask.automatic { CAME_BY_ITSELF } else { COMES_FOR_AN_OPERATOR }.to_owned(),
        began_unix_ms: clock::unix_ms(),
        place: None,
        leaves: Vec::new(),
        changing: false,
        cancelled: false,
    };
    match propose_op(shared, core, Operation::Members(MemberCommand::Begin(Box::new(intent)))).await {
        Ok(Outcome::Member(intent)) => {
            tracing::warn!(node = name, "a learner comes again, as one without files");
            Ok(Some(*intent))
        }
        Ok(Outcome::Refused(_)) => {
            Err(AskReply::Refused(Refusal::Waits(vec!["another change of the members to end".to_owned()])))
        }
        Ok(other) => Err(AskReply::Failed(format!("the order ended with {other:?}"))),
        Err(why) => Err(AskReply::Failed(why)),
    }
}

fn too_often(name: &str) -> AskReply {
    AskReply::Refused(Refusal::Operator(format!(
        "{name} has come again too often within a day; an operator decides whether its disk is good enough for another time \
         (POST /v1/admin/node/rebuild on it, or `stemedb rebuild {name}`)"
    )))
}

/// Whether a core runs at `addr` under that id.
async fn runs_under(shared: &Shared, id: u64, addr: &str) -> bool {
    status::ask_status(shared, id, addr).await.is_ok_and(|status| status.role != Role::Starting.word())
}

/// Another process under a learner's name must not put it out, not even while it is down, or starts: whoever comes is at
/// its address, and says there that it comes. `runs`: a core of it runs there. Pure.
fn is_at_its_address(said: &Result<Candidate, String>, runs: bool, name: &str, addr: &str) -> Result<(), String> {
    let silent = |why: &str| {
        format!(
            "{name} to answer at {addr}, where this cluster has it ({why}); one that has moved is removed, and added with \
             its new address: `stemedb member remove {name}`"
        )
    };
    match said {
        _ if runs => Err(format!("{name} to end: it still runs under its old id at {addr}")),
        Err(why) => Err(silent(why)),
        Ok(said) if said.name != name => Err(silent(&format!("{} answers", said.name))),
        Ok(said) if !said.comes() => {
            Err(format!("{name} at {addr} to ask itself: it has its files there, under Raft id {}", said.raft_id))
        }
        Ok(_) => Ok(()),
    }
}

/// What has become of a learner that was to come again under another id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Before {
    /// Ids under which it is listed that are not given up for sure, the one that it is to have apart.
    pub kept: BTreeSet<u64>,
    /// The one of them under which it is at work.
    pub at_work: Option<u64>,
}

/// Looks after a learner that is to come again and has not joined: its order may have been given up. Of a node that
/// comes for the first time nothing is kept: all of its ids were given to it on its way in.
pub async fn before(shared: &Shared, membership: &StoredMembership, intent: &Intent) -> Before {
    let again = [CAME_BY_ITSELF, COMES_FOR_AN_OPERATOR].contains(&&*intent.cause);
    let joined = intent.place.is_some_and(|place| membership.get_node(&place.fresh_id).is_some());
    let listed = learners_of(membership, &intent.name, &BTreeSet::new());
    if !again || joined || listed.is_empty() {
        return Before::default();
    }
    for id in &listed {
        if runs_under(shared, *id, &intent.peer_addr).await {
            return Before { at_work: Some(*id), kept: [*id].into() };
        }
    }
    // Nobody knows what a silent one has. Whoever is on its way has given up what it had, or is about to.
    let comes = candidate(shared, &intent.peer_addr).await.is_ok_and(|said| said.name == intent.name && said.comes());
    Before { at_work: None, kept: if comes { BTreeSet::new() } else { listed } }
}

/// How often a learner has come again by itself within the last day. Pure.
fn times_today(known: &MemberBook, name: &str, now_unix_ms: u64) -> u64 {
    let is_its = |ended: &&Ended| ended.intent.name == name && ended.intent.cause == CAME_BY_ITSELF;
    let today = known.ended.iter().filter(is_its).filter(|e| now_unix_ms.saturating_sub(e.ended_unix_ms) < DAY_MS);
    u64::try_from(today.count()).unwrap_or(u64::MAX)
}

/// A step that a node with a place asks for; `None`: it has none, or none any more.
pub async fn step(
    shared: &Shared,
    core: &Core,
    name: &str,
    fresh_id: u64,
    step: &LeaderStep,
) -> Result<Option<StepReply>, String> {
    let known = book(shared).await?;
    let membership = core.raft_metrics().membership_config;
    let is_its = |intent: &Intent| intent.place.is_some_and(|place| place.fresh_id == fresh_id);
    if known.ended.iter().any(|ended| ended.end == End::Finished && is_its(&ended.intent)) {
        let is_member = !is_joint(&membership) && membership.get_node(&fresh_id).is_some();
        return Ok(is_member.then_some(StepReply::Done));
    }
    let Some(intent) = awaited(known.current, name).filter(is_its) else { return Ok(None) };
    match step {
        LeaderStep::Join(_) => {
            join(core, &intent, fresh_id).await?;
            shared.members.wake.notify_one();
            Ok(Some(StepReply::Done))
        }
        LeaderStep::Promote => Ok(Some(StepReply::Behind { entries: behind(core, fresh_id).0 })),
        LeaderStep::Cancel { .. } => Ok(Some(StepReply::Done)),
    }
}

async fn join(core: &Core, intent: &Intent, fresh_id: u64) -> Result<(), String> {
    let membership = core.raft_metrics().membership_config;
    // What the operator has said, and not what the node says of itself.
    let member =
        Member { name: intent.name.clone(), peer_addr: intent.peer_addr.clone(), http_addr: intent.http_addr.clone() };
    if membership.get_node(&fresh_id).is_none() {
        bounded(core.raft.add_learner(fresh_id, member, false)).await?;
    }
    take_out_learners(core, &intent.name, &[fresh_id].into()).await
}

/// The learners of that name, all but `keep`. Of a node that comes they are ways in that were given up.
pub fn learners_of(membership: &StoredMembership, name: &str, keep: &BTreeSet<u64>) -> BTreeSet<u64> {
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let is_void = |(id, member): &(&u64, &Member)| member.name == name && !keep.contains(id) && !voters.contains(id);
    membership.nodes().filter(is_void).map(|(id, _)| *id).collect()
}

/// Removes the learners of that name, all but `keep`.
pub async fn take_out_learners(core: &Core, name: &str, keep: &BTreeSet<u64>) -> Result<(), String> {
    let void = learners_of(&core.raft_metrics().membership_config, name, keep);
    if !void.is_empty() {
        bounded(core.raft.change_membership(ChangeMembers::RemoveNodes(void), true)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use openraft::Membership;

    use super::*;

    #[test]
    fn ways_in_that_were_given_up_are_found_and_the_one_that_counts_is_kept() {
        let member = |name: &str| Member { name: name.into(), ..Member::default() };
        let nodes = BTreeMap::from([(1, member("a")), (2, member("b")), (7, member("d")), (9, member("d"))]);
        let membership = StoredMembership::new(None, Membership::new(vec![[1, 2].into()], nodes).unwrap());
        assert_eq!(learners_of(&membership, "d", &[9].into()), [7].into());
        assert_eq!(learners_of(&membership, "d", &[].into()), [7, 9].into());
        assert_eq!(learners_of(&membership, "a", &[].into()), [].into(), "a voter is none");
    }

    #[test]
    fn only_whoever_says_at_its_address_that_it_comes_takes_the_place_of_a_learner() {
        let said = |name: &str, empty, step: &str| {
            Ok(Candidate { name: name.into(), empty, step: step.into(), raft_id: 4, ..Candidate::default() })
        };
        let is = |said: &Result<Candidate, String>, runs| is_at_its_address(said, runs, "far", "h:1");
        is(&said("far", true, ""), false).unwrap();
        is(&said("far", false, "asking for the permit"), false).unwrap();
        for (said, runs, words) in [
            (said("far", false, ""), true, "it still runs"),
            (said("far", false, "asking for the permit"), true, "it still runs"),
            // It starts, or its disk stands still: its role is that of a node whose core has ended.
            (said("far", false, ""), false, "it has its files there, under Raft id 4"),
            (said("near", true, ""), false, "near answers"),
            (Err("no route".to_owned()), false, "no route"),
        ] {
            let why = is(&said, runs).unwrap_err();
            assert!(why.contains(words) && why.contains("h:1"), "{why}");
        }
    }

    #[test]
    fn only_what_a_learner_did_by_itself_within_a_day_counts() {
        let ended = |name: &str, cause: &str, ended_unix_ms| Ended {
            intent: Intent {
                job: 1,
                change: Change::Add { learner: true },
                name: name.into(),
                peer_addr: String::new(),
                http_addr: String::new(),
                forced: false,
                cause: cause.into(),
                began_unix_ms: 0,
                place: None,
                leaves: vec![],
                changing: false,
                cancelled: false,
            },
            end: End::Finished,
            detail: String::new(),
            ended_unix_ms,
        };
        let now_ms = 3 * DAY_MS;
        let ended = vec![
            ended("far", CAME_BY_ITSELF, now_ms - DAY_MS),
            ended("far", CAME_BY_ITSELF, now_ms - DAY_MS + 1),
            ended("far", "an operator", now_ms),
            ended("near", CAME_BY_ITSELF, now_ms),
            ended("far", CAME_BY_ITSELF, now_ms),
        ];
        let book = MemberBook { ended, ..MemberBook::default() };
        assert_eq!(times_today(&book, "far", now_ms), 2);
    }
}
