//! What lives as long as the process: the folder's lock, the peer port, and the incarnation of the moment.
//!
//! ```text
//!  Process ── current ──► Shared (log, state, Raft core, tasks)      one incarnation
//!                │ disk fails: the core ends, the rest goes on as a proxy
//!                ▼ rebuilt: the folder's content was replaced
//!             next Shared ── the one before answers what it has taken, and ends
//! ```
//!
//! A node that rebuilds itself comes back under another Raft id without a restart of its process:
//! its clients keep their connections, and so its HTTP side talks to the current incarnation only.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{Ordering, fence},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use stemedb_net::{Limits, Listener, LocalIdentity};
use stemedb_raft::{
    disk::{Disk, folder_lock::KernelLock},
    io_times::IoTimes,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    boots::SeenBoots,
    core::Shared,
    fence::{Fence, Side},
    flows::Flows,
    members::{MembersDesk, removed},
    park::Park,
    rebuild::{self, desk::Desk, journal::Journal, offer::Offers},
    room_watch,
    rpc_server::PeerService,
    space_watch::SpaceWatch,
    start::{self, Ground, StartError},
    vital::Vital,
    watchdog,
};
use crate::{
    admin::rebuild::Phase,
    config::{Config, PeerEntry},
    metrics::Metrics,
};

/// How long a stopping node waits for the owner of its state to finish: one entry or one checkpoint
/// piece. Past that the files are left as a crash would leave them, which recovery is made for.
const STATE_GONE_MAX: Duration = Duration::from_secs(10);

/// How long all of that may take. A disk that hangs gives nothing back, and the process has to end all the same.
const CLOSE_MAX: Duration = Duration::from_secs(15);

/// How often a node that is to be rebuilt looks whether it was told to stop while its disk hangs.
const LET_GO_LOOK: Duration = Duration::from_millis(500);

/// The node as a process.
pub struct Process {
    /// The configuration.
    pub config: Arc<Config>,
    /// The figures of this process.
    pub metrics: Arc<Metrics>,
    /// Where the log lies.
    pub disk: Arc<dyn Disk>,
    /// How much room there is in the data folder.
    pub space: SpaceWatch,
    /// Boot counts of the others.
    pub boots: SeenBoots,
    /// The bound on commands held for clients, over all incarnations.
    pub park: Park,
    /// The nodes that form the cluster, as configured; this node alone when none are.
    pub peers: Vec<PeerEntry>,
    /// What the disk is busy with.
    pub io_times: Arc<IoTimes>,
    /// Closes the process when its disk hangs for good.
    pub fence: Arc<Fence>,
    /// Cancelled when the process stops; every incarnation ends with it.
    pub stop: CancellationToken,
    /// Jobs, the node's place in traffic and its requests.
    pub flows: Arc<Flows>,
    /// Where a rebuild is asked for and shown.
    pub desk: Arc<Desk>,
    /// Changes of the members, and whether this node was removed.
    pub members: Arc<MembersDesk>,
    /// Checkpoints offered to nodes that rebuild.
    pub offers: Arc<Offers>,
    /// Cancelled when the node has taken its spare folder into use: it goes on in a process, or a `Node`, that starts.
    pub moved: CancellationToken,
    /// Tasks of the process, and why the node cannot go on at all, once that is so.
    pub vital: Vital,
    current: ArcSwapOption<Shared>,
    lock: Mutex<Option<KernelLock>>,
}

