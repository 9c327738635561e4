//! The steps of `admin::tree`. While files are fetched and compared, log, vote and core go on.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use stemedb_raft::WalHandle;

use super::{
    Need,
    ask::known_members,
    desk::{JobState, job_id},
    fail_point::{self, Stopped},
    probe,
    pull::{self, PullError},
    runner::{Done, Halt, Runner, again, blocking, is_open, need},
    throttle::Throttle,
    tree_watch,
};
use crate::{
    admin::tree::{Fit, REPLACEMENTS_MAX, Step, View},
    clock,
    node::{core::Shared, handover},
    state::{
        engine::{
            EngineError, ErrorClass,
            checkpoint::Checkpoint,
            folder, quarantine,
            replace::{self, LogExtent, NotAllowed},
        },
        machine,
    },
};

/// The kind of such a job.
const KIND: &str = "tree";
/// Starts on the new tree that may fail before the whole node is rebuilt.
const STARTS_MAX: u32 = 3;
/// The span over which replacements are counted, milliseconds.
const COUNTED_MS: u64 = 24 * 3_600_000;

/// A replacement under way. Nothing of it is kept on the disk but the files.
#[derive(Default)]
pub(super) struct TreeJob {
    why: String,
    manifest: Option<Bytes>,
    /// The fetched files as a checkpoint, compared with their hashes.
    checkpoint: Option<Checkpoint>,
    fit: Fit,
    /// Why the whole node is to be rebuilt instead.
    hopeless: Option<String>,
    replaced: bool,
    starts_failed: u32,
}

/// Why the replacement itself did not come to its end.
enum Failed {
    Stopped(Stopped),
    /// What was fetched is not what it was.
    Fetched(String),
    /// The disk has failed.
    Disk(String),
    Again(String),
}

impl From<EngineError> for Failed {
    fn from(error: EngineError) -> Failed {
        if let EngineError::Io { source, .. } = &error
            && let Some(Stopped(point)) = source.get_ref().and_then(|inner| inner.downcast_ref::<Stopped>())
        {
            return Failed::Stopped(Stopped(point));
        }
        match error.class() {
            ErrorClass::Damaged => Failed::Fetched(error.to_string()),
            ErrorClass::Disk => Failed::Disk(error.to_string()),
            ErrorClass::Full | ErrorClass::Busy | ErrorClass::Newer | ErrorClass::NotPermitted => {
                Failed::Again(error.to_string())
            }
        }
    }
}

/// What the log of this incarnation has to say of a checkpoint. It may be closed.
fn allowed(wal: &WalHandle, checkpoint: &Checkpoint) -> Result<(), NotAllowed> {
    let applied = checkpoint.applied().log_id;
    let at_checkpoint = applied.and_then(|id| wal.log_id_at(id.index));
    replace::allowed(applied, LogExtent { purged: wal.purged(), last: wal.last_log_id(), at_checkpoint })
}

fn assembled(data_dir: &std::path::Path) -> PathBuf {
    data_dir.join("rebuild").join("checkpoint")
}

impl Runner {
    pub(super) fn tree_view(&self, shared: &Shared) -> View {
        let job = self.tree.as_ref();
        View {
            needed: matches!(need(shared), Some(Need::Tree(_))),
            alone: self.process.peers.len() < 2 && shared.view.borrow().membership.nodes().nth(1).is_none(),
            automatic: self.process.config.cluster.auto_rebuild,
            begun: job.is_some(),
            hopeless: job.is_some_and(|job| job.hopeless.is_some()),
            folder_good: self.folder_good,
            pulled: job.is_some_and(|job| job.manifest.is_some()),
            fit: job.map_or(Fit::Unknown, |job| job.fit),
            core_open: is_open(shared),
            replaced: job.is_some_and(|job| job.replaced),
        }
    }

    pub(super) async fn tree_step(&mut self, step: Step, shared: &Arc<Shared>) -> Done {
        match step {
            Step::Begin => self.begin_tree(shared).await,
            Step::Probe => self.probe_for_tree().await,
            Step::Pull => self.pull_for_tree(shared).await,
            Step::Check => self.check(shared).await,
            Step::EndCore => self.end_core_for_tree(shared).await,
            Step::Replace => self.replace(shared).await,
            Step::Start => self.start_on_new_tree().await,
            Step::Finish => self.finish_tree().await,
            Step::RebuildNode => {
                self.rebuild_node(shared);
                Ok(())
            }
            Step::Rest | Step::AwaitOperator => Ok(()),
        }
    }

    fn job(&mut self) -> &mut TreeJob {
        self.tree.get_or_insert_default()
    }

