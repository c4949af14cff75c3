//! Public keys in Builder's form, and the verdicts on a signature.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::VerifyingKey;

use super::Checksum;
use super::hart::key_full_name;

/// The public half of an origin's signing key, with its name and revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: String,
    key: VerifyingKey,
}

/// Reasons why a text is not a public key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("the first line is not SIG-PUB-1")]
    Format,
    #[error("the second line is not the name of a key with its revision")]
    Name,
    #[error("the third line is not empty")]
    Separator,
    #[error("the fourth line is not an Ed25519 public key in base64")]
    Key,
    #[error("something follows the key")]
    Trailing,
}

/// The verdict on the signature of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature {
    Good,
    /// The key of this name is not available, so the file can be neither confirmed nor rejected.
    KeyUnknown(String),
    /// The signature was not made with the key of this name.
    Bad(String),
    /// The payload is not the signed one. This needs no key.
    PayloadDiffers,
}

impl PublicKey {
    /// Reads Builder's text form: `SIG-PUB-1`, the full name, an empty line, 32 bytes in base64.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let mut lines = text.lines();
        let mut next = || lines.next().unwrap_or_default();
        if next() != "SIG-PUB-1" {
            return Err(KeyError::Format);
        }
        let name = key_full_name(next().as_bytes()).ok_or(KeyError::Name)?;
        if !next().is_empty() {
            return Err(KeyError::Separator);
        }
        let bytes = STANDARD
            .decode(next().trim_end())
            .map_err(|_| KeyError::Key)?;
        let bytes = <[u8; 32]>::try_from(bytes).map_err(|_| KeyError::Key)?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| KeyError::Key)?;
        if lines.any(|line| !line.trim().is_empty()) {
            return Err(KeyError::Trailing);
        }
        Ok(Self {
            name: name.to_string(),
            key,
        })
    }

    /// Returns name and revision, such as `core-20200101000000`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether this key signed the hash.
    ///
    /// The check is strict: libsodium, with which Habitat signs and verifies, refuses keys and
    /// signature points of small order. The lax check accepts signatures that no Habitat client
    /// accepts.
    pub(super) fn signed(&self, hash: Checksum, signature: &[u8; 64]) -> bool {
        let signature = ed25519_dalek::Signature::from_bytes(signature);
        self.key
            .verify_strict(hash.to_string().as_bytes(), &signature)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::package::Hasher;
    use ed25519_dalek::{Signer, SigningKey};

    const NAME: &str = "core-20200101000000";

    fn text(key: &[u8]) -> String {
        format!("SIG-PUB-1\n{NAME}\n\n{}", STANDARD.encode(key))
    }

    #[test]
    fn reads_a_key_and_checks_what_it_signed() {
        let secret = SigningKey::from_bytes(&[3; 32]);
        let key = PublicKey::parse(&text(secret.verifying_key().as_bytes())).unwrap();
        assert_eq!(key.name(), NAME);
        let hash = Hasher::new().update(b"a").finalize();
        let signature = secret.sign(hash.to_string().as_bytes()).to_bytes();
        assert!(key.signed(hash, &signature));
        assert!(!key.signed(Hasher::new().update(b"b").finalize(), &signature));
        let mut changed = signature;
        changed[0] ^= 1;
        assert!(!key.signed(hash, &changed));
    }

    #[test]
    fn a_key_of_small_order_signs_nothing() {
        // The neutral point as key and as R, with S = 0: the lax check accepts this for every
        // message.
        let mut neutral = [0; 32];
        neutral[0] = 1;
        let mut signature = [0; 64];
        signature[0] = 1;
        let hash = Hasher::new().finalize();
        let lax = VerifyingKey::from_bytes(&neutral).unwrap();
        let lenient = ed25519_dalek::Verifier::verify(
            &lax,
            hash.to_string().as_bytes(),
            &ed25519_dalek::Signature::from_bytes(&signature),
        );
        assert!(
            lenient.is_ok(),
            "the example no longer shows the difference"
        );
        let key = PublicKey::parse(&text(&neutral)).unwrap();
        assert!(!key.signed(hash, &signature));
    }

    #[test]
    fn a_line_end_after_the_key_is_fine_and_nothing_else_is() {
        let good = text(SigningKey::from_bytes(&[3; 32]).verifying_key().as_bytes());
        assert!(PublicKey::parse(&format!("{good}\n")).is_ok());
        assert!(PublicKey::parse(&good.replace('\n', "\r\n")).is_ok());
        let cases = [
            (String::new(), KeyError::Format),
            (good.replace("PUB", "SEC"), KeyError::Format),
            (good.replace(NAME, "core"), KeyError::Name),
            (good.replace("\n\n", "\n"), KeyError::Separator),
            (text(&[3; 31]), KeyError::Key),
            (format!("{good}!"), KeyError::Key),
            (format!("{good}\nmore"), KeyError::Trailing),
        ];
        for (text, error) in cases {
            assert_eq!(PublicKey::parse(&text), Err(error), "{text:?}");
        }
    }
}
