//! One request for the facts about an object that probably is not there.

use super::{Store, length_of, object};
use crate::cluster::s3::store::object::Stored;
use crate::cluster::s3::store_error::{StoreError, StoreFault};
use http::HeaderMap;
use minio::s3::response_traits::HasS3Fields;
use minio::s3::types::S3Api;

impl Store {
    /// Returns the facts about an object like [`Store::head`]. It asks for the first byte, and needs
    /// one request where `head` needs a second one to believe a 404.
    pub async fn peek(&self, key: &str) -> Result<Option<Stored>, StoreError> {
        let doing = format!("asking for {key}");
        let asked = self.persist(&doing, || self.first_byte(&doing, key)).await;
        match asked {
            // An empty object has no first byte, and a key may be impossible.
            Err(error) if !error.is_transient() => self.head(key).await,
            asked => asked,
        }
    }

    async fn first_byte(&self, doing: &str, key: &str) -> Result<Option<Stored>, StoreError> {
        let asked = async {
            let get = self.client.get_object(self.bucket.clone(), object(key)?)?;
            let answer = get.offset(Some(0)).length(Some(1)).build().send().await?;
            let headers = answer.headers().clone();
            if headers.contains_key("content-range") {
                // The connection can be used again when its answer is read.
                answer.into_bytes().await?;
            }
            Ok(headers)
        };
        let Some(headers) = self.once(doing, asked).await? else {
            return Ok(None);
        };
        let bytes = total_of(&headers).ok_or_else(|| {
            let text = "the answer does not give the object's length".to_string();
            self.fault(doing, StoreFault::Unexpected, text)
        })?;
        let etag = self.etag_of(doing, &headers)?;
        Ok(Some(Stored { bytes, etag }))
    }
}

/// Returns the length of the whole object. A server that does not know parts sends all of it.
fn total_of(headers: &HeaderMap) -> Option<u64> {
    let Some(part) = headers.get("content-range") else {
        return length_of(headers);
    };
    let (_, total) = part.to_str().ok()?.rsplit_once('/')?;
    total.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_that_of_the_whole_object() {
        let of = |headers: &[(&'static str, &'static str)]| {
            let mut all = HeaderMap::new();
            for (name, value) in headers {
                all.insert(*name, value.parse().expect("a header's value"));
            }
            total_of(&all)
        };
        let part = ("content-length", "1");
        assert_eq!(of(&[part, ("content-range", "bytes 0-0/70")]), Some(70));
        assert_eq!(of(&[part, ("content-range", "bytes 0-0/*")]), None);
        assert_eq!(of(&[("content-length", "70")]), Some(70));
        assert_eq!(of(&[]), None);
    }
}
