//! Named places at which a test ends a rebuild, as a kill of the process would.
//!
//! Only builds with debug assertions have them: in a release build [`hit`] is empty. A test in one process arms a
//! point for a data folder; server processes abort there as `stemedb_raft::fail_point` says.

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

/// The rebuild stops here, for a test.
#[derive(Debug, thiserror::Error)]
#[error("stopped at the fail point {0}")]
pub struct Stopped(pub &'static str);

#[cfg(debug_assertions)]
mod armed {
    use std::{
        collections::BTreeMap,
        path::{Path, PathBuf},
        sync::{Mutex, PoisonError},
    };

    static ARMED: Mutex<BTreeMap<PathBuf, String>> = Mutex::new(BTreeMap::new());

    /// The next rebuild of the node in this folder stops at `point`, once.
    pub fn arm(data_dir: &Path, point: &str) {
        ARMED.lock().unwrap_or_else(PoisonError::into_inner).insert(data_dir.to_owned(), point.to_owned());
    }

    /// Whether a point of this folder is still to come.
    pub fn is_armed(data_dir: &Path) -> bool {
        ARMED.lock().unwrap_or_else(PoisonError::into_inner).contains_key(data_dir)
    }

    pub(super) fn hit(data_dir: &Path, point: &'static str) -> Result<(), super::Stopped> {
        debug_assert!(super::POINTS.contains(&point), "{point} is in no list");
        stemedb_raft::fail_point::pass(point);
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.get(data_dir).is_some_and(|wanted| wanted == point) {
            armed.remove(data_dir);
            return Err(super::Stopped(point));
        }
        Ok(())
    }
}

#[cfg(debug_assertions)]
pub use armed::{arm, is_armed};

/// Passes `point`, unless a test wants to stop here.
#[cfg_attr(not(debug_assertions), allow(unused_variables, clippy::unnecessary_wraps))]
pub fn hit(data_dir: &std::path::Path, point: &'static str) -> Result<(), Stopped> {
    #[cfg(debug_assertions)]
    armed::hit(data_dir, point)?;
    Ok(())
}
