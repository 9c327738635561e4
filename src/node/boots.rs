//! The newest boot seen of each other node.
//!
//! A node that comes back with a lower boot count than it already had, or with the same one in another run, runs on an
//! old copy of its folder: its log or vote may be older than what it has promised, so nothing it says is taken.
//! The counts are kept in the file `peers-seen`; a message of a new boot is answered only after its
//! count is durable here, so that the memory of it cannot be lost with the next crash.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use stemedb_net::is_old_copy;
use stemedb_raft::io_times::{IoTimes, Waits};
use tokio::sync::watch;

use super::files::{self, FileError};

/// Name of the file in the data folder.
const FILE: &str = "peers-seen";

/// Memory of the boot counts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SeenBoots {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    io_times: Arc<IoTimes>,
    table: Mutex<Table>,
    /// The version of the table that is durable, or why saving failed.
    saved: watch::Sender<Result<u64, String>>,
    /// Why the disk has failed under it, and that was no want of room. Nothing is written then, until the files of the
    /// node were made anew.
    failed: watch::Sender<Option<String>>,
}

#[derive(Debug, Default)]
struct Table {
    highest: BTreeMap<u64, u64>,
    version: u64,
    /// The version that is durable.
    saved: u64,
    saving: bool,
}

impl Table {
    fn lines(&self) -> String {
        self.highest.iter().map(|(id, boot)| format!("{id} {boot}\n")).collect()
    }
}

/// The node runs on an old copy of its folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "node {node_id} speaks with boot {boot:#x} after {highest:#x} was seen: it runs on an old copy of its data folder; replace \
     it by a new member with an empty one"
)]
pub struct StaleBoot {
    /// Raft id of the node.
    pub node_id: u64,
    /// The count it came with.
    pub boot: u64,
    /// The highest count seen.
    pub highest: u64,
}

impl SeenBoots {
    /// Reads the file. `io_times`: where its writes are noted.
    pub fn open(data_dir: &Path, io_times: Arc<IoTimes>) -> Result<SeenBoots, FileError> {
        let path = data_dir.join(FILE);
        let damaged = |line: &str| FileError::Damaged { path: path.clone(), why: format!("line {line:?}") };
        let mut highest = BTreeMap::new();
        for line in files::read(&path)?.unwrap_or_default().lines() {
            let (id, boot) = line.split_once(' ').ok_or_else(|| damaged(line))?;
            let id = id.parse().map_err(|_| damaged(line))?;
            highest.insert(id, boot.parse().map_err(|_| damaged(line))?);
        }
        let table = Mutex::new(Table { highest, ..Table::default() });
        let (saved, failed) = (watch::Sender::new(Ok(0)), watch::Sender::new(None));
        Ok(SeenBoots { inner: Arc::new(Inner { path, io_times, table, saved, failed }) })
    }

    /// Writes what is known into another folder too, where the node goes on; durable on return. Blocking.
    pub fn save_to(&self, data_dir: &Path) -> Result<(), FileError> {
        let lines = self.inner.table.lock().unwrap_or_else(PoisonError::into_inner).lines();
        files::replace(&data_dir.join(FILE), &lines)
    }

    /// The highest boot count seen of a node.
    pub fn highest(&self, node_id: u64) -> Option<u64> {
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner).highest.get(&node_id).copied()
    }

    /// Notes that `node_id` speaks with `boot`. The returned version is durable once `wait_saved`
    /// returns for it.
    pub fn observe(&self, node_id: u64, boot: u64) -> Result<u64, StaleBoot> {
        let mut table = self.inner.table.lock().unwrap_or_else(PoisonError::into_inner);
        match table.highest.get(&node_id).copied() {
            Some(highest) if is_old_copy(boot, highest) => return Err(StaleBoot { node_id, boot, highest }),
            Some(highest) if boot == highest => {}
            _ => {
                table.highest.insert(node_id, boot);
                table.version += 1;
            }
        }
        // Also of what was known before, when there was no room for it.
        self.save(&mut table);
        Ok(table.version)
    }

    /// Has the table saved, unless that is so, goes on, or must not be tried.
    fn save(&self, table: &mut Table) {
        if table.saving || table.saved == table.version || self.inner.failed.borrow().is_some() {
            return;
        }
        table.saving = true;
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || inner.save_until_current());
    }

    /// Returns why the disk has failed under the file, once it has.
    pub async fn wait_failed(&self) -> String {
        let mut failed = self.inner.failed.subscribe();
        let why = failed.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
        // Never an error: the sender lives as long as this borrow.
        why.unwrap_or_default()
    }

    /// The files of the node were made anew: what could not be written before is written now.
    pub fn begin_anew(&self) {
        let mut table = self.inner.table.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.failed.send_replace(None);
        self.save(&mut table);
    }

    /// Whether `version` is durable already.
    pub fn is_saved(&self, version: u64) -> bool {
        matches!(&*self.inner.saved.borrow(), Ok(saved) if *saved >= version)
    }

    /// Waits until `version` is durable; the error says why it cannot become so.
    pub async fn wait_saved(&self, version: u64) -> Result<(), String> {
        let mut saved = self.inner.saved.subscribe();
        let state = saved.wait_for(|s| !matches!(s, Ok(done) if *done < version)).await;
        match state.map(|s| s.clone()) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(why)) => Err(why),
            Err(_) => Err("the node is stopping".into()),
        }
    }
}

