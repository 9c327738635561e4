//! The HTTP API over a real node: one process, one folder, one peer.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod errors;
mod reads;
mod runbooks;
mod server;
mod support;
mod writes;
