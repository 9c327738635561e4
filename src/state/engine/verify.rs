//! Compares the files of an open tree with its manifest, while it goes on.

use std::fs;
use std::ops::ControlFlow;

use xxhash_rust::xxh3::xxh3_128;

use super::EngineError;
use super::direct::{self, Hashed};
use super::guard::caught;
use super::hidden::{self, TableFile};
use super::lsm::LsmEngine;
use super::precheck::{CURRENT, Current};
use super::scrub::Verdict;

impl LsmEngine {
    /// The tables of the newest version.
    pub(crate) fn table_files(&self) -> Result<Vec<TableFile>, EngineError> {
        caught("scrub", || Ok(hidden::pin(&self.inner.tree))).map(|pinned| pinned.tables())
    }

    /// Blocking. Calls `verify` with a table, whose file stays until it returns; `Gone` when the newest
    /// version does not have it.
    pub(crate) fn with_table(
        &self,
        id: u64,
        verify: impl FnOnce(&TableFile) -> Result<Verdict, EngineError>,
    ) -> Result<Verdict, EngineError> {
        let pinned = caught("scrub", || Ok(hidden::pin(&self.inner.tree)))?;
        match pinned.tables().iter().find(|table| table.id == id) {
            Some(table) => verify(table),
            None => Ok(Verdict::Gone),
        }
    }

    /// Blocking. Reads `current` and its manifest from the medium; they must be of one another, and what
    /// memory says they are.
    pub(crate) fn verify_manifest(&self) -> Result<(), EngineError> {
        let (_no_flush, pinned) = self.pin_manifest()?;
        let current = &pinned.current;
        for (name, bytes) in [(CURRENT.to_owned(), current), (pinned.manifest_name(), &pinned.manifest)] {
            let path = self.inner.dir.join(name);
            let found = direct::hash(&path, |_| ControlFlow::Continue(()));
            match found {
                Ok(Hashed::Whole(_, hash)) if hash == xxh3_128(bytes) => {}
                // Replaced meanwhile, and just written.
                _ if fs::read(self.inner.dir.join(CURRENT))
                    .is_ok_and(|now| now != *current && Current::parse(&now).is_ok()) =>
                {
                    return Ok(());
                }
                Ok(_) => {
                    let why = "reads otherwise from the disk than from memory";
                    return Err(EngineError::damaged_file("scrub", &path, why));
                }
                Err(error) => return Err(EngineError::read("scrub", &path, error)),
            }
        }
        Ok(())
    }
}
