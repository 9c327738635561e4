//! The HTTP API: JSON over HTTP/1.1 on the client port.
//!
//! `server` accepts connections, `ROUTES` says what they may ask, one file per group of routes
//! answers. The way of a write through here is short on purpose: read the body, parse it once, hand
//! it to the node. Nothing here knows Raft; errors leave as problems (RFC 9457) and nothing else.

pub mod admin;
mod bodies;
pub mod compact;
mod connection;
mod elsewhere;
pub mod flows;
pub mod headers;
pub mod health;
pub mod jobs;
mod json;
pub mod limits;
mod mapping;
pub mod members;
pub mod metrics;
pub mod openapi;
mod params;
pub mod problem;
pub mod read;
mod schema;
pub mod server;
mod time;
mod value;
pub mod write;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    http::{Method, Uri},
    routing::{MethodRouter, delete, get, post},
};
use tokio::sync::Semaphore;

use crate::node::Node;
use limits::{BODIES_BYTES_MAX, BodyLimits, Budget, READS_MAX};
use problem::{Kind, Problem};

pub use server::serve;

/// What every handler can reach.
pub struct Api {
    node: Arc<Node>,
    body_limits: BodyLimits,
    budget: Arc<Budget>,
    reads: Arc<Semaphore>,
    scrapes: Arc<Semaphore>,
    passed_on: Semaphore,
    request_deadline: Duration,
    /// Commands that may wait on this node, for the `RateLimit-*` headers.
    commands_max: u64,
}

impl Api {
    fn new(node: Arc<Node>) -> Arc<Self> {
        let config = node.config();
        Arc::new(Api {
            body_limits: BodyLimits {
                body_bytes_max: config.http.body_bytes_max as u64,
                stall_timeout: Duration::from_millis(config.http.header_timeout_ms),
            },
            budget: Budget::new(BODIES_BYTES_MAX),
            reads: Arc::new(Semaphore::new(READS_MAX)),
            scrapes: Arc::new(Semaphore::new(1)),
            passed_on: Semaphore::new(elsewhere::PASSED_ON_MAX),
            request_deadline: Duration::from_millis(config.cluster.request_deadline_ms),
            commands_max: config.cluster.park_commands_max as u64,
            node,
        })
    }
}

/// A route: its pattern, its methods, and what answers. GET routes answer HEAD too; the health
/// routes promise it.
struct Route {
    path: &'static str,
    methods: &'static [&'static str],
    service: fn() -> MethodRouter<Arc<Api>>,
}

const POST: &[&str] = &["POST"];
const GET: &[&str] = &["GET"];
const GET_HEAD: &[&str] = &["GET", "HEAD"];
const GET_DELETE: &[&str] = &["GET", "DELETE"];
const GET_POST: &[&str] = &["GET", "POST"];
const DELETE: &[&str] = &["DELETE"];

