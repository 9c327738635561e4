//! The leader's side of a rebuild: gives the permit, lets the fresh id join and vote.
//!
//! A node that starts afresh takes one copy of every entry out of the cluster. [`may_grant`] says whether the others
//! can do without it: they are a quorum, each is well and votes now, and each has flushed what is committed as of
//! now. The grant itself is an entry: when it commits, a quorum without the asking node, whose core has ended, has
//! everything before it. Every step is idempotent and is sent again to the next leader after a change.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use openraft::{ChangeMembers, raft::Precondition};
use stemedb_net::Refusal as NetRefusal;
use stemedb_raft::types::{Member, StoredMembership};
use tokio::time::Instant;

use super::messages::{Ask, AskReply, Granted, KnownMember, LeaderStep, Refusal, StepReply, StepRequest};
use crate::{
    clock,
    node::{
        core::{Core, Role, Shared},
        level, members,
        messages::{ProposeAnswer, StatusReply, pack, unpack},
        read, status,
    },
    state::{
        command::{self, Command, CommandKey, KeySource, Operation, Outcome, RebuildCommand},
        engine::StateRead,
        keys,
        permits::{Book, Permit},
    },
};

/// A learner that lacks at most this many entries may become a voter: it gets them within milliseconds, and under
/// load it always lacks some.
const BEHIND_ENTRIES_MAX: u64 = 256;
/// How long the others may take to flush what is committed as of now, and how often it is looked at.
const FLUSHED_WAIT_MAX: Duration = Duration::from_secs(2);
const FLUSHED_LOOK: Duration = Duration::from_millis(10);
/// How long the leader waits for an entry or a change of the members. Past it the node asks again.
const COMMIT_MAX: Duration = Duration::from_secs(10);

/// A voter other than the asking node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherVoter {
    /// Its name.
    pub name: String,
    /// Why it does not count as well, if so: it does not answer, it has failed, it is being rebuilt.
    pub unwell: Option<String>,
    /// The last log index that it has flushed, as the leader knows; `None`: nothing.
    pub flushed: Option<u64>,
}

/// What the leader looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Name of the asking node.
    pub name: String,
    /// Its Raft id among the voters; `None`: it is no voter.
    pub old_id: Option<u64>,
    /// Whether a core of it runs under that id.
    pub still_runs: bool,
    /// Whether a change of the members is under way.
    pub joint: bool,
    /// Number of voters, the asking node among them.
    pub voters: usize,
    /// The other voters, this leader among them.
    pub others: Vec<OtherVoter>,
    /// What is committed as of now.
    pub committed: u64,
}

/// Whether the cluster can do without what the asking node has. Pure.
pub fn may_grant(view: &View) -> Result<(), Refusal> {
    let name = &view.name;
    if view.old_id.is_none() {
        return Err(Refusal::Operator(format!("{name} is no voter of this cluster: add it as a new member")));
    }
    let mut waits = Vec::new();
    if view.still_runs {
        waits.push(format!("{name} to end: it still runs under its old id"));
    }
    if view.joint {
        waits.push("a change of the members to end".to_owned());
    }
    for other in &view.others {
        let who = &other.name;
        if let Some(why) = &other.unwell {
            waits.push(format!("{who}: {why}"));
        } else if other.flushed.is_none_or(|flushed| flushed < view.committed) {
            let has = other.flushed.map_or_else(|| "nothing".to_owned(), |flushed| flushed.to_string());
            waits.push(format!("{who}: it has flushed {has} of the log, and {} is committed", view.committed));
        }
    }
    if !waits.is_empty() {
        return Err(Refusal::Waits(waits));
    }
    if view.others.len() < view.voters / 2 + 1 {
        return Err(Refusal::Operator(format!(
            "without {name} there is no quorum: {} of {} voters are left. Add members first, or restore a backup",
            view.others.len(),
            view.voters
        )));
    }
    Ok(())
}

type Answer = Result<Bytes, NetRefusal>;

fn answer<T: serde::Serialize>(value: &T) -> Answer {
    pack(value).map_err(|e| NetRefusal::new(crate::node::rpc_server::FAILED, e.to_string()))
}

