//! Collects all facts that a copy needs about an artifact, in one reading of its bytes.

use super::hart::MAX_HEADER;
use super::{Checksum, HartError, HartHeader, Hasher, PublicKey, Signature};

/// Takes a whole file in pieces, and keeps at most a header of it in memory.
#[derive(Debug)]
pub struct Inspector {
    whole: Hasher,
    bytes: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The first bytes of the file, at most one more than [`MAX_HEADER`].
    Header(Vec<u8>),
    Payload(HartHeader, Box<Hasher>),
    NotHart(HartError),
}

/// The facts found about a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// The checksum of the whole file, which Builder records.
    pub checksum: Checksum,
    pub bytes: u64,
    /// The facts of a `.hart` file, or the reason why the file is none. The checksum is right in
    /// both cases.
    pub hart: Result<HartFacts, HartError>,
}

/// The statements of the header, and the hash of the real content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HartFacts {
    /// Name and revision of the signing key.
    pub key_name: String,
    pub signature: [u8; 64],
    /// The hash that the signature covers.
    pub signed_hash: Checksum,
    /// The hash of the bytes after the header.
    pub payload_hash: Checksum,
}

impl Inspector {
    pub fn new() -> Self {
        Self {
            whole: Hasher::new(),
            bytes: 0,
            state: State::Header(Vec::new()),
        }
    }

    /// Takes the next bytes of the file.
    pub fn update(&mut self, chunk: &[u8]) {
        self.whole.update(chunk);
        self.bytes += chunk.len() as u64;
        match &mut self.state {
            State::Header(begun) => {
                if let Some(next) = read_header(begun, chunk) {
                    self.state = next;
                }
            }
            State::Payload(_, payload) => {
                payload.update(chunk);
            }
            State::NotHart(_) => {}
        }
    }

    pub fn finish(self) -> Inspection {
        let hart = match self.state {
            State::Header(_) => Err(HartError::Truncated(self.bytes)),
            State::NotHart(error) => Err(error),
            State::Payload(header, payload) => Ok(HartFacts {
                key_name: header.key_name,
                signature: header.signature,
                signed_hash: header.signed_hash,
                payload_hash: payload.finalize(),
            }),
        };
        Inspection {
            checksum: self.whole.finalize(),
            bytes: self.bytes,
            hart,
        }
    }
}

impl Default for Inspector {
    fn default() -> Self {
        Self::new()
    }
}

/// Adds to the first bytes of the file the bytes that a header may still need. Returns the next
/// state once the header is decided.
fn read_header(begun: &mut Vec<u8>, chunk: &[u8]) -> Option<State> {
    // With one byte more than the longest header, the parser decides in any case.
    let wanted = (MAX_HEADER + 1).saturating_sub(begun.len());
    let (first, rest) = chunk.split_at(wanted.min(chunk.len()));
    begun.extend_from_slice(first);
    match HartHeader::parse(begun) {
        Ok(None) => None,
        Ok(Some(header)) => {
            let mut payload = Hasher::new();
            payload.update(&begun[header.length..]).update(rest);
            Some(State::Payload(header, Box::new(payload)))
        }
        Err(error) => Some(State::NotHart(error)),
    }
}

