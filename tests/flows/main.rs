//! Drain, undrain and failover of a cluster in one process: under load, when nodes die in the middle, when two want the
//! same, and when they must be refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr, missing_docs)]

mod cli;
#[path = "../cluster_rig/mod.rs"]
mod cluster_rig;
mod compact;
mod failover;
mod killed;
mod refusals;
mod rolling;
mod support;
