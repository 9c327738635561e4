//! Every error that leaves the HTTP API, as `application/problem+json` (RFC 9457).
//!
//! One table gives each kind its stable `type`, its title and its status; `docs/problems.md` has
//! one section per kind and a test holds the two together. Handlers make a [`Problem`] with what
//! was wrong, the limit, the actual value and what to do; nothing else in the API writes an error.
//! On write routes each problem says what became of the write, in `outcome`.

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::Value;

/// Media type of every error body.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// What became of a write that was answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// Nothing was written, and nothing will be because of this request or its key as it is.
    Refused,
    /// Nothing was written; the same request may succeed when it is sent again.
    NotApplied,
    /// It may have been written or may still be; sending it again with the same key is safe.
    Unknown,
}

impl WriteOutcome {
    /// The word in the problem body.
    pub const fn as_str(self) -> &'static str {
        match self {
            WriteOutcome::Refused => "refused",
            WriteOutcome::NotApplied => "not_applied",
            WriteOutcome::Unknown => "unknown",
        }
    }
}

/// The kinds of problem. Their slugs are a public promise: clients switch on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // one section of docs/problems.md for each
pub enum Kind {
    MalformedJson,
    IncompleteBody,
    InvalidQuery,
    InvalidHeader,
    InvalidId,
    InvalidCursor,
    NoSuchRoute,
    NotFound,
    MethodNotAllowed,
    RequestTimeout,
    KeyReused,
    EpochExists,
    SupersessionCycle,
    ChainTooLong,
    ImportPosition,
    RebuildRefused,
    MemberExists,
    MemberUnfit,
    FeatureLevel,
    DrainHeld,
    FlowRefused,
    FlowUnderWay,
    FlowFailed,
    CursorExpired,
    BodyTooLarge,
    ValueTooLarge,
    TooManyItems,
    InvalidPath,
    InvalidField,
    UnknownField,
    EmptyBatch,
    UnknownEpoch,
    PathMismatch,
    QueryTooBroad,
    TooManyRequests,
    Internal,
    Unavailable,
    OutcomeUnknown,
    OrderUnknown,
    Expired,
    NotReady,
    NodeRemoved,
    NotLeader,
    ReplicaLag,
    TooStale,
    StorageDamaged,
    TooManyConnections,
    DiskFull,
}

/// One row of the table of kinds.
#[derive(Clone, Copy, Debug)]
pub struct KindRow {
    /// Last segment of `type`, which is `/problems/<slug>`.
    pub slug: &'static str,
    /// The same for every problem of the kind.
    pub title: &'static str,
    /// HTTP status.
    pub status: u16,
    /// `outcome` on a write route, unless the mapping says otherwise.
    pub on_write: WriteOutcome,
}

