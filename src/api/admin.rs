//! What operators and tools ask about the cluster, an import and the local tree. Only reads so far.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::Uri,
    response::Response,
};
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;
use utoipa::ToSchema;

use crate::{
    model::validate::validate_import_id,
    node::{ClusterReport, Consistency},
};

use super::{
    Api,
    elsewhere::Asked,
    mapping,
    problem::{Kind, Problem},
    read, schema,
};

/// The members of the cluster, their roles and their lag, as this node knows them.
#[utoipa::path(get, path = "/v1/admin/cluster", tag = "admin",
    responses((status = 200, description = "The cluster", body = schema::ClusterAnswer)))]
pub async fn cluster(State(api): State<Arc<Api>>) -> Json<ClusterReport> {
    Json(api.node.cluster().await)
}

/// What the local tree holds and has done. Sizes in bytes, `…_count` and bytes written since the start.
#[derive(Serialize, ToSchema)]
pub struct StorageStats {
    /// Files of the tree.
    sst_file_count: u64,
    /// Bytes of these files.
    total_bytes: u64,
    /// Bytes that compaction has still to rewrite.
    pending_compaction_bytes: u64,
    /// Files of each level, level 0 first.
    level_file_counts: Vec<usize>,
    /// Bytes of each level.
    level_bytes: Vec<u64>,
    /// Bytes written since the last flush, in memory.
    memtable_bytes: u64,
    /// Memtables that wait to be flushed.
    sealed_memtables: u64,
    /// Flushes.
    flush_count: u64,
    /// Bytes written by them.
    flushed_bytes: u64,
    /// Compactions.
    compaction_count: u64,
    /// Bytes written by them.
    compacted_bytes: u64,
    /// True while there is no room on the disk for the next flush or compaction.
    disk_full: bool,
}

/// The files and sizes of this node's tree.
#[utoipa::path(get, path = "/v1/admin/storage/stats", tag = "admin",
    responses((status = 200, description = "Sizes", body = StorageStats),
        (status = 503, response = schema::ProblemResponse)))]
pub async fn storage_stats(State(api): State<Arc<Api>>) -> Result<Json<StorageStats>, Problem> {
    let node = Arc::clone(&api.node);
    let deadline = Instant::now() + api.request_deadline;
    let stats = read::ask_store(&api, deadline, move || Ok(node.engine_stats())).await?.ok_or_else(|| {
        let detail = "The tree of this node is not open: the node is starting, or its disk failed.";
        Problem::new(Kind::Unavailable, detail).retry_after(mapping::RETRY_AFTER_S)
    })?;
    Ok(Json(StorageStats {
        sst_file_count: stats.table_count as u64,
        total_bytes: stats.table_bytes,
        pending_compaction_bytes: stats.pending_compaction_bytes,
        level_file_counts: stats.level_tables,
        level_bytes: stats.level_bytes,
        memtable_bytes: stats.memtable_bytes,
        sealed_memtables: stats.sealed_memtables as u64,
        flush_count: stats.flush_count,
        flushed_bytes: stats.flushed_bytes,
        compaction_count: stats.compaction_count,
        compacted_bytes: stats.compacted_bytes,
        disk_full: stats.disk_full,
    }))
}

/// How far an import has come. An import that nobody has begun stands at 0.
#[utoipa::path(get, path = "/v1/admin/imports/{id}", tag = "admin",
    params(("id" = String, Path, description = "The name its importer chose")),
    responses((status = 200, description = "Its position", body = schema::ImportAnswer),
        (status = "default", response = schema::ProblemResponse)))]
pub async fn import(
    State(api): State<Arc<Api>>,
    path: Result<Path<String>, PathRejection>,
    uri: Uri,
    asked: Asked,
) -> Result<Response, Problem> {
    let Path(import_id) = path.map_err(|_| {
        let detail = format!("\"{}\" does not end in the id of an import.", uri.path());
        Problem::new(Kind::InvalidId, detail)
    })?;
    validate_import_id(&import_id).map_err(|broken| Problem::new(Kind::InvalidId, format!("{broken}.")))?;
    read::read(&api, &asked, Consistency::Linearizable, move |view| {
        let position = view.import_position(&import_id).map_err(mapping::store_error)?;
        let answer = json!({"import_id": import_id, "position": position});
        Ok((view.fact_index(), read::json(&answer)?))
    })
    .await
}
