//! Raising the cluster's feature level, and who knows which.
//!
//! The leader asks every member what its program knows, and raises the level when each has said that it knows a higher
//! one; a member that does not answer holds it, because whatever runs there will get the command. `cluster.feature_level_max`
//! makes a node say less than it knows: with it at any one node the level stays, and every node can go back to its
//! program before. What a level is for is told in `state::level`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use stemedb_net::{CallError, Lane, Refusal as NetRefusal, code};
use stemedb_raft::types::StoredMembership;

use super::{
    core::{Core, Role, Shared},
    kinds::Kind,
    messages::{pack_json, unpack_json},
    rebuild::grant::propose_op,
    rpc_server::FAILED,
    status::VERSION,
};
use crate::{
    config::Config,
    state::{
        command::{Operation, Outcome},
        engine::StateRead,
        keys,
        level::{FEATURE_LEVEL, RaiseLevel},
        members::MemberBook,
        permits::Book,
    },
};

/// How often a leader looks whether the level can be raised. An upgrade is over when its last node has come back, and
/// nobody waits for this.
const LOOK: Duration = Duration::from_secs(1);
/// How long a node may take to say what it knows.
const REPLY_MAX: Duration = Duration::from_millis(500);
/// The same of a node that is no member, or not yet again.
const STRANGER_REPLY_MAX: Duration = Duration::from_secs(2);

/// What stands for the version of a program that does not know the question.
const OLDER: &str = "an older program";

/// What a program says of itself, answer to `Kind::About`. Told in JSON: a later version adds fields, and whoever does
/// not know them reads on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct About {
    /// The node's name.
    pub name: String,
    /// Version of its program.
    pub version: String,
    /// The highest feature level that its program knows.
    pub feature_level_known: u32,
    /// The highest one that the cluster may be raised to for its sake: less than it knows where an operator holds it.
    pub feature_level_max: u32,
}

/// The highest level that the cluster may be raised to for the sake of a node with this configuration.
pub fn level_max(config: &Config) -> u32 {
    config.cluster.feature_level_max.min(FEATURE_LEVEL)
}

/// Handles `Kind::About`.
pub fn answer(shared: &Shared) -> Result<Bytes, NetRefusal> {
    pack_json(&own(shared)).map_err(|e| NetRefusal::new(FAILED, e.to_string()))
}

fn own(shared: &Shared) -> About {
    About {
        name: shared.name().to_owned(),
        version: VERSION.into(),
        feature_level_known: FEATURE_LEVEL,
        feature_level_max: level_max(&shared.config),
    }
}

/// What the node `name` knows; the error says why that is not known. Programs of level 0 do not know the question.
pub async fn ask_about(shared: &Shared, id: u64, name: &str, addr: &str) -> Result<About, String> {
    if name == shared.name() {
        return Ok(own(shared));
    }
    let known = id != 0;
    let peer = if known { shared.peers.to(id, addr, Lane::Control) } else { shared.peers.probe(addr) };
    // A stranger is connected to first.
    let reply_max = if known { REPLY_MAX } else { STRANGER_REPLY_MAX };
    let said = peer.call(Kind::About.number(), Bytes::new(), reply_max).await;
    if !known {
        peer.close();
    }
    let about: About = match said {
        Ok(body) => unpack_json(&body).map_err(|e| e.to_string())?,
        Err(CallError::Refused { code: code::UNKNOWN_KIND, .. }) => {
            return Ok(About { name: name.to_owned(), version: OLDER.into(), ..About::default() });
        }
        Err(error) => return Err(error.to_string()),
    };
    match about.name == name {
        true => Ok(about),
        false => Err(format!("{} answers at {addr}", about.name)),
    }
}

/// What each member knows, by Raft id, all asked at once.
pub async fn ask_members(shared: &Shared, membership: &StoredMembership) -> Vec<(u64, String, Result<About, String>)> {
    let asked = membership.nodes().map(|(id, member)| async move {
        let about = ask_about(shared, *id, &member.name, &member.peer_addr).await;
        (*id, member.name.clone(), about)
    });
    join_all(asked).await
}

/// Who keeps the cluster below `level`, each in a few words. Pure.
pub fn held_by(level: u32, members: &[(u64, String, Result<About, String>)]) -> Vec<String> {
    let why = |(_, name, about): &(u64, String, Result<About, String>)| match about {
        Err(why) => Some(format!("{name} does not say which levels it knows ({why})")),
        Ok(about) if about.feature_level_max < level => {
            let About { version, feature_level_known: known, feature_level_max: held, .. } = about;
            Some(match held < known {
                true => format!("{name} is held at level {held} by its cluster.feature_level_max"),
                false => format!("{name} ({version}) knows levels up to {known}"),
            })
        }
        Ok(_) => None,
    };
    members.iter().filter_map(why).collect()
}

