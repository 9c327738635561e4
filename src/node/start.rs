//! How an incarnation of a node comes to life, in this order: identity, log, place in a cluster, state, Raft, and the
//! tasks around it. `process` has taken the folder and the peer port before.
//!
//! Everything that can be wrong with the folder is found before the first question leaves. A node that
//! has its place starts at once; one without waits for it in the background, and meanwhile its health
//! says `starting`.

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use openraft::{Raft, RaftLogReader, storage::RaftLogStorage};
use stemedb_net::{Limits, LocalIdentity};
use stemedb_raft::{
    WalHandle, WalOptions, WalStore,
    disk::{Disk, RealDisk, folder_lock::KernelLock},
    io_times::IoTimes,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_util::task::TaskTracker;

use super::{
    applier, bootstrap,
    core::{AssignRequest, Core, Shared},
    disk::DiskWatch,
    formation::{self, FormError, Formed},
    forward::Forwarders,
    healer::PeerHealer,
    identity::{self, Identity, LogContent, Standing},
    members::Gone,
    peers::Peers,
    process::Process,
    proposer::Proposer,
    proxy,
    raft_settings::raft_config,
    read,
    read_index::{self, Rounds},
    rebuild::{self, Need, PLACE_WHY, fail_point, journal::Journal, tree_watch},
    repair::{self, Begun},
    room_watch, slow,
    space::{RealSpace, SpaceProbe},
    space_watch::SpaceWatch,
    transport::Network,
    upkeep, watch as watcher,
};
use crate::{
    config::{Config, MemberRole, PeerEntry},
    metrics::Metrics,
    state::{
        apply::KeyLimits,
        engine::{EngineError, lsm::LsmOptions},
        machine::{MachineOptions, StateMachine},
    },
};

/// How long a node that starts asks for the index it has to reach, before it asks again.
const CATCH_UP_ROUND: Duration = Duration::from_secs(10);

pub use super::start_error::StartError;

/// What the tasks of the start hand on.
struct Parts {
    shared: Arc<Shared>,
    log: WalStore,
    restore: crate::state::machine::RestoreApplier<applier::NodeApplier>,
}

pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StartError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| StartError::Refused(format!("a starting step died: {e}")))
}

/// What a node runs on, beside its configuration.
pub struct Ground {
    /// The peer listener; `None`: bound as configured.
    pub peer_listener: Option<TcpListener>,
    /// Where the log lies. The state is always in files.
    pub disk: Arc<dyn Disk>,
    /// Who says how much room there is.
    pub space: Arc<dyn SpaceProbe>,
    /// What the disk is busy with; one for a process.
    pub io_times: Arc<IoTimes>,
}

impl Default for Ground {
    fn default() -> Ground {
        Ground { peer_listener: None, disk: RealDisk::new(), space: Arc::new(RealSpace), io_times: Arc::default() }
    }
}

/// Makes the data folder and takes it for this process.
pub async fn take_folder(
    config: &Arc<Config>,
    metrics: &Arc<Metrics>,
    probe: Arc<dyn SpaceProbe>,
) -> Result<(KernelLock, SpaceWatch), StartError> {
    let data_dir = config.node.data_dir.clone();
    let path = data_dir.clone();
    tokio::fs::create_dir_all(&data_dir).await.map_err(|source| StartError::Io {
        operation: "make the data folder",
        path,
        source,
    })?;
    metrics.set_log_fsync_errors(config.wal.log_fsync_errors);
    let began = tokio::time::Instant::now();
    let lock = identity::lock_folder(&data_dir, config.storage.lock_timeout_ms).await?;
    metrics.lock_waited(began.elapsed());
    // Before anything is written, so that a node without any room has some from its ballast.
    let (config, metrics) = (Arc::clone(config), Arc::clone(metrics));
    let space = blocking(move || SpaceWatch::begin(config, metrics, probe)).await?;
    Ok((lock, space))
}

/// The configured list of nodes.
pub fn peers_of(config: &Config, listener: &TcpListener) -> Vec<PeerEntry> {
    let own_addr = listener.local_addr().map(|a| a.to_string()).unwrap_or_else(|_| config.peer_listen());
    formation::effective_peers(config, &own_addr, &config.http.listen)
}

