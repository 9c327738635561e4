//! The tree and its newest checkpoint as sources of the scrubber.
//!
//! Damage of the tree is put on its board, as that of a read. A checkpoint that is damaged on its own is
//! no loss while the tree is sound: it goes to quarantine, and Raft asks for another one when it needs one.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_128;

use super::{Shared, StateHandle};
use crate::clock;
use crate::state::engine::checkpoint::Checkpoint;
use crate::state::engine::direct::{self, Hashed};
use crate::state::engine::lsm::LsmEngine;
use crate::state::engine::scrub::{ScrubItem, ScrubSource, Verdict};
use crate::state::engine::{EngineError, quarantine};

/// `kv/`: the pointer, the manifest and every table.
struct TreeSource {
    shared: Arc<Shared>,
}

/// `checkpoint/`: the newest one.
struct CheckpointSource {
    shared: Arc<Shared>,
}

impl StateHandle {
    /// What of the state can be scrubbed.
    pub fn scrub_sources(&self) -> Vec<Arc<dyn ScrubSource>> {
        let tree = TreeSource { shared: Arc::clone(&self.shared) };
        let checkpoint = CheckpointSource { shared: Arc::clone(&self.shared) };
        vec![Arc::new(tree), Arc::new(checkpoint)]
    }
}

impl StateHandle {
    /// Blocking. Compares a checkpoint that another node has not accepted with its hashes. A damaged one is put away; a
    /// table that the tree has too, under another name of the same file, is damage of the tree.
    pub fn doubt_blocking(&self, checkpoint: &Checkpoint) {
        let Err(error) = checkpoint.verify_blocking() else { return };
        let EngineError::Damaged { file, .. } = &error else {
            tracing::warn!(%error, "a checkpoint that was not accepted could not be compared with its hashes");
            return;
        };
        let is_damaged = |name: &str| file.as_ref().is_some_and(|file| *file == checkpoint.dir().join(name));
        let tree = TreeSource { shared: Arc::clone(&self.shared) };
        for item in tree.items() {
            let name = item.path.file_name().map(|name| format!("tables/{}", name.to_string_lossy()));
            if name.is_some_and(|name| is_damaged(&name)) {
                tree.verify(&item, &mut |_| ControlFlow::Continue(()));
            }
        }
        self.shared.condemn(checkpoint.dir(), &error);
    }
}

type After<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// Compares a file with what it should be. `Err`: it is damaged, or could not be read.
fn compare(path: &Path, bytes: Option<u64>, xxh3: u128, after: After<'_>) -> Result<Verdict, EngineError> {
    match direct::hash(path, after) {
        Ok(Hashed::Stopped) => Ok(Verdict::Stopped),
        Ok(Hashed::Whole(found, hash)) if hash == xxh3 && bytes.is_none_or(|bytes| bytes == found) => {
            Ok(Verdict::Sound)
        }
        Ok(Hashed::Whole(found, _)) => {
            let why = format!("is not what its hash says ({found} bytes)");
            Err(EngineError::damaged_file("scrub", path, why))
        }
        Err(error) => Err(EngineError::read("scrub", path, error)),
    }
}

fn verdict(result: Result<Verdict, EngineError>, report: impl FnOnce(&EngineError)) -> Verdict {
    match result {
        Ok(verdict) => verdict,
        Err(error) if error.is_damage() => {
            report(&error);
            Verdict::Damaged(error.to_string())
        }
        Err(error) => Verdict::Unknown(error.to_string()),
    }
}

