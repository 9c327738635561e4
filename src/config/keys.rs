//! Every key there is: name, type, range, meaning, and whether anything obeys it yet.
//!
//! The one table from which the file, the environment and the flags are read, and from which
//! `.env.example`, `docs/configuration.md` and `Config::to_toml` are written.

use super::Config;
use super::value::{IntegerField, Kind};

/// Whether a key does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InForce {
    /// It does what it says.
    Yes,
    /// It is read and checked, so that a file that has it is accepted; the text says what is missing.
    NotYet(&'static str),
}

/// One key.
pub struct Key {
    /// Section of the file, for example `wal`.
    pub section: &'static str,
    /// Name in the section.
    pub name: &'static str,
    /// Older names that mean the same.
    pub aliases: &'static [&'static str],
    pub(super) kind: Kind,
    /// What it does, one sentence.
    pub about: &'static str,
    /// Whether it does it yet.
    pub in_force: InForce,
}

impl Key {
    /// `section.name`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// `STEMEDB_SECTION_NAME`.
    pub fn variable(&self) -> String {
        variable(self.section, self.name)
    }

    /// The variables of its aliases.
    pub fn alias_variables(&self) -> Vec<String> {
        self.aliases.iter().map(|alias| variable(self.section, alias)).collect()
    }

    /// What it accepts, in words.
    pub fn accepted(&self) -> String {
        self.kind.accepted()
    }

    /// The default as the text a variable would have; empty for none.
    pub fn default_text(&self) -> String {
        self.kind.text(&Config::default())
    }
}

fn variable(section: &str, name: &str) -> String {
    format!("{VARIABLE_PREFIX}{}_{}", section.to_uppercase(), name.to_uppercase())
}

/// What every variable of the program begins with.
pub const VARIABLE_PREFIX: &str = "STEMEDB_";

/// Variables that are no keys of the file, with what they do. A name that ends in `_` stands for
/// all that begin with it.
pub const OTHER_VARIABLES: [(&str, &str); 2] = [
    (
        "STEMEDB_ENDPOINTS",
        "host:port of nodes, separated by commas, for the commands that are clients; --endpoints wins.",
    ),
    ("STEMEDB_TEST_", "Read by the tests only; STEMEDB_TEST_FULL=1 runs the long ones with their full counts."),
];

/// The key with this name or alias in this section.
pub fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && (key.name == name || key.aliases.contains(&name)))
}

/// The sections, in the table's order.
pub fn sections() -> Vec<&'static str> {
    let mut sections: Vec<&'static str> = KEYS.iter().map(|key| key.section).collect();
    sections.dedup();
    sections
}

