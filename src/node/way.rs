//! Whether this node has a way to the leader, and what it does without one.
//!
//! ```text
//!   the leader speaks to this node ───────────────────────────────► requests go straight to it
//!   silence; a peer that the leader speaks to answers ────────────► through that peer, one hop
//!   silence; a majority answers, and none has a leader ───────────► an election: requests wait
//!   silence; with this node no majority answers, and stays away ──► cut off: not ready, go elsewhere
//! ```
//!
//! A leader hears from a majority in place of a leader. So a moment without a leader, however long, never makes a node
//! unready: only a node that reaches too few of the others is, and then it is no use to anybody. A peer that is asked to
//! pass commands on (`Kind::Relay`) hands them to the leader as its own (`Kind::Forward`), which nobody passes on: no
//! command goes round in circles. Nothing here is about safety: commands keep their keys, and reads are confirmed where
//! they are answered.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use serde::{Deserialize, Serialize};
use stemedb_net::{CallError, Lane};

use super::{
    core::{Role, Shared},
    kinds::Kind,
    messages::{pack_json, unpack_json},
    status,
};
use crate::clock;

/// Pause between two looks. A look costs nothing while the leader speaks to this node.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a peer may take to answer. Far above a round trip, and a part of `CUT_OFF_MS`.
const ANSWER_MAX: Duration = Duration::from_millis(500);
/// For how long too few must have been within reach before this node is cut off: below the 5 s in which nginx asks
/// another node, with room for slow elections; above any pause of a machine that is merely busy.
const CUT_OFF_MS: u64 = 2_000;
/// And so many looks in a row: a process that was stopped meanwhile has to look again first.
const CUT_OFF_LOOKS: u32 = 3;

/// The way to the leader, as far as it is not the usual one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Neither has the leader spoken to this node for the time of an election, nor a majority to it as the leader.
    pub is_lost: bool,
    /// Who has a way, in that case.
    pub through: Option<Via>,
    /// Why this node is cut off, if it is: requests are better sent to another one.
    pub cut_off: Option<String>,
}

/// A peer that passes commands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Via {
    /// Its Raft id.
    pub id: u64,
    /// `host:port` of its peer listener.
    pub addr: String,
    /// The leader that it follows, or itself.
    pub leader: LeaderSeen,
}

/// The leader as another node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderSeen {
    /// Raft id.
    pub id: u64,
    /// Name.
    pub name: String,
    /// Term.
    pub term: u64,
}

/// Answer to `Kind::Way`, in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayReply {
    /// The leader that has spoken to the asked node lately, or the asked node itself if it leads with a majority.
    pub leader: Option<LeaderSeen>,
}

/// What one look found.
#[derive(Clone, Debug, Default)]
struct Look {
    /// The leader speaks to this node, or a majority to this leader.
    in_touch: bool,
    /// A peer with a way.
    via: Option<Via>,
    /// Whether the voters that answered are a majority, this node included if it is one.
    majority_answers: bool,
}

/// Makes ways of looks. Pure.
#[derive(Debug, Default)]
struct Pathfinder {
    lost_since_ms: Option<u64>,
    /// Beginning of the first look of those in a row that reached too few, and how many there were.
    alone: Option<(u64, u32)>,
}

impl Pathfinder {
    /// `began_ms`, `ended_ms`: the look, by the monotonic clock. `patience_ms`: how long the silence has to last before
    /// commands go another way.
    fn next(&mut self, look: Look, (began_ms, ended_ms): (u64, u64), patience_ms: u64) -> Way {
        if look.in_touch {
            *self = Pathfinder::default();
            return Way::default();
        }
        let lost_since_ms = *self.lost_since_ms.get_or_insert(began_ms);
        let through = look.via.filter(|_| ended_ms.saturating_sub(lost_since_ms) >= patience_ms);
        if through.is_some() || look.majority_answers {
            self.alone = None;
            return Way { is_lost: true, through, cut_off: None };
        }
        let (since_ms, looks) = self.alone.get_or_insert((began_ms, 0));
        *looks += 1;
        let is_cut_off = *looks >= CUT_OFF_LOOKS && ended_ms.saturating_sub(*since_ms) >= CUT_OFF_MS;
        let cut_off = is_cut_off.then(|| "it reaches neither a leader nor a majority of the voters".to_owned());
        Way { is_lost: true, through: None, cut_off }
    }
}

