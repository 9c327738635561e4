//! The short-lived keys: those that balancers and nodes chose, in memory.
//!
//! Every command leaves one for twice the request deadline or longer, so a million of them must be cheap: a
//! queue of 56-byte slots in the order of arrival, and a hash table of 4-byte positions in it. That is nearly the order
//! of expiry: what is kept for longer holds back what came after it, until it goes itself. A slot
//! carries the outcome of a single fact; other outcomes (batches, refusals) lie beside it, packed.
//! Keys are never evicted early: past the bound nothing new is taken. Apply alone calls this, so
//! that every node holds the same keys; `save` writes them into the tree for restarts and checkpoints.

use std::collections::{BTreeSet, HashMap, VecDeque};

use hashbrown::HashTable;
use stemedb_raft::codec::CodecError;
use uuid::Uuid;

use super::command::{CommandKey, KeySource, Outcome, Receipt};
use super::outcome_record::{decode_outcome, push_outcome};
use super::record::{RecordError, uuid_ms};

pub mod saved;
#[cfg(test)]
mod tests;

/// Most bytes of outcomes that do not fit into slots: with it the table stays below 110 MB for each
/// million of keys, even when they come from nothing but batches.
pub const PACKED_BYTES_MAX: usize = 32 * 1024 * 1024;
/// What a packed outcome costs beside its bytes: the map's entry and the allocation.
const PACKED_OVERHEAD_BYTES: usize = 64;

/// 48 bits: enough for indexes and times of the next millennia.
const LOW_48: u64 = (1 << 48) - 1;
const FLAG_BALANCER: u64 = 1 << 48;
const FLAG_PACKED: u64 = 1 << 49;

/// One key. Words instead of `u128`, which would align the slot to 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    key: [u64; 2],
    /// Folded hash of the body; 0 for a node's key, which nobody else can send.
    body: u64,
    id: [u64; 2],
    /// Index of the fact; above it the signed distance of its creation from the id's time.
    index_and_created: u64,
    /// Last moment (log time) at which the key is kept; above it the flags.
    expires_and_flags: u64,
}

const _: () = assert!(size_of::<Slot>() == 56);

impl Slot {
    fn expires_ms(&self) -> u64 {
        self.expires_and_flags & LOW_48
    }
    fn is_packed(&self) -> bool {
        self.expires_and_flags & FLAG_PACKED != 0
    }
    fn command_key(&self) -> CommandKey {
        let source = match self.expires_and_flags & FLAG_BALANCER {
            0 => KeySource::Node,
            _ => KeySource::Balancer,
        };
        CommandKey { source, id: join(self.key) }
    }
    fn receipt(&self) -> Receipt {
        let id = join(self.id);
        let distance = (self.index_and_created >> 48) as u16 as i16;
        Receipt {
            id: Uuid::from_u128(id),
            index: self.index_and_created & LOW_48,
            created_at_ms: uuid_ms(id).wrapping_add_signed(i64::from(distance)),
        }
    }
    /// `receipt` as index and distance, when it fits.
    fn pack(receipt: &Receipt) -> Option<u64> {
        let time = uuid_ms(receipt.id.as_u128());
        let distance = i64::try_from(receipt.created_at_ms).ok()? - time as i64;
        let distance = i16::try_from(distance).ok()?;
        (receipt.index <= LOW_48).then_some(receipt.index | (u64::from(distance as u16) << 48))
    }
}

/// A key kept longer than the others, because its `resend_until` lies that far ahead: one request
/// deadline, so rare unless that is configured above 20 seconds.
#[derive(Clone, Debug, PartialEq)]
struct Late {
    expires_ms: u64,
    body: u64,
    outcome: Box<[u8]>,
}

/// What is known about a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Known {
    /// The first outcome.
    Outcome(Outcome),
    /// The key came with another body before.
    OtherBody,
}

