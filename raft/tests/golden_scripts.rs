//! Golden scripts: each file under `golden/` is a story of a log, and what must come out of it.
//!
//! Commands, one a line: `append A..B [term=T] [bytes=N]` (each `append` is one group), `idle`
//! (waits for the mark), `truncate AFTER`, `purge UPTO`, `restart`, `kill`, then damage to the closed
//! files: `zero frame N`, `flip frame N`, `zero row N`, `flip row N`, `zero header 1|2 of SEGMENT`,
//! `zero marks of SEGMENT` (what is durable is then known from the frames alone: the last group counts
//! as unsynced), `remove segment N`, `empty segment N`, `flip void SEGMENT N` (a frame that a
//! truncation voided), `flip unused SEGMENT` (zeros behind its last frame), `flip unused row SEGMENT`, `foreign NAME`, `remove hard-state 1|2`, `empty hard-state 1|2`.
//! `unreadable frame N` makes its blocks unreadable; `cut at N` is the repair tool, durable entries included.
//! `peers N` gives the log N peers that receive every `append` from there on, `peers 0` takes none of them away but lets
//! them miss what follows; `purge peers UPTO`. With peers the end of the story is that of a node that asks them.
//! Behind `---`: what opening says, then the live entries; with `dump N` as the last line, what `stemedb wal dump` shows.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, missing_docs)]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use common::{append, close, contents, entry, open_sim, options};
use openraft::storage::RaftLogStorage;
use stemedb_raft::{
    OpenError, WalStore,
    disk::sim::SimDisk,
    frame::{HEADER_OFFSETS, MARK_OFFSETS, ROW_BYTES, ROWS_OFFSET, log_id},
    index::{segment_name, segment_number},
    recovery::{FrameFound, Place, RowFound},
    scan::scan_segment,
};

struct Story {
    sim: SimDisk,
    store: Option<WalStore>,
    term: u64,
    peers: Vec<WalStore>,
    /// How many of them receive what is appended.
    listening: usize,
    dump: Option<u64>,
}

fn dir() -> PathBuf {
    PathBuf::from("/wal")
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_else(|_| panic!("not a number: {word}"))
}

impl Story {
    fn read(&self, number: u64) -> Vec<u8> {
        let mut copy = Vec::new();
        self.sim.corrupt(&dir().join(segment_name(number)), |b| copy = b.clone()).unwrap();
        copy
    }

    /// The segment that holds the live frame of an entry, its offset, and its row's offset.
    fn place(&self, index: u64) -> (u64, usize, usize) {
        for at in (1..100).rev() {
            if !stemedb_raft::disk::Disk::list(&*self.sim.shared(), &dir())
                .unwrap()
                .iter()
                .any(|f| f.name == segment_name(at))
            {
                continue;
            }
            let scan = scan_segment(&self.read(at)).unwrap();
            if let Some(found) = scan.entries.iter().find(|e| e.index == index) {
                let row = ROWS_OFFSET as usize + (index - scan.header.first_index) as usize * ROW_BYTES;
                return (at, found.offset.unwrap() as usize, row);
            }
        }
        panic!("no entry {index}");
    }

    fn damage(&self, segment: u64, at: usize, len: usize, how: &str) {
        let path = dir().join(segment_name(segment));
        self.sim
            .corrupt(&path, |b| match how {
                "zero" => b[at..at + len].fill(0),
                "flip" => b[at + len / 2] ^= 0x10,
                other => panic!("unknown damage {other}"),
            })
            .unwrap();
    }