impl Process {
    /// Takes the folder, binds the peer port and starts the first incarnation.
    pub async fn start(config: Arc<Config>, metrics: Arc<Metrics>, ground: Ground) -> Result<Arc<Process>, StartError> {
        let config = start::blocking(move || rebuild::spare::in_use(config)).await??;
        let (lock, space) = start::take_folder(&config, &metrics, ground.space).await?;
        let boots = SeenBoots::open(&config.node.data_dir, Arc::clone(&ground.io_times))?;
        let journal = Journal::load(&config.node.data_dir)?;
        let removed = removed::Mark::load(&config.node.data_dir)?;
        let flows = Arc::new(Flows::open(&config.node.data_dir)?);
        let listener = match ground.peer_listener {
            Some(listener) => listener,
            None => start::bind(&config.peer_listen()).await?,
        };
        let peers = start::peers_of(&config, &listener);
        let process = Arc::new(Process {
            park: Park::new(config.cluster.park_commands_max, config.cluster.park_bytes_max),
            config,
            metrics,
            disk: ground.disk,
            space,
            boots,
            peers,
            io_times: ground.io_times,
            fence: Arc::default(),
            stop: CancellationToken::new(),
            flows,
            desk: Arc::default(),
            members: Arc::default(),
            offers: Arc::default(),
            moved: CancellationToken::new(),
            vital: Vital::default(),
            current: ArcSwapOption::empty(),
            lock: Mutex::new(Some(lock)),
        });
        let no_thread = |source| StartError::Io {
            operation: "start the watchdog of",
            path: process.config.node.data_dir.clone(),
            source,
        };
        watchdog::start(&process).map_err(no_thread)?;
        process.serve_peers(listener).map_err(StartError::PeerPort)?;
        process.watch_space();
        let early = |shared: &Arc<Shared>| process.current.store(Some(Arc::clone(shared)));
        let incarnated = match &journal {
            _ if removed.is_some() => {
                let why = removed.map(|mark| mark.why).unwrap_or_default();
                Ok(start::incarnate_removed(&process, why, early))
            }
            // From here to there no core may run under the old id.
            Some(journal) if journal.phase < Phase::Installed => start::incarnate_proxy(&process, journal, early),
            Some(journal) => match start::incarnate(&process, early).await {
                // The new files are no voter's yet: they are fetched anew.
                Err(error) => {
                    tracing::error!(%error, "the rebuilt files do not start");
                    let early = |shared: &Arc<Shared>| process.current.store(Some(Arc::clone(shared)));
                    start::incarnate_proxy(&process, journal, early)
                }
                started => started,
            },
            None => start::incarnate(&process, early).await,
        };
        match incarnated {
            Ok(_) => {
                let rebuilding = rebuild::run(Arc::clone(&process), journal);
                process.vital.spawn("the task that rebuilds the node", rebuilding);
                let following = removed::follow(Arc::clone(&process));
                process.vital.spawn("the task that asks whether the node was removed", following);
                Ok(process)
            }
            Err(error) => {
                process.shutdown().await;
                Err(error)
            }
        }
    }

    /// The incarnation of the moment; `None` only before the first one has its identity.
    pub fn current(&self) -> Option<Arc<Shared>> {
        self.current.load_full()
    }

    /// What this node says of itself in the answers of the peer port.
    pub fn local(&self) -> LocalIdentity {
        self.current.load().as_ref().map_or_else(LocalIdentity::default, |shared| **shared.local.load())
    }

    fn watch_space(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        let blocked = move || room_watch::blocked(&*weak.upgrade()?.current()?);
        self.vital.spawn("the task that looks at the free space", self.space.clone().run(self.stop.clone(), blocked));
    }

    fn serve_peers(self: &Arc<Self>, listener: TcpListener) -> io::Result<()> {
        let door = self.fence.door(Side::Peers, &listener)?;
        let weak = Arc::downgrade(self);
        let local = move || weak.upgrade().map_or_else(LocalIdentity::default, |process| process.local());
        let service = Arc::new(PeerService::new(Arc::clone(self)));
        let closed = self.stop.child_token();
        let serving = Listener::serve(listener, Arc::new(local), service, Limits::default(), closed.clone());
        self.vital.spawn("the peer port", async move {
            serving.await;
            drop(door);
        });
        let (fence, stop, weak) = (Arc::clone(&self.fence), self.stop.clone(), Arc::downgrade(self));
        self.vital.spawn("the fence", async move {
            if stop.run_until_cancelled(fence.run()).await.is_some() {
                closed.cancel();
                if let Some(shared) = weak.upgrade().and_then(|process| process.current()) {
                    shared.forwarders.close();
                    shared.peers.close();
                }
            }
        });
        Ok(())
    }

