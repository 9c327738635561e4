//! The limits of every field a client can send, and what is said when one is broken.
//!
//! The request path calls these before anything is proposed; apply trusts them. An `Invalid` names
//! the field, the limit and the actual size, so that the answer can say what to do.

use super::{NewAssertion, NewEpoch, NewSupersession, NewVote, path, value};

/// Longest predicate, voter, epoch name or import id, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Longest `source`, in bytes.
pub const SOURCE_BYTES_MAX: usize = 1024;
/// Longest `reason` or `description`, in bytes.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Most assertions in one batch.
pub const BATCH_ITEMS_MAX: usize = 10_000;
/// Earliest and latest `valid_from` and `valid_to`, Unix milliseconds: the years 0 to 9999, which is
/// what RFC 3339 can write.
pub const VALID_MS: std::ops::RangeInclusive<i64> = -62_167_219_200_000..=253_402_300_799_999;

/// A field that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Larger than its limit (a short text: 422; a value: 413).
    #[error("`{field}`: {what} has {actual_bytes} bytes, the limit is {limit_bytes}")]
    TooLong {
        /// Name of the field in the request.
        field: String,
        /// What was measured: `it`, or a part.
        what: &'static str,
        /// The limit, in bytes.
        limit_bytes: usize,
        /// The size found, in bytes.
        actual_bytes: usize,
    },
    /// Wrong in another way.
    #[error("`{field}` {why}")]
    Malformed {
        /// Name of the field in the request.
        field: String,
        /// What is wrong, as the rest of a sentence.
        why: String,
    },
}

impl Invalid {
    /// `field` is over its limit.
    pub fn too_long(field: &str, limit_bytes: usize, actual_bytes: usize) -> Self {
        Invalid::TooLong { field: field.to_owned(), what: "it", limit_bytes, actual_bytes }
    }

    /// `field` breaks a rule; `why` continues the sentence that starts with its name.
    pub fn malformed(field: &str, why: impl Into<String>) -> Self {
        Invalid::Malformed { field: field.to_owned(), why: why.into() }
    }

    /// Name of the field in the request.
    pub fn field(&self) -> &str {
        match self {
            Invalid::TooLong { field, .. } | Invalid::Malformed { field, .. } => field,
        }
    }

    /// True for a value over its limit, which HTTP answers with 413 instead of 422.
    pub fn is_value_too_large(&self) -> bool {
        matches!(self, Invalid::TooLong { field, .. } if field == "value")
    }

    /// The same fault of item `number` (from 0) of a batch.
    pub fn in_item(self, number: usize) -> Self {
        let name = |field: String| format!("[{number}].{field}");
        match self {
            Invalid::TooLong { field, what, limit_bytes, actual_bytes } => {
                Invalid::TooLong { field: name(field), what, limit_bytes, actual_bytes }
            }
            Invalid::Malformed { field, why } => Invalid::Malformed { field: name(field), why },
        }
    }
}

/// Checks a name that becomes part of a key: 1 to 255 bytes, no control characters.
pub fn validate_name(field: &str, name: &str) -> Result<(), Invalid> {
    if name.is_empty() {
        return Err(Invalid::malformed(field, "is empty"));
    }
    validate_line(field, name, NAME_BYTES_MAX)
}

/// Checks a predicate.
pub fn validate_predicate(predicate: &str) -> Result<(), Invalid> {
    validate_name("predicate", predicate)
}

/// Checks an epoch's name.
pub fn validate_epoch_name(name: &str) -> Result<(), Invalid> {
    validate_name("name", name)
}

/// Checks an import's id.
pub fn validate_import_id(id: &str) -> Result<(), Invalid> {
    validate_name("import_id", id)
}

