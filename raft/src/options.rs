//! How a log is kept: what its opener chooses and its writer obeys.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::shared::{NoObserver, WalObserver};

/// How a log is kept.
#[derive(Clone)]
pub struct WalOptions {
    /// Folder of the log.
    pub dir: PathBuf,
    /// Size of a segment in bytes; an entry that needs more gets a segment of its own size.
    pub segment_bytes: u64,
    /// Wait this long for more entries before a sync; zero: as fast as the disk answers.
    pub group_commit_max_wait: Duration,
    /// A group is closed when its frames reach this many bytes.
    pub group_commit_max_bytes: usize,
    /// Newest entries kept in memory, in bytes.
    pub tail_cache_bytes: usize,
    /// Told of syncs and rotations.
    pub observer: Arc<dyn WalObserver>,
}

impl WalOptions {
    /// The defaults for a folder.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            segment_bytes: 64 << 20,
            group_commit_max_wait: Duration::ZERO,
            group_commit_max_bytes: 4 << 20,
            tail_cache_bytes: 16 << 20,
            observer: Arc::new(NoObserver),
        }
    }
}
