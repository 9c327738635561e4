//! Keeps the disk's state and the admission of commands up to date with the room that there is.
//!
//! Every incarnation follows the room of its own folder into the state of its disk. A leader asks the other voters
//! twice a second, decides with `room` what it takes, and hands leadership over when only it lacks room: at once when
//! its reserve is gone, else after the others had time to notice that they are full too. A follower without room
//! stands back in elections for a moment, so that a node with room is elected; if none is, it stands all the same,
//! because reads need a leader too.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep_until};

use super::{
    core::{Core, Role, Shared},
    disk::DiskState,
    handover,
    room::{self, Admission, Voter},
    space::{Level, RoomReport},
    status,
};
use crate::clock;

/// How often a leader asks the other voters. They refuse nothing themselves: what comes meanwhile fits below
/// their low water.
const ASK_INTERVAL: Duration = Duration::from_millis(500);

/// What a voter said holds for this long. Past it the voter counts as silent.
const WORD_HOLDS: Duration = Duration::from_secs(3);

/// Replicas fill together. As long as the reserve lasts, a leader without room waits this long for the word of the
/// others: until they have looked and were asked. Leadership would else go to a node that is as full.
const SETTLE: Duration = Duration::from_secs(1);

/// How often a follower without room looks whether its leader is silent.
const SILENCE_LOOK: Duration = Duration::from_millis(100);

/// After a move that nobody took part in, the next one.
const MOVE_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// What got no room although the free space would allow it.
pub fn blocked(shared: &Shared) -> Option<String> {
    // A quota holds the log back too, and so does whatever else the numbers do not show.
    if let Some(why) = shared.wal().and_then(|wal| wal.room().refuse_clients().map(str::to_owned)) {
        return Some(format!("the log waits for room for its next segment ({why})"));
    }
    let engine = shared.core.get()?.state.engine();
    let waits = engine.stats().is_ok_and(|stats| stats.disk_full);
    waits.then(|| "the tree waits for room to write its memory to the disk".to_owned())
}

/// Shows the room of the data folder in the state of the disk, until the incarnation ends.
pub async fn follow_own(shared: Arc<Shared>) {
    let mut report = shared.space.report();
    loop {
        let full = {
            let report = report.borrow_and_update();
            let words = || report.shortage.as_ref().map_or_else(|| "no room".to_owned(), ToString::to_string);
            (report.level != Level::Room).then(words)
        };
        match full {
            Some(reason) => shared.disk.update(DiskState::Full, reason),
            None => shared.disk.clear(DiskState::Full),
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            changed = report.changed() => if changed.is_err() { return },
        }
    }
}

/// Runs until Raft ends here.
pub async fn run(shared: Arc<Shared>) {
    let Some(core) = shared.core.get() else { return };
    let watcher = Watcher { shared: &shared, core, heard: BTreeMap::new(), move_from: Instant::now() };
    shared.core_stop.run_until_cancelled(watcher.run()).await;
}

type Answers = Vec<(u64, Option<RoomReport>)>;
type Pending<'a, T> = Option<Pin<Box<dyn Future<Output = T> + Send + 'a>>>;

struct Watcher<'a> {
    shared: &'a Shared,
    core: &'a Core,
    /// What each voter said last, and when; `None` before its first word.
    heard: BTreeMap<u64, (Option<RoomReport>, Instant)>,
    /// No move before this.
    move_from: Instant,
}

