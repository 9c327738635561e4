//! The short-lived keys as rows of the tree, for restarts and checkpoints.
//!
//! Slots are saved in chunks by their number. A full chunk never changes, so each save writes only
//! what came since the last one, and deletes the chunks that have expired: a key is written about
//! once in its life. The few late keys fit one row, which is written anew each time. The chunk rows
//! belong to this node (it may have rotated its memtable at other times than its peers); the keys
//! that they restore are the same everywhere.

use std::ops::Bound;

use super::{FLAG_BALANCER, FLAG_PACKED, KeyTable, LOW_48, Late, MISSING, PACKED_OVERHEAD_BYTES, Slot, join, split};
use crate::state::command::{CommandKey, KeySource};
use crate::state::engine::{EngineError, StateRead, WriteBatch};
use crate::state::keys;
use crate::state::record::{RECORD_FORMAT, Reader, RecordError, push_signed, push_varint};

/// Slots per row: about 100 KB, small against a memtable and large against a row's cost.
const CHUNK_SLOTS: u64 = 2048;

const WHAT: &str = "short-lived keys";

/// What the tree holds of the table.
#[derive(Debug, Default)]
pub(super) struct InTree {
    /// Chunk rows from the first (inclusive) to the last (exclusive) may exist.
    chunks: std::ops::Range<u64>,
    /// Slots below this number are in chunk rows.
    slots_end: u64,
    /// The row of late keys exists.
    late: bool,
}

impl KeyTable {
    /// Rows that bring the tree up to date with the table.
    pub fn save(&mut self) -> Result<WriteBatch, EngineError> {
        let mut batch = WriteBatch::default();
        let end = self.first + self.slots.len() as u64;
        let live_from = if self.slots.is_empty() { end.div_ceil(CHUNK_SLOTS) } else { self.first / CHUNK_SLOTS };
        for expired in self.in_tree.chunks.start..self.in_tree.chunks.end.min(live_from) {
            batch.delete(keys::short_keys_chunk(expired));
        }
        let chunks_end = end.div_ceil(CHUNK_SLOTS).max(live_from);
        let changed_from = (self.in_tree.slots_end / CHUNK_SLOTS).max(live_from);
        if self.in_tree.slots_end < end {
            for chunk in changed_from..chunks_end {
                batch.put(keys::short_keys_chunk(chunk), self.encode_chunk(chunk, end)?);
            }
        }
        if !self.late.is_empty() {
            batch.put(keys::SHORT_KEYS_LATE, self.encode_late());
        } else if self.in_tree.late {
            batch.delete(keys::SHORT_KEYS_LATE);
        }
        self.in_tree = InTree { chunks: live_from..chunks_end, slots_end: end, late: !self.late.is_empty() };
        Ok(batch)
    }

    fn encode_chunk(&self, chunk: u64, end: u64) -> Result<Vec<u8>, EngineError> {
        let from = (chunk * CHUNK_SLOTS).max(self.first);
        let to = ((chunk + 1) * CHUNK_SLOTS).min(end);
        let mut out = Vec::with_capacity((to.saturating_sub(from) as usize) * 48);
        out.push(RECORD_FORMAT);
        push_varint(&mut out, from);
        let (mut expires_ms, mut index) = (0, 0);
        let start = (from - self.first) as usize;
        let count = to.saturating_sub(from) as usize;
        for (number, slot) in (from..).zip(self.slots.iter().skip(start).take(count)) {
            // The two flags, as the lowest bits.
            out.push((slot.expires_and_flags >> 48) as u8);
            push_id(&mut out, join(slot.key));
            if slot.expires_and_flags & FLAG_BALANCER != 0 {
                out.extend_from_slice(&slot.body.to_be_bytes());
            }
            push_signed(&mut out, slot.expires_ms().wrapping_sub(expires_ms) as i64);
            expires_ms = slot.expires_ms();
            if slot.is_packed() {
                let packed = self.packed.get(&number).ok_or(MISSING)?;
                push_varint(&mut out, packed.len() as u64);
                out.extend_from_slice(packed);
            } else {
                let receipt = slot.receipt();
                push_id(&mut out, join(slot.id));
                push_signed(&mut out, receipt.index.wrapping_sub(index) as i64);
                index = receipt.index;
                push_signed(&mut out, i64::from((slot.index_and_created >> 48) as u16 as i16));
            }
        }
        Ok(out)
    }

