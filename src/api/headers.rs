//! The headers that StemeDB reads and writes, and how they become keys.
//!
//! A write has one key. The client's `Idempotency-Key` comes first; else the load balancer's
//! `X-StemeDB-Retry-Id`; else the node makes one. Only hashes of the given texts travel.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use sha2::{Digest, Sha256};

use crate::state::command::{CommandKey, KeySource};

use super::problem::{Kind, Problem};

/// The client's key, 1 to 255 visible ASCII characters.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// The load balancer's id of a request, the same on each of its attempts.
pub const RETRY_ID: HeaderName = HeaderName::from_static("x-stemedb-retry-id");
/// Name of an import, on `POST /v1/assert/batch`.
pub const IMPORT_ID: HeaderName = HeaderName::from_static("x-stemedb-import-id");
/// Records of the import's source before this chunk.
pub const IMPORT_POSITION: HeaderName = HeaderName::from_static("x-stemedb-import-position");
/// In answers: index of the (last) fact written, or of the state that was read.
pub const INDEX: HeaderName = HeaderName::from_static("x-stemedb-index");
/// In answers: name of the node that committed the write or served the read.
pub const SERVED_BY: HeaderName = HeaderName::from_static("x-stemedb-served-by");
/// In refusals of a node that is cut off from the others: another one may well serve the request.
pub const TRY_ELSEWHERE: HeaderName = HeaderName::from_static("x-stemedb-try-elsewhere");
/// In answers to a health probe: well, and not the leader. Envoy prefers other hosts then.
pub const ENVOY_DEGRADED: HeaderName = HeaderName::from_static("x-envoy-degraded");

/// `application/json`.
pub const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Longest key, retry id or import id, in bytes.
pub const KEY_BYTES_MAX: usize = 255;

/// The value of a header that may be given once, 1 to 255 visible ASCII characters.
fn token<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let refuse =
        |what: String| Problem::new(Kind::InvalidHeader, format!("Header {name} {what}")).with("header", name.as_str());
    if values.next().is_some() {
        return Err(refuse("is given more than once. Give it once.".into()));
    }
    let bytes = value.as_bytes();
    if bytes.is_empty() || bytes.len() > KEY_BYTES_MAX {
        let what = format!("must have 1 to {KEY_BYTES_MAX} bytes and has {}.", bytes.len());
        return Err(refuse(what).with_limit(KEY_BYTES_MAX as u64, bytes.len() as u64));
    }
    match value.to_str() {
        Ok(text) if bytes.iter().all(u8::is_ascii_graphic) => Ok(Some(text)),
        _ => Err(refuse("must be visible ASCII characters without spaces.".into())),
    }
}

/// First 16 bytes of SHA-256 over `parts`, each preceded by its length.
fn hash16(parts: &[&[u8]]) -> u128 {
    let mut sha = Sha256::new();
    for part in parts {
        sha.update((part.len() as u64).to_be_bytes());
        sha.update(part);
    }
    let digest = sha.finalize();
    digest.iter().take(16).fold(0, |hash, byte| hash << 8 | u128::from(*byte))
}

/// The key that a request carries, if it carries one.
pub fn command_key(headers: &HeaderMap) -> Result<Option<CommandKey>, Problem> {
    if headers.is_empty() {
        return Ok(None);
    }
    // Both are checked, so that a bad retry id shows even while clients send keys of their own.
    let client = token(headers, &IDEMPOTENCY_KEY)?.map(|text| (KeySource::Client, text));
    let balancer = token(headers, &RETRY_ID)?.map(|text| (KeySource::Balancer, text));
    Ok(client.or(balancer).map(|(source, text)| CommandKey { source, id: hash16(&[text.as_bytes()]) }))
}

/// True when a load balancer gave the request an id: it may be a repetition that no header shows.
pub fn came_through_balancer(headers: &HeaderMap) -> bool {
    headers.contains_key(RETRY_ID)
}

/// Hash of what the client asked for: the route, the import headers and the body's bytes.
pub fn body_hash(route: &str, import: Option<&Import>, body: &[u8]) -> u128 {
    match import {
        None => hash16(&[route.as_bytes(), body]),
        Some(import) => {
            let position = import.position_before.to_be_bytes();
            hash16(&[route.as_bytes(), body, import.id.as_bytes(), &position])
        }
    }
}

