//! The steps of `admin::rebuild`, each of which may be carried out again.

use std::{path::PathBuf, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use stemedb_net::{Lane, Limits};
use stemedb_raft::types::Member;
use tokio::time::Instant;

use super::{
    ask::{answers, ask_any, call, known_members, membership_of, pulling_identity},
    desk::{JobState, Order, job_id},
    journal::Journal,
    messages::{Ask, AskReply, Granted, KnownMember, LeaderStep, Refusal, StepReply, StepRequest},
    probe, pull,
    runner::{Done, Halt, PAUSE_MIN, Runner, again, blocking, is_open, need},
    spare,
    swap::Swap,
    throttle::Throttle,
};
use crate::{
    admin::rebuild::Phase,
    clock,
    config::PeerEntry,
    node::{core::Shared, kinds::Kind, peers::Peers, start},
};

/// How often the permit is renewed while files are fetched; it expires after an hour.
const RENEW_INTERVAL: Duration = Duration::from_secs(600);
/// A node whose files are good goes back to work when it gets no permit for this long.
const GIVE_UP_AFTER: Duration = Duration::from_secs(15);
/// How long the data folder has to fail its probes before the spare one takes its place: a disk that comes back is better
/// than one that is new to everybody.
const MOVE_AFTER: Duration = Duration::from_secs(5);
/// Starts of the new incarnation that may fail before everything is fetched anew.
const STARTS_MAX: u32 = 3;

impl Runner {
    pub(super) async fn probe(&mut self, shared: &Arc<Shared>, order: Option<Order>) -> Done {
        let (dir, seed) = (self.data_dir.clone(), clock::unix_ms());
        let tried = blocking(move || probe::probe(&dir, seed)).await;
        match tried {
            Ok(()) => (self.folder_good, self.folder_bad_since) = (true, None),
            Err(Halt::Again(why)) => {
                let since = *self.folder_bad_since.get_or_insert_with(Instant::now);
                let spare = spare::wanted(&self.process.config, order.as_ref());
                return match spare.filter(|_| since.elapsed() >= MOVE_AFTER) {
                    Some(spare) => self.move_to(spare, shared, order, &why).await,
                    None => Err(again(format!("the data folder is not good yet: {why}"))),
                };
            }
            Err(stopped) => return Err(stopped),
        }
        Ok(())
    }

    /// Takes the spare folder into use. The rebuild goes on there once the node is started anew.
    async fn move_to(&mut self, spare: PathBuf, shared: &Arc<Shared>, order: Option<Order>, why: &str) -> Done {
        let why = format!("the data folder is not good any more: {why}");
        // Before the journal, as with one in the data folder: no core runs under the old id from there on.
        self.process.retire(shared, "this node moves to its spare folder").await;
        // There are no old files in the spare folder: those in the data folder are given up.
        let journal = Journal { emptied: true, why: why.clone(), ..self.journal_of(shared, order) };
        let (dir, seed, seen) = (spare.clone(), clock::unix_ms(), self.process.boots.clone());
        blocking(move || spare::take(&dir, seed, &seen, &journal)).await?;
        tracing::warn!(spare_dir = %spare.display(), "{why}; this node goes on in its spare folder");
        self.process.moved.cancel();
        self.process.stop.cancelled().await;
        Ok(())
    }

    /// A journal of a rebuild that begins now.
    fn journal_of(&self, shared: &Shared, order: Option<Order>) -> Journal {
        let ordered = order.as_ref().map(|order| order.job);
        let shown = self.desk.current().and_then(|job| uuid::Uuid::parse_str(&job.id).ok()).map(|id| id.as_u128());
        let cluster_id = (**shared.identity.load()).as_ref().map(|id| id.cluster_id).unwrap_or_default();
        let found = need(shared);
        Journal {
            job: ordered.or(shown).unwrap_or_else(|| uuid::Uuid::now_v7().as_u128()),
            phase: Phase::Asking,
            why: found.map_or_else(|| "an operator has asked for it".to_owned(), |need| need.why().to_owned()),
            automatic: order.is_none(),
            from: order.and_then(|order| order.from),
            began_unix_ms: clock::unix_ms(),
            emptied: false,
            cluster_id,
            fresh_id: 0,
            leader: shared.view.borrow().leader.as_ref().map_or(0, |l| l.id),
            members: known_members(&shared.view.borrow().membership),
        }
    }

    pub(super) async fn begin(&mut self, shared: &Arc<Shared>, order: Option<Order>) -> Done {
        (self.healthy_before, self.restarted) = (need(shared).is_none(), false);
        self.save(self.journal_of(shared, order)).await?;
        self.reset();
        self.show("ending the core");
        tracing::warn!(why = self.journal()?.why, "this node begins to rebuild itself");
        self.hit("rebuild.begun")?;
        Ok(())
    }

    /// Forgets what belonged to the attempt before.
    fn reset(&mut self) {
        (self.looked_again, self.joined, self.stale, self.operator_decides) = (false, false, false, false);
        self.refused_since = None;
        self.starts_failed = 0;
    }

    pub(super) async fn end_core(&mut self, shared: &Arc<Shared>) -> Done {
        // Leadership first: an election would be felt.
        if shared.silenced().is_none() {
            crate::node::handover::hand_over(shared).await;
        }
        self.process.retire(shared, "this node is being rebuilt").await;
        self.hit("rebuild.core_ended")?;
        Ok(())
    }

    /// Addresses of the others.
    fn addresses(&self) -> Vec<String> {
        let known = self.journal.as_ref().map(|journal| &*journal.members).unwrap_or_default();
        to_ask(known, &self.process.peers, &self.process.config.node.name)
    }

    /// To be called when none of the members that are known has answered: all of them may have been replaced. Whoever of
    /// the configured peers does says who there is today.
    async fn learn_members(&mut self, shared: &Shared) -> Done {
        let mut journal = self.journal()?;
        let question = Ask { dry_run: true, ..self.question(&journal) };
        if let AskReply::Granted(granted) = self.ask_leader(shared, &question).await
            && granted.members != journal.members
        {
            tracing::info!(members = granted.members.len(), "the members are others than those known here");
            (journal.members, journal.leader) = (granted.members, granted.leader);
            journal.cluster_id = granted.cluster_id;
            self.save(journal).await?;
        }
        Ok(())
    }

    /// Asks one node after the other until one decides.
    async fn ask_leader(&self, shared: &Shared, ask: &Ask) -> AskReply {
        ask_any(shared, self.addresses(), ask).await
    }

    fn question(&self, journal: &Journal) -> Ask {
        Ask {
            cluster_id: (journal.cluster_id != [0; 16]).then_some(journal.cluster_id),
            name: self.process.config.node.name.clone(),
            job: journal.job,
            automatic: journal.automatic,
            dry_run: false,
            emptied: journal.emptied,
        }
    }

    pub(super) async fn ask(&mut self, shared: &Arc<Shared>, order: Option<Order>) -> Done {
        self.show("asking for the permit");
        let mut journal = self.journal()?;
        if journal.automatic && order.is_some() {
            journal.automatic = false;
            self.operator_decides = false;
            self.save(journal.clone()).await?;
        }
        match self.ask_leader(shared, &self.question(&journal)).await {
            AskReply::Granted(granted) => {
                let Granted { permit: Some(permit), cluster_id, leader, members } = *granted else {
                    return Err(again("the leader granted nothing"));
                };
                (journal.cluster_id, journal.fresh_id, journal.leader) = (cluster_id, permit.fresh_id, leader);
                journal.members = members;
                if journal.phase == Phase::Asking {
                    journal.phase = Phase::Granted;
                } else {
                    self.looked_again = true;
                }
                self.refused_since = None;
                self.know_members(shared, &journal);
                self.save(journal).await?;
                self.hit("rebuild.granted")?;
                Ok(())
            }
            AskReply::Refused(Refusal::Operator(why)) if journal.automatic => {
                self.operator_decides = true;
                Err(again(why))
            }
            AskReply::Refused(refusal) => self.refused(shared, &journal, refusal.to_string()).await,
            AskReply::NotLeader { .. } => self.refused(shared, &journal, "no leader is known".into()).await,
            AskReply::Failed(why) => self.refused(shared, &journal, why).await,
        }
    }

    /// A node whose own files are good goes back to work when it is refused for long.
    async fn refused(&mut self, shared: &Arc<Shared>, journal: &Journal, why: String) -> Done {
        let since = *self.refused_since.get_or_insert_with(Instant::now);
        let healthy = !journal.automatic && self.healthy_before;
        // After a restart the log is looked at anew: what it says of itself counts, and without it two nodes that
        // failed at once would wait for each other for ever.
        let may_go_back = !journal.emptied && (healthy || self.restarted);
        if !may_go_back || since.elapsed() < GIVE_UP_AFTER {
            return Err(again(format!("no permit yet: {why}")));
        }
        tracing::warn!("the rebuild is given up, and the node goes back to work: {why}");
        let cancel = LeaderStep::Cancel { job: journal.job };
        if let Err(why) = self.leader_step(shared, cancel).await {
            // It expires by itself, and this node never uses it.
            tracing::warn!("the permit, if there is one, could not be given back: {why}");
        }
        let data_dir = self.data_dir.clone();
        blocking(move || Journal::remove(&data_dir)).await?;
        self.journal = None;
        self.reset();
        self.desk.end(JobState::Failed, Some(format!("given up after {GIVE_UP_AFTER:?}: {why}")));
        self.process.start_next().await.map(|_| ()).map_err(|e| {
            self.process.vital.end(format!("the node could not go back to work: {e}"));
            again(e)
        })
    }

    /// Lets a proxy without a state know who the others are.
    fn know_members(&self, shared: &Arc<Shared>, journal: &Journal) {
        if !shared.local.load().has_raft_id() {
            shared.local.store(Arc::new(pulling_identity(journal)));
        }
        let unknown = shared.view.borrow().membership.nodes().next().is_none();
        if unknown && let Some(membership) = membership_of(&journal.members) {
            shared.view.send_modify(|view| view.membership = Arc::new(membership));
        }
    }

    pub(super) async fn pull(&mut self, shared: &Shared, order: Option<Order>) -> Done {
        self.show("pulling");
        let mut journal = self.journal()?;
        let from = order.and_then(|order| order.from).or_else(|| journal.from.clone());
        let own = &self.process.config.node.name;
        let leader = (journal.leader != 0).then_some(journal.leader);
        let sources = pull::sources(&journal.members, own, leader, from.as_deref());
        if sources.is_empty() {
            let who = from.unwrap_or_else(|| "another member".to_owned());
            return Err(again(format!("there is no {who} to fetch a checkpoint from")));
        }
        let local = Arc::new(ArcSwap::from_pointee(pulling_identity(&journal)));
        let peers = Peers::new(local, Limits::default(), self.process.boots.clone());
        let mut throttle = Throttle::new(self.process.config.rebuild.throttle_mb_per_s);
        let mut why = Vec::new();
        let others = pull::sources(&journal.members, own, leader, None);
        for source in sources {
            // A member that is gone for good would take all the time that an offer may take.
            if let Err(silent) = answers(shared, &source.member.peer_addr).await {
                why.push(format!("{}: {silent}", source.member.name));
                continue;
            }
            let pulled = {
                let progress = &self.desk.progress;
                let pulling = pull::pull(&peers, &source, &others, &self.data_dir, &mut throttle, progress);
                tokio::select! {
                    pulled = pulling => pulled,
                    () = self.keep_permit(&journal) => continue,
                }
            };
            match pulled {
                Ok(manifest) => {
                    self.cluster_busy = throttle.was_busy();
                    peers.close();
                    let path = manifest_path(&self.data_dir);
                    blocking(move || crate::state::engine::folder::replace_synced(&path, &manifest)).await?;
                    let progress = self.desk.current();
                    tracing::info!(
                        from = source.member.name,
                        bytes = progress.as_ref().map(|p| p.bytes_total),
                        ms = progress.as_ref().map(|p| p.ms),
                        "a checkpoint was fetched"
                    );
                    journal.phase = Phase::Pulled;
                    self.looked_again = false;
                    self.save(journal).await?;
                    self.hit("rebuild.pulled")?;
                    return Ok(());
                }
                Err(error) => why.push(error.to_string()),
            }
        }
        peers.close();
        self.learn_members(shared).await?;
        Err(again(why.join("; ")))
    }

    /// Renews the permit from time to time; never returns.
    async fn keep_permit(&self, journal: &Journal) {
        loop {
            tokio::time::sleep(RENEW_INTERVAL).await;
            let Some(shared) = self.process.current() else { continue };
            // Without an answer it is asked for again before anything is swapped.
            let reply = self.ask_leader(&shared, &self.question(journal)).await;
            tracing::debug!(?reply, "permit renewed");
        }
    }

    pub(super) async fn swap(&mut self) -> Done {
        self.show("swapping");
        let mut journal = self.journal()?;
        let swap = Swap {
            data_dir: self.data_dir.clone(),
            disk: Arc::clone(&self.process.disk),
            wal: start::wal_options(&self.process),
            began_unix_ms: journal.began_unix_ms,
            what: "node",
            gently: self.cluster_busy,
        };
        let path = manifest_path(&self.data_dir);
        let manifest = blocking(move || std::fs::read(path)).await?;
        if journal.phase == Phase::Pulled {
            (journal.phase, journal.emptied) = (Phase::Swapping, true);
            self.save(journal.clone()).await?;
            self.hit("rebuild.swap.announced")?;
        }
        if journal.phase == Phase::Swapping {
            let away = swap.clone();
            tokio::task::spawn_blocking(move || away.put_away()).await.map_err(again)??;
            journal.phase = Phase::Emptied;
            self.save(journal.clone()).await?;
            self.hit("rebuild.swap.emptied")?;
        }
        let tree = swap.clone();
        tokio::task::spawn_blocking(move || tree.put_tree_in_place(&manifest)).await.map_err(again)??;
        swap.put_log_in_place(journal.cluster_id, &self.process.config.node.name, journal.fresh_id).await?;
        journal.phase = Phase::Installed;
        self.save(journal).await?;
        self.hit("rebuild.swap.installed")?;
        self.remove_staging().await;
        Ok(())
    }

    /// The fetched files are linked into the tree; a second name would hold their room after a compaction.
    pub(super) async fn remove_staging(&self) {
        let dir = pull::staging(&self.data_dir);
        let removed = tokio::task::spawn_blocking(move || crate::state::engine::folder::remove(&dir)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(%error, "fetched files stay beside the tree");
        }
    }

    pub(super) async fn start(&mut self) -> Done {
        self.show("starting");
        self.process.boots.begin_anew();
        let why = match self.process.start_next().await {
            Ok(next) if is_open(&next) => {
                self.hit("rebuild.started")?;
                return Ok(());
            }
            Ok(next) => need(&next).map_or_else(String::new, |need| need.why().to_owned()),
            Err(error) => error.to_string(),
        };
        self.starts_failed += 1;
        self.stale = self.starts_failed >= STARTS_MAX;
        Err(again(format!("the new files do not start: {why}")))
    }

    pub(super) async fn start_over(&mut self) -> Done {
        let mut journal = self.journal()?;
        tracing::warn!(fresh_id = journal.fresh_id, "the rebuild starts over under another permit");
        journal.job = uuid::Uuid::now_v7().as_u128();
        journal.phase = Phase::Asking;
        journal.began_unix_ms = clock::unix_ms();
        journal.emptied = true;
        self.desk.show(|job| job.id = job_id(journal.job));
        self.save(journal).await?;
        self.reset();
        Ok(())
    }

    /// Has the leader take a step, whichever node leads by now, and whoever the members are.
    async fn step_of_leader(&mut self, shared: &Shared, step: LeaderStep) -> Result<StepReply, Halt> {
        match self.leader_step(shared, step).await {
            Ok(reply) => Ok(reply),
            Err(why) => {
                self.learn_members(shared).await?;
                Err(again(why))
            }
        }
    }

    async fn leader_step(&self, shared: &Shared, step: LeaderStep) -> Result<StepReply, String> {
        let journal = self.journal.as_ref().ok_or("there is no rebuild under way")?;
        let own = &self.process.config.node.name;
        let request = StepRequest { name: own.clone(), fresh_id: journal.fresh_id, step };
        let mut why = Vec::new();
        let leader = shared.view.borrow().leader.as_ref().map_or(journal.leader, |leader| leader.id);
        let mut voters = pull::sources(&journal.members, own, None, None);
        voters.retain(|known| known.voter);
        // The leader first. Of the others one may be gone for good.
        voters.sort_by_key(|known| known.id != leader);
        for known in &voters {
            let is_heard = shared.view.borrow().leader.as_ref().is_some_and(|leader| leader.id == known.id);
            if !is_heard && let Err(silent) = answers(shared, &known.member.peer_addr).await {
                why.push(format!("{}: {silent}", known.member.name));
                continue;
            }
            let peer = shared.peers.to(known.id, &known.member.peer_addr, Lane::Control);
            match call::<StepReply>(&peer, Kind::RebuildStep, &request).await {
                Ok(StepReply::NotLeader) => why.push(format!("{} does not lead", known.member.name)),
                Ok(StepReply::Failed(text)) => why.push(format!("{}: {text}", known.member.name)),
                Ok(reply) => return Ok(reply),
                Err(text) => why.push(format!("{}: {text}", known.member.name)),
            }
        }
        Err(why.join("; "))
    }

    pub(super) async fn join(&mut self, shared: &Arc<Shared>) -> Done {
        self.show("joining");
        let member = self.own_member()?;
        match self.step_of_leader(shared, LeaderStep::Join(member)).await? {
            StepReply::Stale(why) => {
                tracing::warn!("{why}");
                self.stale = true;
            }
            _ => {
                self.joined = true;
                self.hit("rebuild.joined")?;
            }
        }
        Ok(())
    }

    /// This node as the others know it.
    fn own_member(&self) -> Result<Member, Halt> {
        let name = &self.process.config.node.name;
        let listed = self.process.peers.iter().find(|peer| peer.name == *name).map(|peer| Member {
            name: peer.name.clone(),
            peer_addr: peer.addr.clone(),
            http_addr: peer.http.clone(),
        });
        let journal = self.journal()?;
        let before = || journal.members.iter().find(|known| known.member.name == *name).map(|k| k.member.clone());
        listed.or_else(before).ok_or_else(|| again("this node does not know its own address; list it in cluster.peers"))
    }

    pub(super) async fn promote(&mut self, shared: &Arc<Shared>) -> Done {
        self.show("catching up");
        match self.step_of_leader(shared, LeaderStep::Promote).await? {
            StepReply::Behind { entries } => {
                self.desk.show(|job| job.entries_behind = Some(entries));
                tokio::time::sleep(PAUSE_MIN).await;
                Ok(())
            }
            StepReply::Stale(why) => {
                tracing::warn!("{why}");
                self.stale = true;
                Ok(())
            }
            _ => {
                self.hit("rebuild.promoted")?;
                let data_dir = self.data_dir.clone();
                blocking(move || Journal::remove(&data_dir)).await?;
                self.remove_staging().await;
                let fresh_id = self.journal.take().map(|j| j.fresh_id);
                self.reset();
                self.folder_good = false;
                self.desk.show(|job| job.entries_behind = Some(0));
                self.desk.end(JobState::Finished, None);
                self.process.metrics.rebuild_finished();
                tracing::warn!(?fresh_id, "this node has rebuilt itself and votes again");
                Ok(())
            }
        }
    }
}

/// Whom to ask: the voters that are known, then the configured peers, which may be newer. Pure.
fn to_ask(known: &[KnownMember], peers: &[PeerEntry], own: &str) -> Vec<String> {
    let voters = pull::sources(known, own, None, None).into_iter().filter(|known| known.voter);
    let listed = peers.iter().filter(|peer| peer.name != own).map(|peer| peer.addr.clone());
    let mut addresses: Vec<String> = Vec::new();
    for addr in voters.map(|known| known.member.peer_addr).chain(listed) {
        if !addresses.contains(&addr) {
            addresses.push(addr);
        }
    }
    addresses
}

pub(super) fn manifest_path(data_dir: &std::path::Path) -> PathBuf {
    data_dir.join("rebuild").join("manifest")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configured_peers_are_asked_too_because_all_known_members_may_have_been_replaced() {
        let known = |id, name: &str, voter| KnownMember {
            id,
            member: Member { name: name.into(), peer_addr: format!("{name}:1"), http_addr: String::new() },
            voter,
        };
        let peer = |name: &str| PeerEntry { name: name.into(), addr: format!("{name}:1"), http: String::new() };
        let members = [known(1, "a", true), known(2, "b", false), known(3, "own", true)];
        assert_eq!(to_ask(&members, &[peer("own"), peer("c"), peer("a")], "own"), ["a:1", "c:1"]);
        assert_eq!(to_ask(&[], &[peer("own"), peer("c")], "own"), ["c:1"]);
    }
}
