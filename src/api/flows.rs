//! Drain, undrain and failover: what an operator orders, and how it is answered.
//!
//! An order goes to the node that it is about: a drain to the node that `node` names, a failover to the leader. Any
//! node takes it and passes it on. The answer is the finished job; 202 and its address with `wait=false`, or when it
//! takes longer than 30 s.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{RawQuery, Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper::body::Bytes;
use serde::de::MapAccess;
use tokio::time::{Instant, sleep, timeout};

use crate::node::{DrainOrder, FlowError, JobReport, JobState};

use super::{
    Api,
    elsewhere::{self, Asked},
    json::{self, Fields},
    limits, mapping,
    params::Params,
    problem::{Kind, Problem, WriteOutcome},
    schema,
};

/// How long a caller waits for the end of a job before it is told where to look.
pub const WAIT_MAX: Duration = Duration::from_secs(30);

/// How long a failover looks for the leader that it should go to: above an election.
const LEADER_MAX: Duration = Duration::from_secs(3);
/// Pause before it looks again. Only where leadership was just moving.
const LEADER_PAUSE: Duration = Duration::from_millis(20);

/// `true` and `false` in a query.
pub const SWITCH: &[(&str, bool)] = &[("true", true), ("false", false)];

#[derive(Default)]
struct DrainBody {
    persist: Option<bool>,
}

impl<'de> Fields<'de> for DrainBody {
    const WHAT: &'static str = "A drain";
    const NAMES: &'static [&'static str] = &["persist"];
    const REQUIRED: usize = 0;
    fn read<A: MapAccess<'de>>(&mut self, _: usize, map: &mut A) -> Result<(), A::Error> {
        self.persist = map.next_value()?;
        Ok(())
    }
}

#[derive(Default)]
struct NoBody;

impl<'de> Fields<'de> for NoBody {
    const WHAT: &'static str = "An undrain";
    const NAMES: &'static [&'static str] = &[];
    const REQUIRED: usize = 0;
    fn read<A: MapAccess<'de>>(&mut self, _: usize, map: &mut A) -> Result<(), A::Error> {
        map.next_value::<serde::de::IgnoredAny>().map(drop)
    }
}

#[derive(Default)]
struct FailoverBody {
    target: Option<String>,
}

impl<'de> Fields<'de> for FailoverBody {
    const WHAT: &'static str = "A failover";
    const NAMES: &'static [&'static str] = &["target"];
    const REQUIRED: usize = 0;
    fn read<A: MapAccess<'de>>(&mut self, _: usize, map: &mut A) -> Result<(), A::Error> {
        self.target = map.next_value()?;
        Ok(())
    }
}

/// The body of an order.
pub async fn body_of(api: &Api, request: Request) -> Result<Bytes, Problem> {
    let (parts, body) = request.into_parts();
    let (bytes, _charge) = limits::read_body(&api.body_limits, &api.budget, &parts.headers, body).await?;
    Ok(bytes)
}

/// The body of an order that is for this node; the answer of the other one when `node` names another.
pub async fn order_here(
    api: &Api,
    asked: &Asked,
    node: Option<String>,
    request: Request,
) -> Result<Result<Bytes, Response>, Problem> {
    let bytes = body_of(api, request).await?;
    match node.filter(|node| node != api.node.name()) {
        Some(node) => super::jobs::pass_on(api, asked, &node, Method::POST, bytes).await.map(Err),
        None => Ok(Ok(bytes)),
    }
}

