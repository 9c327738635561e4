//! How a log is kept: what its opener chooses and its writer obeys.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    io_times::IoTimes,
    shared::{NoObserver, WalObserver},
};

/// When the log does what nobody asked for: preparing segments, marking what is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Beside the writer, and when it is idle.
    Background,
    /// Only while something else is done, on the writer's thread, and without marks of an idle writer. The order of
    /// all changes on the disk then depends on nothing but what was asked: a simulation's seed is a whole story.
    Lockstep,
}

/// Makes identities of segments.
pub type Identities = Arc<dyn Fn() -> u64 + Send + Sync>;

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
    /// Where operations of the disk are seen while they run: one for the whole process.
    pub io_times: Arc<IoTimes>,
    /// How long a full segment waits for room for the next one before the log latches. Nothing was written then,
    /// so it may take its time: but votes wait too.
    pub room_patience: Duration,
    /// When the log does what nobody asked for.
    pub pace: Pace,
    /// Whether the first segment of a new log may take its time, so that nobody else has to wait for the disk.
    pub makes_room_gently: bool,
    /// Random numbers, or a seed's.
    pub identities: Identities,
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
            io_times: Arc::default(),
            room_patience: Duration::from_secs(10),
            pace: Pace::Background,
            makes_room_gently: false,
            identities: Arc::new(rand::random),
        }
    }
}
