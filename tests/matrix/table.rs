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
    /// The sync that follows this point fails: a table's, the manifest's, a checkpoint's. The log lies elsewhere. On the
    /// real kernel.
    TreeFails(&'static str),
    /// A write to this part of a segment fails once. On the real kernel.
    BlockFails(Part),
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
    /// The same, and another node's disk is so slow that it lags.
    DamageAndOneLagging,
    /// A bit flips in the log of each node, in another entry of each.
    EachInAnotherEntry,
    /// A stopped node gets the files that it had at an earlier stop.
    OldCopy,
    /// All get the files that they had at earlier stops, one after the other.
    AllOldCopies,
    /// The power goes; of what was not synced a random part survives.
    PowerCut,
    /// Nothing that the disk is asked for ends, until the process has fenced itself. On the real kernel.
    Hang,
    /// The same for so many milliseconds, so many times.
    HangsFor(u64, u32),
    /// Reads of the tree do not end for a while, and nothing else hangs. On the real kernel.
    ReadsHang,
    /// Reads of a table fail while the node runs. On the real kernel.
    ReadsFail,
    /// The disk has no byte left.
    NoBytes,
    /// The disk has no inode left.
    NoInodes,
    /// The log gets no room for its next segment, and no number shows why: a quota.
    Quota,
    /// kill -9 of the process, and a restart.
    Kill,
    /// SIGSTOP until the others have served without it, then SIGCONT.
    Freeze,
    /// The folder is emptied while the node is stopped.
    Wiped,
    /// The same, and another node is down when it comes back.
    WipedAndOneDown,
    /// The same, and another node's disk is so slow that it lags.
    WipedAndOneLagging,
    /// The thread that writes the log panics.
    WriterDies,
    /// The task that passes this point panics.
    TaskDies(&'static str),
}

/// Of a segment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    /// Headers, marks and rows.
    First,
    /// Frames.
    Middle,
    /// The end, just before the next segment.
    Last,
}

/// Which file of a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Which {
    Table,
    Manifest,
    /// Says which tree counts.
    Pointer,
    /// The whole folder `kv`.
    Tree,
    Checkpoint,
    Identity,
    PeersSeen,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    /// Moved away, as runbooks say.
    Missing,
    Short,
    Long,
    /// It is there, and opening it is an error.
    Unopenable,
    /// It can be opened, and reading it is an error.
    Unreadable,
    BitFlip,
}

/// A part of a segment that has checksums of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Zone {
    Header,
    Mark,
    Row,
    FrameHeader,
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
    CheckpointBlock,
    /// A bit of the log.
    Bit(Zone),
    /// A file.
    File(Which, How),
}

