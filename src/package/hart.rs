//! The header of a `.hart` file: five lines of text before the compressed archive.
//!
//! ```text
//! HART-1
//! ORIGIN-YYYYMMDDhhmmss        full name of the key it is signed with
//! BLAKE2b
//! BASE64                       64 bytes of Ed25519 signature, then what is signed: 64 hexadecimal digits
//!                              an empty line
//! ```
//!
//! The signature covers the BLAKE2b-256 hash of all bytes after the header.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::Checksum;

/// Maximum number of bytes of a header. Usual headers have about 220 bytes. The limit keeps a file
/// of another kind from being collected in memory in search of a line end.
pub(super) const MAX_HEADER: usize = 4096;

const SIGNATURE_LENGTH: usize = 64;
const HASH_DIGITS: usize = 64;

/// The header of a `.hart` file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HartHeader {
    /// Name and revision of the signing key, such as `core-20200101000000`.
    pub key_name: String,
    /// The Ed25519 signature alone.
    pub signature: [u8; SIGNATURE_LENGTH],
    /// The hash of the payload that was signed. The reader must check that it is the hash of this
    /// payload.
    pub signed_hash: Checksum,
    /// Number of bytes of the header. The payload starts after them.
    pub length: usize,
}

/// Reasons why bytes are not a `.hart` file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HartError {
    #[error("the first line is not HART-1")]
    Format,
    #[error("the second line is not the name of a key with its revision")]
    KeyName,
    #[error("the third line does not name the hash BLAKE2b")]
    HashType,
    #[error("the fourth line is not a signature: {0}")]
    Signature(&'static str),
    #[error("the fifth line is not empty")]
    Separator,
    #[error("no header within the first {MAX_HEADER} bytes")]
    TooLong,
    #[error("the file ends within its header, after {0} bytes")]
    Truncated(u64),
}

impl HartHeader {
    /// Reads the header from the first bytes of a file. `None`: the bytes are good so far, and more
    /// are needed.
    pub fn parse(prefix: &[u8]) -> Result<Option<Self>, HartError> {
        let window = &prefix[..prefix.len().min(MAX_HEADER)];
        let mut lines = Lines {
            bytes: window,
            at: 0,
        };
        let header = read_lines(&mut lines)?;
        if header.is_none() && prefix.len() > MAX_HEADER {
            return Err(HartError::TooLong);
        }
        Ok(header)
    }
}

/// Reads the lines of the header. Each line is checked as soon as it is complete, so that a file of
/// another kind is recognised early.
fn read_lines(lines: &mut Lines<'_>) -> Result<Option<HartHeader>, HartError> {
    let Some(format) = lines.next() else {
        let begun = lines.rest();
        return if b"HART-1\n".starts_with(begun) {
            Ok(None)
        } else {
            Err(HartError::Format)
        };
    };
    if format != b"HART-1" {
        return Err(HartError::Format);
    }
    let Some(key_name) = lines.next() else {
        return Ok(None);
    };
    let key_name = key_full_name(key_name).ok_or(HartError::KeyName)?;
    let Some(hash_type) = lines.next() else {
        return Ok(None);
    };
    if hash_type != b"BLAKE2b" {
        return Err(HartError::HashType);
    }
    let Some(signature) = lines.next() else {
        return Ok(None);
    };
    let (signature, signed_hash) = combined_signature(signature).map_err(HartError::Signature)?;
    let Some(separator) = lines.next() else {
        return Ok(None);
    };
    if !separator.is_empty() {
        return Err(HartError::Separator);
    }
    Ok(Some(HartHeader {
        key_name: key_name.to_string(),
        signature,
        signed_hash,
        length: lines.at,
    }))
}

/// The complete lines of the bytes. A last piece without a line end may still grow.
struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Lines<'a> {
    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest();
        let end = rest.iter().position(|b| *b == b'\n')?;
        self.at += end + 1;
        Some(&rest[..end])
    }

    fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }
}

