//! Real servers that are killed at each named point of recovery, repair, flush, compaction, checkpoint, replacement of
//! the tree and rebuild: started again, they have everything that was acknowledged. Drain, failover and changes of the
//! members are in `kill_points/flows.rs`.
//!
//! The points come from one list in the code (`stemedb::fail_points`); one without a scenario here fails the test. Some
//! of them by default, all with `STEMEDB_TEST_FULL=1`; `STEMEDB_TEST_POINT=rebuild.swap` picks those that begin so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

#[path = "kill_points/field.rs"]
mod field;
#[path = "kill_points/flows.rs"]
mod flows;
mod rig;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use rig::HANG;
use rig::three::Three;
use rustix::process::Signal;
use serde_json::Value;
use stemedb::cli::http_client::Call;
use stemedb::fail_points;
use tokio::sync::Mutex;

/// Servers and clients of one cluster are as much as two cores serve.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// A memtable of these nodes takes few of them, and so does a segment.
const FILL_BYTES: usize = 200_000;

/// How the process gets to a point.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scenario {
    /// It starts with its log.
    Starts,
    /// It starts, and entries of its log are damaged.
    Repairs,
    /// It starts, and a whole segment is gone.
    MakesSegment,
    /// It takes writes until memory is flushed, tables are compacted, and a checkpoint is due.
    TakesWrites,
    /// `stemedb-api --rebuild-from-wal` makes its tree anew.
    RemakesTree,
    /// An operator has it rebuilt.
    Rebuilds,
}

fn scenario(point: &str) -> Scenario {
    match point.split('.').next().unwrap_or_default() {
        "recovery" => Scenario::Starts,
        "repair" if point == "repair.segment_made" => Scenario::MakesSegment,
        "repair" => Scenario::Repairs,
        "flush" | "compact" | "checkpoint" => Scenario::TakesWrites,
        "replace" => Scenario::RemakesTree,
        "rebuild" => Scenario::Rebuilds,
        _ => panic!("no scenario leads to the fail point {point}: write one"),
    }
}

fn is_full() -> bool {
    std::env::var_os("STEMEDB_TEST_FULL").is_some_and(|value| value == "1")
}

/// The points of this run: the first of each scenario, or all.
fn points() -> Vec<&'static str> {
    let picked = std::env::var("STEMEDB_TEST_POINT").ok();
    let mut seen = Vec::new();
    fail_points::points()
        .filter(|point| match &picked {
            Some(picked) => point.starts_with(picked.as_str()),
            None if is_full() => true,
            None => {
                let is_new = !seen.contains(&scenario(point));
                seen.push(scenario(point));
                is_new
            }
        })
        .collect()
}

#[test]
fn every_point_has_a_name_of_its_own_and_a_scenario() {
    let mut points: Vec<&str> = fail_points::points().collect();
    for point in &points {
        scenario(point);
    }
    assert!(points.len() > 30);
    let count = points.len();
    points.sort_unstable();
    points.dedup();
    assert_eq!(points.len(), count);
}

fn assert_killed(three: &Three, i: usize, point: &str, status: ExitStatus) {
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{point}: {status}\n{}", three.log(i));
}

/// Waits until the process ends at its point.
async fn ends(three: &mut Three, i: usize, point: &str) {
    let ended = tokio::time::timeout(HANG, three.processes.child_ended()).await;
    let ended = ended.unwrap_or_else(|_| panic!("{point}: it goes on\n{}", three.log(i))).unwrap();
    assert_eq!(ended.node, i, "{point}");
    assert_killed(three, i, point, ended.status);
}

/// Takes writes until the process ends at its point.
async fn fill_until_it_ends(three: &mut Three, i: usize, point: &str) {
    loop {
        three.fill((i + 1) % 3, FILL_BYTES).await;
        tokio::select! {
            biased;
            ended = three.processes.child_ended() => {
                let ended = ended.unwrap();
                assert_eq!(ended.node, i, "{point}");
                return assert_killed(three, i, point, ended.status);
            }
            () = std::future::ready(()) => {}
        }
        assert!(three.fills() < FILLS_MAX, "{point}: it never came by\n{}", three.log(i));
    }
}

