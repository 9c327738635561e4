//! Entries as the log carries them: decoded before, and their outcomes encoded after, apply.

use std::io;

use bytes::Bytes;
use stemedb_raft::codec;
use stemedb_raft::types::{EntryOutcome, LogId};

use crate::state::command::{CommandOutcome, ENTRY_FORMAT, EntryBody};

/// Decodes a committed entry.
///
/// Errors name both versions when a newer program wrote it. The caller stops; it never goes on to
/// the next entry.
pub(super) fn decode(log_id: &LogId, data: &[u8]) -> Result<EntryBody, io::Error> {
    let found = format_of(data);
    if let Some(format) = found.filter(|format| *format > ENTRY_FORMAT) {
        return Err(stop(
            log_id,
            &format!(
                "has format {format}, this program knows formats up to {ENTRY_FORMAT}: \
                 start a newer version of it"
            ),
        ));
    }
    let found = found.map_or_else(|| "unreadable".to_owned(), |format| format.to_string());
    let known = format!("format {found}, this program knows formats up to {ENTRY_FORMAT}");
    // A newer program writes the same format with commands that this one has never heard of.
    let why = |error| format!("cannot be read ({known}; a newer program may have written it: start that): {error}");
    codec::decode(data).map_err(|error| stop(log_id, &why(error)))
}

/// The format is the first field, in every version. Its encoding takes one byte or three.
fn format_of(data: &[u8]) -> Option<u16> {
    [1, 3].into_iter().find_map(|length| codec::decode::<u16>(data.get(..length)?).ok())
}

pub(super) fn encode_outcomes(log_id: &LogId, outcomes: &Vec<CommandOutcome>) -> Result<EntryOutcome, io::Error> {
    codec::encode(outcomes)
        .map(|bytes| EntryOutcome(Bytes::from(bytes)))
        .map_err(|error| stop(log_id, &format!("has outcomes that cannot be encoded: {error}")))
}

fn stop(log_id: &LogId, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("committed entry {log_id} {why}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use openraft::impls::leader_id_std::LeaderId;
    use openraft::vote::RaftLeaderId;

    fn log_id() -> LogId {
        let leader = LeaderId::<u64, u64>::new(3, 1);
        LogId::new(<LeaderId<u64, u64> as RaftLeaderId>::to_committed(&leader), 7)
    }

    #[test]
    fn a_newer_format_is_refused_by_name_whatever_follows() {
        for format in [ENTRY_FORMAT + 1, 300] {
            let mut data = codec::encode(&format).unwrap();
            data.extend([0xff; 40]);
            let error = decode(&log_id(), &data).unwrap_err().to_string();
            assert!(error.contains(&format!("format {format},")), "{error}");
            assert!(error.contains(&format!("up to {ENTRY_FORMAT}")), "{error}");
        }
    }

    #[test]
    fn an_entry_that_is_cut_anywhere_is_refused() {
        let body = EntryBody { format: ENTRY_FORMAT, log_time_ms: 1_000, commands: Vec::new() };
        let data = codec::encode(&body).unwrap();
        assert_eq!(body, decode(&log_id(), &data).unwrap());
        for length in 0..data.len() {
            let error = decode(&log_id(), &data[..length]).unwrap_err().to_string();
            assert!(error.contains(&format!("up to {ENTRY_FORMAT}")), "{error}");
        }
    }
}
