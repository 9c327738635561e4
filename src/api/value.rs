//! The `value` of an assertion on its way in: any JSON, kept as compact text.
//!
//! The rules are the model's (`model::value`). What is added here is the one thing that neither they
//! nor serde_json's raw values look at: a string escape that is half a surrogate pair. It is
//! well-formed JSON and yet no character, and most readers of the answer would stop at it. Pure.

use super::problem::{Kind, Problem};
use crate::model;

/// The compact form of `raw`, one well-formed JSON value.
pub fn compact(raw: &str) -> Result<String, Problem> {
    if let Some(half) = lone_surrogate(raw) {
        let detail = format!(
            "Field \"value\" has the escape \\u{half:04x} without its other half, which is no \
             character. Send the pair, or the character itself."
        );
        return Err(Problem::new(Kind::InvalidField, detail).with("field", "value"));
    }
    model::value::compact(raw).map_err(|invalid| super::mapping::invalid(&invalid))
}

/// The first `\ud800` to `\udfff` without its other half. Backslashes stand only in strings.
fn lone_surrogate(raw: &str) -> Option<u16> {
    let mut rest = raw;
    while let Some(at) = rest.find('\\') {
        let (escape, after) = escape_at(rest.get(at..)?);
        rest = after;
        match escape {
            Some(high @ 0xd800..=0xdbff) => match escape_at(rest) {
                (Some(0xdc00..=0xdfff), after) => rest = after,
                _ => return Some(high),
            },
            Some(low @ 0xdc00..=0xdfff) => return Some(low),
            _ => {}
        }
    }
    None
}

/// The number of the `\uXXXX` that `text` starts with, if it does, and what follows the escape.
fn escape_at(text: &str) -> (Option<u16>, &str) {
    let digits = text.strip_prefix("\\u").and_then(|rest| rest.get(..4));
    match digits.and_then(|digits| u16::from_str_radix(digits, 16).ok()) {
        Some(unit) => (Some(unit), text.get(6..).unwrap_or_default()),
        None => {
            // A backslash and one character behind it, which may take several bytes.
            let mut chars = text.chars();
            chars.next();
            chars.next();
            (None, chars.as_str())
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn half_a_surrogate_pair_is_refused_and_a_whole_one_is_not() {
        assert_eq!(lone_surrogate(r#""\ud800""#), Some(0xd800));
        assert_eq!(lone_surrogate(r#""\ud800\u0041""#), Some(0xd800));
        assert_eq!(lone_surrogate(r#""\ud83d\ude00\udc00""#), Some(0xdc00));
        assert_eq!(lone_surrogate(r#""\ud83d\ude00""#), None);
        assert_eq!(lone_surrogate(r#""\\ud800""#), None, "an escaped backslash, then letters");
        assert_eq!(lone_surrogate(r#""\n\\\u00e9""#), None);
        assert_eq!(compact(r#"{"\udfff":1}"#).unwrap_err().member("field").unwrap(), "value");
        assert_eq!(compact(" [ 1 ] ").unwrap(), "[1]");
    }

    #[test]
    fn the_models_rules_hold() {
        assert_eq!(compact("[1e999]").unwrap_err().kind(), Kind::InvalidField);
        let deep = format!("{}{}", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert_eq!(compact(&deep).unwrap_err().kind(), Kind::InvalidField);
        let large = format!("\"{}\"", "a".repeat(model::value::VALUE_BYTES_MAX));
        let problem = compact(&large).unwrap_err();
        assert_eq!(problem.kind(), Kind::ValueTooLarge);
        assert_eq!(problem.member("limit").unwrap(), model::value::VALUE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn what_passes_is_read_by_serde_json(text in r#""(\\u[0-9a-f]{4}|\\u[dD][89a-f][0-9a-f]{2}|\\\\|\\n|[a-z é])*""#) {
            let read = serde_json::from_str::<serde_json::Value>(&text).is_ok();
            prop_assert_eq!(compact(&text).is_ok(), read, "{}", text);
        }
    }
}
