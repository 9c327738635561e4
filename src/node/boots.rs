//! The newest boot seen of each other node.
//!
//! A node that comes back with a lower boot count than it already had, or with the same one in another run, runs on an
//! old copy of its folder: its log or vote may be older than what it has promised, so nothing it says is taken.
//!
//! The counts are kept in the file `peers-seen`. What has to outlast a crash of this node is the memory of a run to which it
//! has promised something, a vote or the acknowledgement of an append: an earlier copy of that node must never be heard
//! again. So such an answer waits until the boot **of whom it goes to** is durable here ([`SeenBoots::wait_saved`]), and for
//! nobody else's: what is promised to one node says nothing about the runs of another. While there is no room for the
//! file, only nodes that have begun a new run since get no promises; the others, a quorum among them, go on. Answers that
//! this node receives are compared with what it has seen, and wait for nothing.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
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
    table: watch::Sender<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// The newest boot seen of each node.
    highest: BTreeMap<u64, u64>,
    /// What of that was last made durable.
    durable: BTreeMap<u64, u64>,
    saving: bool,
    /// Why the last try found no room.
    no_room: String,
    /// Why the disk has failed under the file, and that was no want of room. Nothing is written then, and nothing promised
    /// to anybody, until the files of the node were made anew.
    failed: Option<String>,
}

impl Table {
    /// Whether no run of that node before `boot` will ever be heard again.
    fn is_durable(&self, node_id: u64, boot: u64) -> bool {
        self.failed.is_none() && self.durable.get(&node_id).is_some_and(|durable| *durable >= boot)
    }

    /// Whether it has to be saved, by whoever asks, who then does so.
    fn begins_saving(&mut self) -> bool {
        let begins = !self.saving && self.failed.is_none() && self.durable != self.highest;
        self.saving |= begins;
        begins
    }
}

fn lines(boots: &BTreeMap<u64, u64>) -> String {
    boots.iter().map(|(id, boot)| format!("{id} {boot}\n")).collect()
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
        let table = Table { durable: highest.clone(), highest, ..Table::default() };
        Ok(SeenBoots { inner: Arc::new(Inner { path, io_times, table: watch::Sender::new(table) }) })
    }

    /// Writes what is known into another folder too, where the node goes on; durable on return. Blocking.
    pub fn save_to(&self, data_dir: &Path) -> Result<(), FileError> {
        let lines = lines(&self.inner.table.borrow().highest);
        files::replace(&data_dir.join(FILE), &lines)
    }

    /// The highest boot count seen of a node.
    pub fn highest(&self, node_id: u64) -> Option<u64> {
        self.inner.table.borrow().highest.get(&node_id).copied()
    }

    /// Notes that `node_id` speaks with `boot`, and has it saved, unless that is so or must not be tried.
    pub fn observe(&self, node_id: u64, boot: u64) -> Result<(), StaleBoot> {
        // Nearly every message says nothing new.
        let known = |table: &Table| table.highest.get(&node_id) == Some(&boot) && table.is_durable(node_id, boot);
        if known(&self.inner.table.borrow()) {
            return Ok(());
        }
        let mut stale = None;
        self.change(|table| match table.highest.get(&node_id).copied() {
            Some(highest) if is_old_copy(boot, highest) => stale = Some(StaleBoot { node_id, boot, highest }),
            Some(highest) if boot == highest => {}
            _ => drop(table.highest.insert(node_id, boot)),
        });
        stale.map_or(Ok(()), Err)
    }

    /// Has the table saved after `change`, also what found no room before.
    fn change(&self, change: impl FnOnce(&mut Table)) {
        let mut begins = false;
        self.inner.table.send_if_modified(|table| {
            change(table);
            begins = table.begins_saving();
            // Nobody waits for that.
            false
        });
        if begins {
            let inner = Arc::clone(&self.inner);
            tokio::task::spawn_blocking(move || inner.save_until_current());
        }
    }

    /// Returns why the disk has failed under the file, once it has.
    pub async fn wait_failed(&self) -> String {
        let mut table = self.inner.table.subscribe();
        let why = table.wait_for(|table| table.failed.is_some()).await.ok().and_then(|table| table.failed.clone());
        // Never an error: the sender lives as long as this borrow.
        why.unwrap_or_default()
    }

    /// The files of the node were made anew: nothing in them is known to be durable, and all of it is written now.
    pub fn begin_anew(&self) {
        self.change(|table| {
            table.failed = None;
            table.durable.clear();
        });
    }

    /// Whether this boot of that node is durable already.
    pub fn is_saved(&self, node_id: u64, boot: u64) -> bool {
        self.inner.table.borrow().is_durable(node_id, boot)
    }

    /// Waits until a boot that was observed is durable; the error says why it cannot become so.
    pub async fn wait_saved(&self, node_id: u64, boot: u64) -> Result<(), String> {
        let mut table = self.inner.table.subscribe();
        let settled = table.wait_for(|table| table.is_durable(node_id, boot) || !table.saving).await;
        match settled {
            Ok(table) if table.is_durable(node_id, boot) => Ok(()),
            Ok(table) => Err(table.failed.clone().unwrap_or_else(|| table.no_room.clone())),
            Err(_) => Err("the node is stopping".into()),
        }
    }
}

