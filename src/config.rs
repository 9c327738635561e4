//! What an operator may set, and where each value came from.
//!
//! A value is the default, unless the file sets it, unless the environment sets it, unless a flag
//! sets it. One table, [`keys::KEYS`], names every key with its type, range and meaning; reading,
//! checking, writing (`to_toml`), `.env.example` and `docs/configuration.md` all come from it.
//! Everything wrong is reported at once, each with its file and line, and nothing starts. This
//! module never looks at the network and opens no file but the configuration file.

mod check;
pub mod document;
mod error;
mod file;
pub mod keys;
mod load;
mod value;

use std::path::PathBuf;

use crate::state::level::FEATURE_LEVEL;

pub use error::{ConfigError, Origin, Problem};
pub use load::Override;

/// The whole configuration of one node. `Config::default()` is what an empty file gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Who this node is and where its data lies.
    pub node: NodeSection,
    /// The HTTP listener.
    pub http: HttpSection,
    /// The other nodes, and the clocks of Raft.
    pub cluster: ClusterSection,
    /// The write-ahead log.
    pub wal: WalSection,
    /// The tree that holds the applied state.
    pub storage: StorageSection,
    /// Rebuilding this node from a replica.
    pub rebuild: RebuildSection,
    /// Backups. Read and checked only: nothing makes backups yet.
    pub backup: BackupSection,
    /// The program's own log.
    pub logging: LoggingSection,
    /// What the start has to warn about, one sentence each. `logging::init` writes them out.
    pub warnings: Vec<String>,
    /// The file that was read; `None` when there was none.
    pub source: Option<PathBuf>,
}

/// `[node]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSection {
    /// Stable name, for example `node-1`.
    pub name: String,
    /// Folder of everything this node keeps.
    pub data_dir: PathBuf,
}

/// `[http]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpSection {
    /// `host:port` of the HTTP listener; port 0 lets the system choose.
    pub listen: String,
    /// Allows an address other machines can reach although nothing is encrypted or authenticated.
    pub insecure: bool,
    /// Largest request body, bytes.
    pub body_bytes_max: usize,
    /// Most client connections open at once.
    pub connections_max: usize,
    /// Milliseconds in which a request's header must have arrived.
    pub header_timeout_ms: u64,
    /// Milliseconds after which an idle connection is closed.
    pub idle_timeout_ms: u64,
}

/// `[cluster]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterSection {
    /// Every node of the cluster, this one included; empty for a database of one node.
    pub peers: Vec<PeerEntry>,
    /// As what this node is added to a cluster.
    pub role: MemberRole,
    /// How many listed nodes must answer "empty" before a cluster is formed. After loading this is
    /// never 0: it is the number of peers, or 1 without peers.
    pub bootstrap_expect: u32,
    /// The feature level to which the cluster may be raised for this node's sake.
    pub feature_level_max: u32,
    /// `host:port` for the other nodes; `None`: the HTTP host with the HTTP port + 100.
    pub peer_listen: Option<String>,
    /// Milliseconds between a leader's heartbeats.
    pub heartbeat_ms: u64,
    /// Shortest time without a heartbeat after which a follower stands for election, milliseconds.
    pub election_min_ms: u64,
    /// Longest such time, milliseconds. Each election draws between the two.
    pub election_max_ms: u64,
    /// How long a request may wait for a leader and for its commit, milliseconds.
    pub request_deadline_ms: u64,
    /// Most commands parked while there is no leader.
    pub park_commands_max: usize,
    /// Most bytes of parked commands.
    pub park_bytes_max: usize,
    /// An operation of the disk that takes longer makes the node give leadership away and answer through others,
    /// milliseconds.
    pub stall_handoff_ms: u64,
    /// One that takes longer makes it close its listeners and connections for good, milliseconds.
    pub stall_fence_ms: u64,
    /// 99th percentile of the log's syncs above which the disk counts as slow, milliseconds.
    pub slow_fsync_ms: u64,
    /// Whether this node rebuilds itself from a replica when its disk fails or its files are lost.
    pub auto_rebuild: bool,
    /// How long a node that leaves traffic goes on as before, so that load balancers notice, milliseconds.
    pub drain_notice_ms: u64,
    /// How long a process that was told to stop may take to leave traffic and answer its requests, milliseconds.
    pub stop_deadline_ms: u64,
}

