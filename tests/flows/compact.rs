//! A compaction on command, and what nodes say of their trees.

use serde_json::{Value, json};

use super::cli::stemedb;
use super::support::Cluster;

/// A memtable of these nodes takes few of them.
const LARGE_BYTES: usize = 400_000;
/// Enough flushed files that there is something to merge.
const FILES_MIN: u64 = 4;

async fn stats(cluster: &Cluster, i: usize) -> Value {
    cluster.get(i, "/v1/admin/storage/stats").await.json().unwrap()
}

/// Large assertions until a node has flushed several files; how many.
async fn fill(cluster: &Cluster, i: usize) -> usize {
    let written = std::cell::Cell::new(0);
    cluster
        .until("several files", async |c| {
            let body = json!({
                "concept_path": "test/flows", "predicate": format!("large-{}", written.get()),
                "value": "x".repeat(LARGE_BYTES)
            });
            let answer = c.post(i, "/v1/assert", body).await;
            assert!(answer.is_success(), "{}", answer.describe());
            written.set(written.get() + 1);
            (stats(c, i).await["sst_file_count"].as_u64().unwrap() >= FILES_MIN).then_some(())
        })
        .await;
    written.get()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compaction_on_command_merges_the_files_of_one_node_and_the_statistics_show_it() {
    // Otherwise nothing might be left to do.
    let cluster = Cluster::with(3, |config| {
        (config.storage.enable_auto_compaction, config.storage.memtable_mb) = (false, 1);
    })
    .await;
    let (node, other) = (0, 1);
    let written = fill(&cluster, node).await;
    let before = stats(&cluster, node).await;

    // Asked of another node.
    let path = format!("/v1/admin/compact?wait=true&node={}", cluster.name(node));
    let job = cluster.order(other, &path, json!({"aggressive": true})).await;
    assert_eq!((&job["kind"], &job["node"]), (&json!("compact"), &json!(cluster.name(node))), "{job}");
    assert_eq!(job["state"], "finished", "{job}");
    let words = format!("in {} files before", before["sst_file_count"]);
    assert!(job["detail"].as_str().unwrap().contains(&words), "{job}");
    let after = stats(&cluster, node).await;
    let number = |stats: &Value, key: &str| stats[key].as_u64().unwrap_or_else(|| panic!("{key}: {stats}"));
    assert!(number(&after, "sst_file_count") < number(&before, "sst_file_count"), "{before} {after}");
    assert!(number(&after, "compaction_count") > number(&before, "compaction_count"), "{before} {after}");
    assert!(number(&after, "total_bytes") <= number(&before, "total_bytes"), "{before} {after}");
    assert_eq!(number(&after, "pending_compaction_bytes"), 0, "{after}");
    assert!(stats(&cluster, other).await["compaction_count"] == 0, "the other nodes are left alone");
    for n in 0..written {
        let query = format!("/v1/query?concept_path=test/flows&predicate=large-{n}&consistency=stale");
        let page: Value = cluster.get(node, &query).await.json().unwrap();
        assert_eq!(page["assertions"][0]["value"].as_str().map(str::len), Some(LARGE_BYTES), "{n}");
    }

    // Under the other runbooks' name, without waiting: an address that any node can be asked for.
    let answer = cluster.post(node, "/v1/admin/storage/compact", json!({"force": false})).await;
    let location = answer.header("location").map(str::to_owned);
    let id = answer.json::<Value>().unwrap()["id"].as_str().unwrap().to_owned();
    let location = location.unwrap_or_else(|| format!("/v1/admin/jobs/{id}?node={}", cluster.name(node)));
    let ended = cluster
        .until("the end of the job", async |c| {
            let job: Value = c.get(other, &location).await.json().unwrap();
            (job["state"] == "finished").then_some(job)
        })
        .await;
    assert!(ended["detail"].as_str().unwrap().contains("there was nothing to do"), "{ended}");
    let (kind, detail) = cluster.cancelled(node, &id).await;
    assert!(kind == "flow-refused" && detail.contains("ended already"), "{kind}: {detail}");

    for (path, body, wanted) in [
        ("/v1/admin/compact", json!({"aggressive": "very"}), "invalid-field"),
        ("/v1/admin/compact", json!({"everything": true}), "unknown-field"),
        ("/v1/admin/compact?wait=perhaps", json!({}), "invalid-query"),
        ("/v1/admin/compact?node=node-9", json!({}), "not-found"),
    ] {
        assert_eq!(cluster.refused(node, path, body).await.0, wanted, "{path}");
    }

    let (code, out, err) = stemedb(&cluster, &["compact", cluster.name(other), "--whole", "--wait"]).await;
    assert!(code == 0 && out.contains(&format!("compact of {}", cluster.name(other))), "{code}: {out}{err}");
    let (code, out, _) = stemedb(&cluster, &["stats"]).await;
    assert!(code == 0 && cluster.peers.iter().all(|peer| out.contains(&peer.http)), "{code}: {out}");
    let (code, out, _) = stemedb(&cluster, &["stats", "--json"]).await;
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert!(code == 0 && shown[&cluster.peers[node].http]["sst_file_count"].as_u64().is_some(), "{shown}");
    assert_eq!(stemedb(&cluster, &["compact", "node-9"]).await.0, 4);
    cluster.stop_all().await;
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let args = ["stats", "--endpoints", &closed];
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_stemedb")).args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}
