//! `stemedb bench`: closed-loop load, one request in flight per client; with `--rate` an open one.
//!
//! An open load offers so many requests a second whatever the answers take, and counts a latency from the moment
//! at which a request was due: what had to wait for a client to be free is not hidden.
//!
//! Each write is one durable, quorum-acknowledged request; each read is linearizable. Clients are
//! spread over all endpoints, as behind a load balancer. Figures of a shared machine compare only with
//! figures of the same run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::http_client::{CALL_TIMEOUT, Call, Client, Endpoint, encode_query};
use super::{CliError, EndpointArgs, output};

/// Pause after an error, so that a dead node is not asked in a tight loop.
const ERROR_PAUSE: Duration = Duration::from_millis(20);

/// Number of different concepts written and read.
const KEYS: u64 = 100_000;

/// Most clients: each is a connection, and a node takes 1,024 by default.
const CLIENTS_MAX: usize = 10_000;

/// Arguments of `stemedb bench`.
#[derive(Args, Debug, Clone)]
pub struct BenchArgs {
    #[command(flatten)]
    endpoints: EndpointArgs,
    /// Clients, each with one request in flight
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// Seconds measured, for each kind of request
    #[arg(long, default_value_t = 10.0)]
    secs: f64,
    /// Seconds before that, not measured
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Bytes of each value
    #[arg(long, default_value_t = 128)]
    value: usize,
    /// Assertions in one request; each is counted
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Offer so many requests a second, in place of one at a time per client; latencies count from when each was due
    #[arg(long, value_name = "PER SECOND")]
    rate: Option<f64>,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Kind::Both)]
    op: Kind,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Writes, then reads
    Both,
    /// Writes only
    Write,
    /// Reads only
    Read,
}

/// Figures of one kind of request. Latencies in microseconds per request.
#[derive(Debug, Serialize)]
struct Figures {
    op: &'static str,
    clients: usize,
    batch: usize,
    seconds: f64,
    /// Requests that fell due in the measured time; `None`: a closed loop.
    offered: Option<u64>,
    requests: u64,
    per_s: f64,
    p50_us: u64,
    p90_us: u64,
    p99_us: u64,
    p999_us: u64,
    max_us: u64,
    errors: u64,
    last_error: Option<String>,
}

/// Runs the measurements and prints them. Exit code 1 when some request failed, 3 when all did.
pub async fn run(args: &BenchArgs) -> Result<(), CliError> {
    check(args)?;
    let endpoints = args.endpoints.parse()?;
    // Chance enters here; everything below draws from generators seeded with it.
    let seed: u64 = rand::random();
    let mut all = Vec::new();
    for op in ["write", "read"] {
        let wanted = match args.op {
            Kind::Both => true,
            Kind::Write => op == "write",
            Kind::Read => op == "read",
        };
        if wanted {
            let figures = measure(args, &endpoints, op, seed).await?;
            if figures.requests == 0 {
                let why = figures.last_error.unwrap_or_else(|| "no answer".to_owned());
                return Err(CliError::Unreachable(format!("no {op} succeeded: {why}")));
            }
            all.push(figures);
        }
    }
    if args.json {
        output::json(&all)?;
    } else {
        output::line(&text(&all))?;
    }
    let failed: Vec<String> = all
        .iter()
        .filter(|figures| figures.errors > 0)
        .map(|figures| {
            let why = figures.last_error.as_deref().unwrap_or("unknown");
            format!("{} {}s failed, the last one: {why}", figures.errors, figures.op)
        })
        .collect();
    if failed.is_empty() { Ok(()) } else { Err(CliError::Found(failed.join("; "))) }
}

fn check(args: &BenchArgs) -> Result<(), CliError> {
    let bounds = [
        ("--clients", args.clients, CLIENTS_MAX),
        ("--batch", args.batch, super::import::BATCH_MAX),
        ("--value", args.value, 1 << 20),
    ];
    for (name, value, most) in bounds {
        if !(1..=most).contains(&value) {
            return Err(CliError::Usage(format!("{name} {value}: 1 to {most}")));
        }
    }
    for (name, seconds, least) in [("--secs", args.secs, 0.1), ("--warmup", args.warmup, 0.0)] {
        if !(least..=86_400.0).contains(&seconds) {
            return Err(CliError::Usage(format!("{name} {seconds}: {least} to 86400")));
        }
    }
    match args.rate {
        Some(rate) if !(1.0..=1e7).contains(&rate) => Err(CliError::Usage(format!("--rate {rate}: 1 to 10000000"))),
        _ => Ok(()),
    }
}

/// Moments at which requests are due, shared by all clients.
struct Schedule {
    began: Instant,
    /// What is due from here on is measured.
    from: Instant,
    until: Instant,
    /// `None`: a closed loop.
    per_s: Option<f64>,
    /// Requests given out.
    next: AtomicU64,
}

impl Schedule {
    fn of(args: &BenchArgs) -> Schedule {
        let began = Instant::now();
        let from = began + Duration::from_secs_f64(args.warmup);
        let until = from + Duration::from_secs_f64(args.secs);
        Schedule { began, from, until, per_s: args.rate, next: AtomicU64::new(0) }
    }

