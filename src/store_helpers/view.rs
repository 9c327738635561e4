//! What answers look like as JSON.

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::StoreError;
use crate::state::keys::FactKey;
use crate::state::record::{AssertionRecord, EpochRecord, SupersessionRecord, Tally, VoteRecord, from_nano};

/// An assertion as the API answers it. Times are RFC 3339 in UTC with milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct AssertionView {
    /// Its id.
    pub id: Uuid,
    /// The concept.
    pub concept_path: String,
    /// The predicate.
    pub predicate: String,
    /// The value, as it was given.
    pub value: Box<RawValue>,
    /// Who said so.
    pub source: Option<String>,
    /// 0 to 1.
    pub confidence: Option<f64>,
    /// Name of its epoch.
    pub epoch: Option<String>,
    /// When the node that took it received it.
    #[serde(serialize_with = "rfc3339")]
    pub created_at: Timestamp,
    /// Sequence number of the fact.
    pub index: u64,
    /// Its votes.
    pub votes: VotesView,
    /// The assertion that replaced it last; `null` too when it was retracted.
    pub superseded_by: Option<Uuid>,
    /// Retracted: superseded by nothing. Left out when false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub retracted: bool,
    /// The assertion that it replaced. Left out when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub supersedes: Option<Uuid>,
    /// Start of validity. Left out when open.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "rfc3339_option")]
    pub valid_from: Option<Timestamp>,
    /// End of validity, exclusive. Left out when open.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "rfc3339_option")]
    pub valid_to: Option<Timestamp>,
}

/// Votes of an assertion: the last one of each voter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct VotesView {
    /// Sum of weights, exact to nine decimals.
    pub sum: f64,
    /// Voters.
    pub count: u64,
}

impl From<Tally> for VotesView {
    fn from(tally: Tally) -> Self {
        VotesView { sum: from_nano(tally.sum_nano), count: tally.count }
    }
}

impl AssertionView {
    pub(super) fn new(
        key: &FactKey<'_>,
        record: &AssertionRecord<'_>,
        superseded: Option<Option<Uuid>>,
        votes: Tally,
    ) -> Result<Self, StoreError> {
        Ok(AssertionView {
            id: record.id,
            concept_path: key.path.to_owned(),
            predicate: key.predicate.to_owned(),
            value: raw_value(record.value_json, record.id)?,
            source: record.source.map(str::to_owned),
            confidence: record.confidence,
            epoch: record.epoch.map(str::to_owned),
            created_at: created_at(record.created_at_ms)?,
            index: key.index,
            votes: votes.into(),
            superseded_by: superseded.flatten(),
            retracted: superseded == Some(None),
            supersedes: record.supersedes,
            valid_from: record.valid_from_ms.map(timestamp).transpose()?,
            valid_to: record.valid_to_ms.map(timestamp).transpose()?,
        })
    }
}

/// An epoch as the API answers it.
#[derive(Clone, Debug, Serialize)]
pub struct EpochView {
    /// Its id.
    pub id: Uuid,
    /// Unique.
    pub name: String,
    /// Free text.
    pub description: Option<String>,
    /// The epoch that it replaced.
    pub supersedes: Option<String>,
    /// The first epoch that replaced it.
    pub superseded_by: Option<String>,
    /// When the node that took it received it.
    #[serde(serialize_with = "rfc3339")]
    pub created_at: Timestamp,
    /// Sequence number of the fact.
    pub index: u64,
}

impl EpochView {
    pub(super) fn new(name: &str, record: &EpochRecord<'_>, superseded_by: Option<String>) -> Result<Self, StoreError> {
        Ok(EpochView {
            id: record.id,
            name: name.to_owned(),
            description: record.description.map(str::to_owned),
            supersedes: record.supersedes.map(str::to_owned),
            superseded_by,
            created_at: created_at(record.created_at_ms)?,
            index: record.index,
        })
    }
}

