//! The shapes of the HTTP surface, for the OpenAPI document only.
//!
//! Bodies are read by `bodies` and answers written by the handlers; a test keeps the field names
//! here equal to the ones there.
#![allow(dead_code)] // described, never built

use utoipa::{IntoParams, ToResponse, ToSchema};

/// A statement that a concept has a property with a value.
#[derive(ToSchema)]
#[schema(example = json!({"concept_path": "debian/net/curl", "predicate": "version", "value": "8.14.1"}))]
pub struct Assert {
    /// Segments separated by `/`, none empty, `.` or `..`, without `*` and control characters; at
    /// most 1,024 bytes, 255 per segment.
    #[schema(max_length = 1024)]
    pub concept_path: String,
    /// 1 to 255 bytes, no control characters.
    #[schema(min_length = 1, max_length = 255)]
    pub predicate: String,
    /// Any JSON, at most 1 MiB when compact. Numbers come back with the digits they went in with.
    #[schema(value_type = Value)]
    pub value: serde_json::Value,
    /// Who said so.
    pub source: Option<String>,
    /// How sure they were.
    #[schema(minimum = 0.0, maximum = 1.0)]
    pub confidence: Option<f64>,
    /// Name of an existing epoch.
    pub epoch: Option<String>,
    /// Id of the assertion that this one replaces.
    #[schema(format = "uuid")]
    pub supersedes: Option<String>,
    /// Start of validity: RFC 3339, or Unix milliseconds.
    #[schema(format = "date-time")]
    pub valid_from: Option<String>,
    /// End of validity, exclusive.
    #[schema(format = "date-time")]
    pub valid_to: Option<String>,
}

/// A vote on an assertion.
#[derive(ToSchema)]
pub struct Vote {
    /// The assertion.
    #[schema(format = "uuid")]
    pub assertion_id: String,
    /// Who votes, 1 to 255 bytes.
    #[schema(min_length = 1, max_length = 255)]
    pub voter: String,
    /// For (up to 1) or against (down to -1).
    #[schema(minimum = -1.0, maximum = 1.0)]
    pub weight: f64,
    /// Why.
    pub reason: Option<String>,
}

/// An epoch.
#[derive(ToSchema)]
pub struct Epoch {
    /// Unique, 1 to 255 bytes.
    #[schema(min_length = 1, max_length = 255)]
    pub name: String,
    /// Free text.
    pub description: Option<String>,
    /// Name of the epoch that this one replaces.
    pub supersedes: Option<String>,
}

/// A replacement of one assertion by another, or its retraction.
#[derive(ToSchema)]
pub struct Supersede {
    /// The assertion that is replaced.
    #[schema(format = "uuid")]
    pub old: String,
    /// Its replacement, about the same concept; absent: the old one is retracted.
    #[schema(format = "uuid")]
    pub new: Option<String>,
    /// Why.
    pub reason: Option<String>,
}

/// Proof of one stored fact.
#[derive(ToSchema)]
pub struct Written {
    /// Id of the assertion, vote, epoch or supersession.
    #[schema(format = "uuid")]
    pub id: String,
    /// Sequence number of the fact, equal on all nodes.
    pub index: u64,
    /// When a node took the request.
    #[schema(format = "date-time")]
    pub created_at: String,
    /// True when the idempotency key was known: this is the first answer again, and nothing was written.
    pub replayed: bool,
}

/// Proof of a stored batch.
#[derive(ToSchema)]
pub struct BatchWritten {
    /// One per item, in order.
    pub results: Vec<Written>,
}

/// Votes on an assertion, added up.
#[derive(ToSchema)]
pub struct Votes {
    /// Sum of the weights.
    pub sum: f64,
    /// Number of voters.
    pub count: u64,
}