/// The table. See the module's story.
pub struct KeyTable {
    /// In the order of arrival.
    slots: VecDeque<Slot>,
    /// Number of the first slot; counts up for ever.
    first: u64,
    /// Low 32 bits of a slot's number, found by its key's hash.
    numbers: HashTable<u32>,
    /// Packed outcomes by the slot's number.
    packed: HashMap<u64, Box<[u8]>>,
    packed_bytes: usize,
    late: HashMap<CommandKey, Late>,
    late_order: BTreeSet<(u64, CommandKey)>,
    /// Which part of it the tree holds.
    in_tree: saved::InTree,
    keep_ms: u64,
    keys_max: usize,
}

impl KeyTable {
    /// An empty table that keeps a key for `keep_ms` of log time, and at most `keys_max` keys.
    pub fn new(keep_ms: u64, keys_max: usize) -> Self {
        KeyTable {
            slots: VecDeque::new(),
            first: 0,
            numbers: HashTable::new(),
            packed: HashMap::new(),
            packed_bytes: 0,
            late: HashMap::new(),
            late_order: BTreeSet::new(),
            in_tree: saved::InTree::default(),
            keep_ms,
            keys_max,
        }
    }

    /// Keys held.
    pub fn len(&self) -> usize {
        self.slots.len() + self.late.len()
    }

    /// No keys held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Changes the bound on keys; what is held stays.
    pub fn set_keys_max(&mut self, keys_max: usize) {
        self.keys_max = keys_max;
    }

    /// Nothing more fits.
    pub fn is_full(&self) -> bool {
        self.len() >= self.keys_max || self.packed_bytes >= PACKED_BYTES_MAX
    }

    /// What is known about `key`, if it is held.
    pub fn get(&self, key: &CommandKey, body_hash: u128) -> Result<Option<Known>, RecordError> {
        let body = fold_body(key, body_hash);
        if let Some((number, slot)) = self.find(key) {
            if slot.body != body {
                return Ok(Some(Known::OtherBody));
            }
            if !slot.is_packed() {
                return Ok(Some(Known::Outcome(Outcome::Applied(vec![slot.receipt()]))));
            }
            let packed = self.packed.get(&number).ok_or(MISSING)?;
            return Ok(Some(Known::Outcome(decode_outcome(packed)?)));
        }
        match self.late.get(key) {
            None => Ok(None),
            Some(late) if late.body != body => Ok(Some(Known::OtherBody)),
            Some(late) => Ok(Some(Known::Outcome(decode_outcome(&late.outcome)?))),
        }
    }

    /// Remembers the first outcome of `key`, which must not be held yet, at log time `now_ms`: for the table's usual
    /// time, or until `until_ms` at least.
    pub fn insert(
        &mut self,
        key: CommandKey,
        body_hash: u128,
        outcome: &Outcome,
        now_ms: u64,
        resend_until_ms: u64,
        until_ms: Option<u64>,
    ) -> Result<(), CodecError> {
        let body = fold_body(&key, body_hash);
        let usual_ms = now_ms.saturating_add(self.keep_ms);
        let usual_ms = until_ms.map_or(usual_ms, |until_ms| until_ms.max(usual_ms));
        if resend_until_ms > usual_ms {
            let outcome = pack(outcome)?;
            self.packed_bytes += outcome.len() + PACKED_OVERHEAD_BYTES;
            // Twice the time in which the command may come again, as for the others.
            let expires_ms = resend_until_ms.saturating_add(resend_until_ms - now_ms);
            self.late_order.insert((expires_ms, key));
            self.late.insert(key, Late { expires_ms, body, outcome });
            return Ok(());
        }
        let mut slot = Slot {
            key: split(key.id),
            body,
            id: [0; 2],
            index_and_created: 0,
            expires_and_flags: usual_ms.min(LOW_48),
        };
        if key.source == KeySource::Balancer {
            slot.expires_and_flags |= FLAG_BALANCER;
        }
        let single = match outcome {
            Outcome::Applied(receipts) => match receipts.as_slice() {
                [receipt] => Slot::pack(receipt).map(|packed| (receipt.id, packed)),
                _ => None,
            },
            Outcome::Refused(_) | Outcome::Permit(_) | Outcome::Member(_) => None,
        };
        let packed = match single {
            Some((id, index_and_created)) => {
                slot.id = split(id.as_u128());
                slot.index_and_created = index_and_created;
                None
            }
            None => {
                slot.expires_and_flags |= FLAG_PACKED;
                Some(pack(outcome)?)
            }
        };
        self.push(slot, packed);
        Ok(())
    }

