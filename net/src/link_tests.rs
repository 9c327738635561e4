//! One outgoing connection against a server that the tests drive byte by byte. Time stands still and jumps.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    task::JoinHandle,
};

use super::*;
use crate::{
    LocalProvider, Peer, PendingReply,
    queue::Stage,
    testing::*,
    wire::{HEADER_BYTES, Notice},
};

const S: Duration = Duration::from_secs(1);

/// A link with its queue, as a peer has them.
struct Bench {
    queue: Arc<Queue>,
    limits: Limits,
    target: Arc<Target>,
}

impl Bench {
    fn new() -> Self {
        Self::with(Limits::default(), Arc::new(|_| Ok(())))
    }

    fn with(limits: Limits, reply_check: ReplyCheck) -> Self {
        let target = Arc::new(Target { node_id: 2, lane: Lane::Log, reply_check });
        Bench { queue: Arc::new(Queue::new(&limits)), limits, target }
    }

    fn call(&self, kind: u16, body: impl Into<Bytes>) -> PendingReply {
        let (reply, answer) = oneshot::channel();
        let stage = Arc::new(Stage::default());
        let call = Call { identity: identity(1), kind, body: body.into(), stage: Arc::clone(&stage), reply };
        self.queue.push(call).unwrap();
        PendingReply::new(answer, stage, Arc::clone(&self.queue))
    }

    /// Connects with a pipe that holds `pipe_bytes` in each direction.
    fn connect(&self, pipe_bytes: usize) -> (DuplexStream, JoinHandle<LinkEnd>) {
        let (near, far) = tokio::io::duplex(pipe_bytes);
        let (queue, target, limits) = (Arc::clone(&self.queue), Arc::clone(&self.target), self.limits.clone());
        let link = tokio::spawn(async move {
            queue.set_connected(true);
            let end = Link::new(near, &queue, &target, &limits).run().await;
            queue.set_connected(false);
            end
        });
        (far, link)
    }
}

async fn answer(server: &mut DuplexStream, header: Header, body: &[u8]) {
    server.write_all(&bytes_of(&header, body)).await.unwrap();
}

fn is_unknown(result: Result<Bytes, CallError>) -> bool {
    matches!(result, Err(CallError::Unknown { .. }))
}

fn is_not_sent(result: Result<Bytes, CallError>) -> bool {
    matches!(result, Err(CallError::NotSent { .. }))
}

#[tokio::test(start_paused = true)]
async fn answers_find_their_calls_in_any_order() {
    let bench = Bench::new();
    let (mut server, _link) = bench.connect(10_000);
    let calls: Vec<_> = (0..3).map(|n| bench.call(ECHO, vec![n])).collect();
    for n in 0..3 {
        let (header, body) = next_frame(&mut server).await.unwrap();
        let want = Header { body_bytes: 1, body_crc: crc32fast::hash(&body), ..request(n + 1, ECHO) };
        assert_eq!((header, body), (want, vec![n as u8]));
    }
    answer(&mut server, reply(3, ECHO), b"c").await;
    answer(&mut server, Header { frame: FrameType::Refusal, code: 123, ..reply(1, ECHO) }, b"no").await;
    answer(&mut server, reply(2, ECHO), b"b").await;
    let [a, b, c]: [_; 3] = calls.try_into().ok().unwrap();
    assert_eq!(a.wait(S).await, Err(CallError::Refused { code: 123, message: "no".into() }));
    assert_eq!(b.wait(S).await.unwrap(), "b");
    assert_eq!(c.wait(S).await.unwrap(), "c");
}

