//! Times on the wire: RFC 3339 in UTC with milliseconds out, RFC 3339 or Unix milliseconds in.
//!
//! Inside, every time is a count of Unix milliseconds. Pure.

use jiff::{Timestamp, fmt::temporal::DateTimePrinter};

const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(3));

/// `2026-11-20T12:56:45.000Z`. Times that no calendar holds are printed as the epoch's start.
pub fn to_rfc3339(unix_ms: u64) -> String {
    let ms = i64::try_from(unix_ms).unwrap_or(i64::MAX);
    let timestamp = Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH);
    PRINTER.timestamp_to_string(&timestamp)
}

/// Unix milliseconds of an RFC 3339 time, or what is wrong with it.
pub fn parse_rfc3339(text: &str) -> Result<i64, String> {
    text.parse::<Timestamp>()
        .map(|timestamp| timestamp.as_millisecond())
        .map_err(|_| "expected an RFC 3339 time such as 2026-01-31T12:00:00Z".to_string())
}

/// `ms` if a calendar date exists for it (years -9999 to 9999).
pub fn check_unix_ms(ms: i64) -> Result<i64, String> {
    Timestamp::from_millisecond(ms).map(|_| ms).map_err(|_| format!("{ms} is not a time in Unix milliseconds"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    #[test]
    fn times_are_printed_with_milliseconds_and_read_back() {
        assert_eq!(to_rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(to_rfc3339(1_700_000_000_120), "2023-11-14T22:13:20.120Z");
        assert_eq!(parse_rfc3339("2023-11-14T22:13:20.12Z"), Ok(1_700_000_000_120));
        assert_eq!(parse_rfc3339("2023-11-14T23:13:20.12+01:00"), Ok(1_700_000_000_120));
        assert!(parse_rfc3339("yesterday").is_err());
        assert!(check_unix_ms(i64::MAX).is_err());
        to_rfc3339(u64::MAX);
    }
}
