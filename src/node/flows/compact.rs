//! A compaction that an operator has ordered: a job of this node, beside its flows. It cannot be taken back: what was
//! rewritten is.

use std::sync::Arc;

use super::FlowError;
use crate::node::{process::Process, rebuild::desk::JobState};

/// Begins to compact the tree of this node, all of it with `major`. The answer is the job's id.
pub fn order_compact(process: &Arc<Process>, major: bool) -> Result<String, FlowError> {
    let shared = process.current().filter(|shared| shared.core.get().is_some() && shared.silenced().is_none());
    let not_open = || FlowError::Impossible("the tree of this node is not open".to_owned());
    let engine = shared.as_ref().and_then(|shared| Some(shared.core.get()?.state.engine())).ok_or_else(not_open)?;
    let board = &process.flows.compactions;
    let job = board.begin("compact", &process.config.node.name, "an operator", false).map_err(FlowError::Busy)?;
    let id = job.id().to_owned();
    job.step(if major { "rewriting the whole tree" } else { "compacting" });
    process.vital.spawn("a compaction", async move {
        let before = engine.stats().ok();
        let tree = Arc::clone(&engine);
        let done = tokio::task::spawn_blocking(move || tree.compact_blocking(major)).await;
        let after = engine.stats().ok();
        let bytes = before.zip(after).map_or_else(String::new, |(before, after)| {
            let (from, to) = (before.table_bytes, after.table_bytes);
            format!("; {from} bytes in {} files before, {to} in {} now", before.table_count, after.table_count)
        });
        match done {
            Ok(Ok(true)) => job.end(JobState::Finished, format!("the tree was compacted{bytes}")),
            Ok(Ok(false)) => job.end(JobState::Finished, format!("there was nothing to do{bytes}")),
            Ok(Err(error)) => job.end(JobState::Failed, error.to_string()),
            Err(died) => job.end(JobState::Failed, died.to_string()),
        }
    });
    Ok(id)
}
