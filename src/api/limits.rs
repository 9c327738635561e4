//! What one request, and all requests together, may take.
//!
//! Bodies are read here and nowhere else. Each byte of a body in flight is charged to one budget
//! for the whole node until its request is answered; a body that is too large is read on and thrown
//! away for a while, so that its sender gets the 413 instead of a connection reset.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    http::HeaderMap,
};
use bytes::BytesMut;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use super::{
    headers,
    problem::{Kind, Problem},
};

/// Bodies of all requests in flight, in bytes: the same as the park's bound, since what waits there
/// came through here, and a quarter of a node's memory target.
pub const BODIES_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A body that is too large is thrown away up to this multiple of the limit before the answer.
const DISCARD_FACTOR: u64 = 2;

/// A body may take this long from its first to its last byte: 8 MiB at 1 Mbit/s.
const BODY_TOTAL_TIMEOUT: Duration = Duration::from_secs(70);

/// Seconds a client is told to wait when the budget is spent: requests last milliseconds.
const BUDGET_RETRY_AFTER_S: u64 = 1;

/// Parsing more than this many bytes moves off the async threads, in bytes: below, the move costs
/// more than the parse.
pub const PARSE_INLINE_BYTES_MAX: usize = 256 * 1024;

/// Queries that run at the same time, each on a blocking thread. More would only queue for the disk.
pub const READS_MAX: usize = 64;

/// Limits that the configuration sets.
#[derive(Clone, Copy, Debug)]
pub struct BodyLimits {
    /// Largest body, in bytes.
    pub body_bytes_max: u64,
    /// Longest silence within a body.
    pub stall_timeout: Duration,
}

/// Bytes of bodies in flight.
#[derive(Debug)]
pub struct Budget {
    in_flight: AtomicU64,
    bytes_max: u64,
}

impl Budget {
    /// A budget of `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Budget { in_flight: AtomicU64::new(0), bytes_max })
    }

    /// Bytes charged at the moment.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }
}

