//! The writes: `assert`, `assert/batch`, `vote`, `epoch`, `supersede`.
//!
//! All five take the same way: read the body, parse it into an operation, hand it to the node with
//! its key, and answer with receipts. Whatever goes wrong on that way leaves through one place,
//! which sees to it that the answer says what became of the write.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use uuid::Uuid;

use crate::{
    node::{SubmitError, Submitted},
    state::command::{Operation, Outcome, Receipt},
};

use super::{
    Api, bodies,
    headers::{self, Import},
    limits::{self, PARSE_INLINE_BYTES_MAX},
    mapping,
    problem::{Kind, Problem, WriteOutcome},
    schema, time,
};

/// The routes of this module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Write {
    Assert,
    Batch,
    Vote,
    Epoch,
    Supersede,
}

impl Write {
    /// Part of the body hash: one key on two routes is a conflict. Never change one.
    const fn route(self) -> &'static str {
        match self {
            Write::Assert => "/v1/assert",
            Write::Batch => "/v1/assert/batch",
            Write::Vote => "/v1/vote",
            Write::Epoch => "/v1/epoch",
            Write::Supersede => "/v1/supersede",
        }
    }

    fn parse(self, body: &[u8], import: Option<Import>) -> Result<Operation, Problem> {
        match self {
            Write::Assert => bodies::assertion(body),
            Write::Batch => bodies::batch(body, import),
            Write::Vote => bodies::vote(body),
            Write::Epoch => bodies::epoch(body),
            Write::Supersede => bodies::supersession(body),
        }
    }
}

