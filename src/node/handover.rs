//! Gives leadership away: before a planned stop, when the disk stalls, and after it has failed.
//!
//! While the core lives it does so itself ([`hand_over`], [`pass_on`]). A transfer has no end of its own: the old leader
//! refuses writes until a new one appears. So each candidate gets a short time, then the next one is asked; after the
//! last an election decides. A core that has ended cannot do it any more, and there [`bequeath`] sends the request of a
//! dead leader to all voters, which give its lease up and let the heir stand at once: some 20 ms instead of an election
//! that has to wait for the lease. Never with a living core, which would not know that it leads no more.
//!
//! Commands that meet the gap wait in the park.

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use futures_util::future::join_all;
use openraft::{
    RaftMetrics,
    raft::{TransferLeaderError, TransferLeaderRequest, TransferLeaderResponse},
};
use stemedb_net::Lane;
use stemedb_raft::types::{LogId, TypeConfig};
use tokio::{sync::watch, time::Instant};

use super::{
    core::{ClusterView, Core, Role, Shared},
    disk::DiskState,
    kinds::Kind,
    messages::{LogEndReply, StatusReply, pack, unpack},
    space::Level,
    status,
};

/// How long all of it may take before a planned stop. A transfer takes about 20 ms; past this an election is as good.
const HAND_OVER_MAX: Duration = Duration::from_secs(3);
/// How long a voter may take to say where its log ends. The gap in writes grows by this when one of them is gone too.
const LOG_END_MAX: Duration = Duration::from_millis(50);
/// How long the others may take to give up the lease before the heir is named. It needs the vote of one of them, and a
/// vote that is refused because of the lease costs an election.
const TOLD_MAX: Duration = Duration::from_millis(50);

/// Hands over before a planned stop, if this node leads, and takes no leadership from then on. Returns once another
/// leader is known here, or the time is over.
pub async fn hand_over(shared: &Shared) {
    shared.leaving.store(true, Ordering::Relaxed);
    let Some(core) = shared.core.get() else { return };
    core.raft.runtime_config().elect(false);
    if leads_others(&shared.view.borrow()) {
        transfer(shared, core, Instant::now() + HAND_OVER_MAX, |_| true).await;
    }
}

/// Has the living core of a node hand over, if it leads by its own word. The view follows the others meanwhile.
pub async fn pass_on(shared: &Shared, core: &Core, why: &str) {
    if !leads(core) || core.raft_metrics().membership_config.voter_ids().nth(1).is_none() {
        return;
    }
    tracing::warn!("giving leadership away: {why}");
    transfer(shared, core, Instant::now() + HAND_OVER_MAX, |_| true).await;
}

/// As `pass_on`, to this one or nobody.
pub async fn pass_on_to(shared: &Shared, core: &Core, id: u64, why: &str) {
    tracing::warn!("giving leadership away: {why}");
    transfer(shared, core, Instant::now() + HAND_OVER_MAX, |candidate| candidate == id).await;
}

async fn transfer(shared: &Shared, core: &Core, deadline: Instant, is_wanted: impl Fn(u64) -> bool) {
    let began = Instant::now();
    let Some(_alone) = shared.flows.move_alone(deadline).await else {
        return tracing::warn!("a transfer of leadership that was begun before has not ended");
    };
    let mut view = shared.view.subscribe();
    if !leads(core) {
        // By the transfer before: who asked for this one wants to know the new leader.
        wait_for(&mut view, deadline, leads_elsewhere).await;
        return;
    }
    for (id, name) in candidates(shared, core, is_well).await.into_iter().filter(|(id, _)| is_wanted(*id)) {
        if core.raft.trigger().transfer_leader(id).await.is_err() {
            return;
        }
        if wait_for(&mut view, deadline.min(Instant::now() + election_max(shared)), |v| v.role != Role::Leader).await
            && wait_for(&mut view, deadline.min(Instant::now() + election_max(shared)), leads_elsewhere).await
        {
            return say_done(shared, &name, began);
        }
        tracing::warn!(asked = name, "leadership was not taken over in time");
    }
    tracing::warn!("no node took over leadership; an election will decide");
}

/// Gives leadership to a voter that has room, while this node has none and goes on otherwise. True once another
/// node leads. A transfer that was begun and not taken up ends with an election, as when a leader is lost.
pub async fn hand_over_for_room(shared: &Shared, core: &Core) -> bool {
    let began = Instant::now();
    let deadline = began + HAND_OVER_MAX;
    let Some(_alone) = shared.flows.move_alone(deadline).await.filter(|_| leads(core)) else { return false };
    let mut view = shared.view.subscribe();
    for (id, name) in candidates(shared, core, has_room).await {
        let each = election_max(shared);
        if core.raft.trigger().transfer_leader(id).await.is_err() {
            return false;
        }
        if wait_for(&mut view, deadline.min(Instant::now() + each), |v| v.role != Role::Leader).await {
            wait_for(&mut view, deadline, |v| v.leader.as_ref().is_some_and(|l| !l.here)).await;
            let leader = view.borrow().leader.as_ref().map(|l| l.name.clone());
            tracing::info!(asked = name, ?leader, took = ?began.elapsed(), "leadership handed over for want of room");
            return true;
        }
        tracing::warn!(asked = name, "leadership was not taken over in time");
    }
    false
}

