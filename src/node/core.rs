//! What exists once Raft runs on this node, and what every part of the node shares.
//!
//! `Shared` lives from the start of the process; `Core` comes when the node has a place in a cluster
//! and its state is open. Parts hold an `Arc<Shared>` and never each other. The view of the cluster
//! is one watched value, so that whoever waits for a leader is woken by the change itself.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use openraft::{Raft, RaftMetrics, async_runtime::WatchReceiver};
use stemedb_net::LocalIdentity;
use stemedb_raft::{
    EntrySource, WalHandle,
    io_times::IoTimes,
    types::{StoredMembership, TypeConfig},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    applier::NodeApplier,
    boots::SeenBoots,
    bootstrap::Assignment,
    disk::{DiskHealth, DiskWatch},
    flows::Flows,
    forward::Forwarders,
    freshness::Freshness,
    identity::Identity,
    log_time::{Applied, Estimate},
    members::MembersDesk,
    park::Park,
    peers::Peers,
    proposer::Proposer,
    proposer::Surroundings,
    read_index::Rounds,
    rebuild::{Need, desk::Desk},
    room::Admission,
    space_watch::SpaceWatch,
    submit_rules::Leader,
    vital::Vital,
    way::Way,
};
use crate::{
    clock,
    config::Config,
    metrics::Metrics,
    state::machine::{PublishedState, StateHandle, StateMachine},
};

/// The state machine of this node.
pub type Machine = StateMachine<NodeApplier>;
/// Raft on this node.
pub type RaftNode = Raft<TypeConfig, Machine>;

/// A leader as others need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaderInfo {
    /// Raft id.
    pub id: u64,
    /// Name.
    pub name: String,
    /// `host:port` of its peer listener.
    pub addr: String,
    /// Whether it is this node.
    pub here: bool,
}

/// The cluster as this node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterView {
    /// The leader, if one is known together with its address.
    pub leader: Option<LeaderInfo>,
    /// The term.
    pub term: u64,
    /// `leader`, `follower`, `candidate`, `learner` or `starting`.
    pub role: Role,
    /// The membership in effect.
    pub membership: Arc<StoredMembership>,
}

/// This node's part in Raft.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Raft does not run here (yet, or any more).
    #[default]
    Starting,
    /// Receives the log without a vote.
    Learner,
    /// Follows a leader or waits for one.
    Follower,
    /// Stands for election.
    Candidate,
    /// Leads.
    Leader,
}

impl Role {
    /// The word in answers.
    pub fn word(self) -> &'static str {
        match self {
            Role::Starting => "starting",
            Role::Learner => "learner",
            Role::Follower => "follower",
            Role::Candidate => "candidate",
            Role::Leader => "leader",
        }
    }
}

impl ClusterView {
    /// The leader as the rules of `submit_rules` want it.
    pub fn leader_key(&self) -> Leader {
        self.leader.as_ref().map_or(Leader::Unknown, |l| Leader::Node { id: l.id, term: self.term })
    }
}

/// Returns once the leader is another one than `known`, or in another term.
pub async fn leader_change(view: &mut watch::Receiver<ClusterView>, known: Leader) {
    if view.wait_for(|v| v.leader_key() != known).await.is_err() {
        // The view ends with the node, whose `stop` ends this wait.
        std::future::pending::<()>().await;
    }
}

/// Raft and what belongs to it.
pub struct Core {
    /// Raft.
    pub raft: RaftNode,
    /// The state.
    pub state: StateHandle,
    /// The way into the log.
    pub proposer: Proposer,
    /// Rounds at this node, when it leads.
    pub leader_rounds: Rounds,
    /// Questions to the leader, when it is another node.
    pub remote_rounds: Rounds,
}

impl Core {
    /// The newest metrics of Raft.
    pub fn raft_metrics(&self) -> RaftMetrics<TypeConfig> {
        self.raft.metrics().borrow_watched().clone()
    }

    /// How far readers can see now.
    pub fn published(&self) -> PublishedState {
        *self.state.published().borrow()
    }
}

/// An assignment that waits for the forming task, and the way back.
pub type AssignRequest = (Assignment, oneshot::Sender<Result<(), String>>);

