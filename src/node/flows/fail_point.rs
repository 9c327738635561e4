//! Where a test holds a flow, so that the node can be killed there: before each step.
//!
//! In a release build there are none. A test in one process arms a point for a data folder with
//! `rebuild::fail_point::arm`, and the flow stays there until its job is cancelled or its node ends; a server process
//! aborts at the point that `STEMEDB_TEST_FAIL_POINT` names.

use std::path::Path;

use super::{
    super::{process::Process, rebuild::fail_point},
    FlowError,
    board::Job,
};
use crate::admin::{drain, failover};

/// The points of a drain, in the order of the flow.
pub const DRAIN_POINTS: &[&str] = &[
    "drain.raise_flag",
    "drain.ask",
    "drain.persist",
    "drain.close",
    "drain.hand_over",
    "drain.await_notice",
    "drain.await_requests",
    "drain.finish",
];

/// The points of an undrain, and of a drain that is cancelled, in the order of the flow.
pub const UNDRAIN_POINTS: &[&str] = &["undrain.persist", "undrain.open"];

/// The points of a failover, in the order of the flow.
pub const FAILOVER_POINTS: &[&str] = &["failover.trigger", "failover.await", "failover.confirm", "failover.done"];

/// The same where no candidate has taken over: passed only when all of them hang, which `tests/flows/killed.rs` arranges.
pub const FAILOVER_MISSED_POINTS: &[&str] = &["failover.await_election"];

/// The point before a step; `None` before one that does nothing.
pub fn of_drain(step: drain::Step) -> Option<&'static str> {
    use drain::Step;
    Some(match step {
        Step::RaiseFlag => "drain.raise_flag",
        Step::Ask => "drain.ask",
        Step::Persist => "drain.persist",
        Step::Close => "drain.close",
        Step::HandOver => "drain.hand_over",
        Step::AwaitNotice => "drain.await_notice",
        Step::AwaitRequests => "drain.await_requests",
        Step::Finish => "drain.finish",
        Step::RefuseHeld | Step::RefuseRisky | Step::Undo | Step::Rest => return None,
    })
}

/// The point before a step; `None` before the end of one that was given up.
pub fn of_failover(step: failover::Step) -> Option<&'static str> {
    use failover::Step;
    Some(match step {
        Step::Trigger => "failover.trigger",
        Step::Await => "failover.await",
        Step::Confirm => "failover.confirm",
        Step::Done => "failover.done",
        Step::AwaitElection => "failover.await_election",
        Step::GiveUp => return None,
    })
}

/// Passes the point, or stays there.
pub async fn pass(data_dir: &Path, point: Option<&'static str>, job: &Job) {
    if let Some(point) = point
        && fail_point::hit(data_dir, point).is_err()
    {
        job.cancel().cancelled().await;
    }
}

/// The same where there is nothing to cancel: stays there until the process stops.
pub async fn pass_until_stop(process: &Process, point: &'static str) -> Result<(), FlowError> {
    if fail_point::hit(&process.config.node.data_dir, point).is_err() {
        process.stop.cancelled().await;
        return Err(FlowError::Impossible("this node is stopping".to_owned()));
    }
    Ok(())
}