/// Binds the peer port.
pub async fn bind(addr: &str) -> Result<TcpListener, StartError> {
    TcpListener::bind(addr).await.map_err(|source| StartError::Bind { addr: addr.to_owned(), source })
}

/// Brings an incarnation to life from what is in the folder. `early` is called with it as soon as it can answer its
/// peers, before its log was read.
pub async fn incarnate(process: &Arc<Process>, early: impl FnOnce(&Arc<Shared>)) -> Result<Arc<Shared>, StartError> {
    let data_dir = &process.config.node.data_dir;
    let own = match Identity::load(data_dir)? {
        Some(identity) => Some(identity.begin_boot(data_dir, &process.config.node.name)?),
        None => None,
    };
    let (assignments, assigned) = mpsc::channel(1);
    let shared = make_shared(process, own, assignments);
    early(&shared);
    shared.vital.spawn("the task that follows the free space", room_watch::follow_own(Arc::clone(&shared)));
    let brought_up = bring_up(process, &shared, assigned).await;
    if let Err(error) = brought_up {
        if let Some(why) = lost(&error).filter(|need| may_cure(&process.config, &process.peers, need)) {
            needs_rebuild(&shared, why);
            return Ok(shared);
        }
        shared.stop.cancel();
        shared.vital.finished().await;
        return Err(tree_watch::refusal(error));
    }
    Ok(shared)
}

/// An incarnation that only passes on what it is asked, while a rebuild that was begun before goes on.
pub fn incarnate_proxy(
    process: &Arc<Process>,
    journal: &Journal,
    early: impl FnOnce(&Arc<Shared>),
) -> Result<Arc<Shared>, StartError> {
    let data_dir = &process.config.node.data_dir;
    let own = match Identity::load(data_dir)? {
        Some(identity) if !journal.emptied => Some(identity.begin_boot(data_dir, &process.config.node.name)?),
        _ => None,
    };
    let (assignments, _) = mpsc::channel(1);
    let shared = make_shared(process, own, assignments);
    if !shared.local.load().has_raft_id() && journal.fresh_id != 0 {
        shared.local.store(Arc::new(rebuild::pulling_identity(journal)));
    }
    if let Some(membership) = rebuild::membership_of(&journal.members) {
        shared.view.send_modify(|view| view.membership = Arc::new(membership));
    }
    early(&shared);
    let why = journal.why.clone();
    needs_rebuild(&shared, if why == PLACE_WHY { Need::Place(why) } else { Need::Node(why) });
    Ok(shared)
}

/// An incarnation of a node that was removed from its cluster: it says so, and nothing else.
pub fn incarnate_removed(process: &Arc<Process>, why: String, early: impl FnOnce(&Arc<Shared>)) -> Arc<Shared> {
    tracing::error!("{why}");
    let (assignments, _) = mpsc::channel(1);
    let shared = make_shared(process, None, assignments);
    // Set once, here.
    let _first = shared.retired.set(why.clone());
    process.members.set_removed(Gone { why, refuses_from: tokio::time::Instant::now() });
    early(&shared);
    shared
}

/// Nothing of this incarnation runs, and it goes on as a proxy until it is rebuilt.
fn needs_rebuild(shared: &Arc<Shared>, need: Need) {
    tracing::error!("this node cannot take part as it is and needs a rebuild: {}", need.why());
    shared.need.send_replace(Some(need));
    let watched = Arc::clone(shared);
    shared
        .vital
        .spawn("the task that watches the cluster", async move { proxy::follow_others(&watched, |_| false).await });
}

/// A node alone has nobody to rebuild from.
fn may_rebuild(config: &Config, peers: &[PeerEntry]) -> bool {
    config.cluster.auto_rebuild && peers.len() >= 3
}

/// A tree alone needs one other node and no quorum.
fn may_cure(config: &Config, peers: &[PeerEntry], need: &Need) -> bool {
    match need {
        Need::Node(_) => may_rebuild(config, peers),
        Need::Tree(_) => config.cluster.auto_rebuild && peers.len() >= 2,
        Need::Place(_) => true,
    }
}

