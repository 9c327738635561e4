//! Carries out the flows of `admin` on this node: drain, undrain and failover.
//!
//! ```text
//!  order ─► Board (one at a time) ─► a task of the process: View ─► admin::…::next ─► Step ─► ...
//!                    │                                  ▲ asks the members, watches leader and requests
//!                    └► what `/v1/admin/jobs` shows
//! ```
//!
//! A drain belongs to the process and not to an incarnation of the node: a rebuild does not end it. It is told to the
//! others with this node's status, and the order outlasts a restart only if that was asked for (`mark`). Jobs are
//! forgotten with their process (decision 14): a flow whose node dies has no other state than leadership, which an
//! election moves.

mod board;
mod compact;
mod drain;
pub(crate) mod fail_point;
mod failover;
mod mark;
mod members;
mod stop;
mod traffic;

use std::{path::Path, sync::Arc};

use tokio::{
    sync::{Mutex, MutexGuard},
    time::{Instant, timeout_at},
};

use super::{files::FileError, rebuild::desk::JobReport};
use crate::admin::{
    drain::{Mark, Tolerance},
    failover::Refusal,
};

pub use self::fail_point::{DRAIN_POINTS, FAILOVER_MISSED_POINTS, FAILOVER_POINTS, UNDRAIN_POINTS};
pub use self::{
    board::{Board, NotCancelled},
    compact::order_compact,
    drain::{DrainOrder, DrainPlan, order_drain, order_undrain, plan_drain},
    failover::{Candidate, FailoverPlan, move_leadership, order_failover, plan_failover},
    mark::{DrainMark, DrainWatch},
    members::{Asked, ask_all, candidates, ill, lags},
    stop::stop_gently,
    traffic::Traffic,
};

/// What the flows of one process share.
pub struct Flows {
    /// The jobs.
    pub board: Arc<Board>,
    /// Compactions: they are in nobody's way.
    pub compactions: Arc<Board>,
    /// How far out of traffic this node is.
    pub drain: DrainWatch,
    /// Requests of clients that are under way.
    pub traffic: Traffic,
    /// Held by whoever has leadership moved.
    moving: Mutex<()>,
}

impl Flows {
    /// Of a process over this folder, which may have been drained before for longer than one process.
    pub fn open(data_dir: &Path) -> Result<Flows, FileError> {
        Ok(Flows {
            board: Board::new(),
            compactions: Board::new(),
            drain: DrainWatch::open(data_dir)?,
            traffic: Traffic::default(),
            moving: Mutex::default(),
        })
    }

    /// The right to have leadership moved, until the answer is dropped: of two candidates who are asked at the same time
    /// both stand, and an election decides. `None`: another transfer did not end by `deadline`.
    pub async fn move_alone(&self, deadline: Instant) -> Option<MutexGuard<'_, ()>> {
        timeout_at(deadline, self.moving.lock()).await.ok()
    }
}

/// Why a flow was not begun, or not gone on with. Nothing is left of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// Another flow goes on here.
    #[error("job {} ({}) goes on here", .0.id, .0.kind)]
    Busy(Box<JobReport>),
    /// Another node is out of traffic, or on its way.
    #[error("{by} is {}", .mark.word())]
    Held {
        /// Its name.
        by: String,
        /// How far it is.
        mark: Mark,
    },
    /// The cluster could not go on without this node.
    #[error("{}", .0.words(.1))]
    Risky(Tolerance, String),
    /// Leadership cannot be moved so.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It is not possible here and now.
    #[error("{0}")]
    Impossible(String),
    /// This node does not lead; the name of the one that does.
    #[error("this node does not lead")]
    NotLeader(Option<String>),
    /// The operator or the end of the process came before.
    #[error("it was cancelled")]
    Cancelled,
}
