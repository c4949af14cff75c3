//! Durations, sizes, rates and times as people write them.
//!
//! An error is the rest of a sentence that begins with the key. It says what was expected and what
//! was found.

use std::time::Duration;

use chrono::{DateTime, Utc};

/// Longest duration that is accepted. Nobody waits longer, and it can be added to any date.
const MAX_DURATION: Duration = Duration::from_secs(3650 * 24 * 3600);

/// Units of sizes. Only an upper-case `B` is accepted, because some readers take `b` for bits.
const UNITS: [(&str, u64); 9] = [
    ("KiB", bytesize::KIB),
    ("MiB", bytesize::MIB),
    ("GiB", bytesize::GIB),
    ("TiB", bytesize::TIB),
    ("KB", bytesize::KB),
    ("MB", bytesize::MB),
    ("GB", bytesize::GB),
    ("TB", bytesize::TB),
    ("B", 1),
];

/// Reads a duration such as `"90s"`, `"5m"`, `"7d"` or `"1h 30m"`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|_| expected("a duration such as \"90s\", \"5m\" or \"7d\"", text))?;
    if duration > MAX_DURATION {
        return Err(expected("a duration of at most \"3650d\"", text));
    }
    Ok(duration)
}

/// Reads a size in bytes such as `"64MiB"` (2^20 bytes each) or `"4GB"` (10^9 bytes each).
pub fn parse_size(text: &str) -> Result<u64, String> {
    bytes(text).ok_or_else(|| expected("a size such as \"64MiB\" or \"4GB\"", text))
}

/// Reads a rate such as `"50MB/s"` in bytes a second; never 0.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    text.strip_suffix("/s")
        .and_then(bytes)
        .filter(|rate| *rate > 0)
        .ok_or_else(|| expected("a rate above 0 such as \"50MB/s\"", text))
}

/// Reads a time in the form of RFC 3339, which includes a time zone.
pub(super) fn parse_time(text: &str) -> Result<DateTime<Utc>, String> {
    DateTime::parse_from_rfc3339(text)
        .map(|time| time.to_utc())
        .map_err(|_| expected("a time such as \"2030-01-31T22:00:00Z\"", text))
}

fn bytes(text: &str) -> Option<u64> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let unit = unit.trim_start();
    let (_, size) = UNITS.iter().find(|(name, _)| *name == unit)?;
    digits.parse::<u64>().ok()?.checked_mul(*size)
}

/// Makes the error for a text that is not a secret.
pub(super) fn expected(what: &str, found: &str) -> String {
    format!("expected {what}, found {}", quoted(found))
}

/// Returns the text quoted, escaped and shortened, fit for one line of a log.
pub(super) fn quoted(text: &str) -> String {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let seconds = |text| parse_duration(text).map(|d| d.as_secs());
        assert_eq!(seconds("90s"), Ok(90));
        assert_eq!(seconds("5m"), Ok(300));
        assert_eq!(seconds("7d"), Ok(7 * 86_400));
        assert_eq!(seconds("1h 30m"), Ok(5400));
        assert_eq!(seconds("0s"), Ok(0));
        for bad in [
            "",
            "90",
            "5 parsecs",
            "-1s",
            "m",
            "4000d",
            "99999999999999999999s",
        ] {
            let problem = parse_duration(bad).unwrap_err();
            assert!(problem.ends_with(&format!("found {bad:?}")), "{problem}");
        }
    }

    #[test]
    fn sizes_and_rates() {
        assert_eq!(parse_size("64MiB"), Ok(64 << 20));
        assert_eq!(parse_size("4GB"), Ok(4_000_000_000));
        assert_eq!(parse_size("4 GB"), Ok(4_000_000_000));
        assert_eq!(parse_size("0B"), Ok(0));
        assert_eq!(parse_rate("50MB/s"), Ok(50_000_000));
        for bad in [
            "",
            "64",
            "MiB",
            "-1MB",
            "1.5GB",
            "4gb",
            "50Mb",
            "4XB",
            "99999999999TiB",
            "1GB/s",
        ] {
            assert!(parse_size(bad).is_err(), "{bad:?} was accepted");
        }
        for bad in ["", "50MB", "50MB/m", "0MB/s", "/s"] {
            assert!(parse_rate(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn times() {
        let time = parse_time("2030-01-31T23:00:00+01:00").unwrap();
        assert_eq!(time, parse_time("2030-01-31T22:00:00Z").unwrap());
        for bad in ["", "2030-01-31", "2030-01-31T22:00:00", "tomorrow"] {
            assert!(parse_time(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn what_was_found_stays_on_one_line() {
        assert_eq!(quoted("a\nb"), "\"a\\nb\"");
        assert_eq!(quoted(&"é".repeat(61)), format!("\"{}\"…", "é".repeat(60)));
    }
}
