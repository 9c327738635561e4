//! Every call into parts of lsm-tree that its documentation hides, in one place.
//!
//! They are exempt from the crate's promise of compatibility. The version is pinned exactly, and
//! the test at the end fails when an upgrade changes what they mean.

use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;

use lsm_tree::table::filter::standard_bloom::Builder as BloomBuilder;
use lsm_tree::{AbstractTree, AnyTree, InternalValue, Memtable, SeqNo, Table};

use super::guard::caught;

/// A table of a pinned version.
#[derive(Clone, Debug)]
pub(crate) struct TableFile {
    pub(crate) id: u64,
    pub(crate) path: PathBuf,
    /// xxh3-128 of the whole file, from the manifest.
    pub(crate) xxh3: u128,
    pub(crate) bytes: u64,
}

/// Rows of one table that are looked at for the damaged block of a scan: more than there can be
/// between the last row that was returned and the one that could not be read, as a rule.
const LOCATE_ROWS_MAX: usize = 100_000;

/// Keeps a version's tables on the disk for as long as it lives.
pub(crate) struct PinnedVersion {
    pub(crate) manifest_id: u64,
    tables: Vec<(u8, Table)>,
}

/// Tables and bytes of one level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LevelStats {
    /// Tables.
    pub tables: usize,
    /// Their file sizes, bytes.
    pub bytes: u64,
}

/// Number of levels of a tree; fixed by the crate.
pub(crate) const LEVELS: usize = 7;

impl PinnedVersion {
    pub(crate) fn tables(&self) -> Vec<TableFile> {
        self.tables
            .iter()
            .map(|(_, table)| TableFile {
                id: table.id(),
                path: table.path.as_ref().clone(),
                xxh3: table.checksum().into_u128(),
                bytes: table.metadata.file_size,
            })
            .collect()
    }

    pub(crate) fn levels(&self) -> [LevelStats; LEVELS] {
        let mut levels = [LevelStats::default(); LEVELS];
        for (level, table) in &self.tables {
            if let Some(stats) = levels.get_mut(usize::from(*level)) {
                stats.tables += 1;
                stats.bytes += table.metadata.file_size;
            }
        }
        levels
    }
}

/// Pins the newest version. Panics when the crate's locks are poisoned: call it inside `caught`.
pub(crate) fn pin(tree: &AnyTree) -> PinnedVersion {
    let version = tree.current_version();
    let mut tables = Vec::with_capacity(version.table_count());
    for (level, runs) in (0u8..).zip(version.iter_levels()) {
        for run in runs.iter() {
            tables.extend(run.iter().map(|table| (level, table.clone())));
        }
    }
    PinnedVersion { manifest_id: version.id(), tables }
}

/// The table whose damage makes `get` of this key fail; block errors carry no table.
pub(crate) fn locate_for_key(tree: &AnyTree, key: &[u8]) -> Option<PathBuf> {
    let hash = BloomBuilder::get_hash(key);
    pin(tree).tables.iter().find_map(|(_, table)| {
        let failed = caught("get", || table.get(key, SeqNo::MAX, hash)).is_err();
        failed.then(|| table.path.as_ref().clone())
    })
}

/// The table whose damage makes a scan from here on fail.
pub(crate) fn locate_for_scan(tree: &AnyTree, from: &Bound<Vec<u8>>) -> Option<PathBuf> {
    pin(tree).tables.iter().find_map(|(_, table)| {
        let from = from.as_ref().map(|key| lsm_tree::UserKey::from(key.as_slice()));
        let failed = caught("scan", || {
            table.range((from, Bound::Unbounded)).take(LOCATE_ROWS_MAX).try_for_each(|row| row.map(drop))
        });
        failed.is_err().then(|| table.path.as_ref().clone())
    })
}

/// Tables whose content says another id than their name: files that were exchanged.
pub(crate) fn misnamed(tree: &AnyTree) -> Option<PathBuf> {
    let wrong = |table: &Table| table.path.file_name().and_then(|name| name.to_str()) != Some(&table.id().to_string());
    pin(tree).tables.iter().find(|(_, table)| wrong(table)).map(|(_, table)| table.path.as_ref().clone())
}

/// Id of the newest version.
pub(crate) fn manifest_id(tree: &AnyTree) -> u64 {
    tree.current_version().id()
}

/// Writes one sealed memtable into tables and syncs them. Nothing refers to them yet.
///
/// Older versions of a key that no snapshot below `watermark` can need are left out, by the same
/// rule as the crate's own flush. Its own flush takes every sealed memtable at once; here each is
/// written alone, because each waits for its own place in the log to be durable.
pub(crate) fn write_tables(tree: &AnyTree, memtable: &Arc<Memtable>, watermark: SeqNo) -> lsm_tree::Result<Vec<Table>> {
    let rows = Newest { rows: memtable.iter(), last: None, watermark };
    Ok(tree.flush_to_tables(rows.map(Ok))?.map(|(tables, _)| tables).unwrap_or_default())
}

