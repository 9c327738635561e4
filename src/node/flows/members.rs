//! What the other members say of themselves, asked all at once, for the decisions of `admin`.

use futures_util::future::join_all;
use stemedb_raft::types::Member;

use super::super::{
    core::{Core, Role, Shared},
    messages::StatusReply,
    status,
};
use crate::admin::{
    drain::{Mark, Tolerance},
    failover::Other,
};

/// A member other than this node.
pub struct Asked {
    /// Raft id.
    pub id: u64,
    /// The member.
    pub member: Member,
    /// Whether it votes.
    pub voter: bool,
    /// Its status, or why there is none.
    pub status: Result<StatusReply, String>,
}

/// Asks every other member, for half a second at most.
pub async fn ask_all(shared: &Shared) -> Vec<Asked> {
    let membership = std::sync::Arc::clone(&shared.view.borrow().membership);
    let own_id = shared.local.load().node_id;
    let voters: Vec<u64> = membership.voter_ids().collect();
    let others = membership.nodes().filter(|(id, _)| **id != own_id);
    let asked = others.map(|(id, member)| (*id, member.clone(), voters.contains(id)));
    let asked = asked.map(|(id, member, voter)| async move {
        let status = status::ask_status(shared, id, &member.peer_addr).await;
        Asked { id, member, voter, status }
    });
    join_all(asked).await
}

/// The marks of those that answered.
pub fn marks(asked: &[Asked]) -> impl Iterator<Item = (&str, Mark)> {
    asked.iter().filter_map(|other| Some((other.member.name.as_str(), other.status.as_ref().ok()?.drain.mark)))
}

/// What the cluster can lose.
pub fn tolerance(shared: &Shared, asked: &[Asked]) -> Tolerance {
    let own_id = shared.local.load().node_id;
    let is_voter = shared.view.borrow().membership.voter_ids().any(|id| id == own_id);
    let own = is_voter.then(|| (shared.name().to_owned(), shared.silenced()));
    let others =
        asked.iter().filter(|other| other.voter).map(|other| (other.member.name.clone(), ill(&other.status, true)));
    let (mut working, mut not_working) = (Vec::new(), Vec::new());
    for (name, ill) in own.into_iter().chain(others) {
        match ill {
            None => working.push(name),
            Some(why) => not_working.push(format!("{name}: {why}")),
        }
    }
    Tolerance::of(working, not_working, shared.name())
}

/// Why a node with this status does not work as a voter, or as a learner that may become one, if so.
pub fn ill(status: &Result<StatusReply, String>, is_voter: bool) -> Option<String> {
    match status {
        Err(why) => Some(format!("it does not answer ({why})")),
        Ok(status) => status
            .disk
            .silenced()
            .map(|why| format!("its disk is {} ({why})", status.disk.state.word()))
            .or_else(|| {
                let votes = [Role::Leader, Role::Follower, Role::Candidate].map(Role::word).contains(&&*status.role);
                let learns = !is_voter && status.role == Role::Learner.word();
                (!votes && !learns).then(|| format!("it is {}", status.role))
            }),
    }
}

/// Entries and bytes of its log that a member has not acknowledged, by what this node, the leader, knows of it now;
/// `None`: nothing, or it needs a checkpoint.
pub fn lags<'a>(shared: &'a Shared, core: &Core) -> impl Fn(u64) -> Option<(u64, u64)> + use<'a> {
    let metrics = core.raft_metrics();
    let end = metrics.last_log_index.map_or(0, |last| last + 1);
    let replication = metrics.replication.unwrap_or_default();
    let purged = metrics.purged.map(|id| id.index);
    move |id| {
        let missing_from = replication.get(&id).copied().flatten()?.index + 1;
        // What was purged comes with a checkpoint only.
        let bytes =
            shared.wal().filter(|_| purged.is_none_or(|purged| missing_from > purged))?.bytes_from(missing_from);
        Some((end.saturating_sub(missing_from), bytes))
    }
}

/// The others as candidates for leadership. Their lag is what this node, the leader, knows of it.
pub fn candidates(shared: &Shared, core: &Core, asked: Vec<Asked>) -> Vec<Other> {
    let lag = lags(shared, core);
    let other = |asked: Asked| {
        let (silent, status) = match asked.status {
            Ok(status) => (None, Some(status)),
            Err(why) => (Some(why), None),
        };
        let role = status.as_ref().map(|status| status.role.clone());
        let drain = status.as_ref().map(|status| status.drain.mark).unwrap_or_default();
        let not_following = role.filter(|role| role != Role::Follower.word()).map(|role| format!("it is {role}"));
        Other {
            id: asked.id,
            name: asked.member.name,
            voter: asked.voter,
            silent,
            may_not_lead: status.and_then(|status| status.may_not_lead).or(not_following),
            drain,
            lag: lag(asked.id),
        }
    };
    asked.into_iter().map(other).collect()
}