    fn show_tree(&self, step: &'static str) {
        let Some(tree) = &self.tree else { return };
        self.desk.show(|job| {
            if job.id.is_empty() {
                job.id = job_id(uuid::Uuid::now_v7().as_u128());
                job.began_unix_ms = clock::unix_ms();
            }
            job.kind = KIND;
            job.node.clone_from(&self.process.config.node.name);
            job.state = JobState::Running;
            job.step = step;
            job.detail.clone_from(&tree.why);
            job.automatic = true;
        });
    }

    async fn begin_tree(&mut self, shared: &Shared) -> Done {
        let why = need(shared).map_or_else(String::new, |need| need.why().to_owned());
        let (data_dir, now_ms) = (self.data_dir.clone(), clock::unix_ms());
        let counted = blocking(move || {
            let kept = quarantine::list(&data_dir, None)?;
            let counts = |old: &&quarantine::Quarantined| {
                old.what == "kv" && now_ms.saturating_sub(old.since_unix_ms) < COUNTED_MS
            };
            Ok::<_, std::io::Error>(kept.iter().filter(counts).count())
        });
        let times = counted.await?;
        let hopeless = (times >= REPLACEMENTS_MAX)
            .then(|| format!("the tree was damaged and replaced {times} times within a day: {why}"));
        tracing::warn!("this node begins to replace its tree: {why}");
        self.tree = Some(TreeJob { why, hopeless, ..TreeJob::default() });
        self.folder_good = false;
        self.show_tree("beginning");
        self.hit("tree.begun")?;
        Ok(())
    }

    async fn probe_for_tree(&mut self) -> Done {
        let (dir, seed) = (self.data_dir.clone(), clock::unix_ms());
        match blocking(move || probe::probe(&dir, seed)).await {
            Ok(()) => self.folder_good = true,
            Err(Halt::Again(why)) => return Err(again(format!("the data folder is not good: {why}"))),
            Err(stopped) => return Err(stopped),
        }
        Ok(())
    }

    async fn pull_for_tree(&mut self, shared: &Shared) -> Done {
        self.show_tree("pulling");
        let (membership, leader) = {
            let view = shared.view.borrow();
            (Arc::clone(&view.membership), view.leader.as_ref().map(|leader| leader.id))
        };
        let sources = pull::sources(&known_members(&membership), &self.process.config.node.name, leader, None);
        if sources.is_empty() {
            return Err(again("no other node is known yet to fetch a checkpoint from"));
        }
        let mut throttle = Throttle::new(self.process.config.rebuild.throttle_mb_per_s);
        let mut why = Vec::new();
        for source in &sources {
            let (peers, progress) = (&shared.peers, &self.desk.progress);
            let pulled = pull::pull(peers, source, &sources, &self.data_dir, &mut throttle, progress).await;
            match pulled {
                Ok(manifest) => {
                    tracing::info!(from = source.member.name, "a checkpoint was fetched for the tree");
                    let job = self.job();
                    (job.manifest, job.fit) = (Some(manifest), Fit::Unknown);
                    self.hit("tree.pulled")?;
                    return Ok(());
                }
                Err(error @ PullError::Local { .. }) => {
                    // Whether the disk still takes anything is for the probe to say.
                    self.folder_good = false;
                    return Err(again(error));
                }
                Err(error) => why.push(error.to_string()),
            }
        }
        Err(again(why.join("; ")))
    }

    async fn check(&mut self, shared: &Shared) -> Done {
        self.show_tree("comparing");
        let Some(manifest) = self.job().manifest.clone() else { return Ok(()) };
        let data_dir = self.data_dir.clone();
        let put_together = tokio::task::spawn_blocking(move || {
            let into = assembled(&data_dir);
            pull::assemble(&data_dir, &manifest, &into).map_err(|e| Failed::Again(e.to_string()))?;
            let checkpoint = Checkpoint::load(&into)?;
            checkpoint.verify_blocking()?;
            Ok::<_, Failed>(checkpoint)
        });
        let checkpoint = match put_together.await.map_err(again)? {
            Ok(checkpoint) => checkpoint,
            Err(failed) => return self.failed(shared, failed),
        };
        let Some(wal) = shared.wal() else { return Err(again("the log is not open yet")) };
        match allowed(wal, &checkpoint) {
            Ok(()) => {
                let job = self.job();
                (job.checkpoint, job.fit) = (Some(checkpoint), Fit::Fits);
                self.hit("tree.checked")?;
                Ok(())
            }
            Err(why) => self.not_allowed(why),
        }
    }

