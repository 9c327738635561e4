//! The rig itself: what a kernel does with a disk that fails, as the other tests on the rig rely on.
//!
//! The first test is the reason for the rule that a failed sync is never tried again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod rig;

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;

use rig::{Rig, SmallDisk, evict, is_mounted, wait_until};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use stemedb::cli::faulty_disk::FaultyDisk;
use stemedb::cli::faulty_disk::wire::{Action, Failure, Held, IoResult, Kind, Rule};

const PAGE: usize = 4096;
const OLD: [u8; PAGE] = [b'o'; PAGE];
const NEW: [u8; PAGE] = [b'n'; PAGE];

/// A file whose blocks are all written, as a segment of the log is: a sync of it changes no metadata.
fn settled_file(path: &Path) -> File {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    file.write_all_at(&vec![0; 64 * PAGE], 0).unwrap();
    file.write_all_at(&OLD, 0).unwrap();
    file.sync_all().unwrap();
    file
}

fn first_page(file: &File) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    file.read_exact_at(&mut page, 0).unwrap();
    page
}

fn errno(result: std::io::Result<()>) -> Option<i32> {
    result.err().map(|error| error.raw_os_error().expect("an error of the system"))
}

const EIO: Option<i32> = Some(Errno::IO.raw_os_error());
const ENOSPC: Option<i32> = Some(Errno::NOSPC.raw_os_error());

#[test]
fn a_failed_sync_is_told_once_and_a_second_one_lies() {
    let Some(rig) = Rig::new(64) else { return };
    let path = rig.path("file");
    let file = settled_file(&path);
    let ranges = rig.disk.ranges_of(&path).unwrap();
    let watched = rig.disk.unwatched().is_none();
    if watched {
        rig.disk.watch_syncs().unwrap();
    }
    rig.disk.fail_writes(ranges.clone(), Failure::Eio, Some(1)).unwrap();
    file.write_all_at(&NEW, 0).unwrap();
    assert_eq!(errno(file.sync_data()), EIO);
    assert_eq!(errno(file.sync_data()), None, "the second sync returns success");
    let again = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert_eq!(errno(again.sync_data()), None, "whoever opens the file later is told nothing either");
    assert_eq!(first_page(&file), NEW, "a cached read shows the new data");
    evict(&file);
    assert_eq!(first_page(&file), OLD, "it was never written");

    let log = rig.disk.io_log().unwrap();
    let failed = log.iter().position(|line| matches!(line.result, IoResult::Failed(_))).unwrap();
    assert!(log[failed].touches(&ranges));
    let wrote = |line: &&_| matches!(line, stemedb::cli::faulty_disk::wire::IoLine { kind: Kind::Write, .. });
    assert_eq!(log[failed + 1..].iter().filter(wrote).filter(|line| line.touches(&ranges)).count(), 0);
    if watched {
        let ino = file.metadata().unwrap().ino();
        let results: Vec<_> = rig.disk.syncs().unwrap().iter().filter(|c| c.ino == ino).map(|c| c.result).collect();
        assert_eq!(results, [Some(-5), Some(0), Some(0)], "the kernel's own account");
    }
    println!("syncs by the kernel's account: {}", rig.disk.unwatched().unwrap_or("compared"));
}

#[test]
fn a_failed_flush_of_the_disk_is_told_once_too() {
    let Some(rig) = Rig::new(64) else { return };
    let file = settled_file(&rig.path("file"));
    rig.disk.fail_syncs(Failure::Eio, Some(1)).unwrap();
    file.write_all_at(&NEW, 0).unwrap();
    assert_eq!(errno(file.sync_data()), EIO);
    assert_eq!(errno(file.sync_data()), None);
}

#[test]
fn a_disk_without_space_below_the_file_system_says_so_at_the_sync() {
    let Some(rig) = Rig::new(64) else { return };
    let path = rig.path("file");
    let file = settled_file(&path);
    rig.disk.fail_writes(rig.disk.ranges_of(&path).unwrap(), Failure::Enospc, Some(1)).unwrap();
    file.write_all_at(&NEW, 0).unwrap();
    assert_eq!(errno(file.sync_data()), ENOSPC);
    evict(&file);
    assert_eq!(first_page(&file), OLD);
}

/// Starts a sync that hangs; what it returned comes over the channel.
fn hanging_sync(rig: &Rig, file: &File) -> mpsc::Receiver<Option<i32>> {
    rig.disk.hang().unwrap();
    file.write_all_at(&NEW, 0).unwrap();
    let (sender, result) = mpsc::channel();
    let synced = file.try_clone().unwrap();
    std::thread::spawn(move || sender.send(errno(synced.sync_data())));
    wait_until("something hangs", || rig.disk.counts().unwrap().held > 0);
    assert!(result.try_recv().is_err(), "the sync waits");
    result
}

#[test]
fn a_hanging_disk_blocks_a_sync_until_it_goes_on() {
    let Some(rig) = Rig::new(64) else { return };
    let file = settled_file(&rig.path("file"));
    let result = hanging_sync(&rig, &file);
    rig.disk.clear(Held::Done).unwrap();
    assert_eq!(result.recv_timeout(rig::HANG).unwrap(), None);
    evict(&file);
    assert_eq!(first_page(&file), NEW);
    assert_eq!(rig.disk.counts().unwrap().held, 0);
}

