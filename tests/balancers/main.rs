//! Three server processes behind the real nginx and the real Envoy, with the files of `deploy/`, unchanged but for ports.
//!
//! nginx is found where Debian puts it; Envoy by `STEMEDB_TEST_ENVOY`, on the `PATH`, or where `scripts/test.sh` has
//! fetched it. Clients have no keys and send nothing twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stdout, missing_docs)]

mod access;
mod drills;
mod killed;
mod requests;
mod rolling;
mod support;
mod upgrade;
