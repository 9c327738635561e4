//! Members: who there is, and orders that change it.
//!
//! Any node takes an order and passes it on to the leader. What comes of it is a job of the whole cluster: every node
//! can tell of it, whichever took the order and whichever leads by now.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Path, RawQuery, Request, State, rejection::PathRejection},
    http::Method,
    response::{IntoResponse, Response},
};
use hyper::body::Bytes;
use serde::de::MapAccess;
use serde_json::json;
use tokio::time::timeout;

use crate::{
    config,
    node::{MemberError, MemberOrder, Ordered},
};

use super::{
    Api,
    elsewhere::Asked,
    flows::{self, SWITCH, at_leader, body_of, not_leader},
    jobs,
    json::{self, Fields},
    params::Params,
    problem::{Kind, Problem},
    schema,
};

/// How long the leader is asked how far a change is, before this node answers what it knows itself.
const LEADER_MAX: Duration = Duration::from_secs(2);

#[derive(Default)]
struct AddBody {
    name: String,
    addr: String,
    http: Option<String>,
    learner: Option<bool>,
}

impl<'de> Fields<'de> for AddBody {
    const WHAT: &'static str = "A new member";
    const NAMES: &'static [&'static str] = &["name", "addr", "http", "learner"];
    const REQUIRED: usize = 2;
    fn read<A: MapAccess<'de>>(&mut self, field: usize, map: &mut A) -> Result<(), A::Error> {
        match field {
            0 => self.name = map.next_value()?,
            1 => self.addr = map.next_value()?,
            2 => self.http = map.next_value()?,
            _ => self.learner = map.next_value()?,
        }
        Ok(())
    }
}

#[derive(Default)]
struct ReplaceBody {
    name: String,
    addr: String,
    http: Option<String>,
}

impl<'de> Fields<'de> for ReplaceBody {
    const WHAT: &'static str = "A replacement";
    const NAMES: &'static [&'static str] = &["name", "addr", "http"];
    const REQUIRED: usize = 2;
    fn read<A: MapAccess<'de>>(&mut self, field: usize, map: &mut A) -> Result<(), A::Error> {
        match field {
            0 => self.name = map.next_value()?,
            1 => self.addr = map.next_value()?,
            _ => self.http = map.next_value()?,
        }
        Ok(())
    }
}

fn checked(name: &str, addr: &str, http: Option<&str>) -> Result<(), Problem> {
    if !config::is_node_name(name) {
        let detail = format!(
            "{:?} is no name of a node: lower-case letters, digits, \"-\", \"_\" and \".\", beginning with a letter or digit.",
            name.chars().take(64).collect::<String>()
        );
        return Err(Problem::new(Kind::InvalidField, detail).with("field", "name"));
    }
    for (field, address) in [("addr", Some(addr)), ("http", http)] {
        let Some(address) = address.filter(|address| !config::is_address(address)) else { continue };
        let shown: String = address.chars().take(64).collect();
        let detail = format!("{shown:?} is not host:port with a port above 0.");
        return Err(Problem::new(Kind::InvalidField, detail).with("field", field));
    }
    if http == Some(addr) {
        let detail = "Both addresses are the same: one is of the listener for nodes, the other of that for clients.";
        return Err(Problem::new(Kind::InvalidField, detail).with("field", "http"));
    }
    Ok(())
}

/// `wait`, `force` and `dry_run`.
struct How {
    wait: bool,
    forced: bool,
    dry_run: bool,
}

fn how(query: Option<&str>) -> Result<How, Problem> {
    let mut params = Params::parse(query)?;
    let wait = params.choice("wait", SWITCH)?.unwrap_or(true);
    let forced = params.choice("force", SWITCH)?.unwrap_or(false);
    let dry_run = params.choice("dry_run", SWITCH)?.unwrap_or(false);
    params.finish()?;
    Ok(How { wait, forced, dry_run })
}

fn name_of(path: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    let Path(name) = path.map_err(|_| Problem::new(Kind::InvalidId, "The path does not name a node."))?;
    Ok(name)
}

