//! A place of generations: a directory or a bucket, behind one interface.
//!
//! A file appears whole or not at all. A file that is there is not written again, except by
//! [`Place::overwrite`], which is for the few files that no generation names.

mod bucket;
mod directory;

use super::error;
use super::format::{self, File, hex};
use crate::cluster::LocalStore;
use crate::config::{ArchivePlace, ArchivePlan};
use crate::replication::ReplicationError;
use bucket::{BucketPlace, BucketReading, BucketWriting};
use bytes::Bytes;
use directory::{DirectoryPlace, DirectoryReading, DirectoryWriting};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

/// Maximum length of a document that is read whole.
const DOCUMENT_BYTES: u64 = 256 << 20;

#[derive(Clone)]
pub struct Place {
    name: String,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Directory(DirectoryPlace),
    Bucket(BucketPlace),
}

/// A failed request to a place, before it is told with the name of the place.
enum Fault {
    /// The place has no room.
    Full(String),
    Other(String),
}

/// A file of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub path: String,
    pub bytes: u64,
}

/// The result of storing a file that must be new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    New,
    /// Another file is there, and it stays.
    Occupied,
}

/// The result of removing a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removed {
    /// It is not there any more, or never was.
    Gone,
    /// The place keeps it, because of an object lock.
    Locked,
}

/// The identity of the file under a path, to overwrite exactly that file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tag(String);

impl Place {
    /// Opens a place. A directory must exist; a bucket is asked with the first request.
    pub fn open(plan: &ArchivePlan) -> Result<Place, ReplicationError> {
        let kind = match &plan.place {
            ArchivePlace::Directory(path) => DirectoryPlace::open(path).map(Kind::Directory),
            ArchivePlace::Bucket { s3, prefix } => BucketPlace::open(s3, prefix).map(Kind::Bucket),
        };
        match kind {
            Ok(kind) => Ok(Place {
                name: plan.name.clone(),
                kind,
            }),
            Err(fault) => Err(told(&plan.name, "opening it", fault)),
        }
    }

    /// Uses Builder's own bucket as a place: its keys are the paths.
    pub(super) fn local_bucket(store: LocalStore) -> Place {
        Place {
            name: "local bucket".into(),
            kind: Kind::Bucket(BucketPlace::whole(store)),
        }
    }

    /// Returns the name of the place in the configuration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the address for people: a path, or endpoint, bucket and prefix.
    pub fn address(&self) -> String {
        match &self.kind {
            Kind::Directory(place) => place.address(),
            Kind::Bucket(place) => place.address(),
        }
    }

    fn told(&self, doing: &str, fault: Fault) -> ReplicationError {
        told(&self.name, doing, fault)
    }

    /// Opens a file. None: there is no such file.
    pub(super) async fn read(&self, path: &str) -> Result<Option<Reading>, ReplicationError> {
        let opened = match &self.kind {
            Kind::Directory(place) => place.read(path).await.map(|r| r.map(Source::Directory)),
            Kind::Bucket(place) => place
                .read(path)
                .await
                .map(|r| r.map(|r| Source::Bucket(Box::new(r)))),
        };
        let doing = format!("reading {path}");
        let source = opened.map_err(|fault| self.told(&doing, fault))?;
        Ok(source.map(|source| Reading {
            source,
            place: self.name.clone(),
            doing,
        }))
    }

    /// Reads a document whole. None: there is no such file.
    pub(super) async fn document(&self, path: &str) -> Result<Option<Bytes>, ReplicationError> {
        let Some(mut reading) = self.read(path).await? else {
            return Ok(None);
        };
        if reading.bytes() > DOCUMENT_BYTES {
            let text = format!(
                "it has {} bytes, more than any document has",
                reading.bytes()
            );
            return Err(error::damaged(&self.name, path, &text));
        }
        let mut whole = Vec::with_capacity(reading.bytes() as usize);
        while let Some(bytes) = reading.next().await? {
            whole.extend_from_slice(&bytes);
        }
        Ok(Some(whole.into()))
    }

