//! Query strings, read strictly.
//!
//! A handler takes the parameters it knows and then calls [`Params::finish`], which refuses what is
//! left over and names what the route takes: a misspelt parameter must not change an answer
//! silently. Every refusal is a 400 that names the parameter.

use std::str::FromStr;

use super::problem::{Kind, Problem};

/// Longest query string, in bytes: three times the longest concept path, escaped, and the rest.
pub const QUERY_BYTES_MAX: usize = 16 * 1024;

/// The parameters of one request that nobody has taken yet.
pub struct Params {
    left: Vec<(String, String)>,
    taken: Vec<&'static str>,
}

/// A refusal of parameter `name`.
pub fn invalid(name: &str, what: impl std::fmt::Display) -> Problem {
    Problem::new(Kind::InvalidQuery, format!("Parameter {name}: {what}.")).with("parameter", name)
}

impl Params {
    /// Splits and decodes `query`, the part behind the question mark.
    pub fn parse(query: Option<&str>) -> Result<Self, Problem> {
        let query = query.unwrap_or_default();
        if query.len() > QUERY_BYTES_MAX {
            let detail = format!("The query string has {} bytes; at most {QUERY_BYTES_MAX} are taken.", query.len());
            let problem = Problem::new(Kind::InvalidQuery, detail);
            return Err(problem.with_limit(QUERY_BYTES_MAX as u64, query.len() as u64));
        }
        let mut left: Vec<(String, String)> = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = decode(name).map_err(|what| invalid(name, what))?;
            let value = decode(value).map_err(|what| invalid(&name, what))?;
            if left.iter().any(|(other, _)| *other == name) {
                return Err(invalid(&name, "is given twice; give it once"));
            }
            left.push((name, value));
        }
        Ok(Params { left, taken: Vec::new() })
    }

    /// Takes the text of `name`; given but empty is refused.
    pub fn text(&mut self, name: &'static str) -> Result<Option<String>, Problem> {
        self.taken.push(name);
        let Some(at) = self.left.iter().position(|(other, _)| other == name) else {
            return Ok(None);
        };
        let (_, value) = self.left.swap_remove(at);
        if value.is_empty() {
            return Err(invalid(name, "is empty; leave it out or give it a value"));
        }
        Ok(Some(value))
    }

    /// Takes `name` as a value of `T`; `expected` says what is accepted.
    pub fn parsed<T: FromStr>(&mut self, name: &'static str, expected: &str) -> Result<Option<T>, Problem> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(invalid(name, format_args!("must be {expected} and is \"{text}\""))),
        }
    }

    /// Takes `name` as one of `choices`.
    pub fn choice<T: Copy>(&mut self, name: &'static str, choices: &[(&str, T)]) -> Result<Option<T>, Problem> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
                let list = words.join(", ");
                Err(invalid(name, format_args!("must be one of {list} and is \"{text}\"")))
            }
        }
    }

    /// Refuses what was not taken.
    pub fn finish(self) -> Result<(), Problem> {
        let Some((name, _)) = self.left.first() else { return Ok(()) };
        let accepted = self.taken.join(", ");
        let what = if accepted.is_empty() {
            "is unknown; this route takes no parameters".to_string()
        } else {
            format!("is unknown; this route takes {accepted}")
        };
        Err(invalid(name, what).with("accepted", accepted))
    }
}

/// Undoes percent escapes and `+`.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    let hex = |byte: Option<u8>| byte.and_then(|b| char::from(b).to_digit(16));
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => match (hex(bytes.next()), hex(bytes.next())) {
                (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
                _ => return Err("has a percent sign without two hexadecimal digits; write %25"),
            },
            other => out.push(other),
        }
    }
    String::from_utf8(out).map_err(|_| "is not UTF-8")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_are_decoded_and_typed() {
        let mut params = Params::parse(Some("a=x%2Fy+%C3%A9&n=7&w=one")).unwrap();
        assert_eq!(params.text("a").unwrap().unwrap(), "x/y é");
        assert_eq!(params.parsed::<u64>("n", "a number").unwrap(), Some(7));
        assert_eq!(params.choice("w", &[("one", 1), ("two", 2)]).unwrap(), Some(1));
        assert_eq!(params.text("absent").unwrap(), None);
        params.finish().unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(Params::parse(None).unwrap().finish().is_ok());
        assert!(Params::parse(Some("a=1&a=2")).is_err());
        assert!(Params::parse(Some("a=%")).is_err());
        assert!(Params::parse(Some("a=%zz")).is_err());
        assert!(Params::parse(Some("a=%ff")).is_err());
        assert!(Params::parse(Some(&"a".repeat(QUERY_BYTES_MAX + 1))).is_err());
        assert!(Params::parse(Some("a=")).unwrap().text("a").is_err());
        let number = Params::parse(Some("n=-1")).unwrap().parsed::<u64>("n", "a number");
        assert!(number.unwrap_err().detail().contains("must be a number and is \"-1\""));
        let choice = Params::parse(Some("w=x")).unwrap().choice("w", &[("one", 1), ("two", 2)]);
        assert!(choice.unwrap_err().detail().contains("one, two"));
        let mut params = Params::parse(Some("limti=1")).unwrap();
        params.text("limit").unwrap();
        let problem = params.finish().unwrap_err();
        assert_eq!(problem.member("parameter").unwrap(), "limti");
        assert_eq!(problem.member("accepted").unwrap(), "limit");
    }

    proptest! {
        #[test]
        fn any_query_string_is_answered_without_a_panic(text in ".{0,60}") {
            if let Ok(mut params) = Params::parse(Some(&text)) {
                let _ = params.text("a");
                let _ = params.finish();
            }
        }
    }
}
