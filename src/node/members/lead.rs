//! The leader carries the steps of `admin::member` out. Each node has this task; it does something while its node leads
//! and a change of the members goes on.
//!
//! Every round looks at everything anew: the intent as it is committed, the members, and who works. So a leader that
//! comes later, or the same one after an error, goes on where things stand.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use openraft::{ChangeMembers, raft::Precondition};
use stemedb_raft::types::{StoredMembership, TypeConfig};
use tokio::time::Instant;

use super::{
    candidate::candidate,
    ids_of, is_joint,
    join::{BEHIND_ENTRIES_MAX, Before, before, behind, learners_of, take_out_learners},
};
use crate::{
    admin::{
        failover,
        member::{self, Kind, Outlook, Step, View, Voters, next},
    },
    clock,
    config::MemberRole,
    node::{
        core::{Core, Role, Shared},
        flows::{Asked, ask_all, candidates, ill, lags, move_leadership},
        kinds::Kind as Message,
        messages::pack,
        read,
        rebuild::{
            fail_point,
            grant::{bounded, propose_op},
        },
    },
    state::{
        command::{MemberCommand, Operation, Outcome, Refusal},
        members::{End, Intent},
    },
};

/// How often a leader looks whether there is something to do, beside being told.
const LOOK: Duration = Duration::from_millis(250);
/// The same of a node that does not lead.
const LOOK_RARELY: Duration = Duration::from_secs(1);
/// Pause of a step that waits.
const PAUSE: Duration = Duration::from_millis(100);
/// How often a node on its way in is asked how far it is.
const ASK_PAUSE: Duration = Duration::from_millis(500);
/// How long a change of the voters that nobody here is at may stay between its halves: far longer than a commit.
const LEFT_BEHIND_AFTER: Duration = Duration::from_secs(15);
/// How long leadership may take to move.
const LEAVE_MAX: Duration = Duration::from_secs(5);
/// How long a removed node may take to hear that it had better look.
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(1);

/// The point before a leader that is asked to remove itself gives leadership away: nothing is begun yet.
pub const ORDER_LEAVE: &str = "member.order_leave";

/// The points at which a test ends the leader: before each step, in the order of a replacement.
pub const POINTS: &[&str] = &[
    ORDER_LEAVE,
    "member.await_join",
    "member.give_up",
    "member.await_log",
    "member.await_quorum",
    "member.leave",
    "member.announce",
    "member.withdraw",
    "member.change",
    "member.finish",
    "member.take_out",
    "member.undone",
];

fn point(step: Step) -> Option<&'static str> {
    Some(match step {
        Step::AwaitJoin => "member.await_join",
        Step::GiveUp => "member.give_up",
        Step::AwaitLog => "member.await_log",
        Step::Leave => "member.leave",
        Step::Announce => "member.announce",
        Step::Change => "member.change",
        Step::Finish => "member.finish",
        Step::TakeOut => "member.take_out",
        Step::Undone => "member.undone",
        Step::AwaitQuorum => "member.await_quorum",
        Step::Withdraw => "member.withdraw",
        // Raft goes from one half of a change to the other by itself, so that no test can have a leader end between
        // them.
        Step::Complete => return None,
    })
}

/// What a round came to.
enum Round {
    /// Nothing is to be done.
    Idle,
    /// A step was done.
    Done,
    /// It waits for something; look again after this.
    Waits(Duration),
    /// A test ends it here.
    Stopped,
}

/// How fast a learner catches up.
#[derive(Default)]
struct Pace {
    seen: Option<(Instant, u64)>,
}

impl Pace {
    /// Seconds until nothing is missing, at the pace since the last look that was far enough back.
    fn eta_s(&mut self, entries: u64) -> Option<u64> {
        let now = Instant::now();
        let (at, before) = *self.seen.get_or_insert((now, entries));
        let ms = u64::try_from(now.duration_since(at).as_millis()).unwrap_or(u64::MAX);
        if ms > 10_000 {
            self.seen = Some((now, entries));
        }
        let gained = before.saturating_sub(entries);
        (gained > 0 && ms > 0).then(|| entries.saturating_mul(ms) / gained / 1_000)
    }
}

/// A change of the voters that was left between its two halves, by whomever, keeps every later one from beginning. A
/// leader that sees the same one for a while, with nobody at it, completes it.
#[derive(Default)]
struct LeftBehind {
    seen: Option<(u64, Instant)>,
}

