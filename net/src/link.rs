//! One established outgoing connection, from its first frame to its loss.
//!
//! A single task moves everything: it drains the queue into the out-buffer only when that is empty, so a batch is one
//! write and what the socket did not take stays small; it matches answers with requests by id. When the connection is
//! lost, requests of which at least one byte was taken by the socket fail as unknown, all others go back to the front
//! of the queue. Generic over the stream, so that tests decide byte by byte what the other side sees.

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    net::SocketAddr,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::oneshot,
    time::{Instant, Interval, MissedTickBehavior},
};

use crate::{
    CallError, Lane, Limits, LocalIdentity, PROBE_KINDS, PeerHello, Refusal, ReplyCheck, code,
    inbound::{FrameReader, Incoming, Read},
    outbound::OutBuffer,
    queue::{Call, Demand, Queue},
    wire::{FrameType, Header},
};

/// Bodies taken from the queue for one write. Enough to make system calls cheap, little enough that a request whose
/// caller gives up while the socket is blocked is most likely still in the queue.
const BATCH_BYTES: usize = 256 << 10;

/// Streams that can tell the address of the other end.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {
    fn peer_addr(&self) -> Option<SocketAddr>;
}

impl Stream for TcpStream {
    fn peer_addr(&self) -> Option<SocketAddr> {
        TcpStream::peer_addr(self).ok()
    }
}

/// Who is meant to be at the other end.
pub(crate) struct Target {
    /// 0: not known.
    pub(crate) node_id: u64,
    pub(crate) lane: Lane,
    pub(crate) reply_check: ReplyCheck,
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) struct LinkEnd {
    pub(crate) why: String,
    /// At least one frame came back.
    pub(crate) was_answered: bool,
    /// This node ended it.
    pub(crate) is_wanted: bool,
}

/// Why the task stops polling.
struct Lost {
    why: String,
    /// The other side took nothing and said so.
    refusal: Option<Refusal>,
    is_wanted: bool,
}

impl Lost {
    fn because(why: impl ToString) -> Self {
        Lost { why: why.to_string(), refusal: None, is_wanted: false }
    }
}

/// A request in the out-buffer of which no byte was taken yet.
struct Unwritten {
    begins_at: u64,
    request_id: u64,
    call: Call,
}

/// A request that the other side may have.
struct Sent {
    identity: LocalIdentity,
    kind: u16,
    reply: oneshot::Sender<Result<Bytes, CallError>>,
}

pub(crate) struct Link<'a, S> {
    stream: S,
    addr: SocketAddr,
    queue: &'a Queue,
    target: &'a Target,
    body_bytes_max: usize,
    in_flight_max: usize,
    alive_interval: Duration,
    silence_max: Duration,
    reader: FrameReader,
    out: OutBuffer,
    batch: VecDeque<Call>,
    unwritten: VecDeque<Unwritten>,
    sent: HashMap<u64, Sent>,
    request_id_next: u64,
    tick: Interval,
    last_read: Instant,
    /// Since when a sign of life is waited for.
    silent_since: Option<Instant>,
    was_answered: bool,
}

