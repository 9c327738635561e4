//! The bytes on the disk: golden bytes of this version, a frozen log of each version, and the
//! document that describes them.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod common;

use std::{collections::BTreeSet, fs, path::Path};

use common::{append, contents, entry, open_sim};
use openraft::storage::RaftLogStorage;
use stemedb_raft::{
    Vote,
    disk::sim::SimDisk,
    frame::{EntryKind, FrameHeader, Mark, Row, SegmentHeader, log_id},
    recovery::{FrameFound, Place, RowFound, verdict},
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn structures_have_these_bytes() {
    let header = SegmentHeader {
        number: 3,
        identity: 0x1122_3344_5566_7788,
        segment_bytes: 65536,
        rows: 128,
        first_index: 41,
        previous: Some(log_id(7, 40)),
        previous_crc: 0xdead_beef,
    };
    let frame = FrameHeader {
        kind: EntryKind::Normal,
        payload_bytes: 5,
        previous_crc: 0xdead_beef,
        term: 7,
        index: 41,
        synced_end: 41,
        committed_end: 40,
        payload_crc: stemedb_raft::frame::payload_crc(b"hello"),
    };
    let row = Row { index: 41, term: 7, offset: 20480, payload_bytes: 5, payload_crc: frame.payload_crc };
    let mark = Mark { sequence: 2, synced_end: 42, committed_end: 42 };
    let got = [
        hex(&header.encode()),
        hex(&frame.encode(header.identity).0),
        hex(&row.encode(header.identity)),
        hex(&mark.encode(header.identity)),
    ]
    .join("\n");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/structures-1.hex");
    if std::env::var_os("STEMEDB_REWRITE_GOLDEN").is_some() && !path.exists() {
        fs::write(&path, format!("{got}\n")).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap().trim(), got, "the format changed: it needs a new version");
    assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header));
    assert_eq!(Row::decode(&row.encode(9), 9), Ok(row));
    assert!(Row::decode(&row.encode(9), 8).is_err(), "a row of another segment passed");
}

/// Runs of zeros are most of a segment: `index byte` pairs keep the frozen files small and readable.
fn sparse(bytes: &[u8]) -> String {
    let mut text = format!("{}\n", bytes.len());
    for (at, chunk) in bytes.chunks(32).enumerate().filter(|(_, c)| c.iter().any(|b| *b != 0)) {
        text.push_str(&format!("{} {}\n", at * 32, hex(chunk)));
    }
    text
}

fn unsparse(text: &str) -> Vec<u8> {
    let mut lines = text.lines();
    let mut bytes = vec![0; lines.next().unwrap().parse().unwrap()];
    for line in lines {
        let (at, hex) = line.split_once(' ').unwrap();
        let at: usize = at.parse().unwrap();
        for (i, pair) in hex.as_bytes().chunks(2).enumerate() {
            bytes[at + i] = u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        }
    }
    bytes
}

const FROZEN: [&str; 4] = ["segment.001.wal", "segment.002.wal", "hard-state.1", "hard-state.2"];

#[tokio::test(flavor = "multi_thread")]
async fn the_frozen_log_of_version_1_opens() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/log-1");
    if std::env::var_os("STEMEDB_REWRITE_GOLDEN").is_some() && !dir.exists() {
        let sim = SimDisk::new();
        let mut store = open_sim(&sim).unwrap();
        append(&mut store, (0..4).map(|i| entry(1, i, &format!("v1 {i}"))).collect()).await.unwrap();
        store.truncate_after(Some(log_id(1, 2))).await.unwrap();
        append(&mut store, vec![entry(2, 3, "v1 three again")]).await.unwrap();
        store.save_vote(&Vote::new_committed(2, 1)).await.unwrap();
        store.handle().close().unwrap();
        fs::create_dir_all(&dir).unwrap();
        for name in FROZEN {
            let mut bytes = Vec::new();
            sim.corrupt(&Path::new("/wal").join(name), |b| bytes = b.clone()).unwrap();
            fs::write(dir.join(name), sparse(&bytes)).unwrap();
        }
    }
    let sim = SimDisk::new();
    for name in FROZEN {
        let bytes = unsparse(&fs::read_to_string(dir.join(name)).unwrap());
        sim.shared().create(&Path::new("/wal").join(name)).unwrap().write_at(&bytes, 0).unwrap();
    }
    let store = open_sim(&sim).unwrap();
    assert_eq!(contents(&store).unwrap(), ["0:1:v1 0", "1:1:v1 1", "2:1:v1 2", "3:2:v1 three again"]);
    assert_eq!(store.reader().vote(), Some(Vote::new_committed(2, 1)));
    store.handle().close().unwrap();
}

#[test]
fn the_document_has_the_same_table() {
    let doc = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/wal-format.md")).unwrap();
    let rows: BTreeSet<Vec<String>> = doc
        .lines()
        .filter(|l| l.starts_with("| Intact |") || l.starts_with("| Damaged |"))
        .map(|l| l.trim_matches('|').split('|').map(|c| c.trim().to_owned()).take(4).collect())
        .collect();
    let mut code = BTreeSet::new();
    for frame in [FrameFound::Intact, FrameFound::Damaged] {
        for row in [RowFound::Intact, RowFound::Damaged, RowFound::Absent] {
            for place in [Place::Synced, Place::Unsynced] {
                let verdict = verdict(frame, row, place);
                code.insert(vec![
                    format!("{frame:?}"),
                    format!("{row:?}"),
                    format!("{place:?}"),
                    format!("{verdict:?}"),
                ]);
            }
        }
    }
    assert_eq!(rows, code, "docs/wal-format.md and recovery.rs disagree");
}
