//! A node learns that it was removed, and keeps that.
//!
//! Nobody sends the log to a removed node any more, so it cannot read there that it was. It asks the others whenever it
//! finds itself outside of the members or without a leader, or is told to look. What they say of a removed id is true for
//! ever, so it ends its Raft core, notes it in `<data>/removed`, and never starts Raft under that id again. Clients go on
//! being answered through the others for as long as load balancers need to notice; then everything is refused.

use std::{
    path::Path,
    sync::{Arc, PoisonError},
    time::Duration,
};

use stemedb_net::ClusterId;
use tokio::time::Instant;

use super::{
    desk::Gone,
    standing::{self, Standing, StandingAsk},
};
use crate::{
    clock,
    node::{
        core::{Role, Shared},
        files::{self, FileError},
        process::Process,
    },
    state::members::Removed,
};

/// How often a node without a leader, or outside of the members, asks.
const ASK_INTERVAL: Duration = Duration::from_millis(500);

/// The content of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// One sentence.
    pub why: String,
}

impl Mark {
    /// Writes the file; durable on return. Blocking.
    pub fn save(&self, data_dir: &Path) -> Result<(), FileError> {
        files::replace(&data_dir.join("removed"), &format!("format 1\nwhy {}\n", self.why.replace('\n', " ")))
    }

    /// Reads the file; `None` when there is none. Blocking.
    pub fn load(data_dir: &Path) -> Result<Option<Mark>, FileError> {
        let path = data_dir.join("removed");
        let Some(lines) = files::read(&path)? else { return Ok(None) };
        match lines.lines().find_map(|line| line.strip_prefix("why ")) {
            Some(why) => Ok(Some(Mark { why: why.to_owned() })),
            None => Err(FileError::Damaged { path, why: "it gives no reason".into() }),
        }
    }
}

/// `addr`: where the peer listener of this node is, by its own configuration.
fn sentence(own_name: &str, addr: Option<&str>, removed: &Removed) -> String {
    let addr = addr.unwrap_or("HOST:PORT");
    let instead = removed.replaced_by.as_ref().map_or_else(String::new, |by| format!(", and {by} has taken its place"));
    format!(
        "{own_name} was removed from the cluster under its Raft id {}{instead}. To have it back, stop it, move its data \
         folder away, start it and run `stemedb member add {own_name} --addr {addr}`",
        removed.id
    )
}

/// Looks after it until the process stops.
pub async fn follow(process: Arc<Process>) {
    while !process.stop.is_cancelled() && process.members.removed().is_none() {
        let told = tokio::select! {
            () = process.stop.cancelled() => return,
            () = process.members.look_again.notified() => true,
            () = tokio::time::sleep(ASK_INTERVAL) => false,
        };
        let Some(shared) = process.current() else { continue };
        let Some((cluster_id, raft_id)) = (**shared.identity.load()).as_ref().map(|id| (id.cluster_id, id.raft_id))
        else {
            continue;
        };
        if !told && !is_in_doubt(&shared, raft_id) {
            continue;
        }
        if let Some(removed) = ask(&process, &shared, cluster_id, raft_id).await {
            leave(&process, &shared, &removed).await;
        }
    }
}

fn is_in_doubt(shared: &Shared, raft_id: u64) -> bool {
    let (leads, unsure) = {
        let view = shared.view.borrow();
        (view.role == Role::Leader, view.leader.is_none() || view.membership.get_node(&raft_id).is_none())
    };
    // A node that comes back goes on naming the leader of its last term, which sends it nothing.
    let freshness = *shared.freshness.lock().unwrap_or_else(PoisonError::into_inner);
    let patience_ms = shared.config.cluster.election_max_ms.saturating_mul(2);
    let silent = freshness.silence_ms(clock::monotonic_ms()).is_none_or(|ms| ms > patience_ms);
    unsure || (!leads && silent)
}

async fn ask(process: &Process, shared: &Shared, cluster_id: ClusterId, raft_id: u64) -> Option<Removed> {
    let own = shared.name();
    let membership = Arc::clone(&shared.view.borrow().membership);
    let mut addresses: Vec<String> = process.peers.iter().filter(|p| p.name != own).map(|p| p.addr.clone()).collect();
    for (_, member) in membership.nodes().filter(|(id, member)| **id != raft_id && member.name != own) {
        if !addresses.contains(&member.peer_addr) {
            addresses.push(member.peer_addr.clone());
        }
    }
    let question = StandingAsk { cluster_id: Some(cluster_id), name: own.to_owned(), raft_id };
    match standing::ask(shared, addresses, &question).await {
        Some(Standing::Removed(removed)) => Some(removed),
        _ => None,
    }
}

async fn leave(process: &Arc<Process>, shared: &Arc<Shared>, removed: &Removed) {
    let own = process.peers.iter().find(|peer| peer.name == shared.name());
    let why = sentence(shared.name(), own.map(|peer| &*peer.addr), removed);
    tracing::warn!("{why}");
    let (mark, data_dir) = (Mark { why: why.clone() }, process.config.node.data_dir.clone());
    match tokio::task::spawn_blocking(move || mark.save(&data_dir)).await {
        Ok(Ok(())) => {}
        // It learns it again at the next start, from the others.
        Ok(Err(error)) => tracing::warn!(%error, "that it was removed could not be noted on the disk"),
        Err(error) => tracing::warn!(%error, "that it was removed could not be noted on the disk"),
    }
    let notice = Duration::from_millis(process.config.cluster.drain_notice_ms);
    process.members.set_removed(Gone { why: why.clone(), refuses_from: Instant::now() + notice });
    process.retire(shared, &why).await;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn that_a_node_was_removed_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Mark::load(dir.path()).unwrap(), None);
        let removed = Removed { id: 3, name: "c".into(), replaced_by: Some("d".into()), at_unix_ms: 5 };
        let mark = Mark { why: sentence("c", Some("c:1"), &removed) };
        assert!(mark.why.ends_with("run `stemedb member add c --addr c:1`"), "{}", mark.why);
        assert!(
            sentence("c", None, &removed).ends_with("--addr HOST:PORT`"),
            "the line can be used as it is but for that"
        );
        assert!(mark.why.contains("Raft id 3, and d has taken its place"), "{}", mark.why);
        mark.save(dir.path()).unwrap();
        assert_eq!(Mark::load(dir.path()).unwrap(), Some(mark));
        let path = dir.path().join("removed");
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace("why", "who")).unwrap();
        assert!(Mark::load(dir.path()).is_err());
    }
}
