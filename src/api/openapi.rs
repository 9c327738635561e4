//! `GET /openapi.json`: the whole surface as an OpenAPI document.
//!
//! The descriptions stand beside the handlers; a test compares this document with what the router
//! serves, in both directions.

use axum::{
    body::Bytes,
    http::header,
    response::{IntoResponse, Response},
};
use utoipa::OpenApi;

use super::{admin, compact, flows, headers, health, jobs, members, metrics, read, schema, write};

#[derive(OpenApi)]
#[openapi(
    info(title = "StemeDB", description = "A replicated database for assertions."),
    paths(
        write::assert, write::assert_batch, write::vote, write::epoch, write::supersede,
        read::query, read::assertion, read::history,
        health::health, health::live, health::ready, health::leader, health::replica,
        metrics::metrics, admin::cluster, admin::import, admin::storage_stats, compact::compact, compact::storage_compact,
        jobs::rebuild, members::list, members::add, members::remove, members::replace, flows::drain, flows::undrain, flows::failover,
        jobs::jobs, jobs::job, jobs::cancel, jobs::quarantine, openapi_json,
    ),
    components(schemas(schema::ProblemBody), responses(schema::ProblemResponse)),
    tags(
        (name = "writes", description = "Acknowledged when a majority of the voters has them on disk"),
        (name = "reads", description = "Linearizable unless another consistency is asked for"),
        (name = "health", description = "For load balancers and monitoring"),
        (name = "admin", description = "For operators; keep it off public listeners"),
    )
)]
struct Document;

/// The document.
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// The document as JSON text, made once.
pub fn document_json() -> Bytes {
    static TEXT: std::sync::LazyLock<Bytes> = std::sync::LazyLock::new(|| {
        // The document is fixed at compile time and a test writes it out, so that this cannot fail.
        document().to_pretty_json().unwrap_or_default().into()
    });
    TEXT.clone()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "health",
    responses((status = 200, description = "OpenAPI", content_type = "application/json")))]
pub async fn openapi_json() -> Response {
    ([(header::CONTENT_TYPE, headers::JSON)], document_json()).into_response()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_document_lists_what_the_router_serves_and_nothing_else() {
        let served: BTreeSet<(String, String)> = super::super::ROUTES
            .iter()
            .flat_map(|route| route.methods.iter().map(|m| (route.path.to_string(), m.to_ascii_lowercase())))
            .collect();
        let json: serde_json::Value = serde_json::from_slice(&document_json()).unwrap();
        let described: BTreeSet<(String, String)> = json["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| item.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())))
            .collect();
        assert_eq!(served, described);
    }

    #[test]
    fn every_operation_is_described_and_named_once() {
        let json: serde_json::Value = serde_json::from_slice(&document_json()).unwrap();
        for (path, item) in json["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let text = operation["summary"].as_str().or(operation["description"].as_str());
                assert!(text.is_some_and(|t| !t.is_empty()), "{method} {path}");
                assert!(operation["responses"].as_object().is_some_and(|r| !r.is_empty()));
            }
        }
    }
}
