//! Checkpoints: a frozen copy of the tree, made of hard links, while the tree goes on.
//!
//! ```text
//! <checkpoint>/current   v{id}   tables/{n}…   then, last and synced:   checkpoint.manifest
//! ```
//!
//! The manifest lists every file with its length and xxh3-128, and the applied state that the rows
//! add up to. A folder without a valid manifest is no checkpoint. A checkpoint is what Raft calls a
//! snapshot; it travels to other nodes file by file (see `receive`).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use stemedb_raft::codec;
use xxhash_rust::xxh3::xxh3_128;

use super::error::SyncFailed;
use super::guard::caught;
use super::latch::Stage;
use super::lsm::{LsmEngine, lock};
use super::precheck::{CURRENT, Current, TABLES};
use super::{AppliedState, EngineError, direct, folder, foreign, hidden};

/// Name of the manifest inside a checkpoint.
pub const MANIFEST: &str = "checkpoint.manifest";
const MAGIC: &[u8; 8] = b"STEMECKP";
/// Version of the manifest's form. A newer one is refused.
const FORMAT: u16 = 1;
/// magic, format, body length.
const HEADER_BYTES: usize = 8 + 2 + 4;
const HASH_BYTES: usize = 16;
/// A healthy tree has fewer than 100 tables; more than this is no list of ours.
const FILES_MAX: usize = 100_000;

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFile {
    /// `current`, `v{id}` or `tables/{n}`.
    pub name: String,
    /// Length, bytes.
    pub bytes: u64,
    /// xxh3-128 of the content.
    pub xxh3: u128,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Body {
    files: Vec<CheckpointFile>,
    applied: AppliedState,
}

/// A complete checkpoint on this node's disk. Its folder stays for as long as a clone lives, even
/// when a newer one has taken its place.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    body: Arc<Body>,
    keep: Arc<Keep>,
}

/// Removes the folder of a superseded checkpoint once nobody reads it.
#[derive(Debug)]
struct Keep {
    dir: PathBuf,
    superseded: AtomicBool,
}

impl Drop for Keep {
    fn drop(&mut self) {
        if self.superseded.load(Ordering::Acquire)
            && let Err(error) = foreign::remove_tree(&self.dir)
        {
            tracing::warn!(%error, dir = %self.dir.display(), "an old checkpoint stays");
        }
    }
}

impl Checkpoint {
    /// Reads back the checkpoint in `dir`: its manifest must be whole and every file there with
    /// its length. The contents are checked by [`Self::verify_blocking`].
    pub fn load(dir: &Path) -> Result<Checkpoint, EngineError> {
        let path = dir.join(MANIFEST);
        let bytes = fs::read(&path).map_err(|e| EngineError::read("checkpoint", &path, e))?;
        let body = decode_manifest(&bytes).map_err(|error| error.in_file(Some(path)))?;
        let checkpoint = Checkpoint::with_body(dir, body);
        for file in checkpoint.files() {
            let path = dir.join(&file.name);
            let found = fs::metadata(&path).map_err(|e| EngineError::read("checkpoint", &path, e))?.len();
            if found != file.bytes {
                let why = format!("has {found} bytes instead of {}", file.bytes);
                return Err(damaged(dir, &file.name, &why));
            }
        }
        Ok(checkpoint)
    }