/// Every key.
pub static KEYS: &[Key] = &[
    key(
        "node",
        "name",
        Kind::Name(|c| &mut c.node.name),
        "Stable name of this node; with cluster.peers it must be one of theirs.",
    ),
    key(
        "node",
        "data_dir",
        Kind::Folder(|c| &mut c.node.data_dir),
        "Folder of everything this node keeps: wal/, kv/, checkpoints, identity.",
    ),
    key(
        "http",
        "listen",
        Kind::Address(|c| &mut c.http.listen),
        "Address of the HTTP listener; port 0 lets the system choose one.",
    ),
    key(
        "http",
        "insecure",
        Kind::Bool(|c| &mut c.http.insecure),
        "Allows addresses that other machines can reach although nothing is encrypted or authenticated yet.",
    ),
    key(
        "http",
        "body_bytes_max",
        size(|c| &mut c.http.body_bytes_max, 1024, 8 * MIB, "bytes"),
        "Largest request body; a larger one is answered with 413.",
    ),
    key(
        "http",
        "connections_max",
        size(|c| &mut c.http.connections_max, 8, 100_000, "connections"),
        "Most client connections at once; further ones wait to be accepted.",
    ),
    key(
        "http",
        "header_timeout_ms",
        number(|c| &mut c.http.header_timeout_ms, 100, 600_000, "ms"),
        "Time in which the header of a request must arrive.",
    ),
    key(
        "http",
        "idle_timeout_ms",
        number(|c| &mut c.http.idle_timeout_ms, 1_000, 3_600_000, "ms"),
        "Idle time after which a connection is closed; keep it above the balancer's own.",
    ),
    key(
        "cluster",
        "peers",
        Kind::Peers(|c| &mut c.cluster.peers),
        "Every node of the cluster, this one included; none for a database of one node.",
    ),
    key(
        "cluster",
        "role",
        Kind::Role(|c| &mut c.cluster.role),
        "What this node is added to a cluster as: voter, or learner, which receives the log, answers, and never votes.",
    ),
    key(
        "cluster",
        "bootstrap_expect",
        Kind::Integer { field: IntegerField::U32(|c| &mut c.cluster.bootstrap_expect), min: 0, max: 64, unit: "nodes" },
        "How many nodes must be there, and empty, before a cluster is formed; 0 means as many as are listed.",
    ),
    key(
        "cluster",
        "feature_level_max",
        Kind::Integer { field: IntegerField::U32(|c| &mut c.cluster.feature_level_max), min: 0, max: 1_000, unit: "" },
        "The feature level that the cluster is not raised above while this node says so; by default the highest that its \
         program knows. Holding it keeps the way back to the program before an upgrade open.",
    ),
    key(
        "cluster",
        "peer_listen",
        Kind::OptionalAddress(|c| &mut c.cluster.peer_listen),
        "Address of the listener for the other nodes; by default the HTTP host and the HTTP port + 100.",
    ),
    key(
        "cluster",
        "heartbeat_ms",
        number(|c| &mut c.cluster.heartbeat_ms, 5, 10_000, "ms"),
        "Time between the leader's heartbeats; keep it above the slowest usual fsync.",
    ),
    key(
        "cluster",
        "election_min_ms",
        number(|c| &mut c.cluster.election_min_ms, 15, 60_000, "ms"),
        "Shortest silence after which a follower stands for election; at least twice heartbeat_ms.",
    ),
    key(
        "cluster",
        "election_max_ms",
        number(|c| &mut c.cluster.election_max_ms, 20, 120_000, "ms"),
        "Longest such silence; above election_min_ms.",
    ),
    key(
        "cluster",
        "request_deadline_ms",
        number(|c| &mut c.cluster.request_deadline_ms, 100, 60_000, "ms"),
        "How long a request waits for a leader and its commit; above election_max_ms.",
    ),
    key(
        "cluster",
        "park_commands_max",
        size(|c| &mut c.cluster.park_commands_max, 1, 1_000_000, "commands"),
        "Most commands that wait while there is no leader; further ones are answered with 429.",
    ),
    key(
        "cluster",
        "park_bytes_max",
        size(|c| &mut c.cluster.park_bytes_max, 8 * MIB, 4096 * MIB, "bytes"),
        "Most bytes of waiting commands.",
    ),
    key(
        "cluster",
        "stall_handoff_ms",
        number(|c| &mut c.cluster.stall_handoff_ms, 20, 60_000, "ms"),
        "A sync or write that takes longer makes the node give leadership away and answer through others.",
    ),
    key(
        "cluster",
        "stall_fence_ms",
        number(|c| &mut c.cluster.stall_fence_ms, 50, 600_000, "ms"),
        "One that takes longer makes the node close its listeners and connections for good; above stall_handoff_ms.",
    ),
    key(
        "cluster",
        "slow_fsync_ms",
        number(|c| &mut c.cluster.slow_fsync_ms, 1, 60_000, "ms"),
        "99th percentile of the log's syncs from which on the disk counts as slow, and had better not lead.",
    ),
    key(
        "cluster",
        "auto_rebuild",
        Kind::Bool(|c| &mut c.cluster.auto_rebuild),
        "Lets this node rebuild itself from a replica when its disk fails or its files are lost, twice a day at most.",
    ),
    key(
        "cluster",
        "drain_notice_ms",
        number(|c| &mut c.cluster.drain_notice_ms, 0, 600_000, "ms"),
        "How long a draining node waits for load balancers to notice; above their probe interval times threshold.",
    ),
    key(
        "cluster",
        "stop_deadline_ms",
        number(|c| &mut c.cluster.stop_deadline_ms, 0, 600_000, "ms"),
        "How long a process that was told to stop may take to drain; above drain_notice_ms, and better above request_deadline_ms too; 0: it does not drain.",
    ),
    key(
        "wal",
        "log_fsync_errors",
        Kind::Bool(|c| &mut c.wal.log_fsync_errors),
        "Adds the circumstances (error number, fsyncs so far, time since the last good one) to the log line of a \
         failed fsync. The line itself is always written.",
    ),
    key(
        "wal",
        "group_commit_max_wait_ms",
        number(|c| &mut c.wal.group_commit_max_wait_ms, 0, 1_000, "ms"),
        "How long the writer waits for more entries before it syncs; 0 is as fast as the disk answers.",
    ),
    key(
        "wal",
        "group_commit_max_bytes",
        size(|c| &mut c.wal.group_commit_max_bytes, 4096, 64 * MIB, "bytes"),
        "Most bytes in one group.",
    ),
    not_yet(
        key(
            "wal",
            "retention_days",
            Kind::Limit { field: |c| &mut c.wal.retention_days, max: 3650, unit: "days" },
            "Age at which segments that nothing needs any more are removed.",
        ),
        "segments are removed by wal.retain_mb alone",
    ),
    not_yet(
        key(
            "wal",
            "max_segments",
            Kind::Limit { field: |c| &mut c.wal.max_segments, max: 1_000_000, unit: "segments" },
            "Most segments kept that nothing needs any more.",
        ),
        "segments are removed by wal.retain_mb alone",
    ),
    key("wal", "segment_size_mb", number(|c| &mut c.wal.segment_size_mb, 1, 1024, "MiB"), "Size of one segment."),
    key(
        "wal",
        "retain_mb",
        number(|c| &mut c.wal.retain_mb, 16, 1024 * 1024, "MiB"),
        "Log kept behind the last checkpoint, so that a replica that lags needs no checkpoint.",
    ),
    key(
        "storage",
        "lock_timeout_ms",
        number(|c| &mut c.storage.lock_timeout_ms, 10, 600_000, "ms"),
        "How long the start waits for another process to leave the data folder.",
    ),
    alias(
        key(
            "storage",
            "enable_auto_compaction",
            Kind::Bool(|c| &mut c.storage.enable_auto_compaction),
            "Compacts the tree in the background.",
        ),
        &["compaction_enabled"],
    ),
    not_yet(
        alias(
            key(
                "storage",
                "compaction_trigger_mb",
                number(|c| &mut c.storage.compaction_trigger_mb, 1, 1024 * 1024, "MiB"),
                "Growth since the last full compaction that starts one.",
            ),
            &["compaction_threshold_mb"],
        ),
        NO_FULL_COMPACTION,
    ),
    not_yet(
        key(
            "storage",
            "compaction_interval_hours",
            number(|c| &mut c.storage.compaction_interval_hours, 1, 8_760, "hours"),
            "Time after which a full compaction is started whatever the growth.",
        ),
        NO_FULL_COMPACTION,
    ),
    key(
        "storage",
        "memtable_mb",
        number(|c| &mut c.storage.memtable_mb, 1, 1024, "MiB"),
        "Writes collected in memory before they are flushed to a file.",
    ),
    key(
        "storage",
        "cache_mb",
        number(|c| &mut c.storage.cache_mb, 1, 1024 * 1024, "MiB"),
        "Cache of blocks read from the tree's files.",
    ),
    key(
        "storage",
        "scrub_mb_per_s",
        number(|c| &mut c.storage.scrub_mb_per_s, 0, 10_000, "MiB/s"),
        "How fast the tree, the checkpoint and the sealed segments of the log are read again once a day and compared \
         with their hashes; 0 is off.",
    ),
    key(
        "storage",
        "low_water_mb",
        number(|c| &mut c.storage.low_water_mb, 0, 1024 * 1024, "MiB"),
        "Free space below which writes are refused with 507, until there is half as much again; 0 means 2 % of the \
         disk and at most 1024, but no less than a segment, a memtable and 8 MiB. Never more than a quarter of the \
         disk. Inodes have a mark of their own: 1 % of them, 16 to 1,000.",
    ),
    key(
        "storage",
        "ballast_mb",
        number(|c| &mut c.storage.ballast_mb, 0, 1024 * 1024, "MiB"),
        "Most space taken beforehand by the file ballast, which is let go when the disk is full; never more than 1 % \
         of the disk, 0 for none.",
    ),
    key(
        "rebuild",
        "throttle_mb_per_s",
        number(|c| &mut c.rebuild.throttle_mb_per_s, 0, 100_000, "MB/s"),
        "How fast a rebuild fetches its files while their sender serves clients; 0 is no limit. An idle sender is never \
         held back.",
    ),
    key(
        "rebuild",
        "spare_dir",
        Kind::OptionalFile(|c| &mut c.rebuild.spare_dir),
        "A folder on another disk, where the node makes itself anew when data_dir takes no file any more. Once it was \
         taken into use it is the node's folder at every start, and data_dir is not touched.",
    ),
    key(
        "rebuild",
        "quarantine_days",
        Kind::Limit { field: |c| &mut c.rebuild.quarantine_days, max: 3650, unit: "days" },
        "Age at which the old files of a rebuilt node are removed from quarantine/.",
    ),
    key(
        "rebuild",
        "automatic_per_day",
        number(|c| &mut c.rebuild.automatic_per_day, 0, 1_000, "times"),
        "How often within 24 hours a node may rebuild itself; after that an operator decides whether its disk is good \
         enough. The leader's value counts.",
    ),
    not_yet(
        key(
            "backup",
            "retention_days",
            Kind::Limit { field: |c| &mut c.backup.retention_days, max: 3650, unit: "days" },
            "Age at which a backup is removed.",
        ),
        "there are no backups yet",
    ),
    not_yet(
        key("backup", "compression_enabled", Kind::Bool(|c| &mut c.backup.compression_enabled), "Compresses backups."),
        "there are no backups yet",
    ),
    key(
        "logging",
        "level",
        Kind::Level(|c| &mut c.logging.level),
        "Least severe level that is written. The Raft library is written one level quieter.",
    ),
    key(
        "logging",
        "format",
        Kind::Format(|c| &mut c.logging.format),
        "text for people, json for programs: one object per line.",
    ),
    key(
        "logging",
        "file",
        Kind::OptionalFile(|c| &mut c.logging.file),
        "A file that gets the same lines as the standard error stream, for example /var/log/stemedb/storage.log.",
    ),
];

const NO_FULL_COMPACTION: &str = "the tree compacts level by level as they fill, and a full compaction is started only by \
                                  `stemedb compact NODE --whole`";

const MIB: u64 = 1024 * 1024;

const fn key(section: &'static str, name: &'static str, kind: Kind, about: &'static str) -> Key {
    Key { section, name, aliases: &[], kind, about, in_force: InForce::Yes }
}

const fn alias(key: Key, aliases: &'static [&'static str]) -> Key {
    Key { aliases, ..key }
}

const fn not_yet(key: Key, missing: &'static str) -> Key {
    Key { in_force: InForce::NotYet(missing), ..key }
}

const fn number(field: fn(&mut Config) -> &mut u64, min: u64, max: u64, unit: &'static str) -> Kind {
    Kind::Integer { field: IntegerField::U64(field), min, max, unit }
}

const fn size(field: fn(&mut Config) -> &mut usize, min: u64, max: u64, unit: &'static str) -> Kind {
    Kind::Integer { field: IntegerField::Usize(field), min, max, unit }
}