#[test]
fn a_hanging_disk_may_fail_in_the_end() {
    let Some(rig) = Rig::new(64) else { return };
    let file = settled_file(&rig.path("file"));
    let result = hanging_sync(&rig, &file);
    rig.disk.clear(Held::Failed).unwrap();
    assert_eq!(result.recv_timeout(rig::HANG).unwrap(), EIO);
}

#[test]
fn a_slow_disk_takes_its_time_by_its_own_log() {
    let Some(rig) = Rig::new(64) else { return };
    let file = settled_file(&rig.path("file"));
    let action = Action::DelayMs(150);
    rig.disk.add(Rule { on: vec![Kind::Sync], ranges: vec![], action, times: Some(1) }).unwrap();
    file.write_all_at(&NEW, 0).unwrap();
    assert_eq!(errno(file.sync_data()), None);
    let log = rig.disk.io_log().unwrap();
    let held = log.iter().position(|line| line.result == IoResult::Held).unwrap();
    let done = log[held + 1..].iter().find(|line| line.kind == Kind::Sync && line.result == IoResult::Done).unwrap();
    assert!(done.at_us >= log[held].at_us + 150_000);
}

#[test]
fn a_lying_disk_loses_what_it_acknowledged() {
    let Some(rig) = Rig::new(64) else { return };
    let path = rig.path("file");
    let file = settled_file(&path);
    let ranges = rig.disk.ranges_of(&path).unwrap();
    rig.disk.add(Rule { on: vec![Kind::Write], ranges, action: Action::Lose, times: None }).unwrap();
    file.write_all_at(&NEW, 0).unwrap();
    assert_eq!(errno(file.sync_data()), None);
    evict(&file);
    assert_eq!(first_page(&file), OLD);
}

#[test]
fn a_disk_that_is_off_fails_reads_too() {
    let Some(rig) = Rig::new(64) else { return };
    let file = settled_file(&rig.path("file"));
    rig.disk.turn_off().unwrap();
    assert_eq!(first_page(&file), OLD, "from the cache");
    evict(&file);
    let mut page = [0; PAGE];
    assert_eq!(errno(file.read_exact_at(&mut page, 0)), EIO);
}

#[test]
fn a_failed_flush_of_the_journal_makes_the_file_system_read_only() {
    let Some(rig) = Rig::new(64) else { return };
    let mut file = File::create(rig.path("file")).unwrap();
    file.write_all(&NEW).unwrap();
    rig.disk.fail_syncs(Failure::Eio, None).unwrap();
    // A new file's sync needs the journal.
    assert_eq!(errno(file.sync_all()), EIO);
    wait_until("the file system is read-only", || {
        File::create(rig.path("other")).is_err_and(|error| error.kind() == ErrorKind::ReadOnlyFilesystem)
    });
    assert!(std::fs::read(rig.path("file")).is_ok(), "it can still be read");
}

#[test]
fn what_a_killed_helper_left_is_cleaned_up_by_the_next_start() {
    let Some(program) = rig::faulty_disk_program() else { return };
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &str| FaultyDisk::start(&program, &dir.path().join(name), &dir.path().join(name).join("m"), 64);
    let killed = start("one").unwrap();
    let file = settled_file(&killed.mount().join("file"));
    let device = killed.device().to_owned();
    kill_process(Pid::from_raw(i32::try_from(killed.pid()).unwrap()).unwrap(), Signal::KILL).unwrap();
    drop(file);
    let mount = killed.mount().to_owned();
    drop(killed);
    assert!(is_mounted(&mount), "nobody was left to unmount it");
    let next = start("two").unwrap();
    // Several tests start helpers at the same time: whichever came first cleans up.
    wait_until("the leftovers are gone", || !is_mounted(&mount));
    assert!(settled_file(&next.mount().join("file")).metadata().is_ok());
    drop(next);
    let backing = format!("/sys/block/{}/loop/backing_file", device.rsplit('/').next().unwrap());
    let ours = |text: String| text.contains(dir.path().to_str().unwrap());
    wait_until("its loop device is free", || !std::fs::read_to_string(&backing).is_ok_and(ours));
}

#[test]
fn a_disk_that_is_dropped_while_it_hangs_leaves_nothing() {
    let Some(rig) = Rig::new(64) else { return };
    let file = settled_file(&rig.path("file"));
    let result = hanging_sync(&rig, &file);
    let mount = rig.disk.mount().to_owned();
    drop(file);
    drop(rig);
    assert_eq!(result.recv_timeout(rig::HANG).unwrap(), EIO);
    assert!(!is_mounted(&mount));
}

#[test]
fn a_small_disk_runs_out_of_room_and_of_inodes() {
    let Some(small) = SmallDisk::new(1 << 20, 8) else { return };
    let mut file = File::create(small.path().join("big")).unwrap();
    assert_eq!(errno(file.write_all(&vec![1; 2 << 20])), ENOSPC);
    drop(file);
    std::fs::remove_file(small.path().join("big")).unwrap();
    let full = (0..16).find_map(|n| File::create(small.path().join(n.to_string())).err()).unwrap();
    assert_eq!(full.raw_os_error(), ENOSPC);
}

#[test]
fn a_frozen_process_goes_on_when_it_is_told_to() {
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    rig::freeze(pid);
    assert!(rig::is_frozen(pid));
    rig::resume(pid);
    wait_until("it goes on", || !rig::is_frozen(pid));
    child.kill().unwrap();
    child.wait().unwrap();
}
