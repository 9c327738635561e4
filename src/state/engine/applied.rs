//! What the tree knows about the log: how far it was applied, and by whom the cluster is formed.
//!
//! One row of the tree holds it. It is written once per memtable, just before the memtable is
//! sealed and always between two entries, so that the tree on disk is exactly the state after
//! `log_id` and nothing of a later entry. Without the membership in it, a restarted node whose log
//! was purged would have no voters.

use serde::{Deserialize, Serialize};
use stemedb_raft::codec;
use stemedb_raft::types::{LogId, StoredMembership};

use super::EngineError;
use crate::state::level;

/// Key of the row. The tag `m` is the keyspace of rows that are about the state itself.
pub(crate) const APPLIED_KEY: &[u8] = b"m~engine/applied";

/// Version of the row's form. A tree with a newer one is refused.
const APPLIED_FORMAT: u16 = 1;

/// How far the log was applied, as of some moment between two entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedState {
    /// The last applied entry; `None` before the first.
    pub log_id: Option<LogId>,
    /// The last applied membership.
    pub membership: StoredMembership,
    /// Index of the last fact; 0 before the first.
    pub fact_index: u64,
    /// Log time of the last applied entry, milliseconds.
    pub log_time_ms: u64,
    /// Cluster-wide feature level.
    pub feature_level: u32,
}

impl AppliedState {
    /// Log index of the last applied entry; `None` before the first.
    pub fn log_index(&self) -> Option<u64> {
        self.log_id.as_ref().map(|id| id.index)
    }

    pub(crate) fn to_row(&self) -> Result<Vec<u8>, EngineError> {
        let mut row = APPLIED_FORMAT.to_le_bytes().to_vec();
        row.extend(
            codec::encode(self)
                .map_err(|e| EngineError::damaged("put", format!("the applied state cannot be encoded: {e}")))?,
        );
        Ok(row)
    }

    pub(crate) fn from_row(row: &[u8]) -> Result<AppliedState, EngineError> {
        let (format, body) = row
            .split_first_chunk::<2>()
            .ok_or_else(|| EngineError::damaged("open", "the applied state is cut short"))?;
        let format = u16::from_le_bytes(*format);
        if format != APPLIED_FORMAT {
            let why = format!("the applied state has format {format}, this program knows {APPLIED_FORMAT}");
            return Err(match format > APPLIED_FORMAT {
                true => EngineError::io("open", std::io::Error::new(std::io::ErrorKind::Unsupported, why)),
                false => EngineError::damaged("open", why),
            });
        }
        let applied: AppliedState =
            codec::decode(body).map_err(|e| EngineError::damaged("open", format!("the applied state: {e}")))?;
        applied.check_feature_level("open")?;
        Ok(applied)
    }

    /// A program that knows less than the cluster has agreed on must not go on from this state.
    pub(crate) fn check_feature_level(&self, operation: &'static str) -> Result<(), EngineError> {
        match level::unknown(self.feature_level) {
            Some(why) => Err(EngineError::io(operation, std::io::Error::new(std::io::ErrorKind::Unsupported, why))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::state::level::FEATURE_LEVEL;

    #[test]
    fn a_feature_level_that_is_not_known_is_refused_with_both_numbers() {
        let known = AppliedState { feature_level: FEATURE_LEVEL, ..AppliedState::default() };
        assert_eq!(known, AppliedState::from_row(&known.to_row().unwrap()).unwrap());
        let newer = AppliedState { feature_level: FEATURE_LEVEL + 3, ..AppliedState::default() };
        let error = AppliedState::from_row(&newer.to_row().unwrap()).unwrap_err().to_string();
        assert!(error.contains("feature level 4") && error.contains("up to 1"), "{error}");
    }
}
