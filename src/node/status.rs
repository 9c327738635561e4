//! What this node says about itself and about the cluster.

use std::{
    collections::BTreeMap,
    sync::{PoisonError, atomic::Ordering},
    time::Duration,
};

use openraft::{RaftMetrics, ServerState};
use serde::Serialize;
use stemedb_net::Lane;
use stemedb_raft::{
    WalHandle,
    types::{Member, TypeConfig},
};

use super::{
    core::{Core, Role, Shared},
    disk::DiskHealth,
    flows::DrainMark,
    kinds::Kind,
    level,
    messages::{Lag, StatusReply, pack, unpack},
    rebuild::{Need, desk::JobState},
};
use crate::{admin::drain::Mark, clock, state::level::FEATURE_LEVEL};

/// How long a peer may take to tell its status before the report goes out without it.
const STATUS_REPLY_MAX: Duration = Duration::from_millis(500);

/// Version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `/v1/health`.
#[derive(Clone, Debug, Serialize)]
pub struct Health {
    /// `ok`, `starting`, `repairing`, `draining`, `drained`, `stopping`, or why the node answers through others: `stalled`, `failed`,
    /// `rebuilding`, `fenced`; `waiting` to be added, `joining`, or `removed`.
    pub status: String,
    /// Name of the node.
    pub name: String,
    /// `leader`, `follower`, `candidate`, `learner` or `starting`.
    pub role: String,
    /// The term.
    pub term: u64,
    /// Name of the leader, if one is known.
    pub leader: Option<String>,
    /// Sequence number of the last published fact: `index` in the API.
    pub applied_index: u64,
    /// The disk.
    pub disk: DiskHealth,
    /// `none`, `wants`, `draining` or `drained`.
    pub drain: Mark,
    /// What the log waits for while it is being repaired from the other nodes, or what is damaged in the tree while it
    /// is being replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repairing: Option<String>,
    /// For what a node without a place in the cluster waits, or why one has lost it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// Why this node is of no use to clients although it is well, if so: it reaches too few of the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_off: Option<String>,
    /// Version of the program.
    pub version: String,
}

/// `/v1/admin/cluster`.
#[derive(Clone, Debug, Serialize)]
pub struct ClusterReport {
    /// Name of the leader, if one is known.
    pub leader: Option<String>,
    /// The term.
    pub term: u64,
    /// The feature level that the cluster has reached, as far as this node has applied; `None` while it applies nothing.
    pub feature_level: Option<u32>,
    /// Who keeps the cluster below the level that this node's program knows, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub feature_level_held_by: Vec<String>,
    /// Every member, by Raft id.
    pub members: Vec<MemberReport>,
}

/// One member.
#[derive(Clone, Debug, Serialize)]
pub struct MemberReport {
    /// Name.
    pub name: String,
    /// Raft id.
    pub id: u64,
    /// Its own word, or `unreachable`.
    pub role: String,
    /// Whether it votes.
    pub voter: bool,
    /// Entries of the leader's log that it has not acknowledged as durable; `None` when the leader
    /// could not be asked.
    pub lag_entries: Option<u64>,
    /// The same in bytes of the leader's log, as far as they are written and not purged.
    pub lag_bytes: Option<u64>,
    /// Log index of its last applied entry; `None` when it does not answer.
    pub applied_log_index: Option<u64>,
    /// Log index of the last entry in its log.
    pub last_log_index: Option<u64>,
    /// Log index up to which its log was purged; a replica that ends before it needs a checkpoint.
    pub purged_log_index: Option<u64>,
    /// Its disk; when it does not answer what it said last, if it was silenced then, else `None`.
    pub disk: Option<DiskHealth>,
    /// `none`, `wants`, `draining` or `drained`.
    pub drain: Option<Mark>,
    /// 99th percentile of its log's syncs of the last seconds, milliseconds; `None` when there were none.
    pub fsync_p99_ms: Option<u64>,
    /// Version of its program.
    pub version: Option<String>,
    /// `host:port` of its peer listener.
    pub peer_addr: String,
    /// `host:port` of its HTTP listener.
    pub http_addr: String,
}

/// The role of a state of Raft.
pub fn role_of(state: ServerState) -> Role {
    match state {
        ServerState::Learner => Role::Learner,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Leader => Role::Leader,
        ServerState::Shutdown => Role::Starting,
    }
}

