//! From what the layers below answer to problems, one total table per layer.
//!
//! No match here has a wildcard: a new refusal or error does not compile until it has its answer.

use serde_json::{Value, json};

use crate::{
    model::Invalid,
    node::{ReadError, SubmitError, shortages_text, space::Shortage},
    state::command::Refusal,
    store_helpers::StoreError,
};

use super::problem::{Kind, Problem, WriteOutcome};

/// Seconds after which a request that met a passing state is worth repeating: an election is over by then.
pub const RETRY_AFTER_S: u64 = 1;

/// The same after a full disk: a person has to make room first.
const RETRY_FULL_AFTER_S: u64 = 5;

/// A field that breaks a rule of the model.
pub fn invalid(invalid: &Invalid) -> Problem {
    let kind = match invalid {
        _ if invalid.is_value_too_large() => Kind::ValueTooLarge,
        _ if invalid.field() == "concept_path" => Kind::InvalidPath,
        _ => Kind::InvalidField,
    };
    let problem = Problem::new(kind, format!("{invalid}.")).with("field", invalid.field());
    match invalid {
        Invalid::TooLong { limit_bytes, actual_bytes, .. } => {
            problem.with_limit(*limit_bytes as u64, *actual_bytes as u64)
        }
        Invalid::Malformed { .. } => problem,
    }
}

/// A command that apply refused, alike on every node. `commands_max` is the node's bound on what
/// waits, for the `RateLimit-*` headers.
pub fn refusal(refusal: &Refusal, commands_max: u64) -> Problem {
    match refusal {
        Refusal::Expired => Problem::new(
            Kind::Expired,
            "The write reached the log after its deadline and was refused there. It was not \
             applied and will not be. Send it again; with an Idempotency-Key, take a new one.",
        )
        .retry_after(RETRY_AFTER_S),
        Refusal::KeyReused => Problem::new(
            Kind::KeyReused,
            "This idempotency key was used before with another route or body. Use a new key for \
             a new request, and repeat a request with the same bytes.",
        ),
        Refusal::NotFound { kind, name } if kind == "epoch" => Problem::new(
            Kind::UnknownEpoch,
            format!("There is no epoch \"{name}\". Create it first with POST /v1/epoch."),
        )
        .with("field", "epoch")
        .with("name", name.as_str()),
        Refusal::NotFound { kind, name } => {
            Problem::new(Kind::NotFound, format!("There is no {kind} \"{name}\".")).with("name", name.as_str())
        }
        Refusal::EpochExists { name } => Problem::new(
            Kind::EpochExists,
            format!("There is already an epoch \"{name}\". Names are unique; choose another."),
        )
        .with("field", "name"),
        Refusal::Cycle => {
            Problem::new(Kind::SupersessionCycle, "The new one is already superseded, directly or not, by the old one.")
        }
        Refusal::ChainTooLong { steps_max } => Problem::new(
            Kind::ChainTooLong,
            format!(
                "The new assertion was superseded so often that the check for a circle gave up \
                 after {steps_max} steps. Supersede by the latest assertion of that chain."
            ),
        )
        .with("limit", *steps_max),
        Refusal::PathMismatch { old_path, new_path } => Problem::new(
            Kind::PathMismatch,
            format!(
                "The old assertion is about \"{old_path}\" and the new one about \"{new_path}\". \
                 Both must be about the same concept."
            ),
        )
        .with("old_path", old_path.as_str())
        .with("new_path", new_path.as_str()),
        Refusal::ImportPosition { expected } => Problem::new(
            Kind::ImportPosition,
            format!(
                "The import stands at record {expected}. Go on from there; what lies before is \
                 stored already."
            ),
        )
        .with("expected_position", *expected),
        Refusal::RebuildHeld { by, expires_in_s } => Problem::new(
            Kind::RebuildRefused,
            format!(
                "{by} is being rebuilt, and one node at a time may be: a second one could take the last copy of a write \
                 away. Wait until it has finished. If it never comes back, its permit expires in {expires_in_s} s."
            ),
        )
        .with("waits_for", by.as_str()),
        Refusal::RebuiltTooOften { name, times } => Problem::new(
            Kind::RebuildRefused,
            format!(
                "{name} has rebuilt itself {times} times within a day. Look at its disk first; then start a rebuild by \
                 hand, with POST /v1/admin/node/rebuild on it."
            ),
        ),
        Refusal::MembersBusy { job, kind, name } => Problem::new(
            Kind::FlowUnderWay,
            format!(
                "A {kind} of {name} goes on, and the members change one at a time. Wait for its end, or cancel it: \
                 GET and DELETE /v1/admin/jobs/{0}.",
                uuid::Uuid::from_u128(*job)
            ),
        )
        .with("job", uuid::Uuid::from_u128(*job).to_string()),
        Refusal::MembersVoid { job } => Problem::new(
            Kind::FlowRefused,
            format!("The job {} has ended, or is past that. Look at GET /v1/admin/jobs.", uuid::Uuid::from_u128(*job)),
        ),
        Refusal::KeyTableFull => Problem::new(
            Kind::TooManyRequests,
            "The cluster remembers as many recent requests as it may. Send this one again in a \
             moment, or use batches.",
        )
        .retry_after(RETRY_AFTER_S)
        .rate_limit(commands_max),
    }
}