/// What makes a batch a chunk of an import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// Chosen by the importer.
    pub id: String,
    /// Records before this chunk.
    pub position_before: u64,
}

/// The import headers: both or none.
pub fn import(headers: &HeaderMap) -> Result<Option<Import>, Problem> {
    match (token(headers, &IMPORT_ID)?, token(headers, &IMPORT_POSITION)?) {
        (None, None) => Ok(None),
        (Some(id), Some(position)) => {
            let position_before = position.parse().map_err(|_| {
                let detail = format!(
                    "Header {IMPORT_POSITION} must be a count of records, 0 to {}, and is \"{position}\".",
                    u64::MAX
                );
                Problem::new(Kind::InvalidHeader, detail).with("header", IMPORT_POSITION.as_str())
            })?;
            Ok(Some(Import { id: id.to_string(), position_before }))
        }
        (Some(_), None) => Err(lone(&IMPORT_ID, &IMPORT_POSITION)),
        (None, Some(_)) => Err(lone(&IMPORT_POSITION, &IMPORT_ID)),
    }
}

fn lone(given: &HeaderName, missing: &HeaderName) -> Problem {
    let detail = format!("Header {given} needs {missing} beside it. Give both or none.");
    Problem::new(Kind::InvalidHeader, detail).with("header", missing.as_str())
}

/// True when the client waits for `100 Continue` before it sends the body.
pub fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Adds `X-StemeDB-Index` and `X-StemeDB-Served-By`.
pub fn stamp(headers: &mut HeaderMap, index: u64, served_by: &str) {
    headers.insert(INDEX, HeaderValue::from(index));
    // Names are checked by the configuration; one that is no header value is left out.
    if let Ok(name) = HeaderValue::from_str(served_by) {
        headers.insert(SERVED_BY, name);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    #[test]
    fn the_clients_key_comes_before_the_balancers() {
        assert_eq!(command_key(&HeaderMap::new()).unwrap(), None);
        let both = headers(&[("idempotency-key", "a"), ("x-stemedb-retry-id", "b")]);
        let client = command_key(&both).unwrap().unwrap();
        assert_eq!(client.source, KeySource::Client);
        let balancer = command_key(&headers(&[("x-stemedb-retry-id", "a")])).unwrap().unwrap();
        assert_eq!(balancer.source, KeySource::Balancer);
        assert_eq!(client.id, balancer.id, "the source keeps them apart, not the hash");
        assert!(came_through_balancer(&both));
    }

    #[test]
    fn bad_keys_are_refused() {
        let long = "k".repeat(256);
        for value in ["", "a b", "\u{e9}", long.as_str()] {
            for name in ["idempotency-key", "x-stemedb-retry-id"] {
                let problem = command_key(&headers(&[(name, value)])).unwrap_err();
                assert_eq!(problem.kind(), Kind::InvalidHeader, "{value}");
                assert_eq!(problem.member("header").unwrap(), name);
            }
        }
        assert!(command_key(&headers(&[("idempotency-key", &"k".repeat(255))])).is_ok());
        let twice = headers(&[("idempotency-key", "a"), ("idempotency-key", "a")]);
        assert!(command_key(&twice).is_err());
    }

    #[test]
    fn the_body_hash_covers_route_body_and_import() {
        let import = Import { id: "a".into(), position_before: 1 };
        let hashes = [
            body_hash("/v1/assert", None, b"{}"),
            body_hash("/v1/vote", None, b"{}"),
            body_hash("/v1/assert", None, b"{ }"),
            body_hash("/v1/assert", Some(&import), b"{}"),
        ];
        for (i, a) in hashes.iter().enumerate() {
            assert_eq!(hashes.iter().filter(|b| *b == a).count(), 1, "{i}");
        }
    }

    #[test]
    fn import_headers_come_together() {
        assert_eq!(import(&HeaderMap::new()).unwrap(), None);
        let pairs = [("x-stemedb-import-id", "a"), ("x-stemedb-import-position", "7")];
        let expected = Import { id: "a".into(), position_before: 7 };
        assert_eq!(import(&headers(&pairs)).unwrap(), Some(expected));
        assert!(import(&headers(&pairs[..1])).is_err());
        assert!(import(&headers(&pairs[1..])).is_err());
        let bad = [("x-stemedb-import-id", "a"), ("x-stemedb-import-position", "-1")];
        assert!(import(&headers(&bad)).is_err());
    }
}
