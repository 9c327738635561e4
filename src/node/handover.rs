//! Gives leadership away before this node stops, so that a planned stop costs no election.
//!
//! A transfer has no end of its own: the old leader refuses writes until a new one appears. So each
//! candidate gets a short time, then the next one is asked; after the last an election decides, which
//! the end of this process brings about anyway. From the first step on this node stands for no
//! election and takes no leadership from others. Commands that meet the gap wait in the park.

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use futures_util::future::join_all;
use stemedb_raft::types::LogId;
use tokio::{sync::watch, time::Instant};

use super::{
    core::{ClusterView, Core, Role, Shared},
    disk::DiskState,
    messages::StatusReply,
    space::Level,
    status,
};

/// How long all of it may take. A transfer takes about 20 ms; past this an election is as good.
const HAND_OVER_MAX: Duration = Duration::from_secs(3);

/// Hands over if this node leads. Returns once another leader is known here, or the time is over.
pub async fn hand_over(shared: &Shared) {
    shared.leaving.store(true, Ordering::Relaxed);
    let Some(core) = shared.core.get() else { return };
    core.raft.runtime_config().elect(false);
    if !leads_others(&shared.view.borrow()) {
        return;
    }
    let began = Instant::now();
    let deadline = began + HAND_OVER_MAX;
    let mut view = shared.view.subscribe();
    for (id, name) in candidates(shared, core, is_well).await {
        let each = Duration::from_millis(shared.config.cluster.election_max_ms.saturating_mul(2));
        if core.raft.trigger().transfer_leader(id).await.is_err() {
            return;
        }
        if wait_for(&mut view, deadline.min(Instant::now() + each), |v| v.role != Role::Leader).await {
            wait_for(&mut view, deadline, |v| v.leader.as_ref().is_some_and(|l| !l.here)).await;
            let leader = view.borrow().leader.as_ref().map(|l| l.name.clone());
            tracing::info!(asked = name, ?leader, took = ?began.elapsed(), "leadership handed over");
            return;
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
    let mut view = shared.view.subscribe();
    for (id, name) in candidates(shared, core, has_room).await {
        let each = Duration::from_millis(shared.config.cluster.election_max_ms.saturating_mul(2));
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

fn leads_others(view: &ClusterView) -> bool {
    view.role == Role::Leader && view.membership.voter_ids().nth(1).is_some()
}

async fn wait_for(
    view: &mut watch::Receiver<ClusterView>,
    until: Instant,
    condition: impl FnMut(&ClusterView) -> bool,
) -> bool {
    matches!(tokio::time::timeout_at(until, view.wait_for(condition)).await, Ok(Ok(_)))
}

/// Who may take over, with names, the best first.
async fn candidates(shared: &Shared, core: &Core, may_lead: fn(&StatusReply) -> bool) -> Vec<(u64, String)> {
    let metrics = core.raft_metrics();
    let membership = &metrics.membership_config;
    let own_id = shared.local.load().node_id;
    let voters: Vec<u64> = membership.voter_ids().filter(|id| *id != own_id).collect();
    let asked = voters.iter().filter_map(|id| Some((*id, membership.get_node(id)?))).map(|(id, member)| async move {
        (id, (member.name.clone(), status::ask_status(shared, id, &member.peer_addr).await.ok()))
    });
    let answers: BTreeMap<u64, (String, Option<StatusReply>)> = join_all(asked).await.into_iter().collect();
    let well = answers.iter().filter(|(_, (_, status))| status.as_ref().is_some_and(may_lead)).map(|(id, _)| *id);
    in_order(well.collect(), &metrics.replication.unwrap_or_default())
        .into_iter()
        .filter_map(|id| Some((id, answers.get(&id)?.0.clone())))
        .collect()
}

fn is_well(status: &StatusReply) -> bool {
    status.role == Role::Follower.word() && matches!(status.disk.state, DiskState::Ok | DiskState::Full)
}

fn has_room(status: &StatusReply) -> bool {
    is_well(status) && status.disk.state == DiskState::Ok && status.room.level == Level::Room
}

/// The one with the longest log first.
fn in_order(mut ids: Vec<u64>, matched: &BTreeMap<u64, Option<LogId>>) -> Vec<u64> {
    ids.sort_by_key(|id| std::cmp::Reverse(matched.get(id).copied().flatten()));
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use stemedb_raft::types::TypeConfig;

    #[test]
    fn the_longest_log_comes_first_and_none_last() {
        let id = |index| Some(openraft::testing::log_id::<TypeConfig>(1, 1, index));
        let matched = BTreeMap::from([(2, id(4)), (3, id(9)), (4, None)]);
        assert_eq!(in_order(vec![2, 3, 4, 5], &matched), [3, 2, 4, 5]);
    }
}
