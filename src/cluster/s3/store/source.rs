//! The primary's object, with the progress of its replication by the provider.

use super::{Store, StoreError, length_of};
use crate::cluster::s3::store::object::Stored;
use chrono::{DateTime, Utc};
use http::HeaderMap;
use minio::s3::error::{Error, S3ServerError};
use minio::s3::minio_error_response::MinioErrorCode;
use minio::s3::types::S3Api;
use std::time::Duration;

/// An object of the primary's store that its provider replicates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub stored: Stored,
    pub status: ReplicationStatus,
    /// Time at which it was written. None: the store does not tell.
    pub written: Option<DateTime<Utc>>,
    /// Time since it was written, by the store's own clock. None: the store does not tell.
    pub age: Option<Duration>,
}

/// The store's header `x-amz-replication-status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicationStatus {
    /// No rule is for this object, or the store has no rules.
    Absent,
    Pending,
    Completed,
    Failed,
    /// The object came from another bucket by a rule.
    Replica,
}

impl ReplicationStatus {
    pub(super) fn of(headers: &HeaderMap) -> ReplicationStatus {
        let status = headers.get("x-amz-replication-status");
        let status = status.and_then(|status| status.to_str().ok());
        // MinIO says COMPLETED, and AWS says COMPLETE in some of its documents.
        match status.map(str::to_ascii_uppercase).as_deref() {
            Some("PENDING") => ReplicationStatus::Pending,
            Some("COMPLETED" | "COMPLETE") => ReplicationStatus::Completed,
            Some("FAILED") => ReplicationStatus::Failed,
            Some("REPLICA") => ReplicationStatus::Replica,
            _ => ReplicationStatus::Absent,
        }
    }
}

impl Store {
    /// Returns the facts about an object and its replication. None: the bucket is served and has no
    /// such key.
    pub async fn source(&self, key: &str) -> Result<Option<Source>, StoreError> {
        let doing = format!("asking for the replication of {key}");
        let asked = self.persist(&doing, || self.stat(&doing, key)).await;
        let headers = match asked {
            Ok(Some(headers)) => headers,
            // An answer to HEAD has no body, and so no cause. An object that is there has a status,
            // which is not known.
            asked => {
                return match (self.head(key).await?, asked) {
                    (None, _) => Ok(None),
                    (Some(_), Err(error)) => Err(error),
                    (Some(_), Ok(_)) => Err(self.silent(&doing)),
                };
            }
        };
        let stored = match length_of(&headers) {
            Some(bytes) => Some(Stored {
                bytes,
                etag: self.etag_of(&doing, &headers)?,
            }),
            // A proxy that compresses answers gives no length.
            None => self.head(key).await?,
        };
        Ok(stored.map(|stored| Source {
            stored,
            status: ReplicationStatus::of(&headers),
            written: time_of(&headers, "last-modified"),
            age: age_of(&headers),
        }))
    }
}

impl Store {
    /// Returns whether the provider has a rule that copies objects of this bucket to another one.
    pub async fn is_replicated(&self) -> Result<bool, StoreError> {
        let doing = format!("asking for the replication rules of bucket {}", self.bucket);
        let asked = self.persist(&doing, || {
            self.once(&doing, async {
                let asking = self.client.get_bucket_replication(self.bucket.clone())?;
                match asking.build().send().await {
                    Ok(_) => Ok(true),
                    Err(Error::S3Server(S3ServerError::S3Error(answer)))
                        if answer.code()
                            == MinioErrorCode::ReplicationConfigurationNotFoundError =>
                    {
                        Ok(false)
                    }
                    Err(error) => Err(error),
                }
            })
        });
        Ok(asked.await?.unwrap_or_default())
    }
}

fn time_of(headers: &HeaderMap, name: &str) -> Option<DateTime<Utc>> {
    let text = headers.get(name)?.to_str().ok()?;
    let time = DateTime::parse_from_rfc2822(text).ok()?;
    Some(time.with_timezone(&Utc))
}

/// Returns the time between two headers of one answer, so that no clock of this machine is used.
fn age_of(headers: &HeaderMap) -> Option<Duration> {
    let written = time_of(headers, "last-modified")?;
    (time_of(headers, "date")? - written).to_std().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| {
                let name = http::HeaderName::from_static(name);
                (name, value.parse().expect("a header's value"))
            })
            .collect()
    }

    #[test]
    fn an_age_is_told_by_the_stores_own_clock() {
        let written = ("last-modified", "Wed, 21 Oct 2015 07:28:00 GMT");
        let now = ("date", "Wed, 21 Oct 2015 08:28:01 GMT");
        let age = age_of(&headers(&[written, now]));
        assert_eq!(age, Some(Duration::from_secs(3601)));
        assert_eq!(age_of(&headers(&[written])), None);
        let earlier = ("date", "Wed, 21 Oct 2015 07:00:00 GMT");
        assert_eq!(age_of(&headers(&[written, earlier])), None);
    }

    #[test]
    fn a_status_is_one_of_the_stores_words() {
        let of = |word| ReplicationStatus::of(&headers(&[("x-amz-replication-status", word)]));
        assert_eq!(of("PENDING"), ReplicationStatus::Pending);
        assert_eq!(of("Completed"), ReplicationStatus::Completed);
        assert_eq!(of("FAILED"), ReplicationStatus::Failed);
        assert_eq!(of("REPLICA"), ReplicationStatus::Replica);
        assert_eq!(of("anything"), ReplicationStatus::Absent);
        assert_eq!(
            ReplicationStatus::of(&headers(&[])),
            ReplicationStatus::Absent
        );
    }
}