fn unreadable(error: impl ToString) -> NetRefusal {
    NetRefusal::new(crate::node::rpc_server::REFUSED_BEFORE_EFFECT, error.to_string())
}

/// Handles `Kind::RebuildAsk`.
pub async fn ask(shared: Arc<Shared>, body: Bytes) -> Answer {
    let ask: Ask = unpack(&body).map_err(unreadable)?;
    // Runs to its end even when the connection is lost meanwhile.
    let reply = tokio::spawn(async move { decide(&shared, ask).await }).await;
    answer(&reply.unwrap_or_else(|e| AskReply::Failed(e.to_string())))
}

async fn decide(shared: &Shared, ask: Ask) -> AskReply {
    let own = (**shared.identity.load()).as_ref().map(|id| (id.cluster_id, id.raft_id));
    let Some(((cluster_id, own_id), core)) = own.zip(shared.core.get()) else { return not_leader(shared) };
    if ask.cluster_id.is_some_and(|theirs| theirs != cluster_id) {
        let why = "its folder belongs to another cluster; empty the folder, or correct the addresses in cluster.peers";
        return AskReply::Refused(Refusal::Operator(format!("{}: {why}", ask.name)));
    }
    if shared.view.borrow().role != Role::Leader || shared.may_not_lead().is_some() {
        return not_leader(shared);
    }
    // Confirms that this node leads, and says what is committed.
    let committed = match core.leader_rounds.join().await {
        Ok(committed) => committed,
        Err(why) => return AskReply::Failed(why),
    };
    let metrics = core.raft_metrics();
    let membership = &metrics.membership_config;
    let held = match book(shared, core, committed).await {
        Ok(book) => book.permit,
        Err(why) => return AskReply::Failed(why),
    };
    let resumes = held.as_ref().filter(|p| p.name == ask.name && p.job == ask.job);
    if resumes.is_none() && voter_named(membership, &ask.name).is_none() {
        return members::join::place(shared, core, membership, ask, cluster_id, own_id).await;
    }
    if let Some(id) = voter_named(membership, &ask.name)
        && let Some(member) = membership.get_node(&id)
        && let Some(why) = level::keeps_out(shared, core, &ask.name, &member.peer_addr).await
    {
        return AskReply::Refused(Refusal::Waits(vec![why]));
    }
    // Once its files are put away there is nothing more to lose by going on. Before that it is looked at again: another
    // node may have failed since the grant.
    if resumes.is_none() || !ask.emptied {
        let view = look(shared, core, &ask.name, committed, membership, ask.dry_run).await;
        if let Err(refusal) = may_grant(&view) {
            return AskReply::Refused(refusal);
        }
        // In earnest the entry decides: while nothing is written, it alone moves log time, by which a permit that was left
        // behind expires.
        let others = held.as_ref().filter(|p| p.name != ask.name && shared.log_time_ms() < p.expires_at_ms());
        if let Some(held) = others.filter(|_| ask.dry_run) {
            let why = format!("{}: it is being rebuilt, and one node at a time may be", held.name);
            return AskReply::Refused(Refusal::Waits(vec![why]));
        }
    }
    let mut granted = Granted { permit: None, cluster_id, leader: own_id, members: members_of(membership) };
    if ask.dry_run {
        return AskReply::Granted(Box::new(granted));
    }
    let id_max = membership.nodes().map(|(id, _)| *id).max().unwrap_or_default();
    let old_id = match (resumes, voter_named(membership, &ask.name)) {
        (Some(permit), _) => permit.old_id,
        (None, Some(id)) => id,
        (None, None) => return AskReply::Failed("the members have just changed".into()),
    };
    let name = ask.name.clone();
    let command = RebuildCommand::Grant {
        name: ask.name,
        job: ask.job,
        old_id,
        id_min: id_max.saturating_add(1),
        automatic_max: ask.automatic.then_some(shared.config.rebuild.automatic_per_day),
    };
    match propose(shared, core, command).await {
        Ok(Outcome::Permit(permit)) => {
            tracing::warn!(
                node = permit.name,
                old_id = permit.old_id,
                fresh_id = permit.fresh_id,
                automatic = permit.automatic,
                "permit to rebuild granted"
            );
            granted.permit = Some(permit);
            AskReply::Granted(Box::new(granted))
        }
        Ok(Outcome::Refused(command::Refusal::RebuildHeld { by, .. })) => {
            AskReply::Refused(Refusal::Waits(vec![format!("{by}: it is being rebuilt, and one node at a time may be")]))
        }
        Ok(Outcome::Refused(command::Refusal::MembersBusy { name, .. })) => {
            AskReply::Refused(Refusal::Waits(vec![format!("the voters to have changed: {name} comes or leaves")]))
        }
        Ok(Outcome::Refused(command::Refusal::MembersVoid { .. })) => {
            AskReply::Refused(Refusal::Operator(format!("{name} was removed: add it as a new member")))
        }
        Ok(Outcome::Refused(command::Refusal::RebuiltTooOften { name, times })) => {
            AskReply::Refused(Refusal::Operator(format!(
                "{name} has rebuilt itself {times} times within a day; an operator decides whether its disk is good enough for \
                 another time (POST /v1/admin/node/rebuild on it, or `stemedb rebuild {name}`)"
            )))
        }
        Ok(other) => AskReply::Failed(format!("the grant ended with {other:?}")),
        Err(why) => AskReply::Failed(why),
    }
}

