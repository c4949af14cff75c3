//! The artifact store: MinIO or S3, through MinIO's library, one request a call.
//!
//! The library's own upload of a stream can lose data without an error (docs/dependencies.md), so parts are ours.
//! Every call has a time limit and is tried again while the fault is a passing one.

use super::Side;
use super::store_error::{StoreError, StoreFault, chain, classify, is_bodiless_no};
use crate::config;
use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use minio::s3::client::{MinioClient, MinioClientBuilder};
use minio::s3::creds::StaticProvider;
use minio::s3::error::Error;
use minio::s3::http::BaseUrl;
use minio::s3::response_traits::HasS3Fields;
use minio::s3::segmented_bytes::SegmentedBytes;
use minio::s3::types::{BucketName, ObjectKey, Region, S3Api, ToStream};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

mod local;

pub use local::{Completion, LocalStore, Upload};

/// Longest wait for an answer, or for the next bytes of one.
const PATIENCE: Duration = Duration::from_secs(30);
const TRIES: usize = 9;
/// Bytes between two cuts after which a body counts as getting on.
const PROGRESS: u64 = 1 << 20;
/// A line that carries fewer bytes a second carries no artifacts.
const LEAST_RATE: u64 = 8 << 10;

/// Reading from one bucket. All that is ever held of the peer's store.
#[derive(Clone)]
pub struct Store {
    side: Side,
    endpoint: String,
    client: MinioClient,
    bucket: BucketName,
    patience: Duration,
    tries: usize,
    artifactory: Arc<AtomicBool>,
}

/// What a store says of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub bytes: u64,
    pub etag: String,
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub key: String,
    pub stored: Stored,
}

/// The object that must lie under a key for a request that changes the key. The server refuses the request if another
/// object lies there. So a process that looked, slept and lost its lock does no harm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// No matter what: nobody else gives that name to other bytes.
    Anything,
    Nothing,
    Etag(String),
}

impl Expected {
    /// What was found there.
    pub fn as_found(stored: Option<&Stored>) -> Expected {
        match stored {
            Some(stored) => Expected::Etag(stored.etag.clone()),
            None => Expected::Nothing,
        }
    }

    fn header(&self) -> Option<(&'static str, String)> {
        match self {
            Expected::Anything => None,
            Expected::Nothing => Some(("If-None-Match", "*".into())),
            Expected::Etag(etag) => Some(("If-Match", format!("\"{etag}\""))),
        }
    }
}

tokio::task_local! {
    /// Of the request that this task sends; the library's own calls take no such headers.
    static EXPECTED: Expected;
}

/// The body of an object, on its way.
pub struct Download {
    pub stored: Stored,
    body: Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>,
    store: Store,
    key: String,
    /// Bytes handed out so far.
    at: u64,
    tries: usize,
    resumed_at: u64,
    kept: Option<Bytes>,
}

impl Store {
    /// Prepares a client; nothing is sent. Keys and certificates are read now, so that a rotation needs only a new client.
    pub fn open(side: Side, to: &config::S3) -> Result<Store, StoreError> {
        let fail = |fault: StoreFault, text: String| StoreError {
            side,
            endpoint: to.endpoint.clone(),
            doing: "preparing the client".into(),
            fault,
            text,
        };
        let unexpected = |e: &dyn std::error::Error| fail(StoreFault::Unexpected, chain(e));
        let secret = |source: &config::SecretSource, key: &str| {
            source
                .read(&format!("{side}.s3.{key}"))
                .map_err(|e| fail(StoreFault::Denied, e.to_string()))
        };
        let (key_id, secret_key) = (
            secret(&to.key_id, "key_id")?,
            secret(&to.secret_key, "secret_key")?,
        );
        let mut url: BaseUrl = to.endpoint.parse().map_err(|e| unexpected(&e))?;
        url.region = Region::new(&to.region).map_err(|e| unexpected(&e))?;
        let artifactory = Arc::new(AtomicBool::new(false));
        let client = MinioClientBuilder::new(url)
            .provider(Some(StaticProvider::new(
                key_id.expose(),
                secret_key.expose(),
                None,
            )))
            .ssl_cert_file(to.ca_file.as_deref())
            .hook(Arc::new(Recognise(artifactory.clone())))
            .build()
            .map_err(|e| {
                fail(
                    StoreFault::Tls,
                    format!("{}: {}", ca_file_of(to), chain(&e)),
                )
            })?;
        Ok(Store {
            side,
            endpoint: to.endpoint.clone(),
            client,
            bucket: BucketName::new(&to.bucket_name).map_err(|e| unexpected(&e))?,
            patience: PATIENCE,
            tries: TRIES,
            artifactory,
        })
    }

