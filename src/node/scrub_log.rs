//! The sealed segments of the log as a source of the scrubber.
//!
//! What is damaged is put right at once: an entry from what this node still has of it, else from another replica, a
//! copy of the header from the other one. Nothing of the running log waits for that. The last segment is not looked at:
//! its newest entries are in memory, and it is read in full at every start.

use std::{ops::ControlFlow, path::PathBuf};

use stemedb_raft::{RepairError, SegmentCheck, WalHandle};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::state::engine::scrub::{ScrubItem, ScrubSource, Verdict};

/// Name of the log among the sources.
const KIND: &str = "wal";

/// See the module.
pub struct LogSource {
    /// The log.
    pub wal: WalHandle,
    /// Its folder, for reports.
    pub dir: PathBuf,
    /// Where questions to other nodes run: the scrubber has a thread of its own.
    pub runtime: Handle,
    /// Ends waits for other nodes, and for the log's writer.
    pub stop: CancellationToken,
}

impl ScrubSource for LogSource {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn items(&self) -> Vec<ScrubItem> {
        let sealed = self.wal.sealed_segments().into_iter();
        let item = |segment: stemedb_raft::SealedSegment| ScrubItem {
            // Numbers only rise; with zeros in front they also sort as they do.
            key: format!("{:020}", segment.number),
            path: self.dir.join(segment.name),
            bytes: segment.bytes,
        };
        sealed.map(item).collect()
    }

    fn verify(&self, item: &ScrubItem, after: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Verdict {
        let Ok(number) = item.key.parse() else { return Verdict::Gone };
        let mut stopped = false;
        let checked = self.wal.verify_segment_paced(number, |bytes| {
            let goes_on = after(bytes);
            stopped |= goes_on.is_break();
            goes_on
        });
        match checked {
            Err(_) => Verdict::Gone,
            // Whatever was found is found again when the pass goes on.
            Ok(_) if stopped => Verdict::Stopped,
            Ok(check) if check.damage.is_empty() && check.complete => Verdict::Sound,
            Ok(check) if check.damage.is_empty() => Verdict::Gone,
            Ok(check) => self.put_right(number, &check),
        }
    }
}

impl LogSource {
    fn put_right(&self, number: u64, check: &SegmentCheck) -> Verdict {
        let entries = check.damaged_entries();
        let first = check.damage.first().map(ToString::to_string).unwrap_or_default();
        let what = match check.damage.len() {
            0 | 1 => first,
            n => format!("{first}; and {} more", n - 1),
        };
        let all = async {
            let mut failed = None;
            if check.header_copies_damaged > 0
                && let Err(error) = self.wal.repair_header(number).await
            {
                failed = Some(error);
            }
            for index in entries {
                match self.wal.heal_entry(index).await {
                    // What is purged or truncated needs no repair.
                    Ok(()) | Err(RepairError::Gone(_)) => {}
                    Err(error @ RepairError::Latched(_)) => return Some(error),
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            failed
        };
        match self.runtime.block_on(self.stop.run_until_cancelled(all)) {
            None => Verdict::Stopped,
            Some(None) => Verdict::Damaged(format!("{what}. All of it was put right")),
            Some(Some(error)) => Verdict::Damaged(format!("{what}. Not all of it was put right: {error}")),
        }
    }
}
