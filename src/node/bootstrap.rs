//! When a cluster may be formed: the decision, without any I/O.
//!
//! An empty folder looks the same at the first start and after a loss, so a cluster is formed once
//! and explicitly: only the first node of the configured list does it, and only when every listed
//! node has answered that it is empty and has the same list. It writes its own identity first and
//! then hands out the others, so that a crash at any moment leaves either nothing, or an identity
//! here that goes on forming, or an assigned peer from which the same cluster id is adopted.
//! A node that already has log entries ends all of this: then a cluster exists, and an empty node
//! can only join it as a new member.

use serde::{Deserialize, Serialize};
use stemedb_net::ClusterId;
use xxhash_rust::xxh3::xxh3_128;

use super::identity::cluster_hex;
use crate::config::PeerEntry;

/// Where a node stands, as it tells it to others. No identity is needed to ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeAnswer {
    /// No identity, no log, no tree.
    Empty {
        /// `node.name` of the answering node.
        name: String,
        /// Hash of its list of peers.
        list_hash: u128,
    },
    /// It has an identity, and its log was never used.
    Assigned {
        /// `node.name` of the answering node.
        name: String,
        /// Hash of its list of peers.
        list_hash: u128,
        /// Its cluster.
        cluster_id: ClusterId,
        /// Its Raft id.
        raft_id: u64,
    },
    /// It is or was a working member.
    Member {
        /// `node.name` of the answering node.
        name: String,
        /// Its cluster.
        cluster_id: ClusterId,
        /// Its Raft id.
        raft_id: u64,
    },
}

impl ProbeAnswer {
    /// The name with which it answered.
    pub fn name(&self) -> &str {
        match self {
            ProbeAnswer::Empty { name, .. } | ProbeAnswer::Assigned { name, .. } | ProbeAnswer::Member { name, .. } => {
                name
            }
        }
    }
}

/// The forming node gives a peer its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The chosen cluster id.
    pub cluster_id: ClusterId,
    /// The peer's Raft id.
    pub raft_id: u64,
    /// The peer's name, so that a swapped address is noticed.
    pub name: String,
    /// Hash of the list of the forming node.
    pub list_hash: u128,
}

/// What a listed peer said, or that it said nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// No answer, for this reason.
    Silent(String),
    /// An answer.
    Answer(ProbeAnswer),
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Ask again later. One sentence for each node that is waited for.
    Wait(Vec<String>),
    /// Every node is there and agrees; the first of the list will hand out the places.
    AwaitAssignment,
    /// Form the cluster: under this id, or under a new one, and assign these positions of the list.
    Form {
        /// An id that a peer or this node already has.
        adopt: Option<ClusterId>,
        /// Positions in the list that have no identity yet, without this node's own.
        assign: Vec<usize>,
    },
    /// Do not start, for this reason.
    Refuse(String),
}

/// Hash of the list: names and peer addresses, in order. Raft ids follow from the order, so two
/// nodes with another order must not form a cluster.
pub fn list_hash(peers: &[PeerEntry]) -> u128 {
    let mut text = Vec::new();
    for peer in peers {
        for part in [&peer.name, &peer.addr] {
            text.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
            text.extend_from_slice(part.as_bytes());
        }
    }
    xxh3_128(&text)
}

/// The Raft id of a position in the list.
pub fn raft_id_of(position: usize) -> u64 {
    u64::try_from(position).unwrap_or(u64::MAX).saturating_add(1)
}