fn not_leader(shared: &Shared) -> AskReply {
    let leader = shared.view.borrow().leader.clone().filter(|leader| !leader.here);
    AskReply::NotLeader { leader_addr: leader.map(|leader| leader.addr) }
}

/// The members as a view of the cluster has them.
pub fn members_of(membership: &StoredMembership) -> Vec<KnownMember> {
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let known =
        |(id, member): (&u64, &Member)| KnownMember { id: *id, member: member.clone(), voter: voters.contains(id) };
    membership.nodes().map(known).collect()
}

fn voter_named(membership: &StoredMembership, name: &str) -> Option<u64> {
    membership.voter_ids().find(|id| membership.get_node(id).is_some_and(|member| member.name == name))
}

fn is_joint(membership: &StoredMembership) -> bool {
    membership.membership().get_joint_config().len() > 1
}

/// Asks everybody at once.
async fn look(
    shared: &Shared,
    core: &Core,
    name: &str,
    committed: u64,
    membership: &StoredMembership,
    dry_run: bool,
) -> View {
    let own_id = shared.local.load().node_id;
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let old_id = voter_named(membership, name);
    let asked = voters.iter().map(|id| async move {
        let member = membership.get_node(id).cloned().unwrap_or_default();
        let status = match *id == own_id {
            true => Ok(status::own_status(shared)),
            false => status::ask_status(shared, *id, &member.peer_addr).await,
        };
        (*id, member.name, status)
    });
    let mut still_runs = false;
    let mut others = Vec::new();
    let answers = join_all(asked).await;
    // Under load the end of the log is always on its way to somebody.
    let flushed =
        flushed_soon(shared, core, answers.iter().map(|(id, ..)| *id).filter(|id| Some(*id) != old_id), committed)
            .await;
    for (id, other, status) in answers {
        if Some(id) == old_id {
            // An answer under the old id: its core must have ended, or it could acknowledge after the grant.
            still_runs = !dry_run && status.is_ok_and(|s| s.role != Role::Starting.word());
            continue;
        }
        let flushed = flushed.get(&id).copied().flatten();
        others.push(OtherVoter { name: other, unwell: unwell(status), flushed });
    }
    let joint = is_joint(membership);
    View { name: name.to_owned(), old_id, still_runs, joint, voters: voters.len(), others, committed }
}

/// What each of `ids` has flushed, as soon as all of them have `committed`, or after a while.
async fn flushed_soon(
    shared: &Shared,
    core: &Core,
    ids: impl Iterator<Item = u64>,
    committed: u64,
) -> BTreeMap<u64, Option<u64>> {
    let own_id = shared.local.load().node_id;
    let ids: Vec<u64> = ids.collect();
    let until = Instant::now() + FLUSHED_WAIT_MAX;
    loop {
        let replication = core.raft_metrics().replication.unwrap_or_default();
        let one = |id: &u64| match *id == own_id {
            true => shared.wal().and_then(stemedb_raft::WalHandle::index_flushed),
            false => replication.get(id).copied().flatten().map(|matched| matched.index),
        };
        let flushed: BTreeMap<u64, Option<u64>> = ids.iter().map(|id| (*id, one(id))).collect();
        let all = flushed.values().all(|index| index.is_some_and(|index| index >= committed));
        if all || Instant::now() >= until {
            return flushed;
        }
        tokio::time::sleep(FLUSHED_LOOK).await;
    }
}

