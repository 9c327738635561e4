//! The reads: `query`, `assertions/{id}`, `history`.
//!
//! Parameters are read strictly, the node gives a view of the wished freshness, and the store is
//! asked on a blocking thread: a disk that hangs holds up that thread and no heartbeat. The number
//! of such threads is bounded, and a read that gets none in time says so.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Path, RawQuery, State, rejection::PathRejection},
    http::{Uri, header},
    response::Response,
};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::{
    model::{Resolve, path},
    node::Consistency,
    store_helpers::{
        AsOf, AssertionView, HistoryEvent, HistoryQuery, HistoryTarget, LIMIT_DEFAULT, LIMIT_MAX, Query, StoreView,
    },
};

use super::{
    Api,
    elsewhere::{self, Asked},
    headers, mapping,
    params::{Params, invalid},
    problem::{Kind, Problem},
    schema, time,
};

/// How long a read waits at a node that has started and not caught up, before another one is asked: far above what it
/// takes when the log alone is to be applied, and below what a client notices.
const BEHIND_PATIENCE: Duration = Duration::from_millis(500);

/// Pause before a read that has found no answer anywhere begins anew: a part of an election.
const PAUSE: Duration = Duration::from_millis(20);

const LEVELS: &[(&str, Level)] =
    &[("linearizable", Level::Linearizable), ("lease", Level::Lease), ("stale", Level::Stale)];

#[derive(Clone, Copy, PartialEq)]
enum Level {
    Linearizable,
    Lease,
    Stale,
}

/// Takes `consistency` and `max_staleness_ms`.
fn consistency(params: &mut Params) -> Result<Consistency, Problem> {
    let level = params.choice("consistency", LEVELS)?.unwrap_or(Level::Linearizable);
    let max_staleness_ms = params.parsed("max_staleness_ms", "a count of milliseconds")?;
    match (level, max_staleness_ms) {
        (Level::Stale, max_staleness_ms) => Ok(Consistency::Stale { max_staleness_ms }),
        (_, Some(_)) => Err(invalid("max_staleness_ms", "is for consistency=stale; leave it out or ask for that")),
        (Level::Linearizable, None) => Ok(Consistency::Linearizable),
        (Level::Lease, None) => Ok(Consistency::Lease),
    }
}

fn concept_path(params: &mut Params) -> Result<(String, bool), Problem> {
    let text = params.text("concept_path")?;
    let text = text.ok_or_else(|| invalid("concept_path", "is required"))?;
    let (path, subtree) = path::parse_query(&text).map_err(|broken| invalid("concept_path", broken))?;
    Ok((path.to_string(), subtree))
}

fn limit(params: &mut Params) -> Result<usize, Problem> {
    let limit = params.parsed::<NonZeroUsize>("limit", "a number from 1 to 1000")?;
    match limit.map_or(LIMIT_DEFAULT, NonZeroUsize::get) {
        limit if limit <= LIMIT_MAX => Ok(limit),
        limit => {
            let what = format_args!("must be a number from 1 to {LIMIT_MAX} and is {limit}");
            Err(invalid("limit", what).with_limit(LIMIT_MAX as u64, limit as u64))
        }
    }
}

/// An index (digits only) or a time.
fn as_of(params: &mut Params) -> Result<Option<AsOf>, Problem> {
    let Some(text) = params.text("as_of")? else { return Ok(None) };
    if let Ok(index) = text.parse() {
        return Ok(Some(AsOf::Index(index)));
    }
    let refuse = || {
        let what = format_args!("must be an index or an RFC 3339 time and is \"{text}\"");
        invalid("as_of", what)
    };
    let ms = time::parse_rfc3339(&text).map_err(|_| refuse())?;
    Ok(Some(AsOf::TimeMs(u64::try_from(ms).map_err(|_| refuse())?)))
}

fn valid_at(params: &mut Params) -> Result<Option<i64>, Problem> {
    let Some(text) = params.text("valid_at")? else { return Ok(None) };
    let ms = match text.parse::<i64>() {
        Ok(ms) => time::check_unix_ms(ms),
        Err(_) => time::parse_rfc3339(&text),
    };
    ms.map(Some).map_err(|_| {
        let what = format_args!("must be an RFC 3339 time or Unix milliseconds and is \"{text}\"");
        invalid("valid_at", what)
    })
}

