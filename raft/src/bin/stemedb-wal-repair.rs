//! Cuts one WAL segment into another file, as the last resort.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use stemedb_raft::tool::{self, RepairRequest};

/// Prints how a damaged segment of the write-ahead log could be cut, or cuts it into a new file.
///
/// The input is never written. A node that has peers needs no such cut: the server fetches damaged entries from them.
/// What is cut is lost here; the output carries a mark that says so, and a server with peers gets it back from them, or
/// is rebuilt, before it votes again. Exit codes: 0 done; 2 refused, or a file cannot be read or written.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The damaged segment; it is only read
    #[arg(long)]
    segment: PathBuf,
    /// The new file; must not exist
    #[arg(long)]
    output: Option<PathBuf>,
    /// First byte that goes: where a frame begins. Without it the plan is printed and nothing is written
    #[arg(long, value_name = "BYTE", requires = "output")]
    truncate_at: Option<u64>,
    /// Cut entries that were durable too: writes that clients were told are safe are lost, unless a peer has them
    #[arg(long)]
    lose_durable_entries: bool,
}

fn main() -> ExitCode {
    let Args { segment, output, truncate_at, lose_durable_entries } = Args::parse();
    let request = RepairRequest { segment, output, truncate_at, lose_durable_entries };
    tool::repair(&request, &mut std::io::stdout()).into()
}
