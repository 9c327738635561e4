//! The commands as programs, against a running cluster: what they print, and their exit codes.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::support::Cluster;

fn program(cluster: &Cluster, args: &[&str]) -> Command {
    let endpoints: Vec<&str> = cluster.peers.iter().map(|peer| peer.http.as_str()).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_stemedb"));
    command.args(args).stdin(Stdio::null()).env("STEMEDB_ENDPOINTS", endpoints.join(","));
    command
}

/// Runs the program on a thread of its own. Exit code, standard output, standard error.
pub async fn stemedb(cluster: &Cluster, args: &[&str]) -> (i32, String, String) {
    let mut command = program(cluster, args);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

async fn json(cluster: &Cluster, args: &[&str]) -> Value {
    let (code, out, err) = stemedb(cluster, args).await;
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?}: {e}: {out}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_drains_moves_leadership_and_looks_at_it_with_the_commands() {
    let cluster = Cluster::new(3).await;
    let leader = cluster.leader().await;
    let (target, third) = ((leader + 1) % 3, (leader + 2) % 3);
    let job = json(&cluster, &["failover", "--to", cluster.name(target), "--json"]).await;
    assert_eq!((&job["from"], &job["to"]), (&cluster.name(leader).into(), &cluster.name(target).into()), "{job}");
    assert_eq!(cluster.leader().await, target);
    let (code, out, _) = stemedb(&cluster, &["failover", "--dry-run"]).await;
    assert!(code == 0 && out.contains(&format!("Leadership would go from {}", cluster.name(target))), "{out}");
    // One that would be refused shows the candidates too, and says so with its exit code.
    let (code, out, err) = stemedb(&cluster, &["failover", "--to", cluster.name(target), "--dry-run"]).await;
    assert!(code == 1 && out.contains("leader already") && out.contains(cluster.name(third)), "{code} {out}{err}");
    let (code, out, err) = stemedb(&cluster, &["failover", "--to", "node-9", "--dry-run"]).await;
    assert!(code == 4 && err.contains("no member"), "{code} {out}{err}");
    let (code, _, err) = stemedb(&cluster, &["failover", "--to", cluster.name(target)]).await;
    assert!(code == 4 && err.contains("leader already"), "{code} {err}");

    let (code, out, err) = stemedb(&cluster, &["drain", cluster.name(third)]).await;
    assert!(code == 0 && out.contains("out of traffic"), "{out}{err}");
    let (code, out, err) = stemedb(&cluster, &["failover", "--to", cluster.name(third), "--dry-run", "--json"]).await;
    let plan: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    assert_eq!((code, &plan["allowed"], plan["candidates"].as_array().unwrap().len()), (1, &false.into(), 2), "{plan}");
    let unfit = plan["candidates"].as_array().unwrap().iter().find(|c| c["name"] == cluster.name(third)).unwrap();
    assert!(unfit["fit"] == false && unfit["why_not"].is_string(), "{plan}");
    let (code, _, err) = stemedb(&cluster, &["drain", cluster.name(leader), "--dry-run"]).await;
    assert!(code == 1, "held by another: {err}");
    let (code, _, err) = stemedb(&cluster, &["drain", cluster.name(leader)]).await;
    assert!(code == 4 && err.contains(cluster.name(third)), "{err}");
    assert_eq!(stemedb(&cluster, &["drain"]).await.0, 2, "which of the three?");

    let status = json(&cluster, &["status", "--json"]).await;
    let drained = status["nodes"].as_array().unwrap().iter().find(|node| node["name"] == cluster.name(third)).unwrap();
    assert_eq!((&drained["health"]["status"], &drained["health"]["drain"]), (&"drained".into(), &"drained".into()));
    let (code, out, _) = stemedb(&cluster, &["status"]).await;
    assert_eq!(code, 0, "a drain is wanted: {out}");
    for column in ["NODE", "ROLE", "ID", "TERM", "APPLIED", "LAG", "LAG BYTES", "FSYNC P99", "DISK", "DRAIN", "VERSION"]
    {
        assert!(out.contains(column), "{column}: {out}");
    }
    // Again and again, until it is ended.
    let mut watch = program(&cluster, &["status", "--watch", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    let shown = BufReader::new(watch.stdout.take().unwrap());
    let leaders = shown.lines().map(Result::unwrap).filter(|line| line.starts_with("leader: ")).take(2);
    let twice = tokio::task::spawn_blocking(move || leaders.count());
    assert_eq!(tokio::time::timeout(super::support::HANG, twice).await.unwrap().unwrap(), 2);
    watch.kill().unwrap();
    watch.wait().unwrap();
    assert_eq!(json(&cluster, &["undrain", cluster.name(third), "--json"]).await["state"], "finished");
    cluster.all_ready().await;

    let jobs = json(&cluster, &["job", "list", "--json"]).await;
    let kinds: Vec<&str> = jobs["jobs"].as_array().unwrap().iter().map(|job| job["kind"].as_str().unwrap()).collect();
    assert!(["failover", "drain", "undrain"].iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
    let (code, out, _) = stemedb(&cluster, &["job", "show", job["id"].as_str().unwrap()]).await;
    assert!(code == 0 && out.contains("asking a candidate"), "{out}");
    assert_eq!(stemedb(&cluster, &["job", "cancel", job["id"].as_str().unwrap()]).await.0, 4, "it has ended");
    assert_eq!(stemedb(&cluster, &["job", "show", "none"]).await.0, 4);
    cluster.stop_all().await;
}

#[test]
fn completions_are_printed_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(env!("CARGO_BIN_EXE_stemedb")).args(["completions", shell]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("failover") && text.contains("undrain"), "{shell}");
    }
}