/// Takes a node out of traffic: this one, or the one that `node` names. It is not ready any more, gives leadership
/// away, goes on answering until load balancers have noticed, and then for as long as it runs.
#[utoipa::path(post, path = "/v1/admin/node/drain", tag = "admin", request_body = schema::Drain,
    params(("node" = Option<String>, Query, description = "Name of the node; default: the one that is asked"),
        ("wait" = Option<bool>, Query, description = "false: answer 202 and the job's address once it has begun"),
        ("force" = Option<bool>, Query,
            description = "true: also while another node drains, or when the others could not go on alone"),
        ("dry_run" = Option<bool>, Query, description = "true: only say what it would do to fault tolerance")),
    responses((status = 200, description = "Drained; or the plan", body = schema::JobAnswer),
        (status = 202, description = "Under way; `Location` says where to look", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn drain(
    State(api): State<Arc<Api>>,
    RawQuery(query): RawQuery,
    asked: Asked,
    request: Request,
) -> Result<Response, Problem> {
    let mut params = Params::parse(query.as_deref())?;
    let node = params.text("node")?;
    let wait = params.choice("wait", SWITCH)?.unwrap_or(true);
    let forced = params.choice("force", SWITCH)?.unwrap_or(false);
    let dry_run = params.choice("dry_run", SWITCH)?.unwrap_or(false);
    params.finish()?;
    let bytes = match order_here(&api, &asked, node, request).await? {
        Ok(bytes) => bytes,
        Err(answered) => return Ok(answered),
    };
    let DrainBody { persist } = json::parse_object(&bytes)?;
    if dry_run {
        let plan = api.node.plan_drain().await.map_err(problem)?;
        return Ok(Json(plan).into_response());
    }
    let order = DrainOrder { forced, persist: persist.unwrap_or(false) };
    let id = api.node.drain(order).await.map_err(problem)?;
    job_answer(&api, &id, wait).await
}

/// Puts a node back into traffic: this one, or the one that `node` names. A drain that goes on is cancelled. One that
/// is in traffic already is left as it is.
#[utoipa::path(post, path = "/v1/admin/node/undrain", tag = "admin",
    params(("node" = Option<String>, Query, description = "Name of the node; default: the one that is asked")),
    responses((status = 200, description = "In traffic", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn undrain(
    State(api): State<Arc<Api>>,
    RawQuery(query): RawQuery,
    asked: Asked,
    request: Request,
) -> Result<Response, Problem> {
    let mut params = Params::parse(query.as_deref())?;
    let node = params.text("node")?;
    params.finish()?;
    let bytes = match order_here(&api, &asked, node, request).await? {
        Ok(bytes) => bytes,
        Err(answered) => return Ok(answered),
    };
    let NoBody = json::parse_object(&bytes)?;
    let id = api.node.undrain().await.map_err(problem)?;
    job_answer(&api, &id, true).await
}

/// Moves leadership to `target`, or to the voter that lacks least. Answers once the new leader takes writes.
#[utoipa::path(post, path = "/v1/admin/failover", tag = "admin", request_body = schema::Failover,
    params(("wait" = Option<bool>, Query, description = "false: answer 202 and the job's address once it has begun"),
        ("dry_run" = Option<bool>, Query, description = "true: only say who could take over")),
    responses((status = 200, description = "Moved: `from`, `to`, `term`, `ms`; or the plan", body = schema::JobAnswer),
        (status = 202, description = "Under way; `Location` says where to look", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn failover(
    State(api): State<Arc<Api>>,
    RawQuery(query): RawQuery,
    asked: Asked,
    request: Request,
) -> Result<Response, Problem> {
    let mut params = Params::parse(query.as_deref())?;
    let wait = params.choice("wait", SWITCH)?.unwrap_or(true);
    let dry_run = params.choice("dry_run", SWITCH)?.unwrap_or(false);
    params.finish()?;
    let bytes = body_of(&api, request).await?;
    let FailoverBody { target } = json::parse_object(&bytes)?;
    at_leader(&api, &asked, Method::POST, bytes, || failover_here(&api, target.clone(), wait, dry_run)).await
}

/// Has the leader answer: `here` does, unless this node does not lead. Its error is the name of the node that does.
pub async fn at_leader<F: Future<Output = Result<Result<Response, Problem>, Option<String>>>>(
    api: &Api,
    asked: &Asked,
    method: Method,
    bytes: Bytes,
    here: impl Fn() -> F,
) -> Result<Response, Problem> {
    let deadline = Instant::now() + LEADER_MAX;
    loop {
        let refused = match here().await {
            Err(refused) => refused,
            Ok(answered) => return answered,
        };
        // Not here. A request that was passed on is not passed on again: the node that did finds the leader.
        if asked.was_passed_on() {
            return Err(not_leader(refused));
        }
        if let Some(leader) = &refused {
            match super::jobs::pass_on(api, asked, leader, method.clone(), bytes.clone()).await {
                // Neither has begun anything: that one does not lead any more, or was not reached.
                Ok(answer) if elsewhere::is_not_leader(&answer) && Instant::now() < deadline => {}
                Err(problem) if problem.kind() == Kind::Unavailable && Instant::now() < deadline => {}
                // One that may have begun it has the last word.
                answered => return answered,
            }
        }
        if Instant::now() >= deadline {
            return Err(not_leader(refused));
        }
        sleep(LEADER_PAUSE).await;
    }
}

/// The error is the name of the node that leads, as far as it is known.
async fn failover_here(
    api: &Api,
    target: Option<String>,
    wait: bool,
    dry_run: bool,
) -> Result<Result<Response, Problem>, Option<String>> {
    let ordered = match dry_run {
        true => api.node.plan_failover(target.as_deref()).await.map(|plan| Json(plan).into_response()),
        false => match api.node.failover(target).await {
            Ok(id) => return Ok(job_answer(api, &id, wait).await),
            Err(error) => Err(error),
        },
    };
    match ordered {
        Err(FlowError::NotLeader(leader)) => Err(leader),
        ordered => Ok(ordered.map_err(problem)),
    }
}

/// The finished job, or where to look for it.
pub async fn job_answer(api: &Api, id: &str, wait: bool) -> Result<Response, Problem> {
    let ended = match wait {
        true => timeout(WAIT_MAX, wait_ended(api, id)).await.ok().flatten(),
        false => None,
    };
    let job = match ended.or_else(|| api.node.job(id)) {
        Some(job) => job,
        None => {
            let job = api.node.cluster_job(id).await.map_err(|why| began_unseen(id, &why))?;
            job.ok_or_else(|| began_unseen(id, "this node does not show it yet"))?
        }
    };
    match job.state {
        JobState::Finished => Ok(Json(job).into_response()),
        JobState::Failed | JobState::Cancelled => Err(failed(&job)),
        JobState::Running | JobState::Waiting => {
            let node = if job.cluster { String::new() } else { format!("?node={}", api.node.name()) };
            let location = HeaderValue::from_str(&format!("/v1/admin/jobs/{id}{node}"));
            let mut response = (StatusCode::ACCEPTED, Json(job)).into_response();
            if let Ok(location) = location {
                response.headers_mut().insert(header::LOCATION, location);
            }
            Ok(response)
        }
    }
}

/// An order was taken, and this node cannot show its job.
fn began_unseen(id: &str, why: &str) -> Problem {
    unknown(
        format!("Job {id} was begun, and how far it is cannot be told here ({why}). Look at GET /v1/admin/jobs/{id}."),
        Some(id.to_owned()),
    )
}

async fn wait_ended(api: &Api, id: &str) -> Option<JobReport> {
    match api.node.wait_job(id).await {
        Some(job) => Some(job),
        // What cannot be read is said when the job is looked for.
        None => api.node.wait_cluster_job(id).await.ok().flatten(),
    }
}

fn failed(job: &JobReport) -> Problem {
    let kind = if job.kind == "rebuild" { Kind::RebuildRefused } else { Kind::FlowFailed };
    let end = if job.state == JobState::Cancelled { "was cancelled" } else { "was given up" };
    Problem::new(kind, format!("The {} {end}: {}.", job.kind, job.detail)).with("job", job.id.clone())
}

/// An order that was not taken, as a problem that says what to do.
pub fn problem(error: FlowError) -> Problem {
    match error {
        FlowError::Busy(job) => {
            let (id, node) = (&job.id, &job.node);
            let detail = format!(
                "A {} goes on here; one flow at a time. Wait for its end: GET /v1/admin/jobs/{id}?node={node}.",
                job.kind
            );
            Problem::new(Kind::FlowUnderWay, detail).with("job", id.clone())
        }
        FlowError::Held { by, mark } => {
            let detail = format!(
                "{by} is {}, and one node at a time is taken out of traffic. Undrain it first \
                 (POST /v1/admin/node/undrain?node={by}), or repeat this with ?force=true. Nothing was changed.",
                match mark {
                    crate::admin::drain::Mark::Wants => "about to drain",
                    mark => mark.word(),
                }
            );
            Problem::new(Kind::DrainHeld, detail).with("held_by", by)
        }
        FlowError::Risky(tolerance, leaves) => {
            let detail = format!(
                "{}. Bring the others back first, or repeat this with ?force=true. Nothing was changed.",
                tolerance.words(&leaves)
            );
            Problem::new(Kind::FlowRefused, detail)
                .with("voters", tolerance.voters)
                .with("needed", tolerance.needed)
                .with("working", tolerance.working)
        }
        FlowError::Refused(refusal @ crate::admin::failover::Refusal::Unknown { .. }) => {
            Problem::new(Kind::NotFound, format!("{refusal}. Nothing was changed."))
        }
        FlowError::Refused(refusal) => {
            let detail = format!("{refusal}. Nothing was changed; GET /v1/admin/cluster shows every member.");
            Problem::new(Kind::FlowRefused, detail)
        }
        FlowError::Impossible(why) => Problem::new(Kind::FlowRefused, format!("It is not possible now: {why}.")),
        FlowError::Cancelled => Problem::new(Kind::FlowFailed, "It was cancelled."),
        FlowError::NotLeader(leader) => not_leader(leader),
    }
}

/// Whether an order was carried out is not known: the answer that is never followed by another try.
pub fn unknown(detail: impl Into<String>, job: Option<String>) -> Problem {
    let problem = Problem::new(Kind::OrderUnknown, detail).outcome(WriteOutcome::Unknown);
    match job {
        Some(job) => problem.with("job", job),
        None => problem,
    }
}

/// Only the leader can do it, and this node does not lead.
pub fn not_leader(leader: Option<String>) -> Problem {
    let leader = leader.map_or_else(|| "no leader is known".to_owned(), |leader| format!("{leader} leads"));
    let detail = format!("The leader has to do this, and {leader}. Nothing was changed; repeat it.");
    Problem::new(Kind::NotLeader, detail).retry_after(mapping::RETRY_AFTER_S)
}