/// `/v1/health` of this node.
pub fn health(shared: &Shared) -> Health {
    let view = shared.view.borrow().clone();
    let disk = shared.disk.health();
    let damaged = shared.tree_damage();
    let status = match () {
        () if shared.stop.is_cancelled() => "stopping",
        () if shared.members.removed().is_some() => "removed",
        () if matches!(&*shared.need.borrow(), Some(Need::Place(_))) => "joining",
        // The same node, started over or as a learner already.
        () if shared.desk.current().is_some_and(|job| job.comes) => "joining",
        () if damaged.is_some() && shared.vital.ended().is_none() => "repairing",
        () if shared.desk.current().is_some_and(|job| job.state == JobState::Running) => "rebuilding",
        () if is_stopping(shared) => "stopping",
        () if shared.vital.ended().is_some() => "failed",
        () if disk.state.silences() => disk.state.word(),
        () if shared.silenced().is_some() => "failed",
        () if shared.repairing.borrow().is_some() => "repairing",
        () if shared.awaits_place.borrow().is_some() => "waiting",
        () if shared.core.get().is_none() => "starting",
        () if shared.flows.drain.mark().is_out() => shared.flows.drain.mark().word(),
        () => "ok",
    };
    Health {
        status: status.into(),
        name: shared.name().to_owned(),
        role: view.role.word().to_owned(),
        term: view.term,
        leader: view.leader.map(|l| l.name),
        applied_index: shared.core.get().map_or(0, |core| core.published().fact_index),
        disk,
        drain: shared.flows.drain.mark(),
        repairing: shared
            .repairing
            .borrow()
            .clone()
            .or(damaged.map(|why| format!("the tree is being replaced: {why}"))),
        place: match shared.members.removed() {
            Some(gone) => Some(gone.why.clone()),
            None => shared.awaits_place.borrow().clone(),
        },
        cut_off: shared.way.borrow().cut_off.clone(),
        version: VERSION.into(),
    }
}

/// What this node tells other nodes.
pub fn own_status(shared: &Shared) -> StatusReply {
    let view = shared.view.borrow().clone();
    StatusReply {
        name: shared.name().to_owned(),
        role: match shared.repairing.borrow().is_some() {
            true => "repairing".to_owned(),
            false => view.role.word().to_owned(),
        },
        term: view.term,
        leader: view.leader.map(|l| l.id),
        last_log_index: shared.wal().and_then(WalHandle::last_log_id).map(|id| id.index),
        purged_log_index: shared.wal().and_then(WalHandle::purged).map(|id| id.index),
        applied_log_index: shared.core.get().and_then(|core| core.published().applied_log_index),
        disk: shared.disk.health(),
        version: VERSION.into(),
        may_not_lead: shared.may_not_lead(),
        damaged: shared.tree_damage(),
        fsync_p99_ms: shared.wal().and_then(WalHandle::fsync_p99_ms).map(whole_ms),
        membership: Some((*view.membership).clone()).filter(|m| m.log_id().is_some()),
        replication: shared.core.get().and_then(|core| own_replication(shared, core)),
        drain: DrainMark { mark: shared.flows.drain.mark(), boot: shared.local.load().boot },
        room: shared.space.report().borrow().clone(),
    }
}

/// On a leader: how much each other member lacks.
fn own_replication(shared: &Shared, core: &Core) -> Option<BTreeMap<u64, Lag>> {
    let metrics = core.raft_metrics();
    let end = metrics.last_log_index.map_or(0, |last| last + 1);
    let lag = |matched: &Option<_>| {
        let matched: &Option<stemedb_raft::types::LogId> = matched;
        let missing_from = matched.map_or(0, |id| id.index + 1);
        Lag {
            entries: end.saturating_sub(missing_from),
            bytes: shared.wal().map_or(0, |wal| wal.bytes_from(missing_from)),
        }
    };
    Some(metrics.replication?.iter().map(|(id, matched)| (*id, lag(matched))).collect())
}

/// Rounded; what is not a number is 0.
pub fn whole_ms(ms: f64) -> u64 {
    // Saturates.
    ms.round() as u64
}

/// Asks one node, for half a second at most; the error says why there is no answer.
pub async fn ask_status(shared: &Shared, id: u64, addr: &str) -> Result<StatusReply, String> {
    let body = pack(&()).map_err(|e| e.to_string())?;
    let peer = shared.peers.to(id, addr, Lane::Control);
    let answer = peer.call(Kind::Status.number(), body, STATUS_REPLY_MAX).await.map_err(|e| e.to_string())?;
    let status: StatusReply = unpack(&answer).map_err(|e| e.to_string())?;
    let said = (status.disk.clone(), clock::monotonic_ms());
    shared.last_words.lock().unwrap_or_else(PoisonError::into_inner).insert(id, said);
    Ok(status)
}

