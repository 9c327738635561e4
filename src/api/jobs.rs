//! Rebuilding a node, the jobs that go on by themselves, and what rebuilds have put away.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, RawQuery, Request, State, rejection::PathRejection},
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};
use serde::de::MapAccess;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::node::{JobState, NotCancelled, NotUndone, OrderError};

use super::{
    Api,
    elsewhere::{self, Asked, NoAnswer},
    flows,
    json::{self, Fields},
    mapping,
    params::Params,
    problem::{Kind, Problem, WriteOutcome},
    schema,
};

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
    let wait = params.choice("wait", flows::SWITCH)?.unwrap_or(true);
    params.finish()?;
    let bytes = match flows::order_here(&api, &asked, node, request).await? {
        Ok(bytes) => bytes,
        Err(answered) => return Ok(answered),
    };
    let RebuildBody { from } = json::parse_object(&bytes)?;
    let id = api.node.order_rebuild(from).await.map_err(order_problem)?;
    flows::job_answer(&api, &id, wait).await
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
        .outcome(WriteOutcome::NotApplied)
        .retry_after(mapping::RETRY_AFTER_S),
    }
}

/// There is no such job here.
pub fn unknown_job(id: &str) -> Problem {
    let id: String = id.chars().take(64).collect();
    let detail = format!(
        "There is no job {id:?} on this node. A drain, a failover and a compaction are known to the node that runs them alone: \
         ask it, or add ?node=NAME. They end with its process. If it has restarted since, look at GET /v1/admin/cluster \
         for what is, and order again what is still wanted."
    );
    Problem::new(Kind::NotFound, detail).with("name", id)
}

/// What this node keeps of the changes of the members cannot be read.
pub fn unreadable(why: &str) -> Problem {
    let detail = format!("The changes of the members cannot be read on this node ({why}). Ask another one.");
    Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S)
}

/// The answer of another member to the same question or order.
pub async fn pass_on(
    api: &Api,
    asked: &Asked,
    node: &str,
    method: Method,
    body: hyper::body::Bytes,
) -> Result<Response, Problem> {
    let Some(addr) = api.node.http_addr_of(node) else {
        let names = api.node.other_names().join(", ");
        let detail = format!("There is no member {node:?} with a known HTTP address. The other members are {names}.");
        return Err(Problem::new(Kind::NotFound, detail).with("name", node));
    };
    let is_order = method != Method::GET;
    let answer = elsewhere::pass_on(api, asked, &addr, method, body).await;
    answer.map_err(|no_answer| no_answer_problem(node, &addr, is_order, &no_answer))
}

fn no_answer_problem(node: &str, addr: &str, is_order: bool, no_answer: &NoAnswer) -> Problem {
    match no_answer {
        NoAnswer::Unknown(why) if is_order => flows::unknown(
            format!(
                "{node} at {addr} was given this order and gave no answer ({why}). Whether it has begun is not known: look \
                 at GET /v1/admin/jobs?node={node} and at GET /v1/admin/cluster before you repeat it."
            ),
            None,
        ),
        NoAnswer::NotSent(why) | NoAnswer::Unknown(why) => {
            let nothing = if is_order { " Nothing was changed." } else { "" };
            let detail = format!("{node} at {addr} gave no answer ({why}). Ask it directly.{nothing}");
            let problem = Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S);
            if is_order { problem.outcome(WriteOutcome::NotApplied) } else { problem }
        }
    }
}

/// The id in the path, and the node that the query names when it is another one.
fn job_of(
    api: &Api,
    path: Result<Path<String>, PathRejection>,
    query: Option<&str>,
) -> Result<(String, Option<String>), Problem> {
    let Path(id) = path.map_err(|_| Problem::new(Kind::InvalidId, "The path does not end in the id of a job."))?;
    Ok((id, node_of(api, query)?))
}