/// Makes tables part of the tree in place of their memtable: writes and syncs a new manifest.
pub(crate) fn register_tables(
    tree: &AnyTree,
    tables: &[Table],
    memtable: &Memtable,
    watermark: SeqNo,
) -> lsm_tree::Result<()> {
    tree.register_tables(tables, None, None, &[memtable.id()], watermark)
}

/// Ids of tables, for telling leftovers of a failed write from tables in use.
pub(crate) fn table_ids(tables: &[Table]) -> Vec<u64> {
    tables.iter().map(Table::id).collect()
}

/// File bytes of tables.
pub(crate) fn table_bytes(tables: &[Table]) -> u64 {
    tables.iter().map(|table| table.metadata.file_size).sum()
}

/// Rows of a memtable (keys ascending, versions of a key newest first) without the versions that
/// nobody can see any more.
struct Newest<I> {
    rows: I,
    last: Option<lsm_tree::UserKey>,
    watermark: SeqNo,
}

impl<I: Iterator<Item = InternalValue>> Iterator for Newest<I> {
    type Item = InternalValue;

    fn next(&mut self) -> Option<InternalValue> {
        for row in self.rows.by_ref() {
            let older = self.last.as_ref() == Some(&row.key.user_key);
            if older && row.key.seqno < self.watermark {
                continue;
            }
            if !older {
                self.last = Some(row.key.user_key.clone());
            }
            return Some(row);
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use lsm_tree::{Config, SequenceNumberCounter};
    use xxhash_rust::xxh3::xxh3_128;

    /// Fails when an upgrade of lsm-tree changes what this file relies on.
    #[test]
    fn the_hidden_parts_mean_what_they_meant() {
        let dir = tempfile::tempdir().unwrap();
        let (seqno, visible) = (SequenceNumberCounter::new(1), SequenceNumberCounter::new(1));
        let tree = Config::new(dir.path(), seqno.clone(), visible.clone()).open().unwrap();
        assert_eq!(0, manifest_id(&tree));

        let s = seqno.next();
        tree.insert("a", "one", s);
        tree.insert("b", "two", s);
        tree.insert("a", "three", seqno.next());
        let memtable = tree.rotate_memtable().unwrap();
        assert_eq!(3, memtable.iter().count());
        // One memtable is flushed, the one sealed later is not.
        tree.insert("c", "four", seqno.next());
        assert!(tree.rotate_memtable().is_some());

        let tables = write_tables(&tree, &memtable, u64::MAX).unwrap();
        assert_eq!(0, manifest_id(&tree), "writing tables alone changes nothing");
        let next = seqno.get();
        register_tables(&tree, &tables, &memtable, 0).unwrap();
        assert_eq!(1, manifest_id(&tree));
        assert_eq!(next + 1, seqno.get(), "a flush takes a sequence number");
        assert_eq!(next + 1, visible.get(), "and raises the visible one");
        assert_eq!(1, tree.sealed_memtable_count());

        let pinned = pin(&tree);
        let [table] = pinned.tables().try_into().unwrap();
        assert_eq!(dir.path().join("tables").join(table.id.to_string()), table.path);
        let bytes = std::fs::read(&table.path).unwrap();
        assert_eq!(xxh3_128(&bytes), table.xxh3);
        assert!(table.bytes > 0 && table.bytes <= bytes.len() as u64);
        assert_eq!(1, pinned.levels()[0].tables);

        // `current` has the form that the pre-check reads.
        let current = std::fs::read(dir.path().join("current")).unwrap();
        let current = super::super::precheck::Current::parse(&current).unwrap();
        assert_eq!(1, current.manifest_id);
        let manifest = std::fs::read(dir.path().join("v1")).unwrap();
        assert_eq!(xxh3_128(&manifest), current.manifest_xxh3);
        let listed = super::super::manifest::tables(&manifest).unwrap();
        assert_eq!(vec![(table.id, table.xxh3)], listed.iter().map(|t| (t.id, t.xxh3)).collect::<Vec<_>>());
        assert_eq!(None, misnamed(&tree));
        assert_eq!(None, locate_for_key(&tree, b"a"));

        // The shadowed version of `a` was left out.
        assert_eq!(2, tables.iter().map(|t| t.metadata.item_count).sum::<u64>());
        assert_eq!(b"three", &*tree.get("a", u64::MAX).unwrap().unwrap());

        // A table compacted away stays on the disk for as long as a version is pinned.
        tree.major_compact(u64::MAX, u64::MAX).unwrap();
        assert!(table.path.exists());
        drop((pinned, tables));
    }
}
