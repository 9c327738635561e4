//! What load balancers and people ask to see whether a node is well.
//!
//! Nothing here waits for the cluster or for a disk: these answers must come while everything else
//! hangs. HEAD is answered like GET, without the body.

use std::sync::Arc;

use axum::{
    Json,
    extract::{RawQuery, State},
    http::HeaderValue,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{
    Api, headers, mapping,
    params::Params,
    problem::{Kind, Problem},
    schema,
};

fn ok() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// The answer to a probe of a node that is well. Envoy sends nothing to a degraded host while others are left: writes go
/// straight to the leader. Without a leader all are degraded, which is as if none were. A leader that has lost its
/// majority is degraded too: Raft lets it go on as one, and its successor must not share the requests with it.
fn probed(api: &Api, answer: impl IntoResponse) -> Response {
    let mut answer = answer.into_response();
    if !api.node.leads() {
        answer.headers_mut().insert(headers::ENVOY_DEGRADED, HeaderValue::from_static("true"));
    }
    answer
}

fn unwell(kind: Kind, detail: impl Into<String>) -> Problem {
    Problem::new(kind, detail).retry_after(mapping::RETRY_AFTER_S)
}

/// The state of this node. 200 for as long as the process serves, whatever the state.
#[utoipa::path(method(get, head), path = "/v1/health", tag = "health",
    responses((status = 200, description = "The process serves", body = schema::HealthAnswer)))]
pub async fn health(State(api): State<Arc<Api>>) -> Response {
    probed(&api, Json(api.node.health()))
}

/// 200 for as long as the process serves.
#[utoipa::path(method(get, head), path = "/v1/health/live", tag = "health",
    responses((status = 200, description = "The process serves")))]
pub async fn live(State(api): State<Arc<Api>>) -> Response {
    probed(&api, ok())
}

/// 200 while requests may be sent here: caught up since the start, and not draining, failed, fenced or cut off from
/// the others. Stays 200 while there is no leader and a majority of the nodes answer each other, because requests are
/// parked then.
#[utoipa::path(method(get, head), path = "/v1/health/ready", tag = "health",
    responses((status = 200, description = "Send requests here; rather to the leader while there is `x-envoy-degraded`"),
        (status = 503, response = schema::ProblemResponse)))]
pub async fn ready(State(api): State<Arc<Api>>) -> Result<Response, Problem> {
    api.node.is_ready().map_err(|reason| unwell(Kind::NotReady, format!("Not ready: {reason}.")))?;
    Ok(probed(&api, ok()))
}

/// 200 only on a leader that has lately heard from a majority.
#[utoipa::path(method(get, head), path = "/v1/health/leader", tag = "health",
    responses((status = 200, description = "The leader, with a quorum"),
        (status = 503, response = schema::ProblemResponse)))]
pub async fn leader(State(api): State<Arc<Api>>) -> Result<Json<Value>, Problem> {
    if api.node.is_leader_with_quorum() {
        Ok(ok())
    } else {
        let detail = "This node is not the leader, or has not heard from a majority lately.";
        Err(unwell(Kind::NotLeader, detail))
    }
}

/// 200 while this node is ready and at most `max_lag` log entries behind the leader. Never with `x-envoy-degraded`: who
/// asks for this wants to read from followers.
#[utoipa::path(method(get, head), path = "/v1/health/replica", tag = "health",
    params(("max_lag" = Option<u64>, Query, description = "Most entries behind; absent: any known lag")),
    responses((status = 200, description = "Ready and close enough"),
        (status = 503, response = schema::ProblemResponse)))]
pub async fn replica(State(api): State<Arc<Api>>, RawQuery(raw): RawQuery) -> Result<Json<Value>, Problem> {
    let mut params = Params::parse(raw.as_deref())?;
    let max_lag: Option<u64> = params.parsed("max_lag", "a count of log entries")?;
    params.finish()?;
    api.node.is_ready().map_err(|reason| unwell(Kind::NotReady, format!("Not ready: {reason}.")))?;
    replica_state(api.node.replica_lag_entries(), max_lag)
}

fn replica_state(lag_entries: Option<u64>, max_lag: Option<u64>) -> Result<Json<Value>, Problem> {
    match (lag_entries, max_lag) {
        (None, _) => Err(unwell(Kind::ReplicaLag, "This node does not know how far the leader's log reaches.")),
        (Some(lag), Some(max)) if lag > max => {
            let detail = format!("This node is {lag} log entries behind; at most {max} are wanted.");
            Err(unwell(Kind::ReplicaLag, detail).with_limit(max, lag))
        }
        (Some(lag), _) => Ok(Json(json!({"status": "ok", "lag_entries": lag}))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_counts_up_to_its_lag() {
        assert_eq!(replica_state(Some(3), Some(3)).unwrap().0["lag_entries"], 3);
        assert!(replica_state(Some(3), None).is_ok());
        assert_eq!(replica_state(Some(4), Some(3)).unwrap_err().status(), 503);
        assert_eq!(replica_state(None, Some(3)).unwrap_err().kind(), Kind::ReplicaLag);
    }
}
