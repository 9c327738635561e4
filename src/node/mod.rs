//! One node: everything below the HTTP API put together.
//!
//! ```text
//!  submit ─► park ─► leader here? ─► proposer ─► Raft ─► log ─► apply ─► outcome
//!                         └ elsewhere ─► forward ─► peer port of the leader ─► its proposer
//!  read ─► read index (a shared round) ─► wait until published ─► view of the state
//!  peer port ─► admit (cluster, target, boot count) ─► Raft, proposer, rounds, checkpoints
//! ```
//!
//! `process` lives from start to end and holds the incarnation of the moment; `start` brings one up, `formation` gives it a place in a cluster, `watch` keeps its view of the
//! cluster, `upkeep` takes checkpoints, `flows` carries out what operators order. Decisions are pure functions (`bootstrap`, `submit_rules`,
//! `identity::standing`, `log_time`, `freshness`, `upkeep::Upkeep`); the files around them only do
//! what those say.

pub mod applier;
pub mod ballast;
pub mod boots;
pub mod bootstrap;
mod checkpoint_receive;
mod checkpoint_send;
pub mod core;
pub mod disk;
mod fence;
mod files;
pub mod flows;
mod formation;
mod forward;
pub mod freshness;
mod handover;
mod healer;
pub mod identity;
pub mod kinds;
pub mod level;
pub mod log_time;
pub mod members;
pub mod messages;
mod old_copy;
pub mod park;
mod peers;
pub mod process;
pub mod proposer;
mod proxy;
mod raft_settings;
mod read;
mod read_index;
pub mod rebuild;
pub mod rebuild_from_wal;
mod repair;
pub mod room;
mod room_watch;
mod rpc_server;
mod scrub;
mod scrub_log;
pub mod slow;
pub mod space;
pub mod space_watch;
mod start;
mod start_error;
pub mod status;
mod submit;
pub mod submit_rules;
mod taken;
mod transport;
pub mod upkeep;
pub mod vital;
mod watch;
pub mod watchdog;
mod way;

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::{core::Shared, process::Process, rebuild::desk::Desk};
use crate::{
    config::Config,
    metrics::{Metrics, RaftFigures, RebuildFigures, TreeFigures},
    state::{
        command::{CommandKey, Operation},
        engine::{
            quarantine::{self, Quarantined},
            scrub::ScrubSource,
        },
    },
    store_helpers::StoreView,
};

pub use self::{
    fence::{ANSWER_MAX, Door},
    files::is_full,
    flows::{DrainOrder, DrainPlan, FailoverPlan, FlowError, Flows, NotCancelled},
    members::{MemberError, MemberOrder, MemberPlan, NotUndone, Ordered},
    read::{Consistency, ReadError},
    rebuild::{
        desk::{JobReport, JobState, StepReport},
        order::OrderError,
    },
    start::{Ground, StartError},
    status::{ClusterReport, Health, MemberReport},
    submit::{SubmitError, Submitted, shortages_text},
    taken::Taken,
};

/// A running node. All methods may be called at any time, also while it forms its cluster or stops.
pub struct Node {
    process: Arc<Process>,
    /// The first incarnation, for the moment in which there is no other.
    first: Arc<Shared>,
}

impl Node {
    /// Starts a node and binds its peer listener. Returns once everything on its own disk is open; a
    /// node without a place in a cluster goes on waiting for it in the background.
    pub async fn start(config: Arc<Config>, metrics: Arc<Metrics>) -> Result<Arc<Node>, StartError> {
        Self::start_on(config, metrics, Ground::default()).await
    }

    /// As `start`, on a given peer listener or disk.
    pub async fn start_on(config: Arc<Config>, metrics: Arc<Metrics>, ground: Ground) -> Result<Arc<Node>, StartError> {
        let process = Process::start(config, metrics, ground).await?;
        let Some(first) = process.current() else {
            return Err(StartError::Refused("the node has ended while it started".into()));
        };
        let weak = Arc::downgrade(&process);
        process.metrics.before_scrape(move |metrics| fill_metrics(&weak, metrics));
        Ok(Arc::new(Node { process, first }))
    }