    fn with_body(dir: &Path, body: Body) -> Checkpoint {
        Checkpoint {
            dir: dir.to_owned(),
            body: Arc::new(body),
            keep: Arc::new(Keep { dir: dir.to_owned(), superseded: AtomicBool::new(false) }),
        }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its files.
    pub fn files(&self) -> &[CheckpointFile] {
        &self.body.files
    }

    /// What its rows add up to.
    pub fn applied(&self) -> &AppliedState {
        &self.body.applied
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files().iter().map(|file| file.bytes).sum()
    }

    /// The manifest as it is stored and sent.
    pub fn manifest_bytes(&self) -> Result<Bytes, EngineError> {
        Ok(encode_manifest(&self.body)?.into())
    }

    /// Blocking. Up to `len` bytes of a listed file from `offset` on; empty at its end.
    pub fn read_chunk(&self, file: &str, offset: u64, len: usize) -> Result<Bytes, EngineError> {
        let listed = self
            .files()
            .iter()
            .find(|listed| listed.name == file)
            .ok_or_else(|| invalid(&format!("{file:?} is no file of this checkpoint")))?;
        let left = usize::try_from(listed.bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut chunk = vec![0u8; len.min(left)];
        let path = self.dir.join(&listed.name);
        File::open(&path)
            .and_then(|opened| opened.read_exact_at(&mut chunk, offset))
            .map_err(|e| EngineError::read("checkpoint", &path, e))?;
        Ok(chunk.into())
    }

    /// Blocking. Reads every file and compares it with its hash.
    pub fn verify_blocking(&self) -> Result<(), EngineError> {
        for file in self.files() {
            verify_file(&self.dir, file)?;
        }
        Ok(())
    }

    /// A newer checkpoint has taken its place.
    pub(crate) fn supersede(&self) {
        self.keep.superseded.store(true, Ordering::Release);
    }

    /// Moves the folder; `self` must be the only clone.
    pub(crate) fn moved_to(self, dir: &Path) -> Result<Checkpoint, EngineError> {
        let failed = |e| EngineError::io("checkpoint", e);
        fs::rename(&self.dir, dir).map_err(failed)?;
        for parent in [self.dir.parent(), dir.parent()].into_iter().flatten() {
            folder::sync(parent).map_err(failed)?;
        }
        Ok(Checkpoint {
            dir: dir.to_owned(),
            body: self.body,
            keep: Arc::new(Keep { dir: dir.to_owned(), superseded: AtomicBool::new(false) }),
        })
    }

    /// Blocking. Links (or copies) the files into the empty folder `into` and syncs them there;
    /// with the manifest it becomes a checkpoint, without it the folder of a tree.
    pub(crate) fn link_into(&self, into: &Path, with_manifest: bool) -> Result<(), EngineError> {
        let failed = |e| EngineError::io("checkpoint", e);
        folder::create_synced(&into.join(TABLES)).map_err(failed)?;
        for file in self.files() {
            let (from, to) = (self.dir.join(&file.name), into.join(&file.name));
            if file.name.starts_with(TABLES) {
                folder::link_or_copy(&from, &to).map_err(failed)?;
            } else {
                // Never linked: lsm-tree may overwrite a `v{id}` in place.
                folder::write_synced(&to, &fs::read(&from).map_err(failed)?).map_err(failed)?;
            }
        }
        folder::sync(&into.join(TABLES)).map_err(failed)?;
        folder::sync(into).map_err(failed)?;
        if with_manifest {
            folder::replace_synced(&into.join(MANIFEST), &self.manifest_bytes()?).map_err(failed)?;
        }
        into.parent().map_or(Ok(()), folder::sync).map_err(failed)
    }
}

/// Blocking. Compares one file with its entry, as the medium has it and not the page cache, and syncs it:
/// what a log may be purged behind, or a tree made of, has been read back once.
pub(crate) fn verify_file(dir: &Path, file: &CheckpointFile) -> Result<(), EngineError> {
    let path = dir.join(&file.name);
    let (bytes, xxh3) = direct::hash_and_sync(&path).map_err(|e| verify_failed(&path, e))?;
    if (bytes, xxh3) == (file.bytes, file.xxh3) {
        return Ok(());
    }
    Err(damaged(dir, &file.name, "is not what its hash says"))
}

fn damaged(dir: &Path, name: &str, why: &str) -> EngineError {
    EngineError::damaged_file("checkpoint", &dir.join(name), why)
}

/// A read that fails is damage of the file; a sync that fails is the disk's failure.
fn verify_failed(path: &Path, error: io::Error) -> EngineError {
    match error.get_ref().is_some_and(|inner| inner.is::<SyncFailed>()) {
        true => EngineError::io("checkpoint", error),
        false => EngineError::read("checkpoint", path, error),
    }
}

fn invalid(why: &str) -> EngineError {
    EngineError::io("checkpoint", io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()))
}

/// Names that a checkpoint may contain. They come from other nodes and become paths.
fn is_checkpoint_name(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.len() <= 20 && text.bytes().all(|byte| byte.is_ascii_digit());
    name == CURRENT
        || name.strip_prefix('v').is_some_and(number)
        || name.strip_prefix(TABLES).and_then(|rest| rest.strip_prefix('/')).is_some_and(number)
}

fn encode_manifest(body: &Body) -> Result<Vec<u8>, EngineError> {
    let body = codec::encode(body).map_err(|e| invalid(&format!("checkpoint manifest: {e}")))?;
    let length = u32::try_from(body.len()).map_err(|_| invalid("the checkpoint lists too many files"))?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len() + HASH_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes.extend_from_slice(&xxh3_128(&bytes).to_le_bytes());
    Ok(bytes)
}

fn decode_manifest(bytes: &[u8]) -> Result<Body, EngineError> {
    let wrong = |why: String| EngineError::damaged("checkpoint", format!("manifest: {why}"));
    let (signed, hash) =
        bytes.split_last_chunk::<HASH_BYTES>().ok_or_else(|| wrong(format!("only {} bytes", bytes.len())))?;
    let (header, body) =
        signed.split_first_chunk::<HEADER_BYTES>().ok_or_else(|| wrong(format!("only {} bytes", bytes.len())))?;
    let [magic @ .., f0, f1, l0, l1, l2, l3] = header;
    if magic != MAGIC {
        return Err(wrong("it does not begin as one".to_owned()));
    }
    // Named even when the hash does not match: a newer form may be hashed in another way.
    let format = u16::from_le_bytes([*f0, *f1]);
    let is_signed = xxh3_128(signed).to_le_bytes() == *hash;
    if format > FORMAT {
        let why = format!("format {format}, this program knows up to {FORMAT}");
        return Err(match is_signed {
            true => EngineError::io("checkpoint", io::Error::new(io::ErrorKind::Unsupported, why)),
            false => wrong(why), // or flipped: it is not touched, and another one is made of the tree
        });
    }
    if !is_signed {
        return Err(wrong("its hash does not match".to_owned()));
    }
    if u32::from_le_bytes([*l0, *l1, *l2, *l3]) as usize != body.len() || format != FORMAT {
        return Err(wrong("its length or format is wrong".to_owned()));
    }
    let body: Body = codec::decode(body).map_err(|e| wrong(e.to_string()))?;
    body.applied.check_feature_level("checkpoint")?;
    if body.files.len() > FILES_MAX {
        return Err(wrong(format!("{} files", body.files.len())));
    }
    let mut names = BTreeSet::new();
    for file in &body.files {
        if !is_checkpoint_name(&file.name) {
            return Err(wrong(format!("the name {:?}", file.name)));
        }
        if !names.insert(file.name.as_str()) {
            return Err(wrong(format!("{:?} twice", file.name)));
        }
    }
    Ok(body)
}

/// The files that a manifest lists.
///
/// Errors: `Damaged` for a manifest that is none.
pub fn announced_files(manifest: &[u8]) -> Result<Vec<CheckpointFile>, EngineError> {
    Ok(decode_manifest(manifest)?.files)
}

/// A checkpoint that is not on this disk yet: its manifest, checked, and the folder it will be in.
pub(crate) fn announced(dir: &Path, manifest: &[u8]) -> Result<Checkpoint, EngineError> {
    Ok(Checkpoint::with_body(dir, decode_manifest(manifest)?))
}

/// A version of the tree that stays on the disk, and the files that name it.
pub(crate) struct PinnedManifest {
    pub(crate) version: hidden::PinnedVersion,
    pub(crate) current: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

impl PinnedManifest {
    pub(crate) fn manifest_name(&self) -> String {
        format!("v{}", self.version.manifest_id)
    }
}

/// Keeps memtables after a ticket in memory until it is dropped.
pub(crate) struct FlushHold {
    engine: LsmEngine,
    pub(crate) ticket: u64,
}

impl FlushHold {
    /// The hold that `rotate_and_hold` has put on `ticket`.
    pub(crate) fn of(engine: LsmEngine, ticket: u64) -> FlushHold {
        FlushHold { engine, ticket }
    }

