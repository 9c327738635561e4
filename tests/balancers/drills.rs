//! `stemedb drill` on a cluster that is there already, behind a balancer that is there already; and of a cut network.

use std::{path::Path, process::Stdio};

use serde_json::{Value, json};
use stemedb::cli::balancer::Kind;
use tokio::process::Command;

use super::support::{Behind, HANG};

/// Runs a drill of a throw-away cluster or another one; its report, and what it said.
async fn drill(args: &[&str], html: &Path) -> (Value, String) {
    let running = Command::new(env!("CARGO_BIN_EXE_stemedb"))
        .args(["drill", "--json", "--clients", "8"])
        .args(args)
        .arg("--html")
        .arg(html)
        // For throw-away clusters. Elections by overload are not what is tested here.
        .envs([("STEMEDB_CLUSTER_HEARTBEAT_MS", "100"), ("STEMEDB_CLUSTER_REQUEST_DEADLINE_MS", "11000")])
        .envs([("STEMEDB_CLUSTER_ELECTION_MIN_MS", "600"), ("STEMEDB_CLUSTER_ELECTION_MAX_MS", "1200")])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(2 * HANG, running).await.expect("the drill to end").unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{said}"));
    (report, said)
}

fn assert_clean(report: &Value, said: &str) {
    assert_eq!(report["verdict"]["counts"], json!({}), "{report}\n{said}");
    assert_eq!((&report["survivor_errors"], &report["duplicates"]), (&json!(0), &json!(0)), "{report}\n{said}");
    assert_eq!(report["verdict"]["nodes"], 3, "{report}");
    assert!(report["verdict"]["acknowledged"].as_u64().unwrap() > 50, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_in_use_is_drilled_through_its_balancer() {
    let Some(behind) = Behind::start(Kind::Nginx).await else { return };
    let endpoints: Vec<String> = behind.endpoints().iter().map(|at| at.authority().to_owned()).collect();
    let (endpoints, through) = (endpoints.join(","), behind.balancer.endpoint().authority().to_owned());
    let html = behind.dir().join("report.html");
    let kinds: &[(&str, usize)] =
        if super::support::is_full() { &[("failover", 2), ("drain", 3)] } else { &[("failover", 2)] };
    println!("drills of a cluster in use: {kinds:?} (drain too with STEMEDB_TEST_FULL=1)");
    for (kind, rows) in kinds.iter().copied() {
        let rounds = if kind == "drain" { "1" } else { "2" };
        let args = ["--kind", kind, "--rounds", rounds, "--endpoints", &endpoints, "--through", &through];
        let (report, said) = drill(&args, &html).await;
        assert_clean(&report, &said);
        assert_eq!((&report["passed"], &report["behind"]), (&json!(true), &json!(through)), "{said}");
        let rounds = report["rounds"].as_array().unwrap();
        assert_eq!(rounds.len(), rows);
        assert!(rounds.iter().any(|round| round["new_leader"] != rounds[0]["new_leader"]), "{report}");
        // Two pictures a round, and one of the whole.
        let page = std::fs::read_to_string(&html).unwrap();
        assert_eq!(page.matches("<svg ").count(), 2 * rows + 1);
        assert!(page.contains(&format!("{kind}: <span class=\"good\">passed</span>")), "{page}");
        assert!(!page.contains("http://") && !page.contains("https://"), "the page needs nothing from elsewhere");
    }
    // A node that was drained meanwhile makes the cluster none to be drilled.
    behind.order("drain", 1).await;
    let refused = Command::new(env!("CARGO_BIN_EXE_stemedb"))
        .args(["drill", "--kind", "failover", "--endpoints", &endpoints])
        .output();
    let refused = tokio::time::timeout(HANG, refused).await.expect("an answer").unwrap();
    assert_eq!(refused.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("node-2"), "{refused:?}");
    behind.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_answers_nobody_and_loses_nothing() {
    let _alone = super::support::alone().await;
    let dir = tempfile::tempdir().unwrap();
    let html = dir.path().join("report.html");
    // Behind Envoy it must cost nobody a request that the old leader still takes some for one.
    let behind: &[&str] = if super::support::is_full() { &["none", "nginx", "envoy"] } else { &["envoy"] };
    println!("a leader is cut off behind {behind:?} (all of none, nginx, envoy with STEMEDB_TEST_FULL=1)");
    for behind in behind.iter().copied() {
        let program = match behind {
            "envoy" => super::support::program(Kind::Envoy),
            "nginx" => super::support::program(Kind::Nginx),
            _ => None,
        };
        let program = program.map(|path| path.to_str().unwrap().to_owned());
        let mut args = vec!["--kind", "partition", "--rounds", "1"];
        match &program {
            Some(program) => args.extend(["--behind", behind, "--balancer", program]),
            None => println!("behind nothing"),
        }
        let (report, said) = drill(&args, &html).await;
        assert_clean(&report, &said);
        let round = &report["rounds"][0];
        assert_eq!((&round["answered_cut_off"], &round["terms_after"]), (&json!(0), &json!(0)), "{round}");
        assert_eq!(report["passed"], true, "{report}\n{said}");
        assert_ne!(round["cut"], round["new_leader"], "{round}");
        assert!(std::fs::read_to_string(&html).unwrap().contains("cut off"));
    }
}
