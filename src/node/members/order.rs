//! Orders of operators about members: everything that can be wrong with one is found before anything is begun.

use std::sync::Arc;

use serde::Serialize;
use stemedb_raft::types::StoredMembership;
use tokio::{
    net::TcpStream,
    time::{Duration, Instant, sleep, timeout},
};

use super::{
    MemberError, book,
    candidate::{Candidate, candidate},
    ids_of, is_joint,
    lead::{ORDER_LEAVE, leave, outlook, propose},
};
use crate::{
    admin::member::{self, Kind, Outlook},
    clock,
    node::{
        core::{Core, Role, Shared},
        flows::{Asked, ask_all, lags},
        level,
        process::Process,
        read,
        rebuild::{
            desk::{JobReport, job_id},
            fail_point,
        },
    },
    state::{
        command::{MemberCommand, Refusal},
        level::LEVEL_MEMBERS,
        members::{Change, Intent},
    },
};

/// How long this node may take to apply what is committed.
const APPLIED_MAX: Duration = Duration::from_secs(10);

/// How long a connection to the HTTP listener of a node may take.
const CONNECT_MAX: Duration = Duration::from_secs(2);

/// How long the others may take to show a new leader how far their logs are, and how often it is looked at.
const LAG_KNOWN_MAX: Duration = Duration::from_secs(2);
const LAG_LOOK: Duration = Duration::from_millis(20);

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberOrder {
    /// A node comes.
    Add {
        /// Its name.
        name: String,
        /// `host:port` of its peer listener.
        addr: String,
        /// `host:port` of its HTTP listener; by default what it says itself.
        http: Option<String>,
        /// It gets no vote.
        learner: bool,
    },
    /// A node leaves.
    Remove {
        /// Its name.
        name: String,
    },
    /// A node comes in the place of another one.
    Replace {
        /// Name of the one that leaves.
        old: String,
        /// Name of the one that comes.
        name: String,
        /// `host:port` of its peer listener.
        addr: String,
        /// `host:port` of its HTTP listener; by default what it says itself.
        http: Option<String>,
    },
}

/// What an order would do.
#[derive(Clone, Debug, Serialize)]
pub struct MemberPlan {
    /// `member-add`, `member-remove` or `member-replace`.
    pub kind: &'static str,
    /// The node that comes, or leaves when none comes.
    pub node: String,
    /// The node whose place it takes.
    pub replaces: Option<String>,
    /// It gets no vote.
    pub learner: bool,
    /// Always true.
    pub dry_run: bool,
    /// Whether it would be begun, without `force` if that was not given.
    pub allowed: bool,
    /// Why not, or what it would do to fault tolerance.
    pub detail: String,
    /// Voters now and afterwards, and how many of them may fail.
    pub outlook: Outlook,
    /// Whether the node that leaves leads, so that leadership would move first.
    pub leads: bool,
}

/// What came of an order.
#[derive(Clone, Debug)]
pub enum Ordered {
    /// The job's id.
    Begun(String),
    /// Only a plan was wanted.
    Plan(Box<MemberPlan>),
}

fn leading(process: &Process) -> Result<Arc<Shared>, MemberError> {
    let Some(shared) = process.current() else { return Err(MemberError::NotLeader(None)) };
    let (leads, leader) = {
        let view = shared.view.borrow();
        let elsewhere = view.leader.as_ref().filter(|leader| !leader.here).map(|leader| leader.name.clone());
        (view.role == Role::Leader, elsewhere)
    };
    let well = shared.core.get().is_some() && shared.silenced().is_none();
    if leads && well { Ok(shared) } else { Err(MemberError::NotLeader(leader)) }
}

/// What has been applied up to what is committed now, confirmed by a majority.
async fn confirmed(shared: &Shared, core: &Core) -> Result<(), MemberError> {
    let committed = core.leader_rounds.join().await.map_err(|_| MemberError::NotLeader(None))?;
    read::wait_applied(shared, committed, Instant::now() + APPLIED_MAX)
        .await
        .map_err(|e| MemberError::Impossible(format!("this node does not apply what is committed ({e:?})")))
}

fn names(membership: &StoredMembership) -> Vec<String> {
    let mut names: Vec<String> = membership.nodes().map(|(_, member)| member.name.clone()).collect();
    names.sort();
    names.dedup();
    names
}

fn known(membership: &StoredMembership, name: &str) -> Result<(), MemberError> {
    match ids_of(membership, name).is_empty() {
        true => Err(MemberError::Unknown { name: name.to_owned(), members: names(membership) }),
        false => Ok(()),
    }
}

