//! What commands print: results to standard output, notices to standard error.
//!
//! Library code must not use `println!`, which panics when the reader of a pipe has gone. Here a closed
//! pipe is an error like any other, `CliError::OutputClosed`, and ends the command quietly.

use std::io::{self, ErrorKind, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::CliError;

/// Writes one line (or several) to standard output.
pub fn line(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    let written = writeln!(out, "{text}").and_then(|()| out.flush());
    written.map_err(output_error)
}

/// Writes `value` as one line of JSON to standard output.
pub fn json<T: Serialize>(value: &T) -> Result<(), CliError> {
    let text = serde_json::to_string(value)
        .map_err(|error| CliError::Local(format!("cannot write the answer as JSON: {error}")))?;
    line(&text)
}

/// Writes one line to standard error. When even that fails there is nobody left to tell.
pub fn notice(text: &str) {
    let mut err = io::stderr().lock();
    let _nobody_to_tell = writeln!(err, "{text}");
}

/// An empty table in the style of all tables here, with `columns` as its head.
pub fn table<'a>(columns: impl IntoIterator<Item = &'a str>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns);
    table
}

fn output_error(error: io::Error) -> CliError {
    if error.kind() == ErrorKind::BrokenPipe {
        CliError::OutputClosed
    } else {
        CliError::Local(format!("cannot write to standard output: {error}"))
    }
}

/// `12345` as `12,345`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Microseconds as milliseconds with one decimal, rounded.
pub fn ms(us: u64) -> String {
    format!("{:.1}", us as f64 / 1000.0)
}
