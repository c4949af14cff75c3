//! Lists a bucket, with one request for each page. Each page is tried like any request, and starts
//! where the page before ended.

use super::{Store, unquote};
use crate::cluster::s3::store::object::{Listed, Stored};
use crate::cluster::s3::store_error::{StoreError, StoreFault};
use futures_util::StreamExt;
use minio::s3::response::ListObjectsResponse;
use minio::s3::types::ToStream;

impl Store {
    /// Lists every object whose key begins with `prefix`, in pages; an incomplete listing is an
    /// error.
    pub async fn list(
        &self,
        prefix: &str,
        mut page: impl AsyncFnMut(Vec<Listed>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let doing = format!("listing bucket {}", self.bucket);
        let mut from: Option<String> = None;
        loop {
            let answer = self
                .persist(&doing, || self.one_page(&doing, prefix, from.clone()))
                .await?;
            let next = answer
                .is_truncated
                .then_some(answer.next_continuation_token);
            page(listed(answer.contents)).await?;
            match next {
                None => return Ok(()),
                Some(Some(next)) if from.as_ref() != Some(&next) => from = Some(next),
                // A request without a start would list from the beginning again, for ever.
                Some(_) => {
                    let text = "a page says that more follow, and not from where".to_string();
                    return Err(self.fault(&doing, StoreFault::Unexpected, text));
                }
            }
        }
    }

    async fn one_page(
        &self,
        doing: &str,
        prefix: &str,
        from: Option<String>,
    ) -> Result<ListObjectsResponse, StoreError> {
        let request = async {
            let listing = self
                .client
                .list_objects(self.bucket.clone())?
                .recursive(true)
                .prefix((!prefix.is_empty()).then(|| prefix.to_string()))
                .continuation_token(from)
                .build();
            // The stream's first item is the one page that was requested.
            match listing.to_stream().await.next().await {
                Some(answer) => answer.map(Some),
                None => Ok(None),
            }
        };
        let answer = self.once(doing, request).await?.flatten();
        answer.ok_or_else(|| {
            let text = "the server answered that there is no such key".to_string();
            self.fault(doing, StoreFault::Unexpected, text)
        })
    }
}

fn listed(entries: Vec<minio::s3::types::ListEntry>) -> Vec<Listed> {
    let objects = entries
        .into_iter()
        .filter(|entry| !entry.is_prefix && !entry.is_delete_marker);
    objects
        .map(|entry| Listed {
            key: entry.name,
            stored: Stored {
                bytes: entry.size.unwrap_or(0),
                etag: unquote(entry.etag.as_deref().unwrap_or("")),
            },
        })
        .collect()
}