/// Whether name and addresses of a node that is to come are free. Pure.
fn free(membership: &StoredMembership, name: &str, addr: &str, http: &str) -> Result<(), MemberError> {
    for (_, member) in membership.nodes() {
        for what in [name, addr, http] {
            let taken = [&member.name, &member.peer_addr, &member.http_addr].iter().any(|own| **own == what);
            if taken && !what.is_empty() {
                return Err(MemberError::Exists { what: what.to_owned(), by: member.name.clone() });
            }
        }
    }
    Ok(())
}

/// Whether the node that answers can come under that name. Pure.
fn fit(said: &Candidate, name: &str, addr: &str, own_cluster: [u8; 16], votes: bool) -> Result<(), MemberError> {
    let unfit = |why: String| Err(MemberError::Unfit(why));
    if said.name != name {
        return unfit(format!(
            "the node at {addr} is called {:?}, not {name:?}: correct its node.name, the name or the address",
            said.name
        ));
    }
    if said.cluster_id.is_some_and(|theirs| theirs != own_cluster) {
        return unfit(format!(
            "the folder of {name} belongs to another cluster: move it away, and start the node with an empty one"
        ));
    }
    if !said.empty {
        let what = match said.raft_id {
            0 => "it was a member's".to_owned(),
            id => format!("it has Raft id {id} there"),
        };
        return unfit(format!(
            "the folder of {name} is not empty ({what}): move it away, and start the node with an empty one"
        ));
    }
    if said.learner && votes {
        return unfit(format!(
            "{name} has cluster.role = \"learner\" and never votes: change that, or name a learner to be replaced"
        ));
    }
    Ok(())
}

/// Whether a voter that answers is held not to work only because of its log.
fn some_lag(shared: &Shared, core: &Core, asked: &[Asked]) -> bool {
    let lag = lags(shared, core);
    asked.iter().any(|other| other.voter && other.status.is_ok() && member::lags(lag(other.id)).is_some())
}

/// Takes an order, or says what it would do.
pub async fn order(
    process: &Arc<Process>,
    order: MemberOrder,
    forced: bool,
    dry_run: bool,
) -> Result<Ordered, MemberError> {
    let shared = leading(process)?;
    let core = shared.core.get().ok_or(MemberError::NotLeader(None))?;
    confirmed(&shared, core).await?;
    if let Some(current) = book(&shared).await.map_err(MemberError::Impossible)?.current {
        return Err(MemberError::Busy(Box::new(shared.members.report(&current))));
    }
    let membership = core.raft_metrics().membership_config;
    let intent = intended(&shared, &membership, order, forced).await?;
    let asked = ask_all(&shared).await;
    // A learner takes nothing from the voters and gives them nothing.
    let voters = is_about_voters(&membership, &intent);
    let shown = if voters { intent.clone() } else { without_voters(&intent) };
    let kind = match (intent.coming(), intent.leaving()) {
        (Some(_), None) => Kind::Add,
        (Some(_), Some(_)) => Kind::Replace,
        (None, _) => Kind::Remove,
    };
    let until = Instant::now() + LAG_KNOWN_MAX;
    let (outlook, refusal) = loop {
        let outlook = outlook(&shared, core, &membership, &asked, &shown);
        let refusal = if voters { outlook.refusal(kind, forced) } else { None };
        if refusal.is_none() || !some_lag(&shared, core, &asked) || Instant::now() >= until {
            break (outlook, refusal);
        }
        sleep(LAG_LOOK).await;
    };
    let refusal = refusal.or_else(|| is_joint(&membership).then(|| "a change of the members is half done".to_owned()));
    let leads = intent.leaving() == Some(shared.name());
    if let Some(why) = level::lacks(&shared, core, LEVEL_MEMBERS).await {
        return Err(MemberError::Level { level: level::here(core), why });
    }
    if dry_run {
        return Ok(Ordered::Plan(Box::new(MemberPlan {
            kind: intent.change.word(),
            node: intent.name.clone(),
            replaces: intent.coming().and(intent.leaving()).map(str::to_owned),
            learner: intent.stays_learner(),
            dry_run,
            allowed: refusal.is_none(),
            detail: refusal.unwrap_or_else(|| outlook.words()),
            outlook,
            leads,
        })));
    }
    if let Some(why) = refusal {
        let forcible = voters && !forced && outlook.refusal(kind, true).is_none();
        return Err(MemberError::Unsafe { outlook: Box::new(outlook), why, forcible });
    }
    if leads {
        // The next leader takes the order: a node that leaves hears nothing of what comes after.
        if fail_point::hit(&shared.config.node.data_dir, ORDER_LEAVE).is_err() {
            shared.core_stop.cancelled().await;
        }
        leave(&shared, core, asked).await.map_err(MemberError::Impossible)?;
        let leader = shared.view.borrow().leader.as_ref().filter(|leader| !leader.here).map(|l| l.name.clone());
        return Err(MemberError::NotLeader(leader));
    }
    if let Err(why) = level::require(&shared, core, LEVEL_MEMBERS).await {
        return Err(MemberError::Level { level: level::here(core), why });
    }
    let job = intent.job;
    tracing::warn!(kind = intent.change.word(), name = intent.name, "an operator changes the members");
    match propose(&shared, core, MemberCommand::Begin(Box::new(intent))).await {
        Ok(Ok(_)) => {
            shared.members.wake.notify_one();
            Ok(Ordered::Begun(job_id(job)))
        }
        Ok(Err(Refusal::MembersBusy { job, kind, name })) => {
            let busy =
                JobReport { id: job_id(job), kind: word(&kind), node: name, cluster: true, ..JobReport::default() };
            Err(MemberError::Busy(Box::new(busy)))
        }
        Ok(Err(refusal)) => Err(MemberError::Impossible(format!("{refusal:?}"))),
        Err(why) => Err(MemberError::OutcomeUnknown { job: job_id(job), why }),
    }
}

