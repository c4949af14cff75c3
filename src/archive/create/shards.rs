//! Writes the lists of artifacts. A list is named by its hash, so one that has not changed is named
//! again and not written.

use super::Work;
use super::artifacts::{Copied, Shard};
use crate::archive::format::{Absent, File, ListFile, sha256, write_list};
use crate::archive::layout;
use crate::archive::place::Stored;
use crate::replication::ReplicationError;

/// The lists of a generation.
pub(super) struct Listing {
    pub lists: Vec<ListFile>,
    pub gone: Vec<Absent>,
    pub new_artifacts: u64,
    pub new_bytes: u64,
}

impl Work<'_> {
    pub(super) async fn write_lists(&self, copied: Copied) -> Result<Listing, ReplicationError> {
        let mut lists = Vec::with_capacity(copied.shards.len());
        for shard in &copied.shards {
            lists.push(self.list_of(shard).await?);
        }
        Ok(Listing {
            lists,
            gone: copied.gone,
            new_artifacts: copied.new_artifacts,
            new_bytes: copied.new_bytes,
        })
    }

    async fn list_of(&self, shard: &Shard) -> Result<ListFile, ReplicationError> {
        let before = self.before.as_ref().filter(|_| shard.is_as_before);
        let before =
            before.and_then(|before| before.lists.iter().find(|list| list.shard == shard.name));
        if let Some(before) = before {
            return Ok(before.clone());
        }
        let text = write_list(&shard.entries);
        let sha256 = sha256(&text);
        let file = File {
            path: layout::list(&sha256),
            bytes: text.len() as u64,
            sha256,
        };
        if self.place.put(&file.path, text.clone()).await? == Stored::Occupied
            && self.place.sum(&file.path).await?.as_ref() != Some(&file)
        {
            // The path names the hash, so these bytes are proved wrong.
            self.place.remove(&file.path).await?;
            self.place.put(&file.path, text.clone()).await?;
        }
        self.cache.keep(&file.sha256, &text);
        Ok(ListFile {
            shard: shard.name.clone(),
            artifacts: shard.entries.len() as u64,
            artifact_bytes: shard.entries.iter().map(|entry| entry.bytes).sum(),
            file,
        })
    }
}
