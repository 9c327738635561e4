//! The end of a process: out of traffic, leadership elsewhere, requests answered, within a deadline.
//!
//! It asks nobody: whatever other nodes do, this one has been told to stop. A drained node has all of that behind it.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until, timeout};

use crate::{
    admin::drain::Mark,
    node::{handover, process::Process},
};

/// Returns once the node may stop, or its time is over.
pub async fn stop_gently(process: &Arc<Process>) {
    let limit = Duration::from_millis(process.config.cluster.stop_deadline_ms);
    if timeout(limit, leave(process)).await.is_err() {
        tracing::warn!(?limit, "the time to stop is over; what is under way ends now");
    }
}

async fn leave(process: &Arc<Process>) {
    let Some(shared) = process.current() else { return };
    let was_drained = process.flows.drain.mark() == Mark::Drained;
    if !was_drained {
        process.flows.drain.set(Mark::Draining);
    }
    handover::hand_over(&shared).await;
    if was_drained {
        return;
    }
    // A node alone leaves its traffic to nobody: nothing is gained by waiting.
    let has_others = shared.view.borrow().membership.nodes().nth(1).is_some();
    if has_others {
        let out_since = process.flows.drain.known().out_since.unwrap_or_else(Instant::now);
        sleep_until(out_since + Duration::from_millis(process.config.cluster.drain_notice_ms)).await;
    }
    process.flows.traffic.so_far().wait().await;
}
