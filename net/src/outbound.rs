//! Frames waiting for the socket, written with as few system calls as possible.
//!
//! Small frames are copied together into one buffer; large bodies are kept as they are and handed over in a vectored
//! write. The buffer counts bytes of the stream, so that a caller can tell which frames have reached the kernel.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;

use crate::wire::HEADER_BYTES;

/// Bodies up to this size are cheaper to copy than to carry as a chunk of their own.
const COPY_BYTES_MAX: usize = 16 << 10;
/// Chunks handed to the kernel at once.
const WRITE_CHUNKS: usize = 16;

/// Bytes in order, with the position in the stream of what was pushed and written.
#[derive(Default)]
pub(crate) struct OutBuffer {
    chunks: VecDeque<Bytes>,
    /// The youngest bytes, still open for small frames.
    tail: BytesMut,
    /// Bytes of the stream handed to `push` so far.
    pushed: u64,
    /// Bytes of the stream taken by the socket so far; `written <= pushed`.
    written: u64,
}

impl OutBuffer {
    /// Appends a frame and returns the position in the stream at which it begins.
    pub(crate) fn push(&mut self, header: &[u8; HEADER_BYTES], body: &Bytes) -> u64 {
        let begins_at = self.pushed;
        self.tail.extend_from_slice(header);
        if body.len() <= COPY_BYTES_MAX {
            self.tail.extend_from_slice(body);
        } else {
            self.close_tail();
            self.chunks.push_back(body.clone());
        }
        self.pushed += (header.len() + body.len()) as u64;
        begins_at
    }

    /// Bytes not taken by the socket yet.
    pub(crate) fn bytes(&self) -> u64 {
        self.pushed - self.written
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pushed == self.written
    }

    /// Bytes of the stream taken by the socket so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Writes until everything is gone or the socket takes no more; then the task is woken when it does.
    /// Returns how many bytes the socket took.
    pub(crate) fn write_ready<S>(&mut self, cx: &mut Context<'_>, stream: &mut S) -> io::Result<usize>
    where
        S: AsyncWrite + Unpin,
    {
        self.close_tail();
        let mut taken_total = 0;
        while !self.chunks.is_empty() {
            let mut slices = [IoSlice::new(&[]); WRITE_CHUNKS];
            for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
                *slice = IoSlice::new(chunk);
            }
            let filled = slices.get(..self.chunks.len().min(WRITE_CHUNKS)).unwrap_or(&slices);
            let taken = match Pin::new(&mut *stream).poll_write_vectored(cx, filled) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(taken) => taken?,
                Poll::Pending => break,
            };
            self.advance(taken);
            taken_total += taken;
        }
        Ok(taken_total)
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
    }

    fn advance(&mut self, taken: usize) {
        self.written += taken as u64;
        let mut left = taken;
        while let Some(front) = self.chunks.front_mut() {
            if left < front.len() {
                front.advance(left);
                return;
            }
            left -= front.len();
            self.chunks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    #[allow(clippy::unwrap_used)]
    async fn any_mix_of_sizes_arrives_in_order() {
        let sizes = [0, 1, COPY_BYTES_MAX, COPY_BYTES_MAX + 1, 3, 200_000, 0, 70_000];
        let mut out = OutBuffer::default();
        let mut want = Vec::new();
        for (index, size) in sizes.into_iter().enumerate() {
            let header = [index as u8; HEADER_BYTES];
            let body = Bytes::from(vec![index as u8 + 100; size]);
            assert_eq!(out.push(&header, &body), want.len() as u64);
            want.extend_from_slice(&header);
            want.extend_from_slice(&body);
        }
        assert_eq!(out.bytes(), want.len() as u64);
        let (mut near, mut far) = tokio::io::duplex(1000);
        let writer = tokio::spawn(async move {
            std::future::poll_fn(|cx| match out.write_ready(cx, &mut near) {
                Ok(_) if out.is_empty() => Poll::Ready(()),
                Ok(_) => Poll::Pending,
                Err(error) => panic!("{error}"),
            })
            .await;
            assert_eq!(out.written(), out.pushed);
        });
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        writer.await.unwrap();
        assert!(got == want);
    }
}
