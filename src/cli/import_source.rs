//! Reads NDJSON records for `import` and `import-check`: one at a time, checked, with their line numbers.
//!
//! A record is a line that is not blank. Its position is the number of records before it, so blank
//! lines may come and go without moving an import. Memory is bounded by the longest line allowed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::CliError;

/// Longest line read, bytes. A longer one could not be sent: the API takes bodies of 8 MiB.
pub const LINE_BYTES_MAX: usize = 7 * 1024 * 1024;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Line in the file, from 1.
    pub line: u64,
    /// The JSON text, without the line's end.
    pub json: Vec<u8>,
}

/// The fields of an assertion, as far as they can be checked before sending.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)] // read by serde only: what counts is that they parse
struct AssertionShape<'a> {
    #[serde(borrow)]
    concept_path: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    predicate: std::borrow::Cow<'a, str>,
    value: IgnoredAny,
    #[serde(default)]
    source: Option<IgnoredAny>,
    #[serde(default)]
    confidence: Option<IgnoredAny>,
    #[serde(default)]
    epoch: Option<IgnoredAny>,
    #[serde(default)]
    supersedes: Option<IgnoredAny>,
    #[serde(default)]
    valid_from: Option<IgnoredAny>,
    #[serde(default)]
    valid_to: Option<IgnoredAny>,
}

/// A stream of records.
pub struct Source {
    name: String,
    reader: Box<dyn BufRead + Send>,
    line: u64,
    position: u64,
    bytes_read: u64,
}

impl Source {
    /// Opens a file, or standard input when `path` is `-`.
    pub fn open(path: &Path) -> Result<Self, CliError> {
        if path == Path::new("-") {
            return Ok(Self::from_reader("standard input", Box::new(BufReader::new(io::stdin()))));
        }
        let name = path.display().to_string();
        let file = File::open(path).map_err(|error| CliError::Refused(format!("cannot read {name}: {error}")))?;
        let reader = BufReader::with_capacity(1 << 20, file);
        Ok(Self::from_reader(&name, Box::new(reader)))
    }

    /// Reads from `reader`; `name` is for messages.
    pub fn from_reader(name: &str, reader: Box<dyn BufRead + Send>) -> Self {
        Self { name: name.to_owned(), reader, line: 0, position: 0, bytes_read: 0 }
    }

    /// Records read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// The next record, not yet checked; `None` at the end.
    pub fn next_unchecked(&mut self) -> Result<Option<Record>, CliError> {
        loop {
            let mut json = Vec::new();
            let limit = LINE_BYTES_MAX as u64 + 2;
            let mut limited = Read::take(&mut self.reader, limit);
            let read = limited
                .read_until(b'\n', &mut json)
                .map_err(|error| CliError::Refused(format!("cannot read {}: {error}", self.name)))?;
            if read == 0 {
                return Ok(None);
            }
            self.line += 1;
            self.bytes_read += read as u64;
            while json.last().is_some_and(u8::is_ascii_whitespace) {
                json.pop();
            }
            if json.len() > LINE_BYTES_MAX {
                let why = format!("longer than {LINE_BYTES_MAX} bytes");
                return Err(self.bad_line(self.line, &why));
            }
            if json.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            self.position += 1;
            let line = self.line;
            return Ok(Some(Record { line, json }));
        }
    }

    /// The next record, checked as far as that is possible here.
    pub fn next_checked(&mut self) -> Result<Option<Record>, CliError> {
        let Some(record) = self.next_unchecked()? else {
            return Ok(None);
        };
        match serde_json::from_slice::<AssertionShape<'_>>(&record.json) {
            Ok(_) => Ok(Some(record)),
            Err(error) => Err(self.bad_line(record.line, &explain(&error))),
        }
    }

    /// Skips records until `position` of them have been read. False when there are fewer.
    pub fn skip_to(&mut self, position: u64) -> Result<bool, CliError> {
        while self.position < position {
            if self.next_unchecked()?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The error for one wrong line.
    pub fn bad_line(&self, line: u64, why: &str) -> CliError {
        CliError::Refused(format!("{}, line {line}: {why}", self.name))
    }
}

/// serde's message with the column, but without its line, which is always 1 here.
fn explain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.split(" at line ").next().unwrap_or(&text).to_owned();
    if error.column() > 0 { format!("{text} (column {})", error.column()) } else { text }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const GOOD: &str = r#"{"concept_path":"a/b","predicate":"p","value":null}"#;

    fn source(text: &str) -> Source {
        Source::from_reader("f", Box::new(io::Cursor::new(text.to_owned().into_bytes())))
    }

    #[test]
    fn blank_lines_count_as_lines_and_not_as_records() {
        let mut source = source(&format!("\n{GOOD}\r\n  \n{GOOD}"));
        let first = source.next_checked().unwrap().unwrap();
        let second = source.next_checked().unwrap().unwrap();
        assert_eq!((first.line, second.line), (2, 4));
        assert_eq!(first.json, GOOD.as_bytes());
        assert_eq!(source.position(), 2);
        assert!(source.next_checked().unwrap().is_none());
    }

    #[test]
    fn wrong_lines_are_named_with_their_number() {
        for (bad, what) in [
            ("{", "EOF"),
            (r#"{"concept_path":"a","predicate":"p"}"#, "missing field `value`"),
            (r#"{"concept_path":1,"predicate":"p","value":1}"#, "invalid type"),
            (r#"{"concept_path":"a","predicate":"p","value":1,"colour":2}"#, "unknown field"),
            ("[1]", "invalid"),
            ("\u{1}", "expected value"),
        ] {
            let mut source = source(&format!("{GOOD}\n{bad}\n"));
            source.next_checked().unwrap();
            let error = source.next_checked().unwrap_err();
            assert_eq!(error.exit_code(), 4);
            let text = error.to_string();
            assert!(text.starts_with("f, line 2: ") && text.contains(what), "{text}");
        }
    }

    #[test]
    fn an_endless_line_is_refused_with_bounded_memory() {
        let endless = BufReader::new(io::repeat(b'x'));
        let mut source = Source::from_reader("f", Box::new(endless));
        assert!(source.next_checked().unwrap_err().to_string().contains("longer than"));
    }

    #[test]
    fn skipping_stops_at_a_position() {
        let mut source = source(&format!("{GOOD}\n\n{GOOD}\n{GOOD}\n"));
        assert!(source.skip_to(2).unwrap());
        assert_eq!(source.next_checked().unwrap().unwrap().line, 4);
        assert!(!source.skip_to(4).unwrap());
    }
}
