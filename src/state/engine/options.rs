//! How an engine is opened, and the numbers it answers with.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use stemedb_raft::io_times::IoTimes;
use tokio::sync::watch;

use super::damage::DamageBoard;
pub use super::latch::FailPoint;
use super::{EngineObserver, NoObserver};

/// Awaited before a memtable that ends with this log index is written to disk: the tree must never
/// be ahead of the local log. An error means that the log will never get there.
pub type FlushGate = Arc<dyn Fn(u64) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// How to open an engine.
#[derive(Clone)]
pub struct LsmOptions {
    /// A memtable is sealed once it is larger. Memory: up to `SEALED_STOP + 1` of them, each with
    /// about half its size again for the skip list.
    pub memtable_bytes_max: u64,
    /// Block cache, bytes.
    pub cache_bytes: u64,
    /// Compact in the background. When false, only as much as keeps the tree usable.
    pub compaction: bool,
    /// How long to wait for another process to leave the folder, milliseconds.
    pub lock_timeout_ms: u64,
    /// See [`FlushGate`]; `None` in tools and tests without a log.
    pub flush_gate: Option<FlushGate>,
    /// Hears what happens.
    pub observer: Arc<dyn EngineObserver>,
    /// Changes when an engine opened with these options, or clones of them, latches.
    pub latches: watch::Sender<u64>,
    /// Where writes and syncs are noted, so that a disk that hangs is seen.
    pub io_times: Arc<IoTimes>,
    /// Where damage is reported.
    pub damage: DamageBoard,
    /// Lets a disk fail at a named step; only tests set it.
    pub fail_point: Option<FailPoint>,
}

impl Default for LsmOptions {
    fn default() -> LsmOptions {
        LsmOptions {
            memtable_bytes_max: 16 * 1024 * 1024,
            cache_bytes: 32 * 1024 * 1024,
            compaction: true,
            lock_timeout_ms: 5_000,
            flush_gate: None,
            observer: Arc::new(NoObserver),
            latches: watch::Sender::default(),
            io_times: Arc::default(),
            damage: DamageBoard::default(),
            fail_point: None,
        }
    }
}

/// What the engine holds and has done. Bytes are file sizes.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct EngineStats {
    /// Table files.
    pub table_count: usize,
    /// Their bytes.
    pub table_bytes: u64,
    /// Tables and bytes of each level, 0 first.
    pub level_tables: Vec<usize>,
    /// See `level_tables`.
    pub level_bytes: Vec<u64>,
    /// Runs in level 0.
    pub l0_runs: usize,
    /// Memtables that wait to be flushed.
    pub sealed_memtables: usize,
    /// Bytes in the active memtable.
    pub memtable_bytes: u64,
    /// Bytes in level 0, which the next compactions rewrite.
    pub pending_compaction_bytes: u64,
    /// Bytes written by flushes since the start.
    pub flushed_bytes: u64,
    /// Flushes since the start.
    pub flush_count: u64,
    /// Bytes written by compactions since the start.
    pub compacted_bytes: u64,
    /// Compactions since the start.
    pub compaction_count: u64,
    /// Open snapshots.
    pub snapshots: usize,
    /// True while the disk has no room for the next flush or compaction.
    pub disk_full: bool,
}
