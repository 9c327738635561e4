//! `<data>/rebuild/job`: how far a rebuild has come, so that a killed process goes on with it.
//!
//! While this file is there, no Raft core starts under the old id: the permit may have been granted on the word that
//! it has ended. The file is replaced as a whole and synced before the step that it announces.

use std::{fs, path::Path, str::FromStr};

use stemedb_net::ClusterId;
use stemedb_raft::types::Member;

use super::messages::KnownMember;
use crate::{
    admin::rebuild::Phase,
    node::files::{self, FileError},
};

const FORMAT: u32 = 1;

/// The content of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Journal {
    /// This node's number for the rebuild.
    pub job: u128,
    /// How far it is.
    pub phase: Phase,
    /// Why it was begun, one line.
    pub why: String,
    /// Whether the node decided by itself.
    pub automatic: bool,
    /// The only source to pull from, if an operator named one.
    pub from: Option<String>,
    /// When it was begun, Unix milliseconds.
    pub began_unix_ms: u64,
    /// Whether the old files were put away already, by this rebuild or one before it.
    pub emptied: bool,
    /// The cluster; all zero: not known yet.
    pub cluster_id: ClusterId,
    /// The fresh id; 0: none yet.
    pub fresh_id: u64,
    /// The leader at the grant; 0: none known.
    pub leader: u64,
    /// The members, as far as they are known.
    pub members: Vec<KnownMember>,
}

fn file(data_dir: &Path) -> std::path::PathBuf {
    data_dir.join("rebuild").join("job")
}

impl Journal {
    /// Writes the file; durable on return. Blocking.
    pub fn save(&self, data_dir: &Path) -> Result<(), FileError> {
        let path = file(data_dir);
        let io = |operation| {
            let path = path.clone();
            move |source| FileError::Io { operation, path, source }
        };
        crate::state::engine::folder::create_synced(&data_dir.join("rebuild")).map_err(io("create the folder of"))?;
        let Journal { job, phase, why, automatic, from, began_unix_ms, emptied, cluster_id, fresh_id, leader, members } =
            self;
        let cluster = u128::from_be_bytes(*cluster_id);
        let mut lines = format!(
            "format {FORMAT}\njob {job:032x}\nphase {}\nautomatic {automatic}\nbegan_unix_ms {began_unix_ms}\nemptied \
             {emptied}\ncluster {cluster:032x}\nfresh_id {fresh_id}\nleader {leader}\nfrom {}\nwhy {}\n",
            phase.word(),
            from.as_deref().unwrap_or_default(),
            why.replace('\n', " ")
        );
        for KnownMember { id, member, voter } in members {
            let Member { name, peer_addr, http_addr } = member;
            lines.push_str(&format!("member {id} {voter} {name} {peer_addr} {http_addr}\n"));
        }
        files::replace(&path, &lines)
    }

    /// Reads the file; `None` when there is none. Blocking.
    pub fn load(data_dir: &Path) -> Result<Option<Journal>, FileError> {
        let path = file(data_dir);
        let Some(lines) = files::read(&path)? else { return Ok(None) };
        let damaged = |line: &str| FileError::Damaged { path: path.clone(), why: format!("line {line:?}") };
        let mut journal = Journal::default();
        for line in lines.lines() {
            let (key, value) = line.split_once(' ').ok_or_else(|| damaged(line))?;
            journal.take(key, value).ok_or_else(|| damaged(line))?;
        }
        Ok(Some(journal))
    }

    fn take(&mut self, key: &str, value: &str) -> Option<()> {
        fn read<T: FromStr>(text: &str) -> Option<T> {
            text.parse().ok()
        }
        match key {
            "format" => (read::<u32>(value)? <= FORMAT).then_some(())?,
            "job" => self.job = u128::from_str_radix(value, 16).ok()?,
            "phase" => self.phase = Phase::of(value)?,
            "automatic" => self.automatic = read(value)?,
            "began_unix_ms" => self.began_unix_ms = read(value)?,
            "emptied" => self.emptied = read(value)?,
            "cluster" => self.cluster_id = u128::from_str_radix(value, 16).ok()?.to_be_bytes(),
            "fresh_id" => self.fresh_id = read(value)?,
            "leader" => self.leader = read(value)?,
            "from" => self.from = (!value.is_empty()).then(|| value.to_owned()),
            "why" => self.why = value.to_owned(),
            "member" => {
                let mut words = value.split(' ');
                let mut word = || words.next();
                let (id, voter) = (read(word()?)?, read(word()?)?);
                let member = Member {
                    name: word()?.into(),
                    peer_addr: word()?.into(),
                    http_addr: word().unwrap_or_default().into(),
                };
                self.members.push(KnownMember { id, member, voter });
            }
            _ => return None,
        }
        Some(())
    }

    /// Removes the file; durable on return. Blocking.
    pub fn remove(data_dir: &Path) -> Result<(), FileError> {
        let path = file(data_dir);
        let io = |operation| {
            let path = path.clone();
            move |source| FileError::Io { operation, path, source }
        };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io("remove")(error)),
            _ => {}
        }
        crate::state::engine::folder::sync(&data_dir.join("rebuild")).map_err(io("sync the folder of"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_saved_is_read_and_a_newer_form_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Journal::load(dir.path()).unwrap(), None);
        let member = Member { name: "b".into(), peer_addr: "h:1".into(), http_addr: String::new() };
        let journal = Journal {
            job: 77,
            phase: Phase::Pulled,
            why: "two\nlines".into(),
            automatic: true,
            from: Some("b".into()),
            began_unix_ms: 5,
            emptied: false,
            cluster_id: [9; 16],
            fresh_id: 12,
            leader: 2,
            members: vec![KnownMember { id: 2, member, voter: true }],
        };
        journal.save(dir.path()).unwrap();
        let read = Journal::load(dir.path()).unwrap().unwrap();
        assert_eq!(read, Journal { why: "two lines".into(), ..journal });
        Journal::default().save(dir.path()).unwrap();
        assert_eq!(Journal::load(dir.path()).unwrap(), Some(Journal::default()));
        files::replace(&file(dir.path()), "format 2\nanything\n").unwrap();
        assert!(Journal::load(dir.path()).is_err());
        Journal::remove(dir.path()).unwrap();
        Journal::remove(dir.path()).unwrap();
        assert_eq!(Journal::load(dir.path()).unwrap(), None);
    }
}
