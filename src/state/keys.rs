//! The keys of the tree: what lies where, in which order.
//!
//! ```text
//! f path \0 predicate \0 ~index                    an assertion
//! f path \0 predicate \0 ~index 1 ~fact_index      its supersessions
//! f path \0 predicate \0 ~index 2 ~fact_index      its votes
//! v path \0 predicate \0 ~index                    the tally of its votes
//! v path \0 predicate \0 ~index voter              the vote that counts of one voter
//! i uuid                                           where the assertion is
//! e name                                           an epoch
//! e name \0 index                                  who superseded it
//! t created_at_ms                                  first fact index of that moment
//! k key    x expires_at_ms key                     client keys, and the queue of their expiry
//! m...                                             counters, imports, saved short-lived keys, permit to rebuild,
//!                                                  changes of the members
//! ```
//!
//! `~` is descending order: the newest comes first, so that "the latest as of an index" is one seek
//! forward. Indexes take 1 to 9 bytes ([`push_ascending`]). Paths and names hold no control
//! characters, so `\0` ends them. The path comes first: a key range can move to another group.

/// Tag of facts.
pub const TAG_FACT: u8 = b'f';
/// Tag of votes that count, and their tallies.
pub const TAG_VOTER: u8 = b'v';
/// Tag of the places of assertions.
pub const TAG_ID: u8 = b'i';
/// Tag of epochs.
pub const TAG_EPOCH: u8 = b'e';
/// Tag of the moments at which indexes began.
pub const TAG_TIME: u8 = b't';
/// Tag of client keys.
pub const TAG_CLIENT_KEY: u8 = b'k';
/// Tag of the expiry of client keys.
pub const TAG_CLIENT_EXPIRY: u8 = b'x';
/// Row with the counters of apply.
pub const COUNTERS: &[u8] = b"mcounters";
/// Row with the short-lived keys that are kept longer than usual.
pub const SHORT_KEYS_LATE: &[u8] = b"mkeys-late";
/// Prefix of the chunks of short-lived keys.
pub const SHORT_KEYS_CHUNK: &[u8] = b"mkeys/";
/// Row with the permit to rebuild.
pub const REBUILD_PERMITS: &[u8] = b"mrebuild";
/// Row with what is to change about the members, and what has.
pub const MEMBERS: &[u8] = b"mmembers";
const IMPORT: &[u8] = b"mimport/";

/// What a row behind an assertion's key says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FactKind {
    /// It was superseded or retracted.
    Supersession = 1,
    /// It drew a vote.
    Vote = 2,
}

/// Appends `number` so that bytes sort as numbers do. The first four bits count the bytes that
/// follow: 3 bytes carry a million, 4 bytes 268 million.
pub fn push_ascending(out: &mut Vec<u8>, number: u64) {
    let significant_bits = 64 - number.leading_zeros();
    let more = significant_bits.saturating_sub(4).div_ceil(8);
    let bytes = ((u128::from(more) << (4 + 8 * more)) | u128::from(number)).to_be_bytes();
    out.extend(bytes.iter().skip(15 - more as usize));
}

/// Appends `number` so that the highest sorts first.
pub fn push_descending(out: &mut Vec<u8>, number: u64) {
    let from = out.len();
    push_ascending(out, number);
    out.iter_mut().skip(from).for_each(|byte| *byte = !*byte);
}

/// Reads what [`push_ascending`] wrote, and returns the bytes behind it.
pub fn split_ascending(bytes: &[u8]) -> Option<(u64, &[u8])> {
    split_number(bytes, 0x00)
}

/// Reads what [`push_descending`] wrote, and returns the bytes behind it.
pub fn split_descending(bytes: &[u8]) -> Option<(u64, &[u8])> {
    split_number(bytes, 0xFF)
}

fn split_number(bytes: &[u8], mask: u8) -> Option<(u64, &[u8])> {
    let more = usize::from((bytes.first()? ^ mask) >> 4);
    if more > 8 {
        return None;
    }
    let (number, rest) = bytes.split_at_checked(1 + more)?;
    let mut value = 0u128;
    for byte in number {
        value = (value << 8) | u128::from(byte ^ mask);
    }
    let value = value & !(0xF_u128 << (4 + 8 * more));
    Some((u64::try_from(value).ok()?, rest))
}

/// The common prefix of all facts about a concept and predicate: `f path \0 predicate \0`.
pub fn group(path: &str, predicate: &str) -> Vec<u8> {
    // Room for an index behind it, and for the kind and index of a fact.
    let mut key = Vec::with_capacity(path.len() + predicate.len() + 3 + 20);
    key.push(TAG_FACT);
    key.extend_from_slice(path.as_bytes());
    key.push(0);
    key.extend_from_slice(predicate.as_bytes());
    key.push(0);
    key
}

/// Key of the assertion with `index`.
pub fn assertion(path: &str, predicate: &str, index: u64) -> Vec<u8> {
    let mut key = group(path, predicate);
    push_descending(&mut key, index);
    key
}

/// Where, inside a group, assertions with at most `index` begin.
pub fn in_group(group: &[u8], index: u64) -> Vec<u8> {
    let mut key = group.to_vec();
    push_descending(&mut key, index);
    key
}

/// Key of a further fact about the assertion at `assertion_key`; also where, among the facts of
/// this kind, those with at most `fact_index` begin.
pub fn fact(assertion_key: &[u8], kind: FactKind, fact_index: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(assertion_key.len() + 10);
    key.extend_from_slice(assertion_key);
    key.push(kind as u8);
    push_descending(&mut key, fact_index);
    key
}

