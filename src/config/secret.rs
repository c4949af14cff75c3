//! Passwords and keys. They are never printed. They are read again before each use, so that they
//! can be changed without a restart.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::ConfigError;
use super::builder::BuilderApi;

/// Mode bits of a file for users other than the owner and the group.
const OTHERS_MODE: u32 = 0o007;

/// Maximum number of bytes of a secret. No password is longer, and a path to another file must not
/// fill the memory.
const MAX_BYTES: u64 = 64 * 1024;

/// A text that is shown only by [`Secret::expose`].
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The place of a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// The secret is in our own configuration.
    Inline(Secret),
    /// The secret is the only content of a file.
    File(PathBuf),
    /// The secret is in a key of builder-api's rendered configuration. The value is not copied,
    /// because Habitat renders the file again when the secret changes, and does not notify us.
    BuilderApi { file: PathBuf, key: String },
}

impl SecretSource {
    /// Reads the current secret. Errors name `key`, a key of our configuration.
    pub fn read(&self, key: &str) -> Result<Secret, ConfigError> {
        match self {
            Self::Inline(secret) => Ok(secret.clone()),
            Self::File(path) => read_file(key, path),
            Self::BuilderApi { file, key: api_key } => BuilderApi::read(file)?
                .text(api_key)
                .map(Secret::new)
                .ok_or_else(|| {
                    ConfigError::key(
                        key,
                        format!("{} does not hold {api_key} any more", file.display()),
                    )
                }),
        }
    }
}

fn read_file(key: &str, path: &Path) -> Result<Secret, ConfigError> {
    let mut bytes = Vec::new();
    open_private(key, path)?
        .take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(key, path, &error))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ConfigError::key(
            key,
            format!(
                "{} is longer than 64 KiB and cannot be a secret",
                path.display()
            ),
        ));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| ConfigError::key(key, format!("{} is not UTF-8 text", path.display())))?;
    // Drops one line end, as editors and `echo` write it. A second one may be meant.
    let text = text.strip_suffix('\n').map_or(text.as_str(), |line| {
        line.strip_suffix('\r').unwrap_or(line)
    });
    if text.is_empty() {
        return Err(ConfigError::key(
            key,
            format!("{} is empty", path.display()),
        ));
    }
    Ok(Secret::new(text))
}

/// Opens a file. Refuses it if users other than its owner and its group have access.
pub(super) fn open_private(key: &str, path: &Path) -> Result<File, ConfigError> {
    let file = open(key, path)?;
    let mode = file
        .metadata()
        .map_err(|error| unreadable(key, path, &error))?
        .permissions()
        .mode();
    if mode & OTHERS_MODE != 0 {
        let path = path.display();
        return Err(ConfigError::key(
            key,
            format!(
                "{path} is open to every user (mode {:04o}): chmod o= {path}",
                mode & 0o7777
            ),
        ));
    }
    Ok(file)
}

/// Opens an ordinary file, which proves that it can be read.
pub(super) fn open(key: &str, path: &Path) -> Result<File, ConfigError> {
    // The type is checked before the file is opened, because opening a pipe would wait for a
    // writer.
    let metadata = std::fs::metadata(path).map_err(|error| unreadable(key, path, &error))?;
    if !metadata.is_file() {
        return Err(ConfigError::key(
            key,
            format!("{} is not an ordinary file", path.display()),
        ));
    }
    File::open(path).map_err(|error| unreadable(key, path, &error))
}

fn unreadable(key: &str, path: &Path, error: &std::io::Error) -> ConfigError {
    ConfigError::key(key, format!("cannot read {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const KEY: &str = "peer.datastore.password_file";

    fn file(content: &[u8], mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    fn read(content: &[u8], mode: u32) -> Result<String, String> {
        let file = file(content, mode);
        let found = SecretSource::File(file.path().to_path_buf()).read(KEY);
        found
            .map(|secret| secret.expose().to_string())
            .map_err(|error| {
                let text = error.to_string();
                assert!(
                    text.starts_with(KEY) && text.contains(file.path().to_str().unwrap()),
                    "{text}"
                );
                text
            })
    }

    #[test]
    fn one_line_end_is_dropped_and_nothing_else() {
        assert_eq!(read(b"hunter2", 0o600), Ok("hunter2".to_string()));
        assert_eq!(read(b"hunter2\n", 0o640), Ok("hunter2".to_string()));
        assert_eq!(read(b"hunter2\r\n", 0o400), Ok("hunter2".to_string()));
        assert_eq!(read(b" hunter2 \n\n", 0o600), Ok(" hunter2 \n".to_string()));
    }

    #[test]
    fn refuses_what_cannot_be_a_secret_or_is_none_any_more() {
        assert!(read(b"", 0o600).unwrap_err().contains("is empty"));
        assert!(read(b"\n", 0o600).unwrap_err().contains("is empty"));
        assert!(read(b"\xff", 0o600).unwrap_err().contains("not UTF-8"));
        assert!(
            read(&[b'x'; 70_000], 0o600)
                .unwrap_err()
                .contains("longer than 64 KiB")
        );
        for mode in [0o604, 0o602, 0o641] {
            let error = read(b"hunter2", mode).unwrap_err();
            assert!(
                error.contains("chmod o= /") && error.contains(&format!("{mode:04o}")),
                "{error}"
            );
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn names_a_file_that_is_not_there_or_is_none() {
        let folder = tempfile::tempdir().unwrap();
        for (path, problem) in [
            (folder.path().join("none"), "cannot read"),
            (folder.path().to_path_buf(), "is not an ordinary file"),
        ] {
            let error = SecretSource::File(path.clone())
                .read(KEY)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(problem) && error.contains(path.to_str().unwrap()),
                "{error}"
            );
        }
    }

    #[test]
    fn is_read_anew_each_time() {
        let file = file(b"old", 0o600);
        let source = SecretSource::File(file.path().to_path_buf());
        assert_eq!(source.read(KEY).unwrap().expose(), "old");
        fs::write(file.path(), "new").unwrap();
        assert_eq!(source.read(KEY).unwrap().expose(), "new");
    }

    #[test]
    fn is_never_printed() {
        let source = SecretSource::Inline(Secret::new("hunter2"));
        assert_eq!(format!("{source:?}"), "Inline(***)");
        assert_eq!(source.read(KEY).unwrap().to_string(), "***");
        assert_eq!(source.read(KEY).unwrap().expose(), "hunter2");
    }
}
