//! Runs the scrubber for as long as the node runs.

use std::sync::Arc;

use tokio::runtime::Handle;

use super::core::Shared;
use super::scrub_log::LogSource;
use crate::metrics::Metrics;
use crate::state::engine::scrub::{RealClock, ScrubSource, Scrubber};

/// What is read, in this order: the tree, the newest checkpoint, the sealed segments of the log. Nothing before the
/// core runs. To be called within the runtime.
pub fn sources(shared: &Shared) -> Vec<Arc<dyn ScrubSource>> {
    let Some(core) = shared.core.get() else { return Vec::new() };
    let mut sources = core.state.scrub_sources();
    if let Some(wal) = shared.wal() {
        sources.push(Arc::new(LogSource {
            wal: wal.clone(),
            dir: shared.config.wal_dir(),
            runtime: Handle::current(),
            stop: shared.core_stop.clone(),
        }));
    }
    sources
}

/// Scrubs until the node stops; nothing when the key says so.
pub async fn run(shared: Arc<Shared>) {
    if shared.core.get().is_none() {
        return;
    }
    let bytes_per_s = shared.config.storage.scrub_mb_per_s.saturating_mul(1024 * 1024);
    if bytes_per_s == 0 {
        return;
    }
    let mut scrubber = Scrubber::new(
        &shared.config.node.data_dir,
        sources(&shared),
        bytes_per_s,
        Arc::<Metrics>::clone(&shared.metrics),
        Arc::new(RealClock),
        shared.core_stop.clone(),
    );
    // A thread of its own: it waits for most of its life, and a runtime that ends waits for its blocking tasks.
    let (ended, end) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::Builder::new().name("scrub".into()).spawn(move || {
        scrubber.run();
        drop((scrubber, ended));
    });
    match thread {
        Ok(_ends_by_itself) => {
            // Nothing is ever sent: the sender goes when the thread has let go of the files.
            let _gone = end.await;
            if !shared.core_stop.is_cancelled() {
                tracing::error!("the scrubber has died of a defect; nothing else depends on it");
            }
        }
        Err(error) => tracing::error!(%error, "the scrubber could not be started"),
    }
}
