//! BLAKE2b with 256 bits: the checksum that Builder records for every artifact, and the hash that
//! its signatures cover.

use std::fmt;
use std::str::FromStr;

/// Number of bytes of a checksum.
const LENGTH: usize = 32;

/// A BLAKE2b-256 hash, written as 64 lower-case hexadecimal digits.
///
/// `origin_packages.checksum` is the hash of the whole file, header included. The signature of a
/// `.hart` file covers another hash: the hash of the bytes after the header.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Checksum([u8; LENGTH]);

/// Error for a text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a checksum has 64 hexadecimal digits, this has {0}")]
pub struct ChecksumError(String);

impl Checksum {
    pub fn as_bytes(&self) -> &[u8; LENGTH] {
        &self.0
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({self})")
    }
}

impl FromStr for Checksum {
    type Err = ChecksumError;

    fn from_str(text: &str) -> Result<Self, ChecksumError> {
        let digits = text.as_bytes();
        if digits.len() != 2 * LENGTH {
            return Err(ChecksumError(format!("{} bytes", digits.len())));
        }
        let mut bytes = [0; LENGTH];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = hex_digit(pair[0])? << 4 | hex_digit(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

/// Returns the value of a digit. `u8::from_str_radix` would also accept a sign.
fn hex_digit(digit: u8) -> Result<u8, ChecksumError> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        b'A'..=b'F' => Ok(digit - b'A' + 10),
        other => Err(ChecksumError(format!("the byte 0x{other:02x}"))),
    }
}

/// Computes a [`Checksum`] of bytes that arrive in pieces.
#[derive(Clone, Debug)]
pub struct Hasher(blake2b_simd::State);

impl Hasher {
    pub fn new() -> Self {
        Self(blake2b_simd::Params::new().hash_length(LENGTH).to_state())
    }

    pub fn update(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(bytes);
        self
    }

    pub fn finalize(&self) -> Checksum {
        let mut bytes = [0; LENGTH];
        // Both have LENGTH bytes, because `new` sets that hash length.
        bytes.copy_from_slice(self.0.finalize().as_bytes());
        Checksum(bytes)
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Output of `printf abc | b2sum -l 256`.
    const ABC: &str = "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319";

    #[test]
    fn hashes_as_b2sum_does_whatever_the_pieces() {
        let nothing = Hasher::new().finalize();
        assert_eq!(
            nothing.to_string(),
            "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8"
        );
        assert_eq!(Hasher::new().update(b"abc").finalize().to_string(), ABC);
        let pieces = Hasher::new()
            .update(b"a")
            .update(b"")
            .update(b"bc")
            .finalize();
        assert_eq!(pieces.to_string(), ABC);
    }

    #[test]
    fn reads_what_it_writes_in_either_case() {
        let checksum: Checksum = ABC.parse().unwrap();
        assert_eq!(checksum.to_string(), ABC);
        assert_eq!(ABC.to_uppercase().parse::<Checksum>().unwrap(), checksum);
        assert_eq!(checksum.as_bytes()[..2], [0xbd, 0xdd]);
        assert_eq!(format!("{checksum:?}"), format!("Checksum({ABC})"));
    }

    #[test]
    fn refuses_everything_else() {
        let with_sign = format!("+d{}", &ABC[2..]);
        let with_letter = format!("{}g", &ABC[..63]);
        let two_byte_letter = format!("{}é", &ABC[..62]);
        let too_long = format!("{ABC}00");
        for bad in [
            "",
            &ABC[..63],
            &with_sign,
            &with_letter,
            &two_byte_letter,
            &too_long,
        ] {
            assert!(bad.parse::<Checksum>().is_err(), "{bad:?} was accepted");
        }
    }
}
