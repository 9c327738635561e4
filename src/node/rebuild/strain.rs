//! How much the others' disks feel of a rebuild, and how fast it may go therefore.
//!
//! The configured rate is a bound, not a promise: on a machine or disk that is shared it may be too much. So the node that
//! fetches asks the others now and then how long their syncs take, and compares with what they said before the first
//! piece: longer than twice that, and it fetches more slowly; near it, and it goes back to the configured rate. It never
//! stops: a node that is not there costs the cluster its tolerance for the next failure.

use std::{collections::BTreeMap, convert::Infallible, time::Duration};

use futures_util::future::join_all;
use stemedb_net::Lane;

use super::{messages::KnownMember, throttle::Pace};
use crate::node::{
    kinds::Kind,
    messages::{StatusReply, pack, unpack},
    peers::Peers,
};

/// How often the others are asked. Their figures are of seconds.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long one of them may take to answer.
const REPLY_MAX: Duration = Duration::from_millis(500);
/// Percent of what syncs took before, above which a rebuild is too fast.
const STRAINED_PERCENT: u64 = 200;
/// Percent below which it may go faster.
const EASY_PERCENT: u64 = 150;
/// Syncs that took less than this, milliseconds, count as this: below it figures in whole milliseconds say little.
const BASE_MIN_MS: u64 = 2;
/// It always goes on at this rate, bytes a second, where it is configured to: a GiB in two minutes.
const RATE_MIN: u64 = 10_000_000;

/// What is known. Pure.
#[derive(Debug)]
pub struct Strain {
    rate_max: u64,
    rate: u64,
    /// 99th percentile of each node's syncs before the first piece, milliseconds.
    base: BTreeMap<u64, u64>,
}

impl Strain {
    /// `rate_max`: the configured bound, bytes a second; 0: none.
    pub fn new(rate_max: u64) -> Strain {
        Strain { rate_max, rate: rate_max, base: BTreeMap::new() }
    }

    /// The rate from now on, after each node has said how long its syncs take. The first word of each is the measure of
    /// those that follow.
    pub fn heard(&mut self, p99_ms: &BTreeMap<u64, u64>) -> u64 {
        let percent = |(id, now): (&u64, &u64)| {
            let base = *self.base.entry(*id).or_insert(*now);
            now.saturating_mul(100) / base.max(BASE_MIN_MS)
        };
        let worst = p99_ms.iter().map(percent).max();
        self.rate = match worst {
            Some(percent) if percent > STRAINED_PERCENT => (self.rate / 4 * 3).max(RATE_MIN.min(self.rate_max)),
            Some(percent) if percent > EASY_PERCENT => self.rate,
            Some(_) | None => (self.rate + self.rate_max / 8).min(self.rate_max),
        };
        self.rate
    }
}

/// Asks `others` once, before anything is fetched.
pub async fn begin(peers: &Peers, others: &[KnownMember], rate_max: u64) -> Strain {
    let mut strain = Strain::new(rate_max);
    if rate_max > 0 {
        strain.heard(&ask(peers, others).await);
    }
    strain
}

/// Keeps the pace; never returns.
pub async fn keep(mut strain: Strain, peers: &Peers, others: &[KnownMember], pace: &Pace) -> Infallible {
    if strain.rate_max == 0 {
        return std::future::pending().await;
    }
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let before = strain.rate;
        let rate = strain.heard(&ask(peers, others).await);
        if rate != before {
            tracing::debug!(mb_per_s = rate / 1_000_000, "the pace of the rebuild");
        }
        pace.set(rate);
    }
}

/// How long the syncs of each take. One that does not answer says nothing.
async fn ask(peers: &Peers, others: &[KnownMember]) -> BTreeMap<u64, u64> {
    let asked = others.iter().map(|known| async move {
        let peer = peers.to(known.id, &known.member.peer_addr, Lane::Control);
        let body = pack(&()).ok()?;
        let answer = peer.call(Kind::Status.number(), body, REPLY_MAX).await.ok()?;
        let status: StatusReply = unpack(&answer).ok()?;
        Some((known.id, status.fsync_p99_ms?))
    });
    join_all(asked).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn says(p99_ms: &[(u64, u64)]) -> BTreeMap<u64, u64> {
        p99_ms.iter().copied().collect()
    }

    #[test]
    fn syncs_that_take_more_than_twice_as_long_slow_it_down_and_it_never_stops() {
        let mut strain = Strain::new(64 * MB);
        assert_eq!(strain.heard(&says(&[(2, 10), (3, 4)])), 64 * MB, "what they say first is the measure");
        assert_eq!(strain.heard(&says(&[(2, 20), (3, 8)])), 64 * MB, "twice is allowed");
        assert_eq!(strain.heard(&says(&[(2, 10), (3, 9)])), 48 * MB, "any of them counts");
        assert_eq!(strain.heard(&says(&[(2, 21), (3, 4)])), 36 * MB);
        for _ in 0..20 {
            strain.heard(&says(&[(2, 500)]));
        }
        assert_eq!(strain.rate, 10 * MB);
        assert_eq!(strain.heard(&says(&[(2, 18), (3, 4)])), 10 * MB, "neither strained nor easy");
        assert_eq!(strain.heard(&says(&[(2, 15), (3, 6)])), 18 * MB);
        for _ in 0..20 {
            strain.heard(&says(&[]));
        }
        assert_eq!(strain.rate, 64 * MB, "nobody says anything: nobody serves anybody");
    }

    #[test]
    fn a_bound_below_the_least_rate_holds_and_fast_disks_are_not_counted_in_single_milliseconds() {
        let mut slow = Strain::new(5 * MB);
        slow.heard(&says(&[(2, 3)]));
        assert_eq!(slow.heard(&says(&[(2, 300)])), 5 * MB);
        let mut fast = Strain::new(64 * MB);
        fast.heard(&says(&[(2, 1)]));
        assert_eq!(fast.heard(&says(&[(2, 4)])), 64 * MB);
        assert_eq!(fast.heard(&says(&[(2, 5)])), 48 * MB);
    }

    #[test]
    fn one_that_is_heard_later_is_measured_by_its_own_first_word() {
        let mut strain = Strain::new(64 * MB);
        strain.heard(&says(&[(2, 3)]));
        assert_eq!(strain.heard(&says(&[(2, 3), (3, 90)])), 64 * MB);
        assert_eq!(strain.heard(&says(&[(3, 181)])), 48 * MB);
    }
}
