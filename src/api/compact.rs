//! Compaction on command: of this node's tree, or of the one that `node` names.

use std::sync::Arc;

use axum::{
    extract::{RawQuery, Request, State},
    response::Response,
};
use serde::de::MapAccess;

use super::{
    Api,
    elsewhere::Asked,
    flows::{self, SWITCH, order_here, problem},
    json::{self, Fields},
    params::Params,
    problem::Problem,
    schema,
};

#[derive(Default)]
struct CompactBody {
    whole: Option<bool>,
}

impl<'de> Fields<'de> for CompactBody {
    const WHAT: &'static str = "A compaction";
    const NAMES: &'static [&'static str] = &["aggressive", "force"];
    const REQUIRED: usize = 0;
    fn read<A: MapAccess<'de>>(&mut self, _: usize, map: &mut A) -> Result<(), A::Error> {
        let given: Option<bool> = map.next_value()?;
        // Two runbooks have two names for it; either one is enough.
        self.whole = Some(given.unwrap_or(false) || self.whole.unwrap_or(false));
        Ok(())
    }
}

/// Starts a compaction of the tree of a node: what is due, or with `aggressive` (or `force`) the whole tree into its last
/// level. Answers at once with the job; `wait=true` waits for its end.
#[utoipa::path(post, path = "/v1/admin/compact", tag = "admin", request_body = schema::Compact,
    params(("node" = Option<String>, Query, description = "Name of the node; default: the one that is asked"),
        ("wait" = Option<bool>, Query, description = "true: answer once it is done, within 30 s")),
    responses((status = 200, description = "Done", body = schema::JobAnswer),
        (status = 202, description = "Under way; `Location` says where to look", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn compact(
    State(api): State<Arc<Api>>,
    RawQuery(query): RawQuery,
    asked: Asked,
    request: Request,
) -> Result<Response, Problem> {
    let mut params = Params::parse(query.as_deref())?;
    let node = params.text("node")?;
    let wait = params.choice("wait", SWITCH)?.unwrap_or(false);
    params.finish()?;
    let bytes = match order_here(&api, &asked, node, request).await? {
        Ok(bytes) => bytes,
        Err(answered) => return Ok(answered),
    };
    let CompactBody { whole } = json::parse_object(&bytes)?;
    let id = api.node.compact(whole.unwrap_or(false)).map_err(problem)?;
    flows::job_answer(&api, &id, wait).await
}

/// The same under the name that other runbooks have.
#[utoipa::path(post, path = "/v1/admin/storage/compact", tag = "admin", request_body = schema::Compact,
    params(("node" = Option<String>, Query, description = "Name of the node; default: the one that is asked"),
        ("wait" = Option<bool>, Query, description = "true: answer once it is done, within 30 s")),
    responses((status = 200, description = "Done", body = schema::JobAnswer),
        (status = 202, description = "Under way; `Location` says where to look", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn storage_compact(
    state: State<Arc<Api>>,
    query: RawQuery,
    asked: Asked,
    request: Request,
) -> Result<Response, Problem> {
    compact(state, query, asked, request).await
}
