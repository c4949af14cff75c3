//! A bucket as a place of generations. A file that must be new is stored with `If-None-Match: *`.

use super::{Fault, Found, Removed, Stored};
use crate::cluster::{Completion, Download, Expected, LocalStore, StoreError, StoreFault, Upload};
use crate::config;
use bytes::{Bytes, BytesMut};

/// Bytes of a part, and of the largest object that is stored with one request. S3's minimum for a
/// part is 5 MiB; it allows 10,000 parts.
const PART_BYTES: usize = 16 << 20;

#[derive(Clone)]
pub(super) struct BucketPlace {
    store: LocalStore,
    prefix: String,
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        let text = format!("{}: {}: {}", error.endpoint, error.doing, error.text);
        match error.fault {
            StoreFault::Full => Fault::Full(text),
            _ => Fault::Other(text),
        }
    }
}

impl BucketPlace {
    pub(super) fn open(s3: &config::S3, prefix: &str) -> Result<Self, Fault> {
        Ok(BucketPlace {
            store: LocalStore::open(s3)?,
            prefix: prefix.to_string(),
        })
    }

    /// Uses a whole bucket.
    pub(super) fn whole(store: LocalStore) -> Self {
        BucketPlace {
            store,
            prefix: String::new(),
        }
    }

    pub(super) fn address(&self) -> String {
        let store = self.store.reading();
        format!("{}/{}/{}", store.endpoint(), store.bucket(), self.prefix)
    }

    fn key(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }

    pub(super) async fn read(&self, path: &str) -> Result<Option<BucketReading>, Fault> {
        let body = self.store.reading().get(&self.key(path)).await?;
        Ok(body.map(BucketReading))
    }

    pub(super) async fn length(&self, path: &str) -> Result<Option<u64>, Fault> {
        let found = self.store.reading().head(&self.key(path)).await?;
        Ok(found.map(|stored| stored.bytes))
    }

    pub(super) async fn tag(&self, path: &str) -> Result<Option<String>, Fault> {
        let found = self.store.reading().head(&self.key(path)).await?;
        Ok(found.map(|stored| stored.etag))
    }

    pub(super) fn write(&self, path: &str) -> BucketWriting {
        BucketWriting {
            place: self.clone(),
            key: self.key(path),
            upload: None,
            buffer: BytesMut::new(),
        }
    }

    pub(super) async fn overwrite(
        &self,
        path: &str,
        text: Bytes,
        tag: Option<&str>,
    ) -> Result<bool, Fault> {
        let expected = match tag {
            Some(etag) => Expected::Etag(etag.to_string()),
            None => Expected::Nothing,
        };
        match self.store.put(&self.key(path), text, &expected).await {
            Ok(_) => Ok(true),
            Err(error) if error.fault == StoreFault::Changed => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn list(&self, prefix: &str) -> Result<Vec<Found>, Fault> {
        let mut found = Vec::new();
        self.store
            .reading()
            .list(&self.key(prefix), async |page| {
                found.extend(page.into_iter().filter_map(|listed| {
                    let path = listed.key.strip_prefix(&self.prefix)?.to_string();
                    let bytes = listed.stored.bytes;
                    Some(Found { path, bytes })
                }));
                Ok(())
            })
            .await?;
        Ok(found)
    }

    /// Removes the version that is there. A plain deletion in a bucket that keeps versions would
    /// only hide it, even if it is locked.
    pub(super) async fn remove(&self, path: &str) -> Result<Removed, Fault> {
        let key = self.key(path);
        match self.store.reading().version(&key).await? {
            None => Ok(Removed::Gone),
            Some(None) => {
                self.store.delete(&key).await?;
                Ok(Removed::Gone)
            }
            Some(Some(version)) => match self.store.delete_version(&key, &version).await {
                Ok(()) => Ok(Removed::Gone),
                Err(error) if error.is_transient() => Err(error.into()),
                // Stores differ in their answers: AWS denies it, MinIO calls the request invalid.
                Err(error) => {
                    log::debug!("{error}; it stays");
                    Ok(Removed::Locked)
                }
            },
        }
    }
}

pub(super) struct BucketReading(Download);

impl BucketReading {
    pub(super) fn bytes(&self) -> u64 {
        self.0.stored.bytes
    }

    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        Ok(self.0.next().await?)
    }
}

pub(super) struct BucketWriting {
    place: BucketPlace,
    key: String,
    /// None: all bytes until now are in the buffer.
    upload: Option<Upload>,
    buffer: BytesMut,
}

impl BucketWriting {
    pub(super) async fn add(&mut self, bytes: Bytes) -> Result<(), Fault> {
        self.buffer.extend_from_slice(&bytes);
        while self.buffer.len() > PART_BYTES {
            let part = self.buffer.split_to(PART_BYTES).freeze();
            let upload = match &mut self.upload {
                Some(upload) => upload,
                None => self
                    .upload
                    .insert(self.place.store.start_upload(&self.key).await?),
            };
            upload.part(part).await?;
        }
        Ok(())
    }

    pub(super) async fn finish(self) -> Result<Stored, Fault> {
        let store = &self.place.store;
        let rest = self.buffer.freeze();
        let Some(mut upload) = self.upload else {
            return match store.put(&self.key, rest, &Expected::Nothing).await {
                Ok(_) => Ok(Stored::New),
                Err(error) if error.fault == StoreFault::Changed => Ok(Stored::Occupied),
                Err(error) => Err(error.into()),
            };
        };
        upload.part(rest).await?;
        match upload.complete(&Expected::Nothing).await {
            Ok(Completion::Confirmed(_)) => Ok(Stored::New),
            // The answer was lost: the file is read before it counts.
            Ok(Completion::Unproven(_)) => Ok(Stored::Occupied),
            Err(error) if error.fault == StoreFault::Changed => {
                upload.abort().await;
                Ok(Stored::Occupied)
            }
            Err(error) => {
                upload.abort().await;
                Err(error.into())
            }
        }
    }
}