/// A stored assertion.
#[derive(ToSchema)]
pub struct Assertion {
    /// UUIDv7.
    #[schema(format = "uuid")]
    pub id: String,
    /// What it is about.
    pub concept_path: String,
    /// The property.
    pub predicate: String,
    /// The value, as it was given.
    #[schema(value_type = Value)]
    pub value: serde_json::Value,
    /// Who said so.
    pub source: Option<String>,
    /// How sure they were.
    pub confidence: Option<f64>,
    /// The epoch in which it holds.
    pub epoch: Option<String>,
    /// When a node took the request.
    #[schema(format = "date-time")]
    pub created_at: String,
    /// Sequence number of the fact.
    pub index: u64,
    /// The votes it drew.
    pub votes: Votes,
    /// Id of the assertion that replaced it; null also when it was retracted.
    pub superseded_by: Option<String>,
    /// True when it was superseded by nothing; absent otherwise.
    pub retracted: Option<bool>,
    /// Id of the assertion that it replaced; absent when there is none.
    pub supersedes: Option<String>,
    /// Start of validity; absent when open.
    pub valid_from: Option<String>,
    /// End of validity, exclusive; absent when open.
    pub valid_to: Option<String>,
}

/// A page of assertions.
#[derive(ToSchema)]
pub struct QueryAnswer {
    /// Ordered by concept path and predicate.
    pub assertions: Vec<Assertion>,
    /// Index of the state that was read; give it as `as_of` to read the same state again.
    pub index: u64,
    /// Name of the node that read it.
    pub served_by: String,
    /// Asks for the next page; null after the last.
    pub cursor: Option<String>,
}

/// A page of facts.
#[derive(ToSchema)]
pub struct HistoryAnswer {
    /// In the order of their indexes; `kind` is `assertion`, `vote` or `supersession`.
    #[schema(value_type = Vec<Object>)]
    pub events: Vec<serde_json::Value>,
    /// Index of the state that was read.
    pub index: u64,
    /// Name of the node that read it.
    pub served_by: String,
    /// Asks for the next page; null after the last.
    pub cursor: Option<String>,
}

/// What a node says of itself.
#[derive(ToSchema)]
pub struct HealthAnswer {
    /// `ok`, `starting`, `repairing`, `draining`, `drained`, `stopping`, or why the node answers through others:
    /// `stalled`, `failed`, `rebuilding`, `fenced`; `waiting` to be added, `joining`, or `removed`.
    pub status: String,
    /// The node's name.
    pub name: String,
    /// `leader`, `follower`, `candidate`, `learner` or `starting`.
    pub role: String,
    /// Raft term.
    pub term: u64,
    /// Name of the leader, if one is known.
    pub leader: Option<String>,
    /// Index of the last fact that this node shows, as in answers to reads and writes.
    pub applied_index: u64,
    /// State of the disk: `{"state": "ok" | "full" | "failed", "reason"}`.
    #[schema(value_type = Object)]
    pub disk: serde_json::Value,
    /// `none`, `wants`, `draining` or `drained`.
    pub drain: String,
    /// What the log waits for while it is being repaired from the other nodes; absent otherwise.
    pub repairing: Option<String>,
    /// For what a node without a place in the cluster waits, or why one has lost it; absent otherwise.
    pub place: Option<String>,
    /// Why a node that is well is not ready: it reaches too few of the others; absent otherwise.
    pub cut_off: Option<String>,
    /// Version of the program.
    pub version: String,
}

/// What the cluster looks like from this node.
#[derive(ToSchema)]
pub struct ClusterAnswer {
    /// Name of the leader, if one is known.
    pub leader: Option<String>,
    /// Raft term.
    pub term: u64,
    /// The feature level that the cluster has reached, as far as this node has applied.
    pub feature_level: Option<u32>,
    /// Who keeps the cluster below the level that this node's program knows; left out when nobody does.
    #[schema(required = false)]
    pub feature_level_held_by: Vec<String>,
    /// `{"name","id","role","lag_entries","lag_bytes","disk","drain","fsync_p99_ms","version"}` of each member.
    #[schema(value_type = Vec<Object>)]
    pub members: Vec<serde_json::Value>,
}

/// How far an import has come.
#[derive(ToSchema)]
pub struct ImportAnswer {
    /// The name its importer chose.
    pub import_id: String,
    /// Records stored so far; 0 for an import nobody has begun.
    pub position: u64,
}