    /// Ends the core of an incarnation and closes its files; the incarnation goes on as a proxy. Returns once
    /// nothing touches the folder any more. `why` is what its health says from now on.
    pub async fn retire(&self, shared: &Shared, why: &str) {
        if shared.retired.set(why.to_owned()).is_err() {
            return;
        }
        shared.core_stop.cancel();
        close_core(shared).await;
        // A disk that hangs lets go when it does; until then nobody may move its files.
        while let Some(wal) = shared.wal().cloned() {
            let ended = tokio::task::spawn_blocking(move || wal.wait_ended(LET_GO_LOOK)).await;
            if self.stop.is_cancelled() || ended.unwrap_or(true) {
                break;
            }
        }
    }

    /// Starts the next incarnation from what is in the folder now. The one before must be retired; it answers
    /// what it has taken, and ends. After an error it remains the current one.
    pub async fn start_next(self: &Arc<Self>) -> Result<Arc<Shared>, StartError> {
        let next = start::incarnate(self, |_| {}).await?;
        let before = self.current.swap(Some(Arc::clone(&next)));
        // Before the requests of the one before are counted: see `Node::take`.
        fence(Ordering::SeqCst);
        if let Some(before) = before {
            self.vital.spawn("the end of the incarnation before", end_incarnation(before));
        }
        Ok(next)
    }

    /// Stops everything and lets go of the folder. Commands under way are answered as unknown. Later calls
    /// return at once.
    pub async fn shutdown(&self) {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(lock) = lock else { return };
        self.stop.cancel();
        self.vital.finished().await;
        if let Some(shared) = self.current() {
            shared.vital.finished().await;
            shared.forwarders.close();
            shared.peers.close();
            let closed = tokio::time::timeout(CLOSE_MAX, close_core(&shared)).await;
            if closed.is_err() || shared.wal().is_some_and(|wal| !wal.wait_ended(Duration::ZERO)) {
                tracing::warn!("stopped, and the disk still holds what was begun on it");
                // A thread that is stuck may yet write: the folder is free when the process is gone.
                std::mem::forget(lock);
                return;
            }
        }
        tracing::info!("stopped");
        drop(lock);
    }
}

/// Waits until nobody waits for an answer of `shared`, and ends what is left of it.
async fn end_incarnation(shared: Arc<Shared>) {
    // The deadline of its last request bounds this.
    shared.requests.close();
    shared.stop.run_until_cancelled(shared.requests.wait()).await;
    shared.stop.cancel();
    shared.vital.finished().await;
    shared.forwarders.close();
    shared.peers.close();
}

/// Ends Raft, closes the state and then the log.
async fn close_core(shared: &Shared) {
    let state_gone = shared.state_gone.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let (Some(core), Some(state_gone)) = (shared.core.get(), state_gone) {
        if let Err(error) = core.raft.shutdown().await {
            tracing::warn!(%error, "the Raft task did not end well");
        }
        // The receiver ends with the state machine, never with a value.
        if tokio::time::timeout(STATE_GONE_MAX, state_gone).await.is_err() {
            tracing::warn!("the state was still in use after {STATE_GONE_MAX:?}");
        }
        let state = core.state.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || state.close_blocking()).await {
            tracing::warn!(%error, "the state did not close well");
        }
    }
    let Some(wal) = shared.wal().cloned() else { return };
    match tokio::task::spawn_blocking(move || wal.close()).await {
        Ok(Ok(())) => {}
        Ok(Err(latched)) => tracing::warn!(%latched, "closed the log, which had failed before"),
        Err(error) => tracing::warn!(%error, "the log did not close well"),
    }
}
