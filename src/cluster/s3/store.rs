//! The artifact store: MinIO or S3, through MinIO's library, one request a call.
//!
//! The library's own upload of a stream can lose data without an error (docs/dependencies.md), so parts are ours.
//! Every call has a time limit and is tried again while the fault is a passing one.

use super::probe::unpredictable;
use super::store_error::{StoreError, StoreFault, chain, classify, is_bodiless_no};
use crate::config;
use crate::domain::Side;
use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use minio::s3::client::{MinioClient, MinioClientBuilder};
use minio::s3::creds::StaticProvider;
use minio::s3::error::Error;
use minio::s3::http::BaseUrl;
use minio::s3::response_traits::HasS3Fields;
use minio::s3::types::{BucketName, ObjectKey, Region, S3Api};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

mod local;
mod pace;
mod pages;
mod wire;

pub use local::{Completion, LocalStore, Upload, Written};
use pace::Pace;
pub(in crate::cluster) use wire::Answered;
use wire::{EXPECTED, Wire, listening};

/// Longest wait for an answer, or for the next bytes of one.
const PATIENCE: Duration = Duration::from_secs(30);
const TRIES: usize = 9;
/// A store may ask to be left alone for so long; MinIO says 60 s with each such answer, whatever keeps it.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// An object that is never there.
const NONE: &str = ".warm-spare/none";
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
    pace: Pace,
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
            wait: None,
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
            .hook(Arc::new(Wire(artifactory.clone())))
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
            pace: Pace::default(),
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

    /// How many of so many transfers at once the store is to get now: fewer while it asks for fewer.
    pub fn at_once(&self, most: usize) -> usize {
        self.pace.of(most)
    }

    /// Whether the bucket is there and the key may look into it.
    pub async fn check_bucket(&self) -> Result<(), StoreError> {
        let doing = format!("looking for bucket {}", self.bucket);
        let there = self
            // An object that cannot be there: unlike HEAD of a bucket, the answer has a body, and so a cause.
            .persist(&doing, || self.open_body(&doing, NONE, 0))
            .await?;
        match there {
            None => Ok(()),
            Some(_) => Err(self.no_store(&doing, &format!("has {NONE}, which nobody made"))),
        }
    }

    /// None: the bucket is served and has no such key, or cannot have it.
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
            let answer = match self.once(&doing, asked).await {
                Ok(answer) => answer.flatten(),
                Err(error) if error.is_transient() => return Err(error),
                Err(_) => None,
            };
            let Some(answer) = answer else {
                // An answer to HEAD has no body, so anybody's 404 looks like the store's own, and no other status has a
                // cause: GET tells.
                return match self.open_body(&doing, key, 0).await {
                    Err(error) if error.is_of_the_key() => Ok(None),
                    opened => Ok(opened?.map(|(_, stored)| stored)),
                };
            };
            // A proxy that packs answers gives no length.
            let Some(bytes) = length_of(answer.headers()) else {
                let opened = self.open_body(&doing, key, 0).await?;
                return Ok(opened.map(|(_, stored)| stored));
            };
            let etag = self.etag_of(&doing, answer.headers())?;
            Ok(Some(Stored { bytes, etag }))
        })
        .await
    }

    /// Whether the store has an object that it did not get from another bucket by its own replication.
    pub async fn has_of_its_own(&self, key: &str) -> Result<bool, StoreError> {
        let doing = format!("asking for {key}");
        self.persist(&doing, || async {
            let request = async {
                self.client
                    .get_object(self.bucket.clone(), object(key)?)?
                    .build()
                    .send()
                    .await
            };
            let Some(answer) = self.once(&doing, request).await? else {
                return Ok(false);
            };
            self.etag_of(&doing, answer.headers())?;
            let status = answer.headers().get("x-amz-replication-status");
            Ok(!status.is_some_and(|status| status.as_bytes().eq_ignore_ascii_case(b"replica")))
        })
        .await
    }

    /// None: the bucket is served and has no such key.
    pub async fn get(&self, key: &str) -> Result<Option<Download>, StoreError> {
        let doing = format!("reading {key}");
        let opened = self
            .persist(&doing, || self.open_body(&doing, key, 0))
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

    async fn open_body(
        &self,
        doing: &str,
        key: &str,
        offset: u64,
    ) -> Result<Option<(Body, Stored)>, StoreError> {
        let answer = self
            .once(doing, async {
                self.client
                    .get_object(self.bucket.clone(), object(key)?)?
                    .offset((offset > 0).then_some(offset))
                    .build()
                    .send()
                    .await
            })
            .await?;
        let Some(answer) = answer else {
            return Ok(None);
        };
        let etag = self.etag_of(doing, answer.headers())?;
        let (body, length) = answer.into_boxed_stream().map_err(|e| {
            let text = format!(
                "the answer gives no length ({}): a proxy before the store packs what it gives out, and must not",
                chain(&e)
            );
            self.fault(doing, StoreFault::Unexpected, text)
        })?;
        let bytes = offset + length;
        Ok(Some((body, Stored { bytes, etag })))
    }

    /// One request under the time limit. `Ok(None)` is the one good "no such key".
    async fn once<T>(
        &self,
        doing: &str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<Option<T>, StoreError> {
        let (answer, said) = listening(tokio::time::timeout(self.patience, request)).await;
        match answer {
            Ok(answer) => self.sorted(doing, answer, said),
            Err(_) => Err(self.silent(doing)),
        }
    }

    fn sorted<T>(
        &self,
        doing: &str,
        answer: Result<T, Error>,
        said: Option<Answered>,
    ) -> Result<Option<T>, StoreError> {
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if classify(&error, said).is_none() => Ok(None),
            Err(error) => Err(self.error(doing, &error, said)),
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
            (answer, said) = listening(tokio::time::timeout(limit, request)) => match answer {
                Ok(answer) => self.sorted(doing, answer, said),
                Err(_) => {
                    let text = format!("{bytes} bytes were not taken within {} s", limit.as_secs());
                    Err(self.fault(doing, StoreFault::Unreachable, text))
                }
            },
            () = silence => Err(self.silent(doing)),
        }
    }

    /// Whether the server answers at all. One that is busy does.
    async fn look_once(&self, doing: &str) -> bool {
        let asked = self.open_body(doing, NONE, 0).await;
        !matches!(asked, Err(error) if error.fault == StoreFault::Unreachable)
    }

    /// Tries again, calmly, while the fault is a passing one. A store that asks for fewer requests is no failing one: it is
    /// asked again until the time of all tries is over. The first failure is logged, and the recovery.
    async fn persist<T, F>(&self, doing: &str, call: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(5))
            .without_max_times()
            .with_jitter()
            .build();
        let begun = Instant::now();
        let mut tries = 0;
        loop {
            // Boxed: each request lies within the futures of all who wait for it.
            let error = match Box::pin(call()).await {
                Err(error) if error.is_transient() => error,
                result => {
                    if result.is_ok() {
                        self.answers_again(doing);
                    }
                    return result;
                }
            };
            let over = match error.asks_for_fewer() {
                true => {
                    self.pace.slow_down();
                    begun.elapsed() >= self.patience * self.tries as u32
                }
                false => {
                    tries += 1;
                    // With the waits that it asks for, all tries would take minutes.
                    tries >= self.tries || error.wait.is_some() && begun.elapsed() >= self.patience
                }
            };
            if over {
                return Err(error);
            }
            if !self.troubled().swap(true, Ordering::Relaxed) {
                log::warn!("{error}; trying again");
            }
            let asked = error.wait.unwrap_or_default();
            let pause = pauses.next().unwrap_or_default();
            tokio::time::sleep(pause.max(self.wait(asked))).await;
        }
    }

    /// As long as it asks for, within bounds. Who was refused together does not come again together.
    fn wait(&self, asked: Duration) -> Duration {
        let asked = asked.min(LONGEST_WAIT).min(self.patience);
        asked.mul_f64(1.0 + f64::from(unpredictable() as u8) / 256.0)
    }

    fn answers_again(&self, doing: &str) {
        if self.troubled().swap(false, Ordering::Relaxed) {
            log::info!(
                "{} artifact store {}: answers again ({doing})",
                self.side,
                self.endpoint
            );
        }
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

    fn error(&self, doing: &str, error: &Error, said: Option<Answered>) -> StoreError {
        let classified = classify(error, said);
        let (fault, text) = classified.unwrap_or((StoreFault::Unexpected, chain(error)));
        if self.artifactory.load(Ordering::Relaxed) {
            let text = format!("this is an Artifactory server ({text})");
            return self.fault(doing, StoreFault::Unsupported, text);
        }
        StoreError {
            wait: said.and_then(|said| said.retry_after),
            ..self.fault(doing, fault, text)
        }
    }

    /// An answer that no artifact store gives: another server, or a proxy, stands in its place.
    fn no_store(&self, doing: &str, what: &str) -> StoreError {
        let text = format!("the server that answers {what}: it is no artifact store");
        self.fault(doing, StoreFault::Unreachable, text)
    }

    fn etag_of(&self, doing: &str, headers: &http::HeaderMap) -> Result<String, StoreError> {
        let etag = headers.get("etag").and_then(|value| value.to_str().ok());
        match etag.map(unquote).filter(|etag| !etag.is_empty()) {
            Some(etag) => Ok(etag),
            None => Err(self.no_store(doing, "gives no ETag")),
        }
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
            wait: None,
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
        let (store, key, at) = (&self.store, &self.key, self.at);
        let opened = store
            .persist(&doing, || store.open_body(&doing, key, at))
            .await;
        // It may be shorter by now.
        let opened = match opened {
            Err(error) if error.fault == StoreFault::Changed => None,
            opened => opened?,
        };
        match opened {
            Some((body, rest)) if rest == self.stored => {
                self.body = body;
                Ok(())
            }
            _ => Err(cut(format!("{why}, and the object has changed since"))),
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

fn length_of(headers: &http::HeaderMap) -> Option<u64> {
    headers.get("content-length")?.to_str().ok()?.parse().ok()
}

/// As servers and proxies write it: in quotes, or as a weak one, where a proxy may have packed the body.
fn unquote(etag: &str) -> String {
    let etag = etag
        .replace("&#34;", "")
        .replace("&quot;", "")
        .replace('"', "");
    match etag.strip_prefix("W/") {
        Some(strong) => strong.to_string(),
        None => etag,
    }
}
