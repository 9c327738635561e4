//! Who this node is: cluster, name, Raft id and boot count, in the file `identity`.
//!
//! The file is written last, after a log and a vote exist, so that its presence says that this
//! folder has belonged to a member. The boot count is raised and synced at each start, before any
//! message leaves: peers remember the highest they saw and reject a lower one, which is how a copy
//! of the folder that was put back is found out. The folder itself is locked for one process.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use stemedb_net::ClusterId;
use stemedb_raft::disk::folder_lock::{KernelLock, try_lock};

use super::files::{self, FileError};

/// Version of the file's form. A newer one is refused.
pub const IDENTITY_FORMAT: u32 = 1;

/// Name of the file in the data folder.
pub const IDENTITY_FILE: &str = "identity";

/// How often a locked folder is tried again until `storage.lock_timeout_ms` is over.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// Who a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster, chosen at random when it was formed.
    pub cluster_id: ClusterId,
    /// The stable name, as in the configuration.
    pub name: String,
    /// The Raft id, never used again for another node.
    pub raft_id: u64,
    /// Number of this start, counted from 1.
    pub boot: u64,
}

/// Why there is no usable identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file could not be read or written, or its checksum is wrong.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file was written by a newer version.
    #[error("identity has format {found}, and this version knows up to {IDENTITY_FORMAT}: run a newer version")]
    Newer {
        /// The format found.
        found: u32,
    },
    /// A line is not what it should be, although the checksum is right.
    #[error("identity: {0}")]
    Malformed(String),
    /// The folder belongs to another node.
    #[error("the data folder belongs to node {found:?}, and the configuration says {configured:?}")]
    OtherName {
        /// Name in the file.
        found: String,
        /// Name in the configuration.
        configured: String,
    },
}

/// A cluster id as 32 hexadecimal digits.
pub fn cluster_hex(id: &ClusterId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse_cluster(text: &str) -> Option<ClusterId> {
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

impl Identity {
    /// Writes the file; durable on return.
    pub fn save(&self, data_dir: &Path) -> Result<(), IdentityError> {
        let Identity { cluster_id, name, raft_id, boot } = self;
        let cluster = cluster_hex(cluster_id);
        let lines =
            format!("format {IDENTITY_FORMAT}\ncluster {cluster}\nname {name}\nraft_id {raft_id}\nboot {boot}\n");
        Ok(files::replace(&data_dir.join(IDENTITY_FILE), &lines)?)
    }

    /// Reads the file; `None` when there is none.
    pub fn load(data_dir: &Path) -> Result<Option<Identity>, IdentityError> {
        let Some(lines) = files::read(&data_dir.join(IDENTITY_FILE))? else { return Ok(None) };
        let mut rest = lines.lines();
        let mut field = |key: &str| -> Result<String, IdentityError> {
            let line = rest.next().unwrap_or_default();
            match line.split_once(' ') {
                Some((k, value)) if k == key => Ok(value.to_owned()),
                _ => Err(IdentityError::Malformed(format!("expected `{key} ...`, found {line:?}"))),
            }
        };
        fn number<T: std::str::FromStr>(key: &str, text: &str) -> Result<T, IdentityError> {
            text.parse().map_err(|_| IdentityError::Malformed(format!("{key} is {text:?}, not a number")))
        }
        let found: u32 = number("format", &field("format")?)?;
        if found > IDENTITY_FORMAT {
            return Err(IdentityError::Newer { found });
        }
        let cluster = field("cluster")?;
        let cluster_id =
            parse_cluster(&cluster).ok_or_else(|| IdentityError::Malformed(format!("cluster is {cluster:?}")))?;
        let name = field("name")?;
        let raft_id = number("raft_id", &field("raft_id")?)?;
        let boot = number("boot", &field("boot")?)?;
        Ok(Some(Identity { cluster_id, name, raft_id, boot }))
    }

    /// The boot under which this node speaks from now on, another one with each call: once per run.
    pub fn spoken_boot(&self) -> u64 {
        // The low half of such an id is drawn.
        let drawn = uuid::Uuid::now_v7().as_u128() & u128::from(u64::MAX);
        stemedb_net::boot_of(self.boot, u64::try_from(drawn).unwrap_or_default())
    }

    /// Checks the name, raises the boot count by one and saves it. Called once per start, before any
    /// message is sent under this identity.
    pub fn begin_boot(mut self, data_dir: &Path, configured: &str) -> Result<Identity, IdentityError> {
        if self.name != configured {
            return Err(IdentityError::OtherName { found: self.name, configured: configured.to_owned() });
        }
        self.boot = self.boot.saturating_add(1);
        self.save(data_dir)?;
        Ok(self)
    }
}

/// What the log of this folder holds, as far as its standing with the identity goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogContent {
    /// No vote and no entry.
    Nothing,
    /// The vote of term 0 that is written before the identity, and no entry: nothing was promised.
    Prepared,
    /// Entries, or a vote in an election.
    Used,
}

/// What to do with a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing here: form a cluster, or be given a place in one.
    Fresh,
    /// A member whose log was never used: it goes on waiting for its first leader, or forming.
    Assigned,
    /// A member with its log.
    Member,
    /// Do not start, for this reason.
    Refuse(String),
}

