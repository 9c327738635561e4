//! One accepted connection, from its first byte to its end.
//!
//! A single task moves everything: it reads frames, judges them, starts handlers, polls the handlers side by side and
//! writes their answers together. When too much is in flight it stops reading, so that the sender's queue fills and not
//! this node's memory; while it cannot read it sends signs of life unasked. Any damage ends the connection: the sender
//! then knows that the outcome of what it sent is unknown.

use std::{
    any::Any,
    future::{Future, poll_fn},
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, CatchUnwind},
    stream::FuturesUnordered,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::{Instant, Interval, MissedTickBehavior},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::{
    ConnectionHandler, Limits, LocalProvider, PeerHello, Refusal, Service, code,
    inbound::{FrameReader, Incoming, Read},
    outbound::OutBuffer,
    wire::{FrameType, Header, Notice, WireError},
};

/// Answers waiting for the socket before finished handlers are left waiting too; one answer may go beyond it.
const OUT_BYTES_MAX: u64 = 1 << 20;
/// A frame that arrives slower than this is held back on purpose or of no use any more.
const BODY_BYTES_PER_S_MIN: u64 = 256 << 10;
/// Time for the other side to take a notice, and bytes it may still send meanwhile.
const FAREWELL_WAIT: Duration = Duration::from_secs(1);
const FAREWELL_BYTES_MAX: u64 = 4 << 20;

/// What all connections of a listener share.
pub(crate) struct Shared {
    pub(crate) local: LocalProvider,
    pub(crate) service: Arc<dyn Service>,
    pub(crate) limits: Limits,
}

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum End {
    #[error("closed by the other side")]
    Closed,
    #[error("shut down")]
    Drained,
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Damaged(#[from] WireError),
    #[error("a frame of type {0:?} from a client")]
    Misplaced(FrameType),
    #[error("a notice from a client")]
    MisplacedNotice,
    #[error("timed out: {0}")]
    TimedOut(&'static str),
}

/// A request being handled.
struct InFlight {
    header: Header,
    body_bytes: usize,
    answer: CatchUnwind<AssertUnwindSafe<BoxFuture<'static, Result<Bytes, Refusal>>>>,
}

struct Answer {
    header: Header,
    body_bytes: usize,
    result: Result<Bytes, Refusal>,
}

impl Future for InFlight {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        let result = ready!(self.answer.poll_unpin(cx)).unwrap_or_else(|panic| Err(panic_refusal(panic.as_ref())));
        Poll::Ready(Answer { header: self.header, body_bytes: self.body_bytes, result })
    }
}

fn panic_refusal(panic: &(dyn Any + Send)) -> Refusal {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let text = text.unwrap_or("no message");
    tracing::error!(panic = text, "a request handler panicked");
    Refusal::new(code::PANICKED, format!("the handler panicked: {text}"))
}

/// Runs the service's code, which may panic, and turns a panic into a refusal.
fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, Refusal> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| panic_refusal(panic.as_ref()))
}

struct Connection<S> {
    stream: S,
    addr: SocketAddr,
    shared: Arc<Shared>,
    reader: FrameReader,
    out: OutBuffer,
    in_flight: FuturesUnordered<InFlight>,
    in_flight_body_bytes: usize,
    /// Who spoke last, and what was made for them.
    speaker: Option<(PeerHello, Box<dyn ConnectionHandler>)>,
    shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
    draining_since: Option<Instant>,
    tick: Interval,
    opened_at: Instant,
    /// Of the last frame that was taken or refused.
    last_header: Option<Header>,
    /// Since when a begun frame is waited for.
    mid_frame_since: Option<Instant>,
    /// Since when the socket has taken no byte of those that wait.
    stuck_since: Option<Instant>,
    last_moved: Instant,
    last_written: Instant,
}

/// Serves one connection until it ends, in which case requests that are still being handled are dropped.
pub(crate) async fn serve<S>(stream: S, addr: SocketAddr, shared: Arc<Shared>, shutdown: CancellationToken) -> End
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut connection = Connection::new(stream, addr, shared, shutdown);
    let end = poll_fn(|cx| connection.poll(cx)).await;
    if let End::Damaged(WireError::Version { seen }) = &end
        && connection.last_header.is_none()
    {
        farewell(connection.stream, Notice::new(code::VERSION, *seen)).await;
    }
    end
}

