//! From the bytes of a write to an operation: parse, make the id, check every rule.
//!
//! What comes out is complete and valid except for what only the replicated state knows (whether an
//! epoch or an assertion exists). Pure but for the new ids.

use serde::de::MapAccess;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{
    model::{self, Invalid, NewAssertion, NewEpoch, NewSupersession, NewVote},
    state::command::Operation,
};

use super::{
    headers::Import,
    json::{self, Fields, TimeMs},
    mapping,
    problem::{Kind, Problem},
    value,
};

#[derive(Default)]
struct AssertBody<'de> {
    concept_path: String,
    predicate: String,
    value: Option<&'de RawValue>,
    source: Option<String>,
    confidence: Option<f64>,
    epoch: Option<String>,
    supersedes: Option<Uuid>,
    valid_from: Option<TimeMs>,
    valid_to: Option<TimeMs>,
}

impl<'de> Fields<'de> for AssertBody<'de> {
    const WHAT: &'static str = "An assertion";
    const NAMES: &'static [&'static str] = &[
        "concept_path",
        "predicate",
        "value",
        "source",
        "confidence",
        "epoch",
        "supersedes",
        "valid_from",
        "valid_to",
    ];
    const REQUIRED: usize = 3;
    fn read<A: MapAccess<'de>>(&mut self, field: usize, map: &mut A) -> Result<(), A::Error> {
        match field {
            0 => self.concept_path = map.next_value()?,
            1 => self.predicate = map.next_value()?,
            // Not as an `Option`, which would take a null for "nothing": null is a value.
            2 => self.value = Some(map.next_value::<&RawValue>()?),
            3 => self.source = map.next_value()?,
            4 => self.confidence = map.next_value()?,
            5 => self.epoch = map.next_value()?,
            6 => self.supersedes = map.next_value()?,
            7 => self.valid_from = map.next_value()?,
            _ => self.valid_to = map.next_value()?,
        }
        Ok(())
    }
}

impl AssertBody<'_> {
    fn complete(self) -> Result<NewAssertion, Problem> {
        let assertion = NewAssertion {
            id: Uuid::now_v7(),
            concept_path: self.concept_path,
            predicate: self.predicate,
            value_json: value::compact(self.value.map_or("null", RawValue::get))?,
            source: self.source,
            confidence: self.confidence,
            epoch: self.epoch,
            supersedes: self.supersedes,
            valid_from_ms: self.valid_from.map(|time| time.0),
            valid_to_ms: self.valid_to.map(|time| time.0),
        };
        checked(assertion, model::validate_assertion)
    }
}

#[derive(Default)]
struct VoteBody {
    assertion_id: Uuid,
    voter: String,
    weight: f64,
    reason: Option<String>,
}

impl<'de> Fields<'de> for VoteBody {
    const WHAT: &'static str = "A vote";
    const NAMES: &'static [&'static str] = &["assertion_id", "voter", "weight", "reason"];
    const REQUIRED: usize = 3;
    fn read<A: MapAccess<'de>>(&mut self, field: usize, map: &mut A) -> Result<(), A::Error> {
        match field {
            0 => self.assertion_id = map.next_value()?,
            1 => self.voter = map.next_value()?,
            2 => self.weight = map.next_value()?,
            _ => self.reason = map.next_value()?,
        }
        Ok(())
    }
}

#[derive(Default)]
struct EpochBody {
    name: String,
    description: Option<String>,
    supersedes: Option<String>,
}

impl<'de> Fields<'de> for EpochBody {
    const WHAT: &'static str = "An epoch";
    const NAMES: &'static [&'static str] = &["name", "description", "supersedes"];
    const REQUIRED: usize = 1;
    fn read<A: MapAccess<'de>>(&mut self, field: usize, map: &mut A) -> Result<(), A::Error> {
        match field {
            0 => self.name = map.next_value()?,
            1 => self.description = map.next_value()?,
            _ => self.supersedes = map.next_value()?,
        }
        Ok(())
    }
}

