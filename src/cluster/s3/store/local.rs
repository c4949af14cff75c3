//! The local bucket: reading as a [`Store`] does, and writing, deleting, uploads in parts.

use super::{EXPECTED, Store, object, unquote};
use crate::cluster::s3::store::object::{Expected, Stored};
use crate::cluster::s3::store_error::{StoreError, StoreFault, fault_of_body};
use crate::config;
use crate::domain::Side;
use bytes::Bytes;
use minio::s3::error::Error;
use minio::s3::multimap_ext::Multimap;
use minio::s3::response_traits::HasS3Fields;
use minio::s3::segmented_bytes::SegmentedBytes;
use minio::s3::types::{PartInfo, S3Api, UploadId};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The local bucket: reading as [`Store`] does, and writing.
#[derive(Clone)]
pub struct LocalStore {
    store: Store,
    /// Prefix of our own objects.
    marks: String,
}

impl LocalStore {
    pub fn open(to: &config::S3) -> Result<LocalStore, StoreError> {
        Ok(LocalStore {
            store: Store::open(Side::Local, to)?,
            marks: ".warm-spare/".into(),
        })
    }

    /// Puts our own objects, which are no artifacts, under another prefix.
    pub(in crate::cluster) fn with_marks(self, prefix: &str) -> LocalStore {
        LocalStore {
            marks: prefix.into(),
            ..self
        }
    }

    /// Returns the key of an object of our own.
    pub fn mark(&self, name: &str) -> String {
        format!("{}{name}", self.marks)
    }

    pub fn with_limits(self, patience: Duration, tries: usize) -> LocalStore {
        LocalStore {
            store: self.store.with_limits(patience, tries),
            ..self
        }
    }

    pub fn reading(&self) -> &Store {
        &self.store
    }

    /// Sends a request that changes the bucket; "no such key" is not a valid answer to it.
    async fn ask<T, F>(
        &self,
        doing: &str,
        bytes: usize,
        request: impl Fn() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let store = &self.store;
        store
            .persist(doing, || async {
                let answer = store.once_sending(doing, bytes, request()).await?;
                answer.ok_or_else(|| self.strange(doing))
            })
            .await
    }

    /// Stores a whole small object. The server checks the body against its SHA-256, which the
    /// request's signature covers.
    pub async fn put(
        &self,
        key: &str,
        body: Bytes,
        expected: &Expected,
    ) -> Result<Stored, StoreError> {
        let written = self.put_version(key, body, expected).await?;
        Ok(written.stored)
    }

    /// Does the same, and returns the version that the object became.
    pub async fn put_version(
        &self,
        key: &str,
        body: Bytes,
        expected: &Expected,
    ) -> Result<Written, StoreError> {
        let store = &self.store;
        let request = || {
            EXPECTED.scope(expected.clone(), async {
                let data = SegmentedBytes::from(body.clone());
                let put = store
                    .client
                    .put_object(store.bucket.clone(), object(key)?, data)?;
                put.build().send().await
            })
        };
        let doing = format!("writing {key}");
        let answer = self.ask(&doing, body.len(), request).await?;
        let version = answer.headers().get("x-amz-version-id");
        let version = version.and_then(|version| version.to_str().ok());
        Ok(Written {
            stored: Stored {
                bytes: body.len() as u64,
                etag: store.etag_of(&doing, answer.headers())?,
            },
            version: version.map(str::to_string),
        })
    }

    /// Sends one request to store a small object, and does not repeat it: the writer must read the
    /// object before each conditional write. None: the server says that there is no such key.
    pub(in crate::cluster) async fn put_once(
        &self,
        key: &str,
        body: Bytes,
        expected: &Expected,
    ) -> Result<Option<Stored>, StoreError> {
        let store = &self.store;
        let doing = format!("writing {key}");
        let bytes = body.len() as u64;
        let request = EXPECTED.scope(expected.clone(), async {
            let data = SegmentedBytes::from(body);
            let put = store
                .client
                .put_object(store.bucket.clone(), object(key)?, data)?;
            put.build().send().await
        });
        let Some(answer) = Box::pin(store.once(&doing, request)).await? else {
            return Ok(None);
        };
        let etag = store.etag_of(&doing, answer.headers())?;
        Ok(Some(Stored { bytes, etag }))
    }

