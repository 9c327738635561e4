//! A node makes itself anew from a replica: after a failed disk, a lost log, an emptied folder, or because an
//! operator wants it.
//!
//! ```text
//!  admin::rebuild::next ─► step ─► runner ──► grant (at the leader)      messages
//!   ▲ view                          ├──► offer (at a replica) ─► pull ─► <data>/rebuild/
//!   └── journal <data>/rebuild/job ─┤
//!                                   └──► swap ─► <data>/quarantine/, then the next incarnation
//! ```
//!
//! A tree that is damaged alone is replaced in a shorter way (`admin::tree`, `tree_steps`): the node keeps its log, its
//! vote and its id.
//!
//! What may be done when is decided in `admin::rebuild` and `grant::may_grant`, both pure, and by the replicated
//! rules of `state::permits`. Clients go on being served through the other nodes all the while.

mod ask;
pub mod desk;
pub mod fail_point;
pub mod grant;
pub mod journal;
mod mark;
pub mod messages;
mod node_steps;
pub mod offer;
pub mod order;
mod part_file;
pub mod probe;
pub mod pull;
mod runner;
pub mod spare;
mod strain;
pub mod swap;
pub mod throttle;
mod tree_steps;
pub mod tree_watch;

pub use ask::{ask_any, membership_of, pulling_identity};
pub use runner::run;

/// What is wrong with an incarnation that a rebuild cures. Whoever finds out sets it in `Shared::need`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// The tree is damaged; log and vote are sound.
    Tree(String),
    /// Log or vote cannot be used any more: the node comes back under a fresh id.
    Node(String),
    /// There is nothing yet: the node is to become a member.
    Place(String),
}

/// Why a node takes the way of a rebuild to come in. It stands in the journal.
pub const PLACE_WHY: &str = "it is being added to the cluster";

impl Need {
    /// Why, one sentence.
    pub fn why(&self) -> &str {
        match self {
            Need::Tree(why) | Need::Node(why) | Need::Place(why) => why,
        }
    }
}
