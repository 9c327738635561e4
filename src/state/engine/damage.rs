//! The first damage of a tree, kept for whoever repairs it.
//!
//! Reads, compactions, checkpoints and the scrubber report here. The node watches: while there is
//! damage, the tree still serves what it can read (each block verifies itself), and the node
//! replaces it. A tree that takes its place begins without.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

use super::EngineError;

/// What was found, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TreeDamage {
    /// The file; `None` when only the rows show it.
    pub file: Option<PathBuf>,
    /// What is wrong with it.
    pub what: String,
    /// Who found it: `get`, `scan`, `compact`, `checkpoint`, `scrub`, `open`, `apply`.
    pub operation: &'static str,
    /// Folder of the tree.
    pub tree: PathBuf,
}

impl TreeDamage {
    /// The damage that an error is, if it is one.
    pub fn of(error: &EngineError, tree: &Path) -> Option<TreeDamage> {
        match error {
            EngineError::Io { .. } => None,
            EngineError::Damaged { operation, file, what } => {
                Some(TreeDamage { file: file.clone(), what: what.clone(), operation, tree: tree.to_owned() })
            }
        }
    }
}

impl std::fmt::Display for TreeDamage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}: {} (found by {})", file.display(), self.what, self.operation),
            None => write!(f, "{}: {} (found by {})", self.tree.display(), self.what, self.operation),
        }
    }
}

/// Where damage is reported. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct DamageBoard {
    first: Arc<watch::Sender<Option<TreeDamage>>>,
}

impl DamageBoard {
    /// The first one stays. True when this was it.
    pub fn report(&self, damage: TreeDamage) -> bool {
        self.first.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                tracing::error!(%damage, "the tree is damaged");
                *known = Some(damage);
            }
            first
        })
    }

    /// Changes with the first damage, and when the damaged tree is replaced.
    pub fn watch(&self) -> watch::Receiver<Option<TreeDamage>> {
        self.first.subscribe()
    }

    /// What is known now.
    pub fn known(&self) -> Option<TreeDamage> {
        self.first.borrow().clone()
    }

    /// The tree in this folder was replaced: its damage is history.
    pub(crate) fn forget(&self, tree: &Path) {
        self.first.send_if_modified(|known| {
            let its = known.as_ref().is_some_and(|damage| damage.tree == tree);
            if its {
                *known = None;
            }
            its
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn damage(tree: &str, what: &str) -> TreeDamage {
        TreeDamage { file: None, what: what.into(), operation: "get", tree: tree.into() }
    }

    #[test]
    fn the_first_damage_stays_until_its_tree_is_replaced() {
        let board = DamageBoard::default();
        let watch = board.watch();
        assert!(board.report(damage("g1", "first")) && !board.report(damage("g1", "second")));
        assert_eq!(watch.borrow().as_ref().unwrap().what, "first");
        board.forget(Path::new("g2"));
        assert!(board.known().is_some(), "another tree's");
        board.forget(Path::new("g1"));
        assert!(watch.borrow().is_none() && board.report(damage("g2", "third")));
    }
}
