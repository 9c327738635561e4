//! Opening the log with the help of the peers: before Raft starts, damaged entries are asked for until each one is
//! given back, or surely was never acknowledged.
//!
//! Meanwhile the node answers such questions itself, takes no part in elections (there is no Raft), and says what it
//! waits for. The decisions are those of `stemedb_raft::repair`; this only carries questions and answers.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::future::join_all;
use stemedb_net::Lane;
use stemedb_raft::{
    Electorate, EntryAnswer, EntryQuestion, LostLog, OpenError, OpenStep, PendingLog, WalStore,
    types::{Member, StoredMembership},
};

use super::{
    bootstrap::ProbeAnswer,
    core::Shared,
    formation,
    kinds::Kind,
    messages::{EntryAnswers, EntryQuestions, pack, unpack},
    process::Process,
    start::{StartError, blocking},
};
use crate::{config::PeerEntry, state::machine::newest_checkpoint};

/// How often the peers are asked again.
const ASK_INTERVAL: Duration = Duration::from_millis(200);
/// How long a peer may take for an answer: it reads entries from its disk.
const REPLY_MAX: Duration = Duration::from_secs(5);
/// Questions of one message.
const QUESTIONS_MAX: usize = 512;
/// Bytes of entries in one answer, unless one entry is larger: as much as replication sends at once.
pub const ANSWER_BYTES_MAX: usize = 4 << 20;
/// The same wait is logged again after this long.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// A log that may have to wait for the peers.
pub enum Begun {
    /// It is open.
    Open(WalStore),
    /// It asks them, which `finish` does.
    Asks(Box<Asking>),
}

/// A log that lacks entries, and what is known of the cluster without it.
pub struct Asking {
    pending: PendingLog,
    applied: StoredMembership,
    /// The nodes of the configuration: asked too, because the log may have lost who the members are. Only members
    /// decide that an entry never was.
    listed: Vec<PeerEntry>,
}

/// Opens the log, or finds out what it lacks. A log that is beyond repair, or of a single voter, is refused.
pub async fn begin(process: &Process, shared: &Shared) -> Result<Begun, StartError> {
    let config = &process.config;
    let options = super::start::wal_options(process);
    let (disk, data_dir) = (Arc::clone(&process.disk), config.node.data_dir.clone());
    let step = blocking(move || WalStore::begin_open(disk, options)).await??;
    let OpenStep::AskPeers(pending) = step else { return Ok(Begun::Open(opened(step, shared)?)) };
    for damage in pending.damage() {
        tracing::error!("{damage}");
    }
    shared.entry_source.store(Some(Arc::new(pending.source())));
    let applied = blocking(move || applied_membership(&data_dir)).await?;
    let own = own_id(shared);
    let (pending, electorate) = blocking({
        let applied = applied.clone();
        move || pending.electorate(own, &applied).map(|electorate| (pending, electorate))
    })
    .await??;
    let lists_nobody_else = process.peers.iter().all(|peer| peer.name == config.node.name);
    if electorate.voters.is_empty() && lists_nobody_else {
        // Who votes is in the damaged part, and nobody else was ever heard of.
        return Err(pending.refusal().into());
    }
    if !electorate.is_alone() {
        return Ok(Begun::Asks(Box::new(Asking { pending, applied, listed: process.peers.clone() })));
    }
    let step = blocking(move || pending.resolve(&[], &electorate)).await??;
    Ok(Begun::Open(opened(step, shared)?))
}

fn own_id(shared: &Shared) -> Option<u64> {
    Some(shared.local.load().node_id).filter(|id| *id != 0)
}

/// The membership below everything that the log still has: it was purged only up to a checkpoint.
fn applied_membership(data_dir: &std::path::Path) -> StoredMembership {
    match newest_checkpoint(data_dir) {
        Some(checkpoint) => checkpoint.applied().membership.clone(),
        // A node that has purged something has one. If it cannot be read nobody's word counts, and nothing is discarded.
        None => StoredMembership::default(),
    }
}

fn opened(step: OpenStep, shared: &Shared) -> Result<WalStore, StartError> {
    match step {
        OpenStep::Ready(log, report) => {
            tracing::info!(?report, "write-ahead log opened");
            shared.metrics.wal_repaired_at_start(report.repaired.len() as u64);
            Ok(log)
        }
        OpenStep::Rebuild(lost) => Err(must_rebuild(&lost)),
        OpenStep::AskPeers(_) => Err(StartError::Refused("the log waits for peers, and there are none".into())),
    }
}

fn must_rebuild(lost: &LostLog) -> StartError {
    for damage in &lost.damage {
        tracing::error!("{damage}");
    }
    StartError::Lost(format!("{}: this node must be rebuilt from a replica", lost.why))
}