/// Everything that is served. The router is made from this table, and the OpenAPI document is
/// compared with it.
const ROUTES: &[Route] = &[
    Route { path: "/v1/assert", methods: POST, service: || post(write::assert) },
    Route { path: "/v1/assert/batch", methods: POST, service: || post(write::assert_batch) },
    Route { path: "/v1/vote", methods: POST, service: || post(write::vote) },
    Route { path: "/v1/epoch", methods: POST, service: || post(write::epoch) },
    Route { path: "/v1/supersede", methods: POST, service: || post(write::supersede) },
    Route { path: "/v1/query", methods: GET, service: || get(read::query) },
    Route { path: "/v1/assertions/{id}", methods: GET, service: || get(read::assertion) },
    Route { path: "/v1/history", methods: GET, service: || get(read::history) },
    Route { path: "/v1/health", methods: GET_HEAD, service: || get(health::health) },
    Route { path: "/v1/health/live", methods: GET_HEAD, service: || get(health::live) },
    Route { path: "/v1/health/ready", methods: GET_HEAD, service: || get(health::ready) },
    Route { path: "/v1/health/leader", methods: GET_HEAD, service: || get(health::leader) },
    Route { path: "/v1/health/replica", methods: GET_HEAD, service: || get(health::replica) },
    Route { path: "/v1/admin/cluster", methods: GET, service: || get(admin::cluster) },
    Route { path: "/v1/admin/storage/stats", methods: GET, service: || get(admin::storage_stats) },
    Route { path: "/v1/admin/storage/compact", methods: POST, service: || post(compact::storage_compact) },
    Route { path: "/v1/admin/compact", methods: POST, service: || post(compact::compact) },
    Route { path: "/v1/admin/imports/{id}", methods: GET, service: || get(admin::import) },
    Route { path: "/v1/admin/node/rebuild", methods: POST, service: || post(jobs::rebuild) },
    Route { path: "/v1/admin/node/drain", methods: POST, service: || post(flows::drain) },
    Route { path: "/v1/admin/node/undrain", methods: POST, service: || post(flows::undrain) },
    Route { path: "/v1/admin/failover", methods: POST, service: || post(flows::failover) },
    Route { path: "/v1/admin/members", methods: GET_POST, service: || get(members::list).merge(post(members::add)) },
    Route { path: "/v1/admin/members/{name}", methods: DELETE, service: || delete(members::remove) },
    Route { path: "/v1/admin/members/{name}/replace", methods: POST, service: || post(members::replace) },
    Route { path: "/v1/admin/jobs", methods: GET, service: || get(jobs::jobs) },
    Route { path: "/v1/admin/jobs/{id}", methods: GET_DELETE, service: || get(jobs::job).merge(delete(jobs::cancel)) },
    Route { path: "/v1/admin/quarantine", methods: GET, service: || get(jobs::quarantine) },
    Route { path: "/metrics", methods: GET, service: || get(metrics::metrics) },
    Route { path: "/openapi.json", methods: GET, service: || get(openapi::openapi_json) },
];

/// The whole surface over `node`.
pub fn router(node: Arc<Node>) -> Router {
    ROUTES
        .iter()
        .fold(Router::new(), |router, route| router.route(route.path, (route.service)()))
        .fallback(no_such_route)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(Api::new(node))
}

/// The OpenAPI document of [`router`].
pub fn openapi() -> utoipa::openapi::OpenApi {
    openapi::document()
}

/// What `/metrics` calls a path that no route has.
const NO_ROUTE: &str = "none";

/// The pattern of the route that takes `path`, for the figures of requests.
fn route_pattern(path: &str) -> &'static str {
    let same = ROUTES.iter().find(|route| route.path == path);
    let like = || ROUTES.iter().find(|route| route.path.contains('{') && matches_pattern(route.path, path));
    same.or_else(like).map_or(NO_ROUTE, |route| route.path)
}

/// How much of an unknown path is repeated to its sender, in characters.
const PATH_ECHO_CHARS_MAX: usize = 200;

async fn no_such_route(uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(PATH_ECHO_CHARS_MAX).collect();
    let detail = format!("Nothing is served at {path}. GET /openapi.json lists what is.");
    Problem::new(Kind::NoSuchRoute, detail)
}

/// axum adds `Allow`.
async fn method_not_allowed(method: Method, uri: Uri) -> Problem {
    let accepted = ROUTES
        .iter()
        .find(|route| matches_pattern(route.path, uri.path()))
        .map_or_else(String::new, |route| route.methods.join(", "));
    let detail = format!("{} does not take {method}; it takes {accepted}.", uri.path());
    Problem::new(Kind::MethodNotAllowed, detail).with("accepted", accepted)
}

/// True if `path` is one of those that `pattern` names: `{…}` stands for one segment.
fn matches_pattern(pattern: &str, path: &str) -> bool {
    pattern.split('/').count() == path.split('/').count()
        && pattern.split('/').zip(path.split('/')).all(|(p, s)| p.starts_with('{') || p == s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_requests_know_patterns_and_never_paths() {
        assert_eq!(route_pattern("/v1/assert"), "/v1/assert");
        assert_eq!(route_pattern("/v1/assertions/0198c0de"), "/v1/assertions/{id}");
        assert_eq!(route_pattern("/v1/assertions/a/b"), NO_ROUTE);
        assert_eq!(route_pattern("/anything"), NO_ROUTE);
    }
}
