//! The outgoing connections of this node: one for each other node and lane.
//!
//! A connection is made when it is first needed, and made anew when a node's address changes.
//! Everything that sends to a node asks here, so that heartbeats, log and bulk never share one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use stemedb_net::{Lane, Limits, LocalIdentity, LocalProvider, Peer, PeerHello, Refusal, ReplyCheck, code};

use super::boots::SeenBoots;

/// The connections. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    local: Arc<ArcSwap<LocalIdentity>>,
    limits: Limits,
    boots: SeenBoots,
    open: Mutex<HashMap<(u64, Lane), (String, Peer)>>,
}

impl Peers {
    /// No connection yet. The identity is taken for each frame as it is then.
    pub fn new(local: Arc<ArcSwap<LocalIdentity>>, limits: Limits, boots: SeenBoots) -> Peers {
        Peers { inner: Arc::new(Inner { local, limits, boots, open: Mutex::default() }) }
    }

    /// The connection to node `id` at `addr` for `lane`.
    pub fn to(&self, id: u64, addr: &str, lane: Lane) -> Peer {
        let mut open = self.inner.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, peer)) = open.get(&(id, lane))
            && known == addr
        {
            return peer.clone();
        }
        let peer = self.connect(id, addr, lane);
        open.insert((id, lane), (addr.to_owned(), peer.clone()));
        peer
    }

    /// A connection to whoever answers at `addr`, for messages that need no identity.
    pub fn probe(&self, addr: &str) -> Peer {
        self.connect(0, addr, Lane::Control)
    }

    /// Ends every connection.
    pub fn close(&self) {
        let mut open = self.inner.open.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, (_, peer)) in open.drain() {
            peer.close();
        }
    }

    fn connect(&self, id: u64, addr: &str, lane: Lane) -> Peer {
        let local = Arc::clone(&self.inner.local);
        let provider: LocalProvider = Arc::new(move || **local.load());
        let boots = self.inner.boots.clone();
        // An answer of an old copy must not count either: its vote or acknowledgement could lose data.
        let check: ReplyCheck = Arc::new(move |from: &PeerHello| match boots.observe(from.node_id, from.boot) {
            Ok(()) => Ok(()),
            Err(stale) => Err(Refusal::new(code::STALE_BOOT, stale.to_string())),
        });
        Peer::with_reply_check(provider, addr.to_owned(), id, lane, self.inner.limits.clone(), check)
    }
}
