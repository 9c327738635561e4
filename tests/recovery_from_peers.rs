//! The experiment of FAST'18 ("Protocol-Aware Recovery for Consensus-Based Storage"): four entries on three nodes, every
//! combination of damaged copies, 4,096 in all. Where one intact copy of each entry is left, all three logs come back
//! whole; where one is left nowhere, the nodes that miss it wait and say so; never is an entry wrong or missing in a
//! log that opened.
//!
//! The logs open by the way that the server takes, and what they ask each other travels in the frames of `stemedb-net`.
//! The surgical repair of one entry in a log of 30,000 is measured in bytes by the same means.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

use std::{collections::BTreeSet, path::Path};

use bytes::Bytes;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use rand::{Rng, SeedableRng, rngs::StdRng};
use stemedb::node::messages::{EntryAnswers, EntryQuestions, pack, unpack};
use stemedb_net::{
    Lane,
    wire::{FrameType, HEADER_BYTES, Header, Start, read_start},
};
use stemedb_raft::{
    Electorate, Entry, EntryAnswer, EntryData, EntryQuestion, EntrySource, OpenStep, PendingLog, TypeConfig, Vote,
    WalOptions, WalStore,
    disk::sim::SimDisk,
    frame::{ROW_BYTES, ROWS_OFFSET, log_id},
    scan::scan_segment,
};

const ENTRIES: u64 = 4;
const NODES: u64 = 3;
/// Room for the four, and not much to copy 12,288 times.
const SMALL_BYTES: u64 = 24 * 1024;
const SEGMENT: &str = "/wal/segment.001.wal";

/// Threads that share the combinations.
const LANES: u32 = 2;

fn options(segment_bytes: u64) -> WalOptions {
    WalOptions { segment_bytes, tail_cache_bytes: 0, ..WalOptions::new("/wal") }
}

fn entry(index: u64, text: &str) -> Entry {
    let data = EntryData(Bytes::copy_from_slice(text.as_bytes()));
    Entry { log_id: log_id(1, index), payload: openraft::EntryPayload::Normal(data) }
}

async fn append(store: &mut WalStore, entries: Vec<Entry>) {
    let (tx, rx) = TypeConfig::oneshot();
    store.append(entries, IOFlushed::signal(tx)).await.unwrap();
    rx.await.unwrap().unwrap();
}

async fn close(store: WalStore) {
    tokio::task::spawn_blocking(move || store.handle().close()).await.unwrap().unwrap();
}

fn text_of(index: u64) -> String {
    format!("entry {index} {}", "e".repeat(index as usize * 40))
}

/// A log as a cluster at rest leaves it.
async fn written(entries: u64, segment_bytes: u64, text: impl Fn(u64) -> String) -> SimDisk {
    let sim = SimDisk::new();
    let (mut store, _) = WalStore::open(sim.shared(), options(segment_bytes)).unwrap();
    store.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    append(&mut store, (0..entries).map(|i| entry(i, &text(i))).collect()).await;
    store.save_committed(Some(log_id(1, entries - 1))).await.unwrap();
    close(store).await;
    sim
}

/// Bytes as they travel: sealed into a frame, read back out of it.
fn travel(frame: FrameType, kind: u16, body: &[u8], bytes_sent: &mut usize) -> Bytes {
    let header = Header {
        frame,
        lane: Lane::Log,
        cluster_id: [7; 16],
        sender_id: 1,
        target_id: 2,
        boot: 1,
        kind,
        code: 0,
        request_id: 1,
        body_bytes: 0,
        body_crc: 0,
    };
    let sent = [&header.seal(body)[..], body].concat();
    *bytes_sent += sent.len();
    let Some(Start::Frame(read)) = read_start(&sent).unwrap() else { panic!("no frame") };
    let body = &sent[HEADER_BYTES..];
    read.check_body(body).unwrap();
    Bytes::copy_from_slice(body)
}

/// Asks one node, as the server does.
fn ask(questions: Vec<EntryQuestion>, source: &EntrySource, bytes: &mut usize) -> Vec<(u64, EntryAnswer)> {
    let kind = stemedb::node::kinds::Kind::Entries.number();
    let request = travel(FrameType::Request, kind, &pack(&EntryQuestions { questions }).unwrap(), bytes);
    let request: EntryQuestions = unpack(&request).unwrap();
    let answers = EntryAnswers { answers: source.answer_all(&request.questions, usize::MAX) };
    let reply = travel(FrameType::Reply, kind, &pack(&answers).unwrap(), bytes);
    unpack::<EntryAnswers>(&reply).unwrap().answers
}