/// One node of `[[cluster.peers]]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerEntry {
    /// Its `node.name`.
    pub name: String,
    /// `host:port` of its peer listener.
    pub addr: String,
    /// `host:port` of its HTTP listener.
    pub http: String,
}

/// `[wal]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalSection {
    /// Adds the circumstances to the log when an fsync fails or is slow.
    pub log_fsync_errors: bool,
    /// How long the writer waits for more before it syncs, milliseconds; 0: as fast as the disk answers.
    pub group_commit_max_wait_ms: u64,
    /// Most bytes in one group.
    pub group_commit_max_bytes: usize,
    /// Days after which segments that are no longer needed go; `None`: no limit by age.
    pub retention_days: Option<u32>,
    /// Most segments kept that are no longer needed; `None`: no limit by number.
    pub max_segments: Option<u32>,
    /// Size of a segment, MiB.
    pub segment_size_mb: u64,
    /// Log kept behind the last checkpoint for replicas that lag, MiB.
    pub retain_mb: u64,
}

/// `[storage]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageSection {
    /// How long a write waits for room in the tree, milliseconds.
    pub lock_timeout_ms: u64,
    /// Compacts in the background.
    pub enable_auto_compaction: bool,
    /// Growth that starts a full compaction, MiB.
    pub compaction_trigger_mb: u64,
    /// Hours between full compactions.
    pub compaction_interval_hours: u64,
    /// Memory that collects writes before they are flushed, MiB.
    pub memtable_mb: u64,
    /// Block cache, MiB.
    pub cache_mb: u64,
    /// Rate of the scrubber, MiB per second; 0: off.
    pub scrub_mb_per_s: u64,
    /// Free space below which clients' writes are refused, MiB; 0: by the size of the disk and of what the node
    /// keeps, see `node::space`.
    pub low_water_mb: u64,
    /// Most space kept in reserve for a full disk, MiB; never more than 1 % of the disk. 0: none.
    pub ballast_mb: u64,
}

/// `[rebuild]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuildSection {
    /// Most MB (10^6 bytes) a second that are fetched while the sender serves clients; 0: no limit.
    pub throttle_mb_per_s: u64,
    /// Where the node makes itself anew when the disk of `data_dir` is of no use any more; `None`: nowhere.
    pub spare_dir: Option<PathBuf>,
    /// Days after which files in the quarantine go; `None`: never.
    pub quarantine_days: Option<u32>,
    /// Rebuilds of one node within 24 hours that need no operator.
    pub automatic_per_day: u64,
}

/// `[backup]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupSection {
    /// Days a backup is kept; `None`: for ever.
    pub retention_days: Option<u32>,
    /// Compresses backups.
    pub compression_enabled: bool,
}

/// `[logging]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggingSection {
    /// The least severe level that is written.
    pub level: LogLevel,
    /// How a line looks.
    pub format: LogFormat,
    /// A file that gets the same lines as the standard error stream.
    pub file: Option<PathBuf>,
}

/// Severity of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something needs attention.
    Warn,
    /// What an operator wants to know on a normal day.
    Info,
    /// Each step of what the node does.
    Debug,
    /// Everything.
    Trace,
}

/// What a node is added to a cluster as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberRole {
    /// It votes and may lead.
    Voter,
    /// It receives the log and answers, and never votes.
    Learner,
}

/// Shape of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line with `timestamp`, `level`, `target`, `message` and the fields.
    Json,
}

/// Added to the HTTP port to give the peer port.
pub const PEER_PORT_OFFSET: u16 = 100;

impl Config {
    /// Folder of the write-ahead log.
    pub fn wal_dir(&self) -> PathBuf {
        self.node.data_dir.join("wal")
    }