fn node_of(api: &Api, query: Option<&str>) -> Result<Option<String>, Problem> {
    let mut params = Params::parse(query)?;
    let node = params.text("node")?;
    params.finish()?;
    Ok(node.filter(|node| node != api.node.name()))
}

/// The jobs of a node, the newest first: what goes on, and what has ended since the process began; and the changes of
/// the members, which every node knows. Each node knows its own of the others.
#[utoipa::path(get, path = "/v1/admin/jobs", tag = "admin",
    params(("node" = Option<String>, Query, description = "Name of the node; default: the one that is asked")),
    responses((status = 200, description = "The jobs", body = schema::JobsAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn jobs(State(api): State<Arc<Api>>, RawQuery(query): RawQuery, asked: Asked) -> Result<Response, Problem> {
    if let Some(node) = node_of(&api, query.as_deref())? {
        return pass_on(&api, &asked, &node, Method::GET, Default::default()).await;
    }
    let mut jobs = api.node.all_jobs();
    // A node whose tree is damaged still shows how it is cured.
    let not_read = match api.node.cluster_jobs().await {
        Ok(of_cluster) => {
            jobs.extend(of_cluster);
            None
        }
        Err(why) => Some(unreadable(&why).detail().to_owned()),
    };
    jobs.sort_by_key(|job| std::cmp::Reverse(job.began_unix_ms));
    Ok(Json(json!({"node": api.node.name(), "jobs": jobs, "not_read": not_read})).into_response())
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
    let (id, node) = job_of(&api, path, query.as_deref())?;
    if let Some(node) = node {
        return pass_on(&api, &asked, &node, Method::GET, Default::default()).await;
    }
    let job = match id.as_str() {
        "current" => api.node.jobs().current().or_else(|| api.node.flows().board.current()),
        id => api.node.job(id),
    };
    if let Some(job) = job {
        return Ok(Json(job).into_response());
    }
    let known = api.node.cluster_job(&id).await;
    // How far its step is, the leader knows best; and a node without a state knows nothing.
    let is_over = matches!(&known, Ok(Some(job)) if job.state.is_over());
    if !is_over
        && !asked.was_passed_on()
        && let Some(leader) = api.node.leader_elsewhere()
        && let Ok(answer) = pass_on(&api, &asked, &leader, Method::GET, Default::default()).await
        && answer.status().is_success()
    {
        return Ok(answer);
    }
    let known = known.map_err(|why| unreadable(&why))?;
    Ok(Json(known.ok_or_else(|| unknown_job(&id))?).into_response())
}

/// Has the leader cancel a change of the members.
async fn cancel_members(api: &Api, asked: &Asked, id: &str) -> Result<Response, Problem> {
    flows::at_leader(api, asked, Method::DELETE, Default::default(), || cancel_members_here(api, id)).await
}

async fn cancel_members_here(api: &Api, id: &str) -> Result<Result<Response, Problem>, Option<String>> {
    let known = match api.node.cluster_job(id).await {
        Ok(known) => known,
        Err(why) => return Ok(Err(unreadable(&why))),
    };
    match known {
        Some(job) if job.state == JobState::Cancelled => return Ok(Ok(Json(job).into_response())),
        Some(job) if job.state.is_over() => {
            let detail = format!("The {} has ended already: {}.", job.kind, job.detail);
            return Ok(Err(Problem::new(Kind::FlowRefused, detail).with("job", job.id)));
        }
        known => match api.node.cancel_members(id).await {
            Ok(()) => {}
            Err(NotUndone::NotLeader(leader)) => return Err(leader),
            Err(NotUndone::OutcomeUnknown(why)) => {
                let detail =
                    format!("Whether it is being cancelled is not known ({why}); repeat this, which does no harm.");
                return Ok(Err(flows::unknown(detail, Some(id.to_owned()))));
            }
            Err(NotUndone::No(_)) if known.is_none() => return Ok(Err(unknown_job(id))),
            Err(NotUndone::No(why)) => {
                let detail = format!("It cannot be taken back: {why}.");
                return Ok(Err(Problem::new(Kind::FlowRefused, detail).with("job", id)));
            }
        },
    }
    let job = match timeout(flows::WAIT_MAX, api.node.wait_cluster_job(id)).await {
        Ok(Ok(Some(job))) => Ok(Some(job)),
        _ => api.node.cluster_job(id).await,
    };
    let job = job.map_err(|why| unreadable(&why)).and_then(|job| job.ok_or_else(|| unknown_job(id)));
    Ok(job.map(|job| {
        let status = if job.state.is_over() { StatusCode::OK } else { StatusCode::ACCEPTED };
        (status, Json(job)).into_response()
    }))
}

/// Cancels a job where that is safe: what it has done is undone. A drain can be cancelled until it is finished;
/// afterwards undrain the node. A change of the members can be cancelled until the voters change. A transfer of leadership, a rebuild and a
/// compaction cannot be taken back.
#[utoipa::path(delete, path = "/v1/admin/jobs/{id}", tag = "admin",
    params(("id" = String, Path, description = "The id that its beginning answered"),
        ("node" = Option<String>, Query, description = "Name of the node it runs on; default: the one that is asked")),
    responses((status = 200, description = "Cancelled", body = schema::JobAnswer),
        (status = 202, description = "It ends after the step that it is in", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn cancel(
    State(api): State<Arc<Api>>,
    path: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
    asked: Asked,
) -> Result<Response, Problem> {
    let (id, node) = job_of(&api, path, query.as_deref())?;
    if let Some(node) = node {
        return pass_on(&api, &asked, &node, Method::DELETE, Default::default()).await;
    }
    let cancelled = match api.node.jobs().job(&id) {
        Some(job) if job.state.is_over() => Err(NotCancelled::Over(Box::new(job))),
        Some(job) => Err(NotCancelled::Unsafe(Box::new(job))),
        None => match api.node.flows().board.cancel(&id) {
            Err(NotCancelled::Unknown) => api.node.flows().compactions.cancel(&id),
            of_a_flow => of_a_flow,
        },
    };
    match cancelled {
        Ok(_) => {
            let ended = timeout(flows::WAIT_MAX, api.node.wait_job(&id)).await.ok().flatten();
            let job = ended.or_else(|| api.node.job(&id)).ok_or_else(|| unknown_job(&id))?;
            let status = if job.state.is_over() { StatusCode::OK } else { StatusCode::ACCEPTED };
            Ok((status, Json(job)).into_response())
        }
        Err(NotCancelled::Unknown) => cancel_members(&api, &asked, &id).await,
        Err(NotCancelled::Over(job)) => {
            let undo = if job.kind == "drain" { " To undo a drain: POST /v1/admin/node/undrain." } else { "" };
            let detail = format!("The {} has ended already: {}.{undo}", job.kind, job.detail);
            Err(Problem::new(Kind::FlowRefused, detail).with("job", job.id))
        }
        Err(NotCancelled::Unsafe(job)) => {
            let detail =
                format!("The {} is at \"{}\" and cannot be taken back; it ends by itself.", job.kind, job.step);
            Err(Problem::new(Kind::FlowRefused, detail).with("job", job.id))
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_that_may_have_arrived_is_told_apart_from_one_that_was_never_sent() {
        let (sent, never) = (NoAnswer::Unknown("reset".into()), NoAnswer::NotSent("refused".into()));
        let of = |is_order, no_answer| {
            let problem = no_answer_problem("node-2", "h:1", is_order, no_answer);
            (problem.kind(), problem.write_outcome(), problem.detail().contains("Nothing was changed"))
        };
        assert_eq!(of(true, &sent), (Kind::OrderUnknown, Some(WriteOutcome::Unknown), false));
        assert_eq!(of(true, &never), (Kind::Unavailable, Some(WriteOutcome::NotApplied), true));
        assert_eq!(of(false, &sent), (Kind::Unavailable, None, false), "a question changes nothing");
    }
}