/// Keeps the node's way until its core ends.
pub async fn watch(shared: Arc<Shared>) {
    let looking = async {
        let mut pathfinder = Pathfinder::default();
        loop {
            tokio::time::sleep(PAUSE).await;
            let began_ms = clock::monotonic_ms();
            let look = look(&shared).await;
            let ended_ms = clock::monotonic_ms();
            let way = pathfinder.next(look, (began_ms, ended_ms), shared.config.cluster.election_max_ms);
            set(&shared, way);
        }
    };
    shared.core_stop.run_until_cancelled(looking).await;
    // As a proxy it follows what the others say.
    set(&shared, Way::default());
}

fn set(shared: &Shared, way: Way) {
    shared.way.send_if_modified(|old| {
        if *old == way {
            return false;
        }
        match (&old.through, &way.through) {
            (None, Some(via)) => tracing::warn!(
                through = via.addr,
                leader = via.leader.name,
                "the leader is out of reach, and requests go through another node"
            ),
            (Some(_), None) => tracing::info!("requests go through no other node any more"),
            _ => {}
        }
        match (&old.cut_off, &way.cut_off) {
            (None, Some(why)) => tracing::warn!("this node is cut off and not ready: {why}"),
            (Some(_), None) => tracing::info!("this node is not cut off any more"),
            _ => {}
        }
        *old = way;
        true
    });
}

/// Whether the leader speaks to this node, or a majority to this leader. What it has said may still wait for the disk here:
/// a node whose syncs are slow has not lost its leader.
fn is_in_touch(shared: &Shared) -> bool {
    let Some(core) = shared.core.get() else { return false };
    let election_ms = shared.config.cluster.election_max_ms;
    if shared.view.borrow().role == Role::Leader {
        return status::ms_since_quorum(shared, core).is_some_and(|ms| ms <= election_ms);
    }
    let heard_at_ms = shared.leader_heard_at_ms.load(Ordering::Relaxed);
    heard_at_ms > 0 && clock::monotonic_ms().saturating_sub(heard_at_ms) <= election_ms
}

async fn look(shared: &Shared) -> Look {
    let own_id = shared.local.load().node_id;
    let (membership, leads) = {
        let view = shared.view.borrow();
        (Arc::clone(&view.membership), view.role == Role::Leader)
    };
    // A proxy, and a node that is no member (yet), go by what the others say.
    let is_member = membership.get_node(&own_id).is_some();
    if !is_member || shared.silenced().is_some() || is_in_touch(shared) {
        return Look { in_touch: true, ..Look::default() };
    }
    let voters: Vec<u64> = membership.voter_ids().collect();
    let mut reached = voters.iter().filter(|id| **id == own_id).count();
    let mut via: Option<Via> = None;
    let known = shared.way.borrow().through.clone();
    let mut asking: FuturesUnordered<_> = membership
        .nodes()
        .filter(|(id, _)| **id != own_id)
        .map(|(id, member)| {
            let (id, addr) = (*id, member.peer_addr.clone());
            async move {
                let answer = ask(shared, id, &addr).await;
                (id, addr, answer)
            }
        })
        .collect();
    while let Some((id, addr, answer)) = asking.next().await {
        let Some(reply) = answer else { continue };
        reached += voters.iter().filter(|voter| **voter == id).count();
        // Commands stay with whom they go through already.
        let is_better = via.is_none() || known.as_ref().is_some_and(|known| known.id == id);
        // A node that has lost its majority leads nobody, and passes nothing on to itself.
        if let Some(leader) = reply.leader.filter(|leader| is_better && leader.id != own_id && !leads) {
            via = Some(Via { id, addr, leader });
        }
    }
    // While it was asked around a leader may have been elected, and the answers are older than that.
    Look { in_touch: is_in_touch(shared), via, majority_answers: reached * 2 > voters.len() }
}

