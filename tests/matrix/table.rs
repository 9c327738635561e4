//! The table: which faults, where, on whom, and what must come of them. Row numbers are those of the list of faults that
//! the database must survive.

use stemedb_raft::disk::sim::SyncFault;

/// What is broken in a cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// The next sync of a file of the log fails once, in one of the ways of file systems.
    SyncFails(SyncFault),
    /// The first sync of the log's next segment fails.
    RollFails,
    /// The next sync of the log's folder fails.
    FolderFails,
    /// The next sync of the hard state fails, in an election.
    VoteFails,
    /// A sync of the tree fails; the log lies elsewhere. On the real kernel.
    TreeFails,
    /// Writes to the log fail; the process is restarted, and later the page cache is evicted. On the real kernel.
    RestartAndEviction,
    /// The file system turns read-only. On the real kernel.
    ReadOnly,
    /// The files of a stopped node are damaged.
    AtRest(Harm),
    /// A write to the log is done in the place of earlier entries, and reported as done.
    WriteLandsElsewhere,
    /// A stopped node's log is damaged, and another node is down when it comes back.
    DamageAndOneDown,
    /// A stopped node gets the files that it had at an earlier stop.
    OldCopy,
    /// The power goes; of what was not synced a random part survives.
    PowerCut,
    /// Nothing that the disk is asked for ends, until the process has fenced itself. On the real kernel.
    Hang,
    /// The disk has no byte left.
    NoBytes,
    /// The disk has no inode left.
    NoInodes,
    /// kill -9 of the process, and a restart.
    Kill,
    /// SIGSTOP until the others have served without it, then SIGCONT.
    Freeze,
    /// The folder is emptied while the node is stopped.
    Wiped,
    /// The same, and another node is down when it comes back.
    WipedAndOneDown,
    /// The thread that writes the log panics.
    WriterDies,
    /// The task that passes this point panics.
    TaskDies(&'static str),
}

/// Damage to the files of a node that is down. In the log it falls on what was durable.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Harm {
    RandomBlock,
    BlocksUnreadable,
    BitFlip,
    SegmentMissing,
    SegmentShort,
    SegmentLong,
    SegmentUnreadable,
    OneHardState,
    BothHardStates,
    IdentityMissing,
    TableBlock,
    TableMissing,
    CheckpointBlock,
}

impl Harm {
    /// Whether it falls on files that only a node has that has flushed.
    pub fn needs_tables(self) -> bool {
        matches!(self, Self::TableBlock | Self::TableMissing | Self::CheckpointBlock)
    }
}

/// Where a cell runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ground {
    /// Three nodes in this process, their logs on simulated disks.
    Simulated,
    /// Three processes.
    Processes,
    /// Three processes, each on an ext4 of its own whose disk fails on command.
    Kernel,
    /// Three processes, each on a small file system of its own.
    Small,
}

/// One fault in one place.
pub struct Row {
    pub number: &'static str,
    pub fault: &'static str,
    pub place: &'static str,
    pub expected: &'static str,
    pub ground: Ground,
    pub act: Act,
}

impl Row {
    /// Whether it has this number, or this act.
    pub fn is_named(&self, name: &str) -> bool {
        self.number == name || format!("{:?}", self.act).contains(name)
    }
}

const fn row(
    number: &'static str,
    fault: &'static str,
    place: &'static str,
    expected: &'static str,
    ground: Ground,
    act: Act,
) -> Row {
    Row { number, fault, place, expected, ground, act }
}

use Act::*;
use Ground::*;

const PROXY: &str = "acknowledges nothing itself, another leads, requests are answered through it";
const REPAIRED: &str = "repaired from the others, with everything";
const REBUILT: &str = "repaired or rebuilt from a replica, with everything";
const FULL: &str = "another leads, reads and deletes go on, clears itself";
const ENDS: &str = "the whole process ends, with the reason";

