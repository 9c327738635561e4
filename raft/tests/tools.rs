//! The tools for single segments: what they print, what they refuse, and that a log which they cut does not open
//! before its peers have given back what was cut.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use common::{Found, append, ask_once, close, contents, entry, options, real_disk};
use openraft::storage::RaftLogStorage;
use stemedb_raft::{OpenError, Vote, WalStore, scan::scan_segment, tool};

async fn written(dir: &Path) -> PathBuf {
    let (mut store, _) = WalStore::open(real_disk(), options(dir)).unwrap();
    store.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    for first in [0, 3] {
        append(&mut store, (first..first + 3).map(|i| entry(1, i, &format!("entry {i}"))).collect()).await.unwrap();
    }
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    dir.join("segment.001.wal")
}

fn offset_of(segment: &Path, index: usize) -> u64 {
    scan_segment(&fs::read(segment).unwrap()).unwrap().entries[index].offset.unwrap()
}

fn flip(segment: &Path, at: u64) {
    let mut bytes = fs::read(segment).unwrap();
    bytes[at as usize] ^= 1;
    fs::write(segment, bytes).unwrap();
}

fn verify(segment: &Path) -> (i32, String) {
    let run = Command::new(env!("CARGO_BIN_EXE_stemedb-wal-verify")).arg("--file").arg(segment).output().unwrap();
    said(&run)
}

fn repair(args: &[&str]) -> (i32, String) {
    said(&Command::new(env!("CARGO_BIN_EXE_stemedb-wal-repair")).args(args).output().unwrap())
}

