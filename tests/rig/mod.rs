//! What tests on real file systems share: who may run, disks that fail, disks that are small, processes that stand still.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout)]

pub mod three;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Advice, fadvise};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};
use stemedb::cli::faulty_disk::FaultyDisk;

/// Far above what any condition needs; only a hang ends a test by this.
pub const HANG: Duration = Duration::from_secs(120);

/// Says that a test does not run, and why; where nothing may be skipped, fails it.
pub fn skipped(why: &str) {
    println!("SKIPPED: {why}");
    let may_not = std::env::var_os("STEMEDB_TEST_NO_SKIPS").is_some_and(|value| value == "1");
    assert!(!may_not, "nothing may be skipped here: {why}");
}

/// Why nothing can be mounted here, if so.
fn why_no_mounts() -> Option<&'static str> {
    (!rustix::process::geteuid().is_root()).then_some("mounting needs root")
}

pub fn is_on_path(program: &str) -> bool {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&folders).chain(sbin).any(|folder| folder.join(program).is_file())
}

/// The helper program; `None`, said on the way, where faulty disks cannot be had.
pub fn faulty_disk_program() -> Option<PathBuf> {
    let missing = |what: &str| {
        skipped(what);
        None
    };
    if let Some(why) = why_no_mounts() {
        return missing(why);
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(device).exists() {
            return missing(&format!("there is no {device}"));
        }
    }
    for program in ["mkfs.ext4", "losetup", "filefrag"] {
        if !is_on_path(program) {
            return missing(&format!("{program} is not installed"));
        }
    }
    match option_env!("CARGO_BIN_EXE_stemedb-faulty-disk") {
        Some(path) => Some(PathBuf::from(path)),
        None => missing("built without `--features faulty-disk`"),
    }
}

/// A mounted faulty disk in a folder of its own, unmounted and removed when dropped.
pub struct Rig {
    pub disk: FaultyDisk,
    pub dir: tempfile::TempDir,
}

impl Rig {
    /// `None` where it cannot be had.
    pub fn new(size_mb: u64) -> Option<Self> {
        let program = faulty_disk_program()?;
        let dir = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::start(&program, &dir.path().join("disk"), &dir.path().join("mount"), size_mb).unwrap();
        Some(Self { disk, dir })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.disk.mount().join(name)
    }
}

/// Drops a file's clean pages, so that the next read shows what the disk has.
pub fn evict(file: &File) {
    fadvise(file, 0, None, Advice::DontNeed).unwrap();
}

/// Whether something is mounted there.
pub fn is_mounted(path: &Path) -> bool {
    let path = path.to_str().unwrap();
    std::fs::read_to_string("/proc/self/mounts").unwrap().lines().any(|line| line.split(' ').nth(1) == Some(path))
}

/// A small tmpfs, unmounted when dropped.
pub struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    /// `None` where nothing can be mounted.
    pub fn new(bytes: u64, inodes: u64) -> Option<Self> {
        if let Some(why) = why_no_mounts() {
            skipped(why);
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={bytes},nr_inodes={inodes}")).unwrap();
        mount("stemedb-small", dir.path(), "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
        Some(Self { dir })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Takes all bytes but these.
    pub fn leave_bytes(&self, bytes: u64) {
        let file = File::options().create(true).truncate(false).write(true).open(self.path().join("filler")).unwrap();
        loop {
            let stat = rustix::fs::statvfs(self.path()).unwrap();
            let free = stat.f_bavail * stat.f_frsize;
            if free <= bytes {
                return;
            }
            let length = file.metadata().unwrap().len();
            // A node may take some of it meanwhile.
            let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), length, free - bytes);
        }
    }

    /// Takes all inodes.
    pub fn leave_no_inode(&self) {
        for number in 0.. {
            let path = self.path().join(format!("full-{number}"));
            let made = File::options().create_new(true).write(true).open(path);
            if made.is_err() && rustix::fs::statvfs(self.path()).unwrap().f_ffree == 0 {
                return;
            }
        }
    }

    /// Gives back what was taken.
    pub fn free(&self) {
        for entry in std::fs::read_dir(self.path()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            if name == "filler" || name.starts_with("full-") {
                std::fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Before the folder is removed: fields go after this.
        if let Err(error) = unmount(self.dir.path(), UnmountFlags::DETACH) {
            println!("cannot unmount {}: {error}", self.dir.path().display());
        }
    }
}

/// Stops a process where it is, as a hung machine would; `resume` lets it go on.
pub fn freeze(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
    wait_until("the process stands still", || is_frozen(pid));
}

pub fn resume(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::CONT).unwrap();
}

/// `T` behind the name in brackets in `/proc/<pid>/stat`.
pub fn is_frozen(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
}

/// Waits for a condition.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let pause = Duration::from_millis(5);
    for _ in 0..HANG.as_millis() / pause.as_millis() {
        if condition() {
            return;
        }
        std::thread::sleep(pause);
    }
    panic!("waited in vain: {what}");
}