    fn not_allowed(&mut self, why: NotAllowed) -> Done {
        let job = self.job();
        job.checkpoint = None;
        match why {
            NotAllowed::Behind(why) => {
                (job.manifest, job.fit) = (None, Fit::Unknown);
                Err(again(why))
            }
            NotAllowed::OtherHistory(why) => {
                (job.hopeless, job.fit) = (Some(why), Fit::Not);
                Ok(())
            }
        }
    }

    async fn end_core_for_tree(&mut self, shared: &Arc<Shared>) -> Done {
        self.show_tree("ending the core");
        if shared.silenced().is_none() {
            handover::hand_over(shared).await;
        }
        self.process.retire(shared, "its tree is being replaced").await;
        self.hit("tree.core_ended")?;
        Ok(())
    }

    async fn replace(&mut self, shared: &Arc<Shared>) -> Done {
        self.show_tree("swapping");
        let Some(checkpoint) = self.job().checkpoint.clone() else {
            self.job().fit = Fit::Unknown;
            return Ok(());
        };
        // Again, now that nothing changes the log any more.
        if let Some(wal) = shared.wal()
            && let Err(why) = allowed(wal, &checkpoint)
        {
            return self.not_allowed(why);
        }
        let (data_dir, now_ms) = (self.data_dir.clone(), clock::unix_ms());
        let work = move || {
            let fail_point = fail_point::of_folder(&data_dir);
            // First: where the log ends before the new tree, the checkpoint says that nothing was lost.
            let Some(shelved) = machine::shelve(&data_dir, checkpoint)? else {
                let why = "the newest checkpoint of this node reaches further than what was fetched";
                return Err(Failed::Fetched(why.to_owned()));
            };
            fail_point::hit(&data_dir, "tree.shelved").map_err(Failed::Stopped)?;
            let old = replace::replace(&data_dir, &shelved, now_ms, None, &Some(fail_point))?;
            tracing::info!(?old, "the tree was replaced by a checkpoint of another node");
            Ok(())
        };
        match tokio::task::spawn_blocking(work).await.map_err(again)? {
            Ok(()) => {
                self.job().replaced = true;
                self.hit("tree.replaced")?;
                Ok(())
            }
            Err(failed) => self.failed(shared, failed),
        }
    }

    fn failed(&mut self, shared: &Shared, failed: Failed) -> Done {
        let job = self.job();
        match failed {
            Failed::Stopped(point) => Err(Halt::Stopped(point)),
            Failed::Again(why) => Err(again(why)),
            Failed::Fetched(why) => {
                (job.manifest, job.checkpoint, job.fit) = (None, None, Fit::Unknown);
                Err(again(why))
            }
            Failed::Disk(why) => {
                // Never a second try on files whose write or sync has failed.
                job.hopeless = Some(format!("replacing the tree failed: {why}"));
                self.rebuild_node(shared);
                Ok(())
            }
        }
    }

    async fn start_on_new_tree(&mut self) -> Done {
        self.show_tree("starting");
        let why = match self.process.start_next().await {
            Ok(next) if is_open(&next) => {
                self.hit("tree.started")?;
                return Ok(());
            }
            Ok(next) => need(&next).map_or_else(String::new, |need| need.why().to_owned()),
            Err(error) => error.to_string(),
        };
        let why = format!("the node does not start on its new tree: {why}");
        let job = self.job();
        job.starts_failed += 1;
        if job.starts_failed >= STARTS_MAX {
            job.hopeless = Some(why.clone());
        }
        Err(again(why))
    }

    async fn finish_tree(&mut self) -> Done {
        let replaced = self.tree.take().is_some_and(|job| job.replaced);
        self.folder_good = false;
        if replaced {
            tree_watch::forget(&self.data_dir).await;
            self.process.metrics.tree_replaced();
            tracing::warn!("this node has replaced its tree and works again");
        }
        self.remove_fetched().await;
        let detail = (!replaced).then(|| "a checkpoint that the leader has sent took the tree's place".to_owned());
        self.desk.end(JobState::Finished, detail);
        Ok(())
    }

    pub(super) async fn remove_fetched(&self) {
        self.remove_staging().await;
        let dir = assembled(&self.data_dir);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || folder::remove(&dir)).await {
            tracing::warn!(%error, "fetched files stay beside the tree");
        }
    }

    /// From here on it is a rebuild of the whole node; the files that were fetched serve that too.
    fn rebuild_node(&mut self, shared: &Shared) {
        let Some(job) = self.tree.take() else { return };
        let why = job.hopeless.unwrap_or(job.why);
        tracing::error!("the tree cannot be replaced alone: {why}");
        self.folder_good = false;
        shared.need.send_replace(Some(Need::Node(why)));
    }
}
