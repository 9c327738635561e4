//! The facts that StemeDB keeps, as callers give them and as the log carries them.
//!
//! Everything here is plain data and pure rules. Times, ids and hashes are already chosen when a
//! value of these types exists, so that applying it is deterministic on every node.

pub mod path;
pub mod resolve;
pub mod validate;
pub mod value;

#[cfg(test)]
mod tests;

pub use resolve::Resolve;
pub use validate::{Invalid, validate_assertion, validate_batch, validate_epoch, validate_supersession, validate_vote};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A statement that a concept has a property with a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewAssertion {
    /// UUIDv7, made before proposing.
    pub id: Uuid,
    /// Segments separated by `/`, validated by `model::path`.
    pub concept_path: String,
    /// 1 to 255 bytes, no control characters.
    pub predicate: String,
    /// The value as compact JSON text (any JSON value).
    pub value_json: String,
    /// Who said so.
    pub source: Option<String>,
    /// 0 to 1.
    pub confidence: Option<f64>,
    /// Name of an existing epoch.
    pub epoch: Option<String>,
    /// Id of the assertion that this one replaces.
    pub supersedes: Option<Uuid>,
    /// Start of validity, Unix milliseconds.
    pub valid_from_ms: Option<i64>,
    /// End of validity (exclusive), Unix milliseconds.
    pub valid_to_ms: Option<i64>,
}

/// A vote on an assertion. A later one of the same voter replaces the earlier one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewVote {
    /// UUIDv7 of the vote itself.
    pub id: Uuid,
    /// The assertion voted on.
    pub assertion_id: Uuid,
    /// Who votes, 1 to 255 bytes.
    pub voter: String,
    /// -1 to 1.
    pub weight: f64,
    /// Why.
    pub reason: Option<String>,
}

/// An epoch. Assertions of a superseded epoch leave the default answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewEpoch {
    /// UUIDv7 of the epoch.
    pub id: Uuid,
    /// Unique, 1 to 255 bytes.
    pub name: String,
    /// Free text.
    pub description: Option<String>,
    /// Name of the epoch that this one replaces.
    pub supersedes: Option<String>,
}

/// A replacement of one assertion by another, or its retraction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewSupersession {
    /// UUIDv7 of the supersession itself.
    pub id: Uuid,
    /// The assertion that is replaced.
    pub old: Uuid,
    /// Its replacement; absent: retracted.
    pub new: Option<Uuid>,
    /// Why.
    pub reason: Option<String>,
}