/// One place in memory: cells are told apart by it.
pub static TABLE: &[Row] = &[
    row("1", "fsync fails once", "log, append", PROXY, Simulated, SyncFails(SyncFault::PagesMarkedClean)),
    row("1", "fsync fails once", "log, roll", PROXY, Simulated, RollFails),
    row("1", "fsync fails once", "vote", PROXY, Simulated, VoteFails),
    row("1", "fsync fails once", "tree, manifest, checkpoint", PROXY, Kernel, TreeFails),
    row("1", "fsync fails once", "folder of the log", PROXY, Simulated, FolderFails),
    row("2", "fsync fails, restart, eviction", "log", "the same before and after", Kernel, RestartAndEviction),
    row("3", "fsync fails, reported late", "log, append", PROXY, Simulated, SyncFails(SyncFault::ReportedLate)),
    row("3", "fsync fails, contents reverted", "log, append", PROXY, Simulated, SyncFails(SyncFault::ContentsReverted)),
    row("4", "the file system turns read-only", "all files", PROXY, Kernel, ReadOnly),
    row("6", "a damaged block", "log, at rest", REPAIRED, Simulated, AtRest(Harm::RandomBlock)),
    row("6", "reads fail", "log, at rest", REBUILT, Simulated, AtRest(Harm::BlocksUnreadable)),
    row("6", "a damaged block", "checkpoint", REPAIRED, Simulated, AtRest(Harm::CheckpointBlock)),
    row("6", "a damaged block", "tree, at rest", REBUILT, Simulated, AtRest(Harm::TableBlock)),
    row(
        "7",
        "a damaged block and another node down",
        "log",
        "recovers, or halts until it can",
        Simulated,
        DamageAndOneDown,
    ),
    row("8", "a segment is missing", "log", REBUILT, Simulated, AtRest(Harm::SegmentMissing)),
    row("8", "a segment is short", "log", REBUILT, Simulated, AtRest(Harm::SegmentShort)),
    row("8", "a segment is long", "log", REPAIRED, Simulated, AtRest(Harm::SegmentLong)),
    row("8", "a table is missing", "tree, at rest", REBUILT, Simulated, AtRest(Harm::TableMissing)),
    row("8", "a segment cannot be read", "log", REBUILT, Simulated, AtRest(Harm::SegmentUnreadable)),
    row(
        "8",
        "a copy of the hard state is damaged",
        "log",
        "comes back by the other copy",
        Simulated,
        AtRest(Harm::OneHardState),
    ),
    row("8", "the hard state is damaged", "log", "rebuilt under a fresh id", Simulated, AtRest(Harm::BothHardStates)),
    row(
        "8",
        "the identity is missing",
        "data folder",
        "rebuilt under a fresh id",
        Simulated,
        AtRest(Harm::IdentityMissing),
    ),
    row("9", "an old copy is put back", "whole folder", "refused", Simulated, OldCopy),
    row("9", "a bit flips", "log, at rest", REPAIRED, Simulated, AtRest(Harm::BitFlip)),
    row("9", "a write lands elsewhere", "log", REPAIRED, Simulated, WriteLandsElsewhere),
    row(
        "10",
        "power cut, unsynced data lost or torn",
        "log",
        "a torn tail is cut, synced data is kept",
        Simulated,
        PowerCut,
    ),
    row("11", "the disk hangs", "all files", "hands over, is fenced, others go on", Kernel, Hang),
    row("12", "no space", "all files", FULL, Small, NoBytes),
    row("12", "no inodes", "all files", FULL, Small, NoInodes),
    row("13", "kill -9", "process", "comes back; no stale read", Processes, Kill),
    row("13", "SIGSTOP and SIGCONT", "process", "no stale read after it goes on", Processes, Freeze),
    row("17", "a wiped node returns", "whole folder", "rebuilt under a fresh id", Simulated, Wiped),
    row("17", "a wiped node returns, and another is down", "whole folder", "waits for it", Simulated, WipedAndOneDown),
    row("18", "a thread dies", "writer of the log", "the node says that it cannot go on", Simulated, WriterDies),
    row("18", "a task dies", "apply", ENDS, Processes, TaskDies("task.apply")),
    row("18", "a task dies", "Raft and its heartbeats", ENDS, Processes, TaskDies("task.raft")),
    row("18", "a task dies", "the one that takes checkpoints", ENDS, Processes, TaskDies("task.upkeep")),
];

/// On whom.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Victim {
    Leader,
    Follower,
}

impl Victim {
    pub fn word(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::Follower => "follower",
        }
    }
}

/// What came of a cell.
pub struct Outcome {
    /// What the victim did, in words.
    pub seen: String,
    pub acknowledged: u64,
    pub reads: u64,
    /// Requests to nodes that were up that ended in anything but success.
    pub errors: u64,
    /// What the judge or the expectation found wrong.
    pub wrong: Option<String>,
}