/// Whether an error of the start says that parts of the folder are lost for good.
fn lost(error: &StartError) -> Option<Need> {
    match error {
        StartError::Lost(why) => Some(Need::Node(why.clone())),
        StartError::TreeLost(why) => Some(Need::Tree(why.clone())),
        // The log is open and sound by then.
        StartError::State(error) if error.is_damage() => Some(Need::Tree(error.to_string())),
        _ => None,
    }
}

async fn bring_up(
    process: &Process,
    shared: &Arc<Shared>,
    assigned: mpsc::Receiver<AssignRequest>,
) -> Result<(), StartError> {
    let own_position = process.peers.iter().position(|peer| peer.name == process.config.node.name);
    let ready = Ready { shared: Arc::clone(shared), peers: process.peers.clone(), own_position, assigned };
    match repair::begin(process, shared).await? {
        Begun::Open(log) => go_on(ready, log).await,
        Begun::Asks(asking) => {
            if shared.identity.load().is_none() {
                return Err(StartError::Refused(
                    "the log is damaged, and there is no identity file: the node cannot know whom to ask".into(),
                ));
            }
            // A log that has lost entries had some: nobody may take this node for an empty one meanwhile.
            shared.log_was_used.store(true, Ordering::Relaxed);
            let (config, peers) = (Arc::clone(&process.config), process.peers.clone());
            let (shared, stop) = (Arc::clone(shared), shared.core_stop.clone());
            shared.clone().vital.spawn("the repair of the log", async move {
                let repairing = async {
                    let log = asking.finish(&shared).await?;
                    go_on(ready, log).await
                };
                let Some(Err(error)) = stop.run_until_cancelled(repairing).await else { return };
                match lost(&error).filter(|need| may_cure(&config, &peers, need)) {
                    Some(need) => needs_rebuild(&shared, need),
                    None => shared.vital.end(tree_watch::refusal(error).to_string()),
                }
            });
            Ok(())
        }
    }
}

/// What an incarnation has before its log is open.
struct Ready {
    shared: Arc<Shared>,
    peers: Vec<PeerEntry>,
    own_position: Option<usize>,
    assigned: mpsc::Receiver<AssignRequest>,
}

/// The log is open: the place in a cluster, state and Raft.
async fn go_on(ready: Ready, log: WalStore) -> Result<(), StartError> {
    let Ready { shared, peers, own_position, assigned } = ready;
    let log_content = log_content(&log).await?;
    let known = shared.identity.load_full();
    let standing = identity::standing((*known).as_ref(), log_content, has_files(&shared.config.kv_dir())?);
    if let Standing::Refuse(why) = standing {
        let wal = log.handle();
        let closed = blocking(move || wal.close()).await?;
        closed.map_err(|latched| StartError::Refused(format!("{why} ({latched})")))?;
        return Err(StartError::Lost(why));
    }
    // Only a node that looks for its place needs the list.
    if standing == Standing::Fresh && own_position.is_none() {
        let why = format!("cluster.peers does not list this node, {:?}", shared.config.node.name);
        return Err(StartError::Config(why));
    }
    shared.log_was_used.store(log_content == LogContent::Used, Ordering::Relaxed);
    if shared.wal.set(log.handle()).is_err() {
        return Err(StartError::Refused("the log was opened twice".into()));
    }
    let (restore, state_gone) = applier::restorer(KeyLimits::default(), shared.vital.clone());
    *shared.state_gone.lock().unwrap_or_else(PoisonError::into_inner) = Some(state_gone);
    let parts = Parts { shared: Arc::clone(&shared), log, restore };
    match own_position {
        // A rebuilt node has an unused log too, and an id of its own: it forms nothing.
        Some(position)
            if standing == Standing::Fresh
                || (standing == Standing::Assigned
                    && position == 0
                    && shared.local.load().node_id == bootstrap::raft_id_of(0)) =>
        {
            let stop = shared.core_stop.clone();
            let forming = form_and_run(parts, peers, position, assigned);
            shared.vital.spawn("the task that forms the cluster", async move {
                stop.run_until_cancelled(forming).await;
            });
            Ok(())
        }
        _ => run_core(parts).await,
    }
}

