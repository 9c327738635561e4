//! Rebuilding a node, the jobs that go on by themselves, and what they have put away.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Path, RawQuery, Request, State, rejection::PathRejection},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::de::MapAccess;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::node::{JobReport, JobState, OrderError};

use super::{
    Api,
    elsewhere::{self, Asked},
    json::{self, Fields},
    limits, mapping,
    params::Params,
    problem::{Kind, Problem},
    schema,
};

/// How long a caller waits for the end of a job before it is told where to look.
const WAIT_MAX: Duration = Duration::from_secs(30);

const WAIT: &[(&str, bool)] = &[("true", true), ("false", false)];

#[derive(Default)]
struct RebuildBody {
    from: Option<String>,
}

impl<'de> Fields<'de> for RebuildBody {
    const WHAT: &'static str = "A rebuild";
    const NAMES: &'static [&'static str] = &["from"];
    const REQUIRED: usize = 0;
    fn read<A: MapAccess<'de>>(&mut self, _: usize, map: &mut A) -> Result<(), A::Error> {
        self.from = map.next_value()?;
        Ok(())
    }
}

/// Makes a node anew from a replica: this one, or the one that `node` names. The old files are kept in its quarantine.
#[utoipa::path(post, path = "/v1/admin/node/rebuild", tag = "admin", request_body = schema::Rebuild,
    params(("node" = Option<String>, Query, description = "Name of the node; default: the one that is asked"),
        ("wait" = Option<bool>, Query, description = "false: answer at once with 202 and the job's address")),
    responses((status = 200, description = "Finished", body = schema::JobAnswer),
        (status = 202, description = "Under way; `Location` says where to look", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn rebuild(
    State(api): State<Arc<Api>>,
    RawQuery(query): RawQuery,
    asked: Asked,
    request: Request,
) -> Result<Response, Problem> {
    let mut params = Params::parse(query.as_deref())?;
    let node = params.text("node")?;
    let wait = params.choice("wait", WAIT)?.unwrap_or(true);
    params.finish()?;
    let (parts, body) = request.into_parts();
    let (bytes, _charge) = limits::read_body(&api.body_limits, &api.budget, &parts.headers, body).await?;
    if let Some(node) = node.filter(|node| node != api.node.name()) {
        return pass_on(&api, &asked, &node, Some(bytes)).await;
    }
    let RebuildBody { from } = json::parse_object(&bytes)?;
    let id = api.node.order_rebuild(from).await.map_err(order_problem)?;
    let ended = match wait {
        true => timeout(WAIT_MAX, api.node.jobs().wait_ended(&id)).await.ok().flatten(),
        false => None,
    };
    let job = ended.or_else(|| api.node.jobs().job(&id));
    answer(&id, api.node.name(), job)
}

fn answer(id: &str, node: &str, job: Option<JobReport>) -> Result<Response, Problem> {
    let job = job.ok_or_else(|| unknown_job(id))?;
    match job.state {
        JobState::Finished => Ok(Json(job).into_response()),
        JobState::Failed => {
            Err(Problem::new(Kind::RebuildRefused, format!("The rebuild was given up: {}.", job.detail)))
        }
        JobState::Running | JobState::Waiting => {
            let mut response = (StatusCode::ACCEPTED, Json(job)).into_response();
            let location = HeaderValue::from_str(&format!("/v1/admin/jobs/{id}?node={node}"));
            if let Ok(location) = location {
                response.headers_mut().insert(header::LOCATION, location);
            }
            Ok(response)
        }
    }
}

fn order_problem(error: OrderError) -> Problem {
    match error {
        OrderError::Source { .. } => Problem::new(Kind::InvalidField, format!("{error}.")).with("field", "from"),
        OrderError::Unsafe { waits_for } => Problem::new(
            Kind::RebuildRefused,
            format!(
                "A rebuild now could lose data: every other voter must be well and have everything first. It waits for {}. \
                 Nothing was changed; bring that back, then repeat this.",
                waits_for.join("; ")
            ),
        )
        .with("waits_for", waits_for),
        OrderError::Impossible(why) => {
            Problem::new(Kind::RebuildRefused, format!("A rebuild is not possible: {why}. Nothing was changed."))
        }
        OrderError::NoLeader(why) => Problem::new(
            Kind::Unavailable,
            format!("The leader has to agree to a rebuild, and none could be asked ({why}). Nothing was changed."),
        )
        .retry_after(mapping::RETRY_AFTER_S),
    }
}

fn unknown_job(id: &str) -> Problem {
    let id: String = id.chars().take(64).collect();
    let detail = format!("There is no job {id:?} on this node. Jobs belong to a node; ask it, or add ?node=NAME.");
    Problem::new(Kind::NotFound, detail).with("name", id)
}

async fn pass_on(api: &Api, asked: &Asked, node: &str, body: Option<hyper::body::Bytes>) -> Result<Response, Problem> {
    let Some(addr) = api.node.http_addr_of(node) else {
        let names = api.node.other_names().join(", ");
        let detail = format!("There is no member {node:?} with a known HTTP address. The other members are {names}.");
        return Err(Problem::new(Kind::NotFound, detail).with("name", node));
    };
    elsewhere::pass_on(api, asked, &addr, body).await.map_err(|why| {
        let detail = format!("{node} at {addr} could not be asked: {why}. Ask it directly.");
        Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S)
    })
}

/// How far a job is.
#[utoipa::path(get, path = "/v1/admin/jobs/{id}", tag = "admin",
    params(("id" = String, Path, description = "The id that its beginning answered"),
        ("node" = Option<String>, Query, description = "Name of the node it runs on; default: the one that is asked")),
    responses((status = 200, description = "The job", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn job(
    State(api): State<Arc<Api>>,
    path: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
    asked: Asked,
) -> Result<Response, Problem> {
    let Path(id) = path.map_err(|_| Problem::new(Kind::InvalidId, "The path does not end in the id of a job."))?;
    let mut params = Params::parse(query.as_deref())?;
    let node = params.text("node")?;
    params.finish()?;
    if let Some(node) = node.filter(|node| node != api.node.name()) {
        return pass_on(&api, &asked, &node, None).await;
    }
    let job = match id.as_str() {
        "current" => api.node.jobs().current(),
        id => api.node.jobs().job(id),
    };
    Ok(Json(job.ok_or_else(|| unknown_job(&id))?).into_response())
}

/// The files of this node that were put away, the oldest first.
#[utoipa::path(get, path = "/v1/admin/quarantine", tag = "admin",
    responses((status = 200, description = "What there is", body = schema::QuarantineAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn quarantine(State(api): State<Arc<Api>>) -> Result<Json<Value>, Problem> {
    let found = api.node.quarantine().await.map_err(|why| {
        Problem::new(Kind::Unavailable, format!("The quarantine cannot be read: {why}."))
            .retry_after(mapping::RETRY_AFTER_S)
    })?;
    Ok(Json(json!({"folders": found})))
}