    /// The incarnation that takes requests now.
    fn shared(&self) -> Arc<Shared> {
        self.process.current().unwrap_or_else(|| Arc::clone(&self.first))
    }

    /// Takes a command: parks it until there is a leader, has it proposed, and returns its outcome.
    /// `key`: the client's or the balancer's; `None` makes one. `body_hash` tells one body from another
    /// under the same key.
    pub async fn submit(
        &self,
        op: Operation,
        key: Option<CommandKey>,
        body_hash: u128,
    ) -> Result<Submitted, SubmitError> {
        self.take().submit(op, key, body_hash).await
    }

    /// A view of the state that is as fresh as `consistency` asks for, within the deadline of requests.
    pub async fn read(&self, consistency: Consistency) -> Result<StoreView, ReadError> {
        let deadline = Instant::now() + Duration::from_millis(self.process.config.cluster.request_deadline_ms);
        loop {
            let taken = self.take();
            match taken.read(consistency, deadline).await {
                // The next incarnation may well have it.
                Err(_) if taken.is_replaced() && Instant::now() < deadline => {}
                answered => return answered,
            }
        }
    }

    /// This node's health.
    pub fn health(&self) -> Health {
        status::health(&self.shared())
    }

    /// The whole cluster; asks every member, for half a second at most.
    pub async fn cluster(&self) -> ClusterReport {
        status::cluster(&self.shared()).await
    }

    /// Whether a load balancer may send requests here; the error says why not.
    pub fn is_ready(&self) -> Result<(), String> {
        status::ready(&self.shared())
    }

    /// Whether this node leads and a quorum has acknowledged it within one lease.
    pub fn is_leader_with_quorum(&self) -> bool {
        status::leads_with_quorum(&self.shared())
    }

    /// Whether its disk has failed or hangs: it answers through others then.
    pub fn has_failed(&self) -> bool {
        self.shared().silenced().is_some()
    }

    /// Entries committed by the leader and not applied here; `None` without recent contact.
    pub fn replica_lag_entries(&self) -> Option<u64> {
        status::replica_lag(&self.shared())
    }

    /// Makes the listener for clients known to the fence. To be dropped together with it.
    pub fn door(&self, listener: &tokio::net::TcpListener) -> std::io::Result<Door> {
        self.process.fence.door(fence::Side::Clients, listener)
    }

    /// Cancelled when the disk has hung for so long that clients must not be served here any more: not one new
    /// connection, and those that are open end with their request.
    pub fn fenced(&self) -> CancellationToken {
        self.process.fence.closed().clone()
    }

    /// To be called once that is done.
    pub fn clients_are_gone(&self) {
        self.process.fence.clients_are_gone();
    }

    /// Returns when what the node was fenced for has ended: the process can end, and must not go on.
    pub async fn wait_fence_over(&self) {
        self.process.fence.over().cancelled().await;
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.process.config.node.name
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.process.config
    }

    /// The figures of this process.
    pub fn metrics(&self) -> &Metrics {
        &self.process.metrics
    }

    /// What the engine holds and has done; `None` before the state is open or when it failed.
    pub fn engine_stats(&self) -> Option<crate::state::engine::lsm::EngineStats> {
        self.shared().core.get()?.state.engine().stats().ok()
    }

    /// Orders a rebuild of this node, from the named one alone if one is named. The answer is the job's id.
    pub async fn order_rebuild(&self, from: Option<String>) -> Result<String, OrderError> {
        rebuild::order::order(&self.process, from).await
    }

    /// Jobs, the node's place in traffic and the requests under way.
    pub fn flows(&self) -> &Flows {
        &self.process.flows
    }

    /// Takes this node out of traffic. The answer is the job's id, once nothing speaks against it.
    pub async fn drain(&self, order: DrainOrder) -> Result<String, FlowError> {
        flows::order_drain(&self.process, order).await
    }

    /// What that would do now.
    pub async fn plan_drain(&self) -> Result<DrainPlan, FlowError> {
        flows::plan_drain(&self.process).await
    }

    /// Puts this node back into traffic; nothing to do is no error. The answer is the job's id.
    pub async fn undrain(&self) -> Result<String, FlowError> {
        flows::order_undrain(&self.process).await
    }

