//! Runs the scrubber for as long as the node runs.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::core::Shared;
use crate::metrics::Metrics;
use crate::state::engine::scrub::{RealClock, Scrubber};

/// Scrubs until the node stops; nothing when the key says so.
pub async fn run(shared: Arc<Shared>) {
    let Some(core) = shared.core.get() else { return };
    let bytes_per_s = shared.config.storage.scrub_mb_per_s.saturating_mul(1024 * 1024);
    if bytes_per_s == 0 {
        return;
    }
    let stop = shared.core_stop.child_token();
    let mut scrubber = Scrubber::new(
        &shared.config.node.data_dir,
        core.state.scrub_sources(),
        bytes_per_s,
        Arc::<Metrics>::clone(&shared.metrics),
        Arc::new(RealClock),
        stop.clone(),
    );
    // A thread of its own, not one of the runtime's: it lives as long as the node, it may hang with its disk, and a
    // runtime that ends waits for its own. It is told to end when nobody waits for it any more.
    let _ends_with_this_task = stop.drop_guard();
    let (done, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name("scrub".into()).spawn(move || {
        scrubber.run();
        drop(scrubber);
        // Nobody waits when the runtime has ended.
        let _ = done.send(());
    });
    match thread {
        Ok(_detached) => {
            if ended.await.is_err() {
                tracing::error!("the scrubber has died of a defect; nothing else depends on it");
            }
        }
        Err(error) => tracing::error!(%error, "the scrubber has got no thread; nothing is scrubbed"),
    }
}
