//! A request's hold on the incarnation that has taken it.
//!
//! A node whose disk has failed comes back as another incarnation in the same process (`process`), and what the one
//! before has taken is answered by that one: it goes on, as a proxy, for as long as anybody holds it. A read asks it what
//! it can still say: one that waits on an incarnation which will never get there is told so at once, and begins anew.

use std::{
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::{
    Node,
    core::Shared,
    read::{self, Consistency, ReadError},
    status, submit,
};
use crate::{
    state::command::{CommandKey, Operation},
    store_helpers::StoreView,
};

/// The hold. To be kept until the request is answered.
pub struct Taken<'a> {
    node: &'a Node,
    shared: Arc<Shared>,
    _request: TaskTrackerToken,
}

impl Node {
    /// Takes a request.
    pub fn take(&self) -> Taken<'_> {
        loop {
            let shared = self.shared();
            let request = shared.requests.token();
            // An incarnation ends when the next one has its place and nobody holds it. Either this sees the next one
            // here, or that end sees this hold: one that is neither would be answered with "stopping".
            fence(Ordering::SeqCst);
            if Arc::ptr_eq(&shared, &self.shared()) {
                return Taken { node: self, shared, _request: request };
            }
        }
    }
}

impl Taken<'_> {
    /// A view of the state that is as fresh as `consistency` asks for, by `deadline`.
    pub async fn read(&self, consistency: Consistency, deadline: Instant) -> Result<StoreView, ReadError> {
        read::read(&self.shared, consistency, deadline).await
    }

    /// Submits a command, see `Node::submit`.
    pub(super) async fn submit(
        &self,
        op: Operation,
        key: Option<CommandKey>,
        body_hash: u128,
    ) -> Result<submit::Submitted, submit::SubmitError> {
        submit::submit(&self.shared, op, key, body_hash).await
    }

    /// Why this incarnation has no answer of its own any more, if so.
    pub fn silent(&self) -> Option<String> {
        self.shared.silenced().or_else(|| self.is_replaced().then(|| "this node has just been rebuilt".to_owned()))
    }

    /// Returns once that is so, with the reason.
    pub async fn wait_silent(&self) -> String {
        if let Some(why) = self.silent() {
            return why;
        }
        self.shared.silences().await;
        // Nothing else ends it but the end of its process.
        self.silent().unwrap_or_else(|| "this node is stopping".to_owned())
    }

    /// Whether the next incarnation has its place.
    pub fn is_replaced(&self) -> bool {
        !Arc::ptr_eq(&self.shared, &self.node.shared())
    }

    /// Whether the state here has yet to reach what was committed when it was opened.
    pub fn is_behind(&self) -> bool {
        self.shared.core.get().is_some() && !*self.shared.caught_up.borrow()
    }

    /// Whether the leader is out of reach, and another node has a way to it: the state here gets nothing new.
    pub fn is_bypassed(&self) -> bool {
        self.shared.way.borrow().through.is_some()
    }

    /// Returns once that is so.
    pub async fn wait_bypassed(&self) {
        let mut way = self.shared.way.subscribe();
        if way.wait_for(|way| way.through.is_some()).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns once this node is cut off, with the reason.
    pub async fn wait_cut_off(&self) -> String {
        let mut way = self.shared.way.subscribe();
        match way.wait_for(|way| way.cut_off.is_some()).await.map(|way| way.cut_off.clone()) {
            Ok(why) => why.unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Returns when it is still behind after `patience`.
    pub async fn stays_behind(&self, patience: Duration) {
        if self.is_behind() {
            tokio::time::sleep(patience).await;
        }
        if !self.is_behind() {
            std::future::pending::<()>().await;
        }
    }
}

impl Node {
    /// `host:port` of the HTTP listeners of the other members, the leader's first; those of the configured peers while no
    /// member is known.
    pub fn other_http_addrs(&self) -> Vec<String> {
        let known = status::other_http_addrs(&self.shared());
        if !known.is_empty() {
            return known;
        }
        let others = self.process.peers.iter().filter(|peer| peer.name != self.name() && !peer.http.is_empty());
        others.map(|peer| peer.http.clone()).collect()
    }
}