impl Kind {
    /// Every kind, in the order of `docs/problems.md`.
    pub const ALL: &'static [Kind] = &[
        Kind::MalformedJson,
        Kind::IncompleteBody,
        Kind::InvalidQuery,
        Kind::InvalidHeader,
        Kind::InvalidId,
        Kind::InvalidCursor,
        Kind::NoSuchRoute,
        Kind::NotFound,
        Kind::MethodNotAllowed,
        Kind::RequestTimeout,
        Kind::KeyReused,
        Kind::EpochExists,
        Kind::SupersessionCycle,
        Kind::ChainTooLong,
        Kind::ImportPosition,
        Kind::RebuildRefused,
        Kind::MemberExists,
        Kind::MemberUnfit,
        Kind::FeatureLevel,
        Kind::DrainHeld,
        Kind::FlowRefused,
        Kind::FlowUnderWay,
        Kind::FlowFailed,
        Kind::CursorExpired,
        Kind::BodyTooLarge,
        Kind::ValueTooLarge,
        Kind::TooManyItems,
        Kind::InvalidPath,
        Kind::InvalidField,
        Kind::UnknownField,
        Kind::EmptyBatch,
        Kind::UnknownEpoch,
        Kind::PathMismatch,
        Kind::QueryTooBroad,
        Kind::TooManyRequests,
        Kind::Internal,
        Kind::Unavailable,
        Kind::OutcomeUnknown,
        Kind::OrderUnknown,
        Kind::Expired,
        Kind::NotReady,
        Kind::NodeRemoved,
        Kind::NotLeader,
        Kind::ReplicaLag,
        Kind::TooStale,
        Kind::StorageDamaged,
        Kind::TooManyConnections,
        Kind::DiskFull,
    ];

    /// The table.
    pub const fn row(self) -> KindRow {
        use WriteOutcome::{NotApplied, Refused, Unknown};
        let (status, slug, title, on_write) = match self {
            Kind::MalformedJson => (400, "malformed-json", "The body is not valid JSON", Refused),
            Kind::IncompleteBody => (400, "incomplete-body", "The body ended early", NotApplied),
            Kind::InvalidQuery => (400, "invalid-query", "A query parameter is invalid", Refused),
            Kind::InvalidHeader => (400, "invalid-header", "A header is invalid", Refused),
            Kind::InvalidId => (400, "invalid-id", "The id in the path is invalid", Refused),
            Kind::InvalidCursor => (400, "invalid-cursor", "The cursor is invalid", Refused),
            Kind::NoSuchRoute => (404, "no-such-route", "There is no such route", Refused),
            Kind::NotFound => (404, "not-found", "There is no such thing", Refused),
            Kind::MethodNotAllowed => (405, "method-not-allowed", "The route does not take this method", Refused),
            Kind::RequestTimeout => (408, "request-timeout", "The body did not arrive in time", NotApplied),
            Kind::KeyReused => (409, "key-reused", "The idempotency key belongs to another request", Refused),
            Kind::EpochExists => (409, "epoch-exists", "The epoch exists", Refused),
            Kind::SupersessionCycle => (409, "supersession-cycle", "The supersession would close a circle", Refused),
            Kind::ChainTooLong => (409, "chain-too-long", "The chain of supersessions is too long", Refused),
            Kind::ImportPosition => (409, "import-position", "The import stands at another position", Refused),
            Kind::RebuildRefused => (409, "rebuild-refused", "A rebuild now could lose data", Refused),
            Kind::MemberExists => (409, "member-exists", "The name or address is taken", Refused),
            Kind::MemberUnfit => (409, "member-unfit", "The node cannot become a member", Refused),
            Kind::FeatureLevel => (409, "feature-level", "The cluster's feature level is too low", Refused),
            Kind::DrainHeld => (409, "drain-held", "Another node is out of traffic", Refused),
            Kind::FlowRefused => (409, "flow-refused", "This cannot be done now", Refused),
            Kind::FlowUnderWay => (409, "flow-under-way", "Another flow goes on here", Refused),
            Kind::FlowFailed => (409, "flow-failed", "The flow was given up", Unknown),
            Kind::CursorExpired => (410, "cursor-expired", "The cursor has expired", Refused),
            Kind::BodyTooLarge => (413, "body-too-large", "The body is too large", Refused),
            Kind::ValueTooLarge => (413, "value-too-large", "The value is too large", Refused),
            Kind::TooManyItems => (413, "too-many-items", "The batch has too many items", Refused),
            Kind::InvalidPath => (422, "invalid-path", "The concept path is invalid", Refused),
            Kind::InvalidField => (422, "invalid-field", "A field is invalid", Refused),
            Kind::UnknownField => (422, "unknown-field", "A field is unknown", Refused),
            Kind::EmptyBatch => (422, "empty-batch", "The batch is empty", Refused),
            Kind::UnknownEpoch => (422, "unknown-epoch", "The epoch does not exist", Refused),
            Kind::PathMismatch => (422, "path-mismatch", "Old and new have different concept paths", Refused),
            Kind::QueryTooBroad => (422, "query-too-broad", "The query asks for too much", Refused),
            Kind::TooManyRequests => (429, "too-many-requests", "The node is at a limit", NotApplied),
            Kind::Internal => (500, "internal", "The node made a mistake", Unknown),
            Kind::Unavailable => (503, "unavailable", "The cluster cannot do this now", NotApplied),
            Kind::OutcomeUnknown => (503, "outcome-unknown", "The outcome of the write is unknown", Unknown),
            Kind::OrderUnknown => (503, "order-unknown", "Whether the order was carried out is unknown", Unknown),
            Kind::Expired => (503, "expired", "The write came too late", Refused),
            Kind::NotReady => (503, "not-ready", "The node is not ready", NotApplied),
            Kind::NodeRemoved => (503, "node-removed", "The node was removed from its cluster", NotApplied),
            Kind::NotLeader => (503, "not-leader", "The node is not the leader", NotApplied),
            Kind::ReplicaLag => (503, "replica-lag", "The replica is too far behind", NotApplied),
            Kind::TooStale => (503, "too-stale", "The replica's data is too old", NotApplied),
            Kind::StorageDamaged => (503, "storage-damaged", "The node cannot read its data", NotApplied),
            Kind::TooManyConnections => (503, "too-many-connections", "The node has too many connections", NotApplied),
            Kind::DiskFull => (507, "disk-full", "The disk is full", NotApplied),
        };
        KindRow { slug, title, status, on_write }
    }
}