/// How the log of this node is opened.
pub fn wal_options(process: &Process) -> WalOptions {
    let config = &process.config;
    let mut options = WalOptions::new(config.wal_dir());
    options.segment_bytes = config.wal.segment_size_mb.saturating_mul(1024 * 1024);
    options.group_commit_max_wait = Duration::from_millis(config.wal.group_commit_max_wait_ms);
    options.group_commit_max_bytes = config.wal.group_commit_max_bytes;
    options.observer = Arc::<Metrics>::clone(&process.metrics);
    options.io_times = Arc::clone(&process.io_times);
    options
}

async fn log_content(log: &WalStore) -> Result<LogContent, StartError> {
    if log.is_empty() {
        return Ok(LogContent::Nothing);
    }
    let handle = log.handle();
    if handle.last_log_id().is_some() || handle.purged().is_some() {
        return Ok(LogContent::Used);
    }
    let vote = log.clone().get_log_reader().await.read_vote().await;
    let vote = vote.map_err(|e| StartError::Refused(format!("the vote cannot be read: {e}")))?;
    Ok(if vote.is_some_and(|v| v.leader_id.term > 0) { LogContent::Used } else { LogContent::Prepared })
}

fn has_files(dir: &Path) -> Result<bool, StartError> {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(StartError::Io { operation: "read", path: dir.to_owned(), source }),
    }
}

fn make_shared(process: &Process, own: Option<Identity>, assignments: mpsc::Sender<AssignRequest>) -> Arc<Shared> {
    let config = Arc::clone(&process.config);
    let local = own.as_ref().map_or_else(LocalIdentity::default, |id| LocalIdentity {
        cluster_id: id.cluster_id,
        node_id: id.raft_id,
        boot: id.spoken_boot(),
    });
    let local = Arc::new(ArcSwap::from_pointee(local));
    let connections = Peers::new(Arc::clone(&local), Limits::default(), process.boots.clone());
    // An answer that comes later than this finds nobody: the command's life has ended.
    let reply_max = Duration::from_millis(config.cluster.request_deadline_ms);
    let stop = process.stop.child_token();
    Arc::new(Shared {
        park: process.park.clone(),
        config,
        metrics: Arc::clone(&process.metrics),
        local,
        identity: ArcSwap::from_pointee(own),
        wal: OnceLock::new(),
        entry_source: Default::default(),
        repairing: watch::Sender::default(),
        log_was_used: AtomicBool::new(false),
        boots: process.boots.clone(),
        forwarders: Forwarders::new(connections.clone(), reply_max),
        peers: connections,
        list_hash: bootstrap::list_hash(&process.peers),
        assignments,
        view: watch::Sender::default(),
        way: watch::Sender::default(),
        freshness: Default::default(),
        leader_heard_at_ms: Default::default(),
        log_time: Default::default(),
        last_words: Default::default(),
        disk: DiskWatch::default(),
        io_times: Arc::clone(&process.io_times),
        space: process.space.clone(),
        admission: watch::Sender::default(),
        caught_up: watch::Sender::new(false),
        leaving: AtomicBool::new(false),
        core_stop: stop.child_token(),
        stop,
        flows: Arc::clone(&process.flows),
        desk: Arc::clone(&process.desk),
        members: Arc::clone(&process.members),
        awaits_place: watch::Sender::default(),
        need: watch::Sender::new(None),
        retired: OnceLock::new(),
        requests: TaskTracker::new(),
        state_gone: Mutex::new(None),
        vital: process.vital.sibling(),
        core: OnceLock::new(),
    })
}

