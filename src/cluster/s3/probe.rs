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

/// A probe that could not be deleted. One process has one bucket, and runs one check at a time.
static LASTING: Mutex<Option<Lasting>> = Mutex::const_new(None);

#[derive(Clone)]
struct Lasting {
    bucket: String,
    key: String,
    /// A bucket that showed a change of the probe. Another change would leave another version.
    seen_in: Option<String>,
}

/// Number of looks that must find the change of the probe.
const LOOKS: usize = 2;

/// Returns whether the peer reads the bucket that we write. Then it has an object of ours, and has
/// each change of it at once. An object that the peer got from our bucket by the store's own
/// replication proves nothing.
pub(crate) async fn is_same_bucket(local: &LocalStore, peer: &Store) -> Result<bool, StoreError> {
    let mut lasting = LASTING.lock().await;
    let (here, there) = (place(local.reading()), place(peer));
    let kept = match lasting.as_ref().filter(|probe| probe.bucket == here) {
        Some(probe) if local.reading().head(&probe.key).await?.is_some() => Some(probe.clone()),
        _ => None,
    };
    let mut written = Vec::new();
    let key = match &kept {
        Some(probe) => probe.key.clone(),
        None => {
            let key = name(local);
            written.push(put(local, &key, Bytes::from_static(BODY)).await?);
            key
        }
    };
    let is_known = kept.is_some_and(|probe| probe.seen_in.as_ref() == Some(&there));
    let seen = match peer.etag_of_its_own(&key).await {
        Ok(Some(_)) if !is_known => shows_a_change(local, peer, &key, &mut written).await,
        found => found.map(|etag| etag.is_some()),
    };
    if take_away(local, &key, &written).await? == Keeps::Locked {
        *lasting = Some(Lasting {
            bucket: here,
            key,
            seen_in: matches!(seen, Ok(true)).then_some(there),
        });
    }
    seen
}

/// Writes the probe again with other bytes. Returns whether the peer has exactly these.
async fn shows_a_change(
    local: &LocalStore,
    peer: &Store,
    key: &str,
    written: &mut Vec<Written>,
) -> Result<bool, StoreError> {
    let line = format!("changed: {:016x}\n", unpredictable());
    let change = put(local, key, [BODY, line.as_bytes()].concat().into()).await?;
    let etag = change.stored.etag.clone();
    written.push(change);
    for _ in 0..LOOKS {
        if peer.etag_of_its_own(key).await?.as_ref() != Some(&etag) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Returns whether the local bucket accepts an object, and allows deleting it.
pub async fn prove_writable(local: &LocalStore) -> Result<Keeps, StoreError> {
    let mut lasting = LASTING.lock().await;
    let here = place(local.reading());
    if lasting.as_ref().is_some_and(|probe| probe.bucket == here) {
        // Another probe would stay too. A part of an aborted upload does not.
        let mut upload = local.start_upload(&name(local)).await?;
        let part = upload.part(Bytes::from_static(BODY)).await;
        upload.abort().await;
        return part.map(|()| Keeps::Locked);
    }
    let key = name(local);
    let written = put(local, &key, Bytes::from_static(BODY)).await?;
    let keeps = take_away(local, &key, &[written]).await?;
    if keeps == Keeps::Locked {
        *lasting = Some(Lasting {
            bucket: here,
            key,
            seen_in: None,
        });
    }
    Ok(keeps)
}

async fn put(local: &LocalStore, key: &str, body: Bytes) -> Result<Written, StoreError> {
    local.put_version(key, body, &Expected::Anything).await
}

/// Deletes what was written under the key.
async fn take_away(
    local: &LocalStore,
    key: &str,
    written: &[Written],
) -> Result<Keeps, StoreError> {
    let mut keeps = Keeps::Nothing;
    for written in written {
        let Some(version) = &written.version else {
            local.delete(key).await?;
            continue;
        };
        match local.delete_version(key, version).await {
            Ok(()) if keeps == Keeps::Nothing => keeps = Keeps::Versions,
            Ok(()) => {}
            Err(error) if error.is_transient() => return Err(error),
            Err(error) => {
                log::debug!("{error}; the probe stays");
                keeps = Keeps::Locked;
            }
        }
    }
    Ok(keeps)
}

fn place(store: &Store) -> String {
    format!("{}/{}", store.endpoint(), store.bucket())
}

fn name(local: &LocalStore) -> String {
    local.mark(&format!("probe-{:016x}", unpredictable()))
}

/// Returns a number that is random enough for a name that nobody else uses: the standard library
/// seeds its hash tables from the system.
pub(crate) fn unpredictable() -> u64 {
    std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish()
}