impl LeftBehind {
    async fn complete(&mut self, core: &Core) -> Result<(), String> {
        let membership = core.raft_metrics().membership_config;
        let joint = membership.log_id().as_ref().map(|id| id.index).filter(|_| is_joint(&membership));
        let Some(index) = joint else {
            self.seen = None;
            return Ok(());
        };
        match self.seen {
            Some((seen, since)) if seen == index && since.elapsed() < LEFT_BEHIND_AFTER => Ok(()),
            Some((seen, _)) if seen == index => {
                self.seen = None;
                tracing::warn!(index, "a change of the voters was left between its halves and is completed");
                complete(core, &membership).await
            }
            _ => {
                self.seen = Some((index, Instant::now()));
                Ok(())
            }
        }
    }
}

/// The second half of a change of the voters.
async fn complete(core: &Core, membership: &StoredMembership) -> Result<(), String> {
    let seen = Precondition::LastMembershipLogId { last_membership_log_id: *membership.log_id() };
    let nothing_new = ChangeMembers::AddVoterIds(BTreeSet::new());
    bounded(core.raft.change_membership_if(nothing_new, false, [seen])).await.map(drop)
}

/// Runs until the core ends.
pub async fn run(shared: Arc<Shared>) {
    let Some(core) = shared.core.get() else { return };
    let mut pace = Pace::default();
    let mut left_behind = LeftBehind::default();
    let mut said = String::new();
    let mut role_said = false;
    let work = async {
        loop {
            if !role_said && let Some(why) = votes_unasked(&shared) {
                role_said = true;
                tracing::warn!("{why}");
            }
            let leads = shared.view.borrow().role == Role::Leader && shared.silenced().is_none();
            let round = if leads { round(&shared, core, &mut pace).await } else { Ok(Round::Idle) };
            if leads
                && matches!(round, Ok(Round::Idle))
                && let Err(why) = left_behind.complete(core).await
            {
                tracing::info!(why, "a change of the voters that was left is not complete yet");
            }
            let pause = match round {
                Ok(Round::Done) => continue,
                Ok(Round::Idle) => {
                    pace = Pace::default();
                    if leads { LOOK } else { LOOK_RARELY }
                }
                Ok(Round::Waits(pause)) => pause,
                Ok(Round::Stopped) => {
                    tracing::error!("the change of the members ends here for a test");
                    return std::future::pending().await;
                }
                Err(why) => {
                    if why != said {
                        tracing::info!(why, "a step of a change of the members did not come to its end; looking again");
                        said = why;
                    }
                    PAUSE
                }
            };
            let mut view = shared.view.subscribe();
            tokio::select! {
                () = shared.members.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
                _ = view.wait_for(|view| (view.role == Role::Leader) != leads) => {}
            }
        }
    };
    shared.core_stop.run_until_cancelled(work).await;
}

/// All that a decision is made of.
struct Sight {
    intent: Intent,
    membership: Arc<StoredMembership>,
    asked: Vec<Asked>,
    outlook: Outlook,
    refusal: Option<String>,
    before: Before,
    view: View,
}

async fn round(shared: &Arc<Shared>, core: &Core, pace: &mut Pace) -> Result<Round, String> {
    // A look at what is here costs little; what follows is confirmed.
    if super::book(shared).await?.current.is_none() {
        return Ok(Round::Idle);
    }
    let committed = core.leader_rounds.join().await?;
    let deadline = Instant::now() + LEAVE_MAX;
    read::wait_applied(shared, committed, deadline).await.map_err(|e| format!("{e:?}"))?;
    let Some(intent) = super::book(shared).await?.current else { return Ok(Round::Idle) };
    let sight = look(shared, core, intent, committed).await?;
    let step = next(&sight.view);
    shared.members.show(sight.intent.job, step.word(), |_| {});
    if let Some(point) = point(step)
        && fail_point::hit(&shared.config.node.data_dir, point).is_err()
    {
        return Ok(Round::Stopped);
    }
    take(shared, core, step, sight, pace).await
}

/// That this node votes, and its configuration says that it never does. The members are what the cluster has decided,
/// and no node can leave them by itself.
fn votes_unasked(shared: &Shared) -> Option<String> {
    let (own, name) = (shared.local.load().node_id, shared.name());
    let votes = shared.view.borrow().membership.voter_ids().any(|id| id == own);
    (votes && shared.config.cluster.role == MemberRole::Learner).then(|| {
        format!(
            "cluster.role is \"learner\", and this node votes and may lead, as it did before: the key counts when a node \
             comes. To make it a learner: `stemedb member remove {name}`, start it with an empty folder, and `stemedb member \
             add {name} --addr HOST:PORT --learner`"
        )
    })
}

