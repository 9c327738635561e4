//! The commands as programs, against a running cluster: what they print, and their exit codes.

use std::process::{Command, Stdio};

use stemedb::{
    config::MemberRole,
    node::rebuild::fail_point::{arm, is_armed},
};

use super::support::Cluster;

/// Runs the program on a thread of its own. Exit code, standard output, standard error.
pub async fn stemedb(cluster: &Cluster, args: &[&str]) -> (i32, String, String) {
    let endpoints: Vec<&str> = (0..3).map(|i| cluster.peer(i).http.as_str()).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_stemedb"));
    command.args(args).stdin(Stdio::null()).env("STEMEDB_ENDPOINTS", endpoints.join(","));
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_adds_shows_and_removes_a_node_with_the_commands() {
    let mut cluster = Cluster::new(3).await;
    let spare = cluster.spare("node-4", MemberRole::Voter).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "waiting").then_some(())).await;
    let addr = cluster.peer(spare).addr.clone();
    let (code, out, err) = stemedb(&cluster, &["member", "add", "node-4", "--addr", &addr, "--dry-run"]).await;
    assert!(code == 0 && out.contains("afterwards 3 of 4 must work and 1 more may fail"), "{code}: {out}{err}");

    // On its way in, as every list shows it; and taken back.
    let folder = cluster.folder(spare);
    arm(&folder, "rebuild.pulled");
    let args = ["member", "add", "node-4", "--addr", &addr, "--no-wait", "--json"];
    let (code, out, err) = stemedb(&cluster, &args).await;
    let job: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{code} {e}: {out}{err}"));
    cluster.until("the node to fetch", async |_| (!is_armed(&folder)).then_some(())).await;
    for list in [["status"].as_slice(), &["member", "list"]] {
        cluster
            .until("the bytes of the checkpoint", async |c| {
                let (code, out, err) = stemedb(c, list).await;
                assert!(code == 0 && out.contains("member-add of node-4: waiting for the node"), "{code}: {out}{err}");
                out.contains(" bytes").then_some(())
            })
            .await;
    }
    let (code, out, err) = stemedb(&cluster, &["status", "--json"]).await;
    let status: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{code} {e}: {out}{err}"));
    assert_eq!((&status["change"]["id"], &status["healthy"]), (&job["id"], &true.into()), "{status}");
    let (code, out, err) = stemedb(&cluster, &["job", "cancel", job["id"].as_str().unwrap()]).await;
    assert!(code == 0 && out.contains("cancelled"), "{code}: {out}{err}");
    cluster.stop(spare).await;
    cluster.restart(spare).await;
    cluster.until("it to wait", async |c| (c.node(spare).health().status == "joining").then_some(())).await;

    let (code, out, err) = stemedb(&cluster, &["member", "add", "node-4", "--addr", &addr]).await;
    assert!(code == 0 && out.contains("node-4 votes; of 4 voters 3 must work"), "{code}: {out}{err}");
    cluster.voters(&[0, 1, 2, spare]).await;
    let (code, _, err) = stemedb(&cluster, &["member", "add", "node-4", "--addr", &addr]).await;
    assert!(code == 4 && err.contains("is a member already"), "{code}: {err}");
    let (code, out, _) = stemedb(&cluster, &["member", "list"]).await;
    assert!(code == 0 && out.contains(&addr) && out.contains("of 4 voters 3 must work"), "{code}: {out}");
    let (code, out, err) = stemedb(&cluster, &["member", "remove", "node-4", "--json"]).await;
    let job: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{code} {e}: {out}{err}"));
    assert_eq!((code, &job["state"], &job["cluster"]), (0, &"finished".into(), &true.into()), "{job}");
    let (code, out, _) = stemedb(&cluster, &["job", "show", job["id"].as_str().unwrap()]).await;
    assert!(code == 0 && out.contains("member-remove") && out.contains("has left"), "{code}: {out}");
    let (code, out, err) = stemedb(&cluster, &["member", "remove", "node-1", "--dry-run"]).await;
    assert!(code == 1 && out.contains("no further failure could be tolerated"), "{code}: {out}{err}");
    assert_eq!(stemedb(&cluster, &["member", "remove", "node-9"]).await.0, 4);
    assert_eq!(stemedb(&cluster, &["member", "add", "node-9"]).await.0, 2, "without an address");
    cluster.stop_all().await;
}
