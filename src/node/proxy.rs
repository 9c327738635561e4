//! A node whose Raft core says nothing, or nothing that counts, goes on as a proxy.
//!
//! Its clients must not notice: what they send goes to the leader, wherever that is. So this node keeps a directory of
//! the members, from the last membership it knew or else from those of the configured peers that answer, and asks them
//! who leads: often while that is unknown, rarely afterwards. What it finds is the node's view, and whoever waits for a
//! leader is woken by that. The membership follows the newest one that a member knows. A node that has lost its files does
//! not even know its cluster: it speaks as a guest of the one that its peers are members of, until it has a Raft id again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    StreamExt,
    future::{BoxFuture, FutureExt, join_all},
    stream::FuturesUnordered,
};
use stemedb_net::{ClusterId, LocalIdentity};
use stemedb_raft::types::StoredMembership;
use tokio::time::Instant;

use super::{
    bootstrap::ProbeAnswer,
    core::{ClusterView, LeaderInfo, Role, Shared},
    formation,
    messages::StatusReply,
    status, watch,
};
use crate::config::PeerEntry;

/// Pause between questions while the leader is unknown: a small part of an election.
const ASK_OFTEN: Duration = Duration::from_millis(5);
/// The same once the leader has been known or missing for `OFTEN_FOR`: 20 small messages in a second to two peers.
const ASK_RARELY: Duration = Duration::from_millis(100);
/// Longest time of asking often. An election that takes longer is not sped up by it.
const OFTEN_FOR: Duration = Duration::from_secs(1);
/// Pause between questions to configured peers, while no member is known.
const PROBE_PAUSE: Duration = Duration::from_millis(500);

/// What one member last said of who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    term: u64,
    leads: bool,
}

impl Said {
    fn of(status: &StatusReply) -> Said {
        // A leader whose disk stalls goes on leading by its own word and answers nobody.
        Said { term: status.term, leads: status.role == Role::Leader.word() && !status.disk.state.silences() }
    }
}

/// The members, and what they said.
#[derive(Clone, Debug, Default)]
struct Directory {
    own_id: u64,
    membership: Arc<StoredMembership>,
    /// Members found by asking the configured peers: until one of them has told the membership.
    found: BTreeMap<u64, PeerEntry>,
    said: BTreeMap<u64, Said>,
}

impl Directory {
    /// Begins with what was known before. A leader elsewhere is believed until somebody says otherwise.
    fn new(own_id: u64, view: &ClusterView) -> Directory {
        let leader = view.leader.as_ref().filter(|leader| !leader.here);
        let said = leader.map(|leader| (leader.id, Said { term: view.term, leads: true }));
        let membership = Arc::clone(&view.membership);
        Directory { own_id, membership, found: BTreeMap::new(), said: said.into_iter().collect() }
    }

    /// Raft ids and peer addresses of the others.
    fn others(&self) -> Vec<(u64, String)> {
        let members = self.membership.nodes().map(|(id, member)| (*id, member.peer_addr.clone()));
        let found = self.found.iter().map(|(id, peer)| (*id, peer.addr.clone()));
        let mut others: BTreeMap<u64, String> = found.collect();
        others.extend(members);
        others.remove(&self.own_id);
        others.into_iter().collect()
    }

    /// Takes an answer, or that there was none.
    fn heard(&mut self, id: u64, answer: Option<StatusReply>) {
        let Some(status) = answer else {
            self.said.remove(&id);
            return;
        };
        self.said.insert(id, Said::of(&status));
        if let Some(newer) = status.membership.filter(|known| known.log_id() > self.membership.log_id()) {
            self.said.retain(|id, _| newer.get_node(id).is_some());
            self.found.clear();
            self.membership = Arc::new(newer);
        }
    }

    /// Takes what a configured peer answered to a probe.
    fn found(&mut self, own_cluster: ClusterId, peer: &PeerEntry, answer: &ProbeAnswer) {
        match answer {
            ProbeAnswer::Member { cluster_id, raft_id, .. } if *cluster_id == own_cluster => {
                self.found.insert(*raft_id, peer.clone());
            }
            // A node without a place, or of another cluster, leads nothing of ours.
            ProbeAnswer::Member { .. } | ProbeAnswer::Assigned { .. } | ProbeAnswer::Empty { .. } => {}
        }
    }

    /// The one that says itself that it leads in the newest term.
    fn leader(&self) -> Option<LeaderInfo> {
        let leading = self.said.iter().filter(|(id, said)| said.leads && **id != self.own_id);
        let (_, id) = leading.map(|(id, said)| (said.term, *id)).max()?;
        let here = false;
        match (self.membership.get_node(&id), self.found.get(&id)) {
            (Some(member), _) => {
                Some(LeaderInfo { id, name: member.name.clone(), addr: member.peer_addr.clone(), here })
            }
            (None, Some(peer)) => Some(LeaderInfo { id, name: peer.name.clone(), addr: peer.addr.clone(), here }),
            (None, None) => None,
        }
    }

