//! All named places at which tests end the process or one of its tasks, in one list: `tests/kill_points.rs` kills real
//! servers at each of them. See `stemedb_raft::fail_point`.

use stemedb_raft::fail_point;

use crate::{
    node::{flows, members, rebuild},
    state::engine,
};

/// Where the tasks pass that are vital, each by its name; the node must end when one of them dies.
pub const TASKS: &[&str] = &["task.apply", "task.upkeep"];

/// Where a node has the outcome of a write and has told nobody: the answer is lost with it. `tests/balancers` kills
/// leaders there, behind load balancers.
pub const ANSWERS: &[&str] = &["answer.committed"];

/// Where the process may be killed while it looks after its own files.
pub fn points() -> impl Iterator<Item = &'static str> {
    [fail_point::POINTS, engine::POINTS, rebuild::fail_point::POINTS].into_iter().flatten().copied()
}

/// Where the process may be killed while it runs a flow: a drain, an undrain, a failover, a change of the members.
pub fn flows() -> impl Iterator<Item = &'static str> {
    let flows = [flows::DRAIN_POINTS, flows::UNDRAIN_POINTS, flows::FAILOVER_POINTS, members::lead::POINTS];
    flows.into_iter().flatten().copied()
}

/// Whether a point is in any list: those above, and those at which a test holds or ends a step within its own process.
#[cfg(debug_assertions)]
pub(crate) fn is_known(point: &str) -> bool {
    let others = [rebuild::fail_point::TREE_POINTS, &engine::receive::STEPS, ANSWERS, flows::FAILOVER_MISSED_POINTS];
    points().chain(flows()).chain(others.into_iter().flatten().copied()).any(|known| known == point)
}

/// Where a task may die.
pub fn tasks() -> impl Iterator<Item = &'static str> {
    fail_point::TASKS.iter().chain(TASKS).copied()
}

/// Passes the point of [`ANSWERS`].
pub(crate) fn committed_and_unanswered() {
    for point in ANSWERS {
        fail_point::pass(point);
    }
}

/// Passes a point of [`TASKS`].
pub(crate) fn task(point: &'static str) {
    debug_assert!(TASKS.contains(&point), "{point} is in no list");
    fail_point::pass(point);
}