    pub async fn start_upload(&self, key: &str) -> Result<Upload, StoreError> {
        let store = &self.store;
        let doing = format!("starting the upload of {key}");
        let request = || async {
            let create = store
                .client
                .create_multipart_upload(store.bucket.clone(), object(key)?)?;
            create.build().send().await
        };
        let answer = self.ask(&doing, 0, request).await?;
        let id = answer
            .upload_id()
            .await
            .map_err(|e| store.unexpected(&doing, &e))?;
        Ok(Upload {
            store: self.clone(),
            key: key.to_string(),
            id,
            parts: Vec::new(),
            bytes: 0,
            ended: AtomicBool::new(false),
        })
    }

    /// Deletes an object. It is no error if the object does not exist.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.delete_as_found(key, &Expected::Anything)
            .await
            .map(|_| ())
    }

    /// Deletes only that version, for good. In a bucket that keeps versions a plain deletion only
    /// adds a marker on top of them.
    pub async fn delete_version(&self, key: &str, version: &str) -> Result<(), StoreError> {
        let store = &self.store;
        let doing = format!("deleting version {version} of {key}");
        let request = || async {
            let mut query = Multimap::new();
            query.insert("versionId".to_string(), version.to_string());
            store
                .client
                .delete_object(store.bucket.clone(), object(key)?)?
                .extra_query_params(query)
                .build()
                .send()
                .await
        };
        store
            .persist(&doing, || async { store.once(&doing, request()).await })
            .await
            .map(|_| ())
    }

    /// Deletes the expected object. False: other bytes are there by now, and they stay. Only some
    /// stores check this (AWS does); others delete any object.
    pub async fn delete_as_found(
        &self,
        key: &str,
        expected: &Expected,
    ) -> Result<bool, StoreError> {
        let store = &self.store;
        let doing = format!("deleting {key}");
        let request = || {
            EXPECTED.scope(expected.clone(), async {
                store
                    .client
                    .delete_object(store.bucket.clone(), object(key)?)?
                    .build()
                    .send()
                    .await
            })
        };
        let deleted = store
            .persist(&doing, || async { store.once(&doing, request()).await })
            .await;
        match deleted {
            Ok(_) => Ok(true),
            Err(error) if error.fault == StoreFault::Changed => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn strange(&self, doing: &str) -> StoreError {
        self.store.fault(
            doing,
            StoreFault::Unexpected,
            "the server answered that there is no such key".into(),
        )
    }
}

/// The result of writing a whole object.
#[derive(Debug)]
pub struct Written {
    pub stored: Stored,
    /// None: the bucket keeps no versions.
    pub version: Option<String>,
}

/// An upload in parts; nothing is visible under its key until [`Upload::complete`].
pub struct Upload {
    store: LocalStore,
    key: String,
    id: UploadId,
    parts: Vec<PartInfo>,
    bytes: u64,
    /// True: nothing is left to abort.
    ended: AtomicBool,
}

/// Aborts the upload if the copy is cancelled in the middle, so that no parts stay, if there is
/// time for a last request.
impl Drop for Upload {
    fn drop(&mut self) {
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(give_up(
                self.store.store.clone(),
                self.key.clone(),
                self.id.clone(),
            ));
        }
    }
}