impl Watcher<'_> {
    async fn run(mut self) {
        let shared = self.shared;
        let mut report = shared.space.report();
        let mut view = shared.view.subscribe();
        let mut drain = shared.flows.drain.subscribe();
        let mut asking: Pending<'_, Answers> = None;
        let mut moving: Pending<'_, bool> = None;
        let mut ask_at = Instant::now();
        let mut full_since = None;
        loop {
            let own = report.borrow_and_update().clone();
            drain.mark_unchanged();
            let (leads, voters) = {
                let view = view.borrow_and_update();
                let own_id = shared.local.load().node_id;
                let voters: Vec<u64> = view.membership.voter_ids().filter(|id| *id != own_id).collect();
                (view.role == Role::Leader, voters)
            };
            if !leads {
                self.heard.clear();
                ask_at = Instant::now();
            }
            let now = Instant::now();
            let others: Vec<Voter> = voters.iter().map(|id| self.voter(*id, now)).collect();
            full_since = if own.level == Level::Room { None } else { full_since.or(Some(now)) };
            let settled_at = full_since.filter(|_| own.level == Level::Low).map_or(now, |since| since + SETTLE);
            let wants_to_move = leads && now >= self.move_from && room::wants_to_move(&own, &others);
            if wants_to_move && moving.is_none() && now >= settled_at {
                moving = Some(Box::pin(handover::hand_over_for_room(shared, self.core)));
            }
            let is_on_its_way = wants_to_move || moving.is_some();
            let admission = if leads { Admission::decide(&own, &others, is_on_its_way) } else { Admission::default() };
            self.publish(admission);
            let stands_back = !leads && own.level != Level::Room && self.hears_a_leader();
            self.stand_for_election(!stands_back);

            tokio::select! {
                changed = report.changed() => if changed.is_err() { return },
                changed = view.changed() => if changed.is_err() { return },
                changed = drain.changed() => if changed.is_err() { return },
                answers = end_of(&mut asking) => {
                    asking = None;
                    self.note(answers);
                }
                moved = end_of(&mut moving) => {
                    moving = None;
                    if !moved {
                        self.move_from = Instant::now() + MOVE_AGAIN_AFTER;
                    }
                }
                () = sleep_until(ask_at), if leads && asking.is_none() => {
                    ask_at = Instant::now() + ASK_INTERVAL;
                    asking = Some(Box::pin(ask(shared, voters)));
                }
                () = sleep_until(settled_at), if wants_to_move && moving.is_none() => {}
                () = tokio::time::sleep(SILENCE_LOOK), if stands_back => {}
            }
        }
    }

    /// Whether a leader spoke so lately that an election in which everybody is well would not be over.
    fn hears_a_leader(&self) -> bool {
        let freshness = *self.shared.freshness.lock().unwrap_or_else(PoisonError::into_inner);
        let silence_ms = freshness.silence_ms(clock::monotonic_ms());
        silence_ms.is_some_and(|ms| ms <= self.shared.config.cluster.election_max_ms.saturating_mul(2))
    }

    fn voter(&self, id: u64, now: Instant) -> Voter {
        match self.heard.get(&id) {
            None => Voter::NotAsked,
            Some((Some(report), at)) if now.duration_since(*at) <= WORD_HOLDS => Voter::Said(report.clone()),
            Some(_) => Voter::Silent,
        }
    }

    fn note(&mut self, answers: Answers) {
        let now = Instant::now();
        for (id, answer) in answers {
            match answer {
                Some(report) => drop(self.heard.insert(id, (Some(report), now))),
                // What it said before holds on for a while: a lost message is no outage.
                None => drop(self.heard.entry(id).or_insert((None, now))),
            }
        }
    }

    fn publish(&self, admission: Admission) {
        self.shared.admission.send_if_modified(|known| {
            if **known == admission {
                return false;
            }
            *known = Arc::new(admission);
            true
        });
    }

    /// A node that leaves or is out of traffic stands for nothing.
    fn stand_for_election(&self, stands: bool) {
        let leaves = self.shared.leaving.load(Ordering::Relaxed) || self.shared.flows.drain.mark().is_out();
        self.core.raft.runtime_config().elect(stands && !leaves);
    }
}

async fn end_of<T>(pending: &mut Pending<'_, T>) -> T {
    match pending {
        Some(future) => future.as_mut().await,
        None => std::future::pending().await,
    }
}

async fn ask(shared: &Shared, voters: Vec<u64>) -> Answers {
    let membership = Arc::clone(&shared.view.borrow().membership);
    let asked = voters.into_iter().filter_map(|id| Some((id, membership.get_node(&id)?.peer_addr.clone())));
    let asked = asked.map(|(id, addr)| async move {
        let answer = status::ask_status(shared, id, &addr).await;
        (id, answer.ok().map(|status| status.room))
    });
    join_all(asked).await
}
