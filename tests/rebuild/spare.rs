//! A node whose data folder is gone for good goes on in its spare folder.

use stemedb_raft::disk::sim::SyncFault;

use crate::support::{Cluster, HANG, assert_all_there, write};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_whose_data_folder_is_gone_makes_itself_anew_in_its_spare_folder() {
    let mut cluster = Cluster::new(|config| {
        config.rebuild.spare_dir = Some(config.node.data_dir.with_extension("spare"));
    })
    .await;
    let node = cluster.leader().await;
    for n in 0..20 {
        write(cluster.node(node), n).await;
    }
    let old_id = cluster.id_of(node).await;
    // What a disk that is gone leaves of a folder: files that are open, and nothing to be made there.
    std::fs::rename(cluster.folder(node), cluster.dir.path().join("gone")).unwrap();
    cluster.disks[node].fail_next_sync("segment.", SyncFault::PagesMarkedClean);
    write(cluster.node((node + 1) % 3), 20).await;
    tokio::time::timeout(HANG, cluster.node(node).wait_moved()).await.expect("the node to move");
    cluster.stop(node).await;
    cluster.restart(node).await;
    let fresh_id = cluster.id_of(node).await;
    assert!(fresh_id > old_id, "it is another voter");
    assert_all_there(&cluster, &(0..=20).collect::<Vec<_>>()).await;

    // Its data folder may come back with all that it held: nobody looks.
    std::fs::rename(cluster.dir.path().join("gone"), cluster.folder(node)).unwrap();
    cluster.stop(node).await;
    cluster.restart(node).await;
    assert_eq!(cluster.id_of(node).await, fresh_id);
    assert_eq!(cluster.node(node).config().node.data_dir, cluster.folder(node).with_extension("spare"));
    assert_all_there(&cluster, &(0..=20).collect::<Vec<_>>()).await;
    cluster.stop_all().await;
}