/// The level that all can have. Pure.
fn common(members: &[(u64, String, Result<About, String>)]) -> Option<u32> {
    members.iter().map(|(_, _, about)| about.as_ref().ok().map(|about| about.feature_level_max)).min().flatten()
}

/// Who is on the way in, as this node has applied: the level waits for that one. Reads two rows, on a thread that may wait
/// for the disk.
pub async fn on_its_way(core: &Core) -> Result<Option<String>, String> {
    let view = core.state.view().ok_or("this node is stopping")?;
    let read = move || {
        let row = |key| view.snapshot.get(key).map_err(|e| e.to_string());
        let permits = Book::decode(row(keys::REBUILD_PERMITS)?.as_deref()).map_err(|e| e.to_string())?;
        let members = MemberBook::decode(row(keys::MEMBERS)?.as_deref()).map_err(|e| e.to_string())?;
        Ok(coming(&permits, &members, view.state.log_time_ms))
    };
    tokio::task::spawn_blocking(read).await.map_err(|e| e.to_string())?
}

/// Who is on the way in at that log time. Pure.
fn coming(permits: &Book, members: &MemberBook, log_time_ms: u64) -> Option<String> {
    if let Some(held) = permits.permit.as_ref().filter(|held| log_time_ms < held.expires_at_ms()) {
        return Some(format!("{} is being rebuilt", held.name));
    }
    let intent = members.current.as_ref()?;
    Some(format!("the {} of {} goes on", intent.change.word(), intent.name))
}

/// The level that this node has applied.
pub fn here(core: &Core) -> u32 {
    core.published().feature_level
}

/// Runs until the core ends.
pub async fn run(shared: Arc<Shared>) {
    let Some(core) = shared.core.get() else { return };
    let work = async {
        let mut said = String::new();
        loop {
            let leads = shared.view.borrow().role == Role::Leader && shared.silenced().is_none();
            if leads
                && here(core) < level_max(&shared.config)
                && let Err(why) = raise(&shared, core).await
                && why != said
            {
                tracing::info!("the feature level stays at {}: {why}", here(core));
                said = why;
            }
            let mut view = shared.view.subscribe();
            let led = view.borrow().role == Role::Leader;
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = view.wait_for(|view| (view.role == Role::Leader) != led) => {}
            }
        }
    };
    shared.core_stop.run_until_cancelled(work).await;
}

/// Raises the level as far as all members know; the error says why it stays.
async fn raise(shared: &Shared, core: &Core) -> Result<(), String> {
    // Confirms that this node leads, and that its membership is the one in force.
    let committed = core.leader_rounds.join().await?;
    let membership = core.raft_metrics().membership_config;
    if membership.log_id().is_none_or(|id| id.index > committed) {
        return Err("the last change of the members is not committed yet".into());
    }
    let members = ask_members(shared, &membership).await;
    let held = held_by(here(core) + 1, &members);
    let Some(level) = common(&members).filter(|_| held.is_empty()) else { return Err(held.join("; ")) };
    // It would be refused by the same rule; so nobody sees a refusal each second in the log.
    if let Some(why) = on_its_way(core).await? {
        return Err(why);
    }
    // Whoever has become a member meanwhile was not asked. Whoever comes from here on is still on its way when the raise is
    // applied, which then refuses it: nothing is awaited between this look and the command.
    if core.raft_metrics().membership_config.log_id() != membership.log_id() {
        return Err("the members have just changed".into());
    }
    match propose_op(shared, core, Operation::Level(RaiseLevel { level })).await? {
        Outcome::Applied(_) => {
            tracing::warn!(level, "the cluster's feature level was raised: programs that know less are refused now");
            Ok(())
        }
        other => Err(format!("{other:?}")),
    }
}

/// Why the level cannot be raised to `level` now, if so.
pub async fn lacks(shared: &Shared, core: &Core, level: u32) -> Option<String> {
    if here(core) >= level {
        return None;
    }
    let membership = core.raft_metrics().membership_config;
    let held = held_by(level, &ask_members(shared, &membership).await);
    (!held.is_empty()).then(|| held.join("; "))
}

/// Returns once this leader's state has reached `level`, which it raises when it can; the error says who holds it.
pub async fn require(shared: &Shared, core: &Core, level: u32) -> Result<(), String> {
    if here(core) >= level {
        return Ok(());
    }
    raise(shared, core).await?;
    let mut published = core.state.published();
    // The answer to the command leaves behind its publication.
    let reached = published.borrow_and_update().feature_level >= level;
    if reached { Ok(()) } else { Err(format!("the level is {} after it was raised", here(core))) }
}

