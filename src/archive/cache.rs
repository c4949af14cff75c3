//! Copies of the lists of artifacts on this machine, so that a new generation reads nothing that it
//! knows. A copy that is missing or wrong is read from the archive again.

use super::format::{Entry, File, read_list, sha256};
use super::place::Place;
use crate::config::write_whole;
use crate::replication::ReplicationError;
use bytes::Bytes;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// The copies of one place's lists. Without a directory nothing is kept.
pub(super) struct Cache(Option<PathBuf>);

impl Cache {
    /// Uses a folder of the data directory. A folder that cannot be made is no failure: the lists
    /// are in the archive.
    pub(super) fn of(data: Option<&Path>, place: &Place) -> Cache {
        let folder = data.map(|data| data.join("archive").join(place.name()));
        let made = folder.filter(|folder| match std::fs::create_dir_all(folder) {
            Ok(()) => true,
            Err(error) => {
                log::debug!(
                    "{}: {error}; lists are read from the archive",
                    folder.display()
                );
                false
            }
        });
        Cache(made)
    }

    fn at(&self, sha256: &str) -> Option<PathBuf> {
        let is_name = sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit());
        let folder = self.0.as_ref().filter(|_| is_name)?;
        Some(folder.join(sha256))
    }

    /// Returns the lines of a list.
    pub(super) async fn list(
        &self,
        place: &Place,
        file: &File,
    ) -> Result<Vec<Entry>, ReplicationError> {
        if let Some(entries) = self.kept(place, file).await {
            return Ok(entries);
        }
        let text = place.checked(file).await?;
        self.keep(&file.sha256, &text);
        read_list(place.name(), &file.path, &text)
    }

    /// Returns the lines of the copy, if it is right. It is read apart, because the caller's thread
    /// serves other tasks.
    async fn kept(&self, place: &Place, file: &File) -> Option<Vec<Entry>> {
        let path = self.at(&file.sha256)?;
        let (place, file) = (place.name().to_string(), file.clone());
        let read = tokio::task::spawn_blocking(move || {
            let text = std::fs::read(path)
                .ok()
                .filter(|text| sha256(text) == file.sha256)?;
            read_list(&place, &file.path, &text).ok()
        });
        read.await.expect("reading neither panics nor is cancelled")
    }

    pub(super) fn keep(&self, sha256: &str, text: &Bytes) {
        if let Some(path) = self.at(sha256)
            && let Err(error) = write_whole(&path, text)
        {
            log::debug!("{}: {error}", path.display());
        }
    }

    /// Removes the copies of all other lists.
    pub(super) fn keep_only(&self, lists: &HashSet<&str>) {
        let entries = self
            .0
            .iter()
            .filter_map(|folder| std::fs::read_dir(folder).ok());
        for entry in entries.flatten().flatten() {
            let name = entry.file_name();
            if !name.to_str().is_some_and(|name| lists.contains(name)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}