/// RFC 9457. `docs/problems.md` explains each type.
#[derive(ToSchema)]
pub struct ProblemBody {
    /// `/problems/<kind>`: stable; programs switch on it.
    #[schema(rename = "type")]
    pub kind: String,
    /// The same for every problem of the type.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What was wrong, the limit and the actual value, and what to do.
    pub detail: String,
    /// On writes: `refused`, `not_applied` or `unknown`.
    pub outcome: Option<String>,
    /// The field of the body that is wrong.
    pub field: Option<String>,
    /// The item of the batch that is wrong, counted from 0.
    pub item: Option<u64>,
    /// The limit that was passed.
    pub limit: Option<u64>,
    /// The size that was found.
    pub actual: Option<u64>,
}

/// Any error.
#[derive(ToResponse)]
#[response(description = "An error, explained in docs/problems.md", content_type = "application/problem+json")]
pub struct ProblemResponse(pub ProblemBody);

/// Headers of a write.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
pub struct WriteHeaders {
    /// 1 to 255 visible ASCII characters. The same key with the same body is applied once within 15
    /// minutes and answered alike; with another body it is a conflict.
    #[param(rename = "Idempotency-Key")]
    pub idempotency_key: Option<String>,
    /// Set by load balancers, the same on each attempt of one request.
    #[param(rename = "X-StemeDB-Retry-Id")]
    pub retry_id: Option<String>,
}

/// Headers of a chunk of an import. Both or none.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
pub struct ImportHeaders {
    /// Name of the import, 1 to 255 visible ASCII characters.
    #[param(rename = "X-StemeDB-Import-Id")]
    pub import_id: Option<String>,
    /// Records before this chunk. Must equal the stored position, else 409 with `expected_position`.
    #[param(rename = "X-StemeDB-Import-Position")]
    pub import_position: Option<u64>,
}

/// How fresh a read must be.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ConsistencyParams {
    /// `linearizable` (default), `lease` or `stale`.
    pub consistency: Option<String>,
    /// With `consistency=stale`: the oldest state accepted, in milliseconds.
    pub max_staleness_ms: Option<u64>,
}

/// What a query asks for.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct QueryParams {
    /// The concept; with a trailing `/**` it and everything below.
    pub concept_path: String,
    /// Only this property.
    pub predicate: Option<String>,
    /// `latest` (default), `votes`, `confidence` or `all`.
    pub resolve: Option<String>,
    /// Only assertions of this epoch.
    pub epoch: Option<String>,
    /// The state at an index or at an RFC 3339 time.
    pub as_of: Option<String>,
    /// Only what is valid at this time: RFC 3339 or Unix milliseconds.
    pub valid_at: Option<String>,
    /// Most assertions in the answer, 1 to 1,000; 100 when absent.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
    /// From the previous page.
    pub cursor: Option<String>,
}

/// What a history asks for.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct HistoryParams {
    /// The concept. Either this or `assertion_id`.
    pub concept_path: Option<String>,
    /// Only this property of the concept.
    pub predicate: Option<String>,
    /// The assertion.
    pub assertion_id: Option<String>,
    /// Most facts in the answer, 1 to 1,000; 100 when absent.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
    /// From the previous page.
    pub cursor: Option<String>,
}

/// What a rebuild may be told.
#[derive(ToSchema)]
pub struct Rebuild {
    /// The only node to fetch from; default: a replica, the leader if there is none.
    pub from: Option<String>,
}

/// What a drain may be told.
#[derive(ToSchema)]
pub struct Drain {
    /// Whether the node shall stay drained after a restart; default: no.
    pub persist: Option<bool>,
}

/// What a failover may be told.
#[derive(ToSchema)]
pub struct Failover {
    /// Name of the next leader; default: the voter that lacks least.
    pub target: Option<String>,
}

/// What a compaction may be told.
#[derive(ToSchema)]
pub struct Compact {
    /// The whole tree into its last level; default: what is due.
    pub aggressive: Option<bool>,
    /// The same under another name.
    pub force: Option<bool>,
}

