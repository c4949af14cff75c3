//! The builder keys, with which Builder encrypts origins' secret keys, integrations and access
//! tokens. A spare without them has every row, but cannot use these.
//!
//! Builder seals to itself: sender and receiver are the same pair, whose public half follows from
//! the secret one. A ciphertext names the revision of the key that opens it.

use base64::prelude::{BASE64_STANDARD, Engine};
use crypto_box::aead::Aead;
use crypto_box::{SalsaBox, SecretKey};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const NAME: &str = "bldr-";
const SECRET_FORMAT: &str = "BOX-SEC-1";
const PUBLIC_FORMAT: &str = "BOX-PUB-1";
const BOX_FORMAT: &str = "BOX-1";
/// Prefix of an access token. No digit of base64, so other encoded texts do not begin with it.
const TOKEN_PREFIX: char = '_';

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuilderKeyError {
    #[error("cannot read the directory {}: {text}", path.display())]
    Directory { path: PathBuf, text: String },
    #[error("{} is no builder key: {text}", path.display())]
    Unusable { path: PathBuf, text: String },
    #[error("it was not sealed by a builder key")]
    NoBox,
    #[error("builder key bldr-{revision} is missing")]
    Absent { revision: String },
    #[error("builder key bldr-{revision} is not the key of that name that sealed it")]
    Wrong { revision: String },
}

/// The keys of one directory, by revision, which is the time at which they were made.
#[derive(Default)]
pub struct BuilderKeys(BTreeMap<String, Pair>);

#[derive(Default)]
struct Pair {
    secret: Option<Result<SecretKey, BuilderKeyError>>,
    public: Option<Result<[u8; 32], BuilderKeyError>>,
}

impl BuilderKeys {
    /// Reads the keys. A file that is no key affects only its own revision: the other keys may be
    /// the needed ones.
    pub fn read(directory: &Path) -> Result<BuilderKeys, BuilderKeyError> {
        let failed = |error: std::io::Error| BuilderKeyError::Directory {
            path: directory.to_path_buf(),
            text: error.to_string(),
        };
        let mut keys = BuilderKeys::default();
        for entry in std::fs::read_dir(directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Some((revision, is_secret)) = split(&name) else {
                continue;
            };
            let pair = keys.0.entry(revision.to_string()).or_default();
            if is_secret {
                let bytes = read_key(&path, SECRET_FORMAT, revision);
                pair.secret = Some(bytes.map(SecretKey::from_bytes));
            } else {
                pair.public = Some(read_key(&path, PUBLIC_FORMAT, revision));
            }
        }
        Ok(keys)
    }

    /// Returns the revisions of the usable keys, the newest last.
    pub fn revisions(&self) -> Vec<String> {
        let usable = |pair: &&Pair| matches!(pair.secret, Some(Ok(_)));
        let found = self.0.iter().filter(|(_, pair)| usable(pair));
        found.map(|(revision, _)| revision.clone()).collect()
    }

    /// Returns the other faults, in words. Builder does not need the public half since it derives
    /// it; older versions did.
    pub fn flaws(&self) -> Vec<String> {
        let mut flaws = Vec::new();
        for (revision, pair) in &self.0 {
            let half = format!("{NAME}{revision}");
            match (&pair.secret, &pair.public) {
                (Some(Err(error)), _) | (_, Some(Err(error))) => flaws.push(error.to_string()),
                (None, _) => flaws.push(format!("{half}.pub is there without its .box.key")),
                (Some(Ok(_)), None) => {
                    flaws.push(format!("{half}.box.key is there without its .pub"))
                }
                (Some(Ok(secret)), Some(Ok(public)))
                    if secret.public_key().as_bytes() != public =>
                {
                    flaws.push(format!("{half}.pub and {half}.box.key are of two pairs"));
                }
                _ => {}
            }
        }
        flaws
    }

    /// Opens a value that Builder has stored. Returns the revision of the key that opened it; the
    /// content is dropped unseen.
    pub fn open(&self, stored: &str) -> Result<String, BuilderKeyError> {
        let sealed = Sealed::parse(stored).ok_or(BuilderKeyError::NoBox)?;
        let revision = sealed.revision;
        let pair = self.0.get(&revision);
        let secret = match pair.and_then(|pair| pair.secret.as_ref()) {
            None => return Err(BuilderKeyError::Absent { revision }),
            Some(secret) => secret.as_ref().map_err(Clone::clone)?,
        };
        let to_itself = SalsaBox::new(&secret.public_key(), secret);
        match to_itself.decrypt(&sealed.nonce.into(), sealed.ciphertext.as_slice()) {
            Ok(_) => Ok(revision),
            Err(_) => Err(BuilderKeyError::Wrong { revision }),
        }
    }
}

/// Returns the revision, and whether it is the secret half.
fn split(file: &str) -> Option<(&str, bool)> {
    let rest = file.strip_prefix(NAME)?;
    let secret = rest
        .strip_suffix(".box.key")
        .map(|revision| (revision, true));
    let (revision, is_secret) =
        secret.or_else(|| rest.strip_suffix(".pub").map(|revision| (revision, false)))?;
    let is_time = revision.len() == 14 && revision.bytes().all(|b| b.is_ascii_digit());
    is_time.then_some((revision, is_secret))
}

/// Reads a key file of four lines: format, name with revision, an empty line, and the key in
/// base64.
fn read_key(path: &Path, format: &str, revision: &str) -> Result<[u8; 32], BuilderKeyError> {
    let unusable = |text: String| BuilderKeyError::Unusable {
        path: path.to_path_buf(),
        text,
    };
    let text = std::fs::read_to_string(path).map_err(|error| unusable(error.to_string()))?;
    let mut lines = text.lines().map(str::trim);
    if lines.next() != Some(format) {
        return Err(unusable(format!("its first line is not {format}")));
    }
    if lines.next() != Some(&format!("{NAME}{revision}")) {
        return Err(unusable(format!("it does not name {NAME}{revision}")));
    }
    let key = lines.find(|line| !line.is_empty()).unwrap_or_default();
    let bytes = BASE64_STANDARD.decode(key).ok();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| unusable("it has no 32 bytes in base64".into()))
}

/// Returns the revision of the key that would open a stored value; None: it is no sealed value.
pub fn sealed_by(stored: &str) -> Option<String> {
    Sealed::parse(stored).map(|sealed| sealed.revision)
}

struct Sealed {
    revision: String,
    nonce: [u8; 24],
    ciphertext: Vec<u8>,
}

impl Sealed {
    /// Parses five lines: format, sender, receiver, nonce and ciphertext. Tokens are encoded once
    /// more, and so are all values of older versions.
    fn parse(stored: &str) -> Option<Sealed> {
        let stored = stored.strip_prefix(TOKEN_PREFIX).unwrap_or(stored).trim();
        if stored.starts_with(BOX_FORMAT) {
            return Sealed::parse_lines(stored);
        }
        let decoded = BASE64_STANDARD.decode(stored).ok()?;
        Sealed::parse_lines(std::str::from_utf8(&decoded).ok()?)
    }

    fn parse_lines(text: &str) -> Option<Sealed> {
        let mut lines = text.lines().map(str::trim);
        if lines.next() != Some(BOX_FORMAT) {
            return None;
        }
        let receiver = lines.nth(1)?;
        let mut decoded = lines.map(|line| BASE64_STANDARD.decode(line).ok());
        Some(Sealed {
            revision: receiver.strip_prefix(NAME)?.to_string(),
            nonce: decoded.next()??.try_into().ok()?,
            ciphertext: decoded.next()??,
        })
    }
}

#[cfg(test)]
mod tests;