    /// The newest term that anybody named.
    fn term(&self) -> u64 {
        self.said.values().map(|said| said.term).max().unwrap_or_default()
    }

    fn view(&self) -> ClusterView {
        let membership = Arc::clone(&self.membership);
        let leader = self.leader();
        let led = leader.as_ref().and_then(|leader| Some(self.said.get(&leader.id)?.term));
        ClusterView { leader, term: led.unwrap_or_else(|| self.term()), role: Role::Starting, membership }
    }
}

/// Keeps the view from what the others say, until `back` says that this node's own word counts again: it is asked with
/// the newest term that others have named. Returns with the node's end at the latest.
pub async fn follow_others(shared: &Shared, mut back: impl FnMut(u64) -> bool) {
    let mut directory = Directory::new(shared.local.load().node_id, &shared.view.borrow());
    let mut term_newest = shared.view.borrow().term;
    watch::set_view(shared, directory.view());
    let mut asking: FuturesUnordered<BoxFuture<'_, (u64, Option<StatusReply>)>> = FuturesUnordered::new();
    let mut asked: BTreeSet<u64> = BTreeSet::new();
    let mut often_until = Instant::now() + OFTEN_FOR;
    let mut probe_at = Instant::now();
    let mut led = directory.leader().is_some();
    loop {
        if directory.others().is_empty() && Instant::now() >= probe_at {
            probe(shared, &mut directory).await;
            probe_at = Instant::now() + PROBE_PAUSE;
        }
        for (id, addr) in directory.others() {
            // One question at a time to each: one that hangs must not hold up what the others say.
            if asked.insert(id) {
                asking.push(async move { (id, status::ask_status(shared, id, &addr).await.ok()) }.boxed());
            }
        }
        let now = Instant::now();
        let ask_again = now + if now < often_until { ASK_OFTEN } else { ASK_RARELY };
        loop {
            tokio::select! {
                () = shared.stop.cancelled() => return,
                () = tokio::time::sleep_until(ask_again) => break,
                Some((id, answer)) = asking.next() => {
                    asked.remove(&id);
                    directory.heard(id, answer);
                    term_newest = term_newest.max(directory.term());
                    watch::set_view(shared, directory.view());
                }
            }
        }
        if back(term_newest) {
            return;
        }
        if led && directory.leader().is_none() {
            often_until = Instant::now() + OFTEN_FOR;
        }
        led = directory.leader().is_some();
    }
}

/// Looks for members among the configured peers.
async fn probe(shared: &Shared, directory: &mut Directory) {
    let peers = shared.config.cluster.peers.iter().filter(|peer| peer.name != shared.name());
    let asked = peers.map(|peer| async move { (peer, formation::probe(shared, &peer.addr).await) });
    let answers = join_all(asked).await;
    let own = (**shared.identity.load()).as_ref().map(|identity| identity.cluster_id);
    let Some(own_cluster) = own.or_else(|| cluster_of(answers.iter().filter_map(|(_, answer)| answer.as_ref().ok())))
    else {
        return;
    };
    if own.is_none() {
        let drawn = uuid::Uuid::now_v7().as_u64_pair().1;
        let guest = Arc::new(LocalIdentity::guest(own_cluster, drawn));
        // Not over the id that it is given meanwhile, and over that of a guest of another cluster only.
        let stays = |local: &LocalIdentity| local.has_raft_id() || local.cluster_id == own_cluster;
        shared.local.rcu(|local| if stays(local) { Arc::clone(local) } else { Arc::clone(&guest) });
    }
    for (peer, answer) in answers {
        match answer {
            Ok(answer) => directory.found(own_cluster, peer, &answer),
            Err(error) => tracing::debug!(peer = peer.name, error, "a configured peer does not answer"),
        }
    }
}

