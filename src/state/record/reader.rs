//! Writing and reading the parts of a record, with checks.

use uuid::Uuid;

/// Version of every record below.
pub const RECORD_FORMAT: u8 = 1;

/// A row that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Written by a program that knows a newer form.
    #[error("{what}: format {found}, this program knows {RECORD_FORMAT}")]
    Version {
        /// The record.
        what: &'static str,
        /// The version found.
        found: u8,
    },
    /// Not what was written.
    #[error("{what} is damaged")]
    Damaged {
        /// The record.
        what: &'static str,
    },
}

impl From<RecordError> for crate::state::engine::EngineError {
    fn from(error: RecordError) -> Self {
        crate::state::engine::EngineError::damaged("get", error.to_string())
    }
}

/// Appends an unsigned number, 7 bits per byte, lowest first.
pub fn push_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7F) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends a signed number; small magnitudes are short.
pub fn push_signed(out: &mut Vec<u8>, number: i64) {
    push_varint(out, ((number << 1) ^ (number >> 63)) as u64);
}

/// Appends a text behind its length.
pub fn push_text(out: &mut Vec<u8>, text: &str) {
    push_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// The time inside a UUIDv7, Unix milliseconds.
pub fn uuid_ms(id: u128) -> u64 {
    (id >> 80) as u64
}

/// Appends `created_at_ms` as its distance from the time inside `id`.
pub fn push_created(out: &mut Vec<u8>, id: Uuid, created_at_ms: u64) {
    push_signed(out, created_at_ms.wrapping_sub(uuid_ms(id.as_u128())) as i64);
}

/// Reads a record from front to back; every step says whether there was enough.
pub struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts behind the version byte, which must be known.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Result<Self, RecordError> {
        match bytes.split_first() {
            Some((&RECORD_FORMAT, rest)) => Ok(Reader { what, rest }),
            Some((&found, _)) if found > RECORD_FORMAT => Err(RecordError::Version { what, found }),
            _ => Err(RecordError::Damaged { what }),
        }
    }
    /// Reads a part of a record, which has no version of its own.
    pub fn bare(what: &'static str, bytes: &'a [u8]) -> Self {
        Reader { what, rest: bytes }
    }
    /// The error of this record.
    pub fn damaged(&self) -> RecordError {
        RecordError::Damaged { what: self.what }
    }
    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], RecordError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.damaged())?;
        self.rest = rest;
        Ok(taken)
    }
    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }
    /// The next byte.
    pub fn byte(&mut self) -> Result<u8, RecordError> {
        let (byte, rest) = self.rest.split_first().ok_or_else(|| self.damaged())?;
        self.rest = rest;
        Ok(*byte)
    }
    /// A byte of flags, all of them known.
    pub fn flags(&mut self, known: u8) -> Result<u8, RecordError> {
        let flags = self.byte()?;
        if flags & !known == 0 { Ok(flags) } else { Err(self.damaged()) }
    }
    /// An unsigned number.
    pub fn varint(&mut self) -> Result<u64, RecordError> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            if shift == 63 && byte > 1 {
                break;
            }
            number |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(self.damaged())
    }
    /// A length, which cannot be larger than what is left.
    pub fn length(&mut self) -> Result<usize, RecordError> {
        let length = usize::try_from(self.varint()?).map_err(|_| self.damaged())?;
        if length <= self.rest.len() { Ok(length) } else { Err(self.damaged()) }
    }
    /// A signed number.
    pub fn signed(&mut self) -> Result<i64, RecordError> {
        let number = self.varint()?;
        Ok((number >> 1) as i64 ^ -((number & 1) as i64))
    }
    /// 16 bytes.
    pub fn id(&mut self) -> Result<u128, RecordError> {
        let bytes = self.take(16)?.try_into().map_err(|_| self.damaged())?;
        Ok(u128::from_be_bytes(bytes))
    }
    /// 8 bytes.
    pub fn word(&mut self) -> Result<u64, RecordError> {
        let bytes = self.take(8)?.try_into().map_err(|_| self.damaged())?;
        Ok(u64::from_be_bytes(bytes))
    }
    /// Nothing is left.
    pub fn at_end(&self) -> bool {
        self.rest.is_empty()
    }
    /// An id.
    pub fn uuid(&mut self) -> Result<Uuid, RecordError> {
        self.id().map(Uuid::from_u128)
    }
    /// A time, given as distance from the one inside `id`.
    pub fn created(&mut self, id: Uuid) -> Result<u64, RecordError> {
        Ok(uuid_ms(id.as_u128()).wrapping_add(self.signed()? as u64))
    }
    /// A text behind its length.
    pub fn text(&mut self) -> Result<&'a str, RecordError> {
        let length = self.length()?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| self.damaged())
    }
    /// All that is left, as text.
    pub fn rest_text(&mut self) -> Result<&'a str, RecordError> {
        let bytes = self.rest();
        std::str::from_utf8(bytes).map_err(|_| self.damaged())
    }
    /// Nothing may be left.
    pub fn end(&self) -> Result<(), RecordError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.damaged()) }
    }
}