/// The members, and the change of them that goes on.
#[utoipa::path(get, path = "/v1/admin/members", tag = "admin",
    responses((status = 200, description = "The members", body = schema::MembersAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn list(State(api): State<Arc<Api>>, asked: Asked) -> Result<Response, Problem> {
    let change = api.node.cluster_jobs().await.map_err(|why| jobs::unreadable(&why))?;
    let change = change.into_iter().find(|job| !job.state.is_over());
    // How far it is, the leader knows best.
    if change.is_some()
        && !asked.was_passed_on()
        && let Some(leader) = api.node.leader_elsewhere()
        && let Ok(Ok(answer)) =
            timeout(LEADER_MAX, jobs::pass_on(&api, &asked, &leader, Method::GET, Bytes::new())).await
        && answer.status().is_success()
    {
        return Ok(answer);
    }
    let cluster = api.node.cluster().await;
    let voters = cluster.members.iter().filter(|member| member.voter).count();
    let needed = voters / 2 + 1;
    Ok(Json(json!({
        "leader": cluster.leader, "term": cluster.term, "voters": voters, "needed": needed,
        "members": cluster.members, "change": change,
    }))
    .into_response())
}

/// Adds a node: it fetches a checkpoint, receives the log as a learner, and votes once it has caught up. It has to run
/// already, with an empty folder and a configuration that lists it and members.
#[utoipa::path(post, path = "/v1/admin/members", tag = "admin", request_body = schema::MemberAdd,
    params(("wait" = Option<bool>, Query, description = "false: answer 202 and the job's address once it has begun"),
        ("dry_run" = Option<bool>, Query, description = "true: only say what it would do to fault tolerance"),
        ("force" = Option<bool>, Query, description = "No effect here")),
    responses((status = 200, description = "A member; or the plan", body = schema::JobAnswer),
        (status = 202, description = "Under way; `Location` says where to look", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn add(
    State(api): State<Arc<Api>>,
    RawQuery(query): RawQuery,
    asked: Asked,
    request: Request,
) -> Result<Response, Problem> {
    let how = how(query.as_deref())?;
    let bytes = body_of(&api, request).await?;
    let AddBody { name, addr, http, learner } = json::parse_object(&bytes)?;
    checked(&name, &addr, http.as_deref())?;
    let order = MemberOrder::Add { name, addr, http, learner: learner.unwrap_or(false) };
    take(&api, &asked, Method::POST, bytes, order, how).await
}

/// Removes a node. A leader gives leadership away first. The removed node ends its part in the cluster for good.
#[utoipa::path(delete, path = "/v1/admin/members/{name}", tag = "admin",
    params(("name" = String, Path, description = "Name of the node"),
        ("wait" = Option<bool>, Query, description = "false: answer 202 and the job's address once it has begun"),
        ("dry_run" = Option<bool>, Query, description = "true: only say what it would do to fault tolerance"),
        ("force" = Option<bool>, Query,
            description = "true: also when no further failure could be tolerated afterwards; a quorum is never given away")),
    responses((status = 200, description = "No member any more; or the plan", body = schema::JobAnswer),
        (status = 202, description = "Under way; `Location` says where to look", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn remove(
    State(api): State<Arc<Api>>,
    path: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
    asked: Asked,
) -> Result<Response, Problem> {
    let how = how(query.as_deref())?;
    let order = MemberOrder::Remove { name: name_of(path)? };
    take(&api, &asked, Method::DELETE, Bytes::new(), order, how).await
}

/// Replaces a node, dead or alive, by an empty one: the new one comes as a learner, and once it has caught up one change
/// lets it in and the old one out.
#[utoipa::path(post, path = "/v1/admin/members/{name}/replace", tag = "admin", request_body = schema::MemberReplace,
    params(("name" = String, Path, description = "Name of the node that leaves"),
        ("wait" = Option<bool>, Query, description = "false: answer 202 and the job's address once it has begun"),
        ("dry_run" = Option<bool>, Query, description = "true: only say what it would do to fault tolerance"),
        ("force" = Option<bool>, Query, description = "No effect here")),
    responses((status = 200, description = "Replaced; or the plan", body = schema::JobAnswer),
        (status = 202, description = "Under way; `Location` says where to look", body = schema::JobAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn replace(
    State(api): State<Arc<Api>>,
    path: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
    asked: Asked,
    request: Request,
) -> Result<Response, Problem> {
    let how = how(query.as_deref())?;
    let old = name_of(path)?;
    let bytes = body_of(&api, request).await?;
    let ReplaceBody { name, addr, http } = json::parse_object(&bytes)?;
    checked(&name, &addr, http.as_deref())?;
    take(&api, &asked, Method::POST, bytes, MemberOrder::Replace { old, name, addr, http }, how).await
}

async fn take(
    api: &Api,
    asked: &Asked,
    method: Method,
    bytes: Bytes,
    order: MemberOrder,
    how: How,
) -> Result<Response, Problem> {
    let How { wait, forced, dry_run } = how;
    at_leader(api, asked, method, bytes, || take_here(api, order.clone(), forced, dry_run, wait)).await
}

/// The error is the name of the node that leads, as far as it is known.
async fn take_here(
    api: &Api,
    order: MemberOrder,
    forced: bool,
    dry_run: bool,
    wait: bool,
) -> Result<Result<Response, Problem>, Option<String>> {
    match api.node.order_members(order, forced, dry_run).await {
        Ok(Ordered::Begun(id)) => Ok(flows::job_answer(api, &id, wait).await),
        Ok(Ordered::Plan(plan)) => Ok(Ok(Json(plan).into_response())),
        Err(MemberError::NotLeader(leader)) => Err(leader),
        Err(error) => Ok(Err(problem(error))),
    }
}

/// An order that was not taken, as a problem that says what to do.
fn problem(error: MemberError) -> Problem {
    match error {
        MemberError::Busy(job) => {
            let (id, kind, node) = (&job.id, job.kind, &job.node);
            let detail = format!(
                "A {kind} of {node} goes on, and the members change one at a time. Wait for its end, or cancel it: GET and \
                 DELETE /v1/admin/jobs/{id}. Nothing was changed."
            );
            Problem::new(Kind::FlowUnderWay, detail).with("job", id.clone()).with("held_by", node.clone())
        }
        MemberError::Unknown { .. } => Problem::new(Kind::NotFound, format!("{error}. Nothing was changed.")),
        MemberError::Exists { ref what, ref by } => {
            let detail = format!(
                "{what} is taken: {by} is a member already. GET /v1/admin/members shows all. A node that has lost its \
                 files comes back under its own name by itself (stemedb rebuild). Nothing was changed."
            );
            Problem::new(Kind::MemberExists, detail).with("name", by.clone())
        }
        MemberError::Unreachable { .. } => {
            let detail = format!(
                "{error}. Start the node first, with an empty folder and with itself and members in cluster.peers; the \
                 address is that of its listener for nodes, not for clients. Nothing was changed."
            );
            Problem::new(Kind::MemberUnfit, detail)
        }
        MemberError::Unfit(why) => Problem::new(Kind::MemberUnfit, format!("{why}. Nothing was changed.")),
        MemberError::Unsafe { outlook, why, forcible } => {
            let outlook = *outlook;
            let advice = match forcible {
                true => "Add a node first, or repeat this with ?force=true",
                false => "Bring the others back, or add a node first",
            };
            Problem::new(Kind::FlowRefused, format!("{why}. {advice}. Nothing was changed."))
                .with("voters_now", outlook.voters_now)
                .with("voters_after", outlook.voters_after)
                .with("failures_now", outlook.failures_now)
                .with("failures_after", outlook.failures_after)
        }
        MemberError::Level { .. } => {
            let detail = format!(
                "{error}. Once nothing holds the level it rises by itself: upgrade what is older, and take out \
                 cluster.feature_level_max. Nothing was changed."
            );
            Problem::new(Kind::FeatureLevel, detail)
        }
        MemberError::OutcomeUnknown { job, why } => flows::unknown(
            format!(
                "The change of the members was proposed, and whether it has begun is not known ({why}). If it has, it goes on as \
                 job {job}: look at GET /v1/admin/jobs/{job} before you order anything again."
            ),
            Some(job),
        ),
        MemberError::Impossible(why) => Problem::new(Kind::FlowRefused, format!("It is not possible now: {why}.")),
        MemberError::NotLeader(leader) => not_leader(leader),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::api::problem::WriteOutcome;

    #[test]
    fn names_and_addresses_are_checked_before_anything_else() {
        checked("node-4", "10.0.0.4:18280", Some("10.0.0.4:18180")).unwrap();
        checked("node-4", "[::1]:18280", None).unwrap();
        for (name, addr, http, field) in [
            ("Node 4", "h:1", None, "name"),
            ("", "h:1", None, "name"),
            ("n", "h", None, "addr"),
            ("n", "h:0", None, "addr"),
            ("n", "h:1", Some("h"), "http"),
            ("n", "h:1", Some("h:1"), "http"),
        ] {
            let problem = checked(name, addr, http).unwrap_err();
            assert_eq!(problem.member("field").unwrap(), field, "{}", problem.detail());
        }
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        let unsafe_ = |forcible| MemberError::Unsafe { outlook: Default::default(), why: "because".into(), forcible };
        for (error, kind, words) in [
            (MemberError::Unknown { name: "x".into(), members: vec!["a".into()] }, Kind::NotFound, "the members are a"),
            (MemberError::Exists { what: "a".into(), by: "a".into() }, Kind::MemberExists, "stemedb rebuild"),
            (
                MemberError::Unreachable { addr: "h:1".into(), why: "refused".into() },
                Kind::MemberUnfit,
                "Start the node first",
            ),
            (unsafe_(true), Kind::FlowRefused, "force=true"),
            (unsafe_(false), Kind::FlowRefused, "Bring the others back"),
            (MemberError::NotLeader(None), Kind::NotLeader, "repeat it"),
            (
                MemberError::OutcomeUnknown { job: "7".into(), why: "no quorum".into() },
                Kind::OrderUnknown,
                "look at GET /v1/admin/jobs/7",
            ),
        ] {
            let problem = problem(error);
            assert_eq!(problem.kind(), kind);
            assert!(problem.detail().contains(words), "{}", problem.detail());
            // Nobody is told that nothing was changed where that is not known.
            let unknown = problem.kind() == Kind::OrderUnknown;
            assert_eq!(problem.write_outcome() == Some(WriteOutcome::Unknown), unknown);
            assert!(!unknown || !problem.detail().contains("Nothing was changed"), "{}", problem.detail());
        }
    }
}
