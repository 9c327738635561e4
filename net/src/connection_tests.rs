//! One accepted connection against a client that the tests drive byte by byte. Time stands still and jumps.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::Ordering;

use tokio::{io::DuplexStream, task::JoinHandle};

use super::*;
use crate::{Lane, LocalIdentity, PROBE_KINDS, testing::*, wire::VERSION};

const S: Duration = Duration::from_secs(1);

fn start_with(script: &Arc<Scripted>, limits: Limits) -> (DuplexStream, JoinHandle<End>, CancellationToken) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let shutdown = CancellationToken::new();
    let local = provider(script.identity);
    let service = Arc::new(ScriptedService(Arc::clone(script)));
    let shared = Arc::new(Shared { local, service, limits });
    let serving = tokio::spawn(serve(far, addr(), shared, shutdown.clone()));
    (near, serving, shutdown)
}

fn start(script: &Arc<Scripted>) -> (DuplexStream, JoinHandle<End>) {
    let (client, serving, _) = start_with(script, Limits::default());
    (client, serving)
}

async fn send(client: &mut DuplexStream, header: Header, body: &[u8]) {
    client.write_all(&bytes_of(&header, body)).await.unwrap();
}

/// The code of the next answer, 0 for a reply.
async fn next_code(client: &mut DuplexStream) -> (u64, u16) {
    let (header, _) = next_frame(client).await.unwrap();
    (header.request_id, header.code)
}

#[tokio::test(start_paused = true)]
async fn a_request_is_answered_in_the_name_of_this_node() {
    let script = Scripted::new();
    let (mut client, _) = start(&script);
    send(&mut client, request(9, ECHO), b"hello").await;
    let (header, body) = next_frame(&mut client).await.unwrap();
    let want = Header { body_bytes: 5, body_crc: crc32fast::hash(b"hello"), ..reply(9, ECHO) };
    assert_eq!((header, body.as_slice()), (want, b"hello".as_slice()));
    let hello = script.hellos.lock().unwrap()[0];
    assert_eq!((hello.node_id, hello.target_id, hello.boot, hello.lane), (1, 2, 3, Lane::Log));
}

#[tokio::test(start_paused = true)]
async fn a_slow_request_does_not_hold_up_later_ones() {
    let script = Scripted::new();
    let (mut client, _) = start(&script);
    send(&mut client, request(1, GATED), &[]).await;
    send(&mut client, request(2, ECHO), &[]).await;
    assert_eq!(next_code(&mut client).await, (2, 0));
    script.gate.add_permits(1);
    assert_eq!(next_code(&mut client).await, (1, 0));
}