impl Harm {
    /// Whether it falls on files that only a node has that has flushed.
    pub fn needs_tables(self) -> bool {
        match self {
            Self::TableBlock | Self::CheckpointBlock => true,
            Self::File(which, _) => !matches!(which, Which::Identity | Which::PeersSeen),
            _ => false,
        }
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
const NAMED: &str = "comes back, or does not start and names the file";
const ENDS: &str = "the whole process ends, with the reason";

/// One place in memory: cells are told apart by it.
pub static TABLE: &[Row] = &[
    row("1", "fsync fails once", "log, append", PROXY, Simulated, SyncFails(SyncFault::PagesMarkedClean)),
    row("1", "fsync fails once", "log, roll", PROXY, Simulated, RollFails),
    row("1", "fsync fails once", "vote", PROXY, Simulated, VoteFails),
    row("1", "fsync fails once", "log, rows and marks", PROXY, Kernel, BlockFails(Part::First)),
    row("1", "fsync fails once", "log, frames", PROXY, Kernel, BlockFails(Part::Middle)),
    row("1", "fsync fails once", "log, end of a segment", PROXY, Kernel, BlockFails(Part::Last)),
    row("1", "fsync fails once", "tree, a table", PROXY, Kernel, TreeFails("flush.tables")),
    row("1", "fsync fails once", "tree, the manifest", PROXY, Kernel, TreeFails("flush.manifest")),
    row("1", "fsync fails once", "checkpoint", PROXY, Kernel, TreeFails("checkpoint.manifest")),
    row("1", "fsync fails once", "folder of the log", PROXY, Simulated, FolderFails),
    row("2", "fsync fails, restart, eviction", "log", "the same before and after", Kernel, RestartAndEviction),
    row("3", "fsync fails, reported late", "log, append", PROXY, Simulated, SyncFails(SyncFault::ReportedLate)),
    row("3", "fsync fails, contents reverted", "log, append", PROXY, Simulated, SyncFails(SyncFault::ContentsReverted)),
    row("4", "the file system turns read-only", "all files", PROXY, Kernel, ReadOnly),
    row("6", "a damaged block", "log, at rest", REPAIRED, Simulated, AtRest(Harm::RandomBlock)),
    row("6", "reads fail", "log, at rest", REBUILT, Simulated, AtRest(Harm::BlocksUnreadable)),
    row("6", "a damaged block", "checkpoint", REPAIRED, Simulated, AtRest(Harm::CheckpointBlock)),
    row("6", "a damaged block", "tree, at rest", REBUILT, Simulated, AtRest(Harm::TableBlock)),
    row("6", "reads fail", "tree, at rest", REBUILT, Simulated, AtRest(Harm::File(Which::Table, How::Unreadable))),
    row("6", "reads fail", "tree, while it runs", REBUILT, Kernel, ReadsFail),
    row("6", "reads fail", "checkpoint", REPAIRED, Simulated, AtRest(Harm::File(Which::Checkpoint, How::Unreadable))),
    row(
        "7",
        "a damaged block and another node down",
        "log",
        "recovers, or halts until it can",
        Simulated,
        DamageAndOneDown,
    ),
    row(
        "7",
        "a damaged block and another node lags",
        "log",
        "recovers, or halts until it can",
        Simulated,
        DamageAndOneLagging,
    ),
    row("8", "a segment is missing", "log", REBUILT, Simulated, AtRest(Harm::SegmentMissing)),
    row("8", "a segment is short", "log", REBUILT, Simulated, AtRest(Harm::SegmentShort)),
    row("8", "a segment is long", "log", REPAIRED, Simulated, AtRest(Harm::SegmentLong)),
    row("8", "a table is missing", "tree, at rest", REBUILT, Simulated, AtRest(Harm::File(Which::Table, How::Missing))),
    row("8", "a table is short", "tree, at rest", REBUILT, Simulated, AtRest(Harm::File(Which::Table, How::Short))),
    row("8", "a table is long", "tree, at rest", REBUILT, Simulated, AtRest(Harm::File(Which::Table, How::Long))),
    row(
        "8",
        "a table cannot be opened",
        "tree, at rest",
        REBUILT,
        Simulated,
        AtRest(Harm::File(Which::Table, How::Unopenable)),
    ),
    row(
        "8",
        "the manifest is missing",
        "tree, at rest",
        REBUILT,
        Simulated,
        AtRest(Harm::File(Which::Manifest, How::Missing)),
    ),
    row(
        "8",
        "the manifest is short",
        "tree, at rest",
        REBUILT,
        Simulated,
        AtRest(Harm::File(Which::Manifest, How::Short)),
    ),
    row(
        "8",
        "what names the tree is missing",
        "tree, at rest",
        REBUILT,
        Simulated,
        AtRest(Harm::File(Which::Pointer, How::Missing)),
    ),
    row(
        "8",
        "the folder was moved away",
        "tree, at rest",
        REBUILT,
        Simulated,
        AtRest(Harm::File(Which::Tree, How::Missing)),
    ),
    row(
        "8",
        "its manifest is missing",
        "checkpoint",
        REPAIRED,
        Simulated,
        AtRest(Harm::File(Which::Checkpoint, How::Missing)),
    ),
    row(
        "8",
        "its manifest is short",
        "checkpoint",
        REPAIRED,
        Simulated,
        AtRest(Harm::File(Which::Checkpoint, How::Short)),
    ),
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
    row("8", "the identity is short", "data folder", NAMED, Simulated, AtRest(Harm::File(Which::Identity, How::Short))),
    row(
        "8",
        "the identity cannot be opened",
        "data folder",
        NAMED,
        Simulated,
        AtRest(Harm::File(Which::Identity, How::Unopenable)),
    ),
    row(
        "8",
        "the boots seen of others are missing",
        "data folder",
        NAMED,
        Simulated,
        AtRest(Harm::File(Which::PeersSeen, How::Missing)),
    ),
    row(
        "8",
        "the boots seen of others are short",
        "data folder",
        NAMED,
        Simulated,
        AtRest(Harm::File(Which::PeersSeen, How::Short)),
    ),
    row("9", "an old copy is put back", "whole folder", "refused", Simulated, OldCopy),
    row("9", "a bit flips", "log, at rest", REPAIRED, Simulated, AtRest(Harm::BitFlip)),
    row("9", "a bit flips", "log, a segment's header", REPAIRED, Simulated, AtRest(Harm::Bit(Zone::Header))),
    row("9", "a bit flips", "log, a mark", REPAIRED, Simulated, AtRest(Harm::Bit(Zone::Mark))),
    row("9", "a bit flips", "log, a row", REPAIRED, Simulated, AtRest(Harm::Bit(Zone::Row))),
    row("9", "a bit flips", "log, a frame's header", REPAIRED, Simulated, AtRest(Harm::Bit(Zone::FrameHeader))),
    row("9", "a bit flips", "tree, a table", REBUILT, Simulated, AtRest(Harm::File(Which::Table, How::BitFlip))),
    row(
        "9",
        "a bit flips",
        "tree, the manifest",
        REBUILT,
        Simulated,
        AtRest(Harm::File(Which::Manifest, How::BitFlip)),
    ),
    row("9", "a bit flips", "checkpoint", REPAIRED, Simulated, AtRest(Harm::File(Which::Checkpoint, How::BitFlip))),
    row("9", "a bit flips", "identity", NAMED, Simulated, AtRest(Harm::File(Which::Identity, How::BitFlip))),
    row("9", "a bit flips on every node", "log, another entry of each", REPAIRED, Simulated, EachInAnotherEntry),
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
    row("11", "the disk hangs for 0.1 s", "all files", "goes on", Kernel, HangsFor(100, 1)),
    row("11", "the disk hangs for 1 s", "all files", "hands over and goes on", Kernel, HangsFor(1_000, 1)),
    row("11", "the disk hangs for 5 s", "all files", "hands over and goes on", Kernel, HangsFor(5_000, 1)),
    row("11", "the disk hangs, comes and goes", "all files", "hands over and goes on", Kernel, HangsFor(700, 5)),
    row("11", "reads hang", "tree", "hands over and goes on", Kernel, ReadsHang),
    row("12", "no space", "all files", FULL, Small, NoBytes),
    row("12", "no inodes", "all files", FULL, Small, NoInodes),
    row("12", "a quota", "log, its next segment", FULL, Simulated, Quota),
    row("13", "kill -9", "process", "comes back; no stale read", Processes, Kill),
    row("13", "SIGSTOP and SIGCONT", "process", "no stale read after it goes on", Processes, Freeze),
    row("17", "a wiped node returns", "whole folder", "rebuilt under a fresh id", Simulated, Wiped),
    row("17", "a wiped node returns, and another is down", "whole folder", "waits for it", Simulated, WipedAndOneDown),
    row(
        "17",
        "a wiped node returns, and another lags",
        "whole folder",
        "rebuilt once the other one has everything",
        Simulated,
        WipedAndOneLagging,
    ),
    row("17", "old copies are put back on all nodes", "whole folder", "refused", Simulated, AllOldCopies),
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
