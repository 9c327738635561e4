//! The outgoing side: one connection to one node on one lane.
//!
//! [`Peer::send`] only appends to a bounded queue and wakes the peer's task, so the order of these calls is the order on
//! the wire. The task connects when there is something to send, runs a [`crate::link`] until the connection is lost, and
//! tries again after a wait that doubles up to a limit and falls back once a connection was answered on. Requests that
//! were on the lost connection fail at once as unknown; those still queued wait for the next one or their own timeout.
//! Order holds on a connection: when one is lost, what it carried may still be handled after the next one's requests.

use std::{future::poll_fn, io, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{net::TcpStream, sync::oneshot};

use crate::{
    CallError, Lane, Limits, LocalProvider, PeerHello, Refusal,
    link::{Link, Target},
    queue::{Call, Queue, Stage},
};

/// Asked for each answer to a request that is no probe, after cluster and node ids were compared: may this node be
/// believed? The place to refuse the answer of a node with a boot count lower than was seen before. Must not block.
pub type ReplyCheck = Arc<dyn Fn(&PeerHello) -> Result<(), Refusal> + Send + Sync>;

/// One outgoing connection, a lane to one node. Cheap to clone. When the last clone is dropped the connection finishes
/// what is still waited for and ends.
#[derive(Clone)]
pub struct Peer {
    handle: Arc<Handle>,
}

struct Handle {
    queue: Arc<Queue>,
    local: LocalProvider,
    lane: Lane,
    limits: Limits,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.queue.end();
    }
}

impl Peer {
    /// Starts the task of a connection on the current Tokio runtime; it connects with the first request.
    ///
    /// `addr` is `host:port` and is resolved anew for each connection. `target_id` is the Raft id of the node that is
    /// meant, 0 when it is not known, which allows probes only.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn new(local: LocalProvider, addr: String, target_id: u64, lane: Lane, limits: Limits) -> Peer {
        Self::with_reply_check(local, addr, target_id, lane, limits, Arc::new(|_| Ok(())))
    }

    /// As [`Peer::new`], with a check of each answer. An answer that fails it leaves its request unknown and ends the
    /// connection.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn with_reply_check(
        local: LocalProvider,
        addr: String,
        target_id: u64,
        lane: Lane,
        limits: Limits,
        reply_check: ReplyCheck,
    ) -> Peer {
        let queue = Arc::new(Queue::new(&limits));
        let handle = Handle { queue: Arc::clone(&queue), local, lane, limits: limits.clone() };
        let target = Target { node_id: target_id, lane, reply_check };
        tokio::spawn(keep_connected(queue, addr, target, limits));
        Peer { handle: Arc::new(handle) }
    }

    /// Appends a request now and answers later: the requests of one peer reach the other side in the order of these
    /// calls. Dropping the answer before the request went out withdraws it.
    ///
    /// # Errors
    /// [`CallError::TooLarge`], [`CallError::QueueFull`], and [`CallError::NotSent`] after [`Peer::close`].
    pub fn send(&self, kind: u16, body: Bytes) -> Result<PendingReply, CallError> {
        let limit = self.handle.limits.request_bytes_max(self.handle.lane, kind);
        if body.len() > limit {
            return Err(CallError::TooLarge { bytes: body.len(), limit });
        }
        let (reply, answer) = oneshot::channel();
        let stage = Arc::new(Stage::default());
        let identity = (self.handle.local)();
        self.handle.queue.push(Call { identity, kind, body, stage: Arc::clone(&stage), reply })?;
        Ok(PendingReply::new(answer, stage, Arc::clone(&self.handle.queue)))
    }

    /// [`Peer::send`] and [`PendingReply::wait`] in one.
    ///
    /// # Errors
    /// Those of both.
    pub async fn call(&self, kind: u16, body: Bytes, timeout: Duration) -> Result<Bytes, CallError> {
        self.send(kind, body)?.wait(timeout).await
    }

    /// Whether a connection stands at the moment. Says nothing about who is at the other end.
    pub fn is_connected(&self) -> bool {
        self.handle.queue.is_connected()
    }

    /// Ends the connection now, for all clones: what waits fails as not sent, what was sent as unknown.
    pub fn close(&self) {
        self.handle.queue.close();
    }
}

/// The answer to one request, to be waited for.
#[must_use = "dropping it withdraws a request that has not gone out yet"]
pub struct PendingReply {
    answer: oneshot::Receiver<Result<Bytes, CallError>>,
    stage: Arc<Stage>,
    queue: Arc<Queue>,
}