    pub(crate) fn engine(&self) -> &LsmEngine {
        &self.engine
    }
}

impl Drop for FlushHold {
    fn drop(&mut self) {
        let mut queue = lock(&self.engine.inner.queue);
        if let Some(at) = queue.holds.iter().position(|ticket| *ticket == self.ticket) {
            queue.holds.swap_remove(at);
        }
        drop(queue);
        self.engine.inner.queue_changed.notify_all();
    }
}

impl LsmEngine {
    /// Blocking. Makes a checkpoint of what is on disk in the folder `into`, which must be new or
    /// empty. Writes, flushes and compactions go on; flushes wait only while files are linked.
    ///
    /// Errors: `Io`, also when the disk is full (the folder is then incomplete and may be removed);
    /// `Damaged` when a table is not what the manifest says.
    pub fn checkpoint(&self, into: &Path) -> Result<Checkpoint, EngineError> {
        self.checkpoint_observed(into, || ())
    }

    /// Calls `linked` as soon as the files are linked and flushes may go on.
    pub(crate) fn checkpoint_observed(&self, into: &Path, linked: impl FnOnce()) -> Result<Checkpoint, EngineError> {
        let began = tokio::time::Instant::now();
        let result = self.checkpoint_and_release(into, linked);
        if let Err(error) = &result {
            self.inner.suffer(Stage::Checkpoint, error);
        }
        self.inner.note("checkpoint", began, result)
    }