fn word(kind: &str) -> &'static str {
    [Change::Remove, Change::Add { learner: false }, Change::Replace { old: String::new(), learner: false }]
        .iter()
        .map(Change::word)
        .find(|word| *word == kind)
        .unwrap_or("member change")
}

/// Whether the voters change.
fn is_about_voters(membership: &StoredMembership, intent: &Intent) -> bool {
    let leaves_vote = intent.leaving().is_some_and(|name| {
        let ids = ids_of(membership, name);
        membership.voter_ids().any(|id| ids.contains(&id))
    });
    leaves_vote || (intent.coming().is_some() && !intent.stays_learner())
}

/// The same as if nobody came or left, to count the voters as they are and stay.
fn without_voters(intent: &Intent) -> Intent {
    Intent { change: Change::Add { learner: true }, ..intent.clone() }
}

async fn intended(
    shared: &Shared,
    membership: &StoredMembership,
    order: MemberOrder,
    forced: bool,
) -> Result<Intent, MemberError> {
    let (name, addr, http, change) = match order {
        MemberOrder::Remove { name } => {
            known(membership, &name)?;
            let member = membership.nodes().map(|(_, member)| member).find(|member| member.name == name);
            let (addr, http) = member.map(|m| (m.peer_addr.clone(), m.http_addr.clone())).unwrap_or_default();
            return Ok(new_intent(Change::Remove, name, addr, http, forced));
        }
        MemberOrder::Add { name, addr, http, learner } => (name, addr, http, Change::Add { learner }),
        MemberOrder::Replace { old, name, addr, http } => {
            known(membership, &old)?;
            let ids = ids_of(membership, &old);
            let learner = !membership.voter_ids().any(|id| ids.contains(&id));
            if old == name {
                return Err(MemberError::Exists { what: name, by: old });
            }
            (name, addr, http, Change::Replace { old, learner })
        }
    };
    free(membership, &name, &addr, http.as_deref().unwrap_or_default())?;
    let said = candidate(shared, &addr).await.map_err(|why| MemberError::Unreachable { addr: addr.clone(), why })?;
    let own_cluster = (**shared.identity.load()).as_ref().map(|id| id.cluster_id).unwrap_or_default();
    // Who is configured as a learner comes as one.
    let change = match change {
        Change::Add { learner } => Change::Add { learner: learner || said.learner },
        change => change,
    };
    let votes = !matches!(change, Change::Add { learner: true } | Change::Replace { learner: true, .. });
    fit(&said, &name, &addr, own_cluster, votes)?;
    if said.raft_id != 0 && membership.get_node(&said.raft_id).is_some() {
        return Err(MemberError::Exists { what: format!("Raft id {}", said.raft_id), by: name });
    }
    if let Some(http) = http.as_ref().filter(|http| **http != said.http_addr) {
        listens(http).await.map_err(|why| {
            MemberError::Unfit(format!(
                "nobody listens for the clients of {name} at {http} ({why}), and {name} itself says {:?}: correct the HTTP \
                 address, or leave it out",
                said.http_addr
            ))
        })?;
    }
    let http = http.unwrap_or_else(|| said.http_addr.clone());
    free(membership, &name, &addr, &http)?;
    Ok(new_intent(change, name, addr, http, forced))
}

/// Whether anybody listens at `addr`: a member whose address is wrong cannot be drained, rebuilt or asked through
/// others.
async fn listens(addr: &str) -> Result<(), String> {
    match timeout(CONNECT_MAX, TcpStream::connect(addr)).await {
        Ok(connected) => connected.map(drop).map_err(|e| e.to_string()),
        Err(_) => Err(format!("no connection within {CONNECT_MAX:?}")),
    }
}