/// One fact of a history.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum HistoryEvent {
    /// It was asserted.
    Assertion {
        /// Sequence number of the fact.
        index: u64,
        /// Id of the assertion.
        id: Uuid,
        /// The concept.
        concept_path: String,
        /// The predicate.
        predicate: String,
        /// The value, as it was given.
        value: Box<RawValue>,
        /// Who said so.
        source: Option<String>,
        /// 0 to 1.
        confidence: Option<f64>,
        /// Name of its epoch.
        epoch: Option<String>,
        /// The assertion that it replaced.
        supersedes: Option<Uuid>,
        /// When the node that took it received it.
        #[serde(serialize_with = "rfc3339")]
        created_at: Timestamp,
        /// Start of validity.
        #[serde(serialize_with = "rfc3339_option")]
        valid_from: Option<Timestamp>,
        /// End of validity, exclusive.
        #[serde(serialize_with = "rfc3339_option")]
        valid_to: Option<Timestamp>,
    },
    /// Someone voted on it.
    Vote {
        /// Sequence number of the fact.
        index: u64,
        /// Id of the vote.
        id: Uuid,
        /// The assertion voted on.
        assertion_id: Uuid,
        /// Who voted.
        voter: String,
        /// -1 to 1.
        weight: f64,
        /// Why.
        reason: Option<String>,
        /// When the node that took it received it.
        #[serde(serialize_with = "rfc3339")]
        created_at: Timestamp,
    },
    /// It was replaced or retracted.
    Supersession {
        /// Sequence number of the fact.
        index: u64,
        /// Id of the supersession; of the new assertion, when its own `supersedes` says so.
        id: Uuid,
        /// The assertion that was replaced.
        old: Uuid,
        /// Its replacement; `null`: retracted.
        new: Option<Uuid>,
        /// Why.
        reason: Option<String>,
        /// When the node that took it received it.
        #[serde(serialize_with = "rfc3339")]
        created_at: Timestamp,
    },
}

impl HistoryEvent {
    /// Sequence number of the fact.
    pub fn index(&self) -> u64 {
        match self {
            HistoryEvent::Assertion { index, .. }
            | HistoryEvent::Vote { index, .. }
            | HistoryEvent::Supersession { index, .. } => *index,
        }
    }

    pub(super) fn assertion(key: &FactKey<'_>, record: &AssertionRecord<'_>) -> Result<Self, StoreError> {
        Ok(HistoryEvent::Assertion {
            index: key.index,
            id: record.id,
            concept_path: key.path.to_owned(),
            predicate: key.predicate.to_owned(),
            value: raw_value(record.value_json, record.id)?,
            source: record.source.map(str::to_owned),
            confidence: record.confidence,
            epoch: record.epoch.map(str::to_owned),
            supersedes: record.supersedes,
            created_at: created_at(record.created_at_ms)?,
            valid_from: record.valid_from_ms.map(timestamp).transpose()?,
            valid_to: record.valid_to_ms.map(timestamp).transpose()?,
        })
    }

    pub(super) fn vote(index: u64, assertion_id: Uuid, record: &VoteRecord<'_>) -> Result<Self, StoreError> {
        Ok(HistoryEvent::Vote {
            index,
            id: record.id,
            assertion_id,
            voter: record.voter.to_owned(),
            weight: from_nano(record.weight_nano),
            reason: record.reason.map(str::to_owned),
            created_at: created_at(record.created_at_ms)?,
        })
    }

    pub(super) fn supersession(index: u64, old: Uuid, record: &SupersessionRecord<'_>) -> Result<Self, StoreError> {
        Ok(HistoryEvent::Supersession {
            index,
            id: record.id,
            old,
            new: record.new,
            reason: record.reason.map(str::to_owned),
            created_at: created_at(record.created_at_ms)?,
        })
    }
}

fn raw_value(json: &str, id: Uuid) -> Result<Box<RawValue>, StoreError> {
    RawValue::from_string(json.to_owned())
        .map_err(|error| StoreError::Damaged { what: format!("value of assertion {id} is not JSON: {error}") })
}

fn created_at(unix_ms: u64) -> Result<Timestamp, StoreError> {
    timestamp(i64::try_from(unix_ms).unwrap_or(i64::MAX))
}

fn timestamp(unix_ms: i64) -> Result<Timestamp, StoreError> {
    Timestamp::from_millisecond(unix_ms)
        .map_err(|_| StoreError::Damaged { what: format!("time {unix_ms} ms lies outside the calendar") })
}

fn rfc3339<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{time:.3}"))
}

fn rfc3339_option<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => rfc3339(time, serializer),
        None => serializer.serialize_none(),
    }
}