fn kind_of(intent: &Intent) -> Kind {
    match (intent.coming(), intent.leaving()) {
        (Some(_), None) => Kind::Add,
        (Some(_), Some(_)) => Kind::Replace,
        (None, _) => Kind::Remove,
    }
}

/// What the voters are now and would be, and who of them works.
pub fn outlook(
    shared: &Shared,
    core: &Core,
    membership: &StoredMembership,
    asked: &[Asked],
    intent: &Intent,
) -> Outlook {
    let name_of = |id: u64| membership.get_node(&id).map(|member| member.name.clone());
    let now: BTreeSet<String> = membership.voter_ids().filter_map(name_of).collect();
    let own = shared.silenced().map(|why| (shared.name().to_owned(), why));
    let lag = lags(shared, core);
    let complaint = |other: &Asked| ill(&other.status, other.voter).or_else(|| member::lags(lag(other.id)));
    let others = asked.iter().filter_map(|other| Some((other.member.name.clone(), complaint(other)?)));
    let comes = intent.coming().filter(|_| !intent.stays_learner()).map(str::to_owned);
    // The state of a node that has not joined is not a voter's: it is looked at again before it votes.
    let counts = |name: &String| now.contains(name) || comes.as_ref() == Some(name);
    let ill = own.into_iter().chain(others).filter(|(name, _)| counts(name)).collect();
    Outlook::of(Voters { comes, leaves: intent.leaving().map(str::to_owned), ill, now })
}

async fn look(shared: &Shared, core: &Core, intent: Intent, committed: u64) -> Result<Sight, String> {
    let metrics = core.raft_metrics();
    let membership = Arc::clone(&metrics.membership_config);
    if membership.log_id().is_none_or(|id| id.index > committed) {
        return Err("the last change of the members is not committed yet".into());
    }
    let fresh_id = intent.place.map(|place| place.fresh_id);
    let joined = fresh_id.is_some_and(|id| membership.get_node(&id).is_some());
    let votes = fresh_id.is_some_and(|id| membership.voter_ids().any(|voter| voter == id));
    let near = fresh_id.map(|id| behind(core, id)).is_some_and(|(entries, any)| any && entries <= BEHIND_ENTRIES_MAX);
    let asked = match joined || intent.coming().is_none() {
        true => ask_all(shared).await,
        // Nothing is decided before it has joined.
        false => Vec::new(),
    };
    let outlook = outlook(shared, core, &membership, &asked, &intent);
    let kind = kind_of(&intent);
    // A node may have failed since the order: what was no loss then may be one now, and only force allows that.
    let refusal = outlook.refusal(kind, intent.forced);
    let before = before(shared, &membership, &intent).await;
    let keep: BTreeSet<u64> = before.kept.iter().copied().chain(fresh_id).collect();
    let left_over = intent.coming().is_some_and(|name| !learners_of(&membership, name, &keep).is_empty());
    let leaving = intent.leaving();
    let view = View {
        kind,
        learner: intent.stays_learner(),
        changing: intent.changing,
        cancelled: intent.cancelled,
        joint: is_joint(&membership),
        joined,
        left_over,
        at_work: before.at_work.is_some(),
        near: joined && near,
        votes,
        old_is_member: leaving.is_some_and(|name| !ids_of(&membership, name).is_empty()),
        old_leads: leaving == Some(shared.name()),
        safe: refusal.is_none(),
    };
    Ok(Sight { intent, membership, asked, outlook, refusal, before, view })
}

