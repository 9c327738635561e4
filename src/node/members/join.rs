//! The leader's answers to a node that comes: the same questions as those of a rebuild, another right.

use std::collections::BTreeSet;

use openraft::ChangeMembers;
use stemedb_net::ClusterId;
use stemedb_raft::types::{Member, StoredMembership};

use super::{book, is_joint};
use crate::{
    node::{
        core::{Core, Shared},
        level,
        rebuild::{
            grant::{bounded, members_of, propose_op},
            messages::{Ask, AskReply, Granted, LeaderStep, Refusal, StepReply},
        },
    },
    state::{
        command::{MemberCommand, Operation, Outcome},
        members::{End, Intent},
        permits::Permit,
    },
};

/// A learner that lacks at most this many entries may become a voter: it gets them within milliseconds, and under load
/// it always lacks some.
pub const BEHIND_ENTRIES_MAX: u64 = 256;

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
    let name = ask.name;
    let known = match book(shared).await {
        Ok(known) => known,
        Err(why) => return AskReply::Failed(why),
    };
    let Some(intent) = awaited(known.current, &name) else {
        let is_learner = membership.nodes().any(|(_, member)| member.name == name);
        let why = match is_learner {
            true => {
                format!("{name} is a learner that has lost its files: remove it, empty its folder, and add it again")
            }
            false => {
                format!("{name} is no member of this cluster: add it with `stemedb member add {name} --addr HOST:PORT`")
            }
        };
        return AskReply::Refused(match ask.dry_run {
            true => Refusal::Operator(why),
            false => Refusal::Waits(vec![why]),
        });
    };
    if let Some(why) = level::keeps_out(shared, core, &name, &intent.peer_addr).await {
        return AskReply::Refused(Refusal::Waits(vec![why]));
    }
    let mut granted = Granted { permit: None, cluster_id, leader, members: members_of(membership) };
    if ask.dry_run {
        return AskReply::Granted(Box::new(granted));
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
    take_out_learners(core, &intent.name, Some(fresh_id)).await
}

/// Removes the learners of that name, all but `keep`: ways in that were given up.
pub async fn take_out_learners(core: &Core, name: &str, keep: Option<u64>) -> Result<(), String> {
    let membership = core.raft_metrics().membership_config;
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let void: BTreeSet<u64> = membership
        .nodes()
        .filter(|(id, member)| member.name == name && Some(**id) != keep && !voters.contains(id))
        .map(|(id, _)| *id)
        .collect();
    if !void.is_empty() {
        bounded(core.raft.change_membership(ChangeMembers::RemoveNodes(void), true)).await?;
    }
    Ok(())
}