    /// Forgets what is not to be kept at log time `now_ms`.
    pub fn expire(&mut self, now_ms: u64) {
        while let Some(slot) = self.slots.front().filter(|slot| slot.expires_ms() < now_ms).copied() {
            let number = self.first;
            let hash = hash(&slot.command_key());
            if let Ok(entry) = self.numbers.find_entry(hash, |low| *low == number as u32) {
                entry.remove();
            }
            if let Some(packed) = self.packed.remove(&number) {
                self.packed_bytes -= packed.len() + PACKED_OVERHEAD_BYTES;
            }
            self.slots.pop_front();
            self.first += 1;
        }
        while let Some((_, key)) = self.late_order.first().filter(|(ms, _)| *ms < now_ms).copied() {
            self.late_order.pop_first();
            if let Some(late) = self.late.remove(&key) {
                self.packed_bytes -= late.outcome.len() + PACKED_OVERHEAD_BYTES;
            }
        }
    }

    fn push(&mut self, slot: Slot, packed: Option<Box<[u8]>>) {
        let number = self.first + self.slots.len() as u64;
        if let Some(packed) = packed {
            self.packed_bytes += packed.len() + PACKED_OVERHEAD_BYTES;
            self.packed.insert(number, packed);
        }
        self.slots.push_back(slot);
        let (slots, first) = (&self.slots, self.first);
        self.numbers.insert_unique(hash(&slot.command_key()), number as u32, |low| {
            // Called only for numbers in the table, each of which has its slot.
            slots.get(position(first, *low)).map_or(0, |slot| hash(&slot.command_key()))
        });
    }

    fn find(&self, key: &CommandKey) -> Option<(u64, &Slot)> {
        let low = self.numbers.find(hash(key), |low| {
            self.slots.get(position(self.first, *low)).is_some_and(|slot| slot.command_key() == *key)
        })?;
        let at = position(self.first, *low);
        self.slots.get(at).map(|slot| (self.first + at as u64, slot))
    }
}

const MISSING: RecordError = RecordError::Damaged { what: "packed outcome in memory" };

/// Place in the queue of the slot whose number ends in `low`.
fn position(first: u64, low: u32) -> usize {
    low.wrapping_sub(first as u32) as usize
}

fn pack(outcome: &Outcome) -> Result<Box<[u8]>, CodecError> {
    let mut out = Vec::new();
    push_outcome(&mut out, outcome)?;
    Ok(out.into_boxed_slice())
}

fn split(id: u128) -> [u64; 2] {
    [(id >> 64) as u64, id as u64]
}

fn join([high, low]: [u64; 2]) -> u128 {
    (u128::from(high) << 64) | u128::from(low)
}

fn fold_body(key: &CommandKey, body_hash: u128) -> u64 {
    match key.source {
        KeySource::Node => 0,
        KeySource::Balancer | KeySource::Client => {
            let [high, low] = split(body_hash);
            high ^ low
        }
    }
}

/// Keys are hashes or UUIDv7s already: mixing both halves suffices.
fn hash(key: &CommandKey) -> u64 {
    let [high, low] = split(key.id);
    let mixed = (high.rotate_left(29) ^ low ^ key.source as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 32)
}
