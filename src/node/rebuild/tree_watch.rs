//! Follows what is known of the tree's damage, and has it repaired.
//!
//! Reads, compactions, checkpoints and the scrubber report to one board (`state::engine::damage`). While the tree is
//! damaged it serves what it can read, since each block verifies itself, and the node goes on voting and logging. It
//! leads only if nobody else can: an apply that meets the damage ends the core.

use std::sync::Arc;

use super::{Need, mark::Mark};
use crate::{
    node::{
        core::{Core, Shared},
        files::{FileError, is_full},
        handover,
        start_error::StartError,
    },
    state::engine::{EngineError, TreeDamage, damage::DamageBoard},
};

/// Runs until the core stops.
pub async fn run(shared: Arc<Shared>) {
    let Some(core) = shared.core.get() else { return };
    let mut damage = core.state.damage();
    let following = async {
        loop {
            let known = damage.borrow_and_update().clone();
            match known {
                Some(damage) => found(&shared, core, &damage).await,
                None => gone(&shared).await,
            }
            // The board lives as long as the core's state.
            if damage.changed().await.is_err() {
                return;
            }
        }
    };
    shared.core_stop.run_until_cancelled(following).await;
}

async fn found(shared: &Shared, core: &Core, damage: &TreeDamage) {
    let mark = Mark { tree: tree_name(damage), why: damage.to_string() };
    let data_dir = shared.config.node.data_dir.clone();
    let marked = tokio::task::spawn_blocking(move || mark.save(&data_dir)).await;
    match marked {
        Ok(Ok(())) => {}
        // The making of its folder may lack room and be no failure.
        Ok(Err(FileError::Io { source, .. })) if !is_full(&source) => {
            core.state.suffer(&EngineError::Io { operation: "mark", source });
        }
        Ok(Err(error)) => tracing::warn!(%error, "the damage of the tree is not noted on the disk"),
        Err(error) => tracing::warn!(%error, "the damage of the tree is not noted on the disk"),
    }
    if core.raft_metrics().membership_config.voter_ids().nth(1).is_none() {
        tracing::error!("{}", help(damage));
        return;
    }
    shared.need.send_if_modified(|need| {
        let new = need.is_none();
        if new {
            *need = Some(Need::Tree(damage.to_string()));
        }
        new
    });
    handover::pass_on(shared, core, "its tree is damaged").await;
}

/// A checkpoint that the leader has sent has replaced it, or there was none.
async fn gone(shared: &Shared) {
    let was_known = shared.need.send_if_modified(|need| need.take_if(|need| matches!(need, Need::Tree(_))).is_some());
    if was_known {
        forget(&shared.config.node.data_dir).await;
    }
}

/// Removes the mark.
pub async fn forget(data_dir: &std::path::Path) {
    let data_dir = data_dir.to_owned();
    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || Mark::remove(&data_dir)).await {
        tracing::warn!(%error, "the mark of a tree that was replaced stays; it means nothing");
    }
}

fn tree_name(damage: &TreeDamage) -> String {
    damage.tree.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Blocking. Tells the board of damage that a process before has found in the tree that was just opened.
pub fn recall(data_dir: &std::path::Path, tree: &std::path::Path, board: &DamageBoard) {
    match Mark::load(data_dir) {
        Ok(Some(mark)) if tree.file_name().is_some_and(|name| name == mark.tree.as_str()) => {
            board.report(TreeDamage { file: None, what: mark.why, operation: "open", tree: tree.to_owned() });
        }
        Ok(Some(_)) => {
            if let Err(error) = Mark::remove(data_dir) {
                tracing::warn!(%error, "the mark of a tree that was replaced stays; it means nothing");
            }
        }
        Ok(None) => {}
        // Whatever is damaged is found again.
        Err(error) => tracing::warn!(%error, "the mark of a damaged tree cannot be read"),
    }
}

/// What an operator can do where no other node helps.
fn help(found: &dyn std::fmt::Display) -> String {
    format!(
        "{found}. Without other nodes the tree can be made anew from the newest local checkpoint and the log, as far as \
         they reach: stop the node, run `stemedb-api --rebuild-from-wal`, and start it again. The old files are kept"
    )
}

/// The refusal of a tree that does not open and cannot be replaced by the node itself.
pub fn refusal(error: StartError) -> StartError {
    match error {
        StartError::State(damage) if damage.is_damage() => StartError::Refused(help(&damage)),
        error => error,
    }
}