    /// Moves leadership from this node to `target`, or to whoever lacks least. The answer is the job's id, once nothing
    /// speaks against it.
    pub async fn failover(&self, target: Option<String>) -> Result<String, FlowError> {
        flows::order_failover(&self.process, target).await
    }

    /// What that would do now.
    pub async fn plan_failover(&self, target: Option<&str>) -> Result<FailoverPlan, FlowError> {
        flows::plan_failover(&self.process, target).await
    }

    /// Every job of this node that there is to tell of: rebuilds and flows, the newest first.
    pub fn all_jobs(&self) -> Vec<JobReport> {
        let mut jobs = self.process.desk.all();
        jobs.extend(self.process.flows.board.all());
        jobs.extend(self.process.flows.compactions.all());
        jobs.sort_by_key(|job| std::cmp::Reverse(job.began_unix_ms));
        jobs
    }

    /// A job by its id.
    pub fn job(&self, id: &str) -> Option<JobReport> {
        let flows = &self.process.flows;
        self.process.desk.job(id).or_else(|| flows.board.job(id)).or_else(|| flows.compactions.job(id))
    }

    /// Waits until a job has ended; `None` when there is no such job.
    pub async fn wait_job(&self, id: &str) -> Option<JobReport> {
        match self.process.desk.job(id) {
            Some(_) => self.process.desk.wait_ended(id).await,
            None if self.process.flows.compactions.job(id).is_some() => {
                self.process.flows.compactions.wait_ended(id).await
            }
            None => self.process.flows.board.wait_ended(id).await,
        }
    }

    /// Begins to compact the tree of this node. The answer is the job's id.
    pub fn compact(&self, major: bool) -> Result<String, FlowError> {
        flows::order_compact(&self.process, major)
    }

    /// Takes an order about the members, or says what it would do. Only the leader can.
    pub async fn order_members(&self, order: MemberOrder, forced: bool, dry_run: bool) -> Result<Ordered, MemberError> {
        members::order(&self.process, order, forced, dry_run).await
    }

    /// Cancels a change of the members. Only the leader can.
    pub async fn cancel_members(&self, id: &str) -> Result<(), NotUndone> {
        members::cancel(&self.process, id).await
    }

    /// Changes of the members that this node knows of, the newest first: of the whole cluster. The error says why its
    /// state cannot be read.
    pub async fn cluster_jobs(&self) -> Result<Vec<JobReport>, String> {
        members::all(&self.shared()).await
    }

    /// One of them by its id.
    pub async fn cluster_job(&self, id: &str) -> Result<Option<JobReport>, String> {
        members::one(&self.shared(), id).await
    }

    /// Waits until it has ended; `None` when this node does not know it, or hears nothing any more.
    pub async fn wait_cluster_job(&self, id: &str) -> Result<Option<JobReport>, String> {
        members::wait_ended(&self.shared(), id).await
    }

    /// Why requests are refused here, if they are: this node was removed from its cluster.
    pub fn refuses(&self) -> Option<&str> {
        self.process.members.refuses()
    }

    /// Name of the leader, if another node leads.
    pub fn leader_elsewhere(&self) -> Option<String> {
        let shared = self.shared();
        let view = shared.view.borrow();
        view.leader.as_ref().filter(|leader| !leader.here).map(|leader| leader.name.clone())
    }

    /// Whether this node leads and a majority speaks to it; the first moments of a leader count.
    pub fn leads(&self) -> bool {
        status::leads(&self.shared())
    }

    /// Why requests are better sent to another node, if so: this one reaches neither a leader nor a majority, and has not
    /// for longer than elections take.
    pub fn cut_off(&self) -> Option<String> {
        self.shared().way.borrow().cut_off.clone()
    }

    /// Returns once that is so, with the reason.
    pub async fn wait_cut_off(&self) -> String {
        self.take().wait_cut_off().await
    }

    /// `host:port` of the HTTP listener of another member, if it is known.
    pub fn http_addr_of(&self, name: &str) -> Option<String> {
        let shared = self.shared();
        let view = shared.view.borrow();
        let listed = || self.process.peers.iter().find(|peer| peer.name == name).map(|peer| peer.http.clone());
        let known = view.membership.nodes().map(|(_, m)| m).find(|m| m.name == name).map(|m| m.http_addr.clone());
        known.or_else(listed).filter(|addr| !addr.is_empty())
    }