fn unwell(status: Result<StatusReply, String>) -> Option<String> {
    let status = match status {
        Ok(status) => status,
        Err(why) => return Some(format!("it does not answer ({why})")),
    };
    let votes = [Role::Leader, Role::Follower, Role::Candidate].iter().any(|role| role.word() == status.role);
    match (status.disk.state, votes) {
        (state, _) if state.silences() => {
            Some(format!("its disk is {} ({})", state.word(), status.disk.reason.unwrap_or_default()))
        }
        (_, false) => Some(format!("it does not take part (it is {:?})", status.role)),
        (_, true) => status.damaged.map(|why| format!("its tree is damaged ({why})")),
    }
}

/// The permit as of `committed`.
async fn book(shared: &Shared, core: &Core, committed: u64) -> Result<Book, String> {
    read::wait_applied(shared, committed, Instant::now() + COMMIT_MAX).await.map_err(|e| format!("{e:?}"))?;
    let view = core.state.view().ok_or("this node is stopping")?;
    tokio::task::spawn_blocking(move || {
        let row = view.snapshot.get(keys::REBUILD_PERMITS).map_err(|e| e.to_string())?;
        Book::decode(row.as_deref()).map_err(|e| e.to_string())
    })
    .await
    .map_err(|e| e.to_string())?
}

async fn propose(shared: &Shared, core: &Core, command: RebuildCommand) -> Result<Outcome, String> {
    propose_op(shared, core, Operation::Rebuild(command)).await
}

/// Proposes a command of a node, here, and waits for its outcome; the error says that it is not known.
pub async fn propose_op(shared: &Shared, core: &Core, op: Operation) -> Result<Outcome, String> {
    let window_ms = u64::try_from(COMMIT_MAX.as_millis()).unwrap_or(u64::MAX);
    let command = Command {
        key: CommandKey { source: KeySource::Node, id: uuid::Uuid::now_v7().as_u128() },
        body_hash: 0,
        resend_until_ms: shared.log_time_ms().saturating_add(window_ms),
        created_at_ms: clock::unix_ms(),
        op,
    };
    let pending = core.proposer.propose(Arc::new(command)).map_err(|e| format!("{e:?}"))?;
    match tokio::time::timeout(COMMIT_MAX, pending).await {
        Ok(Ok(ProposeAnswer::Outcome(outcome))) => Ok(outcome.outcome),
        Ok(Ok(other)) => Err(format!("{other:?}")),
        Ok(Err(_)) => Err("the proposer has ended".into()),
        Err(_) => Err(format!("it was not committed within {COMMIT_MAX:?}")),
    }
}

/// Handles `Kind::RebuildStep`.
pub async fn step(shared: Arc<Shared>, body: Bytes) -> Answer {
    let request: StepRequest = unpack(&body).map_err(unreadable)?;
    let reply = tokio::spawn(async move { carry_out(&shared, request).await }).await;
    let reply = match reply {
        Ok(Ok(reply)) => reply,
        Ok(Err(why)) => StepReply::Failed(why),
        Err(died) => StepReply::Failed(died.to_string()),
    };
    answer(&reply)
}

