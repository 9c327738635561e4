//! openraft's own storage suite over this log, on the real and on the simulated disk.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{ListMachine, open_sim, options, real_disk};
use openraft::{
    StorageError,
    testing::log::{StoreBuilder, Suite},
};
use stemedb_raft::{TypeConfig, WalStore, disk::sim::SimDisk};

struct OnSim;
struct OnReal;

impl StoreBuilder<TypeConfig, WalStore, ListMachine, ()> for OnSim {
    async fn build(&self) -> Result<((), WalStore, ListMachine), StorageError<TypeConfig>> {
        Ok(((), open_sim(&SimDisk::new()).unwrap(), ListMachine::default()))
    }
}

impl StoreBuilder<TypeConfig, WalStore, ListMachine, tempfile::TempDir> for OnReal {
    async fn build(&self) -> Result<(tempfile::TempDir, WalStore, ListMachine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = WalStore::open(real_disk(), options(dir.path())).unwrap();
        Ok((dir, store, ListMachine::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passes_on_the_simulated_disk() {
    Suite::test_all(OnSim).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn passes_on_the_real_disk() {
    Suite::test_all(OnReal).await.unwrap();
}