/// Decides for the node at `own_position` of `peers`. `own_cluster`: its cluster when it has an
/// identity whose log was never used. `heard`: one for each position; its own is ignored.
pub fn decide(peers: &[PeerEntry], own_position: usize, own_cluster: Option<ClusterId>, heard: &[Heard]) -> Decision {
    let own_hash = list_hash(peers);
    let mut waiting = Vec::new();
    let mut assign = Vec::new();
    let mut adopt = own_cluster;
    for (position, peer) in peers.iter().enumerate().filter(|(position, _)| *position != own_position) {
        let who = format!("{} at {}", peer.name, peer.addr);
        let answer = match heard.get(position) {
            Some(Heard::Answer(answer)) => answer,
            Some(Heard::Silent(why)) => {
                waiting.push(format!("{who} does not answer ({why})"));
                continue;
            }
            None => {
                waiting.push(format!("{who} was not asked yet"));
                continue;
            }
        };
        if answer.name() != peer.name {
            waiting.push(format!(
                "{who} answers as {:?}: its node.name or the address in the list is wrong",
                answer.name()
            ));
            continue;
        }
        match answer {
            ProbeAnswer::Member { cluster_id, .. } => {
                return Decision::Refuse(already_member(&who, cluster_id, own_cluster));
            }
            ProbeAnswer::Empty { list_hash, .. } | ProbeAnswer::Assigned { list_hash, .. }
                if *list_hash != own_hash =>
            {
                waiting.push(format!("{who} has another list of peers: the lists must be equal, in the same order"));
            }
            ProbeAnswer::Empty { .. } => assign.push(position),
            ProbeAnswer::Assigned { cluster_id, raft_id, .. } => {
                if adopt.is_some_and(|own| own != *cluster_id) {
                    return Decision::Refuse(format!(
                        "{who} was given a place in cluster {}, another node in another one: empty the data folders of all \
                         nodes that never served, and start again",
                        cluster_hex(cluster_id)
                    ));
                }
                if *raft_id != raft_id_of(position) {
                    return Decision::Refuse(format!(
                        "{who} has Raft id {raft_id}, and its place in the list says {}",
                        raft_id_of(position)
                    ));
                }
                adopt = Some(*cluster_id);
            }
        }
    }
    if !waiting.is_empty() {
        return Decision::Wait(waiting);
    }
    if own_position != 0 {
        return Decision::AwaitAssignment;
    }
    Decision::Form { adopt, assign }
}

fn already_member(who: &str, theirs: &ClusterId, own: Option<ClusterId>) -> String {
    let cluster = cluster_hex(theirs);
    match own {
        Some(own) if own == *theirs => format!(
            "{who} already has log entries of cluster {cluster}, and this node, a member of it, has none: its log was lost. \
             Replace it by a new member"
        ),
        Some(own) => format!("{who} is a member of cluster {cluster}, and this node of {}", cluster_hex(&own)),
        None => format!(
            "{who} is already a member of cluster {cluster}: a second cluster is never formed, and an empty node does not \
             take the place of a lost one by itself. Add it as a new member"
        ),
    }
}

