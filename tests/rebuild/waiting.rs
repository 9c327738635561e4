//! A node that has lost its files and must wait before it may come back.

use std::sync::Arc;

use stemedb::{
    node::rebuild::desk::JobState,
    state::command::{CommandKey, KeySource},
};
use stemedb_raft::disk::sim::SimDisk;

use super::support::{Cluster, assert_all_there, assertion, write};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_emptied_node_that_waits_passes_on_what_its_clients_send() {
    // It may not come back by itself at all.
    let mut cluster = Cluster::new(|config| config.rebuild.automatic_per_day = 0).await;
    let leader = cluster.leader().await;
    let emptied = (leader + 1) % 3;
    write(cluster.node(leader), 0).await;
    let old_id = cluster.id_of(emptied).await;
    cluster.stop(emptied).await;
    std::fs::remove_dir_all(cluster.folder(emptied)).unwrap();
    cluster.disks[emptied] = SimDisk::new();
    cluster.restart(emptied).await;
    let waits = async |c: &Cluster| c.node(emptied).jobs().current().filter(|job| job.state == JobState::Waiting);
    let job = cluster.until("it to wait for an operator", waits).await;
    assert!(job.detail.contains("an operator decides"), "{job:?}");
    let node = Arc::clone(cluster.node(emptied));
    for n in 1..=20 {
        // Once, and not as long as it takes.
        let key = Some(CommandKey { source: KeySource::Client, id: n });
        node.submit(assertion(n), key, n).await.unwrap_or_else(|error| panic!("write {n}: {error:?}"));
    }
    assert!(waits(&cluster).await.is_some(), "and it waits as before");
    node.order_rebuild(None).await.unwrap();
    cluster.until("it to come back", async |c| c.node(emptied).is_ready().is_ok().then_some(())).await;
    assert!(cluster.id_of(emptied).await > old_id);
    assert_all_there(&cluster, &(0..=20).collect::<Vec<_>>()).await;
    cluster.stop_all().await;
}
