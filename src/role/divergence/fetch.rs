//! A diverged artifact out of the local bucket into a file, so that it can be uploaded to the new primary.

use super::DivergedPackage;
use crate::cluster::LocalStore;
use crate::domain::ErrorCode;
use crate::package::{Checksum, Hasher};
use crate::replication::{PassError, RETIRED};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Where an artifact is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetched {
    Written(PathBuf),
    /// It was there already, byte for byte.
    Kept(PathBuf),
}

/// The file's name: the last part of its key, as `hab pkg upload` knows it.
pub fn file_name(package: &DivergedPackage) -> &str {
    package.key.rsplit('/').next().unwrap_or_default()
}

/// Under its key, or, where other bytes have taken its place by now, where these were laid aside. A file of other content
/// is never overwritten.
pub async fn fetch(
    store: &LocalStore,
    package: &DivergedPackage,
    directory: &Path,
) -> Result<Fetched, PassError> {
    let wanted = package.checksum.parse::<Checksum>().ok();
    let Some(wanted) = wanted.filter(|_| !package.key.is_empty()) else {
        return Err(lacking(package, "its row names no artifact"));
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
            // Somebody else made it meanwhile.
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => same(&path, wanted),
            Err(error) => Err(scratch(&path, error.error)),
        };
    }
    Err(lacking(
        package,
        "its bytes are in the local bucket neither under its key nor laid aside",
    ))
}

/// None: nothing lies there, or other bytes do.
async fn download(
    store: &LocalStore,
    key: &str,
    wanted: Checksum,
    directory: &Path,
) -> Result<Option<NamedTempFile>, PassError> {
    let Some(mut body) = store.reading().get(key).await? else {
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

fn same(path: &Path, wanted: Checksum) -> Result<Fetched, PassError> {
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
    Err(PassError::Unfit {
        check: ErrorCode::FileExists,
        text: format!("{} is there already, with other content", path.display()),
        next_step: "move it away, or give another directory".into(),
    })
}

fn scratch(path: &Path, source: std::io::Error) -> PassError {
    PassError::Scratch {
        what: path.display().to_string(),
        source,
    }
}

fn lacking(package: &DivergedPackage, why: &str) -> PassError {
    PassError::Unfit {
        check: ErrorCode::ArtifactLacking,
        text: format!("{} {}: {why}", package.ident, package.target),
        next_step: "look for the file where it was built".into(),
    }
}
