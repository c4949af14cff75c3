//! Writes a probe object into the local bucket: does the bucket accept objects, does it allow
//! deleting them, and is it another bucket than the peer's?
//!
//! A bucket that keeps every version of an object would keep every probe, so exactly the written
//! version is deleted. Where that is not allowed, one probe stays for as long as the process lives,
//! and is used again.

use super::store::{LocalStore, Store, Written};
use super::store_error::StoreError;
use crate::cluster::s3::store::object::Expected;
use bytes::Bytes;
use std::hash::{BuildHasher, Hasher};
use tokio::sync::Mutex;

const BODY: &[u8] =
    b"warm-spare looks whether it can write here, and whether its peer's bucket is its own\n";

/// How a bucket treats objects that are deleted or overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    Nothing,
    /// Keeps them as versions, which can be deleted.
    Versions,
    /// Keeps them as versions, which we may not delete: the bucket has a lock, or our key does not
    /// have the right.
    Locked,
}

/// A probe that could not be deleted: its bucket and its key. One process has one bucket, and runs
/// one check at a time.
static LASTING: Mutex<Option<(String, String)>> = Mutex::const_new(None);

/// Returns whether the peer has an object of ours: then it reads the same bucket. An object that
/// the peer got from our bucket by the store's own replication proves nothing.
pub(crate) async fn is_same_bucket(local: &LocalStore, peer: &Store) -> Result<bool, StoreError> {
    let mut lasting = LASTING.lock().await;
    let here = place(local);
    let mut probe = None;
    if let Some((_, key)) = lasting.as_ref().filter(|(place, _)| *place == here)
        && local.reading().head(key).await?.is_some()
    {
        probe = Some((key.clone(), None));
    }
    let (key, written) = match probe {
        Some(probe) => probe,
        None => {
            let key = name();
            let written = put(local, &key).await?;
            (key, Some(written))
        }
    };
    let seen = peer.has_of_its_own(&key).await;
    if let Some(written) = written
        && take_away(local, &key, written).await? == Keeps::Locked
    {
        *lasting = Some((here, key));
    }
    seen
}

/// Returns whether the local bucket accepts an object, and allows deleting it.
pub async fn prove_writable(local: &LocalStore) -> Result<Keeps, StoreError> {
    let mut lasting = LASTING.lock().await;
    let here = place(local);
    if lasting.as_ref().is_some_and(|(place, _)| *place == here) {
        // Another probe would stay too. A part of an aborted upload does not.
        let mut upload = local.start_upload(&name()).await?;
        let part = upload.part(Bytes::from_static(BODY)).await;
        upload.abort().await;
        return part.map(|()| Keeps::Locked);
    }
    let key = name();
    let written = put(local, &key).await?;
    let keeps = take_away(local, &key, written).await?;
    if keeps == Keeps::Locked {
        *lasting = Some((here, key));
    }
    Ok(keeps)
}

async fn put(local: &LocalStore, key: &str) -> Result<Written, StoreError> {
    let body = Bytes::from_static(BODY);
    local.put_version(key, body, &Expected::Anything).await
}

async fn take_away(local: &LocalStore, key: &str, written: Written) -> Result<Keeps, StoreError> {
    let Some(version) = written.version else {
        local.delete(key).await?;
        return Ok(Keeps::Nothing);
    };
    match local.delete_version(key, &version).await {
        Ok(()) => Ok(Keeps::Versions),
        Err(error) if error.is_transient() => Err(error),
        Err(error) => {
            log::debug!("{error}; the probe stays");
            Ok(Keeps::Locked)
        }
    }
}

fn place(local: &LocalStore) -> String {
    let store = local.reading();
    format!("{}/{}", store.endpoint(), store.bucket())
}

fn name() -> String {
    format!(".warm-spare/probe-{:016x}", unpredictable())
}

/// Returns a number that is random enough for a name that nobody else uses: the standard library
/// seeds its hash tables from the system.
pub(in crate::cluster) fn unpredictable() -> u64 {
    std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish()
}
