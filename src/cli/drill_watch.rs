//! What the rounds of all drills look for: who leads, whether all nodes answer, which errors clients saw.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::CliError;
use super::drill_load::Load;
use super::http_client::{CALL_TIMEOUT, Call, Client};
use super::status::{self, NodeHealth};
use crate::judge::{History, ReadOutcome, WriteOutcome};

/// How long a new leader may take to serve before the drill calls it a failure.
pub const SERVE_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between two looks at a condition.
pub const POLL: Duration = Duration::from_millis(5);

/// Errors shown in full.
const ERROR_SAMPLES_MAX: usize = 10;

/// A time in which a node was dead or not yet back: errors of its own clients are expected then.
pub struct Down {
    /// Its place, from 0.
    pub node: u16,
    /// Beginning, microseconds of the recorder's clock.
    pub from_us: u64,
    /// End.
    pub to_us: u64,
}

/// The node that says it leads, in a term above `above_term`, and that a second look confirms.
pub async fn find_leader(load: &Load, above_term: Option<u64>) -> Result<(usize, NodeHealth), CliError> {
    let deadline = Instant::now() + SERVE_TIMEOUT;
    loop {
        let mut best: Option<(usize, NodeHealth)> = None;
        for (node, endpoint) in load.endpoints.iter().enumerate() {
            let mut client = Client::new(endpoint.clone());
            let Ok(health) = status::health(&mut client, Duration::from_secs(1)).await else {
                continue;
            };
            let new_enough = above_term.is_none_or(|term| health.term > term);
            let better = best.as_ref().is_none_or(|(_, known)| health.term > known.term);
            if health.role == "leader" && new_enough && better {
                best = Some((node, health));
            }
        }
        if let Some(found) = best {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            let seconds = SERVE_TIMEOUT.as_secs();
            return Err(CliError::Found(format!("no leader within {seconds} s")));
        }
        sleep(POLL).await;
    }
}

/// Waits for a condition, at most `SERVE_TIMEOUT`.
pub async fn wait_until(failure: &str, mut condition: impl FnMut() -> bool) -> Result<(), CliError> {
    let deadline = Instant::now() + SERVE_TIMEOUT;
    while !condition() {
        if Instant::now() >= deadline {
            let seconds = SERVE_TIMEOUT.as_secs();
            return Err(CliError::Found(format!("{failure} within {seconds} s")));
        }
        sleep(POLL).await;
    }
    Ok(())
}

/// Every node must answer a linearizable read.
pub async fn check_readable(load: &Load) -> Result<usize, CliError> {
    for endpoint in &load.endpoints {
        let mut client = Client::new(endpoint.clone());
        let path = format!("/v1/query?concept_path=drill/{}/key-0", load.run);
        let answer = client.call(&Call::get(path), CALL_TIMEOUT).await;
        let why = match answer {
            Ok(answer) if answer.is_success() => continue,
            Ok(answer) => answer.describe(),
            Err(error) => error.to_string(),
        };
        return Err(CliError::Found(format!(
            "{} does not answer a linearizable read after the restart: {why}",
            endpoint.authority()
        )));
    }
    Ok(load.endpoints.len())
}

/// Attempts on nodes that were alive and did not end in success, and the first of them in words.
pub fn survivor_errors(history: &History, downs: &[Down]) -> (u64, Vec<String>) {
    // An attempt on a node that was down at some time of the attempt belongs to the dead node's clients.
    let excused = |node: u16, start_us: u64, end_us: u64| {
        let overlaps = |down: &&Down| down.node == node && start_us <= down.to_us && end_us >= down.from_us;
        downs.iter().find(overlaps).is_some()
    };
    let mut count = 0;
    let mut samples = Vec::new();
    let mut add = |what: String| {
        count += 1;
        if samples.len() < ERROR_SAMPLES_MAX {
            samples.push(what);
        }
    };
    for write in &history.writes {
        let is_error = !matches!(write.outcome, WriteOutcome::Acknowledged { .. });
        if is_error && !excused(write.node, write.start_us, write.end_us) {
            add(format!("write on a living node: {write:?}"));
        }
    }
    for read in &history.reads {
        let is_error = matches!(read.outcome, ReadOutcome::Failed { .. });
        if is_error && !excused(read.node, read.start_us, read.end_us) {
            add(format!("read on a living node: {read:?}"));
        }
    }
    (count, samples)
}