    /// Reads a JSON document of a format that this program knows. None: there is no such file.
    pub(super) async fn json<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<Option<T>, ReplicationError> {
        match self.document(path).await? {
            Some(text) => format::read(&self.name, path, &text).map(Some),
            None => Ok(None),
        }
    }

    /// Reads a document, and checks its length and its SHA-256.
    pub(super) async fn checked(&self, file: &File) -> Result<Bytes, ReplicationError> {
        let path = &file.path;
        let text = self
            .document(path)
            .await?
            .ok_or_else(|| error::damaged(&self.name, path, "it is not there"))?;
        let found = format::sha256(&text);
        if text.len() as u64 != file.bytes || found != file.sha256 {
            let text = format!(
                "expected {} bytes with SHA-256 {}, found {} bytes with {found}",
                file.bytes,
                file.sha256,
                text.len()
            );
            return Err(error::damaged(&self.name, path, &text));
        }
        Ok(text)
    }

    /// Reads a file, and returns its length and its SHA-256. None: there is no such file.
    pub(super) async fn sum(&self, path: &str) -> Result<Option<File>, ReplicationError> {
        let Some(mut reading) = self.read(path).await? else {
            return Ok(None);
        };
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        while let Some(chunk) = reading.next().await? {
            hash.update(&chunk);
            bytes += chunk.len() as u64;
        }
        Ok(Some(File {
            path: path.to_string(),
            bytes,
            sha256: hex(&hash.finalize()),
        }))
    }

    /// Returns the length of a file. None: there is no such file.
    pub(super) async fn length(&self, path: &str) -> Result<Option<u64>, ReplicationError> {
        let found = match &self.kind {
            Kind::Directory(place) => place.length(path).await,
            Kind::Bucket(place) => place.length(path).await,
        };
        found.map_err(|fault| self.told(&format!("looking for {path}"), fault))
    }

    /// Starts writing a file that nobody sees before [`Writing::finish`].
    pub(super) async fn write(&self, path: &str) -> Result<Writing, ReplicationError> {
        let doing = format!("writing {path}");
        let begun = match &self.kind {
            Kind::Directory(place) => place.write(path).await.map(Target::Directory),
            Kind::Bucket(place) => Ok(Target::Bucket(Box::new(place.write(path)))),
        };
        Ok(Writing {
            target: begun.map_err(|fault| self.told(&doing, fault))?,
            place: self.name.clone(),
            doing,
            sha256: Some(Sha256::new()),
            bytes: 0,
        })
    }

    /// Does the same for an artifact, which the caller hashes.
    pub(super) async fn write_artifact(&self, path: &str) -> Result<Writing, ReplicationError> {
        let writing = self.write(path).await?;
        Ok(Writing {
            sha256: None,
            ..writing
        })
    }

    /// Stores a whole document that must be new.
    pub(super) async fn put(&self, path: &str, text: Bytes) -> Result<Stored, ReplicationError> {
        let mut writing = self.write(path).await?;
        writing.add(text).await?;
        Ok(writing.finish().await?.1)
    }

    /// Reads a JSON document, and returns also the identity of the file.
    pub(super) async fn tagged<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<Option<(T, Tag)>, ReplicationError> {
        let tag = match &self.kind {
            Kind::Directory(place) => place.tag(path).await,
            Kind::Bucket(place) => place.tag(path).await,
        };
        let Some(tag) = tag.map_err(|fault| self.told(&format!("looking for {path}"), fault))?
        else {
            return Ok(None);
        };
        // A file that was replaced in between has another tag, and is not overwritten.
        Ok(self.json(path).await?.map(|document| (document, Tag(tag))))
    }

    /// Stores a document that no generation names. `tag`: the file that it replaces; None: there is
    /// none. False: another file is there by now.
    pub(super) async fn overwrite(
        &self,
        path: &str,
        document: &impl Serialize,
        tag: Option<&Tag>,
    ) -> Result<bool, ReplicationError> {
        let text = format::write(document);
        let tag = tag.map(|tag| tag.0.as_str());
        let written = match &self.kind {
            Kind::Directory(place) => place.overwrite(path, text, tag).await,
            Kind::Bucket(place) => place.overwrite(path, text, tag).await,
        };
        written.map_err(|fault| self.told(&format!("writing {path}"), fault))
    }