    /// Waits until a request is due, and says from when on its latency counts: when it was due if the client comes
    /// late, else now, which leaves out how late a timer is. `None`: after the end.
    async fn due(&self) -> Option<Instant> {
        let now = Instant::now();
        let Some(per_s) = self.per_s else { return Some(now).filter(|now| *now < self.until) };
        let due = self.began + Duration::from_secs_f64(self.next.fetch_add(1, Ordering::Relaxed) as f64 / per_s);
        if due >= self.until || now >= self.until {
            return None;
        }
        if due <= now {
            return Some(due);
        }
        tokio::time::sleep_until(due).await;
        Some(Instant::now())
    }
}

struct Lane {
    histogram: Histogram<u64>,
    errors: u64,
    last_error: Option<String>,
}

async fn measure(args: &BenchArgs, endpoints: &[Endpoint], op: &'static str, seed: u64) -> Result<Figures, CliError> {
    let schedule = Arc::new(Schedule::of(args));
    let tasks: Vec<_> = endpoints
        .iter()
        .cycle()
        .zip((0_u64..).take(args.clients))
        .map(|(endpoint, number)| {
            let load = Load {
                client: Client::new(endpoint.clone()),
                run: format!("{seed:016x}"),
                rng: StdRng::seed_from_u64(seed.wrapping_add(number)),
                value_bytes: args.value,
                batch: args.batch,
            };
            tokio::spawn(client(load, op, Arc::clone(&schedule)))
        })
        .collect();
    let mut total = empty_lane()?;
    for task in tasks {
        let lane = task.await.map_err(|error| CliError::Local(format!("a client failed: {error}")))??;
        total.histogram.add(&lane.histogram).map_err(|error| CliError::Local(format!("histogram: {error}")))?;
        total.errors += lane.errors;
        total.last_error = lane.last_error.or(total.last_error);
    }
    let h = &total.histogram;
    let requests = h.len();
    let batch = if op == "write" { args.batch } else { 1 };
    Ok(Figures {
        op,
        clients: args.clients,
        batch,
        seconds: args.secs,
        offered: args.rate.map(|rate| (rate * args.secs) as u64),
        requests,
        per_s: requests as f64 * batch as f64 / args.secs,
        p50_us: h.value_at_quantile(0.5),
        p90_us: h.value_at_quantile(0.9),
        p99_us: h.value_at_quantile(0.99),
        p999_us: h.value_at_quantile(0.999),
        max_us: h.max(),
        errors: total.errors,
        last_error: total.last_error,
    })
}

/// 1 microsecond to 60 seconds, three digits.
fn empty_lane() -> Result<Lane, CliError> {
    let histogram =
        Histogram::new_with_bounds(1, 60_000_000, 3).map_err(|error| CliError::Local(format!("histogram: {error}")))?;
    Ok(Lane { histogram, errors: 0, last_error: None })
}

struct Load {
    client: Client,
    run: String,
    rng: StdRng,
    value_bytes: usize,
    batch: usize,
}

impl Load {
    fn call(&mut self, op: &str) -> Call {
        let (run, rng) = (&self.run, &mut self.rng);
        let key = |number: u64| format!("bench/{run}/key-{number:06}");
        if op == "read" {
            let path = key(rng.random_range(0..KEYS));
            return Call::get(format!("/v1/query?concept_path={}", encode_query(&path)));
        }
        let mut item = || {
            let value: String = (0..self.value_bytes).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect();
            let path = key(rng.random_range(0..KEYS));
            format!(r#"{{"concept_path":"{path}","predicate":"bench","value":"{value}"}}"#)
        };
        if self.batch == 1 {
            return Call::post("/v1/assert", Bytes::from(item()));
        }
        let items: Vec<String> = (0..self.batch).map(|_| item()).collect();
        Call::post("/v1/assert/batch", Bytes::from(format!("[{}]", items.join(","))))
    }
}

async fn client(mut load: Load, op: &str, schedule: Arc<Schedule>) -> Result<Lane, CliError> {
    let mut lane = empty_lane()?;
    loop {
        let call = load.call(op);
        let Some(start) = schedule.due().await else { return Ok(lane) };
        let error = match load.client.call(&call, CALL_TIMEOUT).await {
            Ok(answer) if answer.is_success() => {
                // Whole requests inside the window only.
                if start >= schedule.from && Instant::now() <= schedule.until {
                    let us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
                    lane.histogram.saturating_record(us);
                }
                continue;
            }
            Ok(answer) => answer.describe(),
            Err(error) => error.to_string(),
        };
        lane.errors += 1;
        lane.last_error = Some(format!("{}: {error}", load.client.endpoint().authority()));
        sleep(ERROR_PAUSE).await;
    }
}

fn text(all: &[Figures]) -> String {
    let mut table = output::table([
        "OP",
        "CLIENTS",
        "BATCH",
        "PER SECOND",
        "P50 ms",
        "P90 ms",
        "P99 ms",
        "P99.9 ms",
        "MAX ms",
        "ERRORS",
    ]);
    let ms = |us: u64| format!("{:.2}", us as f64 / 1000.0);
    for figures in all {
        table.add_row([
            figures.op.to_owned(),
            figures.clients.to_string(),
            figures.batch.to_string(),
            output::thousands(figures.per_s as u64),
            ms(figures.p50_us),
            ms(figures.p90_us),
            ms(figures.p99_us),
            ms(figures.p999_us),
            ms(figures.max_us),
            figures.errors.to_string(),
        ]);
    }
    table.to_string()
}