/// Whether a node that stands as given may take `assignment`; the error says why not.
pub fn accept(
    assignment: &Assignment,
    own_name: &str,
    own_hash: u128,
    own: Option<(ClusterId, u64)>,
) -> Result<(), String> {
    if assignment.name != own_name {
        return Err(format!("this is node {own_name:?}, not {:?}", assignment.name));
    }
    if assignment.list_hash != own_hash {
        return Err("the lists of peers differ".into());
    }
    match own {
        None => Ok(()),
        Some((cluster, raft_id)) if cluster == assignment.cluster_id && raft_id == assignment.raft_id => Ok(()),
        Some((cluster, raft_id)) => {
            Err(format!("this node already has Raft id {raft_id} in cluster {}", cluster_hex(&cluster)))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    const X: ClusterId = [1; 16];
    const Y: ClusterId = [2; 16];

    fn peers() -> Vec<PeerEntry> {
        (1..=3)
            .map(|i| PeerEntry {
                name: format!("node-{i}"),
                addr: format!("10.0.0.{i}:18280"),
                http: format!("10.0.0.{i}:18180"),
            })
            .collect()
    }
    fn empty(i: usize) -> Heard {
        Heard::Answer(ProbeAnswer::Empty { name: format!("node-{i}"), list_hash: list_hash(&peers()) })
    }
    fn assigned(i: usize, cluster_id: ClusterId, raft_id: u64) -> Heard {
        Heard::Answer(ProbeAnswer::Assigned {
            name: format!("node-{i}"),
            list_hash: list_hash(&peers()),
            cluster_id,
            raft_id,
        })
    }
    fn member(i: usize, cluster_id: ClusterId) -> Heard {
        Heard::Answer(ProbeAnswer::Member { name: format!("node-{i}"), cluster_id, raft_id: i as u64 })
    }
    fn silent() -> Heard {
        Heard::Silent("connection refused".into())
    }
    /// Node 1 hears this from 2 and 3.
    fn first(own: Option<ClusterId>, two: Heard, three: Heard) -> Decision {
        decide(&peers(), 0, own, &[silent(), two, three])
    }
    fn refused(decision: Decision) -> bool {
        matches!(decision, Decision::Refuse(_))
    }

    #[test]
    fn all_empty_with_one_list_forms_and_only_at_the_first() {
        assert_eq!(first(None, empty(2), empty(3)), Decision::Form { adopt: None, assign: vec![1, 2] });
        let second = decide(&peers(), 1, None, &[empty(1), silent(), empty(3)]);
        assert_eq!(second, Decision::AwaitAssignment);
    }

    #[test]
    fn one_without_an_answer_is_waited_for_by_name() {
        let Decision::Wait(whom) = first(None, empty(2), silent()) else { panic!() };
        assert_eq!(whom.len(), 1);
        assert!(whom[0].contains("node-3"), "{whom:?}");
        assert!(matches!(decide(&peers(), 0, None, &[]), Decision::Wait(whom) if whom.len() == 2));
    }

    #[test]
    fn another_list_is_waited_for() {
        let mut other = peers();
        other.swap(1, 2);
        assert_ne!(list_hash(&other), list_hash(&peers()));
        let differs = Heard::Answer(ProbeAnswer::Empty { name: "node-2".into(), list_hash: list_hash(&other) });
        assert!(matches!(first(None, differs, empty(3)), Decision::Wait(whom) if whom[0].contains("list")));
    }

    #[test]
    fn a_node_that_answers_under_another_name_is_waited_for() {
        assert!(matches!(first(None, empty(3), empty(3)), Decision::Wait(whom) if whom[0].contains("node-3")));
    }

    #[test]
    fn any_member_refuses_even_when_others_are_silent() {
        assert!(refused(first(None, silent(), member(3, X))));
        assert!(refused(first(None, empty(2), member(3, X))));
        assert!(refused(first(Some(X), empty(2), member(3, X))));
        assert!(refused(first(Some(Y), empty(2), member(3, X))));
        assert!(refused(decide(&peers(), 2, None, &[member(1, X), empty(2), silent()])));
    }

    #[test]
    fn a_crash_after_the_own_identity_goes_on_with_the_same_cluster() {
        assert_eq!(first(Some(X), empty(2), empty(3)), Decision::Form { adopt: Some(X), assign: vec![1, 2] });
        assert_eq!(first(Some(X), assigned(2, X, 2), empty(3)), Decision::Form { adopt: Some(X), assign: vec![2] });
        assert_eq!(
            first(Some(X), assigned(2, X, 2), assigned(3, X, 3)),
            Decision::Form { adopt: Some(X), assign: vec![] }
        );
    }

    #[test]
    fn a_first_node_that_lost_its_folder_while_forming_adopts_what_a_peer_was_given() {
        assert_eq!(first(None, assigned(2, X, 2), empty(3)), Decision::Form { adopt: Some(X), assign: vec![2] });
    }

    #[test]
    fn two_clusters_or_a_wrong_place_refuse() {
        assert!(refused(first(None, assigned(2, X, 2), assigned(3, Y, 3))));
        assert!(refused(first(Some(X), assigned(2, Y, 2), empty(3))));
        assert!(refused(first(None, assigned(2, X, 3), empty(3))));
    }

    #[test]
    fn a_single_node_forms_at_once() {
        let alone = &peers()[..1];
        assert_eq!(decide(alone, 0, None, &[silent()]), Decision::Form { adopt: None, assign: vec![] });
    }

    #[test]
    fn an_assignment_is_taken_once_and_repeated_only_as_it_was() {
        let hash = list_hash(&peers());
        let a = Assignment { cluster_id: X, raft_id: 2, name: "node-2".into(), list_hash: hash };
        assert!(accept(&a, "node-2", hash, None).is_ok());
        assert!(accept(&a, "node-2", hash, Some((X, 2))).is_ok());
        assert!(accept(&a, "node-2", hash, Some((X, 3))).is_err());
        assert!(accept(&a, "node-2", hash, Some((Y, 2))).is_err());
        assert!(accept(&a, "node-3", hash, None).is_err());
        assert!(accept(&a, "node-2", hash + 1, None).is_err());
    }
}
