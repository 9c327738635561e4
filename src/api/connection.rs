//! Patience with one client connection.
//!
//! hyper reads and writes through [`Timed`], which closes a connection that is idle for too long,
//! that takes too long to send a request's header, or that does not take its answer. A timer is set
//! only when the socket has nothing to give, and a later deadline does not touch the timer until it
//! fires: a busy connection pays for reading the clock and for nothing else.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

/// What the service of a connection tells the connection: `steps` is raised by one when a request's
/// header has arrived and again when its answer is made, so that odd means at work, and a request that
/// came and went between two looks shows too.
#[derive(Debug)]
pub struct Activity {
    steps: AtomicU64,
    /// When the last answer was made, in milliseconds after `born`.
    answered_ms: AtomicU64,
    born: Instant,
}

impl Activity {
    /// A new connection.
    pub fn new() -> Arc<Self> {
        let (steps, answered_ms) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Activity { steps, answered_ms, born: Instant::now() })
    }

    /// A request begins.
    pub fn begin(&self) {
        self.steps.fetch_add(1, Ordering::Release);
    }

    /// Its answer is made.
    pub fn end(&self) {
        let answered_ms = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered_ms.store(answered_ms, Ordering::Relaxed);
        self.steps.fetch_add(1, Ordering::Release);
    }

    fn answered_at(&self) -> Instant {
        self.born + Duration::from_millis(self.answered_ms.load(Ordering::Relaxed))
    }
}

/// How long a connection may do nothing, by what it should be doing.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the first byte of a header to its last; also for the first byte of a new connection.
    pub header: Duration,
    /// Between the end of an answer and the next request.
    pub idle: Duration,
    /// Without a single byte of an answer taken.
    pub write: Duration,
}

/// A socket with patience.
pub struct Timed<S> {
    socket: S,
    patience: Patience,
    activity: Arc<Activity>,
    /// The steps of the activity at the time `read` was set.
    seen: u64,
    read: Waiting,
    read_timer: Timer,
    write_timer: Timer,
}

/// What the reader waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Waiting {
    /// The next request, until the time given.
    Idle(Instant),
    /// The rest of a header, until the time given.
    Header(Instant),
}

impl<S> Timed<S> {
    /// `activity` is shared with the service of this connection.
    pub fn new(socket: S, patience: Patience, activity: Arc<Activity>) -> Self {
        Timed {
            socket,
            patience,
            activity,
            seen: 0,
            read: Waiting::Header(Instant::now() + patience.header),
            read_timer: Timer::default(),
            write_timer: Timer::default(),
        }
    }

    /// The socket had nothing: until when may that go on? `None` while the service is at work, for
    /// bodies have limits of their own.
    fn deadline_when_silent(&mut self) -> Option<Instant> {
        let activity = self.activity.steps.load(Ordering::Acquire);
        if is_at_work(activity) {
            return None;
        }
        if activity != self.seen {
            self.seen = activity;
            self.read = Waiting::Idle(self.activity.answered_at() + self.patience.idle);
        }
        match self.read {
            Waiting::Idle(until) | Waiting::Header(until) => Some(until),
        }
    }

    /// Bytes came: the header's time begins with the first of them.
    fn bytes_came(&mut self) {
        let activity = self.activity.steps.load(Ordering::Acquire);
        let in_header = matches!(self.read, Waiting::Header(_)) && activity == self.seen;
        if !is_at_work(activity) && !in_header {
            self.seen = activity;
            self.read = Waiting::Header(Instant::now() + self.patience.header);
        }
    }
}

