//! `stemedb-api`: the server alone, the same as `stemedb serve`.
use std::process::ExitCode;

fn main() -> ExitCode {
    stemedb::allocator::bound_arenas();
    stemedb::cli::main_stemedb_api(std::env::args_os())
}
