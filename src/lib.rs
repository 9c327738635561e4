//! StemeDB: a replicated primary/replica database for assertions.
//!
//! `api` takes requests, `node` composes Raft, log, state and network, `state` applies what was
//! committed, `store_helpers` is how requests read. `cli` and `judge` are the programs around them.

pub mod admin;
pub mod allocator;
pub mod api;
pub mod cli;
pub mod clock;
pub mod config;
pub mod fail_points;
pub mod judge;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod node;
pub mod state;
pub mod store_helpers;
pub mod wal_tools;