/// An error answer. Boxed, because it travels in the error side of many results.
#[derive(Clone, Debug)]
pub struct Problem(Box<Parts>);

#[derive(Clone, Debug)]
struct Parts {
    kind: Kind,
    detail: String,
    outcome: Option<WriteOutcome>,
    retry_after_s: Option<u64>,
    rate_limit: Option<u64>,
    close: bool,
    try_elsewhere: bool,
    members: Vec<(&'static str, Value)>,
}

impl Problem {
    /// A problem of `kind`; `detail` says what was wrong, the limit and the actual value, and what to do.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Problem(Box::new(Parts {
            kind,
            detail: detail.into(),
            outcome: None,
            retry_after_s: None,
            rate_limit: None,
            close: false,
            try_elsewhere: false,
            members: Vec::new(),
        }))
    }

    /// Adds a member to the body, for programs. A later one of the same name replaces it.
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.0.members.retain(|(existing, _)| *existing != name);
        self.0.members.push((name, value.into()));
        self
    }

    /// Adds `limit` and `actual`.
    pub fn with_limit(self, limit: u64, actual: u64) -> Self {
        self.with("limit", limit).with("actual", actual)
    }

    /// Adds `Retry-After`, in seconds.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.0.retry_after_s = Some(seconds);
        self
    }

    /// Adds the `RateLimit-*` headers: `limit` is what fits at once; none of it is left.
    pub fn rate_limit(mut self, limit: u64) -> Self {
        self.0.rate_limit = Some(limit);
        self
    }

    /// Sets `outcome`, where it differs from the kind's own.
    pub fn outcome(mut self, outcome: WriteOutcome) -> Self {
        self.0.outcome = Some(outcome);
        self
    }

    /// The answer carries `Connection: close`: what follows on this connection cannot be read.
    pub fn close_connection(mut self) -> Self {
        self.0.close = true;
        self
    }

    /// The answer carries `X-StemeDB-Try-Elsewhere`: a load balancer may send the same request to another node.
    pub fn try_elsewhere(mut self) -> Self {
        self.0.try_elsewhere = true;
        self
    }

    /// Puts `prefix` before the detail.
    pub fn in_context(mut self, prefix: &str) -> Self {
        self.0.detail.insert_str(0, prefix);
        self
    }

    /// Makes this the answer of a write route: `outcome` is always there.
    ///
    /// `maybe_retry` is true when a load balancer stands in front and may have given this very
    /// request to another node before: then no single node can know that nothing was written, and
    /// `not_applied` becomes `unknown`. Refusals stay refusals: the other node refused alike.
    pub fn on_write(mut self, maybe_retry: bool) -> Self {
        let outcome = self.0.outcome.unwrap_or(self.0.kind.row().on_write);
        self.0.outcome = Some(match outcome {
            WriteOutcome::NotApplied if maybe_retry => {
                self.0.detail.push_str(
                    " This node wrote nothing, but the load balancer may have tried another node \
                     before; sending the request again with the same Idempotency-Key is safe.",
                );
                WriteOutcome::Unknown
            }
            other => other,
        });
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The status.
    pub fn status(&self) -> u16 {
        self.0.kind.row().status
    }

    /// The detail.
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// What the body says about a write, if it says anything.
    pub fn write_outcome(&self) -> Option<WriteOutcome> {
        self.0.outcome
    }

    /// A member added by [`Problem::with`].
    pub fn member(&self, name: &str) -> Option<&Value> {
        self.0.members.iter().find(|(n, _)| *n == name).map(|(_, v)| v)
    }
}

impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let row = self.0.kind.row();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("type", &format_args!("/problems/{}", row.slug))?;
        map.serialize_entry("title", row.title)?;
        map.serialize_entry("status", &row.status)?;
        map.serialize_entry("detail", &self.0.detail)?;
        if let Some(outcome) = self.0.outcome {
            map.serialize_entry("outcome", outcome.as_str())?;
        }
        if let Some(seconds) = self.0.retry_after_s {
            map.serialize_entry("retry_after_s", &seconds)?;
        }
        for (name, value) in &self.0.members {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        // A map of strings and numbers always serializes; the fallback keeps the status if it ever does not.
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = StatusCode::from_u16(self.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if let Some(seconds) = self.0.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(limit) = self.0.rate_limit {
            let reset_s = self.0.retry_after_s.unwrap_or(1);
            headers.insert(HeaderName::from_static("ratelimit-limit"), HeaderValue::from(limit));
            headers.insert(HeaderName::from_static("ratelimit-remaining"), HeaderValue::from(0_u64));
            headers.insert(HeaderName::from_static("ratelimit-reset"), HeaderValue::from(reset_s));
        }
        if self.0.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self.0.try_elsewhere {
            headers.insert(super::headers::TRY_ELSEWHERE, HeaderValue::from_static("true"));
        }
        response
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn slugs_are_unique_and_statuses_valid() {
        let slugs: BTreeSet<_> = Kind::ALL.iter().map(|k| k.row().slug).collect();
        assert_eq!(slugs.len(), Kind::ALL.len());
        for kind in Kind::ALL {
            assert!(StatusCode::from_u16(kind.row().status).unwrap().as_u16() >= 400, "{kind:?}");
        }
    }

    #[test]
    fn every_kind_has_its_section_in_the_document_and_no_section_is_left_over() {
        let document = include_str!("../../docs/problems.md");
        let sections: BTreeSet<_> =
            document.lines().filter_map(|line| line.strip_prefix("### ")).map(|line| line.to_string()).collect();
        let kinds: BTreeSet<_> = Kind::ALL.iter().map(|k| format!("{} ({})", k.row().slug, k.row().status)).collect();
        assert_eq!(sections, kinds);
    }

    #[test]
    fn the_body_has_the_members_of_rfc_9457_and_what_was_added() {
        let problem = Problem::new(Kind::BodyTooLarge, "too big").with_limit(8, 9).on_write(false);
        let json: Value = serde_json::to_value(&problem).unwrap();
        assert_eq!(json["type"], "/problems/body-too-large");
        assert_eq!(json["status"], 413);
        assert_eq!(json["detail"], "too big");
        assert_eq!(json["outcome"], "refused");
        assert_eq!(json["limit"], 8);
        assert_eq!(json["actual"], 9);
    }

    #[test]
    fn behind_a_load_balancer_no_single_node_says_not_applied() {
        let problem = Problem::new(Kind::Unavailable, "no leader.");
        let alone = problem.clone().on_write(false);
        let balanced = problem.on_write(true);
        assert_eq!(alone.write_outcome(), Some(WriteOutcome::NotApplied));
        assert_eq!(balanced.write_outcome(), Some(WriteOutcome::Unknown));
        let refused = Problem::new(Kind::KeyReused, "x").on_write(true);
        assert_eq!(refused.write_outcome(), Some(WriteOutcome::Refused));
    }

    #[test]
    fn headers_follow_the_parts() {
        let response = Problem::new(Kind::TooManyRequests, "x")
            .retry_after(2)
            .rate_limit(10_000)
            .close_connection()
            .into_response();
        let header = |name: &str| response.headers().get(name).unwrap().to_str().unwrap();
        assert_eq!(response.status(), 429);
        assert_eq!(header("content-type"), PROBLEM_JSON);
        assert_eq!(header("retry-after"), "2");
        assert_eq!(header("ratelimit-limit"), "10000");
        assert_eq!(header("ratelimit-remaining"), "0");
        assert_eq!(header("ratelimit-reset"), "2");
        assert_eq!(header("connection"), "close");
    }
}
