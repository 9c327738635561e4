//! From a sparse file to a mounted ext4, and back.
//!
//! ```text
//!  DIR/image ── this program ── DIR/fuse/disk.img ── /dev/loopN ── ext4 on MOUNT
//! ```
//!
//! What a killed predecessor left behind is cleaned up first: each running program keeps a note below
//! `/run` that says what belongs to it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use fuser::{BackgroundSession, Config, MountOption};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::{Deserialize, Serialize};
use stemedb::cli::faulty_disk::now_us;
use stemedb::cli::output;

use crate::disk::Disk;
use crate::files::{Files, IMAGE};

/// Notes of running programs.
const NOTES: &str = "/run/stemedb-faulty-disk";

/// How long processes may keep files open before the file system is taken from the tree of names without them.
const UNMOUNT_PATIENCE_US: u64 = 2_000_000;

/// How long they may keep files open after that. Servers whose parent is gone take up to 30 s to stop.
const RELEASE_PATIENCE_US: u64 = 40_000_000;

const POLL: Duration = Duration::from_millis(10);

/// What has to be taken down.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Note {
    pub mount: PathBuf,
    pub fuse: PathBuf,
    pub device: Option<String>,
    /// Folder of an instance of the kernel's tracing, and the tracefs mounted for it.
    pub trace: Option<(PathBuf, PathBuf)>,
}

pub struct Ground {
    pub note: Note,
    pub disk: Arc<Disk>,
    /// Serves the kernel until the file system is unmounted.
    _session: BackgroundSession,
}

/// Sets everything up. An error leaves nothing mounted.
pub fn raise(dir: &Path, target: &Path, bytes: u64) -> Result<Ground, String> {
    clean_leftovers();
    let fuse = dir.join("fuse");
    for folder in [fuse.as_path(), target] {
        fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    }
    let image = dir.join("image");
    let files = || -> io::Result<(File, File)> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&image)?;
        file.set_len(bytes)?;
        Ok((file, OpenOptions::new().append(true).create(true).open(dir.join("io.log"))?))
    };
    let (file, log) = files().map_err(|error| format!("cannot make the image in {}: {error}", dir.display()))?;
    // Without the lazy parts, so that the kernel writes nothing later that nobody asked for.
    let made = ["-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"];
    run("mkfs.ext4", |command| command.args(made).arg(&image))?;
    let disk = Arc::new(Disk::new(file, log).map_err(|error| error.to_string())?);
    let mut note = Note { mount: target.to_owned(), fuse: fuse.clone(), ..Note::default() };
    let session = serve(&disk, &fuse)?;
    match attach(&mut note, target) {
        Ok(()) => Ok(Ground { note, disk, _session: session }),
        Err(why) => {
            take_down(&note);
            forget(std::process::id());
            Err(why)
        }
    }
}

/// Loop device and ext4 over the file that is served already.
fn attach(note: &mut Note, target: &Path) -> Result<(), String> {
    keep(note)?;
    let file = note.fuse.join(IMAGE);
    let device = run("losetup", |command| command.args(["--find", "--show", "--direct-io=on"]).arg(file))?;
    let device = device.trim().to_owned();
    note.device = Some(device.clone());
    keep(note)?;
    mount(&device, target, "ext4", MountFlags::NOATIME, c"errors=remount-ro")
        .map_err(|error| format!("mount {device} on {}: {error}", target.display()))?;
    // In use, it goes by itself once the file system is gone.
    run("losetup", |command| command.arg("--detach").arg(&device)).map(|_said_nothing| ())
}

fn serve(disk: &Arc<Disk>, on: &Path) -> Result<BackgroundSession, String> {
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("stemedb-faulty-disk".to_owned())];
    fuser::spawn_mount(Files(Arc::clone(disk)), on, &config)
        .map_err(|error| format!("cannot mount a FUSE file system on {} (root and /dev/fuse?): {error}", on.display()))
}