async fn take(shared: &Arc<Shared>, core: &Core, step: Step, sight: Sight, pace: &mut Pace) -> Result<Round, String> {
    let Sight { intent, membership, asked, outlook, refusal, before, view } = sight;
    let job = intent.job;
    let fresh_id = intent.place.map(|place| place.fresh_id);
    let seen = || Precondition::LastMembershipLogId { last_membership_log_id: *membership.log_id() };
    match step {
        Step::AwaitJoin => {
            show_candidate(shared, &intent).await;
            return Ok(Round::Waits(ASK_PAUSE));
        }
        Step::GiveUp => {
            tracing::warn!(
                name = intent.name,
                id = before.at_work,
                "a learner that was to come again is at work as before"
            );
            done(propose(shared, core, MemberCommand::Cancel { job }).await?)?;
        }
        Step::AwaitLog => {
            let entries = fresh_id.map_or(0, |id| behind(core, id).0);
            let eta_s = pace.eta_s(entries);
            let silent = asked.iter().find(|other| Some(other.id) == fresh_id).and_then(|o| o.status.as_ref().err());
            let waits = silent.map(|why| format!("{} does not answer ({why})", intent.name));
            shared.members.show(job, step.word(), |live| {
                (live.entries_behind, live.eta_s, live.waits_for) = (Some(entries), eta_s, waits);
            });
            return Ok(Round::Waits(PAUSE));
        }
        Step::AwaitQuorum => {
            let why = refusal.map(|why| format!("{why}. It goes on when that is well again, or can be cancelled"));
            shared.members.show(job, step.word(), |live| live.waits_for = why);
            return Ok(Round::Waits(ASK_PAUSE));
        }
        Step::Leave => {
            if let Err(why) = leave(shared, core, asked).await {
                shared.members.show(job, step.word(), |live| live.waits_for = Some(why));
                return Ok(Round::Waits(ASK_PAUSE));
            }
        }
        Step::Announce => {
            let leaves = intent.leaving().map_or_else(Vec::new, |name| ids_of(&membership, name));
            match propose(shared, core, MemberCommand::Announce { job, leaves }).await? {
                Ok(_) => {}
                Err(Refusal::RebuildHeld { by, .. }) => {
                    let why = format!("{by} is being rebuilt, and the voters do not change meanwhile");
                    shared.members.show(job, step.word(), |live| live.waits_for = Some(why));
                    return Ok(Round::Waits(ASK_PAUSE));
                }
                Err(refusal) => return Err(format!("{refusal:?}")),
            }
        }
        Step::Withdraw => {
            tracing::warn!(?refusal, near = view.near, "the change of voters is put off");
            done(propose(shared, core, MemberCommand::Withdraw { job }).await?)?;
        }
        Step::Change => {
            // Behind a withdrawal that was proposed and not heard of, this announces anew; it names every id of today.
            let leaves = intent.leaving().map_or_else(Vec::new, |name| ids_of(&membership, name));
            done(propose(shared, core, MemberCommand::Announce { job, leaves }).await?)?;
            change(core, &intent, &membership, seen()).await?;
        }
        // Left behind by a leader that lost its place between the two halves.
        Step::Complete => complete(core, &membership).await?,
        Step::TakeOut => {
            let undoes = intent.cancelled && !intent.changing;
            let keep: BTreeSet<u64> = before.kept.into_iter().chain(fresh_id.filter(|_| !undoes)).collect();
            take_out_learners(core, &intent.name, &keep).await?;
        }
        Step::Finish => {
            let detail = summary(&intent, &outlook);
            tracing::warn!(kind = intent.change.word(), name = intent.name, "members changed: {detail}");
            let (end, ended_unix_ms) = (End::Finished, clock::unix_ms());
            done(propose(shared, core, MemberCommand::End { job, end, detail, ended_unix_ms }).await?)?;
            shared.members.show(job, "finished", |live| (live.entries_behind, live.eta_s) = (None, None));
            tell_removed(shared, &intent);
        }
        Step::Undone => {
            let (end, ended_unix_ms) = (End::Cancelled, clock::unix_ms());
            let detail = undone(&intent, &before);
            done(propose(shared, core, MemberCommand::End { job, end, detail, ended_unix_ms }).await?)?;
            shared.members.show(job, "finished", |live| (live.entries_behind, live.eta_s) = (None, None));
        }
    }
    Ok(Round::Done)
}

fn undone(intent: &Intent, before: &Before) -> String {
    let name = &intent.name;
    match (before.at_work, before.kept.last()) {
        (Some(id), _) => format!("{name} does not come again: it is at work under Raft id {id}, as before"),
        (None, Some(id)) => {
            format!(
                "it was cancelled; {name} stays a learner under Raft id {id}: `stemedb member remove {name}` ends that"
            )
        }
        (None, None) if intent.coming().is_some() => format!("an operator has cancelled it; {name} is no member"),
        (None, None) => "an operator has cancelled it".to_owned(),
    }
}

fn summary(intent: &Intent, outlook: &Outlook) -> String {
    let what = match (intent.coming(), intent.leaving()) {
        (Some(comes), Some(leaves)) => format!("{comes} has taken the place of {leaves}"),
        (Some(comes), None) if intent.stays_learner() => format!("{comes} is a learner"),
        (Some(comes), None) => format!("{comes} votes"),
        (None, leaves) => format!("{} has left", leaves.unwrap_or_default()),
    };
    let (voters, needed) = (outlook.voters_after.len(), outlook.needed_after);
    format!("{what}; of {voters} voters {needed} must work")
}

