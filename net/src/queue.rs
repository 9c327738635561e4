//! The requests that wait for a connection, and the one mark that tells "never sent" from "perhaps handled".
//!
//! Callers push, the link takes in order. A request's [`Stage`] is changed only by atomic steps: the link marks it sent
//! before its first byte can reach the socket, the caller's timeout reads the mark while giving up. So both sides
//! always agree on whether the request went out.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use tokio::sync::oneshot;

use crate::{CallError, Limits, LocalIdentity};

const QUEUED: u8 = 0;
const SENT: u8 = 1;
const GIVEN_UP: u8 = 2;

/// `Queued -> Sent -> (Queued, if not a byte was written) -> ...`, and from anywhere to "given up", which is final.
#[derive(Default)]
pub(crate) struct Stage(AtomicU8);

impl Stage {
    /// False: the caller gave up, the request must not be sent.
    fn mark_sent(&self) -> bool {
        self.0.compare_exchange(QUEUED, SENT, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// For a request of which no byte was written. False: the caller gave up.
    fn take_back(&self) -> bool {
        self.0.compare_exchange(SENT, QUEUED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Whether the request may have been sent by now. After this call it will not be sent any more if it was not.
    pub(crate) fn give_up(&self) -> bool {
        self.0.swap(GIVEN_UP, Ordering::AcqRel) != QUEUED
    }

    fn is_given_up(&self) -> bool {
        self.0.load(Ordering::Acquire) == GIVEN_UP
    }
}

/// One request on its way.
pub(crate) struct Call {
    /// Who this node was when the request was made.
    pub(crate) identity: LocalIdentity,
    pub(crate) kind: u16,
    pub(crate) body: Bytes,
    pub(crate) stage: Arc<Stage>,
    pub(crate) reply: oneshot::Sender<Result<Bytes, CallError>>,
}

impl Call {
    pub(crate) fn fail(self, error: CallError) {
        // The caller may be gone; then nobody is left to tell.
        let _ = self.reply.send(Err(error));
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    /// No handle is left: finish what callers still wait for.
    Ending,
    Closed,
}

/// What the owner of a queue wants of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Demand {
    GoOn,
    /// Nothing more will come: end when everything is answered.
    Finish,
    /// End now.
    Stop,
}

struct Waiting {
    calls: VecDeque<Call>,
    body_bytes: usize,
    mode: Mode,
    /// Why there is no connection at the moment, for those that time out meanwhile.
    obstacle: String,
}

/// Shared by the handles of a peer and its link.
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    link_waker: AtomicWaker,
    connected: AtomicBool,
    frames_max: usize,
    bytes_max: usize,
}

impl Queue {
    pub(crate) fn new(limits: &Limits) -> Self {
        let waiting =
            Waiting { calls: VecDeque::new(), body_bytes: 0, mode: Mode::Open, obstacle: "not connected yet".into() };
        Queue {
            waiting: Mutex::new(waiting),
            link_waker: AtomicWaker::new(),
            connected: AtomicBool::new(false),
            frames_max: limits.queue_frames_max,
            bytes_max: limits.queue_bytes_max,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // No code can panic between two states of `Waiting`, so a poisoned one is still whole.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a request. The order of these calls is the order on the wire.
    pub(crate) fn push(&self, call: Call) -> Result<(), CallError> {
        {
            let mut waiting = self.lock();
            if waiting.mode != Mode::Open {
                return Err(CallError::NotSent { why: "the connection was closed by this node".into() });
            }
            if !waiting.has_room(&call, self) {
                waiting.drop_given_up();
                if !waiting.has_room(&call, self) {
                    return Err(CallError::QueueFull);
                }
            }
            waiting.body_bytes += call.body.len();
            waiting.calls.push_back(call);
        }
        self.link_waker.wake();
        Ok(())
    }

    /// Takes requests from the front and marks them sent: at most `frames_max`, and no more once `bytes_max` are taken.
    /// Registers the link's task to be woken at the next change and says how things stand.
    pub(crate) fn take(
        &self,
        cx: &mut Context<'_>,
        frames_max: usize,
        bytes_max: usize,
        into: &mut VecDeque<Call>,
    ) -> Demand {
        self.link_waker.register(cx.waker());
        let mut waiting = self.lock();
        let mut bytes = 0;
        let mut frames = 0;
        while frames < frames_max && bytes < bytes_max {
            let Some(call) = waiting.calls.pop_front() else { break };
            waiting.body_bytes -= call.body.len();
            if call.stage.mark_sent() {
                bytes += call.body.len();
                frames += 1;
                into.push_back(call);
            }
        }
        match waiting.mode {
            Mode::Open => Demand::GoOn,
            Mode::Ending if waiting.calls.is_empty() => Demand::Finish,
            Mode::Ending => Demand::GoOn,
            Mode::Closed => Demand::Stop,
        }
    }

    /// Puts requests of which no byte was written back to the front, in their order.
    pub(crate) fn put_back(&self, calls: impl DoubleEndedIterator<Item = Call>) {
        let mut waiting = self.lock();
        for call in calls.rev().filter(|call| call.stage.take_back()) {
            waiting.body_bytes += call.body.len();
            waiting.calls.push_front(call);
        }
    }

    /// Ready when there is something to send (`true`) or never will be (`false`).
    pub(crate) fn poll_work(&self, cx: &mut Context<'_>) -> Poll<bool> {
        self.link_waker.register(cx.waker());
        let mut waiting = self.lock();
        waiting.drop_given_up();
        match (waiting.mode, waiting.calls.is_empty()) {
            (Mode::Open | Mode::Ending, false) => Poll::Ready(true),
            (Mode::Open, true) => Poll::Pending,
            (Mode::Ending, true) | (Mode::Closed, _) => Poll::Ready(false),
        }
    }

    /// Ready once [`Queue::close`] was called.
    pub(crate) fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.link_waker.register(cx.waker());
        if self.lock().mode == Mode::Closed { Poll::Ready(()) } else { Poll::Pending }
    }

    /// No handle is left. What callers still wait for is sent and answered.
    pub(crate) fn end(&self) {
        {
            let mut waiting = self.lock();
            if waiting.mode == Mode::Open {
                waiting.mode = Mode::Ending;
            }
        }
        self.link_waker.wake();
    }

    /// Ends everything now: requests that wait fail as not sent, later ones too.
    pub(crate) fn close(&self) {
        let calls = {
            let mut waiting = self.lock();
            waiting.mode = Mode::Closed;
            waiting.body_bytes = 0;
            std::mem::take(&mut waiting.calls)
        };
        for call in calls {
            call.fail(CallError::NotSent { why: "the connection was closed by this node".into() });
        }
        self.link_waker.wake();
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    pub(crate) fn set_obstacle(&self, why: String) {
        self.lock().obstacle = why;
    }

    /// Why a request that gave up was still waiting.
    pub(crate) fn obstacle(&self) -> String {
        if self.is_connected() {
            "the connection took nothing more in time".into()
        } else {
            self.lock().obstacle.clone()
        }
    }
}

impl Waiting {
    fn has_room(&self, call: &Call, bounds: &Queue) -> bool {
        self.calls.is_empty()
            || (self.calls.len() < bounds.frames_max && self.body_bytes + call.body.len() <= bounds.bytes_max)
    }

    fn drop_given_up(&mut self) {
        self.calls.retain(|call| !call.stage.is_given_up());
        self.body_bytes = self.calls.iter().map(|call| call.body.len()).sum();
    }
}
