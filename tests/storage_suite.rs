//! openraft's own storage suite over the log and the real state machine together, as a node runs
//! them: on files, and with the log on the simulated disk. (The tree is always in files.)

#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use stemedb::node::{
    applier::{NodeApplier, restorer},
    vital::Vital,
};
use stemedb::state::apply::KeyLimits;
use stemedb::state::engine::lsm::LsmOptions;
use stemedb::state::machine::{MachineOptions, StateMachine};
use stemedb_raft::disk::{Disk, RealDisk, sim::SimDisk};
use stemedb_raft::{TypeConfig, WalOptions, WalStore};
use tempfile::TempDir;

type Machine = StateMachine<NodeApplier>;

/// Small segments, so that the log rolls.
fn wal(disk: Arc<dyn Disk>, dir: &Path) -> WalStore {
    let options = WalOptions { segment_bytes: 64 * 1024, tail_cache_bytes: 0, ..WalOptions::new(dir) };
    WalStore::open(disk, options).unwrap().0
}

/// Without the gate that waits for the log: the suite applies entries that it never appends.
fn machine(dir: &Path) -> Machine {
    let options = MachineOptions { data_dir: dir.to_owned(), lsm: LsmOptions::default() };
    StateMachine::open(options, restorer(KeyLimits::default(), Vital::default()).0).unwrap()
}

struct OnSim;
struct OnReal;

impl StoreBuilder<TypeConfig, WalStore, Machine, TempDir> for OnSim {
    async fn build(&self) -> Result<(TempDir, WalStore, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let log = wal(SimDisk::new().shared(), Path::new("/wal"));
        let machine = machine(dir.path());
        Ok((dir, log, machine))
    }
}

impl StoreBuilder<TypeConfig, WalStore, Machine, TempDir> for OnReal {
    async fn build(&self) -> Result<(TempDir, WalStore, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let log = wal(RealDisk::new(), &dir.path().join("wal"));
        let machine = machine(dir.path());
        Ok((dir, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passes_with_the_log_on_the_simulated_disk() {
    Suite::test_all(OnSim).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn passes_on_the_real_disk() {
    Suite::test_all(OnReal).await.unwrap();
}
