//! `stemedb wal`: looks at single segments of a log, without a server. The same as the two `stemedb-wal-…` programs.

use std::{io, path::PathBuf, process::ExitCode};

use clap::Subcommand;

use crate::wal_tools::{self, RepairRequest};

/// Of these commands, as the runbooks have them.
pub const EXIT_CODES: &str = "Exit codes: 0 clean or done; 1 damaged; 2 refused, or a file cannot be read or written.";

/// What to do with a segment.
#[derive(Subcommand, Debug)]
pub enum WalCommand {
    /// Say what is wrong with a segment: exit code 0 clean, 1 damaged, 2 it cannot be read
    Verify {
        /// The segment, for example /var/lib/stemedb/wal/segment.001.wal
        #[arg(long)]
        file: PathBuf,
    },
    /// Print how a damaged segment could be cut, or cut it into a new file; a node with peers needs no such cut
    Repair {
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
    },
    /// Print a segment's frames as text
    Dump {
        /// The segment
        #[arg(long)]
        file: PathBuf,
    },
}

/// Runs one of them. Blocking.
pub fn run(command: WalCommand) -> ExitCode {
    let out = &mut io::stdout();
    let code = match command {
        WalCommand::Verify { file } => wal_tools::verify(&file, out),
        WalCommand::Dump { file } => wal_tools::dump(&file, out),
        WalCommand::Repair { segment, output, truncate_at, lose_durable_entries } => {
            wal_tools::repair(&RepairRequest { segment, output, truncate_at, lose_durable_entries }, out)
        }
    };
    ExitCode::from(code)
}
