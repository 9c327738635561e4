//! What stands in the rows: small hand-packed records, each behind a byte with its format version.
//!
//! An assertion costs 18 bytes beside its texts: version, flags, id, and the difference between its
//! creation and the time inside its UUIDv7; the value takes the rest of the row. Reading is checked:
//! a version this program does not know is an error that names both, anything else that does not
//! fit is damage. The golden bytes beside the tests freeze these forms.

use uuid::Uuid;

mod reader;
#[cfg(test)]
mod tests;

pub use reader::{RECORD_FORMAT, Reader, RecordError, push_created, push_signed, push_text, push_varint, uuid_ms};

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

/// An assertion; path, predicate and index are in its key.
#[derive(Clone, Debug, PartialEq)]
pub struct AssertionRecord<'a> {
    /// Its id.
    pub id: Uuid,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// Who said so.
    pub source: Option<&'a str>,
    /// 0 to 1.
    pub confidence: Option<f64>,
    /// Name of its epoch.
    pub epoch: Option<&'a str>,
    /// The assertion that this one replaces.
    pub supersedes: Option<Uuid>,
    /// Unix milliseconds, inclusive.
    pub valid_from_ms: Option<i64>,
    /// Unix milliseconds, exclusive.
    pub valid_to_ms: Option<i64>,
    /// Compact JSON.
    pub value_json: &'a str,
}

impl<'a> AssertionRecord<'a> {
    /// The row.
    pub fn encode(&self) -> Vec<u8> {
        let texts = self.source.map_or(0, str::len) + self.epoch.map_or(0, str::len);
        let mut out = Vec::with_capacity(72 + texts + self.value_json.len());
        out.push(RECORD_FORMAT);
        out.push(
            flag(self.source.is_some(), 1)
                | flag(self.confidence.is_some(), 2)
                | flag(self.epoch.is_some(), 4)
                | flag(self.supersedes.is_some(), 8)
                | flag(self.valid_from_ms.is_some(), 16)
                | flag(self.valid_to_ms.is_some(), 32),
        );
        out.extend_from_slice(self.id.as_bytes());
        push_created(&mut out, self.id, self.created_at_ms);
        if let Some(source) = self.source {
            push_text(&mut out, source);
        }
        if let Some(confidence) = self.confidence {
            out.extend_from_slice(&confidence.to_bits().to_be_bytes());
        }
        if let Some(epoch) = self.epoch {
            push_text(&mut out, epoch);
        }
        if let Some(supersedes) = self.supersedes {
            out.extend_from_slice(supersedes.as_bytes());
        }
        if let Some(ms) = self.valid_from_ms {
            push_signed(&mut out, ms);
        }
        if let Some(ms) = self.valid_to_ms {
            push_signed(&mut out, ms);
        }
        out.extend_from_slice(self.value_json.as_bytes());
        out
    }

    /// Reads a row.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, RecordError> {
        let mut read = Reader::new("assertion", bytes)?;
        let flags = read.flags(63)?;
        let id = read.uuid()?;
        let created_at_ms = read.created(id)?;
        let source = if flags & 1 != 0 { Some(read.text()?) } else { None };
        let confidence = if flags & 2 != 0 {
            let bits = read.take(8)?.try_into().map_err(|_| read.damaged())?;
            Some(f64::from_bits(u64::from_be_bytes(bits)))
        } else {
            None
        };
        let epoch = if flags & 4 != 0 { Some(read.text()?) } else { None };
        let supersedes = if flags & 8 != 0 { Some(read.uuid()?) } else { None };
        let valid_from_ms = if flags & 16 != 0 { Some(read.signed()?) } else { None };
        let valid_to_ms = if flags & 32 != 0 { Some(read.signed()?) } else { None };
        let value_json = read.rest_text()?;
        Ok(AssertionRecord {
            id,
            created_at_ms,
            source,
            confidence,
            epoch,
            supersedes,
            valid_from_ms,
            valid_to_ms,
            value_json,
        })
    }
}