fn said(output: &Output) -> (i32, String) {
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Opens a log that is whole. A program that another test starts at this moment has, between its fork and its exec, the
/// lock of the folder too.
async fn reopened(dir: &Path) -> WalStore {
    for _ in 0..1000 {
        if let Found::Ready(store, _) = begin(dir) {
            return store;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("it was repaired and does not open");
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_says_segment_offset_index_and_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let segment = written(dir.path()).await;
    let (code, text) = verify(&segment);
    assert_eq!((code, text.contains("clean, 6 entries from index 0")), (0, true), "{text}");
    let at = offset_of(&segment, 2);
    flip(&segment, at + 73);
    let before = fs::read(&segment).unwrap();
    let (code, text) = verify(&segment);
    let wanted = format!("corrupt at byte {at}: entry 2: frame damaged, row intact; it was durable");
    assert!(code == 1 && text.contains("segment.001.wal") && text.contains(&wanted), "{code}: {text}");
    assert_eq!(fs::read(&segment).unwrap(), before, "verifying changed the file");
    assert_eq!(verify(&dir.path().join("segment.077.wal")).0, 2);
    fs::write(dir.path().join("segment.008.wal"), "no segment").unwrap();
    assert_eq!(verify(&dir.path().join("segment.008.wal")).0, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn repair_refuses_what_does_harm_and_never_writes_its_input() {
    let dir = tempfile::tempdir().unwrap();
    let segment = written(dir.path()).await;
    let at = offset_of(&segment, 2);
    flip(&segment, at + 73);
    let before = fs::read(&segment).unwrap();
    let (input, output) = (segment.display().to_string(), dir.path().join("out").display().to_string());
    let (code, plan) = repair(&["--segment", &input]);
    assert!(code == 0 && plan.contains(&format!("--truncate-at {at} --lose-durable-entries")), "{code}: {plan}");
    let inside = (at + 8).to_string();
    let (code, text) = repair(&["--segment", &input, "--output", &output, "--truncate-at", &inside]);
    assert!(code == 2 && text.contains("inside the frame of entry 2"), "{code}: {text}");
    let at = at.to_string();
    let (code, text) = repair(&["--segment", &input, "--output", &output, "--truncate-at", &at]);
    assert!(code == 2 && text.contains("entries 2 to 5 were durable"), "{code}: {text}");
    assert!(!Path::new(&output).exists());
    let all = ["--segment", &input, "--output", &input, "--truncate-at", &at, "--lose-durable-entries"];
    assert_eq!(repair(&all).0, 2, "the input was taken for the output");
    let all = ["--segment", &input, "--output", &output, "--truncate-at", &at, "--lose-durable-entries"];
    let (code, text) = repair(&all);
    assert!(code == 0 && text.contains("lost: 4 entries, 2 to 5, of which 4 were durable"), "{code}: {text}");
    assert_eq!(fs::read(&segment).unwrap(), before, "the input was written");
    let (code, text) = verify(Path::new(&output));
    assert!(code == 1 && text.contains("cut from index 2"), "{code}: {text}");
}

fn begin(dir: &Path) -> Found {
    Found::of(WalStore::begin_open(real_disk(), options(dir)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_cut_opens_only_with_what_its_peers_give_back() {
    let dir = tempfile::tempdir().unwrap();
    let segment = written(dir.path()).await;
    let healthy = tempfile::tempdir().unwrap();
    written(healthy.path()).await;
    let (peer, _) = WalStore::open(real_disk(), options(healthy.path())).unwrap();
    // Marks and rows behind the cut may be gone as well: the record alone must be enough.
    for keeps_rows in [true, false] {
        let segment_bytes = fs::read(&segment).unwrap();
        let at = offset_of(&segment, 4);
        let (mut cut, record) = tool::Segment::read(&segment).unwrap().cut(at, true).unwrap();
        assert_eq!((record.from, record.end), (4, 6));
        if !keeps_rows {
            cut[8192..8192 + 48].fill(0);
            cut[12288..12288 + 48].fill(0);
            cut[16384 + 4 * 32..16384 + 6 * 32].fill(0);
        }
        fs::write(&segment, cut).unwrap();
        assert!(matches!(
            WalStore::open(real_disk(), options(dir.path())),
            Err(OpenError::Repair(_) | OpenError::Ask(_))
        ));
        let Found::Waits(pending) = begin(dir.path()) else { panic!("a cut log opened") };
        assert_eq!(pending.questions().iter().map(|q| q.index).collect::<Vec<_>>(), [4, 5]);
        let answered = ask_once(pending, 1, &[1, 2], &[(2, peer.handle().source())]);
        let Found::Ready(store, report) = answered else { panic!("it was not repaired") };
        assert_eq!((contents(&store).unwrap().len(), report.repaired), (6, vec![4, 5]));
        tokio::task::spawn_blocking(move || close(store)).await.unwrap();
        // The record is spent.
        assert_eq!(verify(&segment).0, 0, "{}", verify(&segment).1);
        let store = reopened(dir.path()).await;
        tokio::task::spawn_blocking(move || close(store)).await.unwrap();
        for name in fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()) {
            if name != "segment.001.wal" && name.starts_with("segment.") {
                fs::remove_file(dir.path().join(name)).unwrap();
            }
        }
        fs::remove_file(dir.path().join("hard-state.1")).unwrap();
        fs::remove_file(dir.path().join("hard-state.2")).unwrap();
        fs::remove_file(&segment).unwrap();
        written(dir.path()).await;
        assert_eq!(fs::read(&segment).unwrap().len(), segment_bytes.len());
    }
    tokio::task::spawn_blocking(move || close(peer)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_voter_is_told_the_exact_command_and_goes_on_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let segment = written(dir.path()).await;
    let at = offset_of(&segment, 4);
    flip(&segment, at + 73);
    let Found::Waits(pending) = begin(dir.path()) else { panic!("the damage was not noticed") };
    let Found::Refused(why) = ask_once(pending, 1, &[1], &[]) else { panic!("a single voter has nobody to ask") };
    let input = segment.display().to_string();
    let command =
        format!("stemedb-wal-repair --segment {input} --output {input}.cut --truncate-at {at} --lose-durable-entries");
    assert!(why.contains(&command) && why.contains("Entry 4 and all behind it"), "{why}");
    let words: Vec<&str> = command.split(' ').skip(1).collect();
    assert_eq!(repair(&words).0, 0);
    fs::rename(&segment, dir.path().join("segment.001.wal.corrupted")).unwrap();
    fs::rename(format!("{input}.cut"), &segment).unwrap();
    let Found::Waits(pending) = begin(dir.path()) else { panic!("a cut log opened by itself") };
    let Found::Ready(store, report) = ask_once(pending, 1, &[1], &[]) else { panic!("the cut was not taken") };
    assert_eq!((contents(&store).unwrap().len(), report.tail_cut_from), (4, Some(4)));
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
    let (store, _) = WalStore::open(real_disk(), options(dir.path())).unwrap();
    assert_eq!(contents(&store).unwrap().len(), 4, "what was given up came back");
    tokio::task::spawn_blocking(move || close(store)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn dump_shows_the_frames_as_golden_scripts_do() {
    let dir = tempfile::tempdir().unwrap();
    let segment = written(dir.path()).await;
    flip(&segment, offset_of(&segment, 1) + 73);
    let dump = tool::Segment::read(&segment).unwrap().dump();
    let lines: Vec<&str> = dump.lines().collect();
    let expected = [
        "segment.001.wal first=0 frames=5 durable=6 tail=clean",
        "0:1:entry 0",
        "1:1:<damaged, 7 bytes>",
        "2:1:entry 2",
        "3:1:entry 3",
        "4:1:entry 4",
        "5:1:entry 5",
    ];
    assert_eq!(lines, expected);
}
