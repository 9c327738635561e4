//! Cursors: where the next page begins, and as of which index.
//!
//! Opaque to clients: hexadecimal of version, hash of the query, pinned index, place, checksum. The
//! hash ties it to the query it came from, the checksum tells a mistyped or altered one. Nothing is
//! overwritten in the store, so a cursor stays good as long as the store has its index.

use serde::Serialize;
use stemedb_raft::codec;
use xxhash_rust::xxh3::xxh3_64;

use super::StoreError;
use crate::state::record::{Reader, RecordError, push_varint};

/// Version of this form.
const CURSOR_FORMAT: u8 = 1;
const CHECKSUM_BYTES: usize = 8;
/// Longest cursor read, in characters: twice a place of the longest path and predicate, with room.
const CURSOR_CHARS_MAX: usize = 3200;

/// What a cursor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    /// The fact index to which all pages are pinned.
    pub as_of: u64,
    /// Meaning is the caller's.
    pub number: u64,
    /// Meaning is the caller's.
    pub place: Vec<u8>,
}

/// Hash of what must not change between pages. Over the codec's bytes, so that every node and every
/// build computes the same.
pub(super) fn query_hash(parts: &impl Serialize) -> Result<u64, StoreError> {
    let bytes = codec::encode(parts).map_err(|error| bad(format!("cannot be checked: {error}")))?;
    Ok(xxh3_64(&bytes))
}

impl Cursor {
    /// The text for the client.
    pub fn encode(&self, query_hash: u64) -> String {
        let mut bytes = vec![CURSOR_FORMAT];
        bytes.extend_from_slice(&query_hash.to_be_bytes());
        push_varint(&mut bytes, self.as_of);
        push_varint(&mut bytes, self.number);
        bytes.extend_from_slice(&self.place);
        bytes.extend_from_slice(&xxh3_64(&bytes).to_be_bytes());
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads a cursor of the query with this hash, for a state that ends with `fact_index`.
    pub fn decode(text: &str, query_hash: u64, fact_index: u64) -> Result<Cursor, StoreError> {
        let bytes = from_hex(text).ok_or_else(|| bad("is not one of ours"))?;
        let (body, checksum) = bytes
            .len()
            .checked_sub(CHECKSUM_BYTES)
            .and_then(|at| bytes.split_at_checked(at))
            .ok_or_else(|| bad("is cut"))?;
        if checksum != xxh3_64(body).to_be_bytes() {
            return Err(bad("was altered"));
        }
        let (version, body) = body.split_first().ok_or_else(|| bad("is cut"))?;
        if *version != CURSOR_FORMAT {
            return Err(bad(format!("has format {version}, this program knows {CURSOR_FORMAT}")));
        }
        let mut read = Reader::bare("cursor", body);
        let cut = |_: RecordError| bad("is cut");
        if read.word().map_err(cut)? != query_hash {
            return Err(bad("belongs to another query"));
        }
        let as_of = read.varint().map_err(cut)?;
        let number = read.varint().map_err(cut)?;
        if as_of > fact_index {
            return Err(StoreError::CursorGone {
                why: format!("it is pinned to index {as_of}, this state ends with {fact_index}"),
            });
        }
        Ok(Cursor { as_of, number, place: read.rest().to_vec() })
    }
}

pub(super) fn bad(why: impl Into<String>) -> StoreError {
    StoreError::BadCursor { why: why.into() }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if text.len() > CURSOR_CHARS_MAX || !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes()
        .chunks(2)
        .map(|pair| {
            let pair = std::str::from_utf8(pair).ok()?;
            // `from_str_radix` would take a sign.
            pair.bytes().all(|b| b.is_ascii_hexdigit()).then_some(())?;
            u8::from_str_radix(pair, 16).ok()
        })
        .collect()
}
