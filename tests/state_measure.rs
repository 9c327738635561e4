//! Database bytes per assertion, and bytes written for each byte given, through the real state
//! machine. Prints; run by hand: `cargo test --test state_measure -- --ignored --nocapture`.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use openraft::EntryPayload;
use openraft::storage::RaftStateMachine;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use stemedb::model::NewAssertion;
use stemedb::node::{applier::restorer, vital::Vital};
use stemedb::state::apply::KeyLimits;
use stemedb::state::command::{Command, CommandKey, ENTRY_FORMAT, EntryBody, KeySource, Operation};
use stemedb::state::engine::lsm::LsmOptions;
use stemedb::state::machine::{MachineOptions, StateMachine};
use stemedb_raft::types::{Entry, EntryData, TypeConfig};
use uuid::Uuid;

const ASSERTIONS: u64 = 200_000;
const PER_ENTRY: u64 = 50;
/// 50 entries a second: keys of both kinds live and expire while this runs.
const ENTRY_MS: u64 = 20;
const START_MS: u64 = 1_700_000_000_000;

/// Path, predicate, source and value of 150 bytes together; half of the value is noise.
fn assertion(number: u64, id: Uuid, rng: &mut StdRng) -> NewAssertion {
    let concept_path = format!("debian/section-{:02}/package-{:06}", number % 60, number / 8);
    let predicate = format!("property-{}", number % 8);
    let left = 150 - concept_path.len() - predicate.len() - "importer".len() - 2;
    let noise: String = (0..left / 2).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect();
    NewAssertion {
        id,
        concept_path,
        predicate,
        value_json: format!("\"{noise}{}\"", "the usual words ".repeat(9).split_at(left - left / 2).0),
        source: Some("importer".into()),
        confidence: None,
        epoch: None,
        supersedes: None,
        valid_from_ms: None,
        valid_to_ms: None,
    }
}

async fn measure(source: KeySource) {
    let dir = tempfile::tempdir().unwrap();
    let options = MachineOptions { data_dir: dir.path().to_owned(), lsm: LsmOptions::default() };
    let mut machine = StateMachine::open(options, restorer(KeyLimits::default(), Vital::default()).0).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let began = tokio::time::Instant::now();
    for index in 0..ASSERTIONS / PER_ENTRY {
        let now_ms = START_MS + index * ENTRY_MS;
        let commands = (0..PER_ENTRY).map(|n| {
            let noise = rng.random::<u128>() >> 48;
            let id = Uuid::from_u128((u128::from(now_ms) << 80) | (noise & !(0xF << 76)) | (7 << 76));
            let new = assertion(index * PER_ENTRY + n, id, &mut rng);
            Command {
                key: CommandKey { source, id: rng.random() },
                body_hash: rng.random(),
                resend_until_ms: now_ms + 10_000,
                created_at_ms: now_ms,
                op: Operation::Assert(vec![new]),
            }
        });
        let body = EntryBody { format: ENTRY_FORMAT, log_time_ms: now_ms, commands: commands.collect() };
        let data = EntryData(body.encode().unwrap().into());
        let log_id = openraft::testing::log_id::<TypeConfig>(1, 1, index);
        let entry = Entry { log_id, payload: EntryPayload::Normal(data) };
        machine.apply(futures_util::stream::iter([Ok((entry, None))])).await.unwrap();
    }
    let took = began.elapsed();
    // Sealed as for a checkpoint, so that everything counts.
    drop(machine.try_create_snapshot_builder(true).await);
    let engine = machine.handle().engine();
    engine.flush_blocking().unwrap();
    engine.compact_blocking(false).unwrap();
    let stats = engine.stats().unwrap();
    let written = stats.flushed_bytes + stats.compacted_bytes;
    println!(
        "keys of {source:?}: {} database bytes per assertion ({} tables), {:.2} bytes written per byte given, \
         {:.0} us per assertion",
        stats.table_bytes / ASSERTIONS,
        stats.table_count,
        written as f64 / (ASSERTIONS * 150) as f64,
        took.as_micros() as f64 / ASSERTIONS as f64,
    );
    engine.compact_blocking(true).unwrap();
    println!("  {} bytes after a major compaction", engine.stats().unwrap().table_bytes / ASSERTIONS);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute; prints figures"]
async fn database_bytes_per_assertion() {
    for source in [KeySource::Node, KeySource::Balancer, KeySource::Client] {
        measure(source).await;
    }
}