/// The cluster of all that are members of one; `None` where there is none, or more than one. Pure.
fn cluster_of<'a>(answers: impl Iterator<Item = &'a ProbeAnswer>) -> Option<ClusterId> {
    let of_members = answers.filter_map(|answer| match answer {
        ProbeAnswer::Member { cluster_id, .. } => Some(*cluster_id),
        ProbeAnswer::Assigned { .. } | ProbeAnswer::Empty { .. } => None,
    });
    let clusters: BTreeSet<ClusterId> = of_members.collect();
    clusters.first().copied().filter(|_| clusters.len() == 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use openraft::Membership;
    use stemedb_raft::types::{Member, TypeConfig};

    use super::*;
    use crate::node::disk::{DiskHealth, DiskState};

    fn membership(index: u64, ids: &[u64]) -> StoredMembership {
        let member = |id: u64| Member {
            name: format!("node-{id}"),
            peer_addr: format!("10.0.0.{id}:1"),
            http_addr: format!("10.0.0.{id}:2"),
        };
        let nodes: BTreeMap<u64, Member> = ids.iter().map(|id| (*id, member(*id))).collect();
        let log_id = openraft::testing::log_id::<TypeConfig>(1, 1, index);
        StoredMembership::new(Some(log_id), Membership::new(vec![ids.iter().copied().collect()], nodes).unwrap())
    }

    fn says(id: u64, role: Role, term: u64) -> StatusReply {
        StatusReply {
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
            may_not_lead: None,
            damaged: None,
            fsync_p99_ms: None,
            drain: Default::default(),
            membership: None,
            room: Default::default(),
        }
    }

    fn directory(view: &ClusterView) -> Directory {
        Directory { membership: Arc::new(membership(3, &[1, 2, 3])), ..Directory::new(1, view) }
    }

    fn leader_of(directory: &Directory) -> Option<u64> {
        directory.leader().map(|leader| leader.id)
    }

    #[test]
    fn the_leader_of_the_newest_term_is_believed() {
        let mut known = directory(&ClusterView::default());
        assert_eq!(leader_of(&known), None);
        known.heard(2, Some(says(2, Role::Leader, 4)));
        known.heard(3, Some(says(3, Role::Leader, 5)));
        assert_eq!((leader_of(&known), known.view().term), (Some(3), 5));
        known.heard(3, None);
        assert_eq!(leader_of(&known), Some(2));
        known.heard(2, Some(says(2, Role::Follower, 6)));
        assert_eq!((leader_of(&known), known.view().term), (None, 6));
    }

    #[test]
    fn a_leader_known_before_stays_until_it_says_otherwise_and_this_node_never_counts() {
        let info = |id, here| LeaderInfo { id, name: "n".into(), addr: "a".into(), here };
        let view = |leader| ClusterView { leader: Some(leader), term: 4, ..ClusterView::default() };
        let mut known = directory(&view(info(2, false)));
        assert_eq!((leader_of(&known), known.view().term), (Some(2), 4));
        known.heard(3, Some(says(3, Role::Follower, 4)));
        assert_eq!((leader_of(&known), known.view().term), (Some(2), 4), "no gap for the clients of a failed follower");
        known.heard(2, Some(says(2, Role::Follower, 5)));
        assert_eq!(leader_of(&known), None);
        assert_eq!(leader_of(&directory(&view(info(1, true)))), None);
    }

    #[test]
    fn a_leader_whose_disk_stalls_is_none() {
        let mut known = directory(&ClusterView::default());
        let stalled = DiskHealth { state: DiskState::Stalled, reason: None };
        known.heard(2, Some(StatusReply { disk: stalled, ..says(2, Role::Leader, 4) }));
        assert_eq!(leader_of(&known), None);
        let slow = DiskHealth { state: DiskState::Slow, reason: None };
        known.heard(2, Some(StatusReply { disk: slow, ..says(2, Role::Leader, 4) }));
        assert_eq!(leader_of(&known), Some(2));
    }

    #[test]
    fn the_newest_membership_counts_and_a_member_that_left_leads_no_more() {
        let mut known = directory(&ClusterView::default());
        known.heard(2, Some(says(2, Role::Leader, 4)));
        known.heard(3, Some(StatusReply { membership: Some(membership(2, &[1, 2])), ..says(3, Role::Follower, 4) }));
        assert_eq!(known.others().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [2, 3], "an older one");
        known.heard(3, Some(StatusReply { membership: Some(membership(9, &[3, 4])), ..says(3, Role::Leader, 4) }));
        assert_eq!(known.others().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(leader_of(&known), Some(3));
    }

    #[test]
    fn without_a_membership_configured_peers_of_the_same_cluster_are_asked() {
        let peer = |n: u64| PeerEntry { name: format!("node-{n}"), addr: format!("10.0.0.{n}:1"), http: String::new() };
        let member = |n: u64, cluster: u8| ProbeAnswer::Member {
            name: format!("node-{n}"),
            cluster_id: [cluster; 16],
            raft_id: 10 + n,
        };
        let mut known = Directory::new(1, &ClusterView::default());
        known.found([7; 16], &peer(2), &member(2, 7));
        known.found([7; 16], &peer(3), &member(3, 8));
        assert_eq!(known.others(), [(12, "10.0.0.2:1".to_owned())]);
        known.heard(12, Some(says(2, Role::Leader, 4)));
        assert_eq!(known.leader().map(|l| (l.id, l.name)), Some((12, "node-2".into())));
        known.heard(12, Some(StatusReply { membership: Some(membership(9, &[12, 13])), ..says(2, Role::Leader, 4) }));
        assert_eq!(known.others().len(), 2);
    }

    #[test]
    fn a_node_without_files_is_a_guest_of_the_one_cluster_that_answers() {
        let member = |cluster: u8| ProbeAnswer::Member { name: "n".into(), cluster_id: [cluster; 16], raft_id: 2 };
        let empty = ProbeAnswer::Empty { name: "n".into(), list_hash: 1 };
        assert_eq!(cluster_of([member(7), empty.clone(), member(7)].iter()), Some([7; 16]));
        assert_eq!(cluster_of([member(7), member(8)].iter()), None, "it does not choose");
        assert_eq!(cluster_of([empty].iter()), None);
        let guest = LocalIdentity::guest([7; 16], 5);
        assert!(guest.is_joined() && !guest.has_raft_id());
    }
}
