//! Trees that are damaged while log and vote are sound: the node replaces its tree by a checkpoint of another node,
//! under its id, and goes on with its log.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use stemedb::{
    config::Config,
    node::{Consistency, rebuild::fail_point},
    state::engine::quarantine::{self, Quarantined},
};
use uuid::Uuid;

use crate::support::{Cluster, Load, assert_all_there, write, write_large};

/// Large writes that make tables and a checkpoint on every node.
const LARGE: std::ops::Range<u128> = 900_000..900_006;

/// Tables come soon, and what was read is not all kept in memory.
fn small(config: &mut Config) {
    (config.storage.memtable_mb, config.storage.cache_mb) = (1, 1);
}

/// A cluster whose nodes have tables on their disks and have purged the beginning of their logs.
async fn with_tables() -> (Cluster, Vec<u128>) {
    let cluster = Cluster::new(small).await;
    let leader = cluster.leader().await;
    let mut acknowledged: Vec<u128> = (0..20).collect();
    for n in 0..20 {
        write(cluster.node(leader), n).await;
    }
    for n in LARGE {
        write_large(cluster.node(leader), n).await;
        acknowledged.push(n);
    }
    cluster
        .until("tables on every node", async |c| {
            (0..3).all(|i| !tables(&c.folder(i)).is_empty() && checkpoints(&c.folder(i)).len() == 1).then_some(())
        })
        .await;
    (cluster, acknowledged)
}