/// One incarnation of a node: a log, a state and a Raft core, with the tasks around them. Shared by all
/// its parts. A process has one at a time, and another one only after a rebuild (`process`).
pub struct Shared {
    /// The configuration.
    pub config: Arc<Config>,
    /// The figures of this process.
    pub metrics: Arc<Metrics>,
    /// What this node says of itself in each frame.
    pub local: Arc<ArcSwap<LocalIdentity>>,
    /// The identity, once there is one.
    pub identity: ArcSwap<Option<Identity>>,
    /// The log, once it is open.
    pub wal: OnceLock<WalHandle>,
    /// Answers questions about entries while the log is not open yet.
    pub entry_source: ArcSwapOption<EntrySource>,
    /// What the log waits for while it is being repaired.
    pub repairing: watch::Sender<Option<String>>,
    /// Whether the log had entries or a vote of an election when it was opened. Set before `wal`.
    pub log_was_used: AtomicBool,
    /// Boot counts of the others.
    pub boots: SeenBoots,
    /// Outgoing connections.
    pub peers: Peers,
    /// Commands for leaders elsewhere.
    pub forwarders: Forwarders,
    /// The bound on commands held for clients.
    pub park: Park,
    /// Hash of the configured list of peers.
    pub list_hash: u128,
    /// Assignments go here while this node has no identity.
    pub assignments: mpsc::Sender<AssignRequest>,
    /// The cluster as seen from here.
    pub view: watch::Sender<ClusterView>,
    /// How the leader is reached, when not as usual.
    pub way: watch::Sender<Way>,
    /// Contacts with leaders.
    pub freshness: Mutex<Freshness>,
    /// Monotonic milliseconds at which a leader of the newest term was last heard, answered or not; 0: never.
    pub leader_heard_at_ms: AtomicU64,
    /// Log time as estimated here.
    pub log_time: Mutex<Estimate>,
    /// State of the disk.
    pub disk: DiskWatch,
    /// What the disk is busy with; one for a process.
    pub io_times: Arc<IoTimes>,
    /// How much room there is in the data folder.
    pub space: SpaceWatch,
    /// What this node, when it leads, takes from clients.
    pub admission: watch::Sender<Arc<Admission>>,
    /// Whether the state has caught up with what was committed when the node started.
    pub caught_up: watch::Sender<bool>,
    /// What other nodes last said of their disks, by Raft id, and when, milliseconds of the monotonic clock: a node
    /// whose disk hangs for good says nothing any more.
    pub last_words: Mutex<BTreeMap<u64, (DiskHealth, u64)>>,
    /// Set when this node is about to stop: it takes no leadership any more.
    pub leaving: AtomicBool,
    /// Cancelled when this incarnation ends, with its process or because the next one has taken over.
    pub stop: CancellationToken,
    /// Cancelled when its core ends: with `stop`, or before, when only the proxy goes on.
    pub core_stop: CancellationToken,
    /// Jobs, the node's place in traffic and its requests; those of the process.
    pub flows: Arc<Flows>,
    /// Where the rebuild of this node shows its progress.
    pub desk: Arc<Desk>,
    /// Changes of the members, and whether this node was removed; of the process.
    pub members: Arc<MembersDesk>,
    /// For what a node without a place in a cluster waits, while it is to be added to one.
    pub awaits_place: watch::Sender<Option<String>>,
    /// What is wrong that a rebuild cures, once that is known.
    pub need: watch::Sender<Option<Need>>,
    /// Why the core was ended on purpose, once that is so.
    pub retired: OnceLock<String>,
    /// The requests of clients that this incarnation has taken and not yet answered.
    pub requests: TaskTracker,
    /// Ends once no file of the state is touched any more; there while the core lives.
    pub state_gone: Mutex<Option<oneshot::Receiver<()>>>,
    /// The node's tasks, and why it cannot go on at all, once that is so.
    pub vital: Vital,
    /// Set once.
    pub core: OnceLock<Core>,
}

impl Shared {
    /// The log, once it is open.
    pub fn wal(&self) -> Option<&WalHandle> {
        self.wal.get()
    }

    /// This node's name.
    pub fn name(&self) -> &str {
        &self.config.node.name
    }

    /// Whether the log holds entries, or this node voted: then it is or was a working member.
    pub fn log_is_used(&self) -> bool {
        self.log_was_used.load(Ordering::Relaxed) || self.wal().is_some_and(|wal| wal.last_log_id().is_some())
    }