/// A supersession; the assertion it replaces and its fact index are in its key.
#[derive(Clone, Debug, PartialEq)]
pub struct SupersessionRecord<'a> {
    /// Its id; that of the new assertion when the assertion's own `supersedes` wrote it.
    pub id: Uuid,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// The replacement; absent: retracted.
    pub new: Option<Uuid>,
    /// Why.
    pub reason: Option<&'a str>,
}

impl<'a> SupersessionRecord<'a> {
    /// The row.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(44 + self.reason.map_or(0, str::len));
        let own = self.new == Some(self.id);
        out.push(RECORD_FORMAT);
        out.push(flag(self.new.is_some(), 1) | flag(self.reason.is_some(), 2) | flag(own, 4));
        out.extend_from_slice(self.id.as_bytes());
        push_created(&mut out, self.id, self.created_at_ms);
        if let (Some(new), false) = (self.new, own) {
            out.extend_from_slice(new.as_bytes());
        }
        out.extend_from_slice(self.reason.unwrap_or_default().as_bytes());
        out
    }

    /// Reads a row.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, RecordError> {
        let mut read = Reader::new("supersession", bytes)?;
        let flags = read.flags(7)?;
        let id = read.uuid()?;
        let created_at_ms = read.created(id)?;
        let new = match (flags & 1 != 0, flags & 4 != 0) {
            (true, true) => Some(id),
            (true, false) => Some(read.uuid()?),
            (false, false) => None,
            (false, true) => return Err(read.damaged()),
        };
        let text = read.rest_text()?;
        let reason = match flags & 2 != 0 {
            true => Some(text),
            false if text.is_empty() => None,
            false => return Err(read.damaged()),
        };
        Ok(SupersessionRecord { id, created_at_ms, new, reason })
    }
}

/// Sum and count of the votes that count, as of one fact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sum of weights, in billionths, so that it is exact in any order.
    pub sum_nano: i64,
    /// Voters.
    pub count: u64,
}

impl Tally {
    /// The row.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![RECORD_FORMAT];
        push_signed(&mut out, self.sum_nano);
        push_varint(&mut out, self.count);
        out
    }
    /// Reads a row.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut read = Reader::new("tally", bytes)?;
        let tally = Tally { sum_nano: read.signed()?, count: read.varint()? };
        read.end().map(|()| tally)
    }
}

/// Weight of a vote in billionths.
pub fn weight_nano(weight: f64) -> i64 {
    (weight * 1e9).round() as i64
}

/// Billionths as a number.
pub fn from_nano(nano: i64) -> f64 {
    nano as f64 / 1e9
}

/// A vote; its assertion and fact index are in its key.
#[derive(Clone, Debug, PartialEq)]
pub struct VoteRecord<'a> {
    /// Its id.
    pub id: Uuid,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// Weight in billionths.
    pub weight_nano: i64,
    /// The tally of the assertion's votes with this one.
    pub tally: Tally,
    /// Who voted.
    pub voter: &'a str,
    /// Why.
    pub reason: Option<&'a str>,
}

impl<'a> VoteRecord<'a> {
    /// The row.
    pub fn encode(&self) -> Vec<u8> {
        let texts = self.voter.len() + self.reason.map_or(0, str::len);
        let mut out = Vec::with_capacity(40 + texts);
        out.push(RECORD_FORMAT);
        out.push(flag(self.reason.is_some(), 1));
        out.extend_from_slice(self.id.as_bytes());
        push_created(&mut out, self.id, self.created_at_ms);
        push_signed(&mut out, self.weight_nano);
        push_signed(&mut out, self.tally.sum_nano);
        push_varint(&mut out, self.tally.count);
        push_text(&mut out, self.voter);
        out.extend_from_slice(self.reason.unwrap_or_default().as_bytes());
        out
    }

    /// Reads a row.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, RecordError> {
        let mut read = Reader::new("vote", bytes)?;
        let flags = read.flags(1)?;
        let id = read.uuid()?;
        let created_at_ms = read.created(id)?;
        let weight_nano = read.signed()?;
        let tally = Tally { sum_nano: read.signed()?, count: read.varint()? };
        let voter = read.text()?;
        let text = read.rest_text()?;
        let reason = match flags & 1 != 0 {
            true => Some(text),
            false if text.is_empty() => None,
            false => return Err(read.damaged()),
        };
        Ok(VoteRecord { id, created_at_ms, weight_nano, tally, voter, reason })
    }
}