/// Proposes a command; the inner error is a refusal of the rules.
pub async fn propose(shared: &Shared, core: &Core, command: MemberCommand) -> Result<Result<Intent, Refusal>, String> {
    match propose_op(shared, core, Operation::Members(command)).await? {
        Outcome::Member(intent) => Ok(Ok(*intent)),
        Outcome::Refused(refusal) => Ok(Err(refusal)),
        other => Err(format!("it ended with {other:?}")),
    }
}

fn done(outcome: Result<Intent, Refusal>) -> Result<(), String> {
    outcome.map(drop).map_err(|refusal| format!("{refusal:?}"))
}

async fn change(
    core: &Core,
    intent: &Intent,
    membership: &StoredMembership,
    seen: Precondition<TypeConfig>,
) -> Result<(), String> {
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let mut wanted = voters.clone();
    if let Some(place) = intent.place.filter(|_| !intent.stays_learner()) {
        wanted.insert(place.fresh_id);
    }
    let gone: BTreeSet<u64> =
        intent.leaving().map(|name| ids_of(membership, name)).unwrap_or_default().into_iter().collect();
    wanted.retain(|id| !gone.contains(id));
    if wanted != voters {
        // One joint change: the one comes and the other leaves at once.
        return bounded(core.raft.change_membership_if(wanted, false, [seen])).await.map(drop);
    }
    let learners: BTreeSet<u64> = gone.into_iter().filter(|id| membership.get_node(id).is_some()).collect();
    if !learners.is_empty() {
        let remove = ChangeMembers::RemoveNodes(learners);
        bounded(core.raft.change_membership_if(remove, true, [seen])).await?;
    }
    Ok(())
}

/// Shows how far a node is that has not joined yet, by its own word.
async fn show_candidate(shared: &Shared, intent: &Intent) {
    let said = candidate(shared, &intent.peer_addr).await;
    shared.members.show(intent.job, Step::AwaitJoin.word(), |live| match said {
        Ok(said) => {
            (live.bytes_done, live.bytes_total, live.eta_s) = (said.bytes_done, said.bytes_total, said.eta_s);
            live.waits_for = said.waits_for.map(|why| format!("{} waits: {why}", intent.name));
        }
        Err(why) => live.waits_for = Some(format!("{} does not answer at {} ({why})", intent.name, intent.peer_addr)),
    });
}

/// Gives leadership to the fittest.
pub async fn leave(shared: &Shared, core: &Core, asked: Vec<Asked>) -> Result<(), String> {
    let others = candidates(shared, core, asked);
    let order = failover::choose(shared.name(), &others, None).map_err(|why| why.to_string())?;
    match move_leadership(shared, core, order, Instant::now() + LEAVE_MAX, None).await {
        Some(_) => Ok(()),
        None => Err("leadership has not moved in time".to_owned()),
    }
}

/// Tells the node that was removed to ask about itself. If it does not hear that it finds out by itself.
fn tell_removed(shared: &Arc<Shared>, intent: &Intent) {
    if intent.coming().is_some() || intent.peer_addr.is_empty() {
        return;
    }
    let (told, addr) = (Arc::clone(shared), intent.peer_addr.clone());
    // On a task of its own: it may be dead, and nobody waits for it.
    shared.vital.spawn("the word to a removed node", async move {
        let Ok(body) = pack(&()) else { return };
        let peer = told.peers.probe(&addr);
        if let Err(error) = peer.call(Message::LookAgain.number(), body, LOOK_AGAIN_MAX).await {
            tracing::info!(addr, %error, "a removed node was not reached; it finds out by itself");
        }
        peer.close();
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{config::Config, metrics::Metrics, node::Node};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_voter_that_is_configured_as_a_learner_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.storage.ballast_mb = 0;
        config.node.data_dir = dir.path().to_path_buf();
        config.cluster.peer_listen = Some("127.0.0.1:0".into());
        for role in [MemberRole::Voter, MemberRole::Learner] {
            config.cluster.role = role;
            let node = Node::start(Arc::new(config.clone()), Arc::new(Metrics::new())).await.unwrap();
            let shared = node.shared();
            let votes = |view: &crate::node::core::ClusterView| view.membership.voter_ids().next().is_some();
            shared.view.subscribe().wait_for(votes).await.unwrap();
            let said = votes_unasked(&shared);
            assert_eq!(said.is_some(), role == MemberRole::Learner, "{said:?}");
            assert!(said.is_none_or(|why| why.contains("stemedb member remove node-1")));
            node.shutdown().await;
        }
    }
}