fn is_at_work(activity: u64) -> bool {
    activity % 2 == 1
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match Pin::new(&mut this.socket).poll_read(cx, buf) {
            Poll::Ready(result) => {
                this.bytes_came();
                Poll::Ready(result)
            }
            Poll::Pending => {
                let Some(deadline) = this.deadline_when_silent() else {
                    // hyper does not look again at a socket that it has found empty, not even when
                    // the answer is made. So the timer must bring it here for the idle time.
                    this.read_timer.wake_by(Instant::now() + this.patience.idle, cx);
                    return Poll::Pending;
                };
                ready!(this.read_timer.poll_until(deadline, cx));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> Timed<S> {
    fn wrote<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.write_timer.clear();
            return result;
        }
        let deadline = self.write_timer.wanted_or(|| Instant::now() + self.patience.write);
        ready!(self.write_timer.poll_until(deadline, cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.wrote(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.wrote(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// A timer that is moved only to an earlier time, or when it fires too early.
#[derive(Default)]
struct Timer {
    sleep: Option<Pin<Box<Sleep>>>,
    wanted: Option<Instant>,
}

impl Timer {
    fn wanted_or(&self, otherwise: impl FnOnce() -> Instant) -> Instant {
        self.wanted.unwrap_or_else(otherwise)
    }

    /// Nothing is waited for; a sleep that is already set may fire for nothing.
    fn clear(&mut self) {
        self.wanted = None;
    }

    /// Wakes the task at `deadline` or before.
    fn wake_by(&mut self, deadline: Instant, cx: &mut Context<'_>) {
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if sleep.deadline() > deadline {
            sleep.as_mut().reset(deadline);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            sleep.as_mut().reset(deadline);
        }
    }

    /// Ready once `deadline` has passed.
    fn poll_until(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        self.wanted = Some(deadline);
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        loop {
            if sleep.deadline() > deadline {
                sleep.as_mut().reset(deadline);
            }
            ready!(sleep.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const PATIENCE: Patience =
        Patience { header: Duration::from_secs(10), idle: Duration::from_secs(60), write: Duration::from_secs(30) };

    async fn silent_for<S: AsyncRead + Unpin>(timed: &mut Timed<S>) -> Duration {
        let start = Instant::now();
        let error = timed.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        start.elapsed()
    }

    fn close_to(actual: Duration, wanted: Duration) {
        assert!(actual >= wanted && actual < wanted + Duration::from_secs(1), "{actual:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_connection_and_a_header_have_the_headers_time() {
        let (socket, mut client) = duplex(64);
        let mut timed = Timed::new(socket, PATIENCE, Activity::new());
        client.write_all(b"GE").await.unwrap();
        assert_eq!(timed.read_u16().await.unwrap(), u16::from_be_bytes(*b"GE"));
        tokio::time::advance(Duration::from_secs(4)).await;
        client.write_all(b"T").await.unwrap();
        timed.read_u8().await.unwrap();
        close_to(silent_for(&mut timed).await, Duration::from_secs(6));
    }

    #[tokio::test(start_paused = true)]
    async fn between_requests_the_idle_time_counts_and_at_work_none() {
        let (socket, mut client) = duplex(64);
        let activity = Activity::new();
        let mut timed = Timed::new(socket, PATIENCE, Arc::clone(&activity));
        client.write_all(b"x").await.unwrap();
        timed.read_u8().await.unwrap();
        activity.begin();
        let at_work = tokio::time::timeout(Duration::from_secs(600), timed.read_u8()).await;
        assert!(at_work.is_err(), "the service is at work: no limit");
        activity.end();
        close_to(silent_for(&mut timed).await, Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_came_and_went_unseen_leaves_the_connection_idle() {
        let (socket, mut client) = duplex(64);
        let activity = Activity::new();
        let mut timed = Timed::new(socket, PATIENCE, Arc::clone(&activity));
        client.write_all(b"x").await.unwrap();
        timed.read_u8().await.unwrap();
        activity.begin();
        activity.end();
        close_to(silent_for(&mut timed).await, Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn who_looked_while_the_service_was_at_work_is_woken_for_the_idle_time() {
        let (socket, _client) = duplex(64);
        let activity = Activity::new();
        let mut timed = Timed::new(socket, PATIENCE, Arc::clone(&activity));
        activity.begin();
        let start = Instant::now();
        let reader = tokio::spawn(async move { timed.read_u8().await.unwrap_err().kind() });
        tokio::time::sleep(Duration::from_secs(5)).await;
        activity.end(); // and nothing wakes the reader but its own timer
        assert_eq!(reader.await.unwrap(), io::ErrorKind::TimedOut);
        close_to(start.elapsed(), Duration::from_secs(65));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_takes_ends() {
        let (socket, _client) = duplex(8);
        let mut timed = Timed::new(socket, PATIENCE, Activity::new());
        let start = Instant::now();
        let error = timed.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        close_to(start.elapsed(), Duration::from_secs(30));
    }
}