/// Sets identity, log and tree against each other. `tree_present`: the `kv` folder has files.
pub fn standing(identity: Option<&Identity>, log: LogContent, tree_present: bool) -> Standing {
    match (identity, log, tree_present) {
        (None, LogContent::Nothing | LogContent::Prepared, false) => Standing::Fresh,
        (None, LogContent::Nothing | LogContent::Prepared, true) => Standing::Refuse(
            "there is a kv folder, but neither an identity nor a log with entries: this folder has lost parts. \
             Keep it, and start this node with an empty data folder as a new member"
                .into(),
        ),
        (None, LogContent::Used, _) => Standing::Refuse(
            "there is a log, but no identity file: the node cannot know who it was, and starting it under a guessed id \
             could lose acknowledged writes. Put the identity file back, or start this node with an empty data folder as \
             a new member"
                .into(),
        ),
        (Some(id), LogContent::Nothing, _) => Standing::Refuse(format!(
            "identity says node {:?} with Raft id {}, but the log and its vote are missing: a voter that comes back without \
             them could elect a leader that lacks acknowledged writes. Put the log back, or replace this node by a new \
             member with an empty data folder",
            id.name, id.raft_id
        )),
        (Some(_), LogContent::Prepared, _) => Standing::Assigned,
        (Some(_), LogContent::Used, _) => Standing::Member,
    }
}

/// Why the folder could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("lock {} timeout after {waited_ms} ms: another process uses this data folder", path.display())]
    Taken {
        /// The lock file.
        path: PathBuf,
        /// How long was waited.
        waited_ms: u64,
    },
    /// The disk answered with an error.
    #[error("lock {}: {source}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

/// Locks `data_dir`, waiting up to `wait_ms` for another process to leave it.
pub async fn lock_folder(data_dir: &Path, wait_ms: u64) -> Result<KernelLock, LockError> {
    let path = data_dir.join("lock");
    let io = |source| LockError::Io { path: path.clone(), source };
    let until = tokio::time::Instant::now() + Duration::from_millis(wait_ms);
    loop {
        match try_lock(&path).map_err(io)? {
            Some(lock) => return Ok(lock),
            None if tokio::time::Instant::now() < until => tokio::time::sleep(LOCK_RETRY).await,
            None => return Err(LockError::Taken { path, waited_ms: wait_ms }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
    use super::*;

    fn sample() -> Identity {
        Identity { cluster_id: [7; 16], name: "node-1".into(), raft_id: 3, boot: 4 }
    }

    #[test]
    fn each_start_raises_the_boot_count_durably() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap(), None);
        sample().save(dir.path()).unwrap();
        let booted = Identity::load(dir.path()).unwrap().unwrap().begin_boot(dir.path(), "node-1").unwrap();
        assert_eq!(booted.boot, 5);
        assert_eq!(Identity::load(dir.path()).unwrap(), Some(booted));
    }

    #[test]
    fn another_name_and_a_newer_format_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(sample().begin_boot(dir.path(), "node-2"), Err(IdentityError::OtherName { .. })));
        files::replace(&dir.path().join(IDENTITY_FILE), "format 2\nanything\n").unwrap();
        let error = Identity::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("format 2") && error.to_string().contains("up to 1"), "{error}");
    }

    #[test]
    fn a_line_of_another_kind_is_named() {
        let dir = tempfile::tempdir().unwrap();
        files::replace(&dir.path().join(IDENTITY_FILE), "format 1\ncluster xyz\n").unwrap();
        assert!(Identity::load(dir.path()).unwrap_err().to_string().contains("xyz"));
    }

    #[test]
    fn every_combination_of_identity_log_and_tree_has_its_answer() {
        use LogContent::*;
        let id = sample();
        for tree in [false, true] {
            assert!(matches!(standing(None, Used, tree), Standing::Refuse(_)));
            assert!(matches!(standing(Some(&id), Nothing, tree), Standing::Refuse(_)));
            assert_eq!(standing(Some(&id), Prepared, tree), Standing::Assigned);
            assert_eq!(standing(Some(&id), Used, tree), Standing::Member);
        }
        for log in [Nothing, Prepared] {
            assert_eq!(standing(None, log, false), Standing::Fresh);
            assert!(matches!(standing(None, log, true), Standing::Refuse(_)));
        }
    }

    #[tokio::test]
    async fn a_locked_folder_is_refused_and_free_after_the_lock_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock_folder(dir.path(), 0).await.unwrap();
        let error = lock_folder(dir.path(), 0).await.unwrap_err();
        assert!(error.to_string().contains("timeout"), "{error}");
        drop(first);
        drop(lock_folder(dir.path(), 0).await.unwrap());
    }
}
