//! Nodes become members and leave: who does what.
//!
//! ```text
//!  an operator ─► order (at the leader) ─► intent: a row of the state ─► lead (whoever leads) ─► Raft's members
//!                    │ candidate?                ▲ TakePlace                │ LookAgain
//!                    ▼                           │                          ▼
//!  a new node: standing? "awaited" ─► rebuild: ask ─► join          a removed node: removed
//! ```
//!
//! The decision what comes next is `admin::member`, the rules are `state::members`. A node that comes takes the way of a
//! rebuild (`node::rebuild`), with a place instead of a permit: it takes no copy of anything away.

mod candidate;
mod desk;
pub mod join;
pub mod lead;
mod order;
pub mod removed;
pub mod standing;

use stemedb_raft::types::StoredMembership;

use super::{
    core::{Core, Shared},
    rebuild::desk::JobReport,
};
use crate::{
    admin::member::Outlook,
    state::{engine::StateRead, keys, level::LEVEL_MEMBERS, members::MemberBook},
};

pub use self::{
    candidate::{Candidate, answer as candidate_answer, candidate},
    desk::{Gone, MembersDesk, all, one, wait_ended},
    order::{MemberOrder, MemberPlan, NotUndone, Ordered, cancel, order},
};

/// Why an order about members was not taken. Nothing was changed, unless it says that this is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// Another change of the members goes on.
    #[error("job {} ({} of {}) goes on", .0.id, .0.kind, .0.node)]
    Busy(Box<JobReport>),
    /// No member has that name.
    #[error("there is no member {name:?}; the members are {}", members.join(", "))]
    Unknown {
        /// The name given.
        name: String,
        /// The names there are.
        members: Vec<String>,
    },
    /// The name or an address is taken.
    #[error("{what} is taken: {by} is a member already")]
    Exists {
        /// The name or address.
        what: String,
        /// Whose it is.
        by: String,
    },
    /// The node that is to come cannot be asked.
    #[error("no node answers at {addr} ({why})")]
    Unreachable {
        /// Its address.
        addr: String,
        /// Why not.
        why: String,
    },
    /// The node that answers cannot come.
    #[error("{0}")]
    Unfit(String),
    /// What it would do to fault tolerance.
    #[error("{why}")]
    Unsafe {
        /// In figures.
        outlook: Box<Outlook>,
        /// One sentence.
        why: String,
        /// Whether `force` would do it all the same.
        forcible: bool,
    },
    /// A member does not know commands about members yet.
    #[error("the members change from feature level {LEVEL_MEMBERS} on, and the cluster is at {level}: {why}")]
    Level {
        /// The level that the cluster has reached.
        level: u32,
        /// Who holds it there.
        why: String,
    },
    /// It is not possible here and now.
    #[error("{0}")]
    Impossible(String),
    /// It was proposed, and what came of it was not heard.
    #[error("whether job {job} has begun is not known ({why})")]
    OutcomeUnknown {
        /// The id under which it goes on, if it does.
        job: String,
        /// Why.
        why: String,
    },
    /// This node does not lead; the name of the one that does.
    #[error("this node does not lead")]
    NotLeader(Option<String>),
}

/// The row as this node has applied it. Blocking, for as long as a read of one row.
pub fn book_here(core: &Core) -> Result<MemberBook, String> {
    let view = core.state.view().ok_or("this node is stopping")?;
    let row = view.snapshot.get(keys::MEMBERS).map_err(|e| e.to_string())?;
    MemberBook::decode(row.as_deref()).map_err(|e| e.to_string())
}

/// The same on a thread that may wait for the disk.
pub async fn book(shared: &Shared) -> Result<MemberBook, String> {
    let core = shared.core.get().ok_or("the state of this node is not open")?;
    let view = core.state.view().ok_or("this node is stopping")?;
    tokio::task::spawn_blocking(move || {
        let row = view.snapshot.get(keys::MEMBERS).map_err(|e| e.to_string())?;
        MemberBook::decode(row.as_deref()).map_err(|e| e.to_string())
    })
    .await
    .map_err(|e| e.to_string())?
}

/// Every Raft id of a name.
pub fn ids_of(membership: &StoredMembership, name: &str) -> Vec<u64> {
    membership.nodes().filter(|(_, member)| member.name == name).map(|(id, _)| *id).collect()
}

/// Whether a change of the members is half done.
pub fn is_joint(membership: &StoredMembership) -> bool {
    membership.membership().get_joint_config().len() > 1
}
