//! The kinds of values of the keys, and the check of a value against its kind.

use std::net::IpAddr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use toml::Value;

use super::endpoint;
use super::proxy::{self, Proxy};
use super::schedule::Schedule;
use super::units::{expected, parse_duration, parse_rate, parse_size, parse_time, quoted};

/// The kind of value that a key takes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Bool,
    /// An integer from the first bound to the second, both included.
    Int(i64, i64),
    /// One line of text.
    Text,
    Choice(&'static [&'static str]),
    /// A duration; zero is allowed.
    Duration,
    /// A duration above zero.
    PositiveDuration,
    /// A size of at least this number of bytes.
    Size(u64),
    Rate,
    Time,
    Cron,
    Path,
    Host,
    Ip,
    /// The URL of an HTTP proxy. With a password in it the whole URL is a secret.
    Proxy,
    Bucket,
    /// A prefix of object keys under which no package of Builder can be.
    Prefix,
    /// A prefix of object keys in a bucket that is not Builder's.
    Folder,
    /// A name that needs no quotes in a database, also as the name of a replication slot.
    Identifier,
    Secret,
}

/// A value that passed the check of its kind.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Checked {
    Bool(bool),
    Int(u64),
    Text(String),
    Duration(Duration),
    /// A size in bytes, or a rate in bytes a second.
    Bytes(u64),
    Time(DateTime<Utc>),
    Schedule(Box<Schedule>),
    Ip(IpAddr),
}

impl Kind {
    /// Checks a value against its kind. `None`: the text is empty, so the key is not set. An error
    /// is the rest of a sentence that begins with the key, and it never holds a secret.
    pub(super) fn check(self, value: &Value) -> Result<Option<Checked>, String> {
        let checked = match (self, value) {
            (_, Value::String(text)) if text.is_empty() => return Ok(None),
            (Self::Bool, Value::Boolean(value)) => Checked::Bool(*value),
            (Self::Int(least, most), Value::Integer(value)) if (least..=most).contains(value) => {
                Checked::Int(u64::try_from(*value).map_err(|_| self.mismatch(&value.to_string()))?)
            }
            (Self::Int(..), Value::Integer(value)) => {
                return Err(self.mismatch(&value.to_string()));
            }
            (Self::Time, Value::Datetime(time)) => Checked::Time(parse_time(&time.to_string())?),
            (_, Value::String(text)) => self.check_text(text)?,
            _ => return Err(self.mismatch(&self.describe(value))),
        };
        Ok(Some(checked))
    }

    fn check_text(self, text: &str) -> Result<Checked, String> {
        if text.contains(char::is_control) && !matches!(self, Self::Secret | Self::Proxy) {
            return Err(expected("one line without control characters", text));
        }
        let good = match self {
            Self::Bool | Self::Int(..) => false,
            Self::Text | Self::Secret => true,
            Self::Choice(choices) => choices.contains(&text),
            Self::Duration => return parse_duration(text).map(Checked::Duration),
            Self::PositiveDuration => match parse_duration(text)? {
                Duration::ZERO => false,
                duration => return Ok(Checked::Duration(duration)),
            },
            Self::Size(least) => match parse_size(text)? {
                size if size < least => false,
                size => return Ok(Checked::Bytes(size)),
            },
            Self::Rate => return parse_rate(text).map(Checked::Bytes),
            Self::Time => return parse_time(text).map(Checked::Time),
            Self::Cron => return Schedule::parse(text).map(|s| Checked::Schedule(Box::new(s))),
            // A service is started in a directory that nobody chooses, so a relative path would
            // mean nothing.
            Self::Path => text.starts_with('/'),
            Self::Host => endpoint::is_host(text),
            Self::Ip => match text.parse() {
                Ok(address) => return Ok(Checked::Ip(address)),
                Err(_) => false,
            },
            Self::Proxy => Proxy::parse(text).map(|_| true)?,
            Self::Bucket => endpoint::is_bucket_name(text),
            Self::Prefix => is_own_prefix(text),
            Self::Folder => is_folder(text),
            Self::Identifier => is_identifier(text),
        };
        if good {
            Ok(Checked::Text(text.to_string()))
        } else {
            Err(self.mismatch(&quoted(text)))
        }
    }

    /// Returns whether this value is one that may not be shown.
    pub(super) fn is_secret(self, checked: &Checked) -> bool {
        match (self, checked) {
            (Self::Secret, _) => true,
            (Self::Proxy, Checked::Text(text)) => proxy::holds_credentials(text),
            _ => false,
        }
    }

    fn mismatch(self, found: &str) -> String {
        format!("expected {}, found {found}", self.expectation())
    }

    /// Returns the value where it may be shown, and otherwise its type.
    fn describe(self, value: &Value) -> String {
        let kind = match value {
            Value::String(text) if !matches!(self, Self::Secret) => return quoted(text),
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a number with a fraction",
            Value::Boolean(_) => "true or false",
            Value::Datetime(_) => "a time",
            Value::Array(_) => "a list",
            Value::Table(_) => "a table",
            Value::String(_) => "a text",
        };
        kind.to_string()
    }