/// `key` followed by one byte.
pub fn with_byte(key: &[u8], byte: u8) -> Vec<u8> {
    let mut longer = Vec::with_capacity(key.len() + 1);
    longer.extend_from_slice(key);
    longer.push(byte);
    longer
}

/// The first key behind all rows that belong to the assertion (kinds stay below 0xFF).
pub fn assertion_end(assertion_key: &[u8]) -> Vec<u8> {
    with_byte(assertion_key, 0xFF)
}

/// The first key behind a group or an exact path: its closing `\0` becomes `\1`.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}

/// All facts of exactly this concept: from the first key (inclusive) to the second (exclusive).
pub fn path_range(path: &str) -> (Vec<u8>, Vec<u8>) {
    bounded_by(path, 0)
}

/// All facts of the concepts below this one, without its own.
pub fn below_range(path: &str) -> (Vec<u8>, Vec<u8>) {
    bounded_by(path, b'/')
}

fn bounded_by(path: &str, separator: u8) -> (Vec<u8>, Vec<u8>) {
    let mut from = Vec::with_capacity(path.len() + 2);
    from.push(TAG_FACT);
    from.extend_from_slice(path.as_bytes());
    from.push(separator);
    let end = prefix_end(&from);
    (from, end)
}

/// A fact's key, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FactKey<'a> {
    /// The concept.
    pub path: &'a str,
    /// The predicate.
    pub predicate: &'a str,
    /// Index of the assertion.
    pub index: u64,
    /// Bytes of the group prefix at the start of the key.
    pub group_len: usize,
    /// Bytes of the assertion's key at the start of the key.
    pub assertion_len: usize,
    /// Kind and index of the further fact; `None` for the assertion itself.
    pub fact: Option<(FactKind, u64)>,
}

/// Takes a fact's key apart; `None` when it is none.
pub fn parse_fact(key: &[u8]) -> Option<FactKey<'_>> {
    let body = key.strip_prefix(&[TAG_FACT])?;
    let mut parts = body.splitn(3, |byte| *byte == 0);
    let path = std::str::from_utf8(parts.next()?).ok()?;
    let predicate = std::str::from_utf8(parts.next()?).ok()?;
    let numbers = parts.next()?;
    let (index, tail) = split_descending(numbers)?;
    let fact = match tail.split_first() {
        None => None,
        Some((kind, number)) => {
            let kind = match kind {
                1 => FactKind::Supersession,
                2 => FactKind::Vote,
                _ => return None,
            };
            let (fact_index, rest) = split_descending(number)?;
            rest.is_empty().then_some(Some((kind, fact_index)))?
        }
    };
    let group_len = key.len() - numbers.len();
    let assertion_len = key.len() - tail.len();
    Some(FactKey { path, predicate, index, group_len, assertion_len, fact })
}

/// Row with the tally of an assertion's votes.
pub fn tally(assertion_key: &[u8]) -> Vec<u8> {
    voter(assertion_key, "")
}

/// Row with the vote of `voter` that counts. Names of voters are never empty.
pub fn voter(assertion_key: &[u8], voter: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(assertion_key.len() + voter.len());
    key.push(TAG_VOTER);
    key.extend(assertion_key.iter().skip(1));
    key.extend_from_slice(voter.as_bytes());
    key
}

/// Row that says where the assertion with this id is.
pub fn id(id: uuid::Uuid) -> [u8; 17] {
    tagged(TAG_ID, id.as_u128())
}

/// Row of a client's key.
pub fn client_key(id: u128) -> [u8; 17] {
    tagged(TAG_CLIENT_KEY, id)
}

fn tagged(tag: u8, id: u128) -> [u8; 17] {
    let mut key = [tag; 17];
    for (to, from) in key.iter_mut().skip(1).zip(id.to_be_bytes()) {
        *to = from;
    }
    key
}

/// Row in the queue of expiry.
pub fn client_expiry(expires_ms: u64, id: u128) -> Vec<u8> {
    let mut key = Vec::with_capacity(26);
    key.push(TAG_CLIENT_EXPIRY);
    push_ascending(&mut key, expires_ms);
    key.extend_from_slice(&id.to_be_bytes());
    key
}

/// Takes a row of the queue of expiry apart: log time in milliseconds, id.
pub fn parse_client_expiry(key: &[u8]) -> Option<(u64, u128)> {
    let (expires_ms, id) = split_ascending(key.strip_prefix(&[TAG_CLIENT_EXPIRY])?)?;
    Some((expires_ms, u128::from_be_bytes(id.try_into().ok()?)))
}

/// Row of an epoch.
pub fn epoch(name: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + name.len());
    key.push(TAG_EPOCH);
    key.extend_from_slice(name.as_bytes());
    key
}

/// Row that says that `name` was superseded by the epoch with `index`.
pub fn epoch_superseded(name: &str, index: u64) -> Vec<u8> {
    let mut key = epoch(name);
    key.push(0);
    push_ascending(&mut key, index);
    key
}

/// Row with the first fact index of a moment, Unix milliseconds.
pub fn moment(created_at_ms: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(10);
    key.push(TAG_TIME);
    push_ascending(&mut key, created_at_ms);
    key
}

/// Row with the position of an import.
pub fn import(import_id: &str) -> Vec<u8> {
    [IMPORT, import_id.as_bytes()].concat()
}

/// Row with chunk `number` of the short-lived keys.
pub fn short_keys_chunk(number: u64) -> Vec<u8> {
    [SHORT_KEYS_CHUNK, &number.to_be_bytes()].concat()
}