#[tokio::test(start_paused = true)]
async fn strangers_are_refused_one_by_one_and_may_probe() {
    let mut script = Scripted::new();
    Arc::get_mut(&mut script).unwrap().boot_highest = Some(3);
    let (mut client, _) = start(&script);
    let empty = Header { cluster_id: [0; 16], sender_id: 0, target_id: 0, boot: 0, ..request(1, ECHO) };
    let cases = [
        (Header { cluster_id: [9; 16], ..request(1, ECHO) }, code::WRONG_CLUSTER),
        (Header { target_id: 3, ..request(1, ECHO) }, code::WRONG_TARGET),
        (Header { boot: 2, ..request(1, ECHO) }, code::STALE_BOOT),
        (empty, code::NO_IDENTITY),
        (Header { kind: PROBE, ..empty }, 0),
        (request(1, 999), code::UNKNOWN_KIND),
        (request(1, ECHO), 0),
    ];
    for (request, want) in cases {
        send(&mut client, request, b"some body").await;
        assert_eq!(next_code(&mut client).await, (1, want), "{request:?}");
    }
    assert_eq!(script.seen_count(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_new_identity_on_the_same_connection_is_announced() {
    let script = Scripted::new();
    let (mut client, _) = start(&script);
    let empty = Header { cluster_id: [0; 16], sender_id: 0, target_id: 0, boot: 0, ..request(1, PROBE) };
    for request in [empty, request(2, ECHO), request(3, ECHO)] {
        send(&mut client, request, &[]).await;
        assert_eq!(next_code(&mut client).await.1, 0);
    }
    let nodes: Vec<u64> = script.hellos.lock().unwrap().iter().map(|hello| hello.node_id).collect();
    assert_eq!(nodes, [0, 1]);
}

#[tokio::test(start_paused = true)]
async fn panics_are_answered_and_the_connection_lives_on() {
    let script = Scripted::new();
    let (mut client, serving) = start(&script);
    for (id, kind) in [(1, PANIC_IN_FUTURE), (2, PANIC_IN_CALL), (3, PANIC_IN_ADMIT)] {
        send(&mut client, request(id, kind), &[]).await;
        assert_eq!(next_code(&mut client).await, (id, code::PANICKED));
    }
    send(&mut client, request(4, ECHO), &[]).await;
    assert_eq!(next_code(&mut client).await, (4, 0));
    assert!(!serving.is_finished());
}

#[tokio::test(start_paused = true)]
async fn sizes_are_held_to_the_lane_and_to_probes() {
    let script = Scripted::new();
    let limits = Limits { frame_bytes_max: 1000, control_bytes_max: 100, ..Limits::default() };
    let (mut client, _, _) = start_with(&script, limits);
    let on = |lane, kind| Header { lane, ..request(1, kind) };
    let cases = [
        (on(Lane::Log, ECHO), 1000, 0),
        (on(Lane::Bulk, ECHO), 1001, code::TOO_LARGE),
        (on(Lane::Control, ECHO), 100, 0),
        (on(Lane::Control, ECHO), 101, code::TOO_LARGE),
        (on(Lane::Bulk, PROBE_KINDS - 1), 101, code::TOO_LARGE),
    ];
    for (header, bytes, want) in cases {
        send(&mut client, header, &vec![5; bytes]).await;
        assert_eq!(next_code(&mut client).await, (1, want), "{bytes} bytes, {header:?}");
    }
    send(&mut client, request(2, INFLATE), b"1001").await;
    assert_eq!(next_code(&mut client).await, (2, code::ANSWER_TOO_LARGE));
}

#[tokio::test(start_paused = true)]
async fn another_version_is_answered_with_both_named() {
    let script = Scripted::new();
    let (mut client, serving) = start(&script);
    let mut bytes = bytes_of(&request(1, ECHO), b"from the future");
    bytes[4..6].copy_from_slice(&7_u16.to_le_bytes());
    client.write_all(&bytes).await.unwrap();
    let notice = only_notice(&mut client).await;
    assert_eq!(notice, Notice { version: VERSION, version_seen: 7, code: code::VERSION });
    drop(client);
    assert!(matches!(serving.await.unwrap(), End::Damaged(WireError::Version { seen: 7 })));
    assert_eq!(script.seen_count(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_version_that_changes_on_the_way_is_damage_and_no_notice_follows() {
    let script = Scripted::new();
    let (mut client, serving) = start(&script);
    send(&mut client, request(1, GATED), &[]).await;
    script.wait_seen(1).await;
    let mut bytes = bytes_of(&request(2, ECHO), &[]);
    bytes[4] = 7;
    client.write_all(&bytes).await.unwrap();
    assert!(next_frame(&mut client).await.is_none());
    assert!(matches!(serving.await.unwrap(), End::Damaged(_)));
}

#[tokio::test(start_paused = true)]
async fn damage_ends_the_connection_and_handles_nothing_more() {
    let intact = bytes_of(&request(2, ECHO), b"body");
    for at in 0..intact.len() {
        let script = Scripted::new();
        let (mut client, serving) = start(&script);
        send(&mut client, request(1, GATED), &[]).await;
        script.wait_seen(1).await;
        let mut bytes = intact.clone();
        bytes[at] ^= 0x10;
        client.write_all(&bytes).await.unwrap();
        assert!(matches!(serving.await.unwrap(), End::Damaged(_)), "byte {at}");
        assert_eq!(script.seen_count(), 1, "byte {at}");
        assert_eq!(script.ended.load(Ordering::SeqCst), 1, "the handler's future outlived its connection");
    }
}

#[tokio::test(start_paused = true)]
async fn frames_that_no_client_sends_end_the_connection() {
    for header in [reply(1, ECHO), sign(FrameType::Pong)] {
        let (mut client, serving) = start(&Scripted::new());
        send(&mut client, header, &[]).await;
        assert!(matches!(serving.await.unwrap(), End::Misplaced(frame) if frame == header.frame));
    }
    let (mut client, serving) = start(&Scripted::new());
    client.write_all(&Notice::new(code::BUSY, 0).seal()).await.unwrap();
    assert!(matches!(serving.await.unwrap(), End::MisplacedNotice));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_is_closed() {
    let (_client, serving) = start(&Scripted::new());
    assert!(matches!(serving.await.unwrap(), End::TimedOut("no first frame")));
}

#[tokio::test(start_paused = true)]
async fn a_slow_loris_is_closed_in_header_and_body() {
    let begin_at = [5, HEADER_BYTES_AND_SOME];
    for begin in begin_at {
        let script = Scripted::new();
        let (mut client, serving) = start(&script);
        send(&mut client, request(1, ECHO), &[]).await;
        assert_eq!(next_code(&mut client).await, (1, 0));
        let bytes = bytes_of(&request(2, ECHO), &[1; 1000]);
        client.write_all(&bytes[..begin]).await.unwrap();
        // One byte each second keeps the connection busy, not alive.
        let mut drops = bytes[begin..].iter();
        let end = loop {
            if serving.is_finished() {
                break serving.await.unwrap();
            }
            let byte = drops.next().expect("closed long before the frame is complete");
            if client.write_all(&[*byte]).await.is_err() {
                break serving.await.unwrap();
            }
            tokio::time::sleep(S).await;
        };
        assert!(matches!(end, End::TimedOut("a frame did not arrive completely")), "{end:?}");
        assert_eq!(script.seen_count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn life_is_shown_while_a_body_arrives_and_while_one_is_skipped() {
    for first in [request(1, ECHO), Header { target_id: 3, ..request(1, ECHO) }] {
        let (mut client, _) = start(&Scripted::new());
        let bytes = bytes_of(&first, &[1; 100_000]);
        client.write_all(&bytes[..50_000]).await.unwrap();
        if first.target_id == 3 {
            assert_eq!(next_code(&mut client).await, (1, code::WRONG_TARGET));
        }
        assert_eq!(next_frame(&mut client).await.unwrap().0.frame, FrameType::Pong);
        client.write_all(&bytes[50_000..]).await.unwrap();
        send(&mut client, request(2, ECHO), &[]).await;
        let id = if first.target_id == 3 { 2 } else { 1 };
        assert_eq!(next_code(&mut client).await, (id, 0));
    }
}

const HEADER_BYTES_AND_SOME: usize = crate::wire::HEADER_BYTES + 3;

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_and_pings_keep_it() {
    let (mut client, serving) = start(&Scripted::new());
    for _ in 0..100 {
        send(&mut client, sign(FrameType::Ping), &[]).await;
        assert_eq!(next_frame(&mut client).await.unwrap().0.frame, FrameType::Pong);
        tokio::time::sleep(S).await;
    }
    assert!(!serving.is_finished());
    assert!(matches!(serving.await.unwrap(), End::TimedOut("nothing moved")));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_no_answers_is_closed() {
    let script = Scripted::new();
    let (mut client, serving) = start(&script);
    send(&mut client, request(1, INFLATE), b"3000000").await;
    assert!(matches!(serving.await.unwrap(), End::TimedOut("the other side takes no answers")));
}

#[tokio::test(start_paused = true)]
async fn too_many_in_flight_stop_the_reading_and_show_life() {
    let script = Scripted::new();
    let (mut client, _, _) = start_with(&script, Limits { in_flight_frames_max: 3, ..Limits::default() });
    for id in 1..=5 {
        send(&mut client, request(id, GATED), &[]).await;
    }
    // Time only moves when every task has nothing left to do, so by then all that would be read was read.
    assert_eq!(next_frame(&mut client).await.unwrap().0.frame, FrameType::Pong);
    assert_eq!(script.seen_count(), 3);
    script.gate.add_permits(1);
    assert_eq!(next_code(&mut client).await, (1, 0));
    script.wait_seen(4).await;
    script.gate.add_permits(4);
    for id in 2..=5 {
        assert_eq!(next_code(&mut client).await, (id, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn too_many_bytes_in_flight_stop_the_reading_and_one_is_always_taken() {
    let script = Scripted::new();
    let (mut client, _, _) = start_with(&script, Limits { in_flight_bytes_max: 10, ..Limits::default() });
    for id in 1..=3 {
        send(&mut client, request(id, GATED), &[0; 50_000]).await;
    }
    for seen in 1..=3 {
        script.wait_seen(seen).await;
        assert_eq!(next_frame(&mut client).await.unwrap().0.frame, FrameType::Pong);
        assert_eq!(script.seen_count(), seen);
        script.gate.add_permits(1);
        assert_eq!(next_code(&mut client).await, (seen as u64, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn answers_that_wait_for_the_socket_stop_the_reading_and_all_arrive() {
    let script = Scripted::new();
    let (client, _) = start(&script);
    let (mut from, mut to) = tokio::io::split(client);
    let count = 40;
    let body = vec![7; 300_000];
    let frame_of = |id| bytes_of(&request(id, ECHO), &vec![id as u8; 300_000]);
    let writing = tokio::spawn(async move {
        for id in 1..=count {
            to.write_all(&frame_of(id)).await.unwrap();
        }
    });
    // The other direction is full now and so is the way back.
    tokio::time::sleep(S).await;
    assert!(script.seen_count() < 20);
    for id in 1..=count {
        let (header, got) = next_frame(&mut from).await.unwrap();
        assert_eq!(header.request_id, id);
        assert!(got.len() == body.len() && got.iter().all(|byte| *byte == id as u8));
    }
    writing.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn shutdown_finishes_what_is_being_handled_and_takes_nothing_new() {
    let script = Scripted::new();
    let (mut client, serving, shutdown) = start_with(&script, Limits::default());
    send(&mut client, request(1, GATED), &[]).await;
    script.wait_seen(1).await;
    shutdown.cancel();
    tokio::task::yield_now().await;
    send(&mut client, request(2, ECHO), &[]).await;
    script.gate.add_permits(1);
    assert_eq!(next_code(&mut client).await, (1, 0));
    assert!(matches!(serving.await.unwrap(), End::Drained));
    assert!(next_frame(&mut client).await.is_none());
    assert_eq!(script.seen_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn shutdown_does_not_wait_for_ever() {
    let script = Scripted::new();
    let (mut client, serving, shutdown) = start_with(&script, Limits::default());
    send(&mut client, request(1, GATED), &[]).await;
    script.wait_seen(1).await;
    shutdown.cancel();
    assert!(matches!(serving.await.unwrap(), End::TimedOut("handlers did not finish while shutting down")));
    assert_eq!(script.ended.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_node_without_identity_answers_probes_as_nobody() {
    let mut script = Scripted::new();
    Arc::get_mut(&mut script).unwrap().identity = LocalIdentity::default();
    let (mut client, _) = start(&script);
    send(&mut client, Header { target_id: 0, ..request(1, PROBE) }, b"who?").await;
    let (header, _) = next_frame(&mut client).await.unwrap();
    assert_eq!((header.frame, header.sender_id, header.cluster_id), (FrameType::Reply, 0, [0; 16]));
    send(&mut client, request(2, ECHO), &[]).await;
    assert_eq!(next_code(&mut client).await, (2, code::NO_IDENTITY));
}
