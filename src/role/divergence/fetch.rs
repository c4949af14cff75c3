//! Copies a diverged artifact from the local bucket into a file, so that it can be uploaded to the
//! new primary.

use crate::cluster::{DivergedPackage, Store};
use crate::domain::ErrorCode;
use crate::package::{Checksum, Hasher};
use crate::replication::{RETIRED, ReplicationError};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The place of a fetched artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetched {
    Written(PathBuf),
    /// The file existed already, with the same bytes.
    Kept(PathBuf),
}

/// Returns the name of the file: the last part of the key, as `hab pkg upload` expects it.
pub fn file_name(package: &DivergedPackage) -> &str {
    package.key.rsplit('/').next().unwrap_or_default()
}

/// Fetches the artifact under its key, or from the place for replaced bytes if the key has other
/// bytes now. A file with other content is never overwritten.
pub async fn fetch(
    store: &Store,
    package: &DivergedPackage,
    directory: &Path,
) -> Result<Fetched, ReplicationError> {
    let wanted = package.checksum.parse::<Checksum>().ok();
    let Some(wanted) = wanted.filter(|_| !package.key.is_empty()) else {
        return Err(artifact_missing(package, "its row names no artifact"));
    };
    let path = directory.join(file_name(package));
    if path.exists() {
        return same(&path, wanted);
    }
    for key in [package.key.clone(), format!("{RETIRED}{wanted}")] {
        let Some(file) = download(store, &key, wanted, directory).await? else {
            continue;
        };
        return match file.persist_noclobber(&path) {
            Ok(_) => Ok(Fetched::Written(path)),
            // Another process made the file in between.
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => same(&path, wanted),
            Err(error) => Err(scratch(&path, error.error)),
        };
    }
    Err(artifact_missing(
        package,
        "the local bucket has its bytes neither under its key nor among the replaced bytes",
    ))
}

/// Downloads the object. None: the key has no object, or one with other bytes.
async fn download(
    store: &Store,
    key: &str,
    wanted: Checksum,
    directory: &Path,
) -> Result<Option<NamedTempFile>, ReplicationError> {
    let Some(mut body) = store.get(key).await? else {
        return Ok(None);
    };
    let failed = |source| scratch(directory, source);
    let mut file = NamedTempFile::with_prefix_in(".warm-spare-", directory).map_err(failed)?;
    let mut hasher = Hasher::new();
    while let Some(bytes) = body.next().await? {
        hasher.update(&bytes);
        file.write_all(&bytes).map_err(failed)?;
    }
    if hasher.finalize() != wanted {
        return Ok(None);
    }
    file.as_file().sync_all().map_err(failed)?;
    Ok(Some(file))
}

fn same(path: &Path, wanted: Checksum) -> Result<Fetched, ReplicationError> {
    let failed = |source| scratch(path, source);
    let mut file = File::open(path).map_err(failed)?;
    let (mut hasher, mut chunk) = (Hasher::new(), vec![0; 64 << 10]);
    loop {
        match file.read(&mut chunk).map_err(failed)? {
            0 => break,
            read => hasher.update(&chunk[..read]),
        };
    }
    if hasher.finalize() == wanted {
        return Ok(Fetched::Kept(path.to_path_buf()));
    }
    Err(ReplicationError::Precondition {
        check: ErrorCode::FileExists,
        text: format!("{} exists already, with other content", path.display()),
        next_step: "move the file away, or choose another directory".into(),
    })
}

fn scratch(path: &Path, source: std::io::Error) -> ReplicationError {
    ReplicationError::Scratch {
        what: path.display().to_string(),
        source,
    }
}

fn artifact_missing(package: &DivergedPackage, why: &str) -> ReplicationError {
    ReplicationError::Precondition {
        check: ErrorCode::ArtifactLacking,
        text: format!("{} {}: {why}", package.ident, package.target),
        next_step: "look for the file where it was built".into(),
    }
}
