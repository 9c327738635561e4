//! `stemedb`: the server, the local cluster, and every tool around them.
use std::process::ExitCode;

fn main() -> ExitCode {
    stemedb::allocator::bound_arenas();
    stemedb::cli::main_stemedb(std::env::args_os())
}
