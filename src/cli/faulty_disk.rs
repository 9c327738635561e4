//! A disk that fails on command, as drills and tests use it.
//!
//! The disk is the helper program `stemedb-faulty-disk`, which is not part of the server and is built
//! only when asked for. It ends, and unmounts everything, when this side of its standard input is
//! gone; so dropping a [`FaultyDisk`] cleans up, and so does the death of the process that held it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command as Process, Stdio};
use std::sync::{Mutex, PoisonError};

use super::CliError;

pub mod wire;

use wire::{Action, Command, Counts, Failure, Held, IoLine, Kind, Reply, Rule, SyncCall};

/// Name of the helper program.
pub const PROGRAM: &str = "stemedb-faulty-disk";

/// How it is built.
pub const HOW_TO_BUILD: &str = "cargo build --release --features faulty-disk";

/// Microseconds of CLOCK_MONOTONIC: the clock of the disk's log and of the kernel's tracepoints.
pub fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (u64::try_from(now.tv_sec), u64::try_from(now.tv_nsec));
    seconds.unwrap_or(0) * 1_000_000 + nanos.unwrap_or(0) / 1000
}

/// A running faulty disk with a mounted file system.
pub struct FaultyDisk {
    talk: Mutex<Talk>,
    mount: PathBuf,
    io_log: PathBuf,
    device: String,
    unwatched: Option<String>,
}

struct Talk {
    child: Child,
    /// `None` once dropped: the helper takes its end as the order to stop.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

fn local(what: impl std::fmt::Display) -> CliError {
    CliError::Local(format!("{PROGRAM}: {what}"))
}

/// The helper's file: as given, or beside this program.
pub fn find_program(given: Option<&Path>) -> Result<PathBuf, CliError> {
    let (path, how) = match given {
        Some(path) => (path.to_owned(), "--faulty-disk names no file"),
        None => {
            let own = std::env::current_exe().map_err(|error| local(format!("cannot find this program: {error}")))?;
            (own.with_file_name(PROGRAM), "it is not beside this program")
        }
    };
    if path.is_file() {
        return Ok(path);
    }
    Err(CliError::Usage(format!(
        "this needs the helper program {PROGRAM}, which no server contains, and {how}: {}.\nBuild it with `{HOW_TO_BUILD}`, or name it with --faulty-disk PATH.",
        path.display()
    )))
}

impl FaultyDisk {
    /// Makes a disk of `size_mb` MiB with its image and log in `dir`, and mounts an ext4 of it on `mount`. Needs root.
    pub fn start(program: &Path, dir: &Path, mount: &Path, size_mb: u64) -> Result<Self, CliError> {
        fs::create_dir_all(dir).map_err(|error| local(format!("{}: {error}", dir.display())))?;
        let mut child = Process::new(program)
            .arg("--dir")
            .arg(dir)
            .arg("--mount")
            .arg(mount)
            .args(["--size-mb", &size_mb.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for the parent, whose end is the helper's.
            .process_group(0)
            .spawn()
            .map_err(|error| local(format!("{}: {error}", program.display())))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(local("has no pipes"));
        };
        let mut talk = Talk { child, stdin: Some(stdin), stdout: BufReader::new(stdout) };
        match talk.receive()? {
            Reply::Ready { device, unwatched } => Ok(Self {
                talk: Mutex::new(talk),
                mount: mount.to_owned(),
                io_log: dir.join("io.log"),
                device,
                unwatched,
            }),
            other => Err(local(format!("began with {other:?}"))),
        }
    }

    /// Where the file system is mounted.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The loop device under the file system.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Process id of the helper.
    pub fn pid(&self) -> u32 {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner).child.id()
    }

    /// Why the kernel's calls of fsync cannot be noted here, if so.
    pub fn unwatched(&self) -> Option<&str> {
        self.unwatched.as_deref()
    }

    /// A further fault.
    pub fn add(&self, rule: Rule) -> Result<(), CliError> {
        self.done(&Command::Add { rule })
    }

    /// From now on writes to these bytes of the disk fail, `times` times or always.
    pub fn fail_writes(&self, ranges: Vec<(u64, u64)>, failure: Failure, times: Option<u64>) -> Result<(), CliError> {
        self.add(Rule { on: vec![Kind::Write], ranges, action: Action::Fail(failure), times })
    }

    /// From now on flushes of the disk fail, `times` times or always.
    pub fn fail_syncs(&self, failure: Failure, times: Option<u64>) -> Result<(), CliError> {
        self.add(Rule { on: vec![Kind::Sync], ranges: Vec::new(), action: Action::Fail(failure), times })
    }

    /// From now on writes and flushes do not end.
    pub fn hang(&self) -> Result<(), CliError> {
        self.add(Rule { on: vec![Kind::Write, Kind::Sync], ranges: Vec::new(), action: Action::Hang, times: None })
    }

    /// The disk is gone: everything fails.
    pub fn turn_off(&self) -> Result<(), CliError> {
        let on = vec![Kind::Read, Kind::Write, Kind::Sync];
        self.add(Rule { on, ranges: Vec::new(), action: Action::Fail(Failure::Eio), times: None })
    }

