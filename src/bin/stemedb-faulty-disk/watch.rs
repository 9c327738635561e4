//! Which files are synced, by the word of the kernel.
//!
//! A disk sees flushes, and not for whose sake. The tracepoints `ext4_sync_file_enter` and `_exit` name
//! the inode; an instance of tracing of our own keeps them apart from whatever else is traced here.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use stemedb::cli::faulty_disk::wire::SyncCall;

/// KiB for each CPU; a sync takes about 100 bytes, so that this is some 80,000 of them.
const BUFFER_KB: &str = "8192";

pub struct Watch {
    /// The instance's folder.
    pub instance: PathBuf,
    /// The tracefs mounted for it.
    pub tracefs: PathBuf,
}

impl Watch {
    /// Prepares to watch the file system on `device`; watches nothing yet.
    pub fn new(dir: &Path, device: &str) -> Result<Self, String> {
        let tracefs = dir.join("tracefs");
        let prepare = || -> io::Result<PathBuf> {
            fs::create_dir_all(&tracefs)?;
            mount("tracefs", &tracefs, "tracefs", MountFlags::empty(), None)?;
            let instance = tracefs.join("instances").join(format!("stemedb-{}", std::process::id()));
            fs::create_dir(&instance)?;
            fs::write(instance.join("trace_clock"), "mono")?;
            fs::write(instance.join("buffer_size_kb"), BUFFER_KB)?;
            let number = device_number(device)?;
            for event in ["ext4_sync_file_enter", "ext4_sync_file_exit"] {
                fs::write(instance.join("events/ext4").join(event).join("filter"), format!("dev == {number}"))?;
            }
            Ok(instance)
        };
        match prepare() {
            Ok(instance) => Ok(Self { instance, tracefs }),
            Err(error) => {
                let _may_not_be_mounted = unmount(&tracefs, UnmountFlags::DETACH);
                Err(format!("the kernel's tracing cannot be used: {error}"))
            }
        }
    }

    /// Forgets earlier calls and notes further ones.
    pub fn begin(&self) -> io::Result<()> {
        // Opening it for writing empties it.
        fs::write(self.instance.join("trace"), "")?;
        for event in ["ext4_sync_file_enter", "ext4_sync_file_exit"] {
            fs::write(self.instance.join("events/ext4").join(event).join("enable"), "1")?;
        }
        Ok(())
    }

    /// The calls since `begin`.
    pub fn calls(&self) -> io::Result<Vec<SyncCall>> {
        Ok(parse(&fs::read_to_string(self.instance.join("trace"))?))
    }
}

/// A device's number as the kernel counts inside.
fn device_number(device: &str) -> io::Result<u64> {
    let name = device.rsplit('/').next().unwrap_or_default();
    let text = fs::read_to_string(Path::new("/sys/block").join(name).join("dev"))?;
    let parts = text
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse::<u64>().ok()?, minor.parse::<u64>().ok()?)));
    let (major, minor) = parts.ok_or_else(|| io::Error::other(format!("{device} has the number {text:?}")))?;
    Ok(major << 20 | minor)
}

/// Lines such as `a-123 [001] ..... 12.000345: ext4_sync_file_enter: dev 7,0 ino 12 parent 2 datasync 1`.
fn parse(text: &str) -> Vec<SyncCall> {
    let mut calls: Vec<SyncCall> = Vec::new();
    let mut open: HashMap<(&str, u64), usize> = HashMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((head, event)) = line.split_once(": ext4_sync_file_") else { continue };
        let thread = head.split(" [").next().unwrap_or_default().trim();
        let at_us = head.rsplit(' ').next().and_then(|at| at.replace('.', "").parse().ok());
        let field = |name: &str| {
            let mut words = event.split_whitespace().skip_while(|word| *word != name);
            words.nth(1)
        };
        let (Some(at_us), Some(ino)) = (at_us, field("ino").and_then(|ino| ino.parse().ok())) else { continue };
        if event.starts_with("enter") {
            open.insert((thread, ino), calls.len());
            calls.push(SyncCall { at_us, end_us: None, ino, result: None });
        } else if let Some(call) = open.remove(&(thread, ino)).and_then(|at| calls.get_mut(at)) {
            call.end_us = Some(at_us);
            call.result = field("ret").and_then(|result| result.parse().ok());
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_and_ends_are_brought_together() {
        let text = "# tracer: nop\n\
            # entries-in-buffer/entries-written: 5/5   #P:2\n\
            \x20  wal-writer-41      [001] .....   12.000345: ext4_sync_file_enter: dev 7,0 ino 12 parent 2 datasync 1 \n\
            \x20  tokio rt-42      [000] .....   12.000400: ext4_sync_file_enter: dev 7,0 ino 13 parent 2 datasync 0 \n\
            \x20  wal-writer-41      [001] .....   12.100345: ext4_sync_file_exit: dev 7,0 ino 12 ret -5\n\
            \x20  wal-writer-41      [001] .....   12.200000: ext4_sync_file_enter: dev 7,0 ino 12 parent 2 datasync 1 \n";
        let call = |at_us, ino, end: Option<(u64, i32)>| SyncCall {
            at_us,
            end_us: end.map(|(at_us, _)| at_us),
            ino,
            result: end.map(|(_, result)| result),
        };
        let ended = call(12_000_345, 12, Some((12_100_345, -5)));
        assert_eq!(parse(text), [ended, call(12_000_400, 13, None), call(12_200_000, 12, None)]);
    }
}
