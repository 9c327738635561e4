//! Concept paths: `debian/net/curl`.
//!
//! A path is the first part of every stored key of its concept, so its rules are strict and checked
//! once, at the edge: segments separated by `/`, none empty, none `.` or `..`, no control characters
//! (a zero byte ends the path inside a key), and `*` kept for patterns. Whoever holds a validated
//! path may put it into a key as it is.

use super::validate::Invalid;

/// Longest path, in bytes.
pub const PATH_BYTES_MAX: usize = 1024;
/// Longest segment of a path, in bytes.
pub const SEGMENT_BYTES_MAX: usize = 255;
/// What stands behind a path that asks for a subtree.
pub const SUBTREE_SUFFIX: &str = "/**";

const FIELD: &str = "concept_path";

/// Checks `path` as the name of one concept.
pub fn validate(path: &str) -> Result<(), Invalid> {
    if path.is_empty() {
        return Err(Invalid::malformed(FIELD, "is empty"));
    }
    if path.len() > PATH_BYTES_MAX {
        return Err(Invalid::too_long(FIELD, PATH_BYTES_MAX, path.len()));
    }
    if path.contains('*') {
        return Err(Invalid::malformed(FIELD, "contains `*`, which is reserved for patterns"));
    }
    if let Some(c) = path.chars().find(|c| c.is_control()) {
        return Err(Invalid::malformed(FIELD, format!("contains the control character U+{:04X}", c as u32)));
    }
    if path.starts_with('/') || path.ends_with('/') {
        return Err(Invalid::malformed(FIELD, "starts or ends with `/`"));
    }
    for segment in path.split('/') {
        match segment {
            "" => return Err(Invalid::malformed(FIELD, "has an empty segment (`//`)")),
            "." | ".." => {
                return Err(Invalid::malformed(FIELD, format!("has the segment `{segment}`")));
            }
            _ if segment.len() > SEGMENT_BYTES_MAX => {
                return Err(Invalid::TooLong {
                    field: FIELD.to_owned(),
                    what: "a segment of it",
                    limit_bytes: SEGMENT_BYTES_MAX,
                    actual_bytes: segment.len(),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Splits the `concept_path` of a query: the path, and whether its subtree (the concept itself and
/// everything below it) was asked for with a trailing `/**`.
pub fn parse_query(text: &str) -> Result<(&str, bool), Invalid> {
    let (path, subtree) = match text.strip_suffix(SUBTREE_SUFFIX) {
        Some(path) => (path, true),
        None => (text, false),
    };
    validate(path)?;
    Ok((path, subtree))
}