#[derive(Default)]
struct SupersedeBody {
    old: Uuid,
    new: Option<Uuid>,
    reason: Option<String>,
}

impl<'de> Fields<'de> for SupersedeBody {
    const WHAT: &'static str = "A supersession";
    const NAMES: &'static [&'static str] = &["old", "new", "reason"];
    const REQUIRED: usize = 1;
    fn read<A: MapAccess<'de>>(&mut self, field: usize, map: &mut A) -> Result<(), A::Error> {
        match field {
            0 => self.old = map.next_value()?,
            1 => self.new = map.next_value()?,
            _ => self.reason = map.next_value()?,
        }
        Ok(())
    }
}

fn checked<T>(new: T, check: impl FnOnce(&T) -> Result<(), Invalid>) -> Result<T, Problem> {
    match check(&new) {
        Ok(()) => Ok(new),
        Err(invalid) => Err(mapping::invalid(&invalid)),
    }
}

/// `POST /v1/assert`
pub fn assertion(body: &[u8]) -> Result<Operation, Problem> {
    let new = json::parse_object::<AssertBody<'_>>(body)?.complete()?;
    Ok(Operation::Assert(vec![new]))
}

/// `POST /v1/assert/batch`, as part of an import or not.
pub fn batch(body: &[u8], import: Option<Import>) -> Result<Operation, Problem> {
    let limit = model::validate::BATCH_ITEMS_MAX;
    let (items, count) = json::parse_items::<AssertBody<'_>>(body, limit)?;
    if count > limit {
        let detail = format!("The batch has {count} items; at most {limit} are taken. Split it into smaller batches.");
        let problem = Problem::new(Kind::TooManyItems, detail);
        return Err(problem.with_limit(limit as u64, count as u64));
    }
    if items.is_empty() {
        let detail = "The batch is empty. Send a JSON array of assertions, or one per line.";
        return Err(Problem::new(Kind::EmptyBatch, detail));
    }
    let mut assertions = Vec::with_capacity(items.len());
    for (item, body) in items.into_iter().enumerate() {
        let complete = body.complete();
        let named = |p: Problem| p.in_context(&format!("Item {item}: ")).with("item", item);
        assertions.push(complete.map_err(named)?);
    }
    let Some(Import { id, position_before }) = import else {
        return Ok(Operation::Assert(assertions));
    };
    let position_after = position_before.checked_add(count as u64).ok_or_else(|| {
        let detail = format!("The import's position {position_before} leaves no room for {count}.");
        Problem::new(Kind::InvalidHeader, detail)
    })?;
    Ok(Operation::ImportChunk { import_id: id, position_before, position_after, assertions })
}

/// `POST /v1/vote`
pub fn vote(body: &[u8]) -> Result<Operation, Problem> {
    let VoteBody { assertion_id, voter, weight, reason } = json::parse_object(body)?;
    let vote = NewVote { id: Uuid::now_v7(), assertion_id, voter, weight, reason };
    checked(vote, model::validate_vote).map(Operation::Vote)
}

/// `POST /v1/epoch`
pub fn epoch(body: &[u8]) -> Result<Operation, Problem> {
    let EpochBody { name, description, supersedes } = json::parse_object(body)?;
    let epoch = NewEpoch { id: Uuid::now_v7(), name, description, supersedes };
    checked(epoch, model::validate_epoch).map(Operation::Epoch)
}

/// `POST /v1/supersede`
pub fn supersession(body: &[u8]) -> Result<Operation, Problem> {
    let SupersedeBody { old, new, reason } = json::parse_object(body)?;
    let supersession = NewSupersession { id: Uuid::now_v7(), old, new, reason };
    checked(supersession, model::validate_supersession).map(Operation::Supersede)
}

#[cfg(test)]
#[path = "bodies_tests.rs"]
mod tests;