    /// Other bounds than the usual: how long one answer is waited for, and how often it is asked for.
    pub fn with_limits(mut self, patience: Duration, tries: usize) -> Store {
        self.patience = patience;
        self.tries = tries;
        self
    }

    pub fn side(&self) -> Side {
        self.side
    }

    pub fn bucket(&self) -> &str {
        self.bucket.as_str()
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Whether the bucket is there and the key may look into it.
    pub async fn check_bucket(&self) -> Result<(), StoreError> {
        let doing = format!("looking for bucket {}", self.bucket);
        let there = self
            .persist(&doing, || async {
                // An object that cannot be there: unlike HEAD of a bucket, the answer has a body, and so a cause.
                self.once(&doing, async {
                    self.client
                        .get_object(self.bucket.clone(), object(".warm-spare/none")?)?
                        .build()
                        .send()
                        .await
                })
                .await
            })
            .await;
        there.map(|_| ())
    }

    /// None: the bucket is served and has no such key.
    pub async fn head(&self, key: &str) -> Result<Option<Stored>, StoreError> {
        let doing = format!("asking for {key}");
        self.persist(&doing, || async {
            let asked = async {
                let stat = self
                    .client
                    .stat_object(self.bucket.clone(), object(key)?)?
                    .build();
                match stat.send().await {
                    Ok(answer) => Ok(Some(answer)),
                    Err(error) if is_bodiless_no(&error) => Ok(None),
                    Err(error) => Err(error),
                }
            };
            let Some(answer) = self.once(&doing, asked).await?.flatten() else {
                // An answer to HEAD has no body, so anybody's 404 looks like the store's own: GET tells them apart.
                let opened = self.open_body(&doing, key, 0, None).await?;
                return Ok(opened.map(|(_, stored)| stored));
            };
            let bytes = answer.size().map_err(|e| self.unexpected(&doing, &e))?;
            let etag = etag_of(answer.headers());
            Ok(Some(Stored { bytes, etag }))
        })
        .await
    }

    /// None: the bucket is served and has no such key.
    pub async fn get(&self, key: &str) -> Result<Option<Download>, StoreError> {
        let doing = format!("reading {key}");
        let opened = self
            .persist(&doing, || self.open_body(&doing, key, 0, None))
            .await?;
        Ok(opened.map(|(body, stored)| Download {
            stored,
            body,
            store: self.clone(),
            key: key.to_string(),
            at: 0,
            tries: 0,
            resumed_at: 0,
            kept: None,
        }))
    }

    /// Every object whose key begins with `prefix`, in pages; a listing that breaks off is an error.
    pub async fn list(
        &self,
        prefix: &str,
        mut page: impl AsyncFnMut(Vec<Listed>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let doing = format!("listing bucket {}", self.bucket);
        let mut pages = self
            .client
            .list_objects(self.bucket.clone())
            .map_err(|e| self.unexpected(&doing, &e))?
            .recursive(true)
            .prefix((!prefix.is_empty()).then(|| prefix.to_string()))
            .build()
            .to_stream()
            .await;
        loop {
            let next = tokio::time::timeout(self.patience, pages.next())
                .await
                .map_err(|_| self.silent(&doing))?;
            let Some(answer) = next else { return Ok(()) };
            let answer = answer.map_err(|e| self.error(&doing, &e))?;
            let mut listed = Vec::with_capacity(answer.contents.len());
            for entry in answer.contents {
                if entry.is_prefix || entry.is_delete_marker {
                    continue;
                }
                listed.push(Listed {
                    key: entry.name,
                    stored: Stored {
                        bytes: entry.size.unwrap_or(0),
                        etag: unquote(entry.etag.as_deref().unwrap_or("")),
                    },
                });
            }
            page(listed).await?;
        }
    }

    async fn open_body(
        &self,
        doing: &str,
        key: &str,
        offset: u64,
        same: Option<&str>,
    ) -> Result<Option<(Body, Stored)>, StoreError> {
        let answer = self
            .once(doing, async {
                self.client
                    .get_object(self.bucket.clone(), object(key)?)?
                    .offset((offset > 0).then_some(offset))
                    .match_etag(same.map(|etag| format!("\"{etag}\"")))
                    .build()
                    .send()
                    .await
            })
            .await?;
        let Some(answer) = answer else {
            return Ok(None);
        };
        let etag = etag_of(answer.headers());
        let (body, length) = answer
            .into_boxed_stream()
            .map_err(|e| self.error(doing, &e))?;
        let bytes = offset + length;
        Ok(Some((body, Stored { bytes, etag })))
    }

    /// One request under the time limit. `Ok(None)` is the one good "no such key".
    async fn once<T>(
        &self,
        doing: &str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<Option<T>, StoreError> {
        match tokio::time::timeout(self.patience, request).await {
            Ok(Ok(answer)) => Ok(Some(answer)),
            Ok(Err(error)) => match classify(&error) {
                None => Ok(None),
                Some(_) => Err(self.error(doing, &error)),
            },
            Err(_) => Err(self.silent(doing)),
        }
    }

    /// The same for a request that sends much: a slow line may need long for it. As long as the server answers others, and
    /// the line carries at least [`LEAST_RATE`], it is waited for.
    async fn once_sending<T>(
        &self,
        doing: &str,
        bytes: usize,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<Option<T>, StoreError> {
        let limit = self.patience + Duration::from_secs(bytes as u64 / LEAST_RATE);
        let silence = async {
            loop {
                tokio::time::sleep(self.patience).await;
                let answered = tokio::time::timeout(self.patience, self.look_once(doing)).await;
                if !matches!(answered, Ok(true)) {
                    return;
                }
            }
        };
        tokio::select! {
            answer = tokio::time::timeout(limit, request) => match answer {
                Ok(Ok(answer)) => Ok(Some(answer)),
                Ok(Err(error)) => match classify(&error) {
                    None => Ok(None),
                    Some(_) => Err(self.error(doing, &error)),
                },
                Err(_) => {
                    let text = format!("{bytes} bytes were not taken within {} s", limit.as_secs());
                    Err(self.fault(doing, StoreFault::Unreachable, text))
                }
            },
            () = silence => Err(self.silent(doing)),
        }
    }

    /// Whether the server answers at all.
    async fn look_once(&self, doing: &str) -> bool {
        let asked = self.open_body(doing, ".warm-spare/none", 0, None).await;
        !matches!(asked, Err(error) if error.is_transient())
    }

    /// Tries again, calmly, while the fault is a passing one. The first failure is logged, and the recovery.
    async fn persist<T, F>(&self, doing: &str, call: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let result = call
            .retry(
                ExponentialBuilder::default()
                    .with_min_delay(Duration::from_millis(100))
                    .with_max_delay(Duration::from_secs(5))
                    .with_max_times(self.tries - 1)
                    .with_jitter(),
            )
            .when(StoreError::is_transient)
            .notify(|error, _| {
                if !self.troubled().swap(true, Ordering::Relaxed) {
                    log::warn!("{error}; trying again");
                }
            })
            .await;
        if result.is_ok() && self.troubled().swap(false, Ordering::Relaxed) {
            log::info!(
                "{} artifact store {}: answers again ({doing})",
                self.side,
                self.endpoint
            );
        }
        result
    }

    /// A fault was logged and its recovery was not: eight copies at once tell it once, and so do all passes of a service
    /// that tries again for hours.
    fn troubled(&self) -> &'static AtomicBool {
        static TROUBLED: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];
        match self.side {
            Side::Local => &TROUBLED[0],
            Side::Peer => &TROUBLED[1],
        }
    }

    fn error(&self, doing: &str, error: &Error) -> StoreError {
        let (fault, text) = classify(error).unwrap_or((StoreFault::Unexpected, chain(error)));
        let (fault, text) = if self.artifactory.load(Ordering::Relaxed) {
            (
                StoreFault::Unsupported,
                format!("this is an Artifactory server ({text})"),
            )
        } else {
            (fault, text)
        };
        self.fault(doing, fault, text)
    }

    fn unexpected(&self, doing: &str, error: &dyn std::error::Error) -> StoreError {
        self.fault(doing, StoreFault::Unexpected, chain(error))
    }

    fn silent(&self, doing: &str) -> StoreError {
        let text = format!("no answer for {} s", self.patience.as_secs_f32());
        self.fault(doing, StoreFault::Unreachable, text)
    }

    fn fault(&self, doing: &str, fault: StoreFault, text: String) -> StoreError {
        StoreError {
            side: self.side,
            endpoint: self.endpoint.clone(),
            doing: doing.to_string(),
            fault,
            text,
        }
    }
}

type Body = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

impl Download {
    /// The next bytes; None at the end, when exactly as many have come as were announced. A cut is mended by asking
    /// for the rest of the same object.
    pub async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        loop {
            match tokio::time::timeout(self.store.patience, self.body.next()).await {
                Ok(Some(Ok(bytes))) => {
                    self.at += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
                Ok(None) if self.at == self.stored.bytes => return Ok(None),
                Ok(None) => self.resume("the body ended early").await?,
                Ok(Some(Err(cause))) => self.resume(&chain(&cause)).await?,
                Err(_) => self.resume("the body stalled").await?,
            }
        }
    }

    /// Puts back what a reader had no room for; [`Download::take_kept`] gives it again.
    pub fn keep(&mut self, rest: Bytes) {
        self.kept = Some(rest);
    }

    pub fn take_kept(&mut self) -> Option<Bytes> {
        self.kept.take()
    }

    async fn resume(&mut self, why: &str) -> Result<(), StoreError> {
        // A large object may be cut often; what counts is that it gets on.
        if self.at >= self.resumed_at + PROGRESS {
            self.tries = 0;
        }
        self.resumed_at = self.at;
        let doing = format!("reading {} from byte {}", self.key, self.at);
        let cut = |text: String| self.store.fault(&doing, StoreFault::Unreachable, text);
        self.tries += 1;
        if self.tries >= self.store.tries {
            return Err(cut(format!("{why}, {} times", self.tries)));
        }
        log::debug!("{}", cut(format!("{why}; asking for the rest")));
        tokio::time::sleep(Duration::from_millis(50 << self.tries.min(6))).await;
        if self.at >= self.stored.bytes {
            return Err(cut(format!(
                "{why}: {} bytes came, {} were announced",
                self.at, self.stored.bytes
            )));
        }
        let (store, key, etag, at) = (&self.store, &self.key, &self.stored.etag, self.at);
        let opened = store
            .persist(&doing, || store.open_body(&doing, key, at, Some(etag)))
            .await?;
        match opened {
            Some((body, rest)) if rest.bytes == self.stored.bytes => {
                self.body = body;
                Ok(())
            }
            _ => Err(cut(format!("{why}, and the object has changed since"))),
        }
    }
}

/// Notices Artifactory by the headers that it puts on every answer; and says in a request what it expects to change.
#[derive(Debug)]
struct Recognise(Arc<AtomicBool>);

#[async_trait::async_trait]
impl minio::s3::client::RequestHooks for Recognise {
    fn name(&self) -> &'static str {
        "recognise"
    }

    async fn before_signing_mut(
        &self,
        _: &minio::s3::client::Method,
        _: &mut minio::s3::http::Url,
        _: &str,
        headers: &mut minio::s3::multimap_ext::Multimap,
        _: &minio::s3::multimap_ext::Multimap,
        _: Option<&BucketName>,
        _: Option<&ObjectKey>,
        _: Option<&SegmentedBytes>,
        _: &mut minio::s3::client::hooks::Extensions,
    ) -> Result<(), Error> {
        let header = EXPECTED.try_with(Expected::header).ok().flatten();
        if let Some((name, value)) = header {
            headers.insert(name.to_string(), value);
        }
        Ok(())
    }

    async fn after_execute(
        &self,
        _: &minio::s3::client::Method,
        _: &minio::s3::http::Url,
        _: &str,
        _: &minio::s3::multimap_ext::Multimap,
        _: &minio::s3::multimap_ext::Multimap,
        _: Option<&BucketName>,
        _: Option<&ObjectKey>,
        answer: &Result<minio::s3::client::Response, reqwest::Error>,
        _: &mut minio::s3::client::hooks::Extensions,
    ) {
        let Ok(answer) = answer else { return };
        let jfrog = [
            "x-artifactory-id",
            "x-artifactory-node-id",
            "x-jfrog-version",
        ];
        if jfrog
            .iter()
            .any(|name| answer.headers().contains_key(*name))
        {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

fn ca_file_of(to: &config::S3) -> String {
    match &to.ca_file {
        Some(path) => path.display().to_string(),
        None => "the system's certificate authorities".into(),
    }
}

fn object(key: &str) -> Result<ObjectKey, Error> {
    ObjectKey::new(key).map_err(Error::Validation)
}

fn etag_of(headers: &http::HeaderMap) -> String {
    headers
        .get("etag")
        .and_then(|value| value.to_str().ok())
        .map(unquote)
        .unwrap_or_default()
}

fn unquote(etag: &str) -> String {
    etag.replace("&#34;", "")
        .replace("&quot;", "")
        .replace('"', "")
}
