//! Objects as Builder reads and writes them: one request below 10 MiB, several parts from there on.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use minio::s3::creds::StaticProvider;
use minio::s3::error::{Error as MinioError, S3ServerError};
use minio::s3::http::BaseUrl;
use minio::s3::response_traits::HasEtagFromHeaders;
use minio::s3::segmented_bytes::SegmentedBytes;
use minio::s3::types::minio_error_response::MinioErrorCode;
use minio::s3::types::{ListEntry, PartInfo, Region, S3Api, ToStream};
use minio::s3::{MinioClient, MinioClientBuilder};

use super::Result;

/// From this size on Builder's own client uploads in parts.
pub const MULTIPART_FROM: u64 = 10 << 20;
const PART: usize = 8 << 20;

#[derive(Clone)]
pub struct S3 {
    client: MinioClient,
}

/// The facts about an object in HEAD's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub etag: String,
    pub size: u64,
    /// The time at which it was written, as the server tells it.
    pub modified: String,
}

impl S3 {
    /// `authority`: a PEM file with the certificate that signed the server's.
    pub fn new(endpoint: &str, key: &str, secret: &str, authority: Option<&Path>) -> Result<Self> {
        let client = builder(endpoint, key, secret)?.ssl_cert_file(authority);
        Ok(Self {
            client: client.build()?,
        })
    }

    /// Makes a client that accepts any certificate.
    pub fn credulous(endpoint: &str, key: &str, secret: &str) -> Result<Self> {
        let client = builder(endpoint, key, secret)?.ignore_cert_check(Some(true));
        Ok(Self {
            client: client.build()?,
        })
    }

    pub async fn has_bucket(&self, bucket: &str) -> Result<bool> {
        let asked = self.client.bucket_exists(bucket)?.build();
        Ok(in_time(asked.send()).await?.exists())
    }

    pub async fn create_bucket(&self, bucket: &str) -> Result<()> {
        let created = self.client.create_bucket(bucket)?.build();
        in_time(created.send()).await.map(drop)
    }

    pub async fn put(&self, bucket: &str, key: &str, bytes: impl Into<Bytes>) -> Result<()> {
        let bytes = bytes.into();
        let size = bytes.len() as u64;
        let whole = futures_util::stream::once(std::future::ready(bytes));
        self.put_stream(bucket, key, size, Box::pin(whole)).await
    }

    /// Uploads an object, with one part in memory at a time.
    pub async fn put_stream(
        &self,
        bucket: &str,
        key: &str,
        size: u64,
        mut chunks: impl Stream<Item = Bytes> + Unpin,
    ) -> Result<()> {
        if size < MULTIPART_FROM {
            let mut data = SegmentedBytes::new();
            while let Some(chunk) = chunks.next().await {
                data.append(chunk);
            }
            let put = self.client.put_object(bucket, key, data)?.build();
            return in_time(put.send()).await.map(drop);
        }
        let begun = self.client.create_multipart_upload(bucket, key)?.build();
        let upload = in_time(begun.send()).await?.upload_id().await?;
        let mut parts = Vec::new();
        loop {
            let part = next_part(&mut chunks).await;
            if part.is_empty() {
                break;
            }
            let number = parts.len() as u16 + 1;
            let size = part.len() as u64;
            let sent = self
                .client
                .upload_part(bucket, key, upload.clone(), number, part)?;
            let etag = in_time(sent.build().send()).await?.etag()?;
            parts.push(PartInfo::new(number, etag, size, None));
        }
        let complete = self
            .client
            .complete_multipart_upload(bucket, key, upload, parts)?;
        in_time(complete.build().send()).await.map(drop)
    }

    /// Returns the whole object. None: it does not exist.
    pub async fn get(&self, bucket: &str, key: &str) -> Result<Option<Bytes>> {
        let asked = self.client.get_object(bucket, key)?.build();
        match found(in_time(asked.send()).await)? {
            Some(response) => Ok(Some(in_time(response.into_bytes()).await?)),
            None => Ok(None),
        }
    }