/// Stores one assertion.
#[utoipa::path(post, path = "/v1/assert", tag = "writes", request_body = schema::Assert,
    params(schema::WriteHeaders),
    responses((status = 201, description = "Stored on a majority of the voters", body = schema::Written),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn assert(State(api): State<Arc<Api>>, request: Request) -> Response {
    handle(&api, request, Write::Assert).await
}

/// Stores up to 10,000 assertions, all or none: a JSON array, or one object per line (NDJSON).
#[utoipa::path(post, path = "/v1/assert/batch", tag = "writes", request_body = Vec<schema::Assert>,
    params(schema::WriteHeaders, schema::ImportHeaders),
    responses((status = 201, description = "All stored, in order", body = schema::BatchWritten),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn assert_batch(State(api): State<Arc<Api>>, request: Request) -> Response {
    handle(&api, request, Write::Batch).await
}

/// Votes on an assertion. A later vote of the same voter replaces the earlier one.
#[utoipa::path(post, path = "/v1/vote", tag = "writes", request_body = schema::Vote,
    params(schema::WriteHeaders),
    responses((status = 201, description = "Stored on a majority of the voters", body = schema::Written),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn vote(State(api): State<Arc<Api>>, request: Request) -> Response {
    handle(&api, request, Write::Vote).await
}

/// Creates an epoch. Assertions of an epoch it supersedes leave the default answer.
#[utoipa::path(post, path = "/v1/epoch", tag = "writes", request_body = schema::Epoch,
    params(schema::WriteHeaders),
    responses((status = 201, description = "Stored on a majority of the voters", body = schema::Written),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn epoch(State(api): State<Arc<Api>>, request: Request) -> Response {
    handle(&api, request, Write::Epoch).await
}

/// Replaces an assertion by another, or retracts it when `new` is absent.
#[utoipa::path(post, path = "/v1/supersede", tag = "writes", request_body = schema::Supersede,
    params(schema::WriteHeaders),
    responses((status = 201, description = "Stored on a majority of the voters", body = schema::Written),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn supersede(State(api): State<Arc<Api>>, request: Request) -> Response {
    handle(&api, request, Write::Supersede).await
}

async fn handle(api: &Api, request: Request, write: Write) -> Response {
    let (parts, body) = request.into_parts();
    match perform(api, &parts, body, write).await {
        Ok(response) => response,
        Err(problem) => problem.on_write(headers::came_through_balancer(&parts.headers)).into_response(),
    }
}

async fn perform(api: &Api, parts: &Parts, body: Body, write: Write) -> Result<Response, Problem> {
    // The charge lives until the answer is made: the command holds what it pays for.
    let (bytes, _charge) = limits::read_body(&api.body_limits, &api.budget, &parts.headers, body).await?;
    let key = headers::command_key(&parts.headers)?;
    let import = if write == Write::Batch { headers::import(&parts.headers)? } else { None };
    // A key that the node makes is never seen twice, so that its hash would protect nothing.
    let body_hash = match key {
        Some(_) => headers::body_hash(write.route(), import.as_ref(), &bytes),
        None => 0,
    };
    let op = parse(write, bytes, import).await?;
    super::read::refuse_removed(api)?;
    let balanced = headers::came_through_balancer(&parts.headers);
    if let Some(why) = api.node.cut_off().filter(|_| balanced) {
        let detail = format!("This node did not take the write: {why}. Send it to another node.");
        let problem = Problem::new(Kind::Unavailable, detail).outcome(WriteOutcome::NotApplied);
        return Err(problem.retry_after(mapping::RETRY_AFTER_S).try_elsewhere());
    }
    let submitted = tokio::select! {
        biased;
        submitted = api.node.submit(op, key, body_hash) => submitted,
        // The balancer sends it to another node, under the same id. A client that asks this node itself waits on.
        why = api.node.wait_cut_off(), if balanced => {
            let unknown = SubmitError::Unknown { detail: format!("this node is cut off: {why}") };
            return Err(mapping::submit_error(unknown, api.commands_max).try_elsewhere());
        }
    };
    let submitted = submitted.map_err(|error| mapping::submit_error(error, api.commands_max))?;
    answer(&submitted, write, api.commands_max)
}

/// Parses here when it is quick, and on a blocking thread when it would hold up other requests.
async fn parse(write: Write, bytes: Bytes, import: Option<Import>) -> Result<Operation, Problem> {
    if bytes.len() <= PARSE_INLINE_BYTES_MAX {
        return write.parse(&bytes, import);
    }
    let parsed = tokio::task::spawn_blocking(move || write.parse(&bytes, import)).await;
    parsed.unwrap_or_else(|error| {
        tracing::error!(%error, "parsing a body panicked");
        let detail = "Parsing the body failed on this node, whose log says more.";
        Err(Problem::new(Kind::Internal, detail).outcome(WriteOutcome::Refused))
    })
}

#[derive(Serialize)]
struct Written {
    id: Uuid,
    index: u64,
    created_at: String,
    replayed: bool,
}

#[derive(Serialize)]
struct BatchWritten {
    results: Vec<Written>,
}

fn answer(submitted: &Submitted, write: Write, commands_max: u64) -> Result<Response, Problem> {
    let receipts = match &submitted.outcome.outcome {
        Outcome::Applied(receipts) => receipts,
        Outcome::Refused(refusal) => return Err(mapping::refusal(refusal, commands_max)),
        // Only nodes ask for permits and change the members.
        Outcome::Permit(_) | Outcome::Member(_) => {
            return Err(Problem::new(Kind::Internal, "The node mixed up two outcomes."));
        }
    };
    let replayed = submitted.outcome.replayed;
    let written = |receipt: &Receipt| Written {
        id: receipt.id,
        index: receipt.index,
        created_at: time::to_rfc3339(receipt.created_at_ms),
        replayed,
    };
    // Apply gives one receipt per fact. None at all is a defect, and then nothing is known.
    let Some(last) = receipts.last() else {
        tracing::error!(route = write.route(), "a write was applied without a receipt");
        return Err(Problem::new(Kind::Internal, "The node lost the receipt of this write."));
    };
    let body = match write {
        Write::Batch => serde_json::to_vec(&BatchWritten { results: receipts.iter().map(written).collect() }),
        Write::Assert | Write::Vote | Write::Epoch | Write::Supersede => serde_json::to_vec(&written(last)),
    };
    let body = body.map_err(|error| {
        tracing::error!(%error, "the answer to a write could not be written");
        Problem::new(Kind::Internal, "The node could not write its answer.")
    })?;
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::CREATED;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, headers::JSON);
    headers::stamp(headers, last.index, &submitted.served_by);
    Ok(response)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::state::command::{CommandOutcome, Refusal};
    use http_body_util::BodyExt;

    fn submitted(outcome: Outcome, replayed: bool) -> Submitted {
        let outcome = CommandOutcome { outcome, replayed };
        Submitted { outcome, served_by: "node-2".into() }
    }

    async fn json(response: Response) -> serde_json::Value {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        serde_json::from_slice(&bytes).unwrap()
    }

    #[tokio::test]
    async fn receipts_become_the_documented_answers() {
        let receipt = |index| Receipt { id: Uuid::nil(), index, created_at_ms: 0 };
        let one = submitted(Outcome::Applied(vec![receipt(7)]), true);
        let response = answer(&one, Write::Vote, 1).unwrap();
        assert_eq!(response.status(), 201);
        assert_eq!(response.headers()["x-stemedb-index"], "7");
        assert_eq!(response.headers()["x-stemedb-served-by"], "node-2");
        let expected = serde_json::json!({"id": "00000000-0000-0000-0000-000000000000",
            "index": 7, "created_at": "1970-01-01T00:00:00.000Z", "replayed": true});
        assert_eq!(json(response).await, expected);

        let two = submitted(Outcome::Applied(vec![receipt(7), receipt(8)]), false);
        let response = answer(&two, Write::Batch, 1).unwrap();
        assert_eq!(response.headers()["x-stemedb-index"], "8");
        assert_eq!(json(response).await["results"][1]["index"], 8);
    }

    #[test]
    fn refusals_and_lost_receipts_become_problems() {
        let refused = submitted(Outcome::Refused(Refusal::KeyReused), false);
        assert_eq!(answer(&refused, Write::Assert, 1).unwrap_err().status(), 409);
        let nothing = submitted(Outcome::Applied(vec![]), false);
        let problem = answer(&nothing, Write::Assert, 1).unwrap_err().on_write(false);
        assert_eq!(problem.write_outcome(), Some(WriteOutcome::Unknown));
    }
}
