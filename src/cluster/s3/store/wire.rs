//! Adds headers to each request, and reads an answer's status and headers: the library's own calls
//! support neither.

use crate::cluster::s3::relay::ProxyFault;
use crate::cluster::s3::store::object::Expected;
use minio::s3::client::hooks::Extensions;
use minio::s3::client::{Method, RequestHooks, Response};
use minio::s3::error::Error;
use minio::s3::http::Url;
use minio::s3::multimap_ext::Multimap;
use minio::s3::segmented_bytes::SegmentedBytes;
use minio::s3::types::{BucketName, ObjectKey};
use minio::s3::utils::md5sum_hash;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A MinIO that replicates a bucket asks the other site for an object that it does not have, and
/// answers as if it had it. A request marked as such a question is answered only from this site.
/// Other stores do not know the header.
const NOT_FROM_ELSEWHERE: (&str, &str) = ("x-minio-source-proxy-request", "true");

tokio::task_local! {
    /// The expectation of the request that this task sends.
    pub(super) static EXPECTED: Expected;
    static ANSWERED: Cell<Option<Answered>>;
}

/// The facts of an answer outside its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cluster) struct Answered {
    pub status: u16,
    pub retry_after: Option<Duration>,
    /// The fault of the way through a proxy. None: the store itself answered.
    pub proxy_fault: Option<ProxyFault>,
}

/// Sends a request. Returns also the facts of the last answer to it.
pub(super) async fn listening<T>(request: impl Future<Output = T>) -> (T, Option<Answered>) {
    ANSWERED
        .scope(Cell::new(None), async {
            let answer = request.await;
            (answer, ANSWERED.with(Cell::take))
        })
        .await
}

#[derive(Debug)]
pub(super) struct Wire {
    /// Set if the headers of an answer are those of Artifactory.
    pub artifactory: Arc<AtomicBool>,
    /// Host for which requests are signed. None: that of the URL to which they are sent.
    pub host: Option<String>,
}

#[async_trait::async_trait]
impl RequestHooks for Wire {
    fn name(&self) -> &'static str {
        "wire"
    }

    async fn before_signing_mut(
        &self,
        method: &Method,
        _: &mut Url,
        _: &str,
        headers: &mut Multimap,
        _: &Multimap,
        _: Option<&BucketName>,
        _: Option<&ObjectKey>,
        body: Option<&SegmentedBytes>,
        _: &mut Extensions,
    ) -> Result<(), Error> {
        if let Some(host) = &self.host {
            headers.retain(|name, _| !name.eq_ignore_ascii_case("host"));
            headers.insert("Host".to_string(), host.clone());
        }
        if let Some((name, value)) = EXPECTED.try_with(Expected::header).ok().flatten() {
            headers.insert(name.to_string(), value);
        }
        if *method == Method::GET || *method == Method::HEAD {
            let (name, value) = NOT_FROM_ELSEWHERE;
            headers.insert(name.to_string(), value.to_string());
        }
        // A bucket with its own retention accepts no object without it.
        if let (true, Some(body)) = (*method == Method::PUT, body) {
            headers.insert("Content-MD5".to_string(), md5(body).await);
        }
        Ok(())
    }

    async fn after_execute(
        &self,
        _: &Method,
        _: &Url,
        _: &str,
        _: &Multimap,
        _: &Multimap,
        _: Option<&BucketName>,
        _: Option<&ObjectKey>,
        answer: &Result<Response, reqwest::Error>,
        _: &mut Extensions,
    ) {
        let Ok(answer) = answer else { return };
        let headers = answer.headers();
        let _ = ANSWERED.try_with(|cell| {
            cell.set(Some(Answered {
                status: answer.status().as_u16(),
                retry_after: headers.get("retry-after").and_then(wait_of),
                proxy_fault: match self.host {
                    Some(_) => ProxyFault::read(headers),
                    None => None,
                },
            }));
        });
        let jfrog = [
            "x-artifactory-id",
            "x-artifactory-node-id",
            "x-jfrog-version",
        ];
        if jfrog.iter().any(|name| headers.contains_key(*name)) {
            self.artifactory.store(true, Ordering::Relaxed);
        }
    }
}

/// Computes the sum on another thread, because it takes some 15 ms for a part, and this thread
/// serves all tasks.
async fn md5(body: &SegmentedBytes) -> String {
    let body = body.clone();
    let sum = tokio::task::spawn_blocking(move || md5sum_hash(&body.to_bytes()));
    sum.await.expect("a sum neither panics nor is cancelled")
}

/// Reads the time to wait: seconds, or a date.
fn wait_of(value: &http::HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = chrono::DateTime::parse_from_rfc2822(text).ok()?;
    (date.with_timezone(&chrono::Utc) - chrono::Utc::now())
        .to_std()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_seconds_or_a_date() {
        let of = |text: &str| wait_of(&text.parse().expect("a header's value"));
        assert_eq!(of(" 7 "), Some(Duration::from_secs(7)));
        let date = (chrono::Utc::now() + chrono::TimeDelta::seconds(90)).to_rfc2822();
        let wait = of(&date.replace("+0000", "GMT")).expect("a date");
        assert!((80..=90).contains(&wait.as_secs()), "{wait:?}");
        assert_eq!(of("Wed, 21 Oct 2015 07:28:00 GMT"), None);
        assert_eq!(of("soon"), None);
    }

    #[tokio::test]
    async fn the_checksum_of_a_body_is_that_of_its_bytes() {
        let body = SegmentedBytes::from(bytes::Bytes::from_static(b"abc"));
        assert_eq!(md5(&body).await, "kAFQmDzST7DWlj99KOF/cg==");
    }
}