fn new_intent(change: Change, name: String, peer_addr: String, http_addr: String, forced: bool) -> Intent {
    Intent {
        job: uuid::Uuid::now_v7().as_u128(),
        change,
        name,
        peer_addr,
        http_addr,
        forced,
        cause: "an operator".to_owned(),
        began_unix_ms: clock::unix_ms(),
        place: None,
        leaves: Vec::new(),
        changing: false,
        cancelled: false,
    }
}

/// Why a change of the members is not cancelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotUndone {
    /// This node does not lead; the name of the one that does.
    NotLeader(Option<String>),
    /// There is no such change, or it has ended, or the voters are changing.
    No(String),
    /// It was proposed, and what came of it was not heard: why.
    OutcomeUnknown(String),
}

/// Cancels a change of the members, where that is safe. The leader undoes it.
pub async fn cancel(process: &Arc<Process>, id: &str) -> Result<(), NotUndone> {
    let shared = leading(process).map_err(|error| match error {
        MemberError::NotLeader(leader) => NotUndone::NotLeader(leader),
        error => NotUndone::No(error.to_string()),
    })?;
    let core = shared.core.get().ok_or(NotUndone::NotLeader(None))?;
    let job = uuid::Uuid::parse_str(id).map_err(|_| NotUndone::No("there is no such job".to_owned()))?.as_u128();
    match propose(&shared, core, MemberCommand::Cancel { job }).await {
        Ok(Ok(_)) => {
            shared.members.wake.notify_one();
            Ok(())
        }
        Ok(Err(_)) => Err(NotUndone::No("it has ended, or the voters are changing, which ends by itself".to_owned())),
        Err(why) => Err(NotUndone::OutcomeUnknown(why)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use openraft::Membership;
    use stemedb_raft::types::Member;

    use super::*;

    fn membership() -> StoredMembership {
        let member =
            |name: &str| Member { name: name.into(), peer_addr: format!("{name}:1"), http_addr: format!("{name}:2") };
        let nodes = BTreeMap::from([(1, member("a")), (2, member("b")), (7, member("l"))]);
        StoredMembership::new(None, Membership::new(vec![[1, 2].into()], nodes).unwrap())
    }

    #[test]
    fn a_taken_name_or_address_is_refused_with_whose_it_is() {
        free(&membership(), "d", "d:1", "d:2").unwrap();
        free(&membership(), "d", "d:1", "").unwrap();
        for (name, addr, http, what) in
            [("a", "d:1", "d:2", "a"), ("d", "b:1", "d:2", "b:1"), ("d", "d:1", "l:2", "l:2"), ("d", "b:2", "", "b:2")]
        {
            let Err(MemberError::Exists { what: taken, .. }) = free(&membership(), name, addr, http) else {
                unreachable!("{name} {addr} {http}")
            };
            assert_eq!(taken, what);
        }
        assert!(known(&membership(), "l").is_ok());
        let unknown = known(&membership(), "x").unwrap_err().to_string();
        assert!(unknown.contains("a, b, l"), "{unknown}");
    }

    #[test]
    fn only_an_empty_node_of_that_name_is_fit() {
        let said = Candidate { name: "d".into(), empty: true, ..Candidate::default() };
        let why = |said: Candidate, votes| fit(&said, "d", "d:1", [7; 16], votes).unwrap_err().to_string();
        fit(&said, "d", "d:1", [7; 16], true).unwrap();
        assert!(why(Candidate { name: "e".into(), ..said.clone() }, true).contains("called \"e\""));
        let other = Candidate { cluster_id: Some([8; 16]), raft_id: 3, empty: false, ..said.clone() };
        assert!(why(other, true).contains("another cluster"));
        let used = Candidate { cluster_id: Some([7; 16]), raft_id: 3, empty: false, ..said.clone() };
        assert!(why(used, true).contains("not empty (it has Raft id 3"));
        let learner = Candidate { learner: true, ..said };
        fit(&learner, "d", "d:1", [7; 16], false).unwrap();
        assert!(why(learner, true).contains("never votes"));
    }

    #[test]
    fn learners_are_no_concern_of_the_voters() {
        let intent = |change, name: &str| new_intent(change, name.into(), String::new(), String::new(), false);
        assert!(is_about_voters(&membership(), &intent(Change::Remove, "a")));
        assert!(!is_about_voters(&membership(), &intent(Change::Remove, "l")));
        assert!(is_about_voters(&membership(), &intent(Change::Add { learner: false }, "d")));
        assert!(!is_about_voters(&membership(), &intent(Change::Add { learner: true }, "d")));
        let replace = Change::Replace { old: "l".into(), learner: true };
        assert!(!is_about_voters(&membership(), &intent(replace, "d")));
    }
}