    /// Names of the other members.
    pub fn other_names(&self) -> Vec<String> {
        let shared = self.shared();
        let view = shared.view.borrow();
        view.membership.nodes().map(|(_, m)| m.name.clone()).filter(|name| name != self.name()).collect()
    }

    /// What rebuilds have put away on this node, the oldest first.
    pub async fn quarantine(&self) -> Result<Vec<Quarantined>, String> {
        let (data_dir, days) = (self.process.config.node.data_dir.clone(), self.process.config.rebuild.quarantine_days);
        let listed = tokio::task::spawn_blocking(move || quarantine::list(&data_dir, days)).await;
        listed.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }

    /// What the scrubber reads, for a pass out of turn; nothing while Raft does not run here. To be called within the
    /// runtime.
    pub fn scrub_sources(&self) -> Vec<Arc<dyn ScrubSource>> {
        scrub::sources(&self.shared())
    }

    /// Where the progress of a rebuild is read.
    pub fn jobs(&self) -> &Desk {
        &self.process.desk
    }

    /// Returns once the node has moved to its spare folder: it has to be started anew, with the same configuration.
    pub async fn wait_moved(&self) {
        self.process.moved.cancelled().await;
    }

    /// Returns once the node has found out that it cannot serve or go on, with the reason: for
    /// example that a cluster exists already, or that one of its tasks has died.
    pub async fn wait_fatal(&self) -> String {
        self.process.vital.wait_ended().await
    }

    /// To be called before `shutdown`, while requests are still served: out of traffic, leadership elsewhere, requests
    /// answered, within `cluster.stop_deadline_ms`.
    pub async fn stop_gently(&self) {
        flows::stop_gently(&self.process).await;
    }

    /// To be called before `shutdown`, while requests are still served: not ready from now on, and
    /// leadership goes to the most caught-up voter, if this node has it. Takes 3 seconds at most.
    pub async fn hand_over(&self) {
        handover::hand_over(&self.shared()).await;
    }

    /// Stops: takes nothing more, ends Raft, closes the state and then the log, and lets go of the
    /// folder. Commands under way are answered as unknown. Later calls return at once.
    pub async fn shutdown(&self) {
        self.process.shutdown().await;
    }
}

fn fill_metrics(process: &Weak<Process>, metrics: &Metrics) {
    let Some(shared) = process.upgrade().and_then(|process| process.current()) else { return };
    let job = shared.desk.current();
    metrics.set_rebuild(job.map_or_else(RebuildFigures::default, |job| RebuildFigures {
        running: true,
        waiting: job.state == JobState::Waiting,
        bytes_done: job.bytes_done,
        bytes_total: job.bytes_total,
        entries_behind: job.entries_behind.unwrap_or_default(),
    }));
    metrics.set_parked(shared.park.commands_held(), shared.park.bytes_held());
    let Some(wal) = shared.wal() else { return };
    metrics.set_wal(wal.bytes_on_disk(), wal.segment_count());
    let Some(core) = shared.core.get() else { return };
    let view = shared.view.borrow().clone();
    metrics.set_raft(RaftFigures {
        term: view.term,
        is_leader: view.role == core::Role::Leader,
        has_leader: view.leader.is_some(),
        out_of_traffic: shared.flows.drain.mark().is_out(),
        last_log_index: wal.last_log_id().map_or(0, |id| id.index),
        applied_index: core.published().applied_log_index.unwrap_or_default(),
    });
    // One row; a failing read is counted and logged by the engine itself.
    if let Ok(assertions) = read::current(&shared).map_err(|_| ()).and_then(|v| v.count_assertions().map_err(|_| ())) {
        metrics.set_assertions_indexed(assertions);
    }
    if let Ok(stats) = core.state.engine().stats() {
        metrics.set_tree(TreeFigures {
            sst_files: stats.table_count as u64,
            bytes: stats.table_bytes,
            pending_compaction_bytes: stats.pending_compaction_bytes,
            flushed_bytes_total: stats.flushed_bytes,
            compaction_written_bytes_total: stats.compacted_bytes,
            ..TreeFigures::default()
        });
    }
}