/// What is known of the disk of a node that does not answer: one that was about to close its doors has said why.
fn last_words(said: Option<&(DiskHealth, u64)>, now_ms: u64) -> Option<DiskHealth> {
    let (disk, at_ms) = said.filter(|(disk, _)| disk.state.silences())?;
    let (since_s, why) = (now_ms.saturating_sub(*at_ms) / 1_000, disk.reason.as_deref().unwrap_or_default());
    let reason =
        format!("it does not answer any more; {since_s} s ago it said that its disk is {}: {why}", disk.state.word());
    Some(DiskHealth { state: disk.state, reason: Some(reason) })
}

/// `/v1/admin/cluster`: asks every member at once.
pub async fn cluster(shared: &Shared) -> ClusterReport {
    let view = shared.view.borrow().clone();
    let own_id = shared.local.load().node_id;
    let asked = view.membership.nodes().map(|(id, member)| {
        let (id, member) = (*id, member.clone());
        async move {
            let status =
                if id == own_id { Ok(own_status(shared)) } else { ask_status(shared, id, &member.peer_addr).await };
            (id, member, status.ok())
        }
    });
    let feature_level = shared.core.get().map(level::here);
    let knowing = async {
        match feature_level {
            Some(level) if level < FEATURE_LEVEL => {
                let mut held = level::held_by(FEATURE_LEVEL, &level::ask_members(shared, &view.membership).await);
                if let Some(core) = shared.core.get() {
                    // The report goes out without it when the disk takes too long.
                    let coming = tokio::time::timeout(STATUS_REPLY_MAX, level::on_its_way(core)).await;
                    held.extend(coming.ok().and_then(Result::ok).flatten());
                }
                held
            }
            _ => Vec::new(),
        }
    };
    let (answers, feature_level_held_by) = tokio::join!(futures_util::future::join_all(asked), knowing);
    let leader_id = view.leader.as_ref().map(|l| l.id);
    let lags = answers
        .iter()
        .find(|(id, _, _)| Some(*id) == leader_id)
        .and_then(|(_, _, status)| status.as_ref()?.replication.clone());
    let voters: Vec<u64> = view.membership.voter_ids().collect();
    let members = answers
        .into_iter()
        .map(|(id, member, status)| {
            let lag = if Some(id) == leader_id {
                Some(Lag::default())
            } else {
                lags.as_ref().and_then(|l| l.get(&id).copied())
            };
            let mut report = report(id, member, status, voters.contains(&id), lag);
            report.disk = report.disk.or_else(|| {
                let said = shared.last_words.lock().unwrap_or_else(PoisonError::into_inner);
                last_words(said.get(&id), clock::monotonic_ms())
            });
            report
        })
        .collect();
    let (leader, term) = (view.leader.map(|l| l.name), view.term);
    ClusterReport { leader, term, feature_level, feature_level_held_by, members }
}

fn report(id: u64, member: Member, status: Option<StatusReply>, voter: bool, lag: Option<Lag>) -> MemberReport {
    let Member { name, peer_addr, http_addr } = member;
    let known = status.as_ref();
    MemberReport {
        name,
        id,
        role: known.map_or_else(|| "unreachable".to_owned(), |s| s.role.clone()),
        voter,
        lag_entries: lag.map(|lag| lag.entries),
        lag_bytes: lag.map(|lag| lag.bytes),
        applied_log_index: known.and_then(|s| s.applied_log_index),
        last_log_index: known.and_then(|s| s.last_log_index),
        purged_log_index: known.and_then(|s| s.purged_log_index),
        disk: known.map(|s| s.disk.clone()),
        drain: known.map(|s| s.drain.mark),
        fsync_p99_ms: known.and_then(|s| s.fsync_p99_ms),
        version: known.map(|s| s.version.clone()),
        peer_addr,
        http_addr,
    }
}

/// On a leader: milliseconds since a quorum last acknowledged it; `None` on other nodes.
pub fn ms_since_quorum(shared: &Shared, core: &Core) -> Option<u64> {
    if shared.view.borrow().role != Role::Leader {
        return None;
    }
    quorum_age(&core.raft_metrics())
}

