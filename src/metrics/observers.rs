//! What the layers below tell about their work, without knowing who listens.
//!
//! The log and the tree call these from their own threads, on their hot paths: implementations
//! count and return.

pub use crate::state::engine::EngineObserver;
pub use stemedb_raft::WalObserver;