impl PendingReply {
    pub(crate) fn new(
        answer: oneshot::Receiver<Result<Bytes, CallError>>,
        stage: Arc<Stage>,
        queue: Arc<Queue>,
    ) -> Self {
        PendingReply { answer, stage, queue }
    }

    /// Waits for the answer, at most for `timeout` from now.
    ///
    /// # Errors
    /// After the timeout [`CallError::NotSent`] if no byte of the request went out, and then none will; else
    /// [`CallError::Unknown`]. Otherwise what the connection or the other side said.
    pub async fn wait(mut self, timeout: Duration) -> Result<Bytes, CallError> {
        match tokio::time::timeout(timeout, &mut self.answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(self.give_up("the connection's task ended")),
            Err(_) => {
                let error = self.give_up("no answer in time");
                // It may have arrived in the same moment.
                self.answer.try_recv().unwrap_or(Err(error))
            }
        }
    }

    fn give_up(&self, why: &str) -> CallError {
        if self.stage.give_up() {
            CallError::Unknown { why: why.into() }
        } else {
            CallError::NotSent { why: format!("{why}: {}", self.queue.obstacle()) }
        }
    }
}

impl Drop for PendingReply {
    fn drop(&mut self) {
        self.stage.give_up();
    }
}

/// Fails what is queued when the peer's task ends, whatever ended it.
struct CloseOnDrop(Arc<Queue>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.set_connected(false);
        self.0.close();
    }
}

/// The peer's task.
async fn keep_connected(queue: Arc<Queue>, addr: String, target: Target, limits: Limits) {
    let _close = CloseOnDrop(Arc::clone(&queue));
    let node_id = target.node_id;
    let lane = target.lane;
    let mut backoff = Backoff::new(limits.backoff_min, limits.backoff_max);
    let mut said_why = false;
    while poll_fn(|cx| queue.poll_work(cx)).await {
        let connected = tokio::select! {
            () = poll_fn(|cx| queue.poll_closed(cx)) => return,
            connected = connect(&addr, limits.connect_timeout) => connected,
        };
        let why = match connected {
            Ok(stream) => {
                tracing::debug!(addr, node_id, ?lane, "connected");
                queue.set_connected(true);
                let end = Link::new(stream, &queue, &target, &limits).run().await;
                queue.set_connected(false);
                if end.was_answered {
                    backoff.reset();
                    said_why = false;
                }
                if !end.is_wanted {
                    queue.set_obstacle(format!("connection to {addr} lost: {}", end.why));
                }
                (!end.is_wanted).then_some(end.why)
            }
            Err(error) => {
                queue.set_obstacle(format!("no connection to {addr}: {error}"));
                Some(error.to_string())
            }
        };
        let Some(why) = why else { continue };
        // The first failure after an answer is news, its repetition is not.
        if said_why {
            tracing::debug!(addr, node_id, ?lane, why, "still no connection");
        } else {
            tracing::warn!(addr, node_id, ?lane, why, "no connection to a node");
            said_why = true;
        }
        let wait = backoff.next(rand::random_range);
        tokio::select! {
            () = poll_fn(|cx| queue.poll_closed(cx)) => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn connect(addr: &str, timeout: Duration) -> io::Result<TcpStream> {
    let stream = tokio::time::timeout(timeout, TcpStream::connect(addr))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer to the connection request"))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Waits between attempts: none after a connection that was answered on, then doubling, each shortened at random by up
/// to a half so that nodes which lost the same target do not come back together.
struct Backoff {
    min: Duration,
    max: Duration,
    /// `None`: the next attempt is made at once.
    step: Option<Duration>,
}

impl Backoff {
    fn new(min: Duration, max: Duration) -> Self {
        Backoff { min, max: max.max(min), step: Some(min) }
    }

    fn reset(&mut self) {
        self.step = None;
    }

    /// `draw` picks from an inclusive range of microseconds.
    fn next(&mut self, draw: impl FnOnce(std::ops::RangeInclusive<u64>) -> u64) -> Duration {
        let Some(step) = self.step else {
            self.step = Some(self.min);
            return Duration::ZERO;
        };
        self.step = Some(step.saturating_mul(2).min(self.max));
        let step_us = u64::try_from(step.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(draw(step_us / 2..=step_us))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_to_its_limit_and_falls_back() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(10), ms(50));
        let mut longest = || backoff.next(|range| *range.end());
        assert_eq!([longest(), longest(), longest(), longest(), longest()], [ms(10), ms(20), ms(40), ms(50), ms(50)]);
        assert_eq!(backoff.next(|range| *range.start()), ms(25));
        backoff.reset();
        assert_eq!(backoff.next(|range| *range.end()), Duration::ZERO);
        assert_eq!(backoff.next(|range| *range.end()), ms(10));
    }
}