impl Upload {
    /// Stores the next part.
    pub async fn part(&mut self, body: Bytes) -> Result<(), StoreError> {
        let store = &self.store.store;
        let number = self.parts.len() as u16 + 1;
        let doing = format!("writing part {number} of {}", self.key);
        let size = body.len() as u64;
        let request = || async {
            let upload = store.client.upload_part(
                store.bucket.clone(),
                object(&self.key)?,
                self.id.clone(),
                number,
                SegmentedBytes::from(body.clone()),
            )?;
            upload.build().send().await
        };
        let answer = self.store.ask(&doing, body.len(), request).await?;
        let etag = store.etag_of(&doing, answer.headers())?;
        self.parts.push(PartInfo {
            number,
            etag: etag.parse().map_err(|e| store.unexpected(&doing, &e))?,
            size,
            checksum: None,
        });
        self.bytes += size;
        Ok(())
    }

    /// Makes the object visible, and reports success only if the server's answer and its HEAD
    /// agree.
    pub async fn complete(&self, expected: &Expected) -> Result<Completion, StoreError> {
        let store = &self.store.store;
        let doing = format!("completing the upload of {}", self.key);
        // A request that was sent may be carried out, whatever its answer.
        self.ended.store(true, Ordering::Relaxed);
        let answered = store
            .persist(&doing, || {
                EXPECTED.scope(expected.clone(), async {
                    self.ask_to_complete(&doing).await
                })
            })
            .await;
        let stored = store.head(&self.key).await?;
        match (answered, stored) {
            (Ok(etag), Some(stored)) if stored.bytes == self.bytes && stored.etag == etag => {
                Ok(Completion::Confirmed(stored))
            }
            (Ok(etag), other) => Err(store.fault(
                &doing,
                StoreFault::Unexpected,
                format!(
                    "the server confirmed {} bytes with ETag {etag}, and has {other:?}",
                    self.bytes
                ),
            )),
            // A completion whose answer was lost may have happened.
            (Err(_), Some(stored)) if stored.bytes == self.bytes => {
                Ok(Completion::Unproven(stored))
            }
            (Err(error), _) => Err(error),
        }
    }

    async fn ask_to_complete(&self, doing: &str) -> Result<String, StoreError> {
        let store = &self.store.store;
        let answer = store
            .once(doing, async {
                store
                    .client
                    .complete_multipart_upload(
                        store.bucket.clone(),
                        object(&self.key)?,
                        self.id.clone(),
                        self.parts.clone(),
                    )?
                    .build()
                    .send()
                    .await
            })
            .await?
            .ok_or_else(|| self.store.strange(doing))?;
        // A server that began its answer before it had finished reports a failure in the body of a
        // 200, and the library does not read it.
        let body = String::from_utf8_lossy(answer.body()).into_owned();
        match (
            body.contains("<CompleteMultipartUploadResult"),
            tag(&body, "ETag"),
        ) {
            (true, Some(etag)) => Ok(unquote(&etag)),
            _ => Err(store.fault(
                doing,
                fault_of_body(tag(&body, "Code").as_deref()),
                format!("status 200 with a failure in its body: {}", body.trim()),
            )),
        }
    }

    /// Aborts the upload, as a best effort: parts that stay are removed by the store's own cleanup.
    pub async fn abort(self) {
        self.ended.store(true, Ordering::Relaxed);
        give_up(self.store.store.clone(), self.key.clone(), self.id.clone()).await;
    }
}

async fn give_up(store: Store, key: String, id: UploadId) {
    let doing = format!("giving up the upload of {key}");
    let aborted = store
        .once(&doing, async {
            store
                .client
                .abort_multipart_upload(store.bucket.clone(), object(&key)?, id)?
                .build()
                .send()
                .await
        })
        .await;
    if let Err(error) = aborted {
        log::debug!("{error}");
    }
}

/// The result of a request to complete an upload.
#[derive(Debug)]
pub enum Completion {
    Confirmed(Stored),
    /// The answer was lost and an object of the right length exists: it must be read to be trusted.
    Unproven(Stored),
}

fn tag(xml: &str, name: &str) -> Option<String> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (value, _) = rest.split_once(&format!("</{name}>"))?;
    Some(value.to_string())
}