/// Asks one peer; `None` when nothing comes back. A refusal is an answer too, without a leader.
async fn ask(shared: &Shared, id: u64, addr: &str) -> Option<WayReply> {
    let body = pack_json(&()).ok()?;
    let peer = shared.peers.to(id, addr, Lane::Control);
    match peer.call(Kind::Way.number(), body, ANSWER_MAX).await {
        Ok(answer) => Some(unpack_json(&answer).unwrap_or(WayReply { leader: None })),
        Err(CallError::Refused { .. }) => Some(WayReply { leader: None }),
        Err(error) => {
            tracing::debug!(id, addr, %error, "a peer does not answer");
            None
        }
    }
}

/// What this node answers to others that look for a way.
pub fn reply(shared: &Shared) -> WayReply {
    if shared.silenced().is_some() || !is_in_touch(shared) {
        return WayReply { leader: None };
    }
    let view = shared.view.borrow();
    let seen =
        |leader: &super::core::LeaderInfo| LeaderSeen { id: leader.id, name: leader.name.clone(), term: view.term };
    WayReply { leader: view.leader.as_ref().map(seen) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE_MS: u64 = 300;

    fn via() -> Option<Via> {
        let leader = LeaderSeen { id: 1, name: "node-1".into(), term: 4 };
        Some(Via { id: 2, addr: "10.0.0.2:1".into(), leader })
    }

    fn silent(majority_answers: bool) -> Look {
        Look { in_touch: false, via: None, majority_answers }
    }

    /// A look every 600 ms, as when all questions end by their time.
    fn after(pathfinder: &mut Pathfinder, looks: u64, look: &Look) -> Way {
        let mut way = Way::default();
        for n in 0..looks {
            way = pathfinder.next(look.clone(), (n * 600, n * 600 + 500), PATIENCE_MS);
        }
        way
    }

    #[test]
    fn a_node_that_reaches_too_few_for_long_is_cut_off_until_it_does() {
        let mut pathfinder = Pathfinder::default();
        assert_eq!(after(&mut pathfinder, 3, &silent(false)).cut_off, None, "1.7 s");
        let mut pathfinder = Pathfinder::default();
        let way = after(&mut pathfinder, 4, &silent(false));
        assert!(way.is_lost && way.cut_off.is_some(), "{way:?}");
        let touched = Look { in_touch: true, ..Look::default() };
        assert_eq!(pathfinder.next(touched, (3_000, 3_000), PATIENCE_MS), Way::default());
        assert_eq!(pathfinder.next(silent(false), (9_000, 9_500), PATIENCE_MS).cut_off, None, "it counts anew");
    }

    #[test]
    fn no_leader_for_however_long_is_not_cut_off_while_a_majority_answers() {
        let mut pathfinder = Pathfinder::default();
        let way = after(&mut pathfinder, 1_000, &silent(true));
        assert_eq!(way, Way { is_lost: true, through: None, cut_off: None });
        // And one that was alone until then begins anew.
        let _ = after(&mut pathfinder, 3, &silent(false));
        let _ = pathfinder.next(silent(true), (1_800, 1_900), PATIENCE_MS);
        assert_eq!(pathfinder.next(silent(false), (2_000, 2_500), PATIENCE_MS).cut_off, None);
    }

    #[test]
    fn one_long_look_is_not_enough() {
        let mut pathfinder = Pathfinder::default();
        assert_eq!(pathfinder.next(silent(false), (0, 60_000), PATIENCE_MS).cut_off, None, "this process was stopped");
    }

    #[test]
    fn commands_go_through_a_peer_once_the_silence_outlasts_an_election() {
        let mut pathfinder = Pathfinder::default();
        let look = Look { in_touch: false, via: via(), majority_answers: true };
        let way = pathfinder.next(look.clone(), (1_000, 1_010), PATIENCE_MS);
        assert_eq!(way, Way { is_lost: true, through: None, cut_off: None });
        let way = pathfinder.next(look.clone(), (1_300, 1_310), PATIENCE_MS);
        assert_eq!(way.through, via());
        // Of more than three voters, a way may be all that there is.
        let way = pathfinder.next(Look { majority_answers: false, ..look }, (9_000, 9_010), PATIENCE_MS);
        assert_eq!((way.through, way.cut_off), (via(), None));
    }
}
