//! A directory as a place of generations.
//!
//! A file is written under `.tmp/` and linked to its name when it is whole and on the disk. A link
//! fails where a file is there already.

use super::{Fault, Found, Stored};
use crate::cluster::unpredictable;
use bytes::{Bytes, BytesMut};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Folder of files that are being written.
const UNFINISHED: &str = ".tmp";
const CHUNK_BYTES: usize = 1 << 20;

#[derive(Clone)]
pub(super) struct DirectoryPlace(PathBuf);

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                Fault::Full(error.to_string())
            }
            _ => Fault::Other(error.to_string()),
        }
    }
}

/// Returns None where there is no file.
fn if_there<T>(found: io::Result<T>) -> Result<Option<T>, Fault> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl DirectoryPlace {
    pub(super) fn open(path: &Path) -> Result<Self, Fault> {
        // A directory that is made here would hide that a disk is not mounted.
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => Ok(DirectoryPlace(path.to_path_buf())),
            Ok(_) => Err(Fault::Other(format!("{} is no directory", path.display()))),
            Err(error) => Err(Fault::Other(format!("{}: {error}", path.display()))),
        }
    }

    pub(super) fn address(&self) -> String {
        self.0.display().to_string()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    pub(super) async fn read(&self, path: &str) -> Result<Option<DirectoryReading>, Fault> {
        let Some(file) = if_there(File::open(self.at(path)).await)? else {
            return Ok(None);
        };
        let bytes = file.metadata().await?.len();
        Ok(Some(DirectoryReading { file, bytes }))
    }

    pub(super) async fn length(&self, path: &str) -> Result<Option<u64>, Fault> {
        let found = if_there(fs::metadata(self.at(path)).await)?;
        Ok(found
            .filter(|found| found.is_file())
            .map(|found| found.len()))
    }

    pub(super) async fn tag(&self, path: &str) -> Result<Option<String>, Fault> {
        let found = if_there(fs::metadata(self.at(path)).await)?;
        Ok(found.map(|found| format!("{}-{}-{}", found.ino(), found.mtime(), found.mtime_nsec())))
    }

    pub(super) async fn write(&self, path: &str) -> Result<DirectoryWriting, Fault> {
        let folder = self.0.join(UNFINISHED);
        fs::create_dir_all(&folder).await?;
        let name = format!("{}-{:016x}", std::process::id(), unpredictable());
        let unfinished = folder.join(name);
        let file = File::options()
            .write(true)
            .create_new(true)
            .open(&unfinished)
            .await?;
        Ok(DirectoryWriting {
            file,
            unfinished: Unfinished(unfinished),
            target: self.at(path),
        })
    }

    pub(super) async fn overwrite(
        &self,
        path: &str,
        text: Bytes,
        tag: Option<&str>,
    ) -> Result<bool, Fault> {
        let mut writing = self.write(path).await?;
        writing.add(text).await?;
        let Some(tag) = tag else {
            return Ok(writing.finish().await? == Stored::New);
        };
        if self.tag(path).await?.as_deref() != Some(tag) {
            return Ok(false);
        }
        writing.replace().await?;
        Ok(true)
    }

    pub(super) async fn list(&self, prefix: &str) -> Result<Vec<Found>, Fault> {
        let root = self.0.clone();
        let prefix = prefix.to_string();
        let walked = tokio::task::spawn_blocking(move || {
            let mut found = Vec::new();
            walk(&root, &prefix, &mut found).map(|()| found)
        });
        Ok(walked
            .await
            .expect("a walk neither panics nor is cancelled")?)
    }

    /// Removes the files that killed processes were writing. Only for the one writer.
    pub(super) async fn clear_unfinished(&self) -> Result<(), Fault> {
        let Some(mut entries) = if_there(fs::read_dir(self.0.join(UNFINISHED)).await)? else {
            return Ok(());
        };
        while let Some(entry) = entries.next_entry().await? {
            if_there(fs::remove_file(entry.path()).await)?;
        }
        Ok(())
    }

    pub(super) async fn remove(&self, path: &str) -> Result<(), Fault> {
        let target = self.at(path);
        if_there(fs::remove_file(&target).await)?;
        // Folders that have become empty go too.
        let mut folder = target.parent();
        while let Some(empty) = folder.filter(|folder| *folder != self.0) {
            if fs::remove_dir(empty).await.is_err() {
                break;
            }
            folder = empty.parent();
        }
        Ok(())
    }
}

/// Adds the files below a prefix that ends with `/`.
fn walk(root: &Path, prefix: &str, found: &mut Vec<Found>) -> io::Result<()> {
    let entries = match std::fs::read_dir(root.join(prefix)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        // No file of an archive has another name.
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = format!("{prefix}{name}");
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if metadata.is_dir() {
            walk(root, &format!("{path}/"), found)?;
        } else if metadata.is_file() {
            let bytes = metadata.len();
            found.push(Found { path, bytes });
        }
    }
    Ok(())
}

pub(super) struct DirectoryReading {
    file: File,
    pub(super) bytes: u64,
}

impl DirectoryReading {
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
        Ok(match self.file.read_buf(&mut chunk).await? {
            0 => None,
            _ => Some(chunk.freeze()),
        })
    }
}

pub(super) struct DirectoryWriting {
    file: File,
    unfinished: Unfinished,
    target: PathBuf,
}

/// A file under `.tmp/`, which is removed with this value.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // After a rename it is not there any more.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl DirectoryWriting {
    pub(super) async fn add(&mut self, bytes: Bytes) -> Result<(), Fault> {
        Ok(self.file.write_all(&bytes).await?)
    }

    pub(super) async fn finish(mut self) -> Result<Stored, Fault> {
        self.sync_file().await?;
        match fs::hard_link(&self.unfinished.0, &self.target).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(Stored::Occupied),
            Err(error) => return Err(error.into()),
        }
        self.sync_folders().await?;
        Ok(Stored::New)
    }

    async fn replace(mut self) -> Result<(), Fault> {
        self.sync_file().await?;
        fs::rename(&self.unfinished.0, &self.target).await?;
        self.sync_folders().await
    }

    async fn sync_file(&mut self) -> Result<(), Fault> {
        self.file.flush().await?;
        self.file.sync_all().await?;
        if let Some(folder) = self.target.parent() {
            fs::create_dir_all(folder).await?;
        }
        Ok(())
    }

    /// Writes the entries of the folders to the disk, so that a file that was told is there after a
    /// loss of power.
    async fn sync_folders(&self) -> Result<(), Fault> {
        let mut folder = self.target.parent();
        for _ in 0..2 {
            let Some(path) = folder else { break };
            File::open(path).await?.sync_all().await?;
            folder = path.parent();
        }
        Ok(())
    }
}
