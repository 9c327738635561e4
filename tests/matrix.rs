//! The matrix of faults: every row of `matrix/table.rs` on leader and follower, under load, with the judge over the whole
//! history. `STEMEDB_TEST_FULL=1` runs every cell, else one of each row; `STEMEDB_TEST_WRITE_DOCS=1` runs every cell too
//! and writes `docs/fault-matrix.md` from what came of them. `STEMEDB_TEST_MATRIX=6,13` picks rows.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod rig;

#[path = "matrix/load.rs"]
mod load;
#[path = "matrix/processes.rs"]
mod processes;
#[path = "matrix/sim.rs"]
mod sim;
#[path = "matrix/table.rs"]
mod table;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use table::{Act, Ground, Outcome, Row, TABLE, Victim};

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
        Ground::Simulated => Some(sim::run(row.act, victim, seed).await),
        Ground::Processes | Ground::Kernel => processes::run(row.ground, row.act, victim, seed).await,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_of_the_matrix_is_survived() {
    let writes_docs = is_set("STEMEDB_TEST_WRITE_DOCS");
    let full = is_set("STEMEDB_TEST_FULL") || writes_docs;
    let picked = std::env::var("STEMEDB_TEST_MATRIX").ok();
    let is_picked = |row: &&(usize, &Row)| {
        picked.as_ref().is_none_or(|picked| picked.split(',').any(|number| number == row.1.number))
    };
    let built: Vec<(usize, &Row)> = TABLE.iter().filter(|row| !matches!(row.act, Act::Waits(_))).enumerate().collect();
    let mut outcomes: Vec<(&Row, Victim, Outcome)> = Vec::new();
    let mut wrong = Vec::new();
    for (number, row) in built.iter().filter(is_picked) {
        for victim in victims(*number, full) {
            let name = format!("row {} {}: {}, {}", row.number, victim.word(), row.fault, row.place);
            // What is random in a cell is the same in every run.
            let seed = 1_000 + *number as u64 * 2 + u64::from(victim == Victim::Follower);
            let Some(outcome) = run(row, victim, seed).await else { continue };
            let Outcome { seen, acknowledged, reads, errors, .. } = &outcome;
            println!("{name}: {seen} ({acknowledged} writes, {reads} reads, {errors} errors)");
            if let Some(why) = &outcome.wrong {
                wrong.push(format!("{name}: {why}"));
            }
            outcomes.push((row, victim, outcome));
        }
    }
    let cells = TABLE.iter().filter(|row| !matches!(row.act, Act::Waits(_))).count() * 2;
    println!("{} of {cells} cells; {} rows wait for what is not built", outcomes.len(), waiting().count());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    if writes_docs && picked.is_none() {
        std::fs::write(document(), rendered(&outcomes)).unwrap();
    }
}

fn waiting() -> impl Iterator<Item = (&'static Row, &'static str)> {
    TABLE.iter().filter_map(|row| match row.act {
        Act::Waits(what) => Some((row, what)),
        _ => None,
    })
}

fn ground_words(ground: Ground) -> &'static str {
    match ground {
        Ground::Simulated => "simulated disk",
        Ground::Processes => "processes",
        Ground::Kernel => "processes on ext4 over a faulty disk",
    }
}

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
    for (row, victim, outcome) in outcomes {
        let seen = outcome.seen.replace('|', "/").replace('\n', " ");
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {seen} | {} | {} | {} |",
            row.number,
            row.fault,
            row.place,
            victim.word(),
            ground_words(row.ground),
            row.expected,
            outcome.acknowledged,
            outcome.reads,
            outcome.errors,
        )
        .unwrap();
    }
    if waiting().next().is_some() {
        text.push_str("\n## Not there yet\n\n| row | fault | where | expected | needs |\n|---|---|---|---|---|\n");
        for (row, what) in waiting() {
            let Row { number, fault, place, expected, .. } = row;
            writeln!(text, "| {number} | {fault} | {place} | {expected} | {what} |").unwrap();
        }
    }
    text
}

/// A row that was added or changed is missing in the document until it is written anew.
#[test]
fn the_document_has_every_row() {
    if is_set("STEMEDB_TEST_WRITE_DOCS") {
        return;
    }
    let text = std::fs::read_to_string(document()).unwrap();
    for row in TABLE {
        let begins = format!("| {} | {} | {} | ", row.number, row.fault, row.place);
        let lines = text.lines().filter(|line| line.starts_with(&begins)).count();
        let expected = if matches!(row.act, Act::Waits(_)) { 1 } else { 2 };
        assert_eq!(lines, expected, "{begins}: write docs/fault-matrix.md anew, see its head");
    }
}
