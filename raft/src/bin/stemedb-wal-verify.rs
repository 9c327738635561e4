//! Verifies one WAL segment. Reads only.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

/// Verifies one segment of the write-ahead log, without changing it.
///
/// Exit codes: 0 clean; 1 damaged: segment, byte offset, index and what is wrong are printed; 2 the file cannot be read.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The segment, for example /var/lib/stemedb/wal/segment.001.wal
    #[arg(long)]
    file: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    stemedb_raft::tool::verify(&args.file, &mut std::io::stdout()).into()
}
