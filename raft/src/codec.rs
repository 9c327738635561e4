//! The one place that knows how values become bytes.
//!
//! bincode is no longer maintained, so nothing outside this module names it: replacing it is a
//! change of this file and of the golden bytes beside it.

use serde::{Serialize, de::DeserializeOwned};

/// A value that could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The value does not fit the form, or is larger than the form allows.
    #[error("encode: {0}")]
    Encode(String),
    /// The bytes are not a value of the expected type.
    #[error("decode: {0}")]
    Decode(String),
    /// The value ended before the bytes did.
    #[error("decode: {rest} bytes are left behind the value")]
    Trailing {
        /// How many bytes were left over.
        rest: usize,
    },
}

/// Upper bound of a decoded value's claimed size, in bytes: no message or entry is larger, so a
/// damaged length cannot make the decoder reserve gigabytes.
const DECODE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Encodes `value`: little-endian, variable-length integers.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    bincode::serde::encode_to_vec(value, bincode::config::standard()).map_err(|e| CodecError::Encode(e.to_string()))
}

/// Decodes a value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let config = bincode::config::standard().with_limit::<DECODE_BYTES_MAX>();
    let (value, used) =
        bincode::serde::decode_from_slice(bytes, config).map_err(|e| CodecError::Decode(e.to_string()))?;
    match bytes.len().checked_sub(used) {
        Some(0) | None => Ok(value),
        Some(rest) => Err(CodecError::Trailing { rest }),
    }
}
