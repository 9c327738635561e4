//! The spare folder: where a node makes itself anew when its data folder's own disk is of no use any more.
//!
//! ```text
//!  the data folder fails its probe for a while ─► the spare one passes ─► journal there ─► the process starts anew on it
//! ```
//!
//! From the journal on the spare folder is the node's folder, at every start, and the rebuild goes on there as one whose
//! old files are put away already: the data folder is not touched any more. When its disk was replaced, an operator may
//! name the spare folder as `node.data_dir`, and the new disk as the next spare one.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{desk::Order, journal::Journal, probe};
use crate::{
    config::Config,
    node::{boots::SeenBoots, identity::Identity, start_error::StartError},
};

/// The configuration of a node with the folder that it uses: the spare one once that was taken into use, and no further
/// spare one then. Blocking.
pub fn in_use(config: Arc<Config>) -> Result<Arc<Config>, StartError> {
    let Some(spare) = &config.rebuild.spare_dir else { return Ok(config) };
    if Identity::load(spare)?.is_none() && Journal::load(spare)?.is_none() {
        return Ok(config);
    }
    tracing::warn!(
        spare_dir = %spare.display(),
        data_dir = %config.node.data_dir.display(),
        "this node uses its spare folder, and does not touch its data folder"
    );
    let mut moved = Config::clone(&config);
    moved.node.data_dir = spare.clone();
    moved.rebuild.spare_dir = None;
    Ok(Arc::new(moved))
}

/// Takes the spare folder into use, if it keeps what it is given. What was seen of the others goes along: whoever comes
/// back with an old copy of its folder must not be believed by the one that has moved. Blocking.
pub fn take(spare: &Path, seed: u64, seen: &SeenBoots, journal: &Journal) -> Result<(), String> {
    let at =
        |error: &dyn std::fmt::Display| format!("the spare folder {} is not good either: {error}", spare.display());
    std::fs::create_dir_all(spare).map_err(|e| at(&e))?;
    probe::probe(spare, seed).map_err(|e| at(&e))?;
    seen.save_to(spare).map_err(|e| at(&e))?;
    // From here on it is the node's folder.
    journal.save(spare).map_err(|e| at(&e))
}

/// Whether a node may move there by itself, or was told to.
pub fn wanted(config: &Config, order: Option<&Order>) -> Option<PathBuf> {
    let spare = config.rebuild.spare_dir.clone()?;
    (config.cluster.auto_rebuild || order.is_some()).then_some(spare)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn nothing_seen(dir: &Path) -> SeenBoots {
        SeenBoots::open(dir, Arc::default()).unwrap()
    }

    #[tokio::test]
    async fn the_spare_folder_is_used_from_its_journal_on_and_has_none_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let spare = dir.path().join("spare");
        let mut config = Config::default();
        config.node.data_dir = dir.path().join("data");
        config.rebuild.spare_dir = Some(spare.clone());
        let config = Arc::new(config);
        let used = || in_use(Arc::clone(&config)).unwrap();
        assert_eq!(used().node.data_dir, config.node.data_dir, "it is not there yet");
        std::fs::create_dir(&spare).unwrap();
        assert_eq!(used().node.data_dir, config.node.data_dir, "it is empty");
        let seen = nothing_seen(dir.path());
        seen.observe(2, 9).unwrap();
        seen.wait_saved(2, 9).await.unwrap();
        take(&spare, 7, &seen, &Journal { job: 1, ..Journal::default() }).unwrap();
        assert_eq!(SeenBoots::open(&spare, Arc::default()).unwrap().highest(2), Some(9), "what was seen is forgotten");
        let moved = used();
        assert_eq!((moved.node.data_dir.clone(), moved.rebuild.spare_dir.clone()), (spare.clone(), None));
        Journal::remove(&spare).unwrap();
        Identity { cluster_id: [1; 16], name: "a".into(), raft_id: 9, boot: 1 }.save(&spare).unwrap();
        assert_eq!(used().node.data_dir, spare, "and after the rebuild by its identity");
    }

    #[test]
    fn a_spare_folder_that_keeps_nothing_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let why = take(&file, 7, &nothing_seen(dir.path()), &Journal::default()).unwrap_err();
        assert!(why.contains("not good either"), "{why}");
    }
}
