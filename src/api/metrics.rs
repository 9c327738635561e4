//! `GET /metrics`, in the text form that Prometheus reads.
//!
//! A scrape must come while the disk hangs, so the figures that are read from it are asked for on a
//! thread of their own, one at a time, and go out as they last were when that takes long.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderValue, header},
    response::IntoResponse,
};

use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};

use super::Api;
use crate::node::Node;

/// How long the figures from the disk may take; scrapes are given up after 10 s by default.
const REFRESH_MAX: Duration = Duration::from_secs(1);

const PROMETHEUS_TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Every metric of this node.
#[utoipa::path(get, path = "/metrics", tag = "health",
    responses((status = 200, description = "Prometheus text", body = String, content_type = "text/plain")))]
pub async fn metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    refresh(&api.scrapes, Arc::clone(&api.node)).await;
    ([(header::CONTENT_TYPE, PROMETHEUS_TEXT)], api.node.metrics().encode())
}

async fn refresh(scrapes: &Arc<Semaphore>, node: Arc<Node>) {
    // A thread that hangs in the kernel keeps the permit.
    let Ok(permit) = Arc::clone(scrapes).try_acquire_owned() else { return };
    let refreshed = spawn_blocking(move || {
        node.metrics().refresh();
        drop(permit);
    });
    if timeout(REFRESH_MAX, refreshed).await.is_err() {
        tracing::warn!("figures from the disk took longer than {REFRESH_MAX:?}; the last ones go out");
    }
}