    /// Returns the lower-case hex BLAKE2b-256 of the object, read as a stream. None: it does not
    /// exist.
    pub async fn checksum(&self, bucket: &str, key: &str) -> Result<Option<String>> {
        let asked = self.client.get_object(bucket, key)?.build();
        let Some(response) = found(in_time(asked.send()).await)? else {
            return Ok(None);
        };
        let (mut stream, size) = response.into_boxed_stream()?;
        let mut hash = super::packages::blake2b();
        let mut read = 0;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk?;
            read += chunk.len() as u64;
            hash.update(&chunk);
        }
        if read != size {
            return Err(format!("{key}: {read} bytes of {size}").into());
        }
        Ok(Some(hash.finalize().to_hex().to_string()))
    }

    pub async fn head(&self, bucket: &str, key: &str) -> Result<Option<Head>> {
        let asked = self.client.stat_object(bucket, key)?.build();
        let Some(response) = found(in_time(asked.send()).await)? else {
            return Ok(None);
        };
        let modified = response.last_modified()?;
        Ok(Some(Head {
            etag: response.etag()?.to_string(),
            size: response.size()?,
            modified: modified.map(|time| time.to_string()).unwrap_or_default(),
        }))
    }

    pub async fn delete(&self, bucket: &str, key: &str) -> Result<()> {
        let gone = self.client.delete_object(bucket, key)?.build();
        in_time(gone.send()).await.map(drop)
    }

    /// Returns the keys under `prefix`, sorted.
    pub async fn list(&self, bucket: &str, prefix: &str) -> Result<Vec<String>> {
        let listed = self.list_etags(bucket, prefix).await?;
        Ok(listed.into_iter().map(|(key, _)| key).collect())
    }

    /// Returns the keys under `prefix` with their ETags, sorted.
    pub async fn list_etags(&self, bucket: &str, prefix: &str) -> Result<Vec<(String, String)>> {
        // HEAD's ETags come without the quotes.
        let unquoted = |entry: ListEntry| {
            let etag = entry.etag.unwrap_or_default();
            (entry.name, etag.trim_matches('"').to_string())
        };
        let listed = self.listed(bucket, prefix, false).await?;
        let mut keys: Vec<_> = listed.into_iter().map(unquoted).collect();
        keys.sort();
        Ok(keys)
    }

    /// Returns the keys under `prefix`, once for each version and each delete marker.
    pub async fn list_versions(&self, bucket: &str, prefix: &str) -> Result<Vec<String>> {
        let listed = self.listed(bucket, prefix, true).await?;
        Ok(listed.into_iter().map(|entry| entry.name).collect())
    }

    async fn listed(&self, bucket: &str, prefix: &str, versions: bool) -> Result<Vec<ListEntry>> {
        let mut pages = self
            .client
            .list_objects(bucket)?
            .recursive(true)
            .include_versions(versions)
            .prefix(Some(prefix.to_string()))
            .build()
            .to_stream()
            .await;
        let mut entries = Vec::new();
        while let Some(page) = pages.next().await {
            entries.extend(page?.contents);
        }
        Ok(entries)
    }
}

fn builder(endpoint: &str, key: &str, secret: &str) -> Result<MinioClientBuilder> {
    let mut url: BaseUrl = endpoint.parse()?;
    // Without this, every bucket is first asked for its region.
    url.region = Region::new("us-east-1")?;
    Ok(MinioClientBuilder::new(url).provider(Some(StaticProvider::new(key, secret, None))))
}

async fn next_part(chunks: &mut (impl Stream<Item = Bytes> + Unpin)) -> SegmentedBytes {
    let mut part = SegmentedBytes::new();
    while part.len() < PART {
        match chunks.next().await {
            Some(chunk) => part.append(chunk),
            None => break,
        }
    }
    part
}

/// Limits the time of a call, because the client has no limit of its own: a frozen server would
/// hang the test.
async fn in_time<T>(call: impl Future<Output = Result<T, MinioError>>) -> Result<T> {
    match tokio::time::timeout(Duration::from_secs(120), call).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err("no answer from the artifact store in 120 s".into()),
    }
}

fn found<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) => match error.downcast_ref() {
            Some(MinioError::S3Server(S3ServerError::S3Error(answer)))
                if matches!(answer.code(), MinioErrorCode::NoSuchKey) =>
            {
                Ok(None)
            }
            _ => Err(error),
        },
    }
}
