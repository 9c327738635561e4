//! Who speaks, and whom they mean.
//!
//! A node that was copied, restored from an old image or wired to the wrong cluster must not be listened to: its votes
//! and answers could lose committed data. So every frame carries cluster id, sender, target and the sender's boot
//! count, and [`judge`] says from these alone whether a request may be handled. An empty node, which has no identity
//! yet, may only probe. Where the highest boot counts are kept is the caller's matter.

use std::{net::SocketAddr, sync::Arc};

use crate::{Lane, Refusal, code};

/// Drawn once when a cluster forms. All zero stands for "none yet".
pub type ClusterId = [u8; 16];

/// Kinds below this number are probes: they need no identity on either side and carry at most
/// [`crate::Limits::control_bytes_max`] bytes.
pub const PROBE_KINDS: u16 = 16;

/// Low bits of a boot that are drawn at each start. A copy of a folder that was taken at a stop and is put back after
/// one more run has the count of that run, and only these bits tell the two apart.
const DRAWN_BITS: u32 = 24;

/// What a node speaks with in one run: its boot count, which it has raised and synced, and bits drawn for this run.
pub fn boot_of(count: u64, drawn: u64) -> u64 {
    (count << DRAWN_BITS) | (drawn & ((1 << DRAWN_BITS) - 1))
}

/// Whether who speaks with `boot` runs on an older copy of the folder of whom `highest` was seen.
pub fn is_old_copy(boot: u64, highest: u64) -> bool {
    let count = |boot: u64| boot >> DRAWN_BITS;
    boot < highest || (boot != highest && count(boot) == count(highest) && count(boot) > 0)
}

/// Set in the ids of guests. Raft ids are given out upwards from 1 and never come near it.
const GUEST: u64 = 1 << 63;
/// What guests speak with: no promise of theirs is ever remembered.
const GUEST_BOOT: u64 = 1;

/// Whether an id is that of a guest: a node that has lost its files, knows the cluster and waits for its place there. It
/// passes on what its clients send, and its word counts for nothing else.
pub fn is_guest(node_id: u64) -> bool {
    node_id & GUEST != 0
}

/// The identity of this node at one moment. All zero: it has none yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalIdentity {
    /// The cluster this node belongs to.
    pub cluster_id: ClusterId,
    /// Its Raft id, never used twice in a cluster. 0 for none.
    pub node_id: u64,
    /// See [`boot_of`].
    pub boot: u64,
}

impl LocalIdentity {
    /// That of a guest; `drawn` tells guests apart.
    pub fn guest(cluster_id: ClusterId, drawn: u64) -> LocalIdentity {
        LocalIdentity { cluster_id, node_id: GUEST | drawn, boot: GUEST_BOOT }
    }

    /// Whether the node has a Raft id, as a member or on its way to be one.
    pub fn has_raft_id(&self) -> bool {
        self.node_id != 0 && !is_guest(self.node_id)
    }

    /// Whether the node belongs to a cluster.
    pub fn is_joined(&self) -> bool {
        self.cluster_id != [0; 16] && self.node_id != 0
    }
}

/// Tells the present identity; it changes while running when an empty node joins. Called for every frame, so it must
/// be quick and must not block.
pub type LocalProvider = Arc<dyn Fn() -> LocalIdentity + Send + Sync>;

/// What the other side says about itself in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerHello {
    /// The cluster the sender believes both are in.
    pub cluster_id: ClusterId,
    /// The sender's Raft id; 0 for none.
    pub node_id: u64,
    /// The Raft id the sender means to reach; 0 when it does not know.
    pub target_id: u64,
    /// The sender's boot, see [`boot_of`].
    pub boot: u64,
    /// The lane the connection was opened for.
    pub lane: Lane,
    /// Address of the other end of the connection.
    pub addr: SocketAddr,
}