fn run(program: &str, with: impl FnOnce(&mut Command) -> &mut Command) -> Result<String, String> {
    let mut command = Command::new(program);
    let output = with(&mut command).output().map_err(|error| format!("cannot run {program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{program}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}

/// Unmounts everything and lets go of the loop device. Operations that hang must have been ended.
pub fn take_down(note: &Note) {
    let deadline = now_us() + UNMOUNT_PATIENCE_US;
    loop {
        match unmount(&note.mount, UnmountFlags::empty()) {
            Err(Errno::BUSY) if now_us() < deadline => std::thread::sleep(POLL),
            Err(Errno::BUSY) => {
                say_unless_ok(&note.mount, unmount(&note.mount, UnmountFlags::DETACH));
                break;
            }
            other => {
                say_unless_ok(&note.mount, other);
                break;
            }
        }
    }
    if let Some(device) = &note.device {
        release(device, &note.fuse);
    }
    if let Some((instance, tracefs)) = &note.trace {
        // Made by mkdir, gone by rmdir, although it is full of files.
        let _gone_or_kept_by_a_reader = fs::remove_dir(instance);
        say_unless_ok(tracefs, unmount(tracefs, UnmountFlags::DETACH));
    }
    say_unless_ok(&note.fuse, unmount(&note.fuse, UnmountFlags::DETACH));
}

fn say_unless_ok(what: &Path, result: Result<(), Errno>) {
    match result {
        // Not mounted, or not there: as wanted.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => output::notice(&format!("cannot unmount {}: {error}", what.display())),
    }
}

/// Waits until the last user of the file system is gone and the loop device with it.
fn release(device: &str, fuse: &Path) {
    let backing = backing_file(device);
    let ours = |text: &str| Path::new(text.trim()).starts_with(fuse);
    if !fs::read_to_string(&backing).is_ok_and(|text| ours(&text)) {
        return;
    }
    if let Err(why) = run("losetup", |command| command.arg("--detach").arg(device)) {
        output::notice(&why);
    }
    let deadline = now_us() + RELEASE_PATIENCE_US;
    while fs::read_to_string(&backing).is_ok_and(|text| ours(&text)) {
        if now_us() >= deadline {
            return output::notice(&format!("{device} is still in use; its disk is gone now"));
        }
        std::thread::sleep(POLL);
    }
}

fn backing_file(device: &str) -> PathBuf {
    let name = device.rsplit('/').next().unwrap_or_default();
    Path::new("/sys/block").join(name).join("loop/backing_file")
}

/// Writes this program's note.
pub fn keep(note: &Note) -> Result<(), String> {
    let write = || -> io::Result<()> {
        fs::create_dir_all(NOTES)?;
        fs::write(Path::new(NOTES).join(std::process::id().to_string()), serde_json::to_vec(note)?)
    };
    write().map_err(|error| format!("cannot write a note into {NOTES}: {error}"))
}

/// Removes a program's note.
pub fn forget(pid: u32) {
    if let Err(error) = fs::remove_file(Path::new(NOTES).join(pid.to_string())) {
        output::notice(&format!("cannot remove a note from {NOTES}: {error}"));
    }
}

/// Takes down what programs left that were killed.
fn clean_leftovers() {
    let Ok(entries) = fs::read_dir(NOTES) else { return };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if pid == std::process::id() || name.starts_with("stemedb-faulty") {
            continue;
        }
        // Renamed first: of several that start at once, one cleans up.
        let claimed = entry.path().with_extension("claimed");
        if fs::rename(entry.path(), &claimed).is_err() {
            continue;
        }
        let note = fs::read(&claimed).ok().and_then(|text| serde_json::from_slice::<Note>(&text).ok());
        if let Some(note) = note {
            output::notice(&format!("cleaning up after process {pid}, which was killed: {}", note.mount.display()));
            take_down(&note);
        }
        let _not_there_is_fine = fs::remove_file(&claimed);
    }
}