    /// No faults from now on; what hangs is ended so.
    pub fn clear(&self, held: Held) -> Result<(), CliError> {
        self.done(&Command::Clear { held })
    }

    /// What the disk was asked for since its start.
    pub fn counts(&self) -> Result<Counts, CliError> {
        match self.ask(&Command::Status)? {
            Reply::Status(counts) => Ok(counts),
            other => Err(local(format!("answered {other:?}"))),
        }
    }

    /// Forgets the kernel's earlier calls of fsync and notes further ones. Fails where the kernel cannot be watched.
    pub fn watch_syncs(&self) -> Result<(), CliError> {
        self.done(&Command::WatchSyncs)
    }

    /// Those calls.
    pub fn syncs(&self) -> Result<Vec<SyncCall>, CliError> {
        match self.ask(&Command::Syncs)? {
            Reply::Syncs { calls } => Ok(calls),
            other => Err(local(format!("answered {other:?}"))),
        }
    }

    /// Everything that reached the disk so far, in order.
    pub fn io_log(&self) -> Result<Vec<IoLine>, CliError> {
        let text = fs::read_to_string(&self.io_log).map_err(|error| local(format!("its log: {error}")))?;
        Ok(text.lines().filter_map(IoLine::parse).collect())
    }

    /// Which bytes of the disk a file on it lies in. What was never written or reserved lies nowhere.
    pub fn ranges_of(&self, file: &Path) -> Result<Vec<(u64, u64)>, CliError> {
        let output = Process::new("filefrag").arg("-v").arg("-b1").arg(file).output();
        let output = output.map_err(|error| local(format!("cannot run filefrag (Debian: e2fsprogs): {error}")))?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(local(format!("filefrag {}: {}", file.display(), why.trim())));
        }
        Ok(extents(&String::from_utf8_lossy(&output.stdout)))
    }

    fn done(&self, command: &Command) -> Result<(), CliError> {
        match self.ask(command)? {
            Reply::Ok => Ok(()),
            other => Err(local(format!("answered {other:?}"))),
        }
    }

    fn ask(&self, command: &Command) -> Result<Reply, CliError> {
        let mut talk = self.talk.lock().unwrap_or_else(PoisonError::into_inner);
        talk.send(command)?;
        match talk.receive()? {
            Reply::Error { why } => Err(local(why)),
            reply => Ok(reply),
        }
    }
}

impl Talk {
    fn send(&mut self, command: &Command) -> Result<(), CliError> {
        let mut line = serde_json::to_string(command).map_err(local)?;
        line.push('\n');
        let stdin = self.stdin.as_mut().ok_or_else(|| local("has stopped"))?;
        stdin.write_all(line.as_bytes()).map_err(local)
    }

    fn receive(&mut self) -> Result<Reply, CliError> {
        let mut line = String::new();
        match self.stdout.read_line(&mut line) {
            Ok(0) => Err(local("ended by itself; what it said is on the standard error")),
            Ok(_) => serde_json::from_str(&line).map_err(|error| local(format!("answered {line:?}: {error}"))),
            Err(error) => Err(local(error)),
        }
    }
}

impl Drop for Talk {
    /// Waits until everything is unmounted: whoever removes the folder next must not meet a file system in it.
    fn drop(&mut self) {
        drop(self.stdin.take());
        if let Err(error) = self.child.wait() {
            super::output::notice(&format!("{PROGRAM}: {error}"));
        }
    }
}

/// Rows of `filefrag -v -b1` such as `   0:        0.. 1048575:  34603008..  35651583: 1048576:   last,eof`.
fn extents(text: &str) -> Vec<(u64, u64)> {
    let row = |line: &str| {
        let mut columns = line.split(':');
        let _number: u64 = columns.next()?.trim().parse().ok()?;
        let (from, to) = columns.nth(1)?.split_once("..")?;
        let (from, to): (u64, u64) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        Some((from, to + 1))
    };
    text.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_read() {
        let text = "Filesystem type is: ef53\n\
            File size of /m/f is 1052672 (1052672 blocks of 1 bytes)\n \
            ext:     logical_offset:        physical_offset: length:   expected: flags:\n   \
            0:        0.. 1048575:   34603008..  35651583: 1048576:            \n   \
            1:  1048576.. 1052671:   41943040..  41947135:    4096:   35651584: last,eof\n\
            /m/f: 2 extents found\n";
        assert_eq!(extents(text), [(34_603_008, 35_651_584), (41_943_040, 41_947_136)]);
        assert_eq!(extents("/m/f: 0 extents found\n"), []);
    }

    #[test]
    fn a_missing_helper_is_named_with_the_way_to_build_it() {
        let error = find_program(Some(Path::new("/nowhere/x"))).expect_err("no such file").to_string();
        assert!(error.contains("/nowhere/x") && error.contains("--features faulty-disk"), "{error}");
    }
}
