//! Named places at which a test ends a rebuild, as a kill of the process would.
//!
//! Only builds with debug assertions have them: in a release build [`hit`] is empty. A test in one process arms a
//! point for a data folder; server processes abort there as `stemedb_raft::fail_point` says.

use std::sync::Arc;

use crate::state::engine::latch::FailPoint;

/// Every point, in the order of the flow.
pub const POINTS: &[&str] = &[
    "rebuild.begun",
    "rebuild.core_ended",
    "rebuild.granted",
    "rebuild.pulled",
    "rebuild.swap.announced",
    "rebuild.swap.identity_away",
    "rebuild.swap.log_away",
    "rebuild.swap.tree_away",
    "rebuild.swap.emptied",
    "rebuild.swap.tree_in_place",
    "rebuild.swap.log_in_place",
    "rebuild.swap.identity_in_place",
    "rebuild.swap.installed",
    "rebuild.started",
    "rebuild.joined",
    "rebuild.promoted",
];

/// The same of the replacement of a damaged tree; the steps from `replace.begin` on are those of
/// `state::engine::replace`.
pub const TREE_POINTS: &[&str] = &[
    "tree.begun",
    "tree.pulled",
    "tree.checked",
    "tree.core_ended",
    "tree.shelved",
    "replace.begin",
    "replace.built",
    "replace.pointed",
    "replace.marked",
    "replace.quarantined",
    "replace.moved",
    "replace.done",
    "tree.replaced",
    "tree.started",
];

/// The rebuild stops here, for a test.
#[derive(Debug, thiserror::Error)]
#[error("stopped at the fail point {0}")]
pub struct Stopped(pub &'static str);

#[cfg(debug_assertions)]
mod armed {
    use std::{
        collections::BTreeMap,
        path::{Path, PathBuf},
        sync::{Mutex, PoisonError, mpsc},
    };

    enum Then {
        Stop,
        /// Until the sender is gone.
        Hang(mpsc::Receiver<()>),
    }

    static ARMED: Mutex<BTreeMap<PathBuf, (String, Then)>> = Mutex::new(BTreeMap::new());

    /// The next rebuild of the node in this folder stops at `point`, once.
    pub fn arm(data_dir: &Path, point: &str) {
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        armed.insert(data_dir.to_owned(), (point.to_owned(), Then::Stop));
    }

    /// The next call of the node in this folder that comes to `point` hangs there until the answer is dropped.
    pub fn hang(data_dir: &Path, point: &str) -> mpsc::Sender<()> {
        let (release, released) = mpsc::channel();
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        armed.insert(data_dir.to_owned(), (point.to_owned(), Then::Hang(released)));
        release
    }

    /// Whether a point of this folder is still to come.
    pub fn is_armed(data_dir: &Path) -> bool {
        ARMED.lock().unwrap_or_else(PoisonError::into_inner).contains_key(data_dir)
    }

    pub(super) fn hit(data_dir: &Path, point: &'static str) -> Result<(), super::Stopped> {
        debug_assert!(crate::fail_points::is_known(point), "{point} is in no list");
        stemedb_raft::fail_point::pass(point);
        let then = {
            let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
            match armed.get(data_dir).is_some_and(|(wanted, _)| wanted == point) {
                true => armed.remove(data_dir).map(|(_, then)| then),
                false => None,
            }
        };
        match then {
            None => Ok(()),
            Some(Then::Stop) => Err(super::Stopped(point)),
            Some(Then::Hang(released)) => {
                // Nothing is ever sent: its end is what is waited for.
                let _gone = released.recv();
                Ok(())
            }
        }
    }
}

#[cfg(debug_assertions)]
pub use armed::{arm, hang, is_armed};

/// The points of a folder as the steps of the tree want them.
pub fn of_folder(data_dir: &std::path::Path) -> FailPoint {
    let data_dir = data_dir.to_owned();
    Arc::new(move |name| hit(&data_dir, name).map_err(std::io::Error::other))
}

/// Passes `point`, unless a test wants to stop here.
#[cfg_attr(not(debug_assertions), allow(unused_variables, clippy::unnecessary_wraps))]
pub fn hit(data_dir: &std::path::Path, point: &'static str) -> Result<(), Stopped> {
    #[cfg(debug_assertions)]
    armed::hit(data_dir, point)?;
    Ok(())
}