impl Asking {
    /// Asks until the log is whole. Ends early only with the incarnation, or when the log must be rebuilt.
    pub async fn finish(self, shared: &Arc<Shared>) -> Result<WalStore, StartError> {
        let Asking { mut pending, applied, listed } = self;
        let own = own_id(shared);
        let mut said: Option<(String, tokio::time::Instant)> = None;
        shared.repairing.send_replace(Some("the other nodes are being asked for damaged entries".into()));
        loop {
            let (asked, members, electorate) = blocking({
                let applied = applied.clone();
                move || {
                    let electorate = pending.electorate(own, &applied)?;
                    let members = pending.members(&applied)?;
                    Ok::<_, OpenError>((pending, members, electorate))
                }
            })
            .await??;
            pending = asked;
            let (members, unknown) = with_listed(shared, members, &listed).await;
            let (answers, mut silent) = ask_all(shared, &pending.questions(), own, &members).await;
            silent.extend(unknown);
            let waits_for = waits_for(&pending, &silent, &electorate);
            let step = blocking(move || pending.resolve(&answers, &electorate)).await??;
            pending = match step {
                OpenStep::AskPeers(pending) => pending,
                step => {
                    shared.repairing.send_replace(None);
                    return opened(step, shared);
                }
            };
            shared.repairing.send_replace(Some(waits_for.clone()));
            let now = tokio::time::Instant::now();
            if said.as_ref().is_none_or(|(old, at)| *old != waits_for || now >= *at + SAY_AGAIN) {
                tracing::warn!("the log is being repaired: {waits_for}");
                said = Some((waits_for, now));
            }
            tokio::select! {
                () = shared.core_stop.cancelled() => return Err(StartError::Refused("the node is stopping".into())),
                () = tokio::time::sleep(ASK_INTERVAL) => {}
            }
        }
    }
}

/// The members, and the listed nodes that the log does not know (any more), under the ids that they say they have; also
/// which of these did not say.
async fn with_listed(
    shared: &Shared,
    mut members: BTreeMap<u64, Member>,
    listed: &[PeerEntry],
) -> (BTreeMap<u64, Member>, Vec<String>) {
    let unknown = listed
        .iter()
        .filter(|peer| peer.name != shared.name() && !members.values().any(|member| member.name == peer.name));
    let cluster = shared.local.load().cluster_id;
    let probed = unknown.map(|peer| async move { (peer, formation::probe(shared, &peer.addr).await) });
    let mut silent = Vec::new();
    for (peer, answer) in join_all(probed).await {
        match answer {
            Ok(ProbeAnswer::Member { name, cluster_id, raft_id }) if cluster_id == cluster => {
                members.insert(raft_id, Member { name, peer_addr: peer.addr.clone(), http_addr: peer.http.clone() });
            }
            Ok(_) => silent.push(format!("{} (it is no member of this cluster)", peer.name)),
            Err(why) => silent.push(format!("{} ({why})", peer.name)),
        }
    }
    (members, silent)
}

fn waits_for(pending: &PendingLog, silent: &[String], electorate: &Electorate) -> String {
    let questions = pending.questions();
    let first = questions.first().map(|q| q.index).unwrap_or_default();
    let mut text = format!("{} entries are missing, the first at log index {first}", questions.len());
    if electorate.voters.is_empty() {
        text.push_str("; who votes is not known, so nothing can be given up");
    }
    match silent {
        [] => text.push_str("; no other node has them at present"),
        silent => text.push_str(&format!("; waiting for {}", silent.join(", "))),
    }
    text
}

/// Asks every member but this one; also who did not answer, and why.
async fn ask_all(
    shared: &Shared,
    questions: &[EntryQuestion],
    own: Option<u64>,
    members: &BTreeMap<u64, Member>,
) -> (Vec<(u64, u64, EntryAnswer)>, Vec<String>) {
    let others = members.iter().filter(|(id, _)| Some(**id) != own);
    let asked =
        others.map(|(id, member)| async move { (*id, member, ask(shared, *id, &member.peer_addr, questions).await) });
    let (mut answers, mut silent) = (Vec::new(), Vec::new());
    for (id, member, (said, why)) in join_all(asked).await {
        answers.extend(said.into_iter().map(|(index, answer)| (id, index, answer)));
        silent.extend(why.map(|why| format!("{} ({why})", member.name)));
    }
    (answers, silent)
}

/// Asks one node everything; what it answered, and why not all.
pub(super) async fn ask(
    shared: &Shared,
    id: u64,
    addr: &str,
    questions: &[EntryQuestion],
) -> (Vec<(u64, EntryAnswer)>, Option<String>) {
    let peer = shared.peers.to(id, addr, Lane::Bulk);
    let mut answers: Vec<(u64, EntryAnswer)> = Vec::new();
    while let Some(rest) = questions.get(answers.len()..).filter(|rest| !rest.is_empty()) {
        let questions = rest.iter().take(QUESTIONS_MAX).cloned().collect();
        let body = match pack(&EntryQuestions { questions }) {
            Ok(body) => body,
            Err(error) => return (answers, Some(error.to_string())),
        };
        let reply = match peer.call(Kind::Entries.number(), body, REPLY_MAX).await {
            Ok(reply) => reply,
            Err(error) => return (answers, Some(error.to_string())),
        };
        match unpack::<EntryAnswers>(&reply) {
            Ok(EntryAnswers { answers: more }) if !more.is_empty() && more.len() <= rest.len() => answers.extend(more),
            Ok(_) => return (answers, Some("it answered something else than it was asked".into())),
            Err(error) => return (answers, Some(error.to_string())),
        }
    }
    (answers, None)
}

/// Answers another node's questions. Blocking.
pub fn answer_blocking(shared: &Shared, request: &EntryQuestions) -> Option<EntryAnswers> {
    let source = match shared.wal() {
        Some(wal) => wal.source(),
        None => (*shared.entry_source.load_full()?).clone(),
    };
    Some(EntryAnswers { answers: source.answer_all(&request.questions, ANSWER_BYTES_MAX) })
}
