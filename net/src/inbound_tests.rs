//! Frames in pieces: any cut, any damage, any announcement.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::{future::poll_fn, task::Poll};

use super::*;
use crate::{
    code,
    testing::{ECHO, bytes_of, request},
};

fn admit(_: &Header) -> Result<(), Refusal> {
    Ok(())
}

/// What comes out of `bytes` when they arrive in pieces of `piece` bytes, up to the first error.
async fn read_all(bytes: &[u8], piece: usize) -> (Vec<(u64, Bytes)>, Option<WireError>) {
    let mut stream = tokio_test_stream(bytes, piece);
    let mut reader = FrameReader::new();
    let mut frames = Vec::new();
    loop {
        let read = poll_fn(|cx| match reader.read_ready(cx, &mut stream).unwrap() {
            Read::Pending => Poll::Pending,
            read => Poll::Ready(read),
        })
        .await;
        if read == Read::End {
            return (frames, None);
        }
        loop {
            match reader.next(admit) {
                Ok(Some(Incoming::Frame(header, body))) => frames.push((header.request_id, body)),
                Ok(Some(other)) => panic!("{other:?}"),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
}

/// A stream that gives at most `piece` bytes per read.
fn tokio_test_stream(bytes: &[u8], piece: usize) -> impl AsyncRead + Unpin + use<> {
    struct Pieces(Bytes, usize);
    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut Context<'_>,
            into: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let length = self.1.min(self.0.len()).min(into.remaining());
            into.put_slice(&self.0.split_to(length));
            Poll::Ready(Ok(()))
        }
    }
    Pieces(Bytes::copy_from_slice(bytes), piece)
}

fn sample() -> (Vec<u8>, Vec<(u64, Bytes)>) {
    let sizes = [0, 5, SMALL_BODY_BYTES_MAX, SMALL_BODY_BYTES_MAX + 1, 200_000, 1, 0, HEAD_BYTES];
    let mut bytes = Vec::new();
    let mut frames = Vec::new();
    for (index, size) in sizes.into_iter().enumerate() {
        let request_id = index as u64 + 1;
        let body: Vec<u8> = (0..size).map(|at| (at * 7 + index) as u8).collect();
        bytes.extend(bytes_of(&request(request_id, ECHO), &body));
        frames.push((request_id, Bytes::from(body)));
    }
    (bytes, frames)
}

#[tokio::test]
async fn frames_arrive_whole_however_they_are_cut() {
    let (bytes, frames) = sample();
    for piece in [1, 7, 71, 72, 73, 1000, 16_384, 65_536, usize::MAX] {
        let (got, error) = read_all(&bytes, piece).await;
        assert!(got == frames && error.is_none(), "pieces of {piece}: {} frames, {error:?}", got.len());
    }
}

#[tokio::test]
async fn any_flipped_bit_leaves_the_exact_frames_before_it() {
    let frames: Vec<(u64, Bytes)> = (1..=3).map(|id| (id, Bytes::from(vec![id as u8; 20]))).collect();
    let intact: Vec<u8> = frames.iter().flat_map(|(id, body)| bytes_of(&request(*id, ECHO), body)).collect();
    let frame_bytes = intact.len() / 3;
    for at in 0..intact.len() {
        for bit in 0..8 {
            let mut bytes = intact.clone();
            bytes[at] ^= 1 << bit;
            let (got, error) = read_all(&bytes, usize::MAX).await;
            assert_eq!(got, frames[..at / frame_bytes], "byte {at} bit {bit}");
            assert!(error.is_some(), "byte {at} bit {bit}");
        }
    }
}

#[tokio::test]
async fn any_cut_leaves_the_exact_frames_before_it() {
    let frames: Vec<(u64, Bytes)> = (1..=3).map(|id| (id, Bytes::from(vec![id as u8; 20]))).collect();
    let intact: Vec<u8> = frames.iter().flat_map(|(id, body)| bytes_of(&request(*id, ECHO), body)).collect();
    for length in 0..intact.len() {
        let (got, error) = read_all(&intact[..length], 13).await;
        assert_eq!((got.as_slice(), error), (&frames[..length * 3 / intact.len()], None), "cut to {length}");
    }
}

#[tokio::test]
async fn an_announced_body_gets_memory_only_as_it_arrives() {
    let mut header = request(1, ECHO).seal(&[]);
    header[52..56].copy_from_slice(&u32::MAX.to_le_bytes());
    let crc = crc32fast::hash(&header[..68]);
    header[68..].copy_from_slice(&crc.to_le_bytes());
    let arrived = 300_000;
    let mut stream = tokio_test_stream(&[&header[..], &vec![0; arrived]].concat(), usize::MAX);
    let mut reader = FrameReader::new();
    while poll_fn(|cx| Poll::Ready(reader.read_ready(cx, &mut stream).unwrap())).await == Read::Some {
        assert_eq!(reader.next(admit), Ok(None));
    }
    let Some(Body::Large(_, body)) = &reader.body else { panic!("no large body") };
    assert_eq!(body.len(), arrived);
    assert!(body.capacity() <= 4 * arrived, "{} bytes reserved", body.capacity());
}

#[tokio::test]
async fn a_refused_body_is_skipped_without_memory_and_the_next_frame_is_found() {
    let large = vec![1; 500_000];
    let bytes = [bytes_of(&request(1, ECHO), &large), bytes_of(&request(2, ECHO), b"next")].concat();
    let mut stream = tokio_test_stream(&bytes, 10_000);
    let mut reader = FrameReader::new();
    let mut got = Vec::new();
    while poll_fn(|cx| Poll::Ready(reader.read_ready(cx, &mut stream).unwrap())).await == Read::Some {
        let judge = |header: &Header| {
            if header.request_id == 1 { Err(Refusal::new(code::TOO_LARGE, "no")) } else { Ok(()) }
        };
        while let Some(incoming) = reader.next(judge).unwrap() {
            got.push(incoming);
        }
        assert!(reader.head.capacity() <= 2 * HEAD_BYTES);
    }
    assert!(matches!(&got[0], Incoming::Refused(header, _) if header.request_id == 1));
    assert!(matches!(&got[1], Incoming::Frame(header, body) if header.request_id == 2 && body == "next"));
    assert_eq!(got.len(), 2);
}
