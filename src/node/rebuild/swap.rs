//! Puts the old files of a node away and the new ones in place.
//!
//! ```text
//!  Swapping   identity, then wal/, kv/ and checkpoint/ ──rename──► quarantine/<unix-ms>-<why>/
//!  Emptied    kv.incoming/ ─► checkpoint/ and kv/     wal/ with the vote of term 0     identity, last
//!  Installed
//! ```
//!
//! In `Swapping` nothing new is made and in `Emptied` nothing old is there any more, so that either may be carried
//! out again after a kill: the first goes on with what is left, the second begins anew. The identity goes first and
//! comes last: a folder with one is whole. Old files are renamed, never deleted.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use openraft::storage::RaftLogStorage;
use stemedb_net::ClusterId;
use stemedb_raft::{WalOptions, WalStore, disk::Disk, types::Vote};

use super::{
    fail_point::{self, Stopped},
    mark::Mark,
    pull::{self, PullError},
};
use crate::{
    node::identity::{IDENTITY_FILE, Identity, IdentityError},
    state::{
        engine::{EngineError, folder, quarantine},
        machine,
    },
};

/// Why a swap did not come to its end. It may be carried out again.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// The disk answered with an error.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The files could not be put together.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// The tree could not be made of them.
    #[error(transparent)]
    Tree(#[from] EngineError),
    /// The new log could not be made.
    #[error("the new log: {0}")]
    Log(String),
    /// The identity could not be written.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A test wants it.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// What a swap works on.
#[derive(Clone)]
pub struct Swap {
    /// The node's folder.
    pub data_dir: PathBuf,
    /// Where its log lies.
    pub disk: Arc<dyn Disk>,
    /// How the new log is opened; names its folder.
    pub wal: WalOptions,
    /// When the rebuild was begun: names the folder in the quarantine.
    pub began_unix_ms: u64,
    /// The word behind it.
    pub what: &'static str,
    /// Whether other nodes, which may share this machine or its disks, have clients to serve.
    pub gently: bool,
}

fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SwapError {
    let path = path.to_owned();
    move |source| SwapError::Io { operation, path, source }
}

impl Swap {
    fn hit(&self, point: &'static str) -> Result<(), Stopped> {
        fail_point::hit(&self.data_dir, point)
    }

    /// Blocking. Renames what belongs to the old id into the quarantine.
    pub fn put_away(&self) -> Result<(), SwapError> {
        let to = quarantine::folder_of(&self.data_dir, self.began_unix_ms, self.what);
        folder::create_synced(&to).map_err(at("create", &to))?;
        self.rename(&self.data_dir.join(IDENTITY_FILE), &to.join(IDENTITY_FILE))?;
        folder::sync(&self.data_dir).map_err(at("sync", &self.data_dir))?;
        self.hit("rebuild.swap.identity_away")?;
        self.put_log_away(&to.join("wal"))?;
        self.hit("rebuild.swap.log_away")?;
        // `kv.new`: a tree that was to take the place of a damaged one.
        for name in ["kv", "checkpoint", "kv.new"] {
            self.rename(&self.data_dir.join(name), &to.join(name))?;
        }
        folder::sync(&to).map_err(at("sync", &to))?;
        folder::sync(&self.data_dir).map_err(at("sync", &self.data_dir))?;
        self.hit("rebuild.swap.tree_away")?;
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), SwapError> {
        match fs::rename(from, to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("put away", from)(error)),
            _ => Ok(()),
        }
    }

    /// The log may lie on another disk than the rest, and file by file is all that the disk can do.
    fn put_log_away(&self, to: &Path) -> Result<(), SwapError> {
        let from = &self.wal.dir;
        self.disk.create_dir_all(from).map_err(at("read", from))?;
        self.disk.create_dir_all(to).map_err(at("create", to))?;
        for found in self.disk.list(from).map_err(at("read", from))? {
            let path = from.join(&found.name);
            self.disk.rename(&path, &to.join(&found.name)).map_err(at("put away", &path))?;
        }
        self.disk.sync_dir(to).map_err(at("sync", to))?;
        self.disk.sync_dir(from).map_err(at("sync", from))
    }

    /// Blocking. Makes the new tree and checkpoint from the fetched files.
    pub fn put_tree_in_place(&self, manifest: &[u8]) -> Result<(), SwapError> {
        Mark::remove(&self.data_dir).map_err(at("remove the mark of the tree in", &self.data_dir))?;
        for name in ["kv", "checkpoint", "kv.new", "kv.incoming"] {
            let path = self.data_dir.join(name);
            folder::remove(&path).map_err(at("remove", &path))?;
        }
        pull::assemble(&self.data_dir, manifest, &self.data_dir.join("kv.incoming"))?;
        machine::install_fresh(&self.data_dir)?;
        self.hit("rebuild.swap.tree_in_place")?;
        Ok(())
    }

    /// Makes the new log with its first vote, and then the identity.
    pub async fn put_log_in_place(&self, cluster_id: ClusterId, name: &str, fresh_id: u64) -> Result<(), SwapError> {
        let swap = self.clone();
        let opened = tokio::task::spawn_blocking(move || swap.new_log()).await;
        let mut log = opened.map_err(|e| SwapError::Log(e.to_string()))??;
        let voted = log.save_vote(&Vote::new(0, fresh_id)).await;
        let handle = log.handle();
        let closed = tokio::task::spawn_blocking(move || handle.close()).await;
        voted.map_err(|e| SwapError::Log(e.to_string()))?;
        closed.map_err(|e| SwapError::Log(e.to_string()))?.map_err(|e| SwapError::Log(e.to_string()))?;
        self.hit("rebuild.swap.log_in_place")?;
        let identity = Identity { cluster_id, name: name.to_owned(), raft_id: fresh_id, boot: 1 };
        let data_dir = self.data_dir.clone();
        let saved = tokio::task::spawn_blocking(move || identity.save(&data_dir)).await;
        saved.map_err(|e| SwapError::Log(e.to_string()))??;
        self.hit("rebuild.swap.identity_in_place")?;
        Ok(())
    }

    /// An empty log. What is there was begun by this rebuild and never ran.
    fn new_log(&self) -> Result<WalStore, SwapError> {
        let dir = &self.wal.dir;
        self.disk.create_dir_all(dir).map_err(at("create", dir))?;
        for found in self.disk.list(dir).map_err(at("read", dir))? {
            let path = dir.join(&found.name);
            self.disk.remove(&path).map_err(at("remove", &path))?;
        }
        self.disk.sync_dir(dir).map_err(at("sync", dir))?;
        let options = WalOptions { makes_room_gently: self.gently, ..self.wal.clone() };
        let (log, _) = WalStore::open(Arc::clone(&self.disk), options).map_err(|e| SwapError::Log(e.to_string()))?;
        Ok(log)
    }
}