    fn checkpoint_and_release(&self, into: &Path, linked: impl FnOnce()) -> Result<Checkpoint, EngineError> {
        let failed = |e| EngineError::io("checkpoint", e);
        self.inner.check()?;
        {
            let _busy = self.inner.busy("sync", "checkpoint");
            self.inner.step("checkpoint", "checkpoint.begin")?;
            folder::create_synced(&into.join(TABLES)).map_err(failed)?;
        }
        let (persisted, pinned) = self.pin_manifest()?;
        let applied = persisted.clone();
        let tables = pinned.version.tables();
        for table in &tables {
            folder::link_or_copy(&table.path, &into.join(TABLES).join(table.id.to_string())).map_err(failed)?;
        }
        drop(persisted);
        linked();
        self.inner.step("checkpoint", "checkpoint.linked")?;

        let mut files = Vec::with_capacity(tables.len() + 2);
        for (name, bytes) in [(CURRENT.to_owned(), &pinned.current), (pinned.manifest_name(), &pinned.manifest)] {
            let _busy = self.inner.busy("write", "checkpoint");
            folder::write_synced(&into.join(&name), bytes).map_err(failed)?;
            files.push(CheckpointFile { name, bytes: bytes.len() as u64, xxh3: xxh3_128(bytes) });
        }
        for table in &tables {
            files.push(self.list_table(into, table)?);
        }
        let _busy = self.inner.busy("sync", "checkpoint");
        folder::sync(&into.join(TABLES)).map_err(failed)?;
        folder::sync(into).map_err(failed)?;
        let body = Body { files, applied };
        self.inner.step("checkpoint", "checkpoint.manifest")?;
        folder::replace_synced(&into.join(MANIFEST), &encode_manifest(&body)?).map_err(failed)?;
        into.parent().map_or(Ok(()), folder::sync).map_err(failed)?;
        self.inner.step("checkpoint", "checkpoint.manifest-written")?;
        Ok(Checkpoint::with_body(into, body))
    }