/// An epoch; its name is in its key.
#[derive(Clone, Debug, PartialEq)]
pub struct EpochRecord<'a> {
    /// Its id.
    pub id: Uuid,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// Sequence number of the fact.
    pub index: u64,
    /// The epoch that this one replaces.
    pub supersedes: Option<&'a str>,
    /// Free text.
    pub description: Option<&'a str>,
}

impl<'a> EpochRecord<'a> {
    /// The row.
    pub fn encode(&self) -> Vec<u8> {
        let texts = self.supersedes.map_or(0, str::len) + self.description.map_or(0, str::len);
        let mut out = Vec::with_capacity(40 + texts);
        out.push(RECORD_FORMAT);
        out.push(flag(self.supersedes.is_some(), 1) | flag(self.description.is_some(), 2));
        out.extend_from_slice(self.id.as_bytes());
        push_created(&mut out, self.id, self.created_at_ms);
        push_varint(&mut out, self.index);
        if let Some(supersedes) = self.supersedes {
            push_text(&mut out, supersedes);
        }
        out.extend_from_slice(self.description.unwrap_or_default().as_bytes());
        out
    }

    /// Reads a row.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, RecordError> {
        let mut read = Reader::new("epoch", bytes)?;
        let flags = read.flags(3)?;
        let id = read.uuid()?;
        let created_at_ms = read.created(id)?;
        let index = read.varint()?;
        let supersedes = if flags & 1 != 0 { Some(read.text()?) } else { None };
        let text = read.rest_text()?;
        let description = match flags & 2 != 0 {
            true => Some(text),
            false if text.is_empty() => None,
            false => return Err(read.damaged()),
        };
        Ok(EpochRecord { id, created_at_ms, index, supersedes, description })
    }
}

/// A row that holds one text: the name of the epoch that superseded another.
pub fn encode_text(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + text.len());
    out.push(RECORD_FORMAT);
    out.extend_from_slice(text.as_bytes());
    out
}

/// Reads what [`encode_text`] wrote.
pub fn decode_text<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, RecordError> {
    Reader::new(what, bytes)?.rest_text()
}

/// A row that holds one number: the position of an import, the first index of a moment.
pub fn encode_number(number: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(11);
    out.push(RECORD_FORMAT);
    push_varint(&mut out, number);
    out
}

/// Reads what [`encode_number`] wrote.
pub fn decode_number(what: &'static str, bytes: &[u8]) -> Result<u64, RecordError> {
    let mut read = Reader::new(what, bytes)?;
    let number = read.varint()?;
    read.end().map(|()| number)
}

/// Where an assertion is: its fact key without the tag.
pub fn encode_place(assertion_key: &[u8]) -> Vec<u8> {
    // The version takes the place of the tag.
    let mut out = Vec::with_capacity(assertion_key.len());
    out.push(RECORD_FORMAT);
    out.extend(assertion_key.iter().skip(1));
    out
}

/// The assertion's key from what [`encode_place`] wrote.
pub fn decode_place(bytes: &[u8]) -> Result<Vec<u8>, RecordError> {
    let mut read = Reader::new("place", bytes)?;
    let mut key = Vec::with_capacity(bytes.len());
    key.push(super::keys::TAG_FACT);
    key.extend_from_slice(read.rest());
    match super::keys::parse_fact(&key) {
        Some(parsed) if parsed.fact.is_none() => Ok(key),
        _ => Err(read.damaged()),
    }
}

/// What apply counts, kept in one row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Assertions ever stored.
    pub assertions: u64,
    /// Latest creation among all facts, Unix milliseconds.
    pub created_max_ms: u64,
}

impl Counters {
    /// The row.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![RECORD_FORMAT];
        push_varint(&mut out, self.assertions);
        push_varint(&mut out, self.created_max_ms);
        out
    }
    /// Reads a row.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut read = Reader::new("counters", bytes)?;
        let counters = Counters { assertions: read.varint()?, created_max_ms: read.varint()? };
        read.end().map(|()| counters)
    }
}
