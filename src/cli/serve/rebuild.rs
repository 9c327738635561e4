//! `stemedb-api --rebuild-from-wal`: makes the tree anew, with the node stopped, and ends.

use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::output;
pub use crate::node::rebuild_from_wal::Request as RebuildRequest;
use crate::node::rebuild_from_wal::{Progress, RebuildError, rebuild_from_wal};

/// Runs it, with a bar on standard error. The exit code as documented in `cli`.
pub async fn run(request: &RebuildRequest) -> ExitCode {
    let bar = ProgressBar::no_length();
    let style = ProgressStyle::with_template("{prefix}  {bar:30} {pos}/{len} entries  ETA {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix("rebuild from the log");
    let show = |progress: Progress| {
        let after = |index: Option<u64>| index.map_or(0, |index| index + 1);
        bar.set_length(after(progress.upto).saturating_sub(after(progress.from)));
        bar.set_position(after(progress.applied).saturating_sub(after(progress.from)));
    };
    let result = rebuild_from_wal(request, show).await;
    bar.finish_and_clear();
    match result {
        Ok(rebuilt) => {
            let from = rebuilt.from.map_or("nothing".to_owned(), |index| format!("the checkpoint at index {index}"));
            let applied = rebuilt.applied.map_or("no entry".to_owned(), |index| format!("index {index}"));
            output::notice(&format!(
                "rebuild complete: the tree holds everything up to {applied}; made of {from} and {} entries of the log",
                rebuilt.entries
            ));
            if let Some(old) = rebuilt.old {
                output::notice(&format!("the old tree is kept in {}", old.display()));
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            let code = match &error {
                RebuildError::Paths(_) => 2,
                RebuildError::Missing { .. } | RebuildError::NotOfOneHistory { .. } => 4,
                _ => super::EXIT_CANNOT_START,
            };
            tracing::error!("rebuild from the log failed: {error}");
            output::notice(&format!("stemedb: {error}. Nothing was changed"));
            ExitCode::from(code)
        }
    }
}
