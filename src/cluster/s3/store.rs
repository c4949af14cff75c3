//! The artifact store: MinIO or S3, through MinIO's library, one request for each call.
//!
//! The library's own upload of a stream can lose data without an error (docs/dependencies.md), so
//! we upload the parts ourselves. Every call has a time limit and is tried again while the fault is
//! transient.

use super::probe::unpredictable;
use super::relay::Relay;
use super::store_error::{StoreError, StoreFault, classify, is_bodiless_no};
use crate::cluster::error_text;
use crate::cluster::s3::store::object::Stored;
use crate::domain::Side;
use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use download::Download;
use futures_util::Stream;
use minio::s3::client::MinioClient;
use minio::s3::error::Error;
use minio::s3::response_traits::HasS3Fields;
use minio::s3::types::{BucketName, ObjectKey, S3Api};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub(in crate::cluster) mod download;
mod local;
pub(in crate::cluster) mod object;
mod open;
mod pace;
mod pages;
mod peek;
mod source;
mod wire;

pub(in crate::cluster) use local::Written;
pub use local::{Completion, LocalStore, Upload};
use pace::Pace;
pub use source::{ReplicationStatus, Source};
pub(in crate::cluster) use wire::Answered;
use wire::{EXPECTED, listening};

/// Maximum time to wait for an answer, or for the next bytes of one.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_TRIES: usize = 9;
/// Maximum time for which a store's request to wait is obeyed. MinIO asks for 60 s with each such
/// answer, whatever the reason.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// Key of an object that never exists.
const ABSENT_KEY: &str = ".warm-spare/none";
/// Bytes between two interruptions after which a body counts as progressing.
const PROGRESS_BYTES: u64 = 1 << 20;
/// Minimum bytes per second of a connection; a slower one cannot carry artifacts.
const MIN_RATE_BYTES: u64 = 8 << 10;

/// Read access to one bucket. It is the only access to the peer's store.
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
    /// The way through an HTTP proxy. None: requests go to the server itself.
    relay: Option<Arc<Relay>>,
}

impl Store {
    /// Sets other limits: the time to wait for one answer, and the number of tries.
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

    /// Returns the URL of the proxy on the way, without user and password. None: there is none.
    pub fn proxy(&self) -> Option<Box<str>> {
        self.relay.as_ref().map(|relay| relay.proxy().into())
    }

    /// Returns how many of `most` transfers at once the store shall get now: fewer while it asks
    /// for fewer.
    pub fn at_once(&self, most: usize) -> usize {
        self.pace.of(most)
    }

    /// Checks that the bucket exists and the key may read it.
    pub async fn check_bucket(&self) -> Result<(), StoreError> {
        let doing = format!("looking for bucket {}", self.bucket);
        let there = self
            // An object that cannot exist: unlike HEAD of a bucket, the answer has a body, and so a
            // cause.
            .persist(&doing, || self.open_body(&doing, ABSENT_KEY, 0))
            .await?;
        match there {
            None => Ok(()),
            Some(_) => Err(self.no_store(
                &doing,
                &format!("has the object {ABSENT_KEY}, which nobody created"),
            )),
        }
    }

    /// Returns the facts about an object. None: the bucket is served and has no such key, or cannot
    /// have it.
    pub async fn head(&self, key: &str) -> Result<Option<Stored>, StoreError> {
        let doing = format!("asking for {key}");
        self.persist(&doing, || async {
            let headers = match self.stat(&doing, key).await {
                Ok(headers) => headers,
                Err(error) if error.is_transient() => return Err(error),
                Err(_) => None,
            };
            let Some(headers) = headers else {
                // An answer to HEAD has no body, so a 404 of any server looks like the store's own,
                // and no other status has a cause: GET has one.
                return match self.open_body(&doing, key, 0).await {
                    Err(error) if error.is_of_the_key() => Ok(None),
                    opened => Ok(opened?.map(|(_, stored)| stored)),
                };
            };
            // A proxy that compresses answers gives no length.
            let Some(bytes) = length_of(&headers) else {
                let opened = self.open_body(&doing, key, 0).await?;
                return Ok(opened.map(|(_, stored)| stored));
            };
            let etag = self.etag_of(&doing, &headers)?;
            Ok(Some(Stored { bytes, etag }))
        })
        .await
    }

    /// Asks once for an object's headers. None: an answer without a body says no, for any cause.
    async fn stat(&self, doing: &str, key: &str) -> Result<Option<http::HeaderMap>, StoreError> {
        let asked = async {
            let stat = self
                .client
                .stat_object(self.bucket.clone(), object(key)?)?
                .build();
            match stat.send().await {
                Ok(answer) => Ok(Some(answer.headers().clone())),
                Err(error) if is_bodiless_no(&error) => Ok(None),
                Err(error) => Err(error),
            }
        };
        Ok(self.once(doing, asked).await?.flatten())
    }