#[allow(clippy::large_enum_variant)]
enum Node {
    Ready(WalStore),
    Asks(PendingLog),
    Lost(String),
}

impl Node {
    fn of(step: OpenStep) -> Self {
        match step {
            OpenStep::Ready(store, _) => Self::Ready(store),
            OpenStep::AskPeers(pending) => Self::Asks(pending),
            OpenStep::Rebuild(lost) => Self::Lost(lost.why),
        }
    }

    fn source(&self) -> EntrySource {
        match self {
            Self::Ready(store) => store.handle().source(),
            Self::Asks(pending) => pending.source(),
            Self::Lost(_) => EntrySource::lost(),
        }
    }
}

/// Lets the nodes ask each other until nobody gets any further.
fn settle(sims: &[SimDisk]) -> Vec<Node> {
    let open = |sim: &SimDisk| Node::of(WalStore::begin_open(sim.shared(), options(SMALL_BYTES)).unwrap());
    let mut nodes: Vec<Node> = sims.iter().map(open).collect();
    let voters: BTreeSet<u64> = (1..=NODES).collect();
    loop {
        let mut moved = false;
        for own in 0..nodes.len() {
            let sources: Vec<EntrySource> = nodes.iter().map(Node::source).collect();
            let Node::Asks(pending) = &nodes[own] else { continue };
            let before = pending.progress();
            let mut answers = Vec::new();
            for (other, source) in sources.iter().enumerate().filter(|(other, _)| *other != own) {
                let said = ask(pending.questions(), source, &mut 0);
                answers.extend(said.into_iter().map(|(index, answer)| (other as u64 + 1, index, answer)));
            }
            let Node::Asks(pending) = std::mem::replace(&mut nodes[own], Node::Lost(String::new())) else { continue };
            let electorate = Electorate { own: Some(own as u64 + 1), voters: voters.clone() };
            nodes[own] = Node::of(pending.resolve(&answers, &electorate).unwrap());
            moved |= match &nodes[own] {
                Node::Asks(pending) => pending.progress() != before,
                Node::Ready(_) | Node::Lost(_) => true,
            };
        }
        if !moved {
            return nodes;
        }
    }
}

/// Damages one entry's copy in one of several ways.
fn damage(sim: &SimDisk, index: u64, rng: &mut StdRng) {
    let how = rng.random_range(0..6);
    sim.corrupt(Path::new(SEGMENT), |bytes| {
        let pristine = scan_segment(PRISTINE.get().unwrap()).unwrap();
        let found = &pristine.entries[index as usize];
        let (at, len) = (found.offset.unwrap() as usize, 72 + found.located.unwrap().payload_bytes as usize);
        let row = ROWS_OFFSET as usize + index as usize * ROW_BYTES;
        match how {
            0 => bytes[at + 72 + 3] ^= 4,
            1 => bytes[at + 20] ^= 1,
            2 => bytes[at..at + len].fill(0),
            3 => {
                bytes[at..at + len].fill(0);
                bytes[row..row + ROW_BYTES].fill(0);
            }
            4 => {
                rng.fill(&mut bytes[at..at + len]);
                bytes[row + 9] ^= 0x40;
            }
            _ => bytes[at + 40..at + len.min(90)].fill(0x55),
        }
    })
    .unwrap();
}

/// The undamaged segment: only its layout is used, which is the same on all nodes.
static PRISTINE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();