    async fn run(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let option = |name: &str| words.iter().find_map(|w| w.strip_prefix(name)).map(number);
        let closes = !matches!(words[0], "append" | "idle" | "truncate" | "purge" | "peers" | "vote");
        if closes && let Some(store) = self.store.take() {
            if words[0] == "kill" {
                self.sim.kill();
            }
            let closing = tokio::task::spawn_blocking(move || store.handle().close());
            let closed = closing.await.unwrap();
            assert!(words[0] == "kill" || closed.is_ok(), "{closed:?}");
        }
        if !closes && self.store.is_none() {
            self.store = Some(open_sim(&self.sim).unwrap());
        }
        match words.as_slice() {
            ["append", range, ..] => {
                let (from, to) = range.split_once("..").unwrap();
                self.term = option("term=").unwrap_or(self.term);
                let bytes = option("bytes=").unwrap_or(20) as usize;
                let make = |i| entry(self.term, i, &format!("{:x<bytes$}", format!("e{i}t{}", self.term)));
                let entries = (number(from)..=number(to)).map(make).collect();
                let entries: Vec<_> = entries;
                for peer in self.peers.iter_mut().take(self.listening) {
                    append(peer, entries.clone()).await.unwrap();
                }
                append(self.store.as_mut().unwrap(), entries).await.unwrap();
            }
            ["peers", n] => {
                self.listening = number(n) as usize;
                while self.peers.len() < self.listening {
                    self.peers.push(open_sim(&SimDisk::new()).unwrap());
                }
            }
            ["purge", "peers", upto] => {
                for peer in &mut self.peers {
                    peer.purge(log_id(self.term, number(upto))).await.unwrap();
                }
            }
            ["vote", term] => {
                let vote = stemedb_raft::Vote::new_committed(number(term), 1);
                self.store.as_mut().unwrap().save_vote(&vote).await.unwrap();
            }
            ["dump", segment] => self.dump = Some(number(segment)),
            ["unreadable", "frame", index] => {
                let (segment, at, _) = self.place(number(index));
                self.sim.set_unreadable(&dir().join(segment_name(segment)), [at / 4096]).unwrap();
            }
            ["cut", "at", index] => {
                let (segment, at, _) = self.place(number(index));
                let bytes = self.read(segment);
                let path = dir().join(segment_name(segment));
                let scan = scan_segment(&bytes).unwrap();
                let read = stemedb_raft::tool::Segment { path, bytes, unreadable: vec![], scan, next_first: None };
                let (cut, _) = read.cut(at as u64, true).unwrap();
                self.sim.corrupt(&dir().join(segment_name(segment)), |b| *b = cut).unwrap();
            }
            ["idle"] => {
                // Syncs of the spare, which is prepared meanwhile, are no marks.
                let marks = || self.sim.operations().iter().filter(|o| o.starts_with("sync segment.0")).count();
                let before = marks();
                while marks() == before {
                    tokio::task::yield_now().await;
                }
            }
            ["truncate", after] => {
                let after = number(after);
                self.store.as_mut().unwrap().truncate_after(Some(log_id(self.term, after))).await.unwrap();
            }
            ["purge", upto] => self.store.as_mut().unwrap().purge(log_id(self.term, number(upto))).await.unwrap(),
            ["restart"] | ["kill"] => self.store = Some(open_sim(&self.sim).unwrap()),
            [how @ ("zero" | "flip"), "frame", index] => {
                let (segment, at, _) = self.place(number(index));
                self.damage(segment, at, 72 + 8, how);
            }
            [how @ ("zero" | "flip"), "row", index] => {
                let (segment, _, at) = self.place(number(index));
                self.damage(segment, at, ROW_BYTES, how);
            }
            ["flip", "void", segment, index] => {
                let scan = scan_segment(&self.read(number(segment))).unwrap();
                let found = scan.entries.iter().find(|e| e.index == number(index)).unwrap();
                self.damage(number(segment), found.offset.unwrap() as usize, 80, "flip");
            }
            ["flip", "unused", "row", segment] => {
                let scan = scan_segment(&self.read(number(segment))).unwrap();
                let at = ROWS_OFFSET as usize + (scan.entries.len() + 1) * ROW_BYTES;
                self.damage(number(segment), at, ROW_BYTES, "flip");
            }
            ["flip", "unused", segment] => {
                let scan = scan_segment(&self.read(number(segment))).unwrap();
                self.damage(number(segment), scan.end_offset as usize + 1000, 1, "flip");
            }
            ["zero", "header", copy, "of", segment] => {
                self.damage(number(segment), HEADER_OFFSETS[number(copy) as usize - 1] as usize, 96, "zero");
            }
            ["zero", "marks", "of", segment] => {
                for at in MARK_OFFSETS {
                    self.damage(number(segment), at as usize, 48, "zero");
                }
            }
            ["remove", "segment", n] => {
                let disk = self.sim.shared();
                disk.remove(&dir().join(segment_name(number(n)))).unwrap();
            }
            ["empty", "segment", n] => {
                self.sim.corrupt(&dir().join(segment_name(number(n))), Vec::clear).unwrap();
            }
            ["remove", "hard-state", n] => self.sim.shared().remove(&dir().join(format!("hard-state.{n}"))).unwrap(),
            ["empty", "hard-state", n] => {
                self.sim.corrupt(&dir().join(format!("hard-state.{n}")), Vec::clear).unwrap();
            }
            ["foreign", name] => {
                self.sim.shared().create(&dir().join(name)).unwrap().write_at(b"not ours", 0).unwrap();
            }
            other => panic!("unknown command {other:?}"),
        }
    }