/// Far more than a checkpoint takes.
const FILLS_MAX: u64 = 2_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_killed_at_any_point_comes_back_with_everything() {
    let points = points();
    if points.is_empty() {
        return;
    }
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut three = Three::start().await;
    // Some segments, so that one may be lost.
    for _ in 0..16 {
        three.fill(0, FILL_BYTES).await;
    }
    println!("{} of {} fail points (all with STEMEDB_TEST_FULL=1)", points.len(), fail_points::points().count());
    for (n, point) in points.into_iter().enumerate() {
        let i = n % 3;
        let other = (i + 1) % 3;
        three.write(other).await;
        let scenario = scenario(point);
        match scenario {
            Scenario::Starts | Scenario::Repairs | Scenario::MakesSegment => {
                three.processes.kill(i).await.unwrap();
                match scenario {
                    // In the way of a segment that is made later.
                    Scenario::Starts => {
                        std::fs::write(three.folder(i).join("wal/segment.900.wal"), "no segment").unwrap();
                    }
                    Scenario::Repairs => {
                        let newest = three.segments(i).len();
                        // Less than a segment's worth: a log that has lost more is given up.
                        assert!(newest > 0 && three.damage(i, |index| index % 5 == 0) > 0, "{point}");
                    }
                    _ => {
                        // Neither the oldest nor the newest.
                        let segments = three.segments(i);
                        std::fs::remove_file(&segments[segments.len() - 2]).unwrap();
                    }
                }
                three.arm(i, point);
                three.processes.start(i).unwrap();
                ends(&mut three, i, point).await;
            }
            Scenario::TakesWrites => {
                three.arm(i, point);
                fill_until_it_ends(&mut three, i, point).await;
            }
            Scenario::RemakesTree => {
                three.processes.kill(i).await.unwrap();
                three.arm(i, point);
                let status = Command::new(env!("CARGO_BIN_EXE_stemedb-api"))
                    .arg("--config")
                    .arg(three.processes.plan()[i].config_file())
                    .arg("--rebuild-from-wal")
                    .env("STEMEDB_TEST_FAIL_FILE", three.fail_file(i))
                    .status()
                    .unwrap();
                assert_killed(&three, i, point, status);
            }
            Scenario::Rebuilds => {
                three.arm(i, point);
                let call = Call::post("/v1/admin/node/rebuild?wait=false", "{}");
                let mut client = three.client(i);
                // While the node before is still on its way, a rebuild of another one is refused.
                three
                    .until("the rebuild is taken", async |_| {
                        client.call(&call, HANG).await.map_or(true, |answer| answer.is_success())
                    })
                    .await;
                ends(&mut three, i, point).await;
            }
        }
        three.write(other).await;
        three.disarm(i);
        if three.processes.pid(i).is_none() {
            three.processes.start(i).unwrap();
        }
        three.ready().await;
        three.until("it is a voter with a disk that is well", async |three| voters(three, other).await == 3).await;
        three.assert_all_there(point).await;
        println!("{point}: {scenario:?}, killed, back with everything");
    }
    three.processes.stop_all().await.unwrap();
}

/// How many members vote and are well, as one node sees them.
async fn voters(three: &Three, at: usize) -> usize {
    let cluster: Result<Value, _> = three.client(at).get_json("/v1/admin/cluster", HANG).await;
    let members = cluster.ok().and_then(|cluster| cluster["members"].as_array().cloned()).unwrap_or_default();
    let is_well = |m: &&Value| m["voter"] == true && m["disk"]["state"] == "ok" && m["role"] != "unreachable";
    if members.len() == 3 { members.iter().filter(is_well).count() } else { 0 }
}