/// The parameters of `GET /v1/query`.
fn query_params(raw: Option<&str>) -> Result<(Query, Consistency), Problem> {
    let mut params = Params::parse(raw)?;
    let (concept_path, subtree) = concept_path(&mut params)?;
    let query = Query {
        concept_path,
        subtree,
        predicate: params.text("predicate")?,
        resolve: params.parsed::<Resolve>("resolve", "one of latest, votes, confidence, all")?.unwrap_or_default(),
        epoch: params.text("epoch")?,
        as_of: as_of(&mut params)?,
        valid_at_ms: valid_at(&mut params)?,
        limit: limit(&mut params)?,
        cursor: params.text("cursor")?,
    };
    let consistency = consistency(&mut params)?;
    params.finish()?;
    Ok((query, consistency))
}

#[derive(Serialize)]
struct QueryAnswer<'a> {
    assertions: &'a [AssertionView],
    index: u64,
    served_by: &'a str,
    cursor: Option<&'a str>,
}

/// Assertions about a concept or a subtree, one per concept and predicate unless `resolve=all`.
#[utoipa::path(get, path = "/v1/query", tag = "reads",
    params(schema::QueryParams, schema::ConsistencyParams),
    responses((status = 200, description = "A page of assertions", body = schema::QueryAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn query(State(api): State<Arc<Api>>, RawQuery(raw): RawQuery, asked: Asked) -> Result<Response, Problem> {
    let (query, consistency) = query_params(raw.as_deref())?;
    let name = api.node.name().to_string();
    read(&api, &asked, consistency, move |view| {
        let page = view.query(&query).map_err(mapping::store_error)?;
        let answer = QueryAnswer {
            assertions: &page.assertions,
            index: page.index,
            served_by: &name,
            cursor: page.cursor.as_deref(),
        };
        Ok((page.index, json(&answer)?))
    })
    .await
}

/// One assertion by its id, superseded or not.
#[utoipa::path(get, path = "/v1/assertions/{id}", tag = "reads",
    params(("id" = String, Path, format = "uuid", description = "Id of the assertion"), schema::ConsistencyParams),
    responses((status = 200, description = "The assertion", body = schema::Assertion),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn assertion(
    State(api): State<Arc<Api>>,
    path: Result<Path<String>, PathRejection>,
    RawQuery(raw): RawQuery,
    uri: Uri,
    asked: Asked,
) -> Result<Response, Problem> {
    let given = path.map_or_else(|_| uri.path().to_string(), |Path(text)| text);
    let id: Uuid = given
        .parse()
        .map_err(|_| Problem::new(Kind::InvalidId, format!("\"{given}\" is not the id of an assertion, a UUID.")))?;
    let mut params = Params::parse(raw.as_deref())?;
    let consistency = consistency(&mut params)?;
    params.finish()?;
    read(&api, &asked, consistency, move |view| match view.assertion(id).map_err(mapping::store_error)? {
        Some(assertion) => Ok((view.fact_index(), json(&assertion)?)),
        None => Err(Problem::new(Kind::NotFound, format!("There is no assertion \"{id}\"."))),
    })
    .await
}

/// The parameters of `GET /v1/history`: a concept, with a predicate or not, or one assertion.
fn history_params(raw: Option<&str>) -> Result<(HistoryQuery, Consistency), Problem> {
    let mut params = Params::parse(raw)?;
    let target = match params.parsed("assertion_id", "the id of an assertion, a UUID")? {
        Some(id) => HistoryTarget::Assertion(id),
        None => {
            let (path, subtree) = concept_path(&mut params)?;
            if subtree {
                return Err(invalid("concept_path", "must name one concept; /** is for /v1/query"));
            }
            HistoryTarget::Concept { path, predicate: params.text("predicate")? }
        }
    };
    let limit = limit(&mut params)?;
    let history = HistoryQuery { target, limit, cursor: params.text("cursor")? };
    let consistency = consistency(&mut params)?;
    params.finish()?;
    Ok((history, consistency))
}

#[derive(Serialize)]
struct HistoryAnswer<'a> {
    events: &'a [HistoryEvent],
    index: u64,
    served_by: &'a str,
    cursor: Option<&'a str>,
}

/// Every fact about a concept or an assertion, oldest first: assertions, votes, supersessions.
#[utoipa::path(get, path = "/v1/history", tag = "reads",
    params(schema::HistoryParams, schema::ConsistencyParams),
    responses((status = 200, description = "A page of facts", body = schema::HistoryAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn history(State(api): State<Arc<Api>>, RawQuery(raw): RawQuery, asked: Asked) -> Result<Response, Problem> {
    let (history, consistency) = history_params(raw.as_deref())?;
    let name = api.node.name().to_string();
    read(&api, &asked, consistency, move |view| {
        let page = view.history(&history).map_err(mapping::store_error)?;
        let answer =
            HistoryAnswer { events: &page.events, index: page.index, served_by: &name, cursor: page.cursor.as_deref() };
        Ok((page.index, json(&answer)?))
    })
    .await
}

/// `value` as JSON text.
pub fn json(value: &impl Serialize) -> Result<Vec<u8>, Problem> {
    serde_json::to_vec(value).map_err(|error| {
        tracing::error!(%error, "an answer could not be written");
        Problem::new(Kind::Internal, "The node could not write its answer; its log says more.")
    })
}

/// A node that was removed answers nothing any more.
pub fn refuse_removed(api: &Api) -> Result<(), Problem> {
    match api.node.refuses() {
        None => Ok(()),
        Some(why) => Err(Problem::new(Kind::NodeRemoved, format!("{why}. Ask a member; nothing was written here."))),
    }
}

/// Gets a view of the wished freshness and answers with what `ask` makes of it: the index of the
/// state it read, and JSON text. What this node cannot answer is asked of others.
///
/// While the leader is out of reach and another node has a way to it, nothing new arrives here, and linearizable reads go
/// to that node. Without any way they wait, as for an election, except those of a load balancer: it can ask elsewhere.
///
/// While this node fails, is rebuilt and comes back, what has no answer here and elsewhere in one moment has one in the
/// next: the read begins anew then, until its deadline.
pub async fn read(
    api: &Api,
    asked: &Asked,
    consistency: Consistency,
    ask: impl Fn(StoreView) -> Result<(u64, Vec<u8>), Problem> + Send + Sync + 'static,
) -> Result<Response, Problem> {
    refuse_removed(api)?;
    let deadline = Instant::now() + api.request_deadline;
    let ask = Arc::new(ask);
    let is_fresh = !matches!(consistency, Consistency::Stale { .. });
    loop {
        let taken = api.node.take();
        let here = async {
            let view = taken.read(consistency, deadline).await.map_err(mapping::read_error)?;
            let ask = Arc::clone(&ask);
            ask_store(api, deadline, move || ask(view)).await
        };
        // With whether this node gave up on its own answer for now: what it says a moment later does not count.
        let (answered, gave_up) = tokio::select! {
            biased;
            // Also while a thread waits for the disk: nobody knows when that ends.
            why = taken.wait_silent(), if !asked.was_passed_on() => (Err(silent(&why)), true),
            answered = here => (answered, false),
            () = taken.stays_behind(BEHIND_PATIENCE), if !asked.was_passed_on() => (Err(behind()), true),
            () = taken.wait_bypassed(), if is_fresh && !asked.was_passed_on() => (Err(bypassed()), true),
            why = taken.wait_cut_off(), if is_fresh && asked.is_balanced() => return Err(cut_off(&why)),
        };
        let problem = match answered {
            Ok((index, body)) => return Ok(answer(api, index, body)),
            Err(problem) => problem,
        };
        let passes = gave_up || taken.silent().is_some() || taken.is_behind() || taken.is_bypassed();
        if !is_of_this_node(&problem, passes) {
            return Err(problem);
        }
        if let Some(answer) = elsewhere::ask(api, asked, deadline).await {
            return Ok(answer);
        }
        // A node that was asked in place of another one leaves it to that one to go on.
        let goes_on = if asked.was_passed_on() { taken.is_replaced() } else { passes || taken.silent().is_some() };
        if !goes_on || Instant::now() + PAUSE >= deadline {
            return Err(problem);
        }
        drop(taken);
        tokio::time::sleep(PAUSE).await;
    }
}

fn answer(api: &Api, index: u64, body: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, headers::JSON);
    headers::stamp(headers, index, api.node.name());
    response
}

fn silent(why: &str) -> Problem {
    let detail = format!("This node answers nothing by itself ({why}), and no other node answered in its place.");
    Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S)
}

fn bypassed() -> Problem {
    let detail = "This node does not reach the leader, and no other node answered in its place.";
    Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S)
}

fn cut_off(why: &str) -> Problem {
    let detail = format!("This node cannot confirm what is newest: {why}. Ask another node.");
    Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S).try_elsewhere()
}