    /// Returns the ETag of an object that the store did not get from another bucket by its own
    /// replication. None: there is no such object.
    pub async fn etag_of_its_own(&self, key: &str) -> Result<Option<String>, StoreError> {
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
                return Ok(None);
            };
            let etag = self.etag_of(&doing, answer.headers())?;
            let is_copy = ReplicationStatus::of(answer.headers()) == ReplicationStatus::Replica;
            Ok((!is_copy).then_some(etag))
        })
        .await
    }

    /// Returns the version of the object that is served under a key. None: there is no such object;
    /// `Some(None)`: the bucket keeps no versions.
    pub async fn version(&self, key: &str) -> Result<Option<Option<String>>, StoreError> {
        let doing = format!("asking for the version of {key}");
        self.persist(&doing, || async {
            let Some(headers) = self.stat(&doing, key).await? else {
                return Ok(None);
            };
            let version = headers.get("x-amz-version-id");
            let version = version.and_then(|version| version.to_str().ok());
            Ok(Some(version.filter(|id| *id != "null").map(str::to_string)))
        })
        .await
    }

    /// Starts reading an object. None: the bucket is served and has no such key.
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
                "the answer gives no length ({}): a proxy before the store compresses its answers, and must not",
                error_text::chain(&e)
            );
            self.fault(doing, StoreFault::Unexpected, text)
        })?;
        let bytes = offset + length;
        Ok(Some((body, Stored { bytes, etag })))
    }

    /// Sends one request under the time limit. `Ok(None)` is the one good "no such key".
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
            Err(error) if classify(&error, said.as_ref()).is_none() => Ok(None),
            Err(error) => Err(self.error(doing, &error, said)),
        }
    }

    /// Does the same for a request that sends much, for which a slow connection may need long. The
    /// request is waited for while the server answers other requests, and the connection carries at
    /// least [`MIN_RATE_BYTES`].
    async fn once_sending<T>(
        &self,
        doing: &str,
        bytes: usize,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<Option<T>, StoreError> {
        let limit = self.patience + Duration::from_secs(bytes as u64 / MIN_RATE_BYTES);
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

    /// Returns whether the server answers at all. A busy server does.
    async fn look_once(&self, doing: &str) -> bool {
        let asked = self.open_body(doing, ABSENT_KEY, 0).await;
        !matches!(asked, Err(error) if error.fault == StoreFault::Unreachable)
    }

    /// Tries again, with pauses, while the fault is transient. A store that asks for fewer requests
    /// is not failing: it is asked again until the time of all tries is over. The first failure is
    /// logged, and so is the recovery.
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
            // Boxed, because the futures of all callers contain the request's future.
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

    /// Returns the time to wait: the requested time, within limits. Requests that were refused
    /// together are not repeated together.
    fn wait(&self, asked: Duration) -> Duration {
        let asked = asked.min(MAX_WAIT).min(self.patience);
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

    /// True: a fault was logged and its recovery was not. So eight copies at once log it once, and
    /// so do all runs of a service that tries again for hours.
    fn troubled(&self) -> &'static AtomicBool {
        static TROUBLED: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(false)];
        match self.side {
            Side::Local => &TROUBLED[0],
            Side::Peer => &TROUBLED[1],
        }
    }

    fn error(&self, doing: &str, error: &Error, said: Option<Answered>) -> StoreError {
        let classified = classify(error, said.as_ref());
        let (fault, text) =
            classified.unwrap_or((StoreFault::Unexpected, error_text::chain(error)));
        if self.artifactory.load(Ordering::Relaxed) {
            let text = format!("this is an Artifactory server ({text})");
            return self.fault(doing, StoreFault::Unsupported, text);
        }
        StoreError {
            wait: said.and_then(|said| said.retry_after),
            ..self.fault(doing, fault, text)
        }
    }

    /// Returns the error for an answer that no artifact store gives: another server, or a proxy,
    /// answers in its place.
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
        self.fault(doing, StoreFault::Unexpected, error_text::chain(error))
    }

    fn silent(&self, doing: &str) -> StoreError {
        let text = format!("no answer for {} s", self.patience.as_secs_f32());
        self.fault(doing, StoreFault::Unreachable, text)
    }

    fn fault(&self, doing: &str, fault: StoreFault, text: String) -> StoreError {
        StoreError {
            side: self.side,
            endpoint: self.endpoint.clone(),
            proxy: self.proxy(),
            doing: doing.to_string(),
            fault,
            text,
            wait: None,
        }
    }
}

type Body = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

fn object(key: &str) -> Result<ObjectKey, Error> {
    ObjectKey::new(key).map_err(Error::Validation)
}

fn length_of(headers: &http::HeaderMap) -> Option<u64> {
    headers.get("content-length")?.to_str().ok()?.parse().ok()
}

/// Returns the ETag without quotes. Servers and proxies write it in quotes, or as a weak one if a
/// proxy may have compressed the body.
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