/// For every number of bytes that the socket took before it broke: requests it began are unknown, the others go out on
/// the next connection, in order.
#[tokio::test(start_paused = true)]
async fn a_loss_after_any_byte_keeps_sent_and_unsent_exactly_apart() {
    const FRAMES: usize = 4;
    const FRAME_BYTES: usize = HEADER_BYTES + 1;
    for taken in 1..=FRAMES * FRAME_BYTES {
        let bench = Bench::new();
        let calls: Vec<_> = (0..FRAMES).map(|n| bench.call(ECHO, vec![n as u8])).collect();
        let (server, link) = bench.connect(taken);
        // Time only moves when every task waits: the pipe is full then.
        tokio::time::sleep(Duration::from_millis(1)).await;
        drop(server);
        assert!(!link.await.unwrap().is_wanted);
        let begun = taken.div_ceil(FRAME_BYTES);

        let (mut server, _link) = bench.connect(10_000);
        for (n, call) in calls.into_iter().enumerate() {
            if n < begun {
                assert!(is_unknown(call.wait(S).await), "{taken} bytes taken, call {n}");
                continue;
            }
            let (header, body) = next_frame(&mut server).await.unwrap();
            assert_eq!(body, [n as u8], "{taken} bytes taken");
            answer(&mut server, reply(header.request_id, ECHO), &body).await;
            assert_eq!(call.wait(S).await.unwrap(), body);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_knows_whether_the_request_went_out() {
    let bench = Bench::new();
    let queued = bench.call(ECHO, "never connected");
    assert!(is_not_sent(queued.wait(S).await));

    let (mut server, _link) = bench.connect(10_000);
    let sent = bench.call(ECHO, "no answer");
    assert_eq!(next_frame(&mut server).await.unwrap().1, b"no answer", "a request given up went out");
    assert!(is_unknown(sent.wait(S).await));

    // Its late answer bothers nobody.
    answer(&mut server, reply(1, ECHO), &[]).await;
    let call = bench.call(ECHO, "next");
    assert_eq!(next_frame(&mut server).await.unwrap().0.request_id, 2);
    answer(&mut server, reply(2, ECHO), b"fine").await;
    assert_eq!(call.wait(S).await.unwrap(), "fine");
}

#[tokio::test(start_paused = true)]
async fn behind_a_blocked_socket_requests_stay_unsent() {
    let bench = Bench::new();
    let (mut server, _link) = bench.connect(1000);
    let first = bench.call(ECHO, vec![1; BATCH_BYTES]);
    let second = bench.call(ECHO, "second");
    let (first, second) = tokio::join!(first.wait(S), second.wait(S));
    assert!(is_unknown(first));
    assert!(is_not_sent(second));
    let third = bench.call(ECHO, "third");
    assert_eq!(next_frame(&mut server).await.unwrap().1.len(), BATCH_BYTES);
    assert_eq!(next_frame(&mut server).await.unwrap().1, b"third");
    drop(third);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_answer_withdraws_a_queued_request() {
    let bench = Bench::new();
    drop(bench.call(ECHO, "withdrawn"));
    let _call = bench.call(ECHO, "kept");
    let (mut server, _link) = bench.connect(10_000);
    assert_eq!(next_frame(&mut server).await.unwrap().1, b"kept");
}

#[tokio::test(start_paused = true)]
async fn no_more_are_in_flight_than_allowed() {
    let bench = Bench::with(Limits { in_flight_frames_max: 2, ..Limits::default() }, Arc::new(|_| Ok(())));
    let (mut server, _link) = bench.connect(10_000);
    let mut calls: VecDeque<_> = (0..4_u8).map(|n| bench.call(ECHO, vec![n])).collect();
    next_frame(&mut server).await.unwrap();
    next_frame(&mut server).await.unwrap();
    let third = calls.remove(2).unwrap();
    assert!(is_not_sent(third.wait(Duration::from_millis(1)).await));
    answer(&mut server, reply(2, ECHO), &[]).await;
    assert_eq!(next_frame(&mut server).await.unwrap().1, [3]);
}

#[tokio::test(start_paused = true)]
async fn a_notice_refuses_what_was_sent_and_nothing_else_was_answered() {
    for (code, text) in [(code::BUSY, "as many connections"), (code::VERSION, "version 9")] {
        let bench = Bench::new();
        let (mut server, link) = bench.connect(10_000);
        let call = bench.call(ECHO, "hello");
        next_frame(&mut server).await.unwrap();
        server.write_all(&Notice { version: 9, version_seen: 1, code }.seal()).await.unwrap();
        let error = call.wait(S).await.unwrap_err();
        assert!(error.is_surely_unhandled());
        let CallError::Refused { code: got, message } = error else { panic!("{error}") };
        assert_eq!(got, code);
        assert!(message.contains(text), "{message}");
        assert!(!link.await.unwrap().was_answered);
    }
}

#[tokio::test(start_paused = true)]
async fn a_notice_after_an_answer_proves_nothing() {
    let bench = Bench::new();
    let (mut server, link) = bench.connect(10_000);
    let (first, second) = (bench.call(ECHO, "1"), bench.call(ECHO, "2"));
    answer(&mut server, sign(FrameType::Pong), &[]).await;
    next_frame(&mut server).await.unwrap();
    next_frame(&mut server).await.unwrap();
    answer(&mut server, reply(1, ECHO), &[]).await;
    assert!(first.wait(S).await.is_ok());
    server.write_all(&Notice::new(code::BUSY, 0).seal()).await.unwrap();
    assert!(is_unknown(second.wait(S).await));
    assert!(link.await.unwrap().was_answered);
}

#[tokio::test(start_paused = true)]
async fn an_answer_from_another_node_is_not_believed() {
    let good = reply(1, ECHO);
    let wrong = [
        Header { sender_id: 3, ..good },
        Header { target_id: 3, ..good },
        Header { cluster_id: [9; 16], ..good },
        Header { kind: GATED, ..good },
    ];
    for header in wrong {
        let bench = Bench::new();
        let (mut server, link) = bench.connect(10_000);
        let (first, second) = (bench.call(ECHO, "1"), bench.call(ECHO, "2"));
        next_frame(&mut server).await.unwrap();
        answer(&mut server, header, &[]).await;
        assert!(is_unknown(first.wait(S).await), "{header:?}");
        assert!(is_unknown(second.wait(S).await), "{header:?}");
        assert!(!link.await.unwrap().is_wanted);
    }
    // A probe asks whoever is there.
    let bench = Bench::new();
    let (mut server, _link) = bench.connect(10_000);
    let call = bench.call(PROBE, "who?");
    next_frame(&mut server).await.unwrap();
    answer(&mut server, Header { sender_id: 0, cluster_id: [0; 16], ..reply(1, PROBE) }, b"nobody").await;
    assert_eq!(call.wait(S).await.unwrap(), "nobody");
}

#[tokio::test(start_paused = true)]
async fn the_callers_check_of_boot_counts_is_asked() {
    let check: ReplyCheck =
        Arc::new(|hello| if hello.boot < 3 { Err(Refusal::new(code::STALE_BOOT, "an old copy")) } else { Ok(()) });
    let bench = Bench::with(Limits::default(), check);
    let (mut server, link) = bench.connect(10_000);
    let (first, second) = (bench.call(ECHO, "1"), bench.call(ECHO, "2"));
    next_frame(&mut server).await.unwrap();
    answer(&mut server, reply(1, ECHO), &[]).await;
    assert!(first.wait(S).await.is_ok());
    answer(&mut server, Header { boot: 2, ..reply(2, ECHO) }, &[]).await;
    let error = second.wait(S).await.unwrap_err();
    assert!(error.to_string().contains("an old copy"), "{error}");
    assert!(is_unknown(Err(error)));
    assert!(link.await.unwrap().why.contains("an old copy"));
}

#[tokio::test(start_paused = true)]
async fn any_damage_of_an_answer_leaves_its_call_unknown() {
    let intact = bytes_of(&reply(1, ECHO), b"body");
    for at in 0..intact.len() {
        let bench = Bench::new();
        let (mut server, _link) = bench.connect(10_000);
        let call = bench.call(ECHO, "hello");
        next_frame(&mut server).await.unwrap();
        let mut bytes = intact.clone();
        bytes[at] ^= 1;
        server.write_all(&bytes).await.unwrap();
        assert!(is_unknown(call.wait(S).await), "byte {at}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_over_the_limit_is_skipped() {
    let bench = Bench::with(Limits { frame_bytes_max: 100, ..Limits::default() }, Arc::new(|_| Ok(())));
    let (mut server, _link) = bench.connect(10_000);
    let (first, second) = (bench.call(ECHO, "1"), bench.call(ECHO, "2"));
    next_frame(&mut server).await.unwrap();
    next_frame(&mut server).await.unwrap();
    answer(&mut server, reply(1, ECHO), &[0; 101]).await;
    answer(&mut server, reply(2, ECHO), &[0; 100]).await;
    assert!(is_unknown(first.wait(S).await));
    assert_eq!(second.wait(S).await.unwrap().len(), 100);
}

#[tokio::test(start_paused = true)]
async fn a_silent_host_is_given_up_and_a_living_one_is_not() {
    let bench = Bench::new();
    let (mut server, link) = bench.connect(10_000);
    let call = bench.call(GATED, "slow");
    next_frame(&mut server).await.unwrap();
    for _ in 0..20 {
        assert_eq!(next_frame(&mut server).await.unwrap().0.frame, FrameType::Ping);
        answer(&mut server, sign(FrameType::Pong), &[]).await;
    }
    // Now the host is cut off: nothing comes any more. The call need not wait for its own timeout.
    assert!(is_unknown(call.wait(1000 * S).await));
    assert!(link.await.unwrap().why.contains("nothing heard"));
}

#[tokio::test(start_paused = true)]
async fn an_ended_queue_finishes_what_is_waited_for() {
    let bench = Bench::new();
    let (mut server, link) = bench.connect(10_000);
    let (first, second) = (bench.call(ECHO, "1"), bench.call(ECHO, "2"));
    bench.queue.end();
    next_frame(&mut server).await.unwrap();
    next_frame(&mut server).await.unwrap();
    answer(&mut server, reply(1, ECHO), &[]).await;
    assert!(first.wait(S).await.is_ok());
    assert!(is_unknown(second.wait(S).await));
    assert!(link.await.unwrap().is_wanted);
}

#[tokio::test(start_paused = true)]
async fn closing_fails_everything_at_once() {
    let bench = Bench::with(Limits { in_flight_frames_max: 1, ..Limits::default() }, Arc::new(|_| Ok(())));
    let (mut server, link) = bench.connect(10_000);
    let (sent, queued) = (bench.call(ECHO, "1"), bench.call(ECHO, "2"));
    next_frame(&mut server).await.unwrap();
    bench.queue.close();
    assert!(is_unknown(sent.wait(S).await));
    assert!(is_not_sent(queued.wait(S).await));
    assert!(link.await.unwrap().is_wanted);
    let mut rest = Vec::new();
    server.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn the_queue_is_bounded_by_frames_and_bytes_and_forgets_what_was_given_up() {
    let local: LocalProvider = provider(identity(1));
    // Nothing ever listens on port 1 of this address, and the task has no time to try.
    let peer = |limits| Peer::new(Arc::clone(&local), "127.0.0.1:1".into(), 2, Lane::Log, limits);

    let few = peer(Limits { queue_frames_max: 3, ..Limits::default() });
    let mut kept: Vec<_> = (0..3).map(|_| few.send(ECHO, Bytes::new()).unwrap()).collect();
    assert_eq!(few.send(ECHO, Bytes::new()).err(), Some(CallError::QueueFull));
    kept.pop();
    kept.push(few.send(ECHO, Bytes::new()).unwrap());
    assert_eq!(few.send(ECHO, Bytes::new()).err(), Some(CallError::QueueFull));

    let small = peer(Limits { queue_bytes_max: 10, ..Limits::default() });
    let bytes = |count| Bytes::from(vec![0; count]);
    let alone = small.send(ECHO, bytes(11)).unwrap();
    assert_eq!(small.send(ECHO, bytes(1)).err(), Some(CallError::QueueFull));
    drop(alone);
    let _kept = (small.send(ECHO, bytes(4)).unwrap(), small.send(ECHO, bytes(6)).unwrap());
    assert_eq!(small.send(ECHO, bytes(1)).err(), Some(CallError::QueueFull));

    let short = peer(Limits { frame_bytes_max: 10, control_bytes_max: 5, ..Limits::default() });
    assert_eq!(short.send(ECHO, bytes(11)).err(), Some(CallError::TooLarge { bytes: 11, limit: 10 }));
    assert_eq!(short.send(PROBE, bytes(6)).err(), Some(CallError::TooLarge { bytes: 6, limit: 5 }));
    short.close();
    assert!(is_not_sent(short.call(ECHO, bytes(1), S).await));
}