fn quorum_age(metrics: &RaftMetrics<TypeConfig>) -> Option<u64> {
    if metrics.state != ServerState::Leader {
        return None;
    }
    let mut voters = metrics.membership_config.voter_ids();
    if (voters.next(), voters.next()) == (Some(metrics.id), None) {
        return Some(0);
    }
    let acked = metrics.last_quorum_acked?;
    let age = openraft::Instant::elapsed(&*acked);
    Some(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

/// `host:port` of the HTTP listeners of the other members, the leader's first; before it whoever passes commands on to it.
pub fn other_http_addrs(shared: &Shared) -> Vec<String> {
    let view = shared.view.borrow();
    let own_id = shared.local.load().node_id;
    let leader_id = view.leader.as_ref().map(|l| l.id);
    // By name too: a node that was rebuilt may find itself there under its old id.
    let is_other = |id: u64, member: &Member| id != own_id && member.name != shared.name();
    let members = view.membership.nodes();
    let mut others: Vec<_> =
        members.filter(|(id, member)| is_other(**id, member) && !member.http_addr.is_empty()).collect();
    let through = shared.way.borrow().through.as_ref().map(|via| via.id);
    others.sort_by_key(|(id, _)| (through.is_some() && through != Some(**id), Some(**id) != leader_id));
    others.into_iter().map(|(_, member)| member.http_addr.clone()).collect()
}

/// Whether this node leads, as far as it can know: a leader that nobody acknowledges any more may have a successor.
pub fn leads(shared: &Shared) -> bool {
    let Some(core) = shared.core.get() else { return false };
    let lost = |ms: u64| ms > shared.config.cluster.election_max_ms;
    shared.view.borrow().role == Role::Leader
        && !shared.way.borrow().is_lost
        && !ms_since_quorum(shared, core).is_some_and(lost)
}

/// Whether this node leads and a quorum has acknowledged it within one lease.
pub fn leads_with_quorum(shared: &Shared) -> bool {
    let Some(core) = shared.core.get() else { return false };
    shared.silenced().is_none()
        && shared.vital.ended().is_none()
        && ms_since_quorum(shared, core).is_some_and(|ms| ms <= shared.config.cluster.election_max_ms)
}

/// Entries that the leader has committed and this node has not applied; `None` while it has not heard
/// from a leader for longer than two leases.
pub fn replica_lag(shared: &Shared) -> Option<u64> {
    let core = shared.core.get()?;
    let metrics = core.raft_metrics();
    let applied_end = core.published().applied_log_index.map_or(0, |index| index + 1);
    let committed_end = metrics.cluster_committed.map_or(0, |id| id.index + 1);
    let lag = committed_end.saturating_sub(applied_end);
    if ms_since_quorum(shared, core).is_some() {
        return Some(lag);
    }
    let freshness = *shared.freshness.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let silence_ms = freshness.silence_ms(clock::monotonic_ms())?;
    (silence_ms <= shared.config.cluster.election_max_ms.saturating_mul(2)).then_some(lag)
}

fn is_stopping(shared: &Shared) -> bool {
    shared.stop.is_cancelled() || shared.leaving.load(Ordering::Relaxed)
}

/// Whether a load balancer may send requests here; the error says why not.
pub fn ready(shared: &Shared) -> Result<(), String> {
    if let Some(why) = shared.vital.ended() {
        return Err(why);
    }
    if let Some(gone) = shared.members.removed() {
        return Err(gone.why.clone());
    }
    if let Some(why) = shared.silenced() {
        return Err(match shared.disk.state() {
            state if state.silences() => format!("the disk is {}: {why}", state.word()),
            _ => format!("this node answers through others: {why}"),
        });
    }
    if is_stopping(shared) {
        return Err("this node is stopping".into());
    }
    let mark = shared.flows.drain.mark();
    if mark.is_out() {
        return Err(format!("this node is {}", mark.word()));
    }
    if let Some(waits_for) = shared.repairing.borrow().as_ref() {
        return Err(format!("the log is being repaired: {waits_for}"));
    }
    if shared.core.get().is_none() {
        return Err(match &*shared.awaits_place.borrow() {
            Some(waits_for) => format!("this node has no place in a cluster yet, waiting: {waits_for}"),
            None => "this node is waiting for its cluster to be formed".into(),
        });
    }
    if let Some(why) = &shared.way.borrow().cut_off {
        return Err(format!("this node is cut off: {why}"));
    }
    if !*shared.caught_up.borrow() {
        return Err("this node has not caught up with what was committed when it started".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::disk::DiskState;

    #[test]
    fn a_node_that_closed_its_doors_is_shown_with_its_last_words_and_a_dead_one_without() {
        let said = |state| (DiskHealth { state, reason: Some("sync segment.001.wal hangs".into()) }, 1_000);
        let shown = last_words(Some(&said(DiskState::Stalled)), 63_500);
        let reason = shown.as_ref().and_then(|disk| disk.reason.clone()).unwrap_or_default();
        assert!(shown.is_some_and(|disk| disk.state == DiskState::Stalled), "{reason}");
        assert!(reason.contains("62 s ago") && reason.contains("sync segment.001.wal hangs"), "{reason}");
        assert_eq!(last_words(Some(&said(DiskState::Slow)), 2_000), None);
        assert_eq!(last_words(None, 2_000), None);
    }
}