/// A node that is to become a member.
#[derive(ToSchema)]
pub struct MemberAdd {
    /// Its `node.name`.
    pub name: String,
    /// `host:port` of its listener for nodes.
    pub addr: String,
    /// `host:port` of its HTTP listener; default: what it says itself.
    pub http: Option<String>,
    /// It receives the log and never votes; default: what its `cluster.role` says.
    pub learner: Option<bool>,
}

/// A node that takes the place of another one.
#[derive(ToSchema)]
pub struct MemberReplace {
    /// Its `node.name`.
    pub name: String,
    /// `host:port` of its listener for nodes.
    pub addr: String,
    /// `host:port` of its HTTP listener; default: what it says itself.
    pub http: Option<String>,
}

/// The members, and the change that goes on.
#[derive(ToSchema)]
pub struct MembersAnswer {
    /// Name of the leader, if one is known.
    pub leader: Option<String>,
    /// Its term.
    pub term: u64,
    /// Number of voters.
    pub voters: u64,
    /// How many of them must work.
    pub needed: u64,
    /// As in `/v1/admin/cluster`.
    #[schema(value_type = Vec<Object>)]
    pub members: Vec<serde_json::Value>,
    /// The change of the members that goes on.
    pub change: Option<JobAnswer>,
}

/// The jobs of a node.
#[derive(ToSchema)]
pub struct JobsAnswer {
    /// Name of the node.
    pub node: String,
    /// The newest first.
    pub jobs: Vec<JobAnswer>,
    /// Why the changes of the members are missing among them, if they are.
    pub not_read: Option<String>,
}

/// A step of a job that was done.
#[derive(ToSchema)]
pub struct JobStep {
    /// Its name.
    pub name: String,
    /// How long it took, milliseconds.
    pub ms: u64,
}

/// A job that goes on by itself, on one node.
#[derive(ToSchema)]
pub struct JobAnswer {
    /// Its id.
    #[schema(format = "uuid")]
    pub id: String,
    /// `rebuild`, `drain`, `undrain`, `failover`, `member-add`, `member-remove`, `member-replace` or `compact`.
    pub kind: String,
    /// Name of the node that it runs on, or that it is about.
    pub node: String,
    /// It belongs to the whole cluster: every node can be asked.
    pub cluster: bool,
    /// `running`, `waiting`, `finished`, `failed` or `cancelled`.
    pub state: String,
    /// What is being done, for example `pulling`.
    pub step: String,
    /// The steps that were done, the oldest first.
    pub steps: Vec<JobStep>,
    /// What it waits for, why it was begun, or how it ended.
    pub detail: String,
    /// Who or what began it.
    pub cause: String,
    /// Whether the node began by itself.
    pub automatic: bool,
    /// Whether `DELETE` of it would undo it now.
    pub cancellable: bool,
    /// The node the files or leadership come from.
    pub from: Option<String>,
    /// The node that leads afterwards, once leadership has moved.
    pub to: Option<String>,
    /// The term in which it leads.
    pub term: Option<u64>,
    /// The Raft id under which the node comes back.
    pub fresh_id: Option<u64>,
    /// Bytes of the checkpoint that are there.
    pub bytes_done: u64,
    /// Bytes of the checkpoint; 0 before it is known.
    pub bytes_total: u64,
    /// Entries of the leader's log that are missing.
    pub entries_behind: Option<u64>,
    /// Seconds until the files are there, at the pace so far.
    pub eta_s: Option<u64>,
    /// When it began, Unix milliseconds.
    pub began_unix_ms: u64,
    /// How long it took or has taken, milliseconds.
    pub ms: u64,
}

/// What rebuilds have put away.
#[derive(ToSchema)]
pub struct QuarantineAnswer {
    /// The oldest first.
    pub folders: Vec<QuarantineFolder>,
}

/// The old files of a rebuilt node.
#[derive(ToSchema)]
pub struct QuarantineFolder {
    /// Name below `<data_dir>/quarantine/`.
    pub name: String,
    /// Why they are there.
    pub what: String,
    /// Since when, Unix milliseconds.
    pub since_unix_ms: u64,
    /// Their bytes.
    pub bytes: u64,
    /// When they will be removed, Unix milliseconds; absent: never.
    pub expires_unix_ms: Option<u64>,
}
