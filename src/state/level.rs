//! Feature levels: what a cluster may put into its log while its nodes run programs of different versions.
//!
//! Every node applies every command alike, so a command that one of them does not know must never be committed. The
//! cluster has one level, a number in the replicated state that only rises; a program knows all levels up to
//! [`FEATURE_LEVEL`]. A command that came with a level is proposed once the cluster has reached it
//! (`node::proposer`), and the level is raised once every member has said that it knows it (`node::level`). From then
//! on a program that knows less refuses to open the state.
//!
//! | level | brought |
//! |---|---|
//! | 0 | assertions, votes, epochs, supersessions, imports, permits to rebuild |
//! | 1 | changes of the members; the level itself; ids of load balancers are kept for as long as these may repeat |

use serde::{Deserialize, Serialize};

use super::command::{MemberCommand, Operation};

/// The highest level that this program knows.
pub const FEATURE_LEVEL: u32 = 1;

/// The level that brought changes of the members.
pub const LEVEL_MEMBERS: u32 = 1;

/// The level from which on ids of load balancers are kept for as long as these may repeat a request.
pub const LEVEL_BALANCER_KEYS: u32 = 1;

/// The cluster goes up to a level. Never taken from clients: the leader makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RaiseLevel {
    /// The level; one that is reached already changes nothing.
    pub level: u32,
}

/// The level that a cluster must have reached before an operation may be proposed.
pub fn needed(op: &Operation) -> u32 {
    match op {
        Operation::Assert(_)
        | Operation::Vote(_)
        | Operation::Epoch(_)
        | Operation::Supersede(_)
        | Operation::ImportChunk { .. }
        | Operation::Rebuild(_)
        // Whoever proposes it has asked everybody first.
        | Operation::Level(_) => 0,
        Operation::Members(MemberCommand::Begin(_)) => LEVEL_MEMBERS,
        // What has begun goes on.
        Operation::Members(_) => 0,
    }
}

/// Why a state at this level must not be opened or gone on with by this program, if so.
pub fn unknown(level: u32) -> Option<String> {
    (level > FEATURE_LEVEL).then(|| {
        format!(
            "the state has feature level {level}, this program knows levels up to {FEATURE_LEVEL}: start a newer version of it"
        )
    })
}
