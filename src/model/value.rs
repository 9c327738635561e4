//! The value of an assertion: any JSON, kept as compact text.
//!
//! The text is checked and its white space removed, nothing else: a number keeps its digits and an
//! object the order of its keys, so that what comes back is what was sent. Numbers beyond the range
//! of a double are refused, because most readers would turn them into infinity.

use super::validate::Invalid;

/// Largest value, in bytes of compact JSON.
pub const VALUE_BYTES_MAX: usize = 1024 * 1024;
/// Deepest nesting of arrays and objects; a recursive reader survives it on a small stack.
pub const VALUE_DEPTH_MAX: usize = 100;

const FIELD: &str = "value";

/// Checks the size of a compact value.
pub fn check_size(value_json: &str) -> Result<(), Invalid> {
    if value_json.is_empty() {
        return Err(Invalid::malformed(FIELD, "is missing"));
    }
    if value_json.len() > VALUE_BYTES_MAX {
        return Err(Invalid::too_long(FIELD, VALUE_BYTES_MAX, value_json.len()));
    }
    Ok(())
}

/// The compact form of `text`, which must be one JSON value within the limits.
pub fn compact(text: &str) -> Result<String, Invalid> {
    let mut out = String::with_capacity(text.len().min(VALUE_BYTES_MAX));
    let (mut depth, mut rest) = (0usize, text);
    while let Some(c) = rest.chars().next() {
        let token_bytes = match c {
            ' ' | '\t' | '\n' | '\r' => {
                rest = rest.strip_prefix(c).unwrap_or_default();
                continue;
            }
            '"' => string_bytes(rest).ok_or_else(|| not_json("a string does not end"))?,
            '[' | '{' => {
                depth += 1;
                if depth > VALUE_DEPTH_MAX {
                    return Err(Invalid::malformed(FIELD, format!("is nested deeper than {VALUE_DEPTH_MAX} levels")));
                }
                1
            }
            ']' | '}' => {
                depth = depth.checked_sub(1).ok_or_else(|| not_json("a bracket closes nothing"))?;
                1
            }
            ',' | ':' => 1,
            _ => rest
                .find(|c: char| c.is_ascii_whitespace() || matches!(c, ',' | ':' | ']' | '}' | '"'))
                .unwrap_or(rest.len())
                .max(c.len_utf8()),
        };
        let Some((token, after)) = rest.split_at_checked(token_bytes) else {
            return Err(not_json("a character is cut"));
        };
        if (c == '-' || c.is_ascii_digit()) && !token.parse::<f64>().is_ok_and(|number| number.is_finite()) {
            return Err(Invalid::malformed(FIELD, "holds a number that is not a finite double"));
        }
        // Words and numbers may not run together once the space between them is gone.
        if out.ends_with(is_word) && token.starts_with(is_word) {
            return Err(not_json("two values stand side by side"));
        }
        out.push_str(token);
        rest = after;
        if out.len() > VALUE_BYTES_MAX {
            return Err(Invalid::too_long(FIELD, VALUE_BYTES_MAX, text.len()));
        }
    }
    check_size(&out)?;
    // The scan above bounds depth and size; whether the grammar holds is for the parser to say.
    serde_json::from_str::<serde::de::IgnoredAny>(&out).map_err(|e| not_json(&e.to_string()))?;
    Ok(out)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.')
}

fn not_json(why: &str) -> Invalid {
    Invalid::malformed(FIELD, format!("is not JSON: {why}"))
}

/// Bytes of the string literal at the start of `text`, quotes included.
fn string_bytes(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(at + 1),
            _ => {}
        }
    }
    None
}