/// Why a node must not be let in, if so: it would be sent a state that it must not open. One that does not answer is
/// let through: it may have come with another address. Its program refuses the state if it knows less.
pub async fn keeps_out(shared: &Shared, core: &Core, name: &str, addr: &str) -> Option<String> {
    let level = here(core);
    if level == 0 {
        return None;
    }
    match ask_about(shared, 0, name, addr).await {
        Err(why) => {
            tracing::info!(name, addr, why, "a node that wants in does not say which feature levels it knows");
            None
        }
        Ok(about) if about.feature_level_known < level => Some(format!(
            "{name} to be started with a newer program: the cluster has feature level {level}, and its own ({}) knows \
             levels up to {}",
            about.version, about.feature_level_known
        )),
        Ok(_) => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::state::{
        members::{Change, Intent},
        permits::Permit,
    };

    fn member(name: &str, known: u32, held: u32) -> (u64, String, Result<About, String>) {
        let (name, version) = (name.to_owned(), "0.1.0".to_owned());
        (1, name.clone(), Ok(About { name, version, feature_level_known: known, feature_level_max: held }))
    }

    #[test]
    fn the_level_rises_as_far_as_every_member_says() {
        let silent = (2, "c".to_owned(), Err("no route".to_owned()));
        let all = [member("a", 3, 3), member("b", 2, 2)];
        assert_eq!((held_by(2, &all), common(&all)), (vec![], Some(2)));
        assert_eq!(held_by(3, &all), ["b (0.1.0) knows levels up to 2"]);
        let held = [member("a", 3, 3), member("b", 3, 1)];
        assert_eq!(held_by(2, &held), ["b is held at level 1 by its cluster.feature_level_max"]);
        assert_eq!(common(&held), Some(1));
        let unheard = [member("a", 3, 3), silent];
        assert_eq!(held_by(1, &unheard), ["c does not say which levels it knows (no route)"]);
        assert_eq!(common(&unheard), None, "whoever is silent may know nothing");
        assert_eq!(common(&[]), None);
    }

    #[test]
    fn the_level_waits_for_whoever_is_on_the_way_in() {
        let permit = Permit {
            name: "b".into(),
            job: 1,
            old_id: 2,
            fresh_id: 9,
            granted_at_ms: 5_000,
            renewed_at_ms: 5_000,
            automatic: true,
        };
        let expires_at_ms = permit.expires_at_ms();
        let permits = Book { permit: Some(permit), ..Book::default() };
        let mut members = MemberBook::default();
        assert_eq!(coming(&Book::default(), &members, 5_000), None);
        assert_eq!(coming(&permits, &members, expires_at_ms - 1).as_deref(), Some("b is being rebuilt"));
        assert_eq!(coming(&permits, &members, expires_at_ms), None, "its id is void");
        members.current = Some(Intent {
            job: 1,
            change: Change::Add { learner: false },
            name: "d".into(),
            peer_addr: String::new(),
            http_addr: String::new(),
            forced: false,
            cause: String::new(),
            began_unix_ms: 0,
            place: None,
            leaves: vec![],
            changing: false,
            cancelled: false,
        });
        assert_eq!(coming(&Book::default(), &members, 0).as_deref(), Some("the member-add of d goes on"));
    }

    #[test]
    fn what_a_program_says_of_itself_is_read_by_those_that_know_more_or_less() {
        let later = br#"{"name":"a","version":"9.0.0","feature_level_known":7,"feature_level_max":6,"colour":"red"}"#;
        let body = [&[1, 0], &later[..]].concat();
        let about: About = unpack_json(&body).unwrap();
        assert_eq!((&*about.version, about.feature_level_known, about.feature_level_max), ("9.0.0", 7, 6));
        let bare: About = unpack_json(b"\x01\x00{\"name\":\"a\"}").unwrap();
        assert_eq!((bare.feature_level_known, bare.feature_level_max), (0, 0));
        // The bytes of today, which every later version must read.
        let now = pack_json(&member("a", 1, 0).2.unwrap()).unwrap();
        let frozen = br#"{"name":"a","version":"0.1.0","feature_level_known":1,"feature_level_max":0}"#;
        assert_eq!(&now[..], [&[1, 0], &frozen[..]].concat());
        assert!(unpack_json::<About>(&[2, 0, b'{', b'}']).unwrap_err().to_string().contains("format 2"));
    }

    #[test]
    fn a_hold_above_what_the_program_knows_is_none() {
        let mut config = Config::default();
        assert_eq!(level_max(&config), FEATURE_LEVEL);
        config.cluster.feature_level_max = FEATURE_LEVEL + 5;
        assert_eq!(level_max(&config), FEATURE_LEVEL);
        config.cluster.feature_level_max = 0;
        assert_eq!(level_max(&config), 0);
    }
}
