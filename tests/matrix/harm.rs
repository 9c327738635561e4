//! Damage to the files of a node that is down.

use std::fs;
use std::path::{Path, PathBuf};

use rand::Rng;
use rand::rngs::StdRng;
use stemedb::state::engine::checkpoint::MANIFEST;
use stemedb::state::machine::newest_checkpoint;
use stemedb_raft::frame::{MARK_BYTES, MARK_OFFSETS, ROW_BYTES, ROWS_OFFSET};
use stemedb_raft::scan::scan_segment;

use super::sim::Cluster;
use super::table::{Harm, How, Which, Zone};

/// Bytes of a frame before its payload.
const FRAME_HEADER_BYTES: usize = 72;

/// Does it. A file that is damaged and that may be needed to go on: it, and where a good one is kept.
pub fn inflict(cluster: &Cluster, i: usize, harm: Harm, rng: &mut StdRng) -> Option<(PathBuf, PathBuf)> {
    let segment = cluster.segment(i);
    let places = cluster.durable_bytes(i);
    let at = places[rng.random_range(0..places.len())];
    let bit = 1 << rng.random_range(0..8);
    let mut noise = vec![0u8; 512];
    rng.fill(&mut noise[..]);
    let disk = &cluster.disks[i];
    let hard_state = |n: u32| cluster.wal(i).join(format!("hard-state.{n}"));
    let flip_all = |bytes: &mut Vec<u8>| bytes.iter_mut().for_each(|byte| *byte ^= bit);
    match harm {
        Harm::RandomBlock => {
            disk.corrupt(&segment, |bytes| bytes[at..at + noise.len()].copy_from_slice(&noise)).unwrap();
        }
        Harm::BitFlip => disk.corrupt(&segment, |bytes| bytes[at] ^= bit).unwrap(),
        Harm::Bit(zone) => {
            let at = place_in(cluster, i, zone, rng);
            disk.corrupt(&segment, |bytes| bytes[at] ^= bit).unwrap();
        }
        Harm::SegmentMissing => disk.shared().remove(&segment).unwrap(),
        Harm::SegmentShort => disk.corrupt(&segment, |bytes| bytes.truncate(bytes.len() / 2)).unwrap(),
        Harm::SegmentLong => disk.corrupt(&segment, |bytes| bytes.extend(&noise)).unwrap(),
        Harm::SegmentUnreadable => disk.set_read_error(&segment, true).unwrap(),
        Harm::BlocksUnreadable => disk.set_unreadable(&segment, at / 4096..at / 4096 + 2).unwrap(),
        Harm::OneHardState => disk.corrupt(&hard_state(1 + rng.random_range(0..2)), flip_all).unwrap(),
        Harm::BothHardStates => (1..=2).for_each(|n| disk.corrupt(&hard_state(n), flip_all).unwrap()),
        Harm::IdentityMissing => {
            for name in ["identity", "identity.spare"] {
                let _there = fs::remove_file(cluster.folder(i).join(name));
            }
        }
        Harm::TableBlock => overwrite_middle(&largest_table(&cluster.folder(i)), &noise),
        Harm::CheckpointBlock => overwrite_middle(&file(&cluster.folder(i), Which::Checkpoint), &noise),
        Harm::File(which, how) => return spoil(cluster, i, which, how, rng),
    }
    None
}

/// Flips a bit in the payload of one of a node's entries, the `nth` of its segment.
pub fn bit_of_entry(cluster: &Cluster, i: usize, nth: usize, rng: &mut StdRng) {
    let bit = 1 << rng.random_range(0..8);
    let flip = |bytes: &mut Vec<u8>| {
        let scan = scan_segment(bytes).unwrap();
        let located = scan.entries.iter().filter_map(|entry| entry.located);
        let entry = located.filter(|located| located.payload_bytes > 0).nth(nth).expect("so many entries");
        bytes[entry.offset as usize + FRAME_HEADER_BYTES] ^= bit;
    };
    cluster.disks[i].corrupt(&cluster.segment(i), flip).unwrap();
}

/// A byte of the segment that was surely durable.
fn place_in(cluster: &Cluster, i: usize, zone: Zone, rng: &mut StdRng) -> usize {
    let mut bytes = Vec::new();
    cluster.disks[i].corrupt(&cluster.segment(i), |b| bytes = b.clone()).unwrap();
    let frames: Vec<usize> =
        scan_segment(&bytes).unwrap().entries.iter().filter_map(|entry| Some(entry.offset? as usize)).collect();
    // The newest may be above what is known to be durable.
    let old = rng.random_range(0..frames.len() / 4 * 3);
    match zone {
        Zone::Header => rng.random_range(0..96),
        Zone::Mark => MARK_OFFSETS[rng.random_range(0..2)] as usize + rng.random_range(0..MARK_BYTES),
        Zone::Row => ROWS_OFFSET as usize + old * ROW_BYTES + rng.random_range(0..ROW_BYTES),
        Zone::FrameHeader => frames[old] + rng.random_range(0..FRAME_HEADER_BYTES),
    }
}

fn spoil(cluster: &Cluster, i: usize, which: Which, how: How, rng: &mut StdRng) -> Option<(PathBuf, PathBuf)> {
    let path = file(&cluster.folder(i), which);
    let kept = cluster.dir.path().join(format!("kept-{i}"));
    if how == How::Missing {
        fs::rename(&path, kept).unwrap();
        return None;
    }
    // A hard link of the file elsewhere keeps its content: another name's damage is another row.
    let mut bytes = fs::read(&path).unwrap();
    fs::rename(&path, &kept).unwrap();
    match how {
        How::Missing => {}
        How::Short => bytes.truncate(bytes.len() / 2),
        How::Long => bytes.extend_from_within(..bytes.len().min(512)),
        How::BitFlip => {
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        // A link to itself, and a file of which no page can be read.
        How::Unopenable => std::os::unix::fs::symlink(&path, &path).unwrap(),
        How::Unreadable => std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap(),
    }
    if !matches!(how, How::Unopenable | How::Unreadable) {
        fs::write(&path, bytes).unwrap();
    }
    Some((path, kept))
}

fn file(folder: &Path, which: Which) -> PathBuf {
    let kv = folder.join("kv");
    match which {
        Which::Table => largest_table(folder),
        Which::Manifest => {
            let current = fs::read(tree(&kv).join("current")).unwrap();
            tree(&kv).join(format!("v{}", u64::from_le_bytes(current[..8].try_into().unwrap())))
        }
        Which::Pointer => kv.join("active"),
        Which::Tree => kv,
        Which::Checkpoint => newest_checkpoint(folder).unwrap().dir().join(MANIFEST),
        Which::Identity => folder.join("identity"),
        Which::PeersSeen => folder.join("peers-seen"),
    }
}

/// The folder of the tree that counts: the file `active` begins with its number.
fn tree(kv: &Path) -> PathBuf {
    let active = fs::read(kv.join("active")).unwrap();
    let number = u64::from_le_bytes(active[..8].try_into().unwrap());
    kv.join(format!("g{number}"))
}

fn largest_table(folder: &Path) -> PathBuf {
    let files = fs::read_dir(tree(&folder.join("kv")).join("tables")).unwrap().map(|entry| entry.unwrap().path());
    files.max_by_key(|path| path.metadata().unwrap().len()).expect("a table")
}

/// As with [`spoil`], in a file of its own.
fn overwrite_middle(path: &Path, noise: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() / 2;
    let end = (at + noise.len()).min(bytes.len());
    bytes[at..end].copy_from_slice(&noise[..end - at]);
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}