fn behind() -> Problem {
    let detail = "This node has not caught up with what was committed when it started, and no other node answered in its \
                  place.";
    Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S)
}

/// Whether another node may well have an answer. `passes`: this node fails, comes back, catches up or is bypassed.
fn is_of_this_node(problem: &Problem, passes: bool) -> bool {
    match problem.kind() {
        Kind::StorageDamaged => true,
        Kind::Unavailable | Kind::TooStale => passes,
        _ => false,
    }
}

/// Runs `ask` on a blocking thread, a bounded number at a time, and waits for it until `deadline`.
/// A thread that hangs in the kernel keeps its permit: it is not free.
pub async fn ask_store<T: Send + 'static>(
    api: &Api,
    deadline: Instant,
    ask: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let answer = async {
        let Ok(permit) = Arc::clone(&api.reads).acquire_owned().await else {
            return Err(Problem::new(Kind::Unavailable, "The node is stopping.").retry_after(mapping::RETRY_AFTER_S));
        };
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            ask()
        });
        task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a read panicked");
            let detail = "Reading failed on this node, whose log says more. Ask another node.";
            Err(Problem::new(Kind::Internal, detail))
        })
    };
    timeout_at(deadline, answer).await.unwrap_or_else(|_| {
        let detail = format!(
            "The read did not finish within {} ms; the disk of this node may be slow. Ask another \
             node, or for less.",
            api.request_deadline.as_millis()
        );
        Err(Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn a_query_has_defaults() {
        let (query, consistency) = query_params(Some("concept_path=a%2Fb")).unwrap();
        assert_eq!((query.concept_path.as_str(), query.subtree), ("a/b", false));
        assert_eq!((query.resolve, query.limit), (Resolve::Latest, 100));
        assert_eq!(consistency, Consistency::Linearizable);
    }

    #[test]
    fn every_parameter_is_taken() {
        let (query, consistency) = query_params(Some(
            "concept_path=a/b/**&predicate=p&resolve=votes&epoch=e&as_of=7&valid_at=9&limit=1000\
             &cursor=c&consistency=stale&max_staleness_ms=5",
        ))
        .unwrap();
        assert_eq!((query.concept_path.as_str(), query.subtree), ("a/b", true));
        assert_eq!((query.as_of, query.valid_at_ms), (Some(AsOf::Index(7)), Some(9)));
        assert_eq!((query.resolve, query.limit), (Resolve::Votes, 1000));
        assert_eq!(consistency, Consistency::Stale { max_staleness_ms: Some(5) });
        let (query, _) = query_params(Some("concept_path=a&as_of=1970-01-01T00:00:01Z")).unwrap();
        assert_eq!(query.as_of, Some(AsOf::TimeMs(1000)));
    }

    #[test]
    fn bad_parameters_are_400_and_named() {
        for (query, name) in [
            ("", "concept_path"),
            ("concept_path=", "concept_path"),
            ("concept_path=/a", "concept_path"),
            ("concept_path=**", "concept_path"),
            ("concept_path=a/*", "concept_path"),
            ("concept_path=a&limit=0", "limit"),
            ("concept_path=a&limit=1001", "limit"),
            ("concept_path=a&limit=x", "limit"),
            ("concept_path=a&resolve=best", "resolve"),
            ("concept_path=a&as_of=-1", "as_of"),
            ("concept_path=a&as_of=1960-01-01T00:00:00Z", "as_of"),
            ("concept_path=a&valid_at=x", "valid_at"),
            ("concept_path=a&consistency=strong", "consistency"),
            ("concept_path=a&max_staleness_ms=5", "max_staleness_ms"),
            ("concept_path=a&consistency=lease&max_staleness_ms=5", "max_staleness_ms"),
            ("concept_path=a&consistency=stale&max_staleness_ms=x", "max_staleness_ms"),
            ("concept_path=a&concept_path=b", "concept_path"),
            ("concept_path=a&wrong=1", "wrong"),
        ] {
            let Err(problem) = query_params(Some(query)) else { panic!("{query} was taken") };
            assert_eq!(problem.status(), 400, "{query}");
            assert_eq!(problem.member("parameter").unwrap(), name, "{query}");
        }
        for query in ["", "concept_path=a/**", "assertion_id=x", "assertion_id=&concept_path=a"] {
            assert_eq!(history_params(Some(query)).unwrap_err().status(), 400, "{query}");
        }
        assert!(history_params(Some("concept_path=a&limit=5&predicate=p")).is_ok());
        let id = "assertion_id=0198c0de-0000-7000-8000-000000000000";
        assert!(history_params(Some(id)).is_ok());
        assert!(history_params(Some(&format!("{id}&concept_path=a"))).is_err());
    }
}