/// Checks an assertion. Whether its epoch and what it supersedes exist is for apply to say.
pub fn validate_assertion(assertion: &NewAssertion) -> Result<(), Invalid> {
    path::validate(&assertion.concept_path)?;
    validate_predicate(&assertion.predicate)?;
    value::check_size(&assertion.value_json)?;
    if let Some(source) = &assertion.source {
        validate_line("source", source, SOURCE_BYTES_MAX)?;
    }
    if let Some(confidence) = assertion.confidence {
        validate_number("confidence", confidence, 0.0, 1.0)?;
    }
    if let Some(epoch) = &assertion.epoch {
        validate_name("epoch", epoch)?;
    }
    for (field, time) in [("valid_from", assertion.valid_from_ms), ("valid_to", assertion.valid_to_ms)] {
        if time.is_some_and(|ms| !VALID_MS.contains(&ms)) {
            return Err(Invalid::malformed(field, "lies outside the years 0 to 9999"));
        }
    }
    if let (Some(from), Some(to)) = (assertion.valid_from_ms, assertion.valid_to_ms)
        && to <= from
    {
        return Err(Invalid::malformed("valid_to", "is not after `valid_from`"));
    }
    if assertion.supersedes == Some(assertion.id) {
        return Err(Invalid::malformed("supersedes", "names the assertion itself"));
    }
    Ok(())
}

/// Checks a batch: at least one item, at most [`BATCH_ITEMS_MAX`], each valid; the first bad one is named.
pub fn validate_batch(assertions: &[NewAssertion]) -> Result<(), Invalid> {
    if assertions.is_empty() {
        return Err(Invalid::malformed("batch", "is empty"));
    }
    if assertions.len() > BATCH_ITEMS_MAX {
        return Err(Invalid::malformed(
            "batch",
            format!("has {} items, the limit is {BATCH_ITEMS_MAX}", assertions.len()),
        ));
    }
    for (number, assertion) in assertions.iter().enumerate() {
        validate_assertion(assertion).map_err(|invalid| invalid.in_item(number))?;
    }
    Ok(())
}

/// Checks a vote.
pub fn validate_vote(vote: &NewVote) -> Result<(), Invalid> {
    validate_name("voter", &vote.voter)?;
    validate_number("weight", vote.weight, -1.0, 1.0)?;
    validate_text("reason", vote.reason.as_deref())
}

/// Checks an epoch.
pub fn validate_epoch(epoch: &NewEpoch) -> Result<(), Invalid> {
    validate_epoch_name(&epoch.name)?;
    validate_text("description", epoch.description.as_deref())?;
    match &epoch.supersedes {
        Some(old) if *old == epoch.name => Err(Invalid::malformed("supersedes", "names the epoch itself")),
        Some(old) => validate_name("supersedes", old),
        None => Ok(()),
    }
}

/// Checks a supersession.
pub fn validate_supersession(supersession: &NewSupersession) -> Result<(), Invalid> {
    if supersession.new == Some(supersession.old) {
        return Err(Invalid::malformed("new", "is the same assertion as `old`"));
    }
    validate_text("reason", supersession.reason.as_deref())
}

fn validate_line(field: &str, text: &str, limit_bytes: usize) -> Result<(), Invalid> {
    if text.len() > limit_bytes {
        return Err(Invalid::too_long(field, limit_bytes, text.len()));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(c) => Err(Invalid::malformed(field, format!("contains the control character U+{:04X}", c as u32))),
        None => Ok(()),
    }
}

fn validate_text(field: &str, text: Option<&str>) -> Result<(), Invalid> {
    match text {
        Some(text) if text.len() > TEXT_BYTES_MAX => Err(Invalid::too_long(field, TEXT_BYTES_MAX, text.len())),
        _ => Ok(()),
    }
}

fn validate_number(field: &str, number: f64, min: f64, max: f64) -> Result<(), Invalid> {
    // NaN fails the comparison too.
    if (min..=max).contains(&number) {
        Ok(())
    } else {
        Err(Invalid::malformed(field, format!("is {number}; it must lie between {min} and {max}")))
    }
}