/// After the core has ended, from its last metrics: if it led, names the voter with the longest log to all others.
pub async fn bequeath(shared: &Shared, last: &RaftMetrics<TypeConfig>) {
    if last.current_leader != Some(last.id) {
        return;
    }
    let began = Instant::now();
    let mut view = shared.view.subscribe();
    for heir in heirs(shared, last).await {
        tracing::info!(heir = heir.name, end = ?heir.end, "naming the next leader");
        let request = TransferLeaderRequest::new(last.vote, heir.id, heir.matched);
        match name_heir(shared, last, &request).await {
            Ok(()) => {
                if wait_for(&mut view, Instant::now() + election_max(shared), leads_elsewhere).await {
                    return say_done(shared, &heir.name, began);
                }
                tracing::warn!(asked = heir.name, "leadership was not taken over in time");
            }
            // Somebody knows a newer term: an election is under way or over.
            Err(Refused::Newer(why)) => {
                return tracing::info!(asked = heir.name, why, "leadership has moved on by itself");
            }
            Err(Refused::Other(why)) => tracing::warn!(asked = heir.name, why, "leadership was not taken over"),
        }
    }
    tracing::warn!("no node was found to take over leadership; an election will decide");
}

fn say_done(shared: &Shared, asked: &str, began: Instant) {
    let leader = shared.view.borrow().leader.as_ref().map(|l| l.name.clone());
    tracing::info!(asked, ?leader, took = ?began.elapsed(), "leadership handed over");
}

fn election_max(shared: &Shared) -> Duration {
    Duration::from_millis(shared.config.cluster.election_max_ms.saturating_mul(2))
}

/// Whether the core leads by its own word.
fn leads(core: &Core) -> bool {
    let metrics = core.raft_metrics();
    metrics.current_leader == Some(metrics.id)
}

fn leads_others(view: &ClusterView) -> bool {
    view.role == Role::Leader && view.membership.voter_ids().nth(1).is_some()
}

fn leads_elsewhere(view: &ClusterView) -> bool {
    view.leader.as_ref().is_some_and(|leader| !leader.here)
}

async fn wait_for(
    view: &mut watch::Receiver<ClusterView>,
    until: Instant,
    condition: impl FnMut(&ClusterView) -> bool,
) -> bool {
    matches!(tokio::time::timeout_at(until, view.wait_for(condition)).await, Ok(Ok(_)))
}

/// A voter that may inherit leadership.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Heir {
    id: u64,
    name: String,
    /// What the dead leader knows to be durable there.
    matched: Option<LogId>,
    /// Where its log ends by its own word.
    end: Option<LogId>,
}

/// The other voters that can be reached and would lead, the one with the longest log first: the others vote for no
/// shorter one.
async fn heirs(shared: &Shared, last: &RaftMetrics<TypeConfig>) -> Vec<Heir> {
    let matched = last.replication.clone().unwrap_or_default();
    let asked = voters(last).into_iter().map(|(id, name, addr)| {
        let matched = matched.get(&id).copied().flatten();
        async move {
            match ask_log_end(shared, id, &addr).await {
                Ok(LogEndReply { last_log_id, may_not_lead: None }) => {
                    Some(Heir { id, name, matched, end: last_log_id })
                }
                Ok(LogEndReply { may_not_lead: Some(why), .. }) => {
                    tracing::info!(name, why, "a voter does not take leadership over");
                    None
                }
                Err(why) => {
                    tracing::info!(name, why, "a voter cannot be asked to take leadership over");
                    // After the others: it may be busy and no more than that.
                    Some(Heir { id, name, matched, end: None })
                }
            }
        }
    });
    longest_first(join_all(asked).await.into_iter().flatten().collect())
}

fn longest_first(mut heirs: Vec<Heir>) -> Vec<Heir> {
    heirs.sort_by_key(|heir| std::cmp::Reverse((heir.end, heir.matched)));
    heirs
}

/// Id, name and peer address of the other voters.
pub fn voters(last: &RaftMetrics<TypeConfig>) -> Vec<(u64, String, String)> {
    let membership = &last.membership_config;
    let others = membership.voter_ids().filter(|id| *id != last.id);
    let known = others.filter_map(|id| Some((id, membership.get_node(&id)?)));
    known.map(|(id, member)| (id, member.name.clone(), member.peer_addr.clone())).collect()
}