/// Whether a request of this kind with this header may be handled by `local`, when `boot_highest` is the highest boot
/// seen so far from that sender (`None`: none seen). Pure.
pub fn judge(local: &LocalIdentity, hello: &PeerHello, kind: u16, boot_highest: Option<u64>) -> Result<(), Refusal> {
    if kind < PROBE_KINDS {
        return Ok(());
    }
    if !local.is_joined() {
        return Err(Refusal::new(code::NO_IDENTITY, "this node does not belong to a cluster yet"));
    }
    if hello.cluster_id == [0; 16] || hello.node_id == 0 {
        return Err(Refusal::new(code::NO_IDENTITY, "the sender does not belong to a cluster yet"));
    }
    if hello.cluster_id != local.cluster_id {
        let text = format!("cluster {} meant, this is {}", hex(&hello.cluster_id), hex(&local.cluster_id));
        return Err(Refusal::new(code::WRONG_CLUSTER, text));
    }
    if hello.target_id != local.node_id {
        let text = format!("node {} meant, this is {}", hello.target_id, local.node_id);
        return Err(Refusal::new(code::WRONG_TARGET, text));
    }
    match boot_highest {
        Some(highest) if is_old_copy(hello.boot, highest) => Err(Refusal::new(
            code::STALE_BOOT,
            format!("node {} runs boot {:#x} but boot {highest:#x} was seen: an old copy", hello.node_id, hello.boot),
        )),
        _ => Ok(()),
    }
}

/// The lower-case hexadecimal form of a cluster id.
pub(crate) fn hex(id: &ClusterId) -> String {
    format!("{:032x}", u128::from_be_bytes(*id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_runs_with_one_count_are_told_apart() {
        let (first, other, later) = (boot_of(5, 70), boot_of(5, 71), boot_of(6, 0));
        assert!(!is_old_copy(first, first));
        assert!(is_old_copy(first, other) && is_old_copy(other, first), "whichever was seen first counts");
        assert!(is_old_copy(other, later) && !is_old_copy(later, other));
        // What was noted before runs had drawn bits, and what no run speaks with.
        assert!(!is_old_copy(first, 9) && is_old_copy(8, 9) && !is_old_copy(9, 8));
    }

    fn local() -> LocalIdentity {
        LocalIdentity { cluster_id: [7; 16], node_id: 2, boot: 5 }
    }

    fn hello() -> PeerHello {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        PeerHello { cluster_id: [7; 16], node_id: 1, target_id: 2, boot: 9, lane: Lane::Log, addr }
    }

    fn code_of(local: LocalIdentity, hello: PeerHello, kind: u16, highest: Option<u64>) -> u16 {
        judge(&local, &hello, kind, highest).map_or_else(|refusal| refusal.code, |()| 0)
    }

    #[test]
    fn matching_identities_are_admitted() {
        assert_eq!(code_of(local(), hello(), PROBE_KINDS, None), 0);
        assert_eq!(code_of(local(), hello(), PROBE_KINDS, Some(9)), 0);
        assert_eq!(code_of(local(), hello(), PROBE_KINDS, Some(8)), 0);
    }

    #[test]
    fn each_mismatch_has_its_own_refusal() {
        let kind = PROBE_KINDS;
        assert_eq!(code_of(local(), hello(), kind, Some(10)), code::STALE_BOOT);
        assert_eq!(code_of(local(), PeerHello { target_id: 3, ..hello() }, kind, None), code::WRONG_TARGET);
        assert_eq!(code_of(local(), PeerHello { target_id: 0, ..hello() }, kind, None), code::WRONG_TARGET);
        assert_eq!(code_of(local(), PeerHello { cluster_id: [8; 16], ..hello() }, kind, None), code::WRONG_CLUSTER);
        assert_eq!(code_of(local(), PeerHello { node_id: 0, ..hello() }, kind, None), code::NO_IDENTITY);
    }

    #[test]
    fn two_empty_nodes_do_not_match_but_may_probe() {
        let empty = PeerHello { cluster_id: [0; 16], node_id: 0, target_id: 0, boot: 0, ..hello() };
        assert_eq!(code_of(LocalIdentity::default(), empty, PROBE_KINDS, None), code::NO_IDENTITY);
        assert_eq!(code_of(LocalIdentity::default(), empty, PROBE_KINDS - 1, None), 0);
        assert_eq!(code_of(local(), PeerHello { cluster_id: [8; 16], ..hello() }, 0, Some(99)), 0);
    }
}
