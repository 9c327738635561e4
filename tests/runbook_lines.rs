//! What the runbooks have people do to the folders of a node, line by line, on a server that runs: nothing that was
//! acknowledged is lost, and no second process gets into a folder that is in use.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout)]

mod rig;

use std::path::Path;
use std::process::Command;

use rig::three::Three;

/// Who has it done to its folders.
const NODE: usize = 1;

/// Runs a line of a runbook in a folder.
fn line(dir: &Path, line: &str) {
    let status = Command::new("bash").arg("-c").arg(line).current_dir(dir).status().unwrap();
    assert!(status.success(), "{line}: {status}");
}

async fn restart(three: &mut Three) {
    three.processes.stop(NODE).await.unwrap();
    three.processes.start(NODE).unwrap();
    three.ready().await;
}

/// Writes before, between and after.
async fn writes(three: &mut Three) {
    for through in 0..3 {
        three.write(through).await;
    }
}

/// Whether the program that makes the tree anew gets into the folder.
fn is_free(three: &Three) -> bool {
    let folder = three.folder(NODE);
    let output = Command::new(env!("CARGO_BIN_EXE_stemedb-api"))
        .arg("--rebuild-from-wal")
        .arg("--wal-path")
        .arg(folder.join("wal"))
        .arg("--kv-path")
        .arg(folder.join("kv"))
        .env("STEMEDB_STORAGE_LOCK_TIMEOUT_MS", "10")
        .output()
        .unwrap();
    output.status.success()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runbooks_do_to_the_folders_of_a_node_loses_nothing() {
    let mut three = Three::start().await;
    // Several segments: one of them is sealed whatever the others do.
    for _ in 0..25 {
        three.fill(0, 100_000).await;
    }
    writes(&mut three).await;
    let folder = three.folder(NODE).to_owned();

    // disk-full.md, "Emergency cleanup", and the probes of slow-fsync.md and wal-fsync-failure.md: on a node that runs.
    for text in [
        "find . -name '*.tmp' -delete",
        "find . -type f -empty -delete",
        "dd if=/dev/zero of=test.dat bs=4k count=100 status=none && sync -d test.dat",
        "cp test.dat wal/test.dat && touch wal/test.file && cp test.dat kv/test.dat",
        "find wal -name '*.log' -mtime +7 -delete",
        "cp wal/segment.001.wal wal/segment.001.wal.corrupted",
    ] {
        line(&folder, text);
        writes(&mut three).await;
    }
    assert!(!is_free(&three), "a second process got into a folder in use, whose empty files were deleted");
    writes(&mut three).await;
    restart(&mut three).await;
    assert!(folder.join("wal/test.dat").exists() && folder.join("wal/segment.001.wal.corrupted").exists());
    three.assert_all_there("empty files, *.tmp, test.dat, *.corrupted").await;

    // storage-errors.md, "Free up space": all but the newest.
    line(&folder.join("wal"), "gzip $(ls segment.*.wal | sort | head -n -1)");
    writes(&mut three).await;
    // "Or move to backup": here the newest, which is in use, is the only one left.
    let backup = three.dir().join("backup");
    std::fs::create_dir(&backup).unwrap();
    line(&folder.join("wal"), &format!("mv segment.00[0-5]*.wal {}", backup.display()));
    writes(&mut three).await;
    restart(&mut three).await;
    three.assert_all_there("segments that were packed and moved away").await;

    // The same, "Rebuild from the log": the tree is moved away, of a node that is down.
    three.processes.stop(NODE).await.unwrap();
    line(&folder, "mv kv kv.corrupted.$(date +%Y%m%d)");
    three.processes.start(NODE).unwrap();
    three.ready().await;
    writes(&mut three).await;
    three.assert_all_there("a tree that was moved away").await;
    three.processes.stop_all().await.unwrap();
}
