//! Entries as bytes: what openraft hands over, and what a frame's payload holds.

use bytes::Bytes;
use openraft::EntryPayload;

use crate::{
    codec::{self, CodecError},
    frame::{EntryKind, log_id, term_of},
    group::Encoded,
    types::{Entry, EntryData},
};

/// Encodes an entry. Commands are taken as they are, without a copy.
pub fn encode(entry: &Entry) -> Result<Encoded, CodecError> {
    let (kind, payload) = match &entry.payload {
        EntryPayload::Blank => (EntryKind::Blank, Bytes::new()),
        EntryPayload::Normal(EntryData(bytes)) => (EntryKind::Normal, bytes.clone()),
        EntryPayload::Membership(membership) => (EntryKind::Membership, codec::encode(membership)?.into()),
    };
    if u32::try_from(payload.len()).is_err() {
        return Err(CodecError::Encode(format!("{} bytes are too many for one entry", payload.len())));
    }
    Ok(Encoded { index: entry.log_id.index(), term: term_of(&entry.log_id), kind, payload })
}

/// Decodes an entry whose frame has been verified.
pub fn decode(kind: EntryKind, term: u64, index: u64, payload: Bytes) -> Result<Entry, CodecError> {
    let payload = match kind {
        EntryKind::Blank => EntryPayload::Blank,
        EntryKind::Normal => EntryPayload::Normal(EntryData(payload)),
        EntryKind::Membership => EntryPayload::Membership(codec::decode(&payload)?),
    };
    Ok(Entry { log_id: log_id(term, index), payload })
}