/// The background part of a start without a place in a cluster.
async fn form_and_run(
    parts: Parts,
    peers: Vec<PeerEntry>,
    own_position: usize,
    mut assigned: mpsc::Receiver<AssignRequest>,
) {
    let shared = Arc::clone(&parts.shared);
    let done = async {
        // A learner never forms a cluster: it waits to be added to one.
        if shared.config.cluster.role == MemberRole::Learner {
            assigned.close();
            return Err(formation::await_place(&shared, &peers).await);
        }
        let expected = shared.config.cluster.bootstrap_expect as usize;
        if expected != peers.len() {
            return Err(FormError::Refused(format!(
                "cluster.bootstrap_expect is {expected} and cluster.peers lists {} nodes: a cluster is formed by all of \
                 them, so the two must be equal",
                peers.len()
            )));
        }
        let place = formation::Place { shared: &shared, log: parts.log.clone() };
        let formed = formation::form(place, &peers, own_position, &mut assigned).await?;
        run_core(parts).await.map_err(|e| FormError::Refused(e.to_string()))?;
        match formed {
            Formed::Assigned => Ok(()),
            Formed::Initialize(members) => initialize(&shared, members).await.map_err(FormError::Refused),
        }
    };
    match done.await {
        Err(FormError::Awaited) => {
            shared.awaits_place.send_replace(None);
            needs_rebuild(&shared, Need::Place(PLACE_WHY.to_owned()));
        }
        Err(FormError::AlreadyMember(why)) if may_rebuild(&shared.config, &peers) => {
            needs_rebuild(&shared, Need::Node(why));
        }
        Err(FormError::AlreadyMember(why) | FormError::Refused(why)) => shared.vital.end(why),
        Ok(()) => {}
    }
}

async fn initialize(
    shared: &Shared,
    members: std::collections::BTreeMap<u64, stemedb_raft::types::Member>,
) -> Result<(), String> {
    let core = shared.core.get().ok_or("Raft is not running")?;
    let count = members.len();
    core.raft.initialize(members).await.map_err(|e| format!("the cluster could not be initialized: {e}"))?;
    tracing::info!(nodes = count, "cluster formed");
    Ok(())
}

/// Opens the state, starts Raft and the tasks around it.
async fn run_core(parts: Parts) -> Result<(), StartError> {
    let Parts { shared, log, restore } = parts;
    let own_id = shared.local.load().node_id;
    let options = machine_options(&shared, log.handle());
    let open = move || {
        let (data_dir, board) = (options.data_dir.clone(), options.lsm.damage.clone());
        let machine = StateMachine::open(options, restore)?;
        tree_watch::recall(&data_dir, machine.handle().engine().dir(), &board);
        Ok::<_, EngineError>(machine)
    };
    let machine = blocking(open).await??;
    let state = machine.handle();
    check_log_covers(&log.handle(), &state)?;
    // Before Raft reads the log for the first time.
    let healer = PeerHealer::new(&shared, state.engine().applied().membership.clone());
    log.handle().set_healer(Some(Arc::new(healer)));
    let settings = Arc::new(raft_config(&shared.config)?);
    let network = Network::new(shared.peers.clone(), state.clone());
    let raft = Raft::new(own_id, settings, network, log, machine).await.map_err(|e| StartError::Raft(e.to_string()))?;

    // Until Raft or the others say more, these are the members.
    let membership = state.engine().applied().membership.clone();
    let is_outsider = membership.nodes().next().is_some() && membership.get_node(&own_id).is_none();
    shared.view.send_modify(|view| view.membership = Arc::new(membership));
    let (leader_raft, leading, asking) = (raft.clone(), Arc::clone(&shared), Arc::clone(&shared));
    let (vital, stop) = (&shared.vital, &shared.core_stop);
    let core = Core {
        proposer: Proposer::start(
            raft.clone(),
            Arc::<Shared>::clone(&shared),
            shared.admission.subscribe(),
            vital,
            stop.clone(),
        ),
        leader_rounds: Rounds::start(vital, stop.clone(), move || {
            let (raft, shared) = (leader_raft.clone(), Arc::clone(&leading));
            async move { read_index::leader_round(raft, move || shared.silenced()).await }
        }),
        remote_rounds: Rounds::start(vital, stop.clone(), move || read::remote_round(Arc::clone(&asking))),
        raft,
        state,
    };
    if shared.core.set(core).is_err() {
        return Err(StartError::Raft("it was started twice".into()));
    }
    let vital = &shared.vital;
    vital.spawn("the task that watches Raft", watcher::watch_cluster(Arc::clone(&shared), is_outsider));
    vital.spawn("the task that looks for a way to the leader", super::way::watch(Arc::clone(&shared)));
    vital.spawn("the task that watches the disk", watcher::watch_disk(Arc::clone(&shared)));
    vital.spawn("the task that watches the tree", tree_watch::run(Arc::clone(&shared)));
    vital.spawn("the task that changes the members", super::members::lead::run(Arc::clone(&shared)));
    vital.spawn("the task that raises the feature level", super::level::run(Arc::clone(&shared)));
    vital.spawn("the task that watches the room of all voters", room_watch::run(Arc::clone(&shared)));
    vital.spawn("the task that watches how slow the disk is", slow::watch_slowness(Arc::clone(&shared)));
    vital.spawn("the task that takes checkpoints", upkeep::run(Arc::clone(&shared)));
    vital.spawn("the task that scrubs", super::scrub::run(Arc::clone(&shared)));
    vital.spawn("the task that waits for readiness", catch_up(Arc::clone(&shared)));
    vital.spawn("the task that hears of newer runs", super::old_copy::watch(Arc::clone(&shared)));
    Ok(())
}

