//! Keeps the node's view of the cluster, and notices when Raft ends.
//!
//! While Raft runs, its own metrics say who leads. When it has ended with an error of the disk, this
//! node is a proxy: it stops acknowledging, says so, and asks the others who leads, so that commands
//! taken here still reach a leader.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use openraft::{async_runtime::WatchReceiver, errors::Fatal, metrics::RaftServerMetrics};
use stemedb_raft::types::{StoredMembership, TypeConfig};

use super::{
    core::{ClusterView, LeaderInfo, Role, Shared},
    disk::DiskHealth,
    messages::StatusReply,
    status,
};

/// How often a node without Raft asks the others who leads. Well below the park's deadline, and a few
/// small messages each time.
const ASK_INTERVAL: Duration = Duration::from_millis(100);

/// Runs until the node stops.
pub async fn watch_cluster(shared: Arc<Shared>) {
    let Some(core) = shared.core.get() else { return };
    let mut metrics = core.raft.server_metrics();
    loop {
        let view = view_of(&shared, &metrics.borrow_watched());
        set_view(&shared, view);
        tokio::select! {
            () = shared.stop.cancelled() => return,
            changed = metrics.changed() => if changed.is_err() { break },
        }
    }
    if shared.stop.is_cancelled() {
        return;
    }
    if let Some(why) = shared.retired.get() {
        tracing::info!("Raft has ended on this node, which goes on as a proxy: {why}");
        go_on_as_proxy(&shared).await;
        return;
    }
    let why = match (core.raft_metrics().running_state, shared.silenced()) {
        (_, Some(why)) => why,
        (Err(Fatal::StorageError(error)), None) => error.to_string(),
        // A panic leaves the last metrics as they were.
        (Ok(()) | Err(Fatal::Panicked | Fatal::Stopped), None) => {
            shared.vital.end("Raft has died of a defect; the lines before say where".into());
            return;
        }
    };
    tracing::error!("storage error: Raft has ended on this node, which acknowledges nothing from now on: {why}");
    shared.disk.send_replace(DiskHealth::failed(why));
    go_on_as_proxy(&shared).await;
}

/// Marks the disk as failed the moment the log or the tree latches, and ends Raft, which hears only of
/// what it waits for. A log that latches while it marks what is durable, or a tree that latches in a
/// flush, would leave a leader that may propose nothing and whose heartbeats keep the others from
/// electing one: the cluster would have no leader for as long as this process lives.
pub async fn watch_disk(shared: Arc<Shared>) {
    let (Some(wal), Some(core)) = (shared.wal(), shared.core.get()) else { return };
    let mut latched = wal.watch_latched();
    let log_failed = async {
        let why = latched.wait_for(Option::is_some).await.map(|why| why.as_ref().map(ToString::to_string));
        match why {
            Ok(why) => why.unwrap_or_default(),
            // The log ends with its core, and so does this wait.
            Err(_) => std::future::pending().await,
        }
    };
    let ending = async {
        let why = tokio::select! {
            why = log_failed => why,
            error = core.state.wait_failed() => error.to_string(),
        };
        tracing::error!("storage error, nothing is acknowledged from now on: {why}");
        shared.disk.send_replace(DiskHealth::failed(why));
        if let Err(error) = core.raft.shutdown().await {
            tracing::warn!(%error, "the Raft task did not end well");
        }
    };
    shared.core_stop.run_until_cancelled(ending).await;
}

fn set_view(shared: &Shared, view: ClusterView) {
    shared.view.send_if_modified(|old| {
        if *old == view {
            return false;
        }
        if old.leader != view.leader {
            match &view.leader {
                Some(leader) => tracing::info!(leader = leader.name, term = view.term, "leader known"),
                None => tracing::info!(term = view.term, "no leader known"),
            }
        }
        *old = view;
        true
    });
}

fn view_of(shared: &Shared, metrics: &RaftServerMetrics<TypeConfig>) -> ClusterView {
    let own_id = metrics.id;
    let role = status::role_of(metrics.state);
    // A node that names itself without leading is on its way into or out of leadership.
    let leader = metrics.current_leader.filter(|id| *id != own_id || role == Role::Leader);
    ClusterView {
        leader: leader.and_then(|id| leader_info(&metrics.membership_config, id, own_id)),
        term: metrics.vote.leader_id.term,
        role,
        membership: shared_membership(shared, &metrics.membership_config),
    }
}

/// The `Arc` of the last view when nothing changed: views are compared with every change in Raft.
fn shared_membership(shared: &Shared, new: &Arc<StoredMembership>) -> Arc<StoredMembership> {
    let old = Arc::clone(&shared.view.borrow().membership);
    if old.log_id() == new.log_id() { old } else { Arc::clone(new) }
}

fn leader_info(membership: &StoredMembership, id: u64, own_id: u64) -> Option<LeaderInfo> {
    let member = membership.get_node(&id)?;
    Some(LeaderInfo { id, name: member.name.clone(), addr: member.peer_addr.clone(), here: id == own_id })
}

async fn go_on_as_proxy(shared: &Shared) {
    let membership = Arc::clone(&shared.view.borrow().membership);
    let own_id = shared.local.load().node_id;
    let others: Vec<(u64, String)> = membership
        .nodes()
        .filter(|(id, _)| **id != own_id)
        .map(|(id, member)| (*id, member.peer_addr.clone()))
        .collect();
    while !shared.stop.is_cancelled() {
        let asked = others.iter().map(|(id, addr)| async { (*id, status::ask_status(shared, *id, addr).await.ok()) });
        let answers = join_all(asked).await;
        let (leader, term) = newest_leader(&answers);
        let leader = leader.and_then(|id| leader_info(&membership, id, own_id)).filter(|l| !l.here);
        set_view(shared, ClusterView { leader, term, role: Role::Starting, membership: Arc::clone(&membership) });
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(ASK_INTERVAL) => {}
        }
    }
}

/// The node that says itself that it leads in the newest term, and that term.
fn newest_leader(answers: &[(u64, Option<StatusReply>)]) -> (Option<u64>, u64) {
    let leading = answers.iter().filter_map(|(id, status)| {
        let status = status.as_ref()?;
        (status.role == Role::Leader.word()).then_some((status.term, *id))
    });
    match leading.max() {
        Some((term, id)) => (Some(id), term),
        None => (None, answers.iter().filter_map(|(_, s)| Some(s.as_ref()?.term)).max().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(id: u64, role: Role, term: u64) -> (u64, Option<StatusReply>) {
        let status = StatusReply {
            name: format!("node-{id}"),
            role: role.word().into(),
            term,
            leader: None,
            last_log_index: None,
            purged_log_index: None,
            applied_log_index: None,
            disk: DiskHealth::default(),
            version: "0".into(),
            replication: None,
            room: Default::default(),
        };
        (id, Some(status))
    }

    #[test]
    fn a_proxy_believes_the_leader_of_the_newest_term() {
        assert_eq!(newest_leader(&[says(1, Role::Leader, 4), says(2, Role::Leader, 5), (3, None)]), (Some(2), 5));
        assert_eq!(newest_leader(&[says(1, Role::Follower, 4), says(2, Role::Candidate, 5)]), (None, 5));
        assert_eq!(newest_leader(&[(1, None)]), (None, 0));
    }
}
