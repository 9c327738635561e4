//! The matrix of faults: every row of `matrix/table.rs` on leader and follower, under load, with the judge over the whole
//! history. `STEMEDB_TEST_FULL=1` runs every cell, else one of the first row of each number; `STEMEDB_TEST_WRITE_DOCS=1` runs every cell too
//! and writes `docs/fault-matrix.md` from what came of them. `STEMEDB_TEST_MATRIX=6,OldCopy` picks rows by their numbers
//! and by what is done; what was not picked stays in the document as it is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod rig;

#[path = "matrix/harm.rs"]
mod harm;
#[path = "matrix/load.rs"]
mod load;
#[path = "matrix/panic_disk.rs"]
mod panic_disk;
#[path = "matrix/process_acts.rs"]
mod process_acts;
#[path = "matrix/processes.rs"]
mod processes;
#[path = "matrix/sim.rs"]
mod sim;
#[path = "matrix/sim_acts.rs"]
mod sim_acts;
#[path = "matrix/table.rs"]
mod table;

use std::fmt::Write;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use futures_util::FutureExt;
use table::{Ground, Outcome, Row, TABLE, Victim};

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}

fn document() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/fault-matrix.md")
}

/// The victims of a row in this run: both in a full one, else one, in turns.
fn victims(number: usize, full: bool) -> Vec<Victim> {
    match (full, number % 2) {
        (true, _) => vec![Victim::Leader, Victim::Follower],
        (false, 0) => vec![Victim::Leader],
        (false, _) => vec![Victim::Follower],
    }
}

async fn run(row: &Row, victim: Victim, seed: u64) -> Option<Outcome> {
    match row.ground {
        Ground::Simulated => Some(sim_acts::run(row.act, victim, seed).await),
        Ground::Processes | Ground::Kernel | Ground::Small => processes::run(row.ground, row.act, victim, seed).await,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_of_the_matrix_is_survived() {
    if is_set("STEMEDB_TEST_LOG") {
        let _set_before = tracing_subscriber::fmt().with_writer(std::io::stderr).try_init();
    }
    let writes_docs = is_set("STEMEDB_TEST_WRITE_DOCS");
    let full = is_set("STEMEDB_TEST_FULL") || writes_docs;
    let picked = std::env::var("STEMEDB_TEST_MATRIX").ok();
    let is_picked =
        |row: &Row| picked.as_ref().is_none_or(|picked| picked.split(',').any(|number| row.is_named(number)));
    let mut outcomes: Vec<(&Row, Victim, Outcome)> = Vec::new();
    let mut wrong = Vec::new();
    // The first row of each number stands for the others.
    let is_first = |place: usize| TABLE[..place].iter().all(|earlier| earlier.number != TABLE[place].number);
    let runs = |place: usize, row: &Row| is_picked(row) && (full || picked.is_some() || is_first(place));
    for (number, row) in TABLE.iter().enumerate().filter(|(place, row)| runs(*place, row)) {
        for victim in victims(number, full) {
            let name = format!("row {} {}: {}, {}", row.number, victim.word(), row.fault, row.place);
            // What is random in a cell is the same in every run.
            let seed = 1_000 + number as u64 * 2 + u64::from(victim == Victim::Follower);
            // One cell that ends in the middle is no reason not to see the others.
            let Ok(ran) = AssertUnwindSafe(run(row, victim, seed)).catch_unwind().await else {
                wrong.push(format!("{name}: it ended in the middle, see above"));
                continue;
            };
            let Some(outcome) = ran else { continue };
            let Outcome { seen, acknowledged, reads, errors, .. } = &outcome;
            println!("{name}: {seen} ({acknowledged} writes, {reads} reads, {errors} errors)");
            if let Some(why) = &outcome.wrong {
                wrong.push(format!("{name}: {why}"));
            }
            outcomes.push((row, victim, outcome));
        }
    }
    println!("{} of {} cells", outcomes.len(), TABLE.len() * 2);
    if writes_docs {
        outcomes.retain(|(.., outcome)| outcome.wrong.is_none());
        std::fs::write(document(), rendered(&outcomes)).unwrap();
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn ground_words(ground: Ground) -> &'static str {
    match ground {
        Ground::Simulated => "simulated disk",
        Ground::Processes => "processes",
        Ground::Kernel => "processes on ext4 over a faulty disk",
        Ground::Small => "processes on small file systems",
    }
}

/// The document, with what came of each cell; what was not run this time stays as it was written before.
fn rendered(outcomes: &[(&Row, Victim, Outcome)]) -> String {
    let mut text = String::from(
        "# The matrix of faults\n\n\
         Written by `STEMEDB_TEST_WRITE_DOCS=1 cargo test --features faulty-disk --test matrix`, from what came of each cell. In\n\
         every cell clients write and read through all three nodes, before the fault, while it lasts and after it, and the judge\n\
         compares the whole history with what every node lists at the end: no acknowledged write lost or doubled, no stale read,\n\
         no refused write that shows up later. *Errors* are answers of nodes that were up that were not a success.\n\n\
         | row | fault | where | on | ground | expected | seen | writes | reads | errors |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
    );
    let before = std::fs::read_to_string(document()).unwrap_or_default();
    for row in TABLE {
        for victim in [Victim::Leader, Victim::Follower] {
            let begins = begins(row, Some(victim));
            let ran = outcomes.iter().find(|(of, on, _)| std::ptr::eq(*of, row) && *on == victim);
            match ran {
                Some((.., outcome)) => {
                    let seen = outcome.seen.replace('|', "/").replace('\n', " ");
                    let Outcome { acknowledged, reads, errors, .. } = outcome;
                    let ground = ground_words(row.ground);
                    let expected = row.expected;
                    writeln!(text, "{begins}{ground} | {expected} | {seen} | {acknowledged} | {reads} | {errors} |")
                        .unwrap();
                }
                None => {
                    let known = before.lines().filter(|line| line.starts_with(&begins));
                    known.for_each(|line| writeln!(text, "{line}").unwrap());
                }
            }
        }
    }
    text
}

/// How the lines of a row begin.
fn begins(row: &Row, victim: Option<Victim>) -> String {
    let on = victim.map_or_else(String::new, |victim| format!("{} | ", victim.word()));
    format!("| {} | {} | {} | {on}", row.number, row.fault, row.place)
}

/// A row that was added or changed is missing in the document until it is written anew.
#[test]
fn the_document_has_every_row() {
    if is_set("STEMEDB_TEST_WRITE_DOCS") {
        return;
    }
    let text = std::fs::read_to_string(document()).unwrap();
    for row in TABLE {
        let begins = begins(row, None);
        let lines = text.lines().filter(|line| line.starts_with(&begins)).count();
        assert_eq!(lines, 2, "{begins}: write docs/fault-matrix.md anew, see its head");
    }
}