/// Returns the full name of a key, `NAME-YYYYMMDDhhmmss`. The name becomes part of file names
/// elsewhere, so it must not lead out of a directory.
pub(super) fn key_full_name(line: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(line).ok()?;
    let (name, revision) = text.rsplit_once('-')?;
    let good_name = !name.is_empty()
        && !name.contains(|c: char| c == '/' || c.is_control() || c.is_whitespace());
    let good_revision = revision.len() == 14 && revision.bytes().all(|b| b.is_ascii_digit());
    (good_name && good_revision).then_some(text)
}

/// Splits the signature line into signature and message, which libsodium's `crypto_sign` joins.
fn combined_signature(line: &[u8]) -> Result<([u8; SIGNATURE_LENGTH], Checksum), &'static str> {
    let combined = STANDARD.decode(line).map_err(|_| "not base64")?;
    let (signature, message) = combined
        .split_first_chunk::<SIGNATURE_LENGTH>()
        .filter(|(_, message)| message.len() == HASH_DIGITS)
        .ok_or("not 64 bytes of signature and 64 of hash")?;
    // Only lower case is accepted: the signature covers the digits themselves, and the check writes
    // them again from the hash.
    let lower_case = message
        .iter()
        .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let hash = std::str::from_utf8(message)
        .ok()
        .filter(|_| lower_case)
        .and_then(|text| text.parse().ok())
        .ok_or("the signed text is not a BLAKE2b-256 hash in lower-case digits")?;
    Ok((*signature, hash))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::package::Hasher;

    const KEY: &str = "core-20200101000000";

    fn signature_line(message: &[u8]) -> String {
        STANDARD.encode([&[7u8; 64][..], message].concat())
    }

    fn good() -> String {
        let hash = Hasher::new().update(b"payload").finalize().to_string();
        format!(
            "HART-1\n{KEY}\nBLAKE2b\n{}\n\n",
            signature_line(hash.as_bytes())
        )
    }

    #[test]
    fn reads_a_header_and_stops_where_the_payload_starts() {
        let header = good();
        let file = format!("{header}payload\n\n");
        let found = HartHeader::parse(file.as_bytes()).unwrap().unwrap();
        assert_eq!(found.key_name, KEY);
        assert_eq!(found.signature, [7; 64]);
        assert_eq!(
            found.signed_hash,
            Hasher::new().update(b"payload").finalize()
        );
        assert_eq!(found.length, header.len());
    }

    #[test]
    fn every_shorter_beginning_needs_more() {
        let header = good();
        for length in 0..header.len() {
            assert_eq!(
                HartHeader::parse(&header.as_bytes()[..length]),
                Ok(None),
                "{length} bytes"
            );
        }
    }

    #[test]
    fn each_line_is_checked_as_soon_as_it_is_there() {
        let upper_case = signature_line("A".repeat(64).as_bytes());
        let short = signature_line(b"0123");
        let cases = [
            ("HART-2\n".to_string(), HartError::Format),
            ("\x7fELF".to_string(), HartError::Format),
            ("HART-1\r\n".to_string(), HartError::Format),
            ("HART-1\ncore\n".to_string(), HartError::KeyName),
            (
                "HART-1\n../x-20200101000000\n".to_string(),
                HartError::KeyName,
            ),
            (
                "HART-1\ncore-2020010100000x\n".to_string(),
                HartError::KeyName,
            ),
            (format!("HART-1\n{KEY}\nSHA256\n"), HartError::HashType),
            (good().replace("\n\n", "\nx\n"), HartError::Separator),
        ];
        for (text, error) in cases {
            assert_eq!(HartHeader::parse(text.as_bytes()), Err(error), "{text:?}");
        }
        for line in ["***", "", &upper_case, &short] {
            let text = format!("HART-1\n{KEY}\nBLAKE2b\n{line}\n");
            let found = HartHeader::parse(text.as_bytes());
            assert!(
                matches!(found, Err(HartError::Signature(_))),
                "{line:?}: {found:?}"
            );
        }
    }

    #[test]
    fn gives_up_on_an_endless_line() {
        let mut text = "HART-1\n".to_string();
        text.push_str(&"x".repeat(MAX_HEADER - text.len()));
        assert_eq!(HartHeader::parse(text.as_bytes()), Ok(None));
        text.push('x');
        assert_eq!(HartHeader::parse(text.as_bytes()), Err(HartError::TooLong));
    }
}