    fn encode_late(&self) -> Vec<u8> {
        let mut out = vec![RECORD_FORMAT];
        for (expires_ms, key) in &self.late_order {
            let Some(late) = self.late.get(key) else {
                continue;
            };
            out.push(u8::from(key.source == KeySource::Balancer));
            push_id(&mut out, key.id);
            out.extend_from_slice(&late.body.to_be_bytes());
            push_varint(&mut out, *expires_ms);
            push_varint(&mut out, late.outcome.len() as u64);
            out.extend_from_slice(&late.outcome);
        }
        out
    }

    /// The table that was saved, as it was at log time `now_ms`.
    pub fn restore(read: &dyn StateRead, keep_ms: u64, keys_max: usize, now_ms: u64) -> Result<KeyTable, EngineError> {
        let mut table = KeyTable::new(keep_ms, keys_max);
        let end = keys::prefix_end(keys::SHORT_KEYS_CHUNK);
        for row in read.scan(Bound::Included(keys::SHORT_KEYS_CHUNK), Bound::Excluded(&end)) {
            let (key, value) = row?;
            table.restore_chunk(&key, &value)?;
        }
        if let Some(row) = read.get(keys::SHORT_KEYS_LATE)? {
            table.in_tree.late = true;
            table.restore_late(&row)?;
        }
        table.expire(now_ms);
        Ok(table)
    }

    fn restore_chunk(&mut self, key: &[u8], value: &[u8]) -> Result<(), RecordError> {
        let mut read = Reader::new(WHAT, value)?;
        let chunk = key
            .strip_prefix(keys::SHORT_KEYS_CHUNK)
            .and_then(|number| number.try_into().ok())
            .map(u64::from_be_bytes)
            .ok_or(read.damaged())?;
        let from = read.varint()?;
        if self.in_tree.chunks.is_empty() {
            self.first = from;
            self.in_tree.chunks.start = chunk;
        }
        // Slots are numbered without a gap, across rows too.
        if from / CHUNK_SLOTS != chunk || from != self.first + self.slots.len() as u64 {
            return Err(read.damaged());
        }
        let (mut expires_ms, mut index) = (0u64, 0u64);
        while !read.at_end() {
            let flags = u64::from(read.flags(3)?) << 48;
            let key = split(read.id()?);
            let body = if flags & FLAG_BALANCER != 0 { read.word()? } else { 0 };
            expires_ms = expires_ms.wrapping_add(read.signed()? as u64);
            let mut slot =
                Slot { key, body, id: [0; 2], index_and_created: 0, expires_and_flags: (expires_ms & LOW_48) | flags };
            let packed = if flags & FLAG_PACKED != 0 {
                let length = read.length()?;
                Some(read.take(length)?.into())
            } else {
                slot.id = split(read.id()?);
                index = index.wrapping_add(read.signed()? as u64);
                let distance = read.signed()? as i16 as u16;
                slot.index_and_created = (index & LOW_48) | (u64::from(distance) << 48);
                None
            };
            self.push(slot, packed);
        }
        self.in_tree.chunks.end = chunk + 1;
        self.in_tree.slots_end = self.first + self.slots.len() as u64;
        Ok(())
    }

    fn restore_late(&mut self, row: &[u8]) -> Result<(), RecordError> {
        let mut read = Reader::new(WHAT, row)?;
        while !read.at_end() {
            let source = match read.flags(1)? {
                0 => KeySource::Node,
                _ => KeySource::Balancer,
            };
            let key = CommandKey { source, id: read.id()? };
            let body = read.word()?;
            let expires_ms = read.varint()?;
            let length = read.length()?;
            let outcome: Box<[u8]> = read.take(length)?.into();
            self.packed_bytes += outcome.len() + PACKED_OVERHEAD_BYTES;
            self.late_order.insert((expires_ms, key));
            self.late.insert(key, Late { expires_ms, body, outcome });
        }
        Ok(())
    }
}

fn push_id(out: &mut Vec<u8>, id: u128) {
    out.extend_from_slice(&id.to_be_bytes());
}