    /// Folder of the tree.
    pub fn kv_dir(&self) -> PathBuf {
        self.node.data_dir.join("kv")
    }

    /// `host:port` to listen on for the other nodes: `cluster.peer_listen`, else the HTTP host with
    /// the HTTP port + 100, else (HTTP port 0) port 0 as well.
    pub fn peer_listen(&self) -> String {
        if let Some(address) = &self.cluster.peer_listen {
            return address.clone();
        }
        match value::split_address(&self.http.listen) {
            Some((host, 0)) => format!("{host}:0"),
            // `check` has refused HTTP ports that leave no room; saturating keeps this total.
            Some((host, port)) => format!("{host}:{}", port.saturating_add(PEER_PORT_OFFSET)),
            None => self.http.listen.clone(),
        }
    }
}

/// Whether a text may be the name of a node.
pub fn is_node_name(text: &str) -> bool {
    value::is_name(text)
}

/// Whether a text is `host:port` with a port above 0.
pub fn is_address(text: &str) -> bool {
    value::split_address(text).is_some_and(|(_, port)| port > 0)
}

impl Default for NodeSection {
    fn default() -> Self {
        NodeSection { name: "node-1".into(), data_dir: "/var/lib/stemedb".into() }
    }
}

impl Default for HttpSection {
    fn default() -> Self {
        HttpSection {
            listen: "127.0.0.1:18180".into(),
            insecure: false,
            body_bytes_max: 8 * 1024 * 1024,
            connections_max: 1024,
            header_timeout_ms: 10_000,
            // Above the 60 s for which nginx keeps idle connections, so that the balancer closes first.
            idle_timeout_ms: 75_000,
        }
    }
}

impl Default for ClusterSection {
    fn default() -> Self {
        ClusterSection {
            peers: Vec::new(),
            role: MemberRole::Voter,
            bootstrap_expect: 1,
            feature_level_max: FEATURE_LEVEL,
            peer_listen: None,
            heartbeat_ms: 50,
            election_min_ms: 150,
            election_max_ms: 300,
            request_deadline_ms: 10_000,
            park_commands_max: 10_000,
            park_bytes_max: 64 * 1024 * 1024,
            stall_handoff_ms: 500,
            stall_fence_ms: 10_000,
            slow_fsync_ms: 100,
            auto_rebuild: true,
            // Above a probe every 500 ms of which three must fail, with a margin.
            drain_notice_ms: 2_000,
            // The notice, the deadline of a request and a transfer of leadership; below the 30 s after which the usual
            // supervisors kill.
            stop_deadline_ms: 15_000,
        }
    }
}

impl Default for WalSection {
    fn default() -> Self {
        WalSection {
            log_fsync_errors: true,
            group_commit_max_wait_ms: 0,
            group_commit_max_bytes: 4 * 1024 * 1024,
            retention_days: None,
            max_segments: None,
            segment_size_mb: 64,
            retain_mb: 256,
        }
    }
}

impl Default for StorageSection {
    fn default() -> Self {
        StorageSection {
            lock_timeout_ms: 5_000,
            enable_auto_compaction: true,
            compaction_trigger_mb: 1024,
            compaction_interval_hours: 24,
            memtable_mb: 16,
            cache_mb: 32,
            scrub_mb_per_s: 10,
            low_water_mb: 0,
            ballast_mb: 1024,
        }
    }
}

impl Default for RebuildSection {
    fn default() -> Self {
        RebuildSection { throttle_mb_per_s: 96, spare_dir: None, quarantine_days: Some(14), automatic_per_day: 2 }
    }
}

impl Default for BackupSection {
    fn default() -> Self {
        BackupSection { retention_days: None, compression_enabled: true }
    }
}

impl Default for LoggingSection {
    fn default() -> Self {
        LoggingSection { level: LogLevel::Info, format: LogFormat::Text, file: None }
    }
}

#[cfg(test)]
mod tests;