fn machine_options(shared: &Shared, wal: WalHandle) -> MachineOptions {
    const MIB: u64 = 1024 * 1024;
    let storage = &shared.config.storage;
    let lsm = LsmOptions {
        memtable_bytes_max: storage.memtable_mb.saturating_mul(MIB),
        cache_bytes: storage.cache_mb.saturating_mul(MIB),
        compaction: storage.enable_auto_compaction,
        lock_timeout_ms: storage.lock_timeout_ms,
        flush_gate: Some(Arc::new(move |log_index| {
            let wal = wal.clone();
            Box::pin(async move { wal.wait_flushed(log_index).await.map_err(|e| e.to_string()) })
        })),
        observer: Arc::<Metrics>::clone(&shared.metrics),
        io_times: Arc::clone(&shared.io_times),
        fail_point: cfg!(debug_assertions).then(|| fail_point::of_folder(&shared.config.node.data_dir)),
        ..LsmOptions::default()
    };
    MachineOptions { data_dir: shared.config.node.data_dir.clone(), lsm }
}

/// The tree waits for the log before it is flushed, so a log that ends before the tree, with no
/// checkpoint that says so, has lost entries.
fn check_log_covers(wal: &WalHandle, state: &crate::state::machine::StateHandle) -> Result<(), StartError> {
    let applied = state.engine().applied().log_id;
    let log_end = wal.last_log_id();
    let checkpoint = state.checkpoint().and_then(|c| c.applied().log_id);
    let purged = wal.purged();
    if purged > applied.max(checkpoint) {
        return Err(StartError::TreeLost(format!(
            "the log begins after {purged:?}, and the state has applied {applied:?}: entries between them are missing here"
        )));
    }
    if applied > log_end && applied > checkpoint {
        return Err(StartError::Lost(format!(
            "the state has applied {applied:?}, and the log ends with {log_end:?}: the log has lost entries. This node \
             must be rebuilt from a replica"
        )));
    }
    Ok(())
}

/// Marks the node as caught up once it has applied what was committed when it started.
async fn catch_up(shared: Arc<Shared>) {
    let reached = async {
        loop {
            let deadline = tokio::time::Instant::now() + CATCH_UP_ROUND;
            let Ok(index) = read::read_index_until(&shared, deadline).await else {
                // While the node stops it fails at once: without this the loop would never give way.
                if shared.stop.is_cancelled() {
                    return;
                }
                tokio::task::yield_now().await;
                continue;
            };
            // The index is the goal from here on, however long it takes.
            let Some(core) = shared.core.get() else { return };
            let mut published = core.state.published();
            if published.wait_for(|s| s.applied_log_index >= Some(index)).await.is_ok() {
                tracing::info!(index, "caught up: ready");
                shared.caught_up.send_replace(true);
            }
            return;
        }
    };
    shared.core_stop.run_until_cancelled(reached).await;
}