fn contents(store: &WalStore) -> Vec<String> {
    let entries = store.reader().read(0, u64::MAX, u64::MAX).unwrap();
    let text = |e: &Entry| match &e.payload {
        openraft::EntryPayload::Normal(data) => String::from_utf8_lossy(&data.0).into_owned(),
        other => format!("{other:?}"),
    };
    entries.iter().map(text).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn all_4096_combinations_are_recovered_or_halted_honestly() {
    let mut written_nodes = Vec::new();
    for _ in 0..NODES {
        written_nodes.push(written(ENTRIES, SMALL_BYTES, text_of).await);
    }
    written_nodes[0].corrupt(Path::new(SEGMENT), |b| drop(PRISTINE.set(b.clone()))).unwrap();
    // No combination knows of another one.
    let lanes: Vec<_> = (0..LANES)
        .map(|lane| {
            let written_nodes: Vec<SimDisk> = written_nodes.iter().map(SimDisk::fork).collect();
            tokio::task::spawn_blocking(move || {
                let combinations = (lane..1 << (ENTRIES * NODES)).step_by(LANES as usize);
                tokio::runtime::Handle::current().block_on(combine(&written_nodes, combinations))
            })
        })
        .collect();
    let (mut recovered, mut halted) = (0, 0);
    for lane in lanes {
        let (of_lane, halted_of_lane) = lane.await.unwrap();
        (recovered, halted) = (recovered + of_lane, halted + halted_of_lane);
    }
    println!("{recovered} recovered, {halted} halted, 0 unsafe");
    assert_eq!((recovered, halted), (2401, 1695));
}

/// How many of these combinations of damage are recovered, and how many halted.
async fn combine(written_nodes: &[SimDisk], combinations: impl Iterator<Item = u32>) -> (u32, u32) {
    let expected: Vec<String> = (0..ENTRIES).map(text_of).collect();
    let (mut recovered, mut halted) = (0, 0);
    for combination in combinations {
        let mut rng = StdRng::seed_from_u64(u64::from(combination));
        let sims: Vec<SimDisk> = written_nodes.iter().map(SimDisk::fork).collect();
        let is_damaged = |node: u64, index: u64| combination >> (node * ENTRIES + index) & 1 == 1;
        for (node, sim) in (0..).zip(&sims) {
            for index in (0..ENTRIES).filter(|index| is_damaged(node, *index)) {
                damage(sim, index, &mut rng);
            }
        }
        let lost = |index| (0..NODES).all(|node| is_damaged(node, index));
        let recoverable = !(0..ENTRIES).any(lost);
        let nodes = settle(&sims);
        let mut all_ready = true;
        let waiting: Vec<String> = nodes
            .iter()
            .map(|node| match node {
                Node::Asks(pending) => format!("{:?}", pending.questions()),
                Node::Ready(_) => "ready".to_owned(),
                Node::Lost(why) => why.clone(),
            })
            .collect();
        for node in nodes {
            match node {
                Node::Ready(store) => {
                    assert_eq!(contents(&store), expected, "combination {combination:012b}: unsafe");
                    close(store).await;
                }
                Node::Asks(pending) => {
                    all_ready = false;
                    assert!(!recoverable, "combination {combination:012b} waits: {waiting:#?}");
                    assert!(pending.questions().iter().any(|q| lost(q.index)), "it waits for what is there");
                }
                Node::Lost(why) => panic!("combination {combination:012b}: {why}"),
            }
        }
        if all_ready {
            recovered += 1;
            // What was written in place is found again by the next start, without any peer.
            for sim in sims.iter().filter(|_| combination % 16 == 0) {
                sim.lose_unsynced();
                let (store, report) = WalStore::open(sim.shared(), options(SMALL_BYTES)).unwrap();
                assert_eq!((contents(&store), report.repaired), (expected.clone(), vec![]));
                close(store).await;
            }
        } else {
            halted += 1;
        }
    }
    (recovered, halted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_entry_of_a_long_log_is_repaired_with_few_bytes() {
    const LONG: u64 = 30_000;
    const DAMAGED: u64 = 17_321;
    let text = |index: u64| format!("{index} {}", "x".repeat(900));
    let segment_bytes = 64 << 20;
    let sim = written(LONG, segment_bytes, text).await;
    let healthy = sim.fork();
    sim.corrupt(Path::new(SEGMENT), |bytes| {
        let at = scan_segment(bytes).unwrap().entries[DAMAGED as usize].offset.unwrap() as usize;
        bytes[at..at + 500].fill(0);
    })
    .unwrap();
    let (peer, _) = WalStore::open(healthy.shared(), options(segment_bytes)).unwrap();
    let OpenStep::AskPeers(pending) = WalStore::begin_open(sim.shared(), options(segment_bytes)).unwrap() else {
        panic!("the damage was not noticed")
    };
    let mut bytes = 0;
    let answers: Vec<_> = ask(pending.questions(), &peer.handle().source(), &mut bytes)
        .into_iter()
        .map(|(index, answer)| (2, index, answer))
        .collect();
    let electorate = Electorate { own: Some(1), voters: (1..=3).collect() };
    let OpenStep::Ready(store, report) = pending.resolve(&answers, &electorate).unwrap() else {
        panic!("one copy was not enough")
    };
    println!("{bytes} bytes travelled to repair one entry of {LONG}");
    assert_eq!(report.repaired, [DAMAGED]);
    assert!(bytes <= 64 * 1024, "{bytes} bytes");
    let read = store.reader().read(DAMAGED - 1, DAMAGED + 2, u64::MAX).unwrap();
    assert_eq!(read.len(), 3);
    assert_eq!(read[1].log_id, log_id(1, DAMAGED));
    close(store).await;
    close(peer).await;
}
