//! Members come, leave and replace each other: several nodes in this process, with their HTTP listeners.
//!
//! The steps and the rules without a cluster are in `src/admin/member_tests.rs` and `src/state/members_tests.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr, missing_docs)]

mod cli;
#[path = "../cluster_rig/mod.rs"]
mod cluster_rig;
mod grow;
mod killed;
mod learner;
mod refusals;
mod replace;
mod support;
