//! An operator's order, looked at before anything is ended.

use std::sync::Arc;

use super::{
    ask::ask_any,
    messages::{Ask, AskReply, Refusal},
};
use crate::node::process::Process;

/// Why an order was not taken. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// No node of that name can be pulled from.
    #[error("{from:?} is no other node of this cluster; the others are {}", others.join(", "))]
    Source {
        /// The name given.
        from: String,
        /// The names there are.
        others: Vec<String>,
    },
    /// It would be unsafe now.
    #[error("a rebuild now could lose data. It waits for {}", waits_for.join("; "))]
    Unsafe {
        /// One sentence for each node.
        waits_for: Vec<String>,
    },
    /// It is not possible at all.
    #[error("{0}")]
    Impossible(String),
    /// The leader could not be asked.
    #[error("no leader could be asked: {0}")]
    NoLeader(String),
}

/// Orders a rebuild of this node, from `from` alone if given. The answer is the job's id.
pub async fn order(process: &Arc<Process>, from: Option<String>) -> Result<String, OrderError> {
    let own = &process.config.node.name;
    let Some(shared) = process.current() else { return Err(OrderError::NoLeader("this node is starting".into())) };
    let membership = Arc::clone(&shared.view.borrow().membership);
    let mut others: Vec<(String, String)> =
        membership.nodes().map(|(_, member)| (member.name.clone(), member.peer_addr.clone())).collect();
    if others.is_empty() {
        others = process.peers.iter().map(|peer| (peer.name.clone(), peer.addr.clone())).collect();
    }
    others.retain(|(name, _)| name != own);
    others.dedup();
    if let Some(from) = &from
        && !others.iter().any(|(name, _)| name == from)
    {
        let others = others.into_iter().map(|(name, _)| name).collect();
        return Err(OrderError::Source { from: from.clone(), others });
    }
    if process.desk.current().is_some() || process.desk.ordered().is_some() {
        return Ok(process.desk.order(from));
    }
    let cluster_id = (**shared.identity.load()).as_ref().map(|id| id.cluster_id);
    let ask = Ask { cluster_id, name: own.clone(), job: 0, automatic: false, dry_run: true, emptied: false };
    let here = shared.view.borrow().leader.as_ref().filter(|l| l.here).map(|l| l.addr.clone());
    let mut addresses: Vec<String> = here.into_iter().collect();
    addresses.extend(others.into_iter().map(|(_, addr)| addr));
    match ask_any(&shared, addresses, &ask).await {
        AskReply::Granted(_) => Ok(process.desk.order(from)),
        AskReply::Refused(Refusal::Waits(waits_for)) => Err(OrderError::Unsafe { waits_for }),
        AskReply::Refused(Refusal::Operator(why)) => Err(OrderError::Impossible(why)),
        AskReply::NotLeader { .. } => Err(OrderError::NoLeader("none is known".into())),
        AskReply::Failed(why) => Err(OrderError::NoLeader(why)),
    }
}
