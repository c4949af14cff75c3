//! The JSON documents of an archive, as `docs/archive-format.md` describes them.
//!
//! A reader refuses a document of a newer format, and does not guess.

use super::error::{self, damaged};
use super::layout;
use crate::package::Checksum;
use crate::replication::ReplicationError;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// The format that this program writes, and the newest that it reads.
pub(super) const FORMAT: u32 = 1;

/// The head of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub format: u32,
    pub created: DateTime<Utc>,
    pub made_by: String,
    /// Ids of the promotions of the line to which all generations belong, the oldest first. The
    /// first one names the server on which the line began.
    pub lineage: Vec<String>,
}

/// The one cluster that writes into an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Writer {
    pub format: u32,
    /// Id of the cluster; for a cluster without our state, `server-` and the system id.
    pub cluster: String,
    pub site: String,
    pub epoch: i64,
    pub since: DateTime<Utc>,
}

/// A file of the archive with its length and its SHA-256.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct File {
    pub path: String,
    pub bytes: u64,
    pub sha256: String,
}

/// A list of artifacts, and the sum of the artifacts in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListFile {
    /// First two digits of the MD5 of `IDENT/TARGET` of all packages in it.
    pub shard: String,
    #[serde(flatten)]
    pub file: File,
    pub artifacts: u64,
    pub artifact_bytes: u64,
}

/// A line of a list: one artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Builder's key, under which the artifact is restored.
    pub key: String,
    /// BLAKE2b-256, as Builder's row has it.
    pub checksum: String,
    pub bytes: u64,
    /// The file of the archive.
    pub path: String,
}

/// An artifact that a row names and the generation does not have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Absent {
    /// Builder's key; where the row names no possible artifact, ident and target.
    pub key: String,
    pub checksum: String,
    pub reason: String,
}

/// The point of the primary's history at which a generation stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    pub lsn: String,
    pub commit_time: DateTime<Utc>,
    pub system_id: String,
    pub timeline: i32,
}

/// The server that was dumped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub cluster: String,
    pub site: String,
    /// `spare`, `primary`, or `none` where the cluster has no role.
    pub role: String,
    pub epoch: i64,
    pub system_id: String,
    pub server_version: String,
    /// Version of the program that made the dump.
    pub pg_dump: String,
    /// The database's row of `pg_database`, as JSON: encoding and locale.
    pub database: serde_json::Value,
    pub encoding: String,
    pub database_bytes: u64,
    /// Counts whatever the server writes: equal values mean that nothing was committed.
    pub state: String,
}

/// A generation: the whole Builder at one point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub name: String,
    pub made_by: String,
    /// Times at which the making began and ended.
    pub started: DateTime<Utc>,
    pub finished: DateTime<Utc>,
    /// None: the cluster had no recovery point, because nobody replicates to it.
    pub point: Option<Point>,
    /// Time to which the generation belongs: the point's, otherwise that of the snapshot.
    pub time: DateTime<Utc>,
    /// True: each row has its artifact, except those in `absent`, which the primary did not have
    /// either. False: packages may have been deleted while the artifacts were copied.
    pub joint: bool,
    pub source: Source,
    pub lineage: Vec<String>,
    pub dump: File,
    pub lists: Vec<ListFile>,
    pub packages: u64,
    pub artifacts: u64,
    pub artifact_bytes: u64,
    /// Missing or damaged on the primary.
    pub absent: Vec<Absent>,
    /// Deleted between the snapshot and the copy.
    pub gone_meanwhile: Vec<Absent>,
    /// Names of the builder keys that sealed rows of the database. The generation has no keys.
    pub builder_keys: Vec<String>,
}

/// A generation that no prune removes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    pub format: u32,
    pub reason: String,
    pub since: DateTime<Utc>,
}

/// Files that may be removed if no generation names them any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Doomed {
    pub format: u32,
    pub since: Option<DateTime<Utc>>,
    /// The newest generation at that time; empty: there was none.
    pub newest: String,
    /// The paths of artifacts, by their shard; under an empty name those of dumps and lists.
    pub files: ShardedPaths,
}

/// Paths by shard, so that only the lists of these shards are read to find out who names a path.
pub(super) type ShardedPaths = BTreeMap<String, BTreeSet<String>>;

impl Pin {
    /// Returns the pin of a file that cannot be read.
    pub(super) fn unreadable(error: &ReplicationError) -> Pin {
        Pin {
            format: FORMAT,
            reason: error.to_string(),
            since: DateTime::UNIX_EPOCH,
        }
    }
}

impl Manifest {
    /// Returns every file that the generation needs beside the artifacts.
    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        let lists = self.lists.iter().map(|list| &list.file);
        std::iter::once(&self.dump).chain(lists)
    }

    fn is_sound(&self) -> bool {
        layout::is_generation(&self.name) && self.files().all(|file| layout::is_path(&file.path))
    }
}

/// Returns a document as it is stored.
pub(super) fn write(document: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec_pretty(document).expect("our documents are JSON");
    text.push(b'\n');
    text.into()
}

/// Reads a document. `place` and `path` are for the error.
pub(super) fn read<T: DeserializeOwned>(
    place: &str,
    path: &str,
    text: &[u8],
) -> Result<T, ReplicationError> {
    #[derive(Deserialize)]
    struct OfFormat {
        format: u32,
    }
    let broken =
        |e: serde_json::Error| damaged(place, path, &format!("it is no such document: {e}"));
    let OfFormat { format } = serde_json::from_slice(text).map_err(broken)?;
    if format > FORMAT {
        return Err(error::newer(place, path, format));
    }
    serde_json::from_slice(text).map_err(broken)
}

/// Reads a manifest that must be of this generation.
pub(super) fn read_manifest(
    place: &str,
    name: &str,
    text: &[u8],
) -> Result<Manifest, ReplicationError> {
    let path = layout::manifest(name);
    let manifest: Manifest = read(place, &path, text)?;
    if manifest.name != name || !manifest.is_sound() {
        let text = format!(
            "it is the manifest of generation {:?}, or names a path outside of the archive",
            manifest.name
        );
        return Err(damaged(place, &path, &text));
    }
    Ok(manifest)
}

/// Returns a list as it is stored: one line for each artifact.
pub(super) fn write_list(entries: &[Entry]) -> Bytes {
    let mut text = Vec::new();
    for entry in entries {
        serde_json::to_writer(&mut text, entry).expect("our documents are JSON");
        text.push(b'\n');
    }
    text.into()
}

/// Reads a list whose hash was checked.
pub(super) fn read_list(
    place: &str,
    path: &str,
    text: &[u8],
) -> Result<Vec<Entry>, ReplicationError> {
    let lines = text
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty());
    lines
        .map(|line| {
            let entry: Entry = serde_json::from_slice(line)
                .map_err(|e| damaged(place, path, &format!("a line is no artifact: {e}")))?;
            let sound = layout::is_path(&entry.path)
                && layout::is_path(&entry.key)
                && entry.checksum.parse::<Checksum>().is_ok();
            match sound {
                true => Ok(entry),
                false => Err(damaged(
                    place,
                    path,
                    &format!("a line names no possible artifact: {:?}", entry.key),
                )),
            }
        })
        .collect()
}

/// Returns the SHA-256 of bytes, as 64 hexadecimal digits.
pub(super) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