impl Inner {
    /// Writes the newest table, and again when it changed meanwhile.
    fn save_until_current(&self) {
        let mut done = None;
        loop {
            let (lines, version) = {
                let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
                if done == Some(table.version) || self.failed.borrow().is_some() {
                    table.saving = false;
                    return;
                }
                (table.lines(), table.version)
            };
            let _busy = self.io_times.enter("write", FILE, Waits::Somebody);
            let result = files::replace(&self.path, &lines);
            if let Err(why) = &result {
                tracing::error!("storage write error: boot counts of the other nodes were not saved: {why}");
            }
            match &result {
                Ok(()) => self.table.lock().unwrap_or_else(PoisonError::into_inner).saved = version,
                // The next message of a node whose boot is not saved has it tried again.
                Err(FileError::Full { .. }) => {}
                Err(failed) => drop(self.failed.send_replace(Some(failed.to_string()))),
            }
            drop(self.saved.send_replace(result.map(|()| version).map_err(|e| e.to_string())));
            done = Some(version);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_lower_boot_count_is_rejected_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let seen = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        let version = seen.observe(2, 7).unwrap();
        seen.wait_saved(version).await.unwrap();
        assert!(seen.is_saved(version));
        assert_eq!(seen.observe(2, 6), Err(StaleBoot { node_id: 2, boot: 6, highest: 7 }));
        drop(seen);
        let again = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        assert!(again.observe(2, 6).is_err());
        let known = again.observe(2, 7).unwrap();
        assert!(again.is_saved(known));
        let newer = again.observe(2, 8).unwrap();
        again.wait_saved(newer).await.unwrap();
        assert!(again.observe(3, 1).is_ok());
        // A copy that was taken at a stop and put back after one more run has the same count, and is another run.
        let run = again.observe(4, stemedb_net::boot_of(3, 17)).unwrap();
        again.wait_saved(run).await.unwrap();
        assert!(again.observe(4, stemedb_net::boot_of(3, 18)).is_err());
        assert!(again.observe(4, stemedb_net::boot_of(3, 17)).is_ok());
    }

    /// Waits until what is under way is done.
    async fn settled(seen: &SeenBoots) {
        while seen.inner.table.lock().unwrap().saving {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_disk_that_fails_under_it_is_left_alone_until_the_files_are_new() {
        let dir = tempfile::tempdir().unwrap();
        let seen = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        let in_the_way = dir.path().join("peers-seen.spare");
        std::fs::create_dir(&in_the_way).unwrap();
        let version = seen.observe(2, 1).unwrap();
        assert!(seen.wait_saved(version).await.is_err());
        assert!(seen.wait_failed().await.contains("peers-seen"), "nobody is told that the disk has failed");
        settled(&seen).await;
        std::fs::remove_dir(&in_the_way).unwrap();
        for boot in [1, 2] {
            let version = seen.observe(2, boot).unwrap();
            assert!(seen.wait_saved(version).await.is_err(), "it was tried again");
            settled(&seen).await;
        }
        assert!(!dir.path().join(FILE).exists());
        seen.begin_anew();
        settled(&seen).await;
        assert!(seen.is_saved(seen.observe(2, 2).unwrap()));
        assert!(SeenBoots::open(dir.path(), Arc::default()).unwrap().observe(2, 1).is_err());
    }

    #[tokio::test]
    async fn what_found_no_room_is_saved_once_there_is_some() {
        let dir = tempfile::tempdir().unwrap();
        let seen = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        let full = dir.path().join("peers-seen.spare");
        std::os::unix::fs::symlink("/dev/full", &full).unwrap();
        let version = seen.observe(2, 1).unwrap();
        assert!(seen.wait_saved(version).await.is_err());
        settled(&seen).await;
        assert!(seen.inner.failed.borrow().is_none(), "a disk without room has not failed");
        std::fs::remove_file(&full).unwrap();
        // The same boot again, as each further message of that node has it.
        let _saving = seen.observe(2, 1).unwrap();
        settled(&seen).await;
        assert!(seen.is_saved(seen.observe(2, 1).unwrap()), "it is not tried again");
        assert_eq!(SeenBoots::open(dir.path(), Arc::default()).unwrap().highest(2), Some(1));
    }
}