impl Inner {
    /// Writes the newest table, and again when it changed meanwhile.
    fn save_until_current(&self) {
        loop {
            let tried = self.table.borrow().highest.clone();
            let busy = self.io_times.enter("write", FILE, Waits::Somebody);
            let result = files::replace(&self.path, &lines(&tried));
            drop(busy);
            if let Err(why) = &result {
                tracing::error!("storage write error: boot counts of the other nodes were not saved: {why}");
            }
            let mut again = false;
            self.table.send_modify(|table| {
                again = table.highest != tried;
                match result {
                    Ok(()) => table.durable = tried,
                    // The next message of a node whose boot is not saved has it tried again.
                    Err(error @ FileError::Full { .. }) => table.no_room = error.to_string(),
                    Err(failed) => (table.failed, again) = (Some(failed.to_string()), false),
                }
                table.saving = again;
            });
            if !again {
                return;
            }
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
        seen.observe(2, 7).unwrap();
        seen.wait_saved(2, 7).await.unwrap();
        assert!(seen.is_saved(2, 7));
        assert_eq!(seen.observe(2, 6), Err(StaleBoot { node_id: 2, boot: 6, highest: 7 }));
        drop(seen);
        let again = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        assert!(again.observe(2, 6).is_err());
        again.observe(2, 7).unwrap();
        assert!(again.is_saved(2, 7));
        again.observe(2, 8).unwrap();
        again.wait_saved(2, 8).await.unwrap();
        assert!(again.observe(3, 1).is_ok());
        // A copy that was taken at a stop and put back after one more run has the same count, and is another run.
        let run = stemedb_net::boot_of(3, 17);
        again.observe(4, run).unwrap();
        again.wait_saved(4, run).await.unwrap();
        assert!(again.observe(4, stemedb_net::boot_of(3, 18)).is_err());
        assert!(again.observe(4, run).is_ok());
    }

    /// Waits until what is under way is done.
    async fn settled(seen: &SeenBoots) {
        seen.inner.table.subscribe().wait_for(|table| !table.saving).await.unwrap();
    }

    #[tokio::test]
    async fn a_disk_that_fails_under_it_is_left_alone_until_the_files_are_new() {
        let dir = tempfile::tempdir().unwrap();
        let seen = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        let in_the_way = dir.path().join("peers-seen.spare");
        std::fs::create_dir(&in_the_way).unwrap();
        seen.observe(2, 1).unwrap();
        assert!(seen.wait_saved(2, 1).await.is_err());
        assert!(seen.wait_failed().await.contains("peers-seen"), "nobody is told that the disk has failed");
        settled(&seen).await;
        std::fs::remove_dir(&in_the_way).unwrap();
        for boot in [1, 2] {
            seen.observe(2, boot).unwrap();
            assert!(seen.wait_saved(2, boot).await.is_err(), "it was tried again");
            settled(&seen).await;
        }
        assert!(!dir.path().join(FILE).exists());
        seen.begin_anew();
        settled(&seen).await;
        assert!(seen.is_saved(2, 2));
        assert!(SeenBoots::open(dir.path(), Arc::default()).unwrap().observe(2, 1).is_err());
    }

    #[tokio::test]
    async fn what_was_durable_in_the_old_files_is_written_into_the_new_ones() {
        let dir = tempfile::tempdir().unwrap();
        let seen = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        seen.observe(2, 1).unwrap();
        seen.wait_saved(2, 1).await.unwrap();
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        seen.begin_anew();
        assert!(!seen.is_saved(2, 1), "the file is gone");
        seen.wait_saved(2, 1).await.unwrap();
        assert_eq!(SeenBoots::open(dir.path(), Arc::default()).unwrap().highest(2), Some(1));
    }

    #[tokio::test]
    async fn what_found_no_room_is_saved_once_there_is_some() {
        let dir = tempfile::tempdir().unwrap();
        let seen = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        seen.observe(3, 5).unwrap();
        seen.wait_saved(3, 5).await.unwrap();
        let full = dir.path().join("peers-seen.spare");
        std::fs::remove_file(&full).unwrap();
        std::os::unix::fs::symlink("/dev/full", &full).unwrap();
        seen.observe(2, 1).unwrap();
        assert!(seen.wait_saved(2, 1).await.is_err());
        settled(&seen).await;
        assert!(seen.inner.table.borrow().failed.is_none(), "a disk without room has not failed");
        assert!(seen.is_saved(3, 5), "what was saved before is durable all the same");
        std::fs::remove_file(&full).unwrap();
        // The same boot again, as each further message of that node has it.
        seen.observe(2, 1).unwrap();
        settled(&seen).await;
        assert!(seen.is_saved(2, 1), "it is not tried again");
        assert_eq!(SeenBoots::open(dir.path(), Arc::default()).unwrap().highest(2), Some(1));
    }

    /// A file whose write hangs until this is dropped.
    struct Hangs(PathBuf);

    impl Hangs {
        fn new(path: PathBuf) -> Hangs {
            use rustix::fs::{CWD, FileType, Mode, mknodat};
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            Hangs(path)
        }
    }

    impl Drop for Hangs {
        fn drop(&mut self) {
            // A pipe is opened for writing once somebody reads from it; kept, because who writes may come later than this.
            std::mem::forget(std::fs::File::options().read(true).write(true).open(&self.0).unwrap());
        }
    }

    #[tokio::test]
    async fn while_one_boot_is_being_saved_those_of_others_hold() {
        let dir = tempfile::tempdir().unwrap();
        let seen = SeenBoots::open(dir.path(), Arc::default()).unwrap();
        seen.observe(2, 7).unwrap();
        seen.wait_saved(2, 7).await.unwrap();
        settled(&seen).await;
        let partner = dir.path().join("peers-seen.spare");
        std::fs::remove_file(&partner).unwrap();
        let hangs = Hangs::new(partner);
        seen.observe(3, 1).unwrap();
        seen.observe(2, 7).unwrap();
        assert!(seen.is_saved(2, 7) && !seen.is_saved(3, 1));
        tokio::time::timeout(std::time::Duration::from_secs(60), seen.wait_saved(2, 7)).await.unwrap().unwrap();
        // A newer run of that node is another matter.
        seen.observe(2, 8).unwrap();
        assert!(!seen.is_saved(2, 8));
        drop(hangs);
        settled(&seen).await;
    }
}
