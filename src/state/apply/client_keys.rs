//! Clients' keys: kept in the tree for 15 minutes of log time.
//!
//! `k` rows hold the first outcomes, `x` rows queue them by expiry. Each entry deletes a bounded
//! number of expired ones, which depends only on the entry and the tree and so is the same on every
//! node. A key that has expired but is not deleted yet still counts as known: never too early.

use std::collections::HashMap;
use std::ops::Bound;

use super::overlay::Overlay;
use crate::state::command::{Command, Outcome};
use crate::state::engine::{EngineError, StateRead};
use crate::state::key_table::Known;
use crate::state::keys;
use crate::state::outcome_record::ClientKeyRecord;
use crate::state::record::RecordError;

/// Expired keys deleted per entry, beside two for each of its commands: more than can be added, so
/// that the queue shrinks, and few enough to stay below a millisecond.
const EXPIRE_PER_ENTRY: usize = 64;

/// What is remembered of the queue so that most entries need not look at it. All of it only saves
/// work: a fresh one writes the same rows.
#[derive(Default)]
pub(super) struct ClientKeys {
    /// No key expires before this log time, in milliseconds.
    next_expiry_ms: u64,
    /// The last row deleted; what lies before it is gone (the tree would have to step over it).
    deleted_upto: Option<Vec<u8>>,
    /// Keys added by the entry at hand, which the tree does not show yet.
    added: HashMap<u128, ClientKeyRecord>,
}

impl ClientKeys {
    /// The rows of the entry before are in the tree.
    pub fn begin_entry(&mut self) {
        self.added.clear();
    }

    /// Deletes expired keys, at most as many as an entry with so many commands may.
    pub fn expire(
        &mut self,
        read: &dyn StateRead,
        now_ms: u64,
        commands: usize,
        entry: &mut Overlay<'_>,
    ) -> Result<(), EngineError> {
        if now_ms <= self.next_expiry_ms {
            return Ok(());
        }
        let first = [keys::TAG_CLIENT_EXPIRY];
        let end = keys::prefix_end(&first);
        let from = match self.deleted_upto.as_deref() {
            Some(last) => Bound::Excluded(last.to_vec()),
            None => Bound::Included(first.to_vec()),
        };
        let rows_max = EXPIRE_PER_ENTRY + 2 * commands;
        let mut next_expiry_ms = u64::MAX;
        let rows = read.scan(from.as_ref().map(Vec::as_slice), Bound::Excluded(&end));
        for (count, row) in rows.enumerate() {
            let (key, _) = row?;
            let (expires_ms, id) =
                keys::parse_client_expiry(&key).ok_or(RecordError::Damaged { what: "expiry of a client key" })?;
            if expires_ms >= now_ms || count == rows_max {
                next_expiry_ms = expires_ms;
                break;
            }
            self.deleted_upto = Some(key.to_vec());
            entry.delete(keys::client_key(id).to_vec());
            entry.delete(key);
        }
        self.next_expiry_ms = next_expiry_ms;
        entry.keep_command();
        Ok(())
    }

    /// What is known about the key `id`.
    pub fn get(&self, read: &dyn StateRead, id: u128, body_hash: u128) -> Result<Option<Known>, EngineError> {
        let stored;
        let record = match self.added.get(&id) {
            Some(record) => record,
            None => match read.get(&keys::client_key(id))? {
                Some(row) => {
                    stored = ClientKeyRecord::decode(&row)?;
                    &stored
                }
                None => return Ok(None),
            },
        };
        Ok(Some(if record.body_hash == body_hash { Known::Outcome(record.outcome.clone()) } else { Known::OtherBody }))
    }

    /// Remembers the first outcome of a command until `expires_ms` of log time.
    pub fn insert(
        &mut self,
        entry: &mut Overlay<'_>,
        command: &Command,
        outcome: &Outcome,
        expires_ms: u64,
    ) -> Result<(), EngineError> {
        let record = ClientKeyRecord { body_hash: command.body_hash, outcome: outcome.clone() };
        let id = command.key.id;
        entry.put(keys::client_key(id).to_vec(), record.encode().map_err(super::encode_error)?);
        entry.put(keys::client_expiry(expires_ms, id), Vec::new());
        self.next_expiry_ms = self.next_expiry_ms.min(expires_ms);
        self.added.insert(id, record);
        Ok(())
    }
}
