//! Finds damaged entries of the running log on the other nodes.
//!
//! The log asks when it meets an entry that it cannot read, and the scrubber when it found one. The question, and what
//! makes a copy the right one, are those of the repair before Raft starts (`repair`); here the entry's identity is
//! always known in full, so that any node's copy will do, a learner's too. Nothing is ever discarded here: without a
//! copy the reader fails, and with it this node's Raft.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use stemedb_raft::{
    EntryAnswer, EntryCopy, EntryHealer, EntryQuestion,
    frame::payload_crc,
    types::{Member, StoredMembership},
};
use tokio::time::Instant;

use super::{core::Shared, repair};

/// How often the others are asked again.
const ASK_INTERVAL: Duration = Duration::from_millis(200);

/// How long a reader waits for a node that has the entry and does not answer: as long as a full log waits for room.
/// A leader that cannot apply its own log is of no use to anybody for longer than that.
const HEAL_MAX: Duration = Duration::from_secs(10);

/// Asks the members of the cluster.
pub struct PeerHealer {
    /// Not kept alive: the log that it owns keeps this.
    shared: Weak<Shared>,
    /// The members as of the state that this node started with, until Raft tells newer ones.
    first: StoredMembership,
}

impl PeerHealer {
    /// For the log of this incarnation.
    pub fn new(shared: &Arc<Shared>, first: StoredMembership) -> PeerHealer {
        PeerHealer { shared: Arc::downgrade(shared), first }
    }
}

impl EntryHealer for PeerHealer {
    fn heal(&self, question: EntryQuestion) -> Pin<Box<dyn Future<Output = Option<EntryCopy>> + Send + '_>> {
        Box::pin(async move {
            let shared = self.shared.upgrade()?;
            let found = shared.core_stop.run_until_cancelled(find(&shared, &self.first, &question)).await;
            found.flatten()
        })
    }
}

/// What one round of questions came to.
enum Round {
    Copy(EntryCopy),
    /// Everybody has answered, and nobody can have it later.
    Nobody(String),
    /// Somebody may have it.
    Later(String),
}

async fn find(shared: &Shared, first: &StoredMembership, question: &EntryQuestion) -> Option<EntryCopy> {
    let index = question.index;
    let give_up_at = Instant::now() + HEAL_MAX;
    loop {
        match ask_once(shared, &others(shared, first), question).await {
            Round::Copy(copy) => return Some(copy),
            Round::Later(_) if Instant::now() + ASK_INTERVAL < give_up_at => tokio::time::sleep(ASK_INTERVAL).await,
            Round::Later(why) | Round::Nobody(why) => {
                tracing::error!(index, "no other node gives back a damaged entry of the log: {why}");
                return None;
            }
        }
    }
}

/// Every other member, by id.
fn others(shared: &Shared, first: &StoredMembership) -> BTreeMap<u64, Member> {
    let own = shared.local.load().node_id;
    let known = Arc::clone(&shared.view.borrow().membership);
    let newest = if known.log_id().is_some() { &*known } else { first };
    newest.nodes().filter(|(id, _)| **id != own).map(|(id, member)| (*id, member.clone())).collect()
}

/// Asks all at once, and takes the first right answer.
async fn ask_once(shared: &Shared, others: &BTreeMap<u64, Member>, question: &EntryQuestion) -> Round {
    let questions = std::slice::from_ref(question);
    let asked = others
        .iter()
        .map(|(id, member)| async move { (member, repair::ask(shared, *id, &member.peer_addr, questions).await) });
    let mut answers: FuturesUnordered<_> = asked.collect();
    let (mut said, mut is_final) = (Vec::new(), true);
    while let Some((member, (answers, silent))) = answers.next().await {
        let what = match answers.into_iter().next() {
            Some((_, EntryAnswer::Have(copy))) if is_it(question, &copy) => return Round::Copy(copy),
            Some((_, EntryAnswer::Have(_))) => "has another one there".to_owned(),
            Some((_, EntryAnswer::Covered)) => "has it in a checkpoint only".to_owned(),
            Some((_, EntryAnswer::Never { .. })) => "never had it".to_owned(),
            Some((_, EntryAnswer::Unknown)) => {
                is_final = false;
                "cannot read it either".to_owned()
            }
            None => {
                is_final = false;
                silent.unwrap_or_else(|| "gave no answer".to_owned())
            }
        };
        said.push(format!("{}: {what}", member.name));
    }
    let said = if said.is_empty() { "there is no other node".to_owned() } else { said.join("; ") };
    if is_final { Round::Nobody(said) } else { Round::Later(said) }
}

fn is_it(question: &EntryQuestion, copy: &EntryCopy) -> bool {
    copy.index == question.index
        && Some(copy.term) == question.term
        && Some(payload_crc(&copy.payload)) == question.payload_crc
}
