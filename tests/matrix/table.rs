//! The table: which faults, where, on whom, and what must come of them. Row numbers are those of the list of faults that
//! the database must survive.

/// What is broken in a cell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// The next sync of a file of the log fails once; later readers see the new data until it is evicted.
    SyncFailsOnce,
    /// As that, and readers see the old data again.
    SyncFailsAndReverts,
    /// The file system turns read-only. On the real kernel.
    ReadOnly,
    /// A stopped node's log is damaged in a random block where it was durable.
    RandomBlock,
    /// One bit of a stopped node's log is flipped where it was durable.
    BitFlip,
    /// A segment of a stopped node is gone.
    SegmentMissing,
    /// A segment of a stopped node is cut to half.
    SegmentShort,
    /// The power goes; of what was not synced a random part survives.
    PowerCut,
    /// kill -9 of the process, and a restart.
    Kill,
    /// SIGSTOP until the others have served without it, then SIGCONT.
    Freeze,
    /// The folder is emptied while the node is stopped.
    Wiped,
    /// The thread that writes the log panics.
    WriterDies,
    /// Nobody built what this needs.
    Waits(&'static str),
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
const REPAIR_OR_HALT: &str = "repaired, or the start is refused and says where";

pub const TABLE: &[Row] = &[
    row("1", "fsync fails once", "log, append", PROXY, Simulated, SyncFailsOnce),
    row("1", "fsync fails once", "log, roll", PROXY, Simulated, Waits("failures of a roll")),
    row("1", "fsync fails once", "vote", PROXY, Simulated, Waits("failures of the hard state")),
    row("1", "fsync fails once", "tree, manifest, checkpoint", PROXY, Kernel, Waits("failures of the tree")),
    row("1", "fsync fails once", "folder of the log", PROXY, Simulated, Waits("failures of the folder")),
    row(
        "2",
        "fsync fails, restart, eviction",
        "log",
        "the same state before and after",
        Kernel,
        Waits("recovery without the page cache"),
    ),
    row("3", "fsync fails, contents reverted", "log, append", PROXY, Simulated, SyncFailsAndReverts),
    row("4", "the file system turns read-only", "all files", PROXY, Kernel, ReadOnly),
    row("6", "a damaged block", "log, at rest", REPAIR_OR_HALT, Simulated, RandomBlock),
    row("6", "a damaged block", "tree, checkpoint", "repaired from a replica", Simulated, Waits("repair of the tree")),
    row("6", "reads fail", "log, tree", "repaired from a replica", Simulated, Waits("repair from peers")),
    row(
        "7",
        "a damaged block and another node down",
        "log",
        "recovers, or halts until it can",
        Simulated,
        Waits("repair from peers"),
    ),
    row("8", "a segment is missing", "log", REPAIR_OR_HALT, Simulated, SegmentMissing),
    row("8", "a segment is short", "log", REPAIR_OR_HALT, Simulated, SegmentShort),
    row("9", "a bit flips", "log, at rest", REPAIR_OR_HALT, Simulated, BitFlip),
    row("9", "an old copy is put back", "whole folder", "refused", Simulated, Waits("identity after a rebuild")),
    row(
        "10",
        "power cut, unsynced data lost or torn",
        "log",
        "a torn tail is cut, synced data is kept",
        Simulated,
        PowerCut,
    ),
    row("11", "the disk hangs", "log", "hands over, is fenced, others go on", Kernel, Waits("watchdog and fence")),
    row("12", "no space", "log", "reads and deletes work, clears itself", Simulated, Waits("the ballast")),
    row(
        "12",
        "no space, no inodes",
        "tree, checkpoint",
        "reads and deletes work, clears itself",
        Kernel,
        Waits("the ballast"),
    ),
    row("13", "kill -9", "process", "comes back; no stale read", Processes, Kill),
    row("13", "SIGSTOP and SIGCONT", "process", "no stale read after it goes on", Processes, Freeze),
    row("17", "a wiped node returns", "whole folder", "refused: it is a member already", Simulated, Wiped),
    row("18", "a thread dies", "writer of the log", "the node says that it cannot go on", Simulated, WriterDies),
    row(
        "18",
        "a thread dies",
        "apply, heartbeat",
        "the node says that it cannot go on",
        Simulated,
        Waits("fail points"),
    ),
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
