//! How far out of traffic this node is: a watched value, and a file for a drain that shall outlast a restart.
//!
//! The file `drain` is there only when that was asked for at least once. One that cannot be believed counts as a drain:
//! somebody wanted this node out of traffic, and `undrain` writes it anew.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use super::super::files::{self, FileError};
use crate::admin::drain::Mark;

/// Name of the file in the data folder.
pub const DRAIN_FILE: &str = "drain";

/// Its content when the node shall start drained.
const DRAINED: &str = "format 1\ndrained yes\n";
/// Its content when it shall not.
const NOT_DRAINED: &str = "format 1\ndrained no\n";

/// A node's mark as others hear it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainMark {
    /// How far it is.
    pub mark: Mark,
    /// The boot to which that belongs.
    pub boot: u64,
}

/// What is known here.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// How far this node is.
    pub mark: Mark,
    /// Since when it has not been ready; `None` while it is.
    pub out_since: Option<Instant>,
    /// Whether a restart does not end it.
    pub persists: bool,
}

/// The mark of this process.
pub struct DrainWatch {
    file: PathBuf,
    known: watch::Sender<Known>,
}

impl DrainWatch {
    /// As the folder has it.
    pub fn open(data_dir: &Path) -> Result<DrainWatch, FileError> {
        let file = data_dir.join(DRAIN_FILE);
        let persists = match files::read(&file) {
            Ok(None) => false,
            Ok(Some(lines)) => lines != NOT_DRAINED,
            Err(error @ FileError::Damaged { .. }) => {
                tracing::warn!(%error, "the node starts drained, because what says otherwise cannot be read");
                true
            }
            Err(error) => return Err(error),
        };
        let known = match persists {
            true => Known { mark: Mark::Drained, out_since: Some(Instant::now()), persists },
            false => Known::default(),
        };
        Ok(DrainWatch { file, known: watch::Sender::new(known) })
    }

    /// The mark now.
    pub fn mark(&self) -> Mark {
        self.known.borrow().mark
    }

    /// All of it now.
    pub fn known(&self) -> Known {
        self.known.borrow().clone()
    }

    /// Changes with the mark.
    pub fn subscribe(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    /// Sets the mark.
    pub fn set(&self, mark: Mark) {
        self.known.send_if_modified(|known| {
            if known.mark == mark {
                return false;
            }
            tracing::info!(from = known.mark.word(), to = mark.word(), "drain");
            known.out_since = mark.is_out().then(|| known.out_since.unwrap_or_else(Instant::now));
            known.mark = mark;
            true
        });
    }

    /// Makes durable whether the next process starts drained. To be called where blocking is allowed.
    pub fn persist_blocking(&self, drained: bool) -> Result<(), FileError> {
        if drained || self.file.exists() {
            files::replace(&self.file, if drained { DRAINED } else { NOT_DRAINED })?;
        }
        self.known.send_modify(|known| known.persists = drained);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_restart_ends_a_drain_unless_it_was_made_to_last() {
        let dir = tempfile::tempdir().unwrap();
        let open = || DrainWatch::open(dir.path()).unwrap();
        let watch = open();
        watch.set(Mark::Drained);
        assert_eq!(open().mark(), Mark::None);
        watch.persist_blocking(false).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing to undo, nothing written");
        watch.persist_blocking(true).unwrap();
        assert_eq!(open().mark(), Mark::Drained);
        assert!(open().known().persists && open().known().out_since.is_some());
        open().persist_blocking(false).unwrap();
        assert_eq!(open().mark(), Mark::None);
        std::fs::write(dir.path().join(DRAIN_FILE), "rubbish").unwrap();
        assert_eq!(open().mark(), Mark::Drained);
        open().persist_blocking(false).unwrap();
        assert_eq!(open().mark(), Mark::None);
    }

    #[test]
    fn the_time_out_of_traffic_counts_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let watch = DrainWatch::open(dir.path()).unwrap();
        watch.set(Mark::Wants);
        assert!(watch.known().out_since.is_none());
        watch.set(Mark::Draining);
        let since = watch.known().out_since;
        watch.set(Mark::Drained);
        assert!(since.is_some() && watch.known().out_since == since);
        watch.set(Mark::None);
        assert!(watch.known().out_since.is_none());
    }
}
