//! The first outcome of a command, as it is kept beside the command's key.
//!
//! A batch has up to 10,000 receipts, but their indexes follow each other and, when the ids were
//! made as one run (each the last plus one), so do they: a run takes some 20 bytes, whatever its
//! length. Ids without such order cost 19 bytes each.

use stemedb_raft::codec;
use uuid::Uuid;

use super::command::{Outcome, Receipt, Refusal};
use super::record::{RECORD_FORMAT, Reader, RecordError, push_created, push_varint};

const WHAT: &str = "outcome";
const APPLIED: u8 = 1;
const REFUSED: u8 = 2;
const PERMIT: u8 = 3;
const MEMBER: u8 = 4;

/// Largest number of receipts a record may claim; a batch or chunk has at most 10,000 items, and the
/// log's frames bound the rest.
const RECEIPTS_MAX: u64 = 1 << 20;

/// Appends `outcome` to `out`.
pub fn push_outcome(out: &mut Vec<u8>, outcome: &Outcome) -> Result<(), codec::CodecError> {
    match outcome {
        Outcome::Applied(receipts) => {
            out.push(APPLIED);
            for run in receipts.chunk_by(follows) {
                let Some(first) = run.first() else { continue };
                push_varint(out, run.len() as u64);
                out.extend_from_slice(first.id.as_bytes());
                push_varint(out, first.index);
                push_created(out, first.id, first.created_at_ms);
            }
        }
        Outcome::Refused(refusal) => {
            out.push(REFUSED);
            out.extend_from_slice(&codec::encode(refusal)?);
        }
        Outcome::Permit(permit) => {
            out.push(PERMIT);
            out.extend_from_slice(&codec::encode(permit)?);
        }
        Outcome::Member(intent) => {
            out.push(MEMBER);
            out.extend_from_slice(&codec::encode(intent)?);
        }
    }
    Ok(())
}

/// Reads what [`push_outcome`] wrote and fills `bytes` exactly.
pub fn decode_outcome(bytes: &[u8]) -> Result<Outcome, RecordError> {
    let damaged = RecordError::Damaged { what: WHAT };
    match bytes.split_first() {
        Some((&APPLIED, mut runs)) => {
            let mut receipts = Vec::new();
            while !runs.is_empty() {
                let mut read = Reader::bare(WHAT, runs);
                let length = read.varint()?;
                let id = read.uuid()?;
                let index = read.varint()?;
                let created_at_ms = read.created(id)?;
                if length > RECEIPTS_MAX {
                    return Err(damaged);
                }
                receipts.extend((0..length).map(|n| Receipt {
                    id: Uuid::from_u128(id.as_u128().wrapping_add(u128::from(n))),
                    index: index.wrapping_add(n),
                    created_at_ms,
                }));
                runs = read.rest();
            }
            Ok(Outcome::Applied(receipts))
        }
        Some((&REFUSED, refusal)) => codec::decode::<Refusal>(refusal).map(Outcome::Refused).map_err(|_| damaged),
        Some((&PERMIT, permit)) => codec::decode(permit).map(Outcome::Permit).map_err(|_| damaged),
        Some((&MEMBER, intent)) => codec::decode(intent).map(Outcome::Member).map_err(|_| damaged),
        _ => Err(damaged),
    }
}

fn follows(a: &Receipt, b: &Receipt) -> bool {
    b.id.as_u128() == a.id.as_u128().wrapping_add(1)
        && b.index == a.index.wrapping_add(1)
        && b.created_at_ms == a.created_at_ms
}

/// A client's key in the tree.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientKeyRecord {
    /// Hash of the first body.
    pub body_hash: u128,
    /// The first outcome.
    pub outcome: Outcome,
}

impl ClientKeyRecord {
    /// The row.
    pub fn encode(&self) -> Result<Vec<u8>, codec::CodecError> {
        let mut out = Vec::with_capacity(48);
        out.push(RECORD_FORMAT);
        out.extend_from_slice(&self.body_hash.to_be_bytes());
        push_outcome(&mut out, &self.outcome)?;
        Ok(out)
    }
    /// Reads a row.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut read = Reader::new("client key", bytes)?;
        let body_hash = read.id()?;
        Ok(ClientKeyRecord { body_hash, outcome: decode_outcome(read.rest())? })
    }
}
