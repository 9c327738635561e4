//! Views of the tree for readers, and the table that holds back garbage collection for them.
//!
//! Reads are noted while they last, for the watchdog: one that hangs stalls the node as a write does.
//!
//! lsm-tree raises its own visible number in the middle of an entry when a flush or compaction
//! happens to end there. Readers therefore use `published`, which only the apply thread moves, and
//! only between entries.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use lsm_tree::{AbstractTree, Guard, SeqNo};

use super::guard::{caught, caught_read};
use super::hidden;
use super::lsm::Inner;
use super::{EngineError, Row, StateRead};

/// Which sequence numbers readers still use.
#[derive(Debug)]
pub(crate) struct SnapshotTable {
    inner: Mutex<Open>,
}

#[derive(Debug)]
struct Open {
    published: SeqNo,
    readers: BTreeMap<SeqNo, usize>,
}

impl SnapshotTable {
    pub(crate) fn new(published: SeqNo) -> SnapshotTable {
        SnapshotTable { inner: Mutex::new(Open { published, readers: BTreeMap::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // Nothing in here can panic between two changes that belong together.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn publish(&self, seqno: SeqNo) {
        let mut open = self.lock();
        assert!(seqno >= open.published, "published went back: {seqno} < {}", open.published);
        open.published = seqno;
    }

    /// Reads the published number and holds back its garbage collection, in one step.
    fn open(&self) -> SeqNo {
        let mut open = self.lock();
        let seqno = open.published;
        *open.readers.entry(seqno).or_insert(0) += 1;
        seqno
    }

    fn close(&self, seqno: SeqNo) {
        let mut open = self.lock();
        if let Some(count) = open.readers.get_mut(&seqno) {
            *count -= 1;
            if *count == 0 {
                open.readers.remove(&seqno);
            }
        }
    }

    /// What garbage collection may not touch: everything that the lowest open or any future
    /// snapshot can see.
    pub(crate) fn watermark(&self) -> SeqNo {
        let open = self.lock();
        let lowest = open.readers.keys().next().copied().unwrap_or(open.published);
        lowest.min(open.published).saturating_sub(1)
    }

    pub(crate) fn open_count(&self) -> usize {
        self.lock().readers.values().sum()
    }
}

/// One consistent state of the tree. Holds back its garbage collection while it lives, so nobody
/// keeps one for long. It outlives the engine that made it.
pub struct Snapshot {
    engine: Arc<Inner>,
    seqno: SeqNo,
    registered: bool,
}

impl Snapshot {
    /// The published state.
    pub(crate) fn published(engine: Arc<Inner>) -> Snapshot {
        let seqno = engine.snapshots.open();
        Snapshot { engine, seqno, registered: true }
    }

    /// Whatever is written at the moment of each call; for the one thread that writes.
    pub(crate) fn written(engine: Arc<Inner>) -> Snapshot {
        Snapshot { engine, seqno: SeqNo::MAX, registered: false }
    }

    /// A read that the watchdog sees. Not what follows one that failed: to find the damaged table may take long on a disk
    /// that does not hang.
    fn seen<T>(&self, read: impl FnOnce() -> T) -> T {
        let _seen = self.engine.options.io_times.row("read", "kv/tables");
        read()
    }

    /// Counts a failed read; damage gets the name of its table and is told to whoever repairs.
    fn noted<T>(
        &self,
        result: Result<T, EngineError>,
        locate: impl FnOnce(&Inner) -> Option<std::path::PathBuf>,
    ) -> Result<T, EngineError> {
        result.map_err(|error| {
            let error = match error.is_damage() {
                // Looking for it reads the same damage: it may panic as well.
                true => error.in_file(caught("get", || Ok(locate(&self.engine))).ok().flatten()),
                false => error,
            };
            self.engine.options.observer.operation_failed(error.operation(), &error);
            self.engine.report(&error);
            error
        })
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if self.registered {
            self.engine.snapshots.close(self.seqno);
        }
    }
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Snapshot({})", self.seqno)
    }
}

impl StateRead for Snapshot {
    fn report_damage(&self, what: &str) {
        self.engine.report(&EngineError::damaged("get", what));
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        if key.is_empty() || key.len() > super::lsm::KEY_BYTES_MAX {
            return Ok(None); // no such key can exist
        }
        let value = self.seen(|| caught_read("get", || self.engine.tree.get(key, self.seqno)));
        let value = self.noted(value, |engine| hidden::locate_for_key(&engine.tree, key));
        Ok(value?.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan<'a>(
        &'a self,
        from: Bound<&[u8]>,
        to: Bound<&[u8]>,
    ) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        if is_empty_range(from, to) {
            return Box::new(std::iter::empty());
        }
        let range = || Ok(self.engine.tree.range::<&[u8], _>((from, to), self.seqno, None));
        let rows = self.seen(|| caught_read("scan", range));
        let begin = from.map(<[u8]>::to_vec);
        match self.noted(rows, |engine| hidden::locate_for_scan(&engine.tree, &begin)) {
            Ok(mut rows) => Box::new(Scan {
                snapshot: self,
                at: begin,
                next: Box::new(move || match rows.next() {
                    None => Ok(None),
                    Some(row) => row.into_inner().map(Some),
                }),
                ended: false,
            }),
            Err(error) => Box::new(std::iter::once(Err(error))),
        }
    }
}

/// lsm-tree is never asked for a range whose end lies before its start.
fn is_empty_range(from: Bound<&[u8]>, to: Bound<&[u8]>) -> bool {
    match (from, to) {
        (Bound::Included(from), Bound::Included(to)) => from > to,
        (Bound::Included(from) | Bound::Excluded(from), Bound::Excluded(to))
        | (Bound::Excluded(from), Bound::Included(to)) => from >= to,
        (Bound::Unbounded, Bound::Excluded(to)) => to.is_empty(),
        _ => false,
    }
}

type NextRow = Box<dyn FnMut() -> lsm_tree::Result<Option<lsm_tree::KvPair>>>;

struct Scan<'a> {
    snapshot: &'a Snapshot,
    /// Where the rows not yet returned begin.
    at: Bound<Vec<u8>>,
    next: NextRow,
    ended: bool,
}

impl Iterator for Scan<'_> {
    type Item = Result<Row, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let at = &self.at;
        let row = self.snapshot.seen(|| caught_read("scan", || (self.next)()));
        match self.snapshot.noted(row, |engine| hidden::locate_for_scan(&engine.tree, at)) {
            Ok(Some((key, value))) => {
                if let Bound::Included(last) | Bound::Excluded(last) = &mut self.at {
                    last.clear();
                    last.extend_from_slice(&key);
                } else {
                    self.at = Bound::Included(key.to_vec());
                }
                Some(Ok((Bytes::copy_from_slice(&key), Bytes::copy_from_slice(&value))))
            }
            Ok(None) => {
                self.ended = true;
                None
            }
            Err(error) => {
                self.ended = true; // what follows a damaged block is not trusted
                Some(Err(error))
            }
        }
    }
}
