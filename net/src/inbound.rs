//! Frames out of a stream of bytes that arrives in pieces of any size.
//!
//! A header is judged before memory is spent on its body: a refused body is skipped, an admitted large one gets a
//! buffer that grows with what has arrived, never with what was announced. No byte of a body is handed out before its
//! checksum was compared.

use std::{
    io,
    pin::pin,
    task::{Context, Poll},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{
    Refusal,
    wire::{self, HEADER_BYTES, Header, NOTICE_BYTES, Notice, Start, WireError},
};

/// One read of the socket at most; many small frames arrive together.
const HEAD_BYTES: usize = 64 << 10;
/// Bodies up to this size are copied out of the shared buffer, so that a small body that is kept pins no large one.
const SMALL_BODY_BYTES_MAX: usize = 16 << 10;
/// First size of the buffer of a large body.
const LARGE_BODY_BYTES_FIRST: usize = 64 << 10;

/// What came in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Incoming {
    /// An intact frame.
    Frame(Header, Bytes),
    /// A frame whose header was refused. Its body is skipped.
    Refused(Header, Refusal),
    /// The other side takes nothing.
    Notice(Notice),
}

/// What one look at the socket gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Some,
    End,
    /// The task is woken when there is more.
    Pending,
}

/// The body of the frame whose header was read last.
enum Body {
    Small(Header),
    Large(Header, BytesMut),
    /// With the bytes left to skip.
    Skip(Header, u64),
}

/// Assembles frames. `read_ready` puts bytes in, `next` takes frames out until it has none.
pub(crate) struct FrameReader {
    head: BytesMut,
    body: Option<Body>,
    /// What is here was looked at and holds no whole frame.
    is_starved: bool,
}

impl FrameReader {
    pub(crate) fn new() -> Self {
        FrameReader { head: BytesMut::with_capacity(HEAD_BYTES), body: None, is_starved: true }
    }

    /// Whether a part of a frame has arrived and the rest has not.
    pub(crate) fn is_mid_frame(&self) -> bool {
        self.body.is_some() || !self.head.is_empty()
    }

    /// The header of the frame whose body is arriving, or being skipped.
    pub(crate) fn arriving(&self) -> Option<&Header> {
        match self.body.as_ref()? {
            Body::Small(header) | Body::Large(header, _) | Body::Skip(header, _) => Some(header),
        }
    }

    /// Whether more bytes are needed, that is, whether `next` has returned `None` since the last read.
    pub(crate) fn is_starved(&self) -> bool {
        self.is_starved
    }

    /// Reads once from the stream, whatever is there. Only for a starved reader: a full one has no room to read into.
    pub(crate) fn read_ready<S>(&mut self, cx: &mut Context<'_>, stream: &mut S) -> io::Result<Read>
    where
        S: AsyncRead + Unpin,
    {
        assert!(self.is_starved, "frames that have arrived are taken before more is read");
        let poll = if let Some(Body::Large(header, body)) = &mut self.body {
            let missing = header.body_bytes as usize - body.len();
            if body.len() == body.capacity() {
                body.reserve(missing.min(body.len().max(LARGE_BODY_BYTES_FIRST)));
            }
            let mut room = body.limit(missing);
            pin!(stream.read_buf(&mut room)).poll(cx)
        } else {
            // A frame in the making is smaller than half of the buffer, so this moves bytes and never grows it.
            self.head.reserve(HEAD_BYTES - self.head.len());
            pin!(stream.read_buf(&mut self.head)).poll(cx)
        };
        match poll {
            Poll::Ready(Ok(0)) => Ok(Read::End),
            Poll::Ready(Ok(_)) => {
                self.is_starved = false;
                Ok(Read::Some)
            }
            Poll::Ready(Err(error)) => Err(error),
            Poll::Pending => Ok(Read::Pending),
        }
    }

    /// The next frame, or `None` when more bytes are needed. `judge` sees each header before its body is looked at.
    /// After an error the stream is out of step and must be given up.
    pub(crate) fn next(
        &mut self,
        judge: impl FnOnce(&Header) -> Result<(), Refusal>,
    ) -> Result<Option<Incoming>, WireError> {
        let incoming = self.take_frame(judge)?;
        self.is_starved = incoming.is_none();
        Ok(incoming)
    }

    fn take_frame(
        &mut self,
        judge: impl FnOnce(&Header) -> Result<(), Refusal>,
    ) -> Result<Option<Incoming>, WireError> {
        if let Some(Body::Skip(_, left)) = &mut self.body {
            let skipped = (*left).min(self.head.len() as u64);
            self.head.advance(skipped as usize);
            *left -= skipped;
            if *left > 0 {
                return Ok(None);
            }
            self.body = None;
        }
        if self.body.is_none() {
            let header = match wire::read_start(&self.head)? {
                None => return Ok(None),
                Some(Start::Notice(notice)) => {
                    self.head.advance(NOTICE_BYTES);
                    return Ok(Some(Incoming::Notice(notice)));
                }
                Some(Start::Frame(header)) => header,
            };
            self.head.advance(HEADER_BYTES);
            if let Err(refusal) = judge(&header) {
                self.body = Some(Body::Skip(header, u64::from(header.body_bytes)));
                return Ok(Some(Incoming::Refused(header, refusal)));
            }
            self.body = Some(self.begin_body(header));
        }
        self.take_body()
    }

    fn begin_body(&mut self, header: Header) -> Body {
        let body_bytes = header.body_bytes as usize;
        if body_bytes <= SMALL_BODY_BYTES_MAX {
            return Body::Small(header);
        }
        let mut body = BytesMut::with_capacity(body_bytes.min(LARGE_BODY_BYTES_FIRST));
        let here = body_bytes.min(self.head.len());
        body.put((&mut self.head).take(here));
        Body::Large(header, body)
    }

    fn take_body(&mut self) -> Result<Option<Incoming>, WireError> {
        match self.body.take() {
            Some(Body::Small(header)) => {
                let Some(body) = self.head.get(..header.body_bytes as usize) else {
                    self.body = Some(Body::Small(header));
                    return Ok(None);
                };
                header.check_body(body)?;
                let body = Bytes::copy_from_slice(body);
                self.head.advance(body.len());
                Ok(Some(Incoming::Frame(header, body)))
            }
            Some(Body::Large(header, body)) if body.len() == header.body_bytes as usize => {
                header.check_body(&body)?;
                Ok(Some(Incoming::Frame(header, body.freeze())))
            }
            unfinished => {
                self.body = unfinished;
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
#[path = "inbound_tests.rs"]
mod tests;
