//! Where a node stands in the eyes of the others: a member, awaited, a stranger, or removed.
//!
//! Any node answers from the state that it has applied. A Raft id that was removed never comes back, so that "removed"
//! is true however old the answer is; everything else is confirmed by the leader before anything follows from it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use stemedb_net::{ClusterId, Refusal as NetRefusal};
use stemedb_raft::types::StoredMembership;

use crate::{
    node::{
        core::Shared,
        kinds::Kind,
        messages::{pack, unpack},
        rpc_server::{FAILED, REFUSED_BEFORE_EFFECT},
    },
    state::members::{MemberBook, Removed},
};

/// How long another node may take to answer: it reads one row.
const REPLY_MAX: Duration = Duration::from_secs(2);

/// `Kind::Standing`: where do I stand?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingAsk {
    /// The cluster, if the asking node knows it; an empty one does not.
    pub cluster_id: Option<ClusterId>,
    /// Its name.
    pub name: String,
    /// Its Raft id; 0: none.
    pub raft_id: u64,
}

/// The answer. The greater one is the better informed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// This node cannot say now.
    Unknown,
    /// This is another cluster.
    OtherCluster,
    /// Nobody knows it.
    Stranger,
    /// It is a member.
    Member,
    /// It is to become one.
    Awaited,
    /// It was one, and never will be again under this id.
    Removed(Removed),
}

impl Standing {
    fn rank(&self) -> u8 {
        match self {
            Standing::Unknown => 0,
            Standing::OtherCluster => 1,
            Standing::Stranger => 2,
            Standing::Member => 3,
            Standing::Awaited => 4,
            Standing::Removed(_) => 5,
        }
    }
}

/// The answer of a node with this state. Pure.
pub fn judge(cluster_id: ClusterId, membership: &StoredMembership, book: &MemberBook, ask: &StandingAsk) -> Standing {
    if ask.cluster_id.is_some_and(|theirs| theirs != cluster_id) {
        return Standing::OtherCluster;
    }
    if ask.raft_id != 0 {
        if let Some(removed) = book.removed.iter().find(|removed| removed.id == ask.raft_id) {
            return Standing::Removed(removed.clone());
        }
        let is_member = membership.get_node(&ask.raft_id).is_some();
        return if is_member { Standing::Member } else { Standing::Stranger };
    }
    let is_awaited =
        |intent: &crate::state::members::Intent| intent.coming() == Some(ask.name.as_str()) && !intent.cancelled;
    if book.current.as_ref().is_some_and(is_awaited) {
        return Standing::Awaited;
    }
    match membership.nodes().any(|(_, member)| member.name == ask.name) {
        true => Standing::Member,
        false => Standing::Stranger,
    }
}

/// Handles `Kind::Standing`.
pub async fn answer(shared: Arc<Shared>, body: Bytes) -> Result<Bytes, NetRefusal> {
    let unreadable = |e: String| NetRefusal::new(REFUSED_BEFORE_EFFECT, e);
    let ask: StandingAsk = unpack(&body).map_err(|e| unreadable(e.to_string()))?;
    let own = (**shared.identity.load()).as_ref().map(|id| id.cluster_id);
    let standing = match own.zip(shared.core.get()) {
        None => Standing::Unknown,
        Some((cluster_id, core)) => match super::book(&shared).await {
            // Of this moment, and not what the tree held at its start.
            Ok(book) => judge(cluster_id, &core.raft_metrics().membership_config, &book, &ask),
            Err(why) => return Err(unreadable(why)),
        },
    };
    pack(&standing).map_err(|e| NetRefusal::new(FAILED, e.to_string()))
}

/// Asks all of `addresses` at once. `None` when nobody could say.
pub async fn ask(shared: &Shared, addresses: Vec<String>, ask: &StandingAsk) -> Option<Standing> {
    let asked = addresses.into_iter().map(|addr| async move {
        let body = pack(ask).map_err(|e| e.to_string())?;
        let peer = shared.peers.probe(&addr);
        let answer = peer.call(Kind::Standing.number(), body, REPLY_MAX).await;
        peer.close();
        unpack::<Standing>(&answer.map_err(|e| e.to_string())?).map_err(|e| e.to_string())
    });
    let answers = join_all(asked).await.into_iter().filter_map(|answer: Result<Standing, String>| {
        answer.inspect_err(|why| tracing::debug!(why, "a node did not say where this one stands")).ok()
    });
    answers.max_by_key(Standing::rank).filter(|standing| *standing != Standing::Unknown)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use openraft::Membership;
    use stemedb_raft::types::Member;

    use super::*;
    use crate::state::members::{Change, Intent};

    fn membership() -> StoredMembership {
        let member = |name: &str| Member { name: name.into(), ..Member::default() };
        let nodes = BTreeMap::from([(1, member("a")), (2, member("b"))]);
        StoredMembership::new(None, Membership::new(vec![[1, 2].into()], nodes).unwrap())
    }

    fn book() -> MemberBook {
        let intent = Intent {
            job: 1,
            change: Change::Add { learner: false },
            name: "d".into(),
            peer_addr: "d:1".into(),
            http_addr: "d:2".into(),
            forced: false,
            cause: String::new(),
            began_unix_ms: 0,
            place: None,
            leaves: vec![],
            changing: false,
            cancelled: false,
        };
        let removed = Removed { id: 3, name: "c".into(), replaced_by: None, at_unix_ms: 5 };
        MemberBook { current: Some(intent), ended: vec![], removed: vec![removed] }
    }

    fn of(name: &str, raft_id: u64) -> Standing {
        judge([7; 16], &membership(), &book(), &StandingAsk { cluster_id: None, name: name.into(), raft_id })
    }

    #[test]
    fn a_name_without_an_id_is_awaited_a_member_or_unknown() {
        assert_eq!(of("d", 0), Standing::Awaited);
        assert_eq!(of("a", 0), Standing::Member);
        assert_eq!(of("c", 0), Standing::Stranger, "an emptied folder of a removed node may be added again");
    }

    #[test]
    fn an_id_is_a_member_or_was_removed_whatever_its_name() {
        assert_eq!(of("a", 1), Standing::Member);
        assert!(matches!(of("c", 3), Standing::Removed(removed) if removed.name == "c"));
        assert!(matches!(of("d", 3), Standing::Removed(_)));
        assert_eq!(of("d", 9), Standing::Stranger);
        let ask = StandingAsk { cluster_id: Some([8; 16]), name: "a".into(), raft_id: 1 };
        assert_eq!(judge([7; 16], &membership(), &book(), &ask), Standing::OtherCluster);
    }

    #[test]
    fn a_cancelled_one_is_not_awaited() {
        let mut book = book();
        book.current.as_mut().unwrap().cancelled = true;
        let ask = StandingAsk { cluster_id: None, name: "d".into(), raft_id: 0 };
        assert_eq!(judge([7; 16], &membership(), &book, &ask), Standing::Stranger);
    }
}
