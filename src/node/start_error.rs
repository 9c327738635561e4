//! Why a node did not start.

use std::{io, path::PathBuf};

use stemedb_raft::OpenError;

use super::{
    files::FileError,
    identity::{IdentityError, LockError},
};
use crate::state::engine::EngineError;

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself in what only the node can see.
    #[error("configuration: {0}")]
    Config(String),
    /// The data folder could not be made or read.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// With which file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The data folder is in use.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The identity is unusable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Another small file is unusable.
    #[error(transparent)]
    File(#[from] FileError),
    /// The log could not be opened.
    #[error("write-ahead log: {0}")]
    Wal(#[from] OpenError),
    /// The parts of the folder do not belong together.
    #[error("{0}")]
    Refused(String),
    /// Parts of the folder are missing that nothing here can bring back.
    #[error("{0}")]
    Lost(String),
    /// The state has lost entries that the log does not hold any more.
    #[error("{0}: the tree must be made anew from a replica")]
    TreeLost(String),
    /// The state could not be opened.
    #[error("{0}")]
    State(#[from] EngineError),
    /// The peer listener could not be bound.
    #[error("listen for other nodes on {addr}: {source}")]
    Bind {
        /// `host:port`.
        addr: String,
        /// The cause.
        source: io::Error,
    },
    /// The peer listener could not be shared with the fence.
    #[error("the peer listener: {0}")]
    PeerPort(io::Error),
    /// Raft did not start.
    #[error("raft: {0}")]
    Raft(String),
}
