//! What is said to `stemedb-faulty-disk` and what it answers: one JSON object per line, in and out.

use serde::{Deserialize, Serialize};

/// A command. Each gets one [`Reply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// A further fault. The first rule that fits an operation decides.
    Add {
        /// The fault.
        rule: Rule,
    },
    /// No faults from now on; operations that hang are ended so.
    Clear {
        /// How.
        held: Held,
    },
    /// Counts.
    Status,
    /// From now on the kernel's calls of fsync and fdatasync on this file system are noted; earlier ones are forgotten.
    WatchSyncs,
    /// Those noted since.
    Syncs,
}

/// A fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What it is about.
    pub on: Vec<Kind>,
    /// Byte ranges of the disk, from included, to excluded; none: everywhere. A flush has no place and fits any.
    #[serde(default)]
    pub ranges: Vec<(u64, u64)>,
    /// What happens.
    pub action: Action,
    /// How often; `None`: until cleared.
    #[serde(default)]
    pub times: Option<u64>,
}

/// What a disk is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Bytes are read.
    Read,
    /// Bytes are written, zeroed or discarded.
    Write,
    /// A flush of the disk's cache: what a sync of any file ends with.
    Sync,
}

/// What happens to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It fails.
    Fail(Failure),
    /// It is done so many milliseconds later.
    DelayMs(u64),
    /// It does not end until the faults are cleared.
    Hang,
    /// It is answered as done, and was not: a disk that lies.
    Lose,
}

/// An error of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Failure {
    /// Input/output error.
    Eio,
    /// No space: what a thin device says.
    Enospc,
}

/// How operations that hang are ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// They are done now.
    Done,
    /// They fail with EIO.
    Failed,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Said once, without having been asked: the file system is mounted.
    Ready {
        /// The loop device.
        device: String,
        /// Why the kernel's syncs cannot be noted here, if so.
        unwatched: Option<String>,
    },
    /// Done.
    Ok,
    /// Not done.
    Error {
        /// Why.
        why: String,
    },
    /// Counts since the start.
    Status(Counts),
    /// Calls of fsync and fdatasync, in the order of their beginning.
    Syncs {
        /// Each call.
        calls: Vec<SyncCall>,
    },
}

/// Operations since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Reads received.
    pub reads: u64,
    /// Writes received.
    pub writes: u64,
    /// Flushes received.
    pub syncs: u64,
    /// Of all of them, those that met a fault.
    pub faults: u64,
    /// Of those, the ones that hang now.
    pub held: u64,
}

/// One call of fsync or fdatasync, as the kernel's tracepoints of ext4 saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncCall {
    /// Beginning, microseconds of CLOCK_MONOTONIC.
    pub at_us: u64,
    /// End, on the same clock; `None` while it has not ended.
    pub end_us: Option<u64>,
    /// The file's inode.
    pub ino: u64,
    /// What it returned, 0 or a negative errno; `None` while it has not.
    pub result: Option<i32>,
}

/// One line of the disk's own log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoLine {
    /// When it was received, or, of an operation that was held, answered; microseconds of CLOCK_MONOTONIC.
    pub at_us: u64,
    /// What was asked.
    pub kind: Kind,
    /// First byte; 0 of a flush.
    pub offset: u64,
    /// Bytes; 0 of a flush.
    pub bytes: u64,
    /// What became of it.
    pub result: IoResult,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoResult {
    /// Done.
    Done,
    /// Failed with this errno.
    Failed(i32),
    /// Kept back; a second line follows when it is answered.
    Held,
    /// Answered as done and not done.
    Lost,
}

impl IoLine {
    /// `<us> <read|write|sync> <offset> <bytes> <ok|held|lost|errno N>`
    pub fn text(&self) -> String {
        let kind = match self.kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Sync => "sync",
        };
        let result = match self.result {
            IoResult::Done => "ok".to_owned(),
            IoResult::Held => "held".to_owned(),
            IoResult::Lost => "lost".to_owned(),
            IoResult::Failed(errno) => format!("errno={errno}"),
        };
        format!("{} {kind} {} {} {result}", self.at_us, self.offset, self.bytes)
    }

    /// The inverse of `text`; `None` of anything else, such as a line that is being written.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let mut next = || words.next();
        let at_us = next()?.parse().ok()?;
        let kind = match next()? {
            "read" => Kind::Read,
            "write" => Kind::Write,
            "sync" => Kind::Sync,
            _ => return None,
        };
        let (offset, bytes) = (next()?.parse().ok()?, next()?.parse().ok()?);
        let result = match next()? {
            "ok" => IoResult::Done,
            "held" => IoResult::Held,
            "lost" => IoResult::Lost,
            other => IoResult::Failed(other.strip_prefix("errno=")?.parse().ok()?),
        };
        words.next().is_none().then_some(Self { at_us, kind, offset, bytes, result })
    }

    /// Whether it touches one of these ranges.
    pub fn touches(&self, ranges: &[(u64, u64)]) -> bool {
        overlaps(ranges, self.offset, self.bytes)
    }
}

/// Whether `bytes` bytes from `offset` on touch one of the ranges.
pub fn overlaps(ranges: &[(u64, u64)], offset: u64, bytes: u64) -> bool {
    let end = offset.saturating_add(bytes);
    ranges.iter().any(|(from, to)| offset < *to && *from < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_written() {
        for result in [IoResult::Done, IoResult::Held, IoResult::Lost, IoResult::Failed(5)] {
            let line = IoLine { at_us: 7, kind: Kind::Write, offset: 4096, bytes: 512, result };
            assert_eq!(IoLine::parse(&line.text()), Some(line));
        }
        for broken in
            ["", "7 write 4096", "7 write 4096 512", "x write 1 2 ok", "7 write 1 2 ok more", "7 write 1 2 errno="]
        {
            assert_eq!(IoLine::parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn ranges_end_before_their_end() {
        let ranges = [(10, 20)];
        let found: Vec<bool> = [(0, 10), (0, 11), (19, 1), (20, 5), (12, 2)]
            .iter()
            .map(|(offset, bytes)| overlaps(&ranges, *offset, *bytes))
            .collect();
        assert_eq!(found, [false, true, true, false, true]);
    }

    #[test]
    fn commands_are_plain_json() {
        let text = r#"{"do":"add","rule":{"on":["write"],"ranges":[[0,4096]],"action":{"fail":"EIO"},"times":1}}"#;
        let read: Command = serde_json::from_str(text).expect("a command");
        let rule =
            Rule { on: vec![Kind::Write], ranges: vec![(0, 4096)], action: Action::Fail(Failure::Eio), times: Some(1) };
        assert_eq!(read, Command::Add { rule });
        let hang: Rule = serde_json::from_str(r#"{"on":["sync"],"action":"hang"}"#).expect("a rule");
        assert_eq!((hang.action, hang.times), (Action::Hang, None));
    }
}
