//! No byte and no inode left: the state starts, answers, and goes on by itself when there is room.
//!
//! Needs root for a file system of its own; it is mounted in a mount namespace of this process's child, so
//! that nothing is left behind.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use crate::support::*;

const DISK: &str = "STEMEDB_TEST_FULL_TREE_DISK";

/// Runs the ignored test `name` with a tmpfs of its own.
fn on_a_disk_of(options: &str, name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "mount -t tmpfs -o {options} tmpfs \"$1\" || exit 77; exec \"$2\" --exact {name} --ignored --nocapture"
    );
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, "sh"])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .env(DISK, dir.path())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains("1 passed"), "{text}");
        }
        Ok(output) if output.status.code() == Some(77) || !is_root() => {
            skipped("no file system can be mounted here");
        }
        Ok(output) => panic!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)),
        Err(error) => skipped(&format!("unshare: {error}")),
    }
}

/// Says that a test does not run, and why; where nothing may be skipped, fails it.
fn skipped(why: &str) {
    println!("SKIPPED: {why}");
    let may_not = std::env::var_os("STEMEDB_TEST_NO_SKIPS").is_some_and(|value| value == "1");
    assert!(!may_not, "nothing may be skipped here: {why}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn it_starts_with_no_byte_free() {
    on_a_disk_of("size=24m", "full::no_byte_free");
}

#[test]
fn it_starts_with_no_inode_free() {
    on_a_disk_of("size=64m,nr_inodes=200", "full::no_inode_free");
}

fn fill_bytes(path: &Path) {
    let mut file = fs::File::options().create(true).append(true).open(path).unwrap();
    let mut chunk = 1 << 20;
    while chunk > 0 {
        if file.write_all(&vec![1u8; chunk]).is_err() {
            chunk /= 2; // what was written of it stays
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "runs on a disk of its own; started by the test above"]
async fn no_byte_free() {
    let Some(disk) = std::env::var_os(DISK) else { return };
    let dir = Path::new(&disk).join("data");
    fs::create_dir(&dir).unwrap();
    let expected = closed(&dir, 600, Some(300)).await;
    let ballast = Path::new(&disk).join("ballast");
    starts_and_goes_on(&dir, &expected, || fill_bytes(&ballast), || fs::remove_file(&ballast).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "runs on a disk of its own; started by the test above"]
async fn no_inode_free() {
    let Some(disk) = std::env::var_os(DISK) else { return };
    let dir = Path::new(&disk).join("data");
    fs::create_dir(&dir).unwrap();
    let expected = closed(&dir, 600, Some(300)).await;
    let many = Path::new(&disk).join("many");
    fs::create_dir(&many).unwrap();
    let fill_up = || {
        for n in 0.. {
            if fs::File::create(many.join(n.to_string())).is_err() {
                break;
            }
        }
    };
    starts_and_goes_on(&dir, &expected, fill_up, || fs::remove_dir_all(&many).unwrap()).await;
}

async fn starts_and_goes_on(
    dir: &Path,
    expected: &[(bytes::Bytes, bytes::Bytes)],
    fill_up: impl Fn(),
    free: impl FnOnce(),
) {
    for _ in 0..2 {
        fill_up(); // a start removes what a crash may have left
        let machine = open(dir).unwrap();
        assert_eq!(expected, rows(&machine.handle()).unwrap());
        close(machine);
    }
    let mut machine = open(dir).unwrap();
    let handle = machine.handle();
    fill_up();
    // Applied, not flushed: there is no room for the table.
    fill(&mut machine, 600..640).await;
    let sealing = tokio::task::spawn_blocking(move || {
        machine.seal_blocking().unwrap();
        machine
    });
    while !handle.engine().stats().unwrap().disk_full {
        assert!(!sealing.is_finished(), "there was room for it");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(handle.failed().is_none());
    assert!(handle.checkpoint().is_some());
    assert_eq!(rows_after_in_memory(640).await, rows(&handle).unwrap(), "reads go on");
    free();
    let mut machine = sealing.await.unwrap();
    assert!(!handle.engine().stats().unwrap().disk_full);
    drop(checkpoint(&mut machine).await);
    drop(handle);
    close(machine);
    let machine = open(dir).unwrap();
    assert_eq!(Some(639), machine.handle().view().unwrap().state.applied_log_index);
    close(machine);
}

/// Its folder is on another disk.
async fn rows_after_in_memory(count: u64) -> Vec<(bytes::Bytes, bytes::Bytes)> {
    rows_after(count).await
}