/// A write that got no outcome.
pub fn submit_error(error: SubmitError, commands_max: u64) -> Problem {
    match error {
        SubmitError::NotApplied { status, detail, retry_after_s } => {
            let detail = format!("This node did not get the write applied: {detail}.");
            let problem = match status {
                429 => Problem::new(Kind::TooManyRequests, detail).rate_limit(commands_max),
                _ => Problem::new(Kind::Unavailable, detail),
            };
            problem.retry_after(retry_after_s.max(1)).outcome(WriteOutcome::NotApplied)
        }
        SubmitError::DiskFull(shortages) => disk_full(&shortages),
        SubmitError::Unknown { detail } => Problem::new(
            Kind::OutcomeUnknown,
            format!(
                "The write may have been applied: {detail}. Send it again with the same \
                 Idempotency-Key, and it is applied once."
            ),
        )
        .retry_after(RETRY_AFTER_S),
    }
}

/// Nothing was written because disks are full: what is free, what is needed, and what to do.
fn disk_full(shortages: &[Shortage]) -> Problem {
    let detail = format!(
        "The write was not applied: {}. Writes go on by themselves once there is room. Until then reads go on, and \
         retractions (POST /v1/supersede without \"new\") are taken while a reserve lasts.",
        shortages_text(shortages)
    );
    let nodes: Vec<Value> = shortages
        .iter()
        .map(|s| {
            json!({
                "node": s.node,
                "data_dir": s.data_dir,
                "bytes_free": s.bytes_free,
                "bytes_needed": s.bytes_needed(),
                "inodes_free": s.inodes_free,
                "inodes_needed": s.inodes_needed(),
                "next_command": format!("df -h {0}; df -i {0}", s.data_dir),
            })
        })
        .collect();
    let problem = Problem::new(Kind::DiskFull, detail).with("nodes", nodes);
    // The node that lacks most, for whoever reads one number.
    let problem = match shortages.iter().max_by_key(|s| (s.bytes_needed(), s.inodes_needed())) {
        Some(most) => problem.with("bytes_free", most.bytes_free).with("bytes_needed", most.bytes_needed()),
        None => problem,
    };
    problem.retry_after(RETRY_FULL_AFTER_S).outcome(WriteOutcome::NotApplied)
}

/// A read that could not be served.
pub fn read_error(error: ReadError) -> Problem {
    match error {
        ReadError::Unavailable { detail, retry_after_s } => {
            let detail = format!("The read cannot be served here now: {detail}. Send it again, or ask another node.");
            Problem::new(Kind::Unavailable, detail).retry_after(retry_after_s.max(1))
        }
        ReadError::TooStale { staleness_ms, max_staleness_ms } => Problem::new(
            Kind::TooStale,
            format!(
                "This node last heard from the leader {staleness_ms} ms ago; the request allows \
                 {max_staleness_ms} ms. Ask another node, or allow more."
            ),
        )
        .with_limit(max_staleness_ms, staleness_ms)
        .retry_after(RETRY_AFTER_S),
        ReadError::Store(error) => store_error(error),
    }
}

/// A read that the local store could not answer. The cause is logged here, once: it names files,
/// which are the operator's business and not the client's.
pub fn store_error(error: StoreError) -> Problem {
    match error {
        StoreError::Engine(cause) => {
            tracing::error!(%cause, "storage read error");
            damaged()
        }
        StoreError::Damaged { what } => {
            tracing::error!(what, "storage read error: a row cannot be decoded");
            damaged()
        }
        StoreError::BadCursor { why } => {
            Problem::new(Kind::InvalidCursor, format!("The cursor {why}. Start again without one."))
                .with("parameter", "cursor")
        }
        StoreError::CursorGone { why } => {
            Problem::new(Kind::CursorExpired, format!("The cursor has expired: {why}. Start again without one."))
                .with("parameter", "cursor")
        }
        StoreError::TooMuch { rows_max } => Problem::new(
            Kind::QueryTooBroad,
            format!(
                "Answering this means looking at more than {rows_max} rows. Name a predicate or an \
                 assertion."
            ),
        )
        .with("limit", rows_max),
    }
}

fn damaged() -> Problem {
    Problem::new(
        Kind::StorageDamaged,
        "This node could not read its own data; its log says which file. Ask another node.",
    )
    .retry_after(RETRY_AFTER_S)
}

#[cfg(test)]
#[path = "mapping_tests.rs"]
mod tests;