    fn expectation(self) -> String {
        let fixed = match self {
            Self::Bool => "true or false",
            Self::Int(least, most) if most == i64::MAX => {
                return format!("an integer of at least {least}");
            }
            Self::Int(least, most) => return format!("an integer {least}-{most}"),
            Self::Choice(choices) => return format!("one of {}", choices.join(", ")),
            Self::Size(least) if least >= bytesize::MIB => {
                return format!("a size of at least \"{}MiB\"", least / bytesize::MIB);
            }
            Self::Size(_) => "a size above 0 such as \"64MiB\" or \"4GB\"",
            Self::Text | Self::Secret => "a text in quotes",
            Self::Duration => "a duration such as \"90s\", \"5m\" or \"7d\"",
            Self::PositiveDuration => "a duration above 0 such as \"90s\", \"5m\" or \"7d\"",
            Self::Rate => "a rate such as \"50MB/s\"",
            Self::Time => "a time such as \"2030-01-31T22:00:00Z\"",
            Self::Cron => "five cron fields (in UTC) such as \"0 3 * * *\"",
            Self::Path => "an absolute path",
            Self::Host => "a host name or an IP address",
            Self::Ip => "an IP address",
            Self::Proxy => proxy::EXPECTED,
            Self::Bucket => endpoint::BUCKET_NAME,
            Self::Prefix => {
                "a prefix that begins with a dot and ends with a slash, such as \".warm-spare/\", of letters, digits, dots, hyphens, underscores and slashes"
            }
            Self::Folder => {
                "a prefix of at most 200 characters that ends with a slash, such as \"builder/\", of letters, digits, dots, hyphens, underscores and slashes"
            }
            Self::Identifier => {
                "up to 63 lower-case letters, digits and underscores, not starting with a digit"
            }
        };
        fixed.to_string()
    }
}

/// Returns whether the text is an identifier. PostgreSQL truncates names of more than 63 bytes.
fn is_identifier(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    text.len() < 64 && text.bytes().all(plain) && !text.starts_with(|c: char| c.is_ascii_digit())
}

/// Returns whether the text is a prefix for objects of our own. A key of Builder begins with the name
/// of an origin, which has no dot in front.
fn is_own_prefix(text: &str) -> bool {
    text.starts_with('.') && is_folder(text)
}

/// Returns whether the text is a prefix of object keys that ends with a slash. Each of its parts is a
/// name that every store keeps as it is.
fn is_folder(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let part = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(plain);
    let Some(parts) = text.strip_suffix('/') else {
        return false;
    };
    text.len() <= 200 && parts.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_of_our_own_cannot_be_a_package_s() {
        let long = format!(".{}/", "a".repeat(199));
        for good in [".warm-spare/", ".ours/dc2/", ".a/b.c_d-e/"] {
            assert!(is_own_prefix(good), "{good}");
        }
        for bad in [
            "", "/", ".", "./", "../", "core/", ".a", ".a//", ".a/../", "/.a/", ".a b/", &long,
        ] {
            assert!(!is_own_prefix(bad), "{bad}");
        }
    }

    #[test]
    fn a_folder_of_a_bucket_ends_with_a_slash() {
        let folder = |text: &str| Kind::Folder.check(&Value::String(text.into()));
        for good in ["builder/", "a/b.c_d-e/", ".hidden/", "A/"] {
            assert_eq!(folder(good), Ok(Some(Checked::Text(good.into()))));
        }
        let long = format!("{}/", "a".repeat(200));
        for bad in [
            "builder",
            "/",
            "/builder/",
            "a//",
            "./",
            "../",
            "a/../",
            "a b/",
            "a\nb/",
            "a\u{7f}/",
            "a\\b/",
            &long,
        ] {
            let problem = folder(bad).expect_err(bad);
            assert!(problem.starts_with("expected "), "{problem}");
        }
    }

    #[test]
    fn an_empty_text_is_not_set() {
        let empty = Value::String(String::new());
        for kind in [
            Kind::Bool,
            Kind::Int(1, 2),
            Kind::Duration,
            Kind::Secret,
            Kind::Path,
        ] {
            assert_eq!(kind.check(&empty), Ok(None), "{kind:?}");
        }
    }

    #[test]
    fn an_identifier_is_a_plain_name() {
        let name = |text: &str| Kind::Identifier.check(&Value::String(text.into()));
        for good in ["warm_spare_0123abcd", "_", "a1", &"a".repeat(63)] {
            assert_eq!(name(good), Ok(Some(Checked::Text(good.into()))));
        }
        for bad in ["1a", "A", "a-b", "a b", "a\"b", "ä", &"a".repeat(64)] {
            let problem = name(bad).expect_err(bad);
            assert!(
                problem.starts_with("expected up to 63 lower-case"),
                "{problem}"
            );
        }
    }

    #[test]
    fn a_time_may_be_written_without_quotes() {
        let table: toml::Table = "a = 2030-01-31T22:00:00Z\nb = 2030-01-31".parse().unwrap();
        let quoted = Value::String("2030-01-31T22:00:00Z".to_string());
        assert_eq!(Kind::Time.check(&table["a"]), Kind::Time.check(&quoted));
        assert!(Kind::Time.check(&table["b"]).is_err());
    }

    #[test]
    fn the_type_of_a_secret_is_named_and_not_its_value() {
        let problem = Kind::Secret.check(&Value::Integer(4711)).unwrap_err();
        assert_eq!(problem, "expected a text in quotes, found an integer");
        let several_lines = Value::String("a\nb".to_string());
        assert!(Kind::Secret.check(&several_lines).is_ok());
        assert!(Kind::Text.check(&several_lines).is_err());
    }
}