    /// The newest version with the bytes of its `current` and manifest, all three of one moment, and the
    /// applied state that belongs to them; no flush changes them while it is held.
    pub(crate) fn pin_manifest(&self) -> Result<(MutexGuard<'_, AppliedState>, PinnedManifest), EngineError> {
        let persisted = lock(&self.inner.persisted);
        if let Some(pinned) = self.copy_manifest()? {
            return Ok((persisted, pinned));
        }
        drop(persisted);
        // A compaction is just replacing it; none is while this is held. The order is that of a compaction.
        let _none = lock(&self.inner.compacting);
        let persisted = lock(&self.inner.persisted);
        match self.copy_manifest()? {
            Some(pinned) => Ok((persisted, pinned)),
            None => {
                Err(damaged(&self.inner.dir, CURRENT, "names another manifest than the tree has, or a missing one"))
            }
        }
    }

    /// `None` when they are not of one moment.
    fn copy_manifest(&self) -> Result<Option<PinnedManifest>, EngineError> {
        let version = caught("checkpoint", || Ok(hidden::pin(&self.inner.tree)))?;
        let path = self.inner.dir.join(CURRENT);
        let current = fs::read(&path).map_err(|e| EngineError::read("checkpoint", &path, e))?;
        let parsed = Current::parse(&current).map_err(|why| EngineError::damaged_file("checkpoint", &path, why))?;
        if parsed.manifest_id != version.manifest_id {
            return Ok(None);
        }
        let path = self.inner.dir.join(format!("v{}", version.manifest_id));
        let manifest = match fs::read(&path) {
            Ok(manifest) => manifest,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(EngineError::read("checkpoint", &path, error)),
        };
        if xxh3_128(&manifest) != parsed.manifest_xxh3 {
            return Err(EngineError::damaged_file("checkpoint", &path, "is not what `current` says"));
        }
        Ok(Some(PinnedManifest { version, current, manifest }))
    }

    /// Each table is read from the medium, compared with its hash and synced once per process, before
    /// the first checkpoint that lists it: the log may be purged behind that one. It never changes
    /// afterwards, and a checkpoint must not cost a read of the whole tree every time.
    fn list_table(&self, into: &Path, table: &hidden::TableFile) -> Result<CheckpointFile, EngineError> {
        let name = format!("{TABLES}/{}", table.id);
        let path = into.join(&name);
        let bytes = fs::metadata(&path).map_err(|e| EngineError::read("checkpoint", &path, e))?.len();
        let file = CheckpointFile { name, bytes, xxh3: table.xxh3 };
        if !lock(&self.inner.tables_verified).contains(&table.id) {
            let _busy = self.inner.busy("read", &file.name);
            verify_file(into, &file)?;
            lock(&self.inner.tables_verified).insert(table.id);
        }
        Ok(file)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn body() -> Body {
        let file = |name: &str| CheckpointFile { name: name.into(), bytes: 7, xxh3: 9 };
        Body {
            files: vec![file("current"), file("v12"), file("tables/3")],
            applied: AppliedState { fact_index: 5, ..AppliedState::default() },
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_of_the_manifest_is_refused() {
        let bytes = encode_manifest(&body()).unwrap();
        assert_eq!(body(), decode_manifest(&bytes).unwrap());
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_manifest(&flipped).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(decode_manifest(&bytes[..length]).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_newer_format_is_named() {
        let mut bytes = encode_manifest(&body()).unwrap();
        bytes[8] = 9;
        let error = decode_manifest(&bytes).unwrap_err().to_string();
        assert!(error.contains("format 9") && error.contains("up to 1"), "{error}");
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in ["../x", "tables/../x", "/etc/passwd", "tables/", "v", "v1x", "tables/1/2", ""] {
            let mut wrong = body();
            wrong.files[0].name = name.into();
            assert!(decode_manifest(&encode_manifest(&wrong).unwrap()).is_err(), "{name}");
        }
        let mut twice = body();
        twice.files[1].name = "current".into();
        assert!(decode_manifest(&encode_manifest(&twice).unwrap()).is_err());
    }
}