/// Says why nothing is taken on this connection, and closes it in such a way that the other side can read it.
pub(crate) async fn farewell<S>(mut stream: S, notice: Notice)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let say = async {
        stream.write_all(&notice.seal()).await?;
        stream.shutdown().await?;
        // Closing with unread bytes would reset the connection and could destroy the notice on its way.
        tokio::io::copy(&mut stream.take(FAREWELL_BYTES_MAX), &mut tokio::io::sink()).await
    };
    match tokio::time::timeout(FAREWELL_WAIT, say).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a notice was not taken"),
        Err(_) => tracing::debug!("a notice was not taken in time"),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    fn new(stream: S, addr: SocketAddr, shared: Arc<Shared>, shutdown: CancellationToken) -> Self {
        let limits = &shared.limits;
        let shortest = [
            limits.alive_interval,
            limits.handshake_timeout,
            limits.frame_timeout,
            limits.idle_timeout,
            limits.write_timeout,
            limits.drain_timeout,
        ];
        let period = shortest.into_iter().min().unwrap_or_default() / 2;
        let mut tick = tokio::time::interval(period.max(Duration::from_millis(1)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = Instant::now();
        Connection {
            stream,
            addr,
            shared,
            reader: FrameReader::new(),
            out: OutBuffer::default(),
            in_flight: FuturesUnordered::new(),
            in_flight_body_bytes: 0,
            speaker: None,
            shutdown: Box::pin(shutdown.cancelled_owned()),
            draining_since: None,
            tick,
            opened_at: now,
            last_header: None,
            mid_frame_since: None,
            stuck_since: None,
            last_moved: now,
            last_written: now,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            match self.step(cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(end) => return Poll::Ready(end),
            }
        }
    }

    /// One round over handlers, socket and clock. `false`: nothing moved and the task is registered everywhere.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let now = Instant::now();
        if self.draining_since.is_none() && self.shutdown.poll_unpin(cx).is_ready() {
            self.draining_since = Some(now);
        }
        let mut moved = false;
        while self.out.bytes() < OUT_BYTES_MAX
            && let Poll::Ready(Some(answer)) = self.in_flight.poll_next_unpin(cx)
        {
            self.in_flight_body_bytes -= answer.body_bytes;
            self.answer(&answer.header, answer.result);
            moved = true;
        }
        moved |= self.take_frames(now)?;
        moved |= self.write(cx, now)?;
        if self.has_room() && self.reader.is_starved() {
            match self.reader.read_ready(cx, &mut self.stream)? {
                Read::Some => {
                    self.last_moved = now;
                    moved = true;
                }
                Read::End => return Err(End::Closed),
                Read::Pending => {}
            }
        }
        if self.draining_since.is_some() && self.in_flight.is_empty() && self.out.is_empty() {
            return Err(End::Drained);
        }
        while self.tick.poll_tick(cx).is_ready() {
            moved |= self.watch_clock(now)?;
        }
        Ok(moved)
    }

    /// Whether another request may be taken.
    fn has_room(&self) -> bool {
        let limits = &self.shared.limits;
        self.draining_since.is_none()
            && self.in_flight.len() < limits.in_flight_frames_max.max(1)
            && (self.in_flight.is_empty() || self.in_flight_body_bytes < limits.in_flight_bytes_max)
            && self.out.bytes() < OUT_BYTES_MAX
    }

    fn take_frames(&mut self, now: Instant) -> Result<bool, End> {
        let mut moved = false;
        while self.has_room() {
            let (shared, addr) = (&self.shared, self.addr);
            let Some(incoming) = self.reader.next(|header| judge(shared, addr, header))? else { break };
            self.receive(incoming)?;
            self.mid_frame_since = None;
            moved = true;
        }
        if !self.has_room() || !self.reader.is_mid_frame() {
            self.mid_frame_since = None;
        } else {
            self.mid_frame_since.get_or_insert(now);
        }
        Ok(moved)
    }

    fn receive(&mut self, incoming: Incoming) -> Result<(), End> {
        let (header, body) = match incoming {
            Incoming::Notice(_) => return Err(End::MisplacedNotice),
            Incoming::Refused(header, refusal) => {
                self.last_header = Some(header);
                if header.frame != FrameType::Request {
                    return Err(End::Misplaced(header.frame));
                }
                self.answer(&header, Err(refusal));
                return Ok(());
            }
            Incoming::Frame(header, body) => (header, body),
        };
        self.last_header = Some(header);
        if header.frame == FrameType::Ping {
            self.push_pong(&header);
            return Ok(());
        }
        // Identities may have changed while the body arrived.
        match judge(&self.shared, self.addr, &header) {
            Ok(()) => self.start(header, body),
            Err(refusal) => self.answer(&header, Err(refusal)),
        }
        Ok(())
    }

    /// Hands an admitted request to the connection's handler.
    fn start(&mut self, header: Header, body: Bytes) {
        let body_bytes = body.len();
        let hello = hello(&header, self.addr);
        let speaker = &mut self.speaker;
        let service = &self.shared.service;
        let started = guarded(|| {
            let handler = match speaker {
                Some((known, handler)) if *known == hello => handler,
                _ => &mut speaker.insert((hello, service.connected(hello))).1,
            };
            handler.on_request(header.kind, body)
        });
        match started {
            Ok(future) => {
                let answer = AssertUnwindSafe(future).catch_unwind();
                self.in_flight_body_bytes += body_bytes;
                self.in_flight.push(InFlight { header, body_bytes, answer });
            }
            Err(refusal) => {
                // A handler that panicked half-way is not asked again.
                self.speaker = None;
                self.answer(&header, Err(refusal));
            }
        }
    }

    fn answer(&mut self, request: &Header, result: Result<Bytes, Refusal>) {
        let limit = self.shared.limits.body_bytes_max(request.lane);
        let result = result.and_then(|body| {
            if body.len() <= limit {
                return Ok(body);
            }
            let text = format!("handled, but the answer of {} bytes is over the limit of {limit}", body.len());
            Err(Refusal::new(code::ANSWER_TOO_LARGE, text))
        });
        let mut header = self.header(FrameType::Reply, request);
        let body = match result {
            Ok(body) => body,
            Err(refusal) => {
                header.frame = FrameType::Refusal;
                header.code = refusal.code;
                Bytes::copy_from_slice(refusal.message_sent().as_bytes())
            }
        };
        self.out.push(&header.seal(&body), &body);
    }

    /// A header back to the sender of `request`, with the identity of this moment.
    fn header(&self, frame: FrameType, request: &Header) -> Header {
        let local = (self.shared.local)();
        Header {
            frame,
            cluster_id: local.cluster_id,
            sender_id: local.node_id,
            target_id: request.sender_id,
            boot: local.boot,
            code: 0,
            ..*request
        }
    }

    /// A sign of life to the sender of `frame`.
    fn push_pong(&mut self, frame: &Header) {
        let header = Header { kind: 0, request_id: 0, ..self.header(FrameType::Pong, frame) };
        self.out.push(&header.seal(&[]), &Bytes::new());
    }

    fn write(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<bool, End> {
        if self.out.is_empty() {
            return Ok(false);
        }
        let taken = self.out.write_ready(cx, &mut self.stream)?;
        if taken > 0 {
            self.last_moved = now;
            self.last_written = now;
            self.stuck_since = None;
        }
        if !self.out.is_empty() {
            self.stuck_since.get_or_insert(now);
        }
        Ok(taken > 0)
    }

    /// Ends what takes too long, and shows a sign of life to a sender that cannot get one by asking.
    fn watch_clock(&mut self, now: Instant) -> Result<bool, End> {
        let limits = &self.shared.limits;
        let is_over = |since: Option<Instant>, limit: Duration| since.is_some_and(|since| now - since >= limit);
        let body_time = self.reader.arriving().map_or(0, |header| u64::from(header.body_bytes) / BODY_BYTES_PER_S_MIN);
        let body_time = Duration::from_secs(body_time);
        if is_over(self.draining_since, limits.drain_timeout) {
            return Err(End::TimedOut("handlers did not finish while shutting down"));
        }
        if is_over(self.stuck_since, limits.write_timeout) {
            return Err(End::TimedOut("the other side takes no answers"));
        }
        if is_over(self.mid_frame_since, limits.frame_timeout + body_time) {
            return Err(End::TimedOut("a frame did not arrive completely"));
        }
        if self.last_header.is_none() && now - self.opened_at >= limits.handshake_timeout {
            return Err(End::TimedOut("no first frame"));
        }
        let is_paused = !self.has_room();
        if !is_paused && now - self.last_moved >= limits.idle_timeout {
            return Err(End::TimedOut("nothing moved"));
        }
        let is_due = now - self.last_written >= limits.alive_interval;
        // While a body arrives, a ping would be stuck behind it.
        let counterpart = self.reader.arriving().copied().or(self.last_header);
        if let Some(header) = counterpart
            && (is_paused || self.reader.is_mid_frame())
            && is_due
            && self.out.is_empty()
        {
            self.push_pong(&header);
            return Ok(true);
        }
        Ok(false)
    }
}

/// Whether a request with this header is taken, by size and by the service's rules.
fn judge(shared: &Shared, addr: SocketAddr, header: &Header) -> Result<(), Refusal> {
    match header.frame {
        FrameType::Ping => return Ok(()),
        FrameType::Request => {}
        // Ends the connection; refusing it here only spares its body.
        _ => return Err(Refusal::new(code::UNKNOWN_KIND, "not a request")),
    }
    guarded(|| shared.service.admit(&hello(header, addr), header.kind))??;
    let limit = shared.limits.request_bytes_max(header.lane, header.kind);
    if header.body_bytes as usize > limit {
        let text = format!("a request of {} bytes is over the limit of {limit}", header.body_bytes);
        return Err(Refusal::new(code::TOO_LARGE, text));
    }
    Ok(())
}

fn hello(header: &Header, addr: SocketAddr) -> PeerHello {
    PeerHello {
        cluster_id: header.cluster_id,
        node_id: header.sender_id,
        target_id: header.target_id,
        boot: header.boot,
        lane: header.lane,
        addr,
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
