//! Keeps the node's view of the cluster, and decides whose word it follows.
//!
//! ```text
//!   Raft's own metrics ── the disk fails or stalls, or the core ends ──► what the others say (`proxy`)
//!         ▲                                                                  │ and leadership is given away (`handover`)
//!         └──────────── a stall is over, and Raft has caught up ────────────┘
//! ```
//!
//! A core whose disk hangs goes on naming itself the leader, so its word does not count before it knows the newest term
//! that the others have named. Nor does that of a core which is no member yet, before its leader has spoken to it.

use std::{sync::Arc, time::Duration};

use openraft::{RaftMetrics, async_runtime::WatchReceiver, errors::Fatal, metrics::RaftServerMetrics};
use stemedb_raft::types::{StoredMembership, TypeConfig};

use super::{
    core::{ClusterView, Core, LeaderInfo, Role, Shared},
    disk::DiskState,
    handover, proxy, status,
};

/// How long a core whose log has failed may take to notice, before it is told to end. It notices with the next entry,
/// which takes a few milliseconds under load; an idle one would not notice.
const NOTICE_MAX: Duration = Duration::from_millis(20);
/// How long it may take to end then. A core that hangs on its disk does not end at all.
const END_MAX: Duration = Duration::from_secs(1);

/// Why Raft's word is not followed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// The incarnation ends.
    Stopping,
    /// The node must be silent, whatever its core does.
    Silenced,
    /// The core has ended.
    CoreEnded,
}

/// Runs until the incarnation stops. `is_outsider`: the membership that the state began with lacks this node.
pub async fn watch_cluster(shared: Arc<Shared>, is_outsider: bool) {
    let Some(core) = shared.core.get() else { return };
    if is_outsider {
        proxy::follow_others(&shared, |_| knows_more(&shared, core)).await;
    }
    loop {
        match follow_raft(&shared, core).await {
            Left::Stopping => return,
            Left::Silenced => match (shared.retired.get(), shared.silenced().unwrap_or_default()) {
                (Some(why), _) => tracing::info!("this node answers through the others: {why}"),
                (None, why) => {
                    let state = shared.disk.state().word();
                    tracing::error!(state, "the disk does not work, nothing is acknowledged from now on: {why}");
                }
            },
            Left::CoreEnded => {
                if !explain_end(&shared, core) {
                    return;
                }
            }
        }
        let failed = async {
            if shared.disk.state() == DiskState::Stalled && core.raft_metrics().running_state.is_ok() {
                handover::pass_on(&shared, core, "its disk stalls").await;
            } else if let Some(last) = ended(core).await {
                handover::bequeath(&shared, &last).await;
            }
        };
        tokio::join!(failed, proxy::follow_others(&shared, |term| counts_again(&shared, core, term)));
        if shared.stop.is_cancelled() {
            return;
        }
        tracing::info!("the disk works again, and so does this node");
    }
}

/// Marks the disk as failed the moment the log, the tree or the memory of the others' boots latches, and ends Raft, which hears only of
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
    let failed = async {
        tokio::select! {
            why = log_failed => why,
            error = core.state.wait_failed() => error.to_string(),
            why = shared.boots.wait_failed() => why,
        }
    };
    if let Some(why) = shared.core_stop.run_until_cancelled(failed).await {
        shared.disk.set(DiskState::Failed, why);
    }
}

/// Makes `view` the node's view, and says so when the leader changed.
pub fn set_view(shared: &Shared, view: ClusterView) {
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

async fn follow_raft(shared: &Shared, core: &Core) -> Left {
    let mut metrics = core.raft.server_metrics();
    loop {
        if shared.silenced().is_some() {
            return Left::Silenced;
        }
        let view = view_of(shared, &metrics.borrow_watched());
        set_view(shared, view);
        tokio::select! {
            biased;
            () = shared.stop.cancelled() => return Left::Stopping,
            () = shared.disk.silences() => return Left::Silenced,
            changed = metrics.changed() => if changed.is_err() {
                return if shared.stop.is_cancelled() { Left::Stopping } else { Left::CoreEnded };
            },
        }
    }
}

/// Says why the core has ended. False when that was a defect, which ends the node.
fn explain_end(shared: &Shared, core: &Core) -> bool {
    if let Some(why) = shared.retired.get() {
        tracing::info!("Raft has ended on this node, which goes on as a proxy: {why}");
        return true;
    }
    let why = match (core.raft_metrics().running_state, shared.silenced()) {
        (_, Some(why)) => why,
        (Err(Fatal::StorageError(error)), None) => error.to_string(),
        // A panic leaves the last metrics as they were.
        (Ok(()) | Err(Fatal::Panicked | Fatal::Stopped), None) => {
            shared.vital.end("Raft has died of a defect; the lines before say where".into());
            return false;
        }
    };
    tracing::error!("storage error: Raft has ended on this node: {why}");
    shared.disk.set(DiskState::Failed, why);
    true
}

/// The last metrics of a core that has ended, or that has to and then does. `None` when it hangs.
async fn ended(core: &Core) -> Option<RaftMetrics<TypeConfig>> {
    let ended_within = |limit| {
        let mut metrics = core.raft.metrics();
        async move {
            let ended = async {
                while metrics.borrow_watched().running_state.is_ok() {
                    if metrics.changed().await.is_err() {
                        break;
                    }
                }
                metrics.borrow_watched().clone()
            };
            tokio::time::timeout(limit, ended).await.ok().filter(|last| last.running_state.is_err())
        }
    };
    if let Some(last) = ended_within(NOTICE_MAX).await {
        return Some(last);
    }
    let raft = core.raft.clone();
    // Not waited for: it ends with the core, and a core may hang.
    tokio::spawn(async move {
        if let Err(error) = raft.shutdown().await {
            tracing::warn!(%error, "the Raft task did not end well");
        }
    });
    ended_within(END_MAX).await
}

/// Whether Raft's word counts again after a stall: the node need not be silent, and the core has caught up with what
/// the others have told meanwhile.
fn counts_again(shared: &Shared, core: &Core, term_newest: u64) -> bool {
    if shared.silenced().is_some() {
        return false;
    }
    let metrics = core.raft_metrics();
    metrics.running_state.is_ok() && metrics.vote.leader_id.term >= term_newest
}

/// Whether the core of a node that began as no member has heard from a leader, or never will.
fn knows_more(shared: &Shared, core: &Core) -> bool {
    let metrics = core.raft_metrics();
    shared.silenced().is_some() || metrics.running_state.is_err() || metrics.current_leader.is_some()
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