async fn ask_log_end(shared: &Shared, id: u64, addr: &str) -> Result<LogEndReply, String> {
    let body = pack(&()).map_err(|e| e.to_string())?;
    // On the lane of the appends, behind all that this node has sent as a leader.
    let peer = shared.peers.to(id, addr, Lane::Log);
    let answer = peer.call(Kind::LogEnd.number(), body, LOG_END_MAX).await.map_err(|e| e.to_string())?;
    unpack(&answer).map_err(|e| e.to_string())
}

/// Why an heir did not take over.
enum Refused {
    /// It knows a newer vote than the dead leader's.
    Newer(String),
    Other(String),
}

/// Tells the other voters, which then give up the dead leader's lease, and then the heir, whose answer counts.
async fn name_heir(
    shared: &Shared,
    last: &RaftMetrics<TypeConfig>,
    request: &TransferLeaderRequest<TypeConfig>,
) -> Result<(), Refused> {
    let heir = *request.to_node_id();
    let limit = Duration::from_millis(shared.config.cluster.election_min_ms);
    let body = pack(request).map_err(|e| Refused::Other(e.to_string()))?;
    let (heirs, others): (Vec<_>, Vec<_>) = voters(last).into_iter().partition(|(id, _, _)| *id == heir);
    let (_, _, addr) = heirs.into_iter().next().ok_or_else(|| Refused::Other("it is no voter".into()))?;
    let told = others.into_iter().map(|(id, name, addr)| {
        let body = body.clone();
        async move {
            let peer = shared.peers.to(id, &addr, Lane::Control);
            if let Err(error) = peer.call(Kind::TransferLeader.number(), body, TOLD_MAX).await {
                tracing::info!(name, %error, "a voter did not hear that leadership is to move");
            }
        }
    });
    join_all(told).await;
    let peer = shared.peers.to(heir, &addr, Lane::Control);
    let answer = peer.call(Kind::TransferLeader.number(), body, limit).await;
    let answer = answer.map_err(|e| Refused::Other(e.to_string()))?;
    let response: TransferLeaderResponse<TypeConfig> = unpack(&answer).map_err(|e| Refused::Other(e.to_string()))?;
    response.map_err(|error| match error {
        TransferLeaderError::VoteChanged { .. } => Refused::Newer(error.to_string()),
        TransferLeaderError::LogNotFlushed { .. } => Refused::Other(error.to_string()),
    })
}

/// Who may take over from a living core, with names, the best first.
async fn candidates(shared: &Shared, core: &Core, may_lead: fn(&StatusReply) -> bool) -> Vec<(u64, String)> {
    let metrics = core.raft_metrics();
    let asked = voters(&metrics)
        .into_iter()
        .map(|(id, name, addr)| async move { (id, (name, status::ask_status(shared, id, &addr).await.ok())) });
    let answers: BTreeMap<u64, (String, Option<StatusReply>)> = join_all(asked).await.into_iter().collect();
    let well = answers.iter().filter(|(_, (_, status))| status.as_ref().is_some_and(may_lead)).map(|(id, _)| *id);
    in_order(well.collect(), &metrics.replication.unwrap_or_default())
        .into_iter()
        .filter_map(|id| Some((id, answers.get(&id)?.0.clone())))
        .collect()
}

/// Whether a node would take leadership over.
pub fn is_well(status: &StatusReply) -> bool {
    status.role == Role::Follower.word() && status.may_not_lead.is_none()
}

fn has_room(status: &StatusReply) -> bool {
    is_well(status) && status.disk.state < DiskState::Full && status.room.level == Level::Room
}

/// The one with the longest log first.
fn in_order(mut ids: Vec<u64>, matched: &BTreeMap<u64, Option<LogId>>) -> Vec<u64> {
    ids.sort_by_key(|id| std::cmp::Reverse(matched.get(id).copied().flatten()));
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(index: u64) -> Option<LogId> {
        Some(openraft::testing::log_id::<TypeConfig>(1, 1, index))
    }

    #[test]
    fn the_longest_log_comes_first_and_none_last() {
        let matched = BTreeMap::from([(2, id(4)), (3, id(9)), (4, None)]);
        assert_eq!(in_order(vec![2, 3, 4, 5], &matched), [3, 2, 4, 5]);
    }

    #[test]
    fn an_heirs_own_word_counts_more_than_what_the_dead_leader_knew() {
        let heir = |id_, matched, end| Heir { id: id_, name: String::new(), matched, end };
        // 2 has acknowledged more, and 3 had received more when it was asked.
        let order = longest_first(vec![heir(2, id(9), id(9)), heir(3, id(4), id(11)), heir(4, id(12), None)]);
        assert_eq!(order.iter().map(|h| h.id).collect::<Vec<_>>(), [3, 2, 4]);
    }
}