/// Bytes charged to a budget, given back on drop.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Charge {
    fn new(budget: &Arc<Budget>) -> Self {
        Charge { budget: Arc::clone(budget), bytes: 0 }
    }

    /// Raises the charge to `bytes`.
    fn raise(&mut self, bytes: u64) -> Result<(), Problem> {
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 {
            return Ok(());
        }
        let before = self.budget.in_flight.fetch_add(more, Ordering::Relaxed);
        self.bytes += more;
        let limit = self.budget.bytes_max;
        if before.saturating_add(more) <= limit {
            return Ok(());
        }
        let detail = format!(
            "Bodies in flight on this node take {before} bytes, and this one would bring them past \
             the limit of {limit}. Send it again in a moment, or send fewer at once."
        );
        Err(Problem::new(Kind::TooManyRequests, detail)
            .with_limit(limit, before.saturating_add(more))
            .retry_after(BUDGET_RETRY_AFTER_S)
            .rate_limit(limit))
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.in_flight.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Reads `body` whole. Keep the charge until the request is answered.
pub async fn read_body(
    limits: &BodyLimits,
    budget: &Arc<Budget>,
    headers: &HeaderMap,
    mut body: Body,
) -> Result<(Bytes, Charge), Problem> {
    let mut charge = Charge::new(budget);
    let declared = body.size_hint().exact();
    let mut clock = BodyClock::new(limits.stall_timeout);
    if let Some(bytes) = declared {
        if bytes > limits.body_bytes_max {
            return Err(discard(limits, headers, body, clock, 0, declared).await);
        }
        if let Err(problem) = charge.raise(bytes) {
            discard(limits, headers, body, clock, 0, declared).await;
            return Err(problem);
        }
    }
    let mut first = Bytes::new();
    let mut joined = BytesMut::new();
    while let Some(data) = clock.next(&mut body).await? {
        let so_far = (first.len() + joined.len()) as u64 + data.len() as u64;
        if so_far > limits.body_bytes_max {
            return Err(discard(limits, headers, body, clock, so_far, declared).await);
        }
        charge.raise(so_far)?;
        if first.is_empty() && joined.is_empty() {
            first = data; // nearly always the whole body, and then it is never copied
            continue;
        }
        if joined.is_empty() {
            joined.reserve(usize::try_from(declared.unwrap_or(so_far)).unwrap_or(0));
            joined.extend_from_slice(&std::mem::take(&mut first));
        }
        joined.extend_from_slice(&data);
    }
    let whole = if joined.is_empty() { first } else { joined.freeze() };
    Ok((whole, charge))
}

/// Reads on and throws away, up to a bound, then says that the body was too large.
async fn discard(
    limits: &BodyLimits,
    headers: &HeaderMap,
    mut body: Body,
    mut clock: BodyClock,
    mut read: u64,
    declared: Option<u64>,
) -> Problem {
    let discard_max = limits.body_bytes_max.saturating_mul(DISCARD_FACTOR);
    let mut ended = false;
    // A client that waits for 100 Continue has sent nothing and reads the answer first.
    let may_read = !headers::expects_continue(headers) && declared.unwrap_or(0) <= discard_max;
    while may_read && read <= discard_max {
        match clock.next(&mut body).await {
            Ok(Some(data)) => read = read.saturating_add(data.len() as u64),
            Ok(None) => {
                ended = true;
                break;
            }
            Err(_) => break,
        }
    }
    let limit = limits.body_bytes_max;
    let actual = declared.unwrap_or(read).max(read);
    let more = if ended || declared.is_some() { "" } else { " or more" };
    let detail =
        format!("The body has {actual} bytes{more}; at most {limit} are taken. Split it into smaller batches.");
    let problem = Problem::new(Kind::BodyTooLarge, detail).with_limit(limit, actual);
    if ended { problem } else { problem.close_connection() }
}

/// How long a body may still take.
struct BodyClock {
    stall_timeout: Duration,
    last: Instant,
}

impl BodyClock {
    fn new(stall_timeout: Duration) -> Self {
        BodyClock { stall_timeout, last: Instant::now() + BODY_TOTAL_TIMEOUT }
    }

    /// The next piece of data, `None` at the end.
    async fn next(&mut self, body: &mut Body) -> Result<Option<Bytes>, Problem> {
        loop {
            if body.is_end_stream() {
                return Ok(None);
            }
            let deadline = self.last.min(Instant::now() + self.stall_timeout);
            match timeout_at(deadline, body.frame()).await {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => return Ok(Some(data)),
                    Err(_trailers) => continue,
                },
                Ok(Some(Err(error))) => {
                    let detail = format!("The body could not be read to its end: {error}.");
                    return Err(Problem::new(Kind::IncompleteBody, detail).close_connection());
                }
                Err(_elapsed) => {
                    let detail = format!(
                        "The body was silent for {} ms or took more than {} s in all. Send it \
                         faster, or in smaller parts.",
                        self.stall_timeout.as_millis(),
                        BODY_TOTAL_TIMEOUT.as_secs()
                    );
                    return Err(Problem::new(Kind::RequestTimeout, detail).close_connection());
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use axum::http::{HeaderValue, header};
    use futures_util::stream;
    use std::convert::Infallible;

    const LIMITS: BodyLimits = BodyLimits { body_bytes_max: 100, stall_timeout: Duration::from_secs(10) };

    fn chunked(chunks: Vec<Vec<u8>>) -> Body {
        Body::from_stream(stream::iter(chunks.into_iter().map(Ok::<_, Infallible>)))
    }

    async fn read(body: Body, budget: &Arc<Budget>) -> Result<(Bytes, Charge), Problem> {
        read_body(&LIMITS, budget, &HeaderMap::new(), body).await
    }

    #[tokio::test]
    async fn bodies_are_joined_and_charged_until_dropped() {
        let budget = Budget::new(1_000);
        let (bytes, charge) = read(Body::from("abc"), &budget).await.unwrap();
        assert_eq!((bytes.as_ref(), budget.in_flight()), (b"abc".as_slice(), 3));
        let (bytes, other) = read(chunked(vec![b"ab".into(), b"cd".into()]), &budget).await.unwrap();
        assert_eq!((bytes.as_ref(), budget.in_flight()), (b"abcd".as_slice(), 7));
        drop((charge, other));
        assert_eq!(budget.in_flight(), 0);
        assert!(read(Body::empty(), &budget).await.unwrap().0.is_empty());
    }

    #[tokio::test]
    async fn too_large_says_both_sizes() {
        let budget = Budget::new(1_000);
        assert!(read(Body::from(vec![0; 100]), &budget).await.is_ok());
        let problem = read(Body::from(vec![0; 101]), &budget).await.unwrap_err();
        assert_eq!(problem.kind(), Kind::BodyTooLarge);
        assert_eq!(problem.member("limit").unwrap(), 100);
        assert_eq!(problem.member("actual").unwrap(), 101);
        let problem = read(chunked(vec![vec![0; 60]; 3]), &budget).await.unwrap_err();
        assert_eq!(problem.member("actual").unwrap(), 180);
        let problem = read(chunked(vec![vec![0; 60]; 300]), &budget).await.unwrap_err();
        assert!(problem.detail().contains("240 bytes or more"), "{}", problem.detail());
        assert_eq!(budget.in_flight(), 0);
    }

    #[tokio::test]
    async fn who_waits_for_a_continue_is_answered_at_once() {
        let mut headers = HeaderMap::new();
        headers.insert(header::EXPECT, HeaderValue::from_static("100-continue"));
        let body = Body::from(vec![0; 150]);
        let budget = Budget::new(1_000);
        let problem = read_body(&LIMITS, &budget, &headers, body).await.unwrap_err();
        assert_eq!(problem.member("actual").unwrap(), 150);
    }

    #[tokio::test]
    async fn past_the_budget_is_429_and_gives_back_what_it_took() {
        let budget = Budget::new(120);
        let held = read(Body::from(vec![0; 100]), &budget).await.unwrap();
        for body in [Body::from(vec![0; 21]), chunked(vec![vec![0; 21]])] {
            let problem = read(body, &budget).await.unwrap_err();
            assert_eq!(problem.kind(), Kind::TooManyRequests);
        }
        assert_eq!(budget.in_flight(), 100);
        drop(held);
        assert!(read(Body::from(vec![0; 21]), &budget).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_body_is_408() {
        let budget = Budget::new(1_000);
        let body = Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
        let problem = read(body, &budget).await.unwrap_err();
        assert_eq!(problem.kind(), Kind::RequestTimeout);
    }
}