impl HartFacts {
    /// Judges the signature. `key` is the key named by [`HartFacts::key_name`], if it is available;
    /// another key counts as none.
    pub fn verify(&self, key: Option<&PublicKey>) -> Signature {
        if self.payload_hash != self.signed_hash {
            return Signature::PayloadDiffers;
        }
        match key.filter(|key| key.name() == self.key_name) {
            None => Signature::KeyUnknown(self.key_name.clone()),
            Some(key) if key.signed(self.signed_hash, &self.signature) => Signature::Good,
            Some(_) => Signature::Bad(self.key_name.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use ed25519_dalek::{Signer, SigningKey};

    const NAME: &str = "core-20200101000000";

    fn secret() -> SigningKey {
        SigningKey::from_bytes(&[3; 32])
    }

    fn public(name: &str, secret: &SigningKey) -> PublicKey {
        let key = STANDARD.encode(secret.verifying_key().as_bytes());
        PublicKey::parse(&format!("SIG-PUB-1\n{name}\n\n{key}\n")).unwrap()
    }

    fn hart(payload: &[u8]) -> Vec<u8> {
        let hash = Hasher::new().update(payload).finalize().to_string();
        let mut combined = secret().sign(hash.as_bytes()).to_bytes().to_vec();
        combined.extend_from_slice(hash.as_bytes());
        let header = format!("HART-1\n{NAME}\nBLAKE2b\n{}\n\n", STANDARD.encode(combined));
        [header.as_bytes(), payload].concat()
    }

    fn inspect(file: &[u8], piece: usize) -> Inspection {
        let mut inspector = Inspector::new();
        for chunk in file.chunks(piece) {
            inspector.update(chunk);
        }
        inspector.finish()
    }

    #[test]
    fn finds_the_same_whatever_the_pieces() {
        let payload = vec![b'\n'; 10_000];
        let file = hart(&payload);
        for piece in [1, 7, 200, 4096, 4097, 20_000] {
            let found = inspect(&file, piece);
            assert_eq!(found.bytes, file.len() as u64);
            assert_eq!(found.checksum, Hasher::new().update(&file).finalize());
            let facts = found.hart.unwrap();
            assert_eq!(
                facts.payload_hash,
                Hasher::new().update(&payload).finalize()
            );
            assert_eq!(
                facts.verify(Some(&public(NAME, &secret()))),
                Signature::Good,
                "{piece}"
            );
        }
    }

    #[test]
    fn tells_the_verdicts_apart() {
        let facts = inspect(&hart(b"payload"), 64).hart.unwrap();
        let unknown = Signature::KeyUnknown(NAME.to_string());
        assert_eq!(facts.verify(None), unknown);
        let older = public("core-20190101000000", &secret());
        assert_eq!(facts.verify(Some(&older)), unknown);
        let other = public(NAME, &SigningKey::from_bytes(&[4; 32]));
        assert_eq!(facts.verify(Some(&other)), Signature::Bad(NAME.to_string()));

        let mut damaged = hart(b"payload");
        *damaged.last_mut().unwrap() ^= 1;
        let facts = inspect(&damaged, 64).hart.unwrap();
        assert_eq!(facts.verify(None), Signature::PayloadDiffers);
        assert_eq!(
            facts.verify(Some(&public(NAME, &secret()))),
            Signature::PayloadDiffers
        );
    }

    #[test]
    fn another_kind_of_file_still_has_a_checksum() {
        let cases = [
            (b"".to_vec(), HartError::Truncated(0)),
            (b"HART-1\ncore".to_vec(), HartError::Truncated(11)),
            (b"no hart file".to_vec(), HartError::Format),
            (
                [b"HART-1\n".to_vec(), vec![b'x'; 5000]].concat(),
                HartError::TooLong,
            ),
        ];
        for (file, error) in cases {
            let found = inspect(&file, 1000);
            assert_eq!(found.hart, Err(error));
            assert_eq!(found.checksum, Hasher::new().update(&file).finalize());
            assert_eq!(found.bytes, file.len() as u64);
        }
    }

    #[test]
    fn keeps_no_more_than_a_header_in_memory() {
        let mut inspector = Inspector::new();
        inspector.update(b"HART-1\n");
        inspector.update(&vec![b'x'; 1_000_000]);
        assert!(matches!(
            inspector.state,
            State::NotHart(HartError::TooLong)
        ));
        let mut begun = Vec::new();
        read_header(
            &mut begun,
            &[b"HART-1\n".to_vec(), vec![b'x'; 1_000_000]].concat(),
        );
        assert_eq!(begun.len(), MAX_HEADER + 1);
    }
}