fn names(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

fn trees(data_dir: &Path) -> Vec<PathBuf> {
    names(&data_dir.join("kv")).into_iter().filter(|path| path.join("tables").exists()).collect()
}

fn tables(data_dir: &Path) -> Vec<PathBuf> {
    trees(data_dir).iter().flat_map(|tree| names(&tree.join("tables"))).collect()
}

fn checkpoints(data_dir: &Path) -> Vec<PathBuf> {
    names(&data_dir.join("checkpoint")).into_iter().filter(|dir| dir.join("checkpoint.manifest").exists()).collect()
}

/// Every table of the tree and of the checkpoints.
pub fn all_tables(data_dir: &Path) -> Vec<PathBuf> {
    let mut found = tables(data_dir);
    found.extend(checkpoints(data_dir).iter().flat_map(|checkpoint| names(&checkpoint.join("tables"))));
    found
}

/// Flips bits all over the beginning of a file, where the blocks of data are.
fn damage(path: &Path) {
    // A table may go while its tree is compacted, and is empty at first.
    let Some(mut bytes) = fs::read(path).ok().filter(|bytes| !bytes.is_empty()) else { return };
    let end = (bytes.len() / 2).max(1);
    for byte in bytes[..end].iter_mut().step_by(64) {
        *byte ^= 0x10;
    }
    // In place: a checkpoint has the same file under another name, and a running node has it open.
    let Ok(file) = fs::OpenOptions::new().write(true).open(path) else { return };
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
}

fn put_away(data_dir: &Path, what: &str) -> Vec<Quarantined> {
    quarantine::list(data_dir, None).unwrap().into_iter().filter(|found| found.what == what).collect()
}

/// Reads everything that a node has, whatever comes of it.
async fn read_all(cluster: &Cluster, i: usize, acknowledged: &[u128]) {
    let Ok(view) = cluster.node(i).read(Consistency::Stale { max_staleness_ms: None }).await else { return };
    for n in acknowledged {
        let _damaged_or_not = view.assertion(Uuid::from_u128(*n));
    }
}

async fn replaced(cluster: &Cluster, i: usize, old_id: u64) {
    cluster.until("a tree in quarantine", async |c| (!put_away(&c.folder(i), "kv").is_empty()).then_some(())).await;
    assert_eq!(cluster.id_of(i).await, old_id, "log, vote and id stay");
    let folder = cluster.folder(i);
    assert!(put_away(&folder, "node").is_empty(), "only the tree was replaced");
    assert!(!folder.join("rebuild/tree").exists() && !folder.join("rebuild/files").exists(), "nothing is left over");
    assert!(!folder.join("rebuild/checkpoint").exists() && !folder.join("kv.new").exists(), "nothing is left over");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_damaged_block_that_a_read_meets_has_the_tree_replaced_on_a_follower_and_on_the_leader() {
    let (mut cluster, mut acknowledged) = with_tables().await;
    for leads in [false, true] {
        let leader = cluster.leader().await;
        let node = if leads { leader } else { (leader + 1) % 3 };
        let old_id = cluster.id_of(node).await;
        let nodes: Vec<_> = cluster.running().map(|(_, node)| Arc::clone(node)).collect();
        let load = Load::start(&nodes, if leads { 100_000_000 } else { 200_000_000 });
        tables(&cluster.folder(node)).iter().for_each(|table| damage(table));
        read_all(&cluster, node, &acknowledged).await;
        replaced(&cluster, node, old_id).await;
        acknowledged.extend(load.finish().await);
        drop(nodes);
        assert_all_there(&cluster, &acknowledged).await;
        assert!(cluster.node(node).health().repairing.is_none());
    }
    // And they start again from what they have.
    for node in 0..3 {
        cluster.stop(node).await;
        cluster.restart(node).await;
    }
    assert_all_there(&cluster, &acknowledged).await;
    cluster.stop_all().await;
}

/// What is done to the files of a node that is down.
type Harm = (&'static str, fn(&Path));

const HARMS: &[Harm] = &[
    ("a table is missing", |dir| fs::remove_file(tables(dir).pop().unwrap()).unwrap()),
    ("a table is cut short", |dir| {
        let table = tables(dir).pop().unwrap();
        let half = fs::metadata(&table).unwrap().len() / 2;
        fs::OpenOptions::new().write(true).open(table).unwrap().set_len(half).unwrap();
    }),
    ("a table is empty", |dir| fs::write(tables(dir).pop().unwrap(), "").unwrap()),
    ("every table is damaged to its end", |dir| {
        for table in tables(dir) {
            let length = fs::metadata(&table).unwrap().len() as usize;
            fs::write(table, vec![0x5a; length]).unwrap();
        }
    }),
    ("the manifest is missing", |dir| {
        let tree = trees(dir).pop().unwrap();
        for path in names(&tree) {
            if path.file_name().unwrap().to_string_lossy().starts_with('v') {
                fs::remove_file(path).unwrap();
            }
        }
    }),
    ("`current` is damaged", |dir| damage(&trees(dir).pop().unwrap().join("current"))),
    ("`active` is damaged", |dir| damage(&dir.join("kv/active"))),
    ("the tree is missing", |dir| fs::remove_dir_all(dir.join("kv")).unwrap()),
    ("the checkpoint alone is damaged", |dir| {
        checkpoints(dir).iter().for_each(|checkpoint| damage(&checkpoint.join("checkpoint.manifest")));
    }),
    ("tree and checkpoint are missing", |dir| {
        fs::remove_dir_all(dir.join("kv")).unwrap();
        fs::remove_dir_all(dir.join("checkpoint")).unwrap();
    }),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_tree_that_does_not_open_is_replaced_before_the_node_takes_part_again() {
    let (mut cluster, mut acknowledged) = with_tables().await;
    for (n, (what, harm)) in HARMS.iter().enumerate() {
        let node = n % 3;
        eprintln!("{what} on node {node}");
        let old_id = cluster.id_of(node).await;
        let folder = cluster.folder(node);
        cluster.stop(node).await;
        // More than a few a day would be taken for a worse disk.
        let _none_yet = fs::remove_dir_all(folder.join("quarantine"));
        harm(&folder);
        let more = 1_000 + n as u128;
        write(cluster.node((node + 1) % 3), more).await;
        acknowledged.push(more);
        cluster.restart(node).await;
        assert_eq!(cluster.id_of(node).await, old_id, "{what}");
        assert!(put_away(&folder, "node").is_empty(), "{what}: only the tree was replaced");
        assert_all_there(&cluster, &acknowledged).await;
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_nodes_with_damaged_trees_are_both_mended_from_the_third() {
    let (mut cluster, acknowledged) = with_tables().await;
    let sound = cluster.leader().await;
    let damaged = [(sound + 1) % 3, (sound + 2) % 3];
    let mut ids = Vec::new();
    for node in damaged {
        ids.push(cluster.id_of(node).await);
    }
    for node in damaged {
        tables(&cluster.folder(node)).iter().for_each(|table| damage(table));
    }
    for node in damaged {
        read_all(&cluster, node, &acknowledged).await;
    }
    for (node, id) in damaged.into_iter().zip(ids) {
        replaced(&cluster, node, id).await;
    }
    assert_all_there(&cluster, &acknowledged).await;
    cluster.stop_all().await;
}

/// A process that dies at any step finds the damage again, or has left it behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replacement_that_is_killed_at_any_point_comes_to_its_end() {
    let (mut cluster, mut acknowledged) = with_tables().await;
    let only = std::env::var("STEMEDB_TEST_POINT").ok();
    for (n, point) in fail_point::TREE_POINTS.iter().enumerate() {
        if only.as_ref().is_some_and(|only| only != point) {
            continue;
        }
        let node = n % 3;
        eprintln!("{point} on node {node}");
        let old_id = cluster.id_of(node).await;
        let folder = cluster.folder(node);
        let _none_yet = fs::remove_dir_all(folder.join("quarantine"));
        fail_point::arm(&folder, point);
        tables(&folder).iter().for_each(|table| damage(table));
        read_all(&cluster, node, &acknowledged).await;
        cluster.until("the fail point", async |_| (!fail_point::is_armed(&folder)).then_some(())).await;
        cluster.stop(node).await;
        let more = 2_000 + n as u128;
        write(cluster.node((node + 1) % 3), more).await;
        acknowledged.push(more);
        cluster.restart(node).await;
        // Raft itself takes a checkpoint that was put on the shelf already; then the old tree goes at once.
        cluster
            .until("a sound tree and nothing left over", async |c| {
                let mut left = ["rebuild/tree", "rebuild/files", "rebuild/checkpoint", "kv.new"].iter();
                let mended = !left.any(|name| folder.join(name).exists()) && c.node(node).is_ready().is_ok();
                (mended && c.node(node).health().repairing.is_none()).then_some(())
            })
            .await;
        assert_eq!(cluster.id_of(node).await, old_id, "{point}: log, vote and id stay");
        assert!(put_away(&folder, "node").is_empty(), "{point}");
        assert_all_there(&cluster, &acknowledged).await;
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_a_word_of_an_operator_or_another_node_a_damaged_tree_is_refused_with_the_command() {
    let (mut cluster, acknowledged) = with_tables().await;
    let folder = cluster.folder(0);
    cluster.stop(0).await;
    fs::remove_file(tables(&folder).pop().unwrap()).unwrap();
    cluster.tune = |config| {
        small(config);
        config.cluster.auto_rebuild = false;
    };
    let refused = cluster.try_restart(0).await.err().unwrap().to_string();
    assert!(refused.contains("tables/") && refused.contains("--rebuild-from-wal"), "{refused}");
    assert!(!folder.join("quarantine").exists());
    // With its word it goes on.
    cluster.tune = small;
    cluster.restart(0).await;
    cluster.three_voters().await;
    assert_all_there(&cluster, &acknowledged).await;
    cluster.stop_all().await;
}
