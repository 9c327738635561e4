//! The tools for single segments of the log, as the command line reaches them.

pub use stemedb_raft::tool::{RepairRequest, dump, repair, verify};