async fn carry_out(shared: &Shared, request: StepRequest) -> Result<StepReply, String> {
    let Some(core) = shared.core.get() else { return Ok(StepReply::NotLeader) };
    if shared.view.borrow().role != Role::Leader || shared.may_not_lead().is_some() {
        return Ok(StepReply::NotLeader);
    }
    let StepRequest { name, fresh_id, step } = request;
    if let LeaderStep::Cancel { job } = step {
        propose(shared, core, RebuildCommand::Cancel { name, job }).await?;
        return Ok(StepReply::Done);
    }
    let committed = core.leader_rounds.join().await?;
    let permit = match book(shared, core, committed).await?.permit {
        Some(permit) if permit.name == name && permit.fresh_id == fresh_id => permit,
        held => {
            // A repeated last step finds its permit used up.
            let membership = core.raft_metrics().membership_config;
            if !is_joint(&membership) && membership.voter_ids().any(|id| id == fresh_id) {
                return Ok(StepReply::Done);
            }
            if let Some(reply) = members::join::step(shared, core, &name, fresh_id, &step).await? {
                return Ok(reply);
            }
            let by = held.map_or_else(|| "nobody".to_owned(), |p| format!("{} as id {}", p.name, p.fresh_id));
            return Ok(StepReply::Stale(format!("the permit for id {fresh_id} is void; held by {by}")));
        }
    };
    let membership = core.raft_metrics().membership_config;
    if !membership.voter_ids().any(|id| id == permit.old_id || id == permit.fresh_id) {
        // Removed or replaced since the grant: it comes back as a new member or not at all.
        return Ok(StepReply::Stale(format!("neither id {} nor id {fresh_id} votes any more", permit.old_id)));
    }
    match step {
        LeaderStep::Join(member) => {
            // At the address that it has now.
            if let Some(why) = level::keeps_out(shared, core, &name, &member.peer_addr).await {
                return Ok(StepReply::Failed(format!("waiting for {why}")));
            }
            join(core, &permit, member).await
        }
        LeaderStep::Promote => promote(shared, core, &permit).await,
        LeaderStep::Cancel { .. } => Ok(StepReply::Done),
    }
}

/// Within the time for a commit.
pub async fn bounded<T, E: ToString>(change: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    match tokio::time::timeout(COMMIT_MAX, change).await {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err(format!("the members did not change within {COMMIT_MAX:?}")),
    }
}

async fn join(core: &Core, permit: &Permit, member: Member) -> Result<StepReply, String> {
    let membership = core.raft_metrics().membership_config;
    if membership.get_node(&permit.fresh_id).is_none_or(|known| *known != member) {
        bounded(core.raft.add_learner(permit.fresh_id, member, false)).await?;
    }
    let membership = core.raft_metrics().membership_config;
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    // Rebuilds of this node that were given up.
    let void: BTreeSet<u64> = membership
        .nodes()
        .filter(|(id, member)| member.name == permit.name && **id != permit.fresh_id && !voters.contains(id))
        .map(|(id, _)| *id)
        .collect();
    if !void.is_empty() {
        bounded(core.raft.change_membership(ChangeMembers::RemoveNodes(void), true)).await?;
    }
    Ok(StepReply::Done)
}

async fn promote(shared: &Shared, core: &Core, permit: &Permit) -> Result<StepReply, String> {
    let metrics = core.raft_metrics();
    let membership = &metrics.membership_config;
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    if membership.get_node(&permit.fresh_id).is_none() {
        return Err("the learner has not joined".into());
    }
    let seen = Precondition::LastMembershipLogId { last_membership_log_id: *membership.log_id() };
    if is_joint(membership) {
        // Left behind by a leader that lost its place between the two halves.
        bounded(core.raft.change_membership_if(ChangeMembers::AddVoterIds(BTreeSet::new()), false, [seen])).await?;
        return Err("the change of the members was completed; looking again".into());
    }
    if !voters.contains(&permit.fresh_id) || voters.contains(&permit.old_id) {
        let end = metrics.last_log_index.map_or(0, |last| last + 1);
        let matched = metrics.replication.as_ref().and_then(|r| r.get(&permit.fresh_id).copied().flatten());
        let entries = end.saturating_sub(matched.map_or(0, |id| id.index + 1));
        if entries > BEHIND_ENTRIES_MAX || matched.is_none() {
            return Ok(StepReply::Behind { entries });
        }
        let mut next = voters;
        next.remove(&permit.old_id);
        next.insert(permit.fresh_id);
        bounded(core.raft.change_membership_if(next, false, [seen])).await?;
        tracing::warn!(node = permit.name, old_id = permit.old_id, fresh_id = permit.fresh_id, "rebuilt node votes");
    }
    propose(shared, core, RebuildCommand::Finish { name: permit.name.clone(), fresh_id: permit.fresh_id }).await?;
    Ok(StepReply::Done)
}

#[cfg(test)]
#[path = "grant_tests.rs"]
mod tests;