    /// Why nothing may be acknowledged by this node, if so.
    pub fn silenced(&self) -> Option<String> {
        if let Some(why) = self.retired.get() {
            return Some(why.clone());
        }
        match &*self.need.borrow() {
            // With a damaged tree log and vote go on, and so does the core, if there is one.
            Some(Need::Tree(_)) if self.core.get().is_some() => {}
            Some(need) => return Some(need.why().to_owned()),
            None => {}
        }
        if let Some(latched) = self.wal().and_then(WalHandle::latched) {
            return Some(latched.to_string());
        }
        if let Some(error) = self.core.get().and_then(|core| core.state.failed()) {
            return Some(error.to_string());
        }
        self.disk.health().silenced()
    }

    /// Returns once nothing is answered from the state of this incarnation any more: it is silenced, or its core is told
    /// to end.
    pub async fn silences(&self) {
        let mut need = self.need.subscribe();
        let has_core = self.core.get().is_some();
        tokio::select! {
            () = self.disk.silences() => {}
            () = self.core_stop.cancelled() => {}
            // Never an error: the sender lives as long as this borrow.
            _ = need.wait_for(|need| match need {
                Some(Need::Node(_) | Need::Place(_)) => true,
                Some(Need::Tree(_)) => !has_core,
                None => false,
            }) => {}
        }
    }

    /// Whether this node is about to stop.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed) || self.stop.is_cancelled()
    }

    /// Why this node must not take leadership over, if so.
    pub fn may_not_lead(&self) -> Option<String> {
        let leaving = self.leaving.load(Ordering::Relaxed).then(|| "this node is about to stop".to_owned());
        let mark = self.flows.drain.mark();
        let leaving = leaving.or_else(|| mark.is_out().then(|| format!("this node is {}", mark.word())));
        // A full disk is no reason: where all are full, reads need a leader all the same; and a transfer that is
        // refused leaves the cluster without a leader until the next election.
        let damaged = || self.tree_damage().map(|why| format!("its tree is damaged: {why}"));
        leaving.or_else(|| self.silenced()).or_else(damaged).or_else(|| self.vital.ended())
    }

    /// What is damaged in the tree, once that is known and until it was replaced.
    pub fn tree_damage(&self) -> Option<String> {
        match &*self.need.borrow() {
            Some(Need::Tree(why)) => Some(why.clone()),
            _ => None,
        }
    }

    /// Log time now, by this node's estimate.
    pub fn log_time_ms(&self) -> u64 {
        let applied = self.applied_log_time();
        self.log_time.lock().unwrap_or_else(PoisonError::into_inner).now(applied, clock::monotonic_ms())
    }

    /// Log time now for a command that this node takes; also of a node that applies nothing.
    pub fn command_log_time_ms(&self) -> u64 {
        let applied = self.applied_log_time();
        self.log_time.lock().unwrap_or_else(PoisonError::into_inner).for_command(applied, clock::monotonic_ms())
    }

    /// The leader has said what log time is.
    pub fn hear_log_time(&self, log_time_ms: u64) {
        self.log_time.lock().unwrap_or_else(PoisonError::into_inner).hear(log_time_ms, clock::monotonic_ms());
    }

    fn applied_log_time(&self) -> Applied {
        self.core.get().map_or_else(Applied::default, |core| {
            let state = core.published();
            Applied { log_time_ms: state.log_time_ms, at_monotonic_ms: state.at_monotonic_ms }
        })
    }

    /// Notes a message of a leader that arrived at `arrived_ms` of the monotonic clock: what it has committed.
    pub fn leader_contact(&self, arrived_ms: u64, committed: Option<u64>) {
        let applied = self.core.get().and_then(|core| core.published().applied_log_index);
        let mut freshness = self.freshness.lock().unwrap_or_else(PoisonError::into_inner);
        freshness.contact(arrived_ms, committed, applied);
    }
}

impl Surroundings for Shared {
    fn term(&self) -> u64 {
        self.view.borrow().term
    }

    fn log_time_ms(&self) -> u64 {
        Shared::log_time_ms(self)
    }

    fn feature_level(&self) -> u32 {
        self.core.get().map_or(0, |core| core.published().feature_level)
    }

    fn silenced(&self) -> Option<String> {
        Shared::silenced(self)
    }

    fn entry_proposed(&self, commands: usize) {
        self.metrics.entry_proposed(commands);
    }
}