    /// Lists the files below a prefix that ends with `/`, in the order of their paths.
    pub(super) async fn list(&self, prefix: &str) -> Result<Vec<Found>, ReplicationError> {
        let found = match &self.kind {
            Kind::Directory(place) => place.list(prefix).await,
            Kind::Bucket(place) => place.list(prefix).await,
        };
        let mut found = found.map_err(|fault| self.told(&format!("listing {prefix}"), fault))?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Removes the files that killed processes were writing. Only the one writer of the archive may
    /// call it. A store removes parts of unfinished uploads by its own rules.
    pub(super) async fn clear_unfinished(&self) -> Result<(), ReplicationError> {
        match &self.kind {
            Kind::Directory(place) => {
                let cleared = place.clear_unfinished().await;
                cleared.map_err(|fault| self.told("removing unfinished files", fault))
            }
            Kind::Bucket(_) => Ok(()),
        }
    }

    /// Removes a file. It is no error if there is none.
    pub(super) async fn remove(&self, path: &str) -> Result<Removed, ReplicationError> {
        let removed = match &self.kind {
            Kind::Directory(place) => place.remove(path).await.map(|()| Removed::Gone),
            Kind::Bucket(place) => place.remove(path).await,
        };
        removed.map_err(|fault| self.told(&format!("removing {path}"), fault))
    }
}

fn told(place: &str, doing: &str, fault: Fault) -> ReplicationError {
    match fault {
        Fault::Full(text) => error::full(place, doing, &text),
        Fault::Other(text) => error::unreachable(place, doing, &text),
    }
}

/// A file that is being read.
pub(super) struct Reading {
    source: Source,
    place: String,
    doing: String,
}

enum Source {
    Directory(DirectoryReading),
    Bucket(Box<BucketReading>),
}

impl Reading {
    /// Returns the length of the file.
    pub(super) fn bytes(&self) -> u64 {
        match &self.source {
            Source::Directory(reading) => reading.bytes,
            Source::Bucket(reading) => reading.bytes(),
        }
    }

    /// Returns the next bytes. None: the whole file was read.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, ReplicationError> {
        let next = match &mut self.source {
            Source::Directory(reading) => reading.next().await,
            Source::Bucket(reading) => reading.next().await,
        };
        next.map_err(|fault| told(&self.place, &self.doing, fault))
    }
}

/// A file that is being written. If it is dropped before `finish`, it never was.
pub(super) struct Writing {
    target: Target,
    place: String,
    doing: String,
    /// None: the caller hashes the bytes itself.
    sha256: Option<Sha256>,
    bytes: u64,
}

enum Target {
    Directory(DirectoryWriting),
    Bucket(Box<BucketWriting>),
}

/// The sum of a written file. The hash of an artifact is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sum {
    pub bytes: u64,
    pub sha256: String,
}

impl Writing {
    pub(super) async fn add(&mut self, bytes: Bytes) -> Result<(), ReplicationError> {
        if let Some(sha256) = &mut self.sha256 {
            sha256.update(&bytes);
        }
        self.bytes += bytes.len() as u64;
        let added = match &mut self.target {
            Target::Directory(writing) => writing.add(bytes).await,
            Target::Bucket(writing) => writing.add(bytes).await,
        };
        added.map_err(|fault| told(&self.place, &self.doing, fault))
    }

    /// Makes the file visible, unless a file is there already.
    pub(super) async fn finish(self) -> Result<(Sum, Stored), ReplicationError> {
        let stored = match self.target {
            Target::Directory(writing) => writing.finish().await,
            Target::Bucket(writing) => writing.finish().await,
        };
        let stored = stored.map_err(|fault| told(&self.place, &self.doing, fault))?;
        let sum = Sum {
            bytes: self.bytes,
            sha256: self
                .sha256
                .map_or_else(String::new, |hash| hex(&hash.finalize())),
        };
        Ok((sum, stored))
    }
}
