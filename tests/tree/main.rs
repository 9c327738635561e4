//! The tree when its files are not what was written, when its disk fails or is full, and when it is replaced.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout)]

mod damage;
mod foreign;
mod full;
mod hangs;
mod latch;
mod random;
mod rebuild;
mod replace;
#[path = "../rig/mod.rs"]
mod rig;
mod scrub;
mod support;