impl<'a, S: Stream> Link<'a, S> {
    pub(crate) fn new(stream: S, queue: &'a Queue, target: &'a Target, limits: &Limits) -> Self {
        let mut tick = tokio::time::interval((limits.alive_interval / 2).max(Duration::from_millis(1)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Link {
            addr: stream.peer_addr().unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0))),
            stream,
            queue,
            target,
            body_bytes_max: limits.body_bytes_max(target.lane),
            in_flight_max: limits.in_flight_frames_max.max(1),
            alive_interval: limits.alive_interval,
            silence_max: limits.silence_max,
            reader: FrameReader::new(),
            out: OutBuffer::default(),
            batch: VecDeque::new(),
            unwritten: VecDeque::new(),
            sent: HashMap::new(),
            request_id_next: 1,
            tick,
            last_read: Instant::now(),
            silent_since: None,
            was_answered: false,
        }
    }

    /// Serves the queue until the connection is lost or not wanted any more; then every request is accounted for.
    pub(crate) async fn run(mut self) -> LinkEnd {
        let lost = poll_fn(|cx| self.poll(cx)).await;
        self.settle();
        for sent in self.sent.into_values() {
            let error = match &lost.refusal {
                Some(refusal) => refusal.clone().into(),
                None => CallError::Unknown { why: format!("connection lost: {}", lost.why) },
            };
            // A caller that is gone needs no answer.
            let _ = sent.reply.send(Err(error));
        }
        self.queue.put_back(self.unwritten.into_iter().map(|unwritten| unwritten.call));
        LinkEnd { why: lost.why, was_answered: self.was_answered, is_wanted: lost.is_wanted }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        loop {
            match self.step(cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(lost) => return Poll::Ready(lost),
            }
        }
    }

    /// One round over queue, socket and clock. `false`: nothing moved and the task is registered everywhere.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<bool, Lost> {
        let mut moved = self.fill(cx)?;
        if !self.out.is_empty() {
            match self.out.write_ready(cx, &mut self.stream) {
                Ok(taken) => moved |= taken > 0,
                Err(error) => {
                    self.settle();
                    return Err(self.last_words(cx).unwrap_or_else(|| Lost::because(error)));
                }
            }
            self.settle();
        }
        moved |= self.read(cx)?;
        while self.tick.poll_tick(cx).is_ready() {
            moved |= self.watch_silence()?;
        }
        Ok(moved)
    }

    /// Moves a batch from the queue to the out-buffer.
    fn fill(&mut self, cx: &mut Context<'_>) -> Result<bool, Lost> {
        let frames_max = if self.out.is_empty() { self.in_flight_max.saturating_sub(self.sent.len()) } else { 0 };
        let demand = self.queue.take(cx, frames_max, BATCH_BYTES, &mut self.batch);
        let moved = !self.batch.is_empty();
        while let Some(call) = self.batch.pop_front() {
            let request_id = self.request_id_next;
            self.request_id_next += 1;
            let header = self.header(FrameType::Request, call.identity, call.kind, request_id).seal(&call.body);
            let begins_at = self.out.push(&header, &call.body);
            self.unwritten.push_back(Unwritten { begins_at, request_id, call });
        }
        let is_answered = self.sent.is_empty() && self.unwritten.is_empty();
        match demand {
            Demand::Stop => {}
            Demand::Finish if is_answered => {}
            Demand::Finish | Demand::GoOn => return Ok(moved),
        }
        Err(Lost { why: "closed by this node".into(), refusal: None, is_wanted: true })
    }

    /// Requests whose first byte was taken by the socket are with the other side from here on.
    fn settle(&mut self) {
        let written = self.out.written();
        while let Some(Unwritten { request_id, call, .. }) =
            self.unwritten.pop_front_if(|unwritten| unwritten.begins_at < written)
        {
            self.sent.insert(request_id, Sent { identity: call.identity, kind: call.kind, reply: call.reply });
        }
    }

    fn header(&self, frame: FrameType, identity: LocalIdentity, kind: u16, request_id: u64) -> Header {
        Header {
            frame,
            lane: self.target.lane,
            cluster_id: identity.cluster_id,
            sender_id: identity.node_id,
            target_id: self.target.node_id,
            boot: identity.boot,
            kind,
            code: 0,
            request_id,
            body_bytes: 0,
            body_crc: 0,
        }
    }

    /// Reads what is there and answers calls.
    fn read(&mut self, cx: &mut Context<'_>) -> Result<bool, Lost> {
        match self.reader.read_ready(cx, &mut self.stream).map_err(Lost::because)? {
            Read::Pending => return Ok(false),
            Read::End => return Err(Lost::because("the other side closed the connection")),
            Read::Some => {}
        }
        self.last_read = Instant::now();
        self.silent_since = None;
        let limit = self.body_bytes_max;
        let judge = |header: &Header| {
            if header.body_bytes as usize <= limit {
                return Ok(());
            }
            let text = format!("an answer of {} bytes is over the limit of {limit}", header.body_bytes);
            Err(Refusal::new(code::ANSWER_TOO_LARGE, text))
        };
        while let Some(incoming) = self.reader.next(judge).map_err(Lost::because)? {
            self.receive(incoming)?;
        }
        Ok(true)
    }

    /// After a failed write the other side's reason may still be there to read.
    fn last_words(&mut self, cx: &mut Context<'_>) -> Option<Lost> {
        loop {
            match self.read(cx) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(lost) => return lost.refusal.is_some().then_some(lost),
            }
        }
    }

    fn receive(&mut self, incoming: Incoming) -> Result<(), Lost> {
        match incoming {
            Incoming::Notice(notice) if !self.was_answered => {
                let refusal = notice.to_refusal();
                Err(Lost { why: refusal.message.clone(), refusal: Some(refusal), is_wanted: false })
            }
            Incoming::Notice(_) => Err(Lost::because("a notice after answers")),
            Incoming::Refused(header, refusal) => {
                if let Some(sent) = self.sent.remove(&header.request_id) {
                    let _ = sent.reply.send(Err(CallError::Unknown { why: refusal.message }));
                }
                Ok(())
            }
            Incoming::Frame(header, body) => {
                self.was_answered = true;
                match header.frame {
                    FrameType::Pong => Ok(()),
                    FrameType::Reply | FrameType::Refusal => self.answer(&header, body),
                    FrameType::Request | FrameType::Ping => Err(Lost::because("a request on an outgoing connection")),
                }
            }
        }
    }

    fn answer(&mut self, header: &Header, body: Bytes) -> Result<(), Lost> {
        let Some(sent) = self.sent.remove(&header.request_id) else {
            // Its caller may have given up long ago; an id that was never used is another matter.
            let was_used = header.request_id < self.request_id_next;
            return if was_used { Ok(()) } else { Err(Lost::because("an answer to nothing")) };
        };
        if header.frame == FrameType::Refusal {
            let message = String::from_utf8_lossy(&body).into_owned();
            let _ = sent.reply.send(Err(CallError::Refused { code: header.code, message }));
            return Ok(());
        }
        match self.check_answer(header, &sent) {
            Ok(()) => {
                let _ = sent.reply.send(Ok(body));
                Ok(())
            }
            Err(why) => {
                let _ = sent.reply.send(Err(CallError::Unknown { why: why.clone() }));
                Err(Lost::because(why))
            }
        }
    }

    /// Whether the answer comes from the node that was asked.
    fn check_answer(&self, header: &Header, sent: &Sent) -> Result<(), String> {
        if header.kind != sent.kind {
            return Err(format!("a request of kind {} was answered as kind {}", sent.kind, header.kind));
        }
        if sent.kind < PROBE_KINDS {
            return Ok(());
        }
        let expected = (sent.identity.cluster_id, self.target.node_id, sent.identity.node_id);
        if (header.cluster_id, header.sender_id, header.target_id) != expected {
            return Err(format!(
                "node {} was asked and node {} of cluster {} answered",
                self.target.node_id,
                header.sender_id,
                crate::identity::hex(&header.cluster_id)
            ));
        }
        let hello = PeerHello {
            cluster_id: header.cluster_id,
            node_id: header.sender_id,
            target_id: header.target_id,
            boot: header.boot,
            lane: header.lane,
            addr: self.addr,
        };
        (self.target.reply_check)(&hello).map_err(|refusal| format!("answer not believed: {}", refusal.message))
    }

    /// Asks for a sign of life when nothing came for a while, and gives up when none comes.
    fn watch_silence(&mut self) -> Result<bool, Lost> {
        self.sent.retain(|_, sent| !sent.reply.is_closed());
        let now = Instant::now();
        match self.silent_since {
            Some(since) if now - since >= self.silence_max => {
                Err(Lost::because(format!("nothing heard for {} ms", (now - self.last_read).as_millis())))
            }
            Some(_) => Ok(false),
            None if now - self.last_read < self.alive_interval => Ok(false),
            None => {
                self.silent_since = Some(now);
                if !self.out.is_empty() {
                    return Ok(false);
                }
                let ping = self.header(FrameType::Ping, LocalIdentity::default(), 0, 0).seal(&[]);
                self.out.push(&ping, &Bytes::new());
                Ok(true)
            }
        }
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