impl ScrubSource for TreeSource {
    fn kind(&self) -> &'static str {
        "tree"
    }

    fn items(&self) -> Vec<ScrubItem> {
        let engine = self.shared.engine.load_full();
        let mut items = vec![
            ScrubItem { key: POINTER.into(), path: self.shared.store.pointer_path(), bytes: 0 },
            ScrubItem { key: MANIFEST.into(), path: engine.dir().join("current"), bytes: 0 },
        ];
        let tables = engine.table_files().unwrap_or_default();
        items.extend(tables.into_iter().map(|table| ScrubItem {
            key: format!("{}{:020}", table_prefix(&engine), table.id),
            path: table.path,
            bytes: table.bytes,
        }));
        items.sort_by(|a, b| a.key.cmp(&b.key));
        items
    }

    fn verify(&self, item: &ScrubItem, after: After<'_>) -> Verdict {
        let engine = self.shared.engine.load_full();
        let report = |error: &EngineError| engine.inner.report(error);
        match item.key.as_str() {
            POINTER => {
                let expected = self.shared.store.pointer();
                let result = compare(&item.path, None, xxh3_128(&expected), after);
                // It may just be replaced, and names a tree in any case.
                if result.as_ref().is_err_and(EngineError::is_damage) && self.shared.store.pointer_is_another(&expected)
                {
                    return Verdict::Gone;
                }
                verdict(result, report)
            }
            MANIFEST => verdict(engine.verify_manifest().map(|()| Verdict::Sound), report),
            key => {
                let id = key.strip_prefix(table_prefix(&engine).as_str()).and_then(|id| id.parse::<u64>().ok());
                let Some(id) = id else { return Verdict::Gone };
                verdict(engine.with_table(id, |table| compare(&table.path, None, table.xxh3, after)), report)
            }
        }
    }
}

const POINTER: &str = "0-active";
const MANIFEST: &str = "1-manifest";

/// Tables of another tree have the same numbers.
fn table_prefix(engine: &LsmEngine) -> String {
    let tree = engine.dir().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    format!("2-{tree}-")
}

impl ScrubSource for CheckpointSource {
    fn kind(&self) -> &'static str {
        "checkpoint"
    }

    fn items(&self) -> Vec<ScrubItem> {
        let Some(checkpoint) = self.shared.shelf.newest() else { return Vec::new() };
        let folder = checkpoint.dir().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut items: Vec<ScrubItem> = checkpoint
            .files()
            .iter()
            .map(|file| ScrubItem {
                key: format!("{folder}/{}", file.name),
                path: checkpoint.dir().join(&file.name),
                bytes: file.bytes,
            })
            .collect();
        let list = crate::state::engine::checkpoint::MANIFEST;
        items.push(ScrubItem { key: format!("{folder}/{list}"), path: checkpoint.dir().join(list), bytes: 0 });
        items.sort_by(|a, b| a.key.cmp(&b.key));
        items
    }

    fn verify(&self, item: &ScrubItem, after: After<'_>) -> Verdict {
        let is_its = |dir: &Path| item.path.starts_with(dir);
        let Some(checkpoint) = self.shared.shelf.newest().filter(|newest| is_its(newest.dir())) else {
            return Verdict::Gone;
        };
        let file = checkpoint.files().iter().find(|file| checkpoint.dir().join(&file.name) == item.path);
        let result = match file {
            Some(file) => compare(&item.path, Some(file.bytes), file.xxh3, after),
            None => checkpoint.manifest_bytes().and_then(|bytes| compare(&item.path, None, xxh3_128(&bytes), after)),
        };
        verdict(result, |error| self.shared.condemn(checkpoint.dir(), error))
    }
}

impl Shared {
    /// Blocking. Puts a damaged checkpoint away, unless another one has taken its place already.
    fn condemn(&self, dir: &Path, error: &EngineError) {
        if !self.shelf.condemn(dir) {
            return;
        }
        tracing::error!(%error, "a checkpoint is damaged; another one will be made of the tree");
        if let Err(error) = quarantine::put(&self.options.data_dir, dir, "checkpoint", clock::unix_ms()) {
            let stage = crate::state::engine::latch::Stage::Checkpoint;
            self.engine.load().inner.suffer(stage, &EngineError::io("checkpoint", error));
        }
    }
}