    /// The rows of the recovery table that this log reaches: what was found of each live entry.
    fn rows_reached(&self) -> Vec<(FrameFound, RowFound, Place)> {
        let mut reached: Vec<(u64, _)> = Vec::new();
        let mut scans = Vec::new();
        for found in self.sim.shared().list(&dir()).unwrap() {
            let number = segment_number(&found.name).filter(|_| found.bytes > 0);
            scans.extend(number.and_then(|n| scan_segment(&self.read(n)).ok()));
        }
        let durable_end = scans.last().map(|scan| scan.durable_end).unwrap_or_default();
        for scan in &scans {
            reached.retain(|(index, _)| *index < scan.header.first_index);
            for e in &scan.entries {
                let place = if e.index < durable_end { Place::Synced } else { Place::Unsynced };
                reached.push((e.index, (e.frame, e.row, place)));
            }
        }
        reached.into_iter().map(|(_, row)| row).collect()
    }

    /// What a node says that has peers, as voters 2, 3 …
    fn asked(&self, pending: stemedb_raft::PendingLog) -> String {
        let others: Vec<_> = (2..).zip(self.peers.iter().map(|peer| peer.handle().source())).collect();
        let voters: Vec<u64> = (1..2 + others.len() as u64).collect();
        match common::ask_once(pending, 1, &voters, &others) {
            common::Found::Ready(store, report) => opened(store, &report),
            common::Found::Waits(pending) => {
                let indexes: Vec<_> = pending.questions().iter().map(|q| q.index.to_string()).collect();
                format!("wait {}\n", indexes.join(" "))
            }
            common::Found::Lost(why) => format!("rebuild {why}\n"),
            common::Found::Refused(why) => format!("refuse {why}\n"),
        }
    }

    fn outcome(&self) -> String {
        if let Some(segment) = self.dump {
            let bytes = self.read(segment);
            let scan = scan_segment(&bytes).unwrap();
            let path = dir().join(segment_name(segment));
            let read = stemedb_raft::tool::Segment { path, bytes, unreadable: vec![], scan, next_first: None };
            return read.dump();
        }
        if !self.peers.is_empty() {
            match common::begin(&self.sim) {
                common::Found::Waits(pending) => return self.asked(pending),
                common::Found::Ready(store, report) => return opened(store, &report),
                common::Found::Lost(why) | common::Found::Refused(why) => return format!("rebuild {why}\n"),
            }
        }
        let (store, report) = match WalStore::open(self.sim.shared(), options(&dir())) {
            Ok(opened) => opened,
            Err(OpenError::Repair(damage)) => return format!("repair {}\n", list(&damage)),
            Err(OpenError::Ask(damage)) => return format!("ask {}\n", list(&damage)),
            Err(other) => return format!("refuse {other}\n"),
        };
        opened(store, &report)
    }
}

fn opened(store: WalStore, report: &stemedb_raft::RecoveryReport) -> String {
    let tail = report.tail_cut_from.map(|i| format!(" cut={i}")).unwrap_or_default();
    let repaired = report.repaired.iter().map(|i| format!(" repaired={i}")).collect::<String>();
    let unknown = report.unknown_files.iter().map(|f| format!(" unknown={f}")).collect::<String>();
    let short = |line: &String| line.trim_end_matches('x').to_owned();
    let entries = contents(&store).unwrap().iter().map(short).collect::<Vec<_>>().join(" ");
    close(store);
    format!("open segments={} entries={}{tail}{repaired}{unknown}\n{entries}\n", report.segments, report.entries)
}

fn list(damage: &[stemedb_raft::error::Damage]) -> String {
    damage.iter().map(|d| format!("{}:{}:{}", d.segment, d.index, d.what)).collect::<Vec<_>>().join(", ")
}

#[test]
fn each_story_ends_as_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let rewrite = std::env::var_os("STEMEDB_REWRITE_GOLDEN").is_some();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let mut failed = Vec::new();
    let mut count = 0;
    let mut reached = BTreeSet::new();
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let text = fs::read_to_string(&path).unwrap();
        let (script, expected) = text.split_once("---\n").expect("a story has an end");
        let mut story = Story { sim: SimDisk::new(), store: None, term: 1, peers: vec![], listening: 0, dump: None };
        for line in script.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
            runtime.block_on(story.run(line));
        }
        if let Some(store) = story.store.take() {
            close(store);
        }
        reached.extend(story.rows_reached());
        let got = story.outcome();
        story.peers.drain(..).for_each(close);
        count += 1;
        if rewrite {
            fs::write(&path, format!("{script}---\n{got}")).unwrap();
        } else if got != expected {
            failed.push(format!("{}\nexpected:\n{expected}got:\n{got}", path.display()));
        }
    }
    // Two states of a frame, three of a row, two places.
    assert_eq!(reached.len(), 2 * 3 * 2, "a row of the recovery table has no story: {reached:?}");
    assert!(count >= 20, "only {count} stories were found");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
