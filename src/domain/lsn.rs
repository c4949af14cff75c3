//! A position in PostgreSQL's write-ahead log.

use std::fmt;
use std::str::FromStr;

/// As the server counts it: bytes since the cluster was made. Shown and read as PostgreSQL writes
/// it, `16/B374D848`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no position in a write-ahead log (expected such as 16/B374D848)")]
pub struct NoLsn(String);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl FromStr for Lsn {
    type Err = NoLsn;

    fn from_str(text: &str) -> Result<Self, NoLsn> {
        let half = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
            plain
                .then(|| u32::from_str_radix(digits, 16).ok())
                .flatten()
        };
        text.split_once('/')
            .and_then(|(high, low)| Some((u64::from(half(high)?) << 32) | u64::from(half(low)?)))
            .map(Lsn)
            .ok_or_else(|| NoLsn(text.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_what_it_writes() {
        for text in ["0/0", "0/16B3748", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().expect("a position").to_string(), text);
        }
        assert!("1/0".parse::<Lsn>().ok() > "0/FFFFFFFF".parse::<Lsn>().ok());
        for wrong in ["", "0", "/", "0/", "+1/0", "0/G", "100000000/0"] {
            assert!(wrong.parse::<Lsn>().is_err(), "{wrong}");
        }
    }
}
