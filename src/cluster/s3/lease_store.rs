//! The lease object: reading, and writing on condition.
//!
//! A write names the object that it replaces by its ETag. The store makes one order of all writes
//! of one key, so of several writers with the same ETag one wins.

use super::probe::unpredictable;
use super::store::object::{Expected, Stored};
use super::store::{LocalStore, ReplicationStatus, Store};
use super::store_error::{StoreError, StoreFault};
use crate::domain::Lease;
use bytes::Bytes;
use futures_util::future::join_all;
use std::time::Duration;
use tokio::sync::Mutex;

const KEY: &str = ".warm-spare/lease.json";
/// Maximum number of bytes of the object; a longer one is not a lease.
const MAX_BYTES: usize = 64 << 10;
/// Number of tries to read one whole object while it is replaced again and again.
const READS: usize = 5;
/// Number of writers that race in the proof of conditional writes.
const RACERS: usize = 16;

/// The address of the last store that was seen to honour conditions.
static PROVED: Mutex<Option<String>> = Mutex::const_new(None);

/// The store of the lease. A holder begins to renew after a third of the lease's life. With a sixth
/// for each answer, a read, a write and one more read end before that life does.
#[derive(Clone)]
pub struct LeaseStore(LocalStore);

/// The object as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeenLease {
    Absent,
    /// The object is no lease, and why.
    Garbage(String, FoundObject),
    Found(Box<Lease>, FoundObject),
}

/// Identifies the object that a write replaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundObject(String);

/// The result of a conditional write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WroteLease {
    /// It is written, as this object.
    Written(FoundObject),
    /// Another object is there.
    Lost,
}

impl LeaseStore {
    pub(in crate::cluster) fn new(store: LocalStore, ttl: Duration) -> LeaseStore {
        LeaseStore(store.with_limits(ttl / 6, 1))
    }

    /// Returns a random word for one write.
    pub fn nonce() -> String {
        format!("{:016x}{:016x}", unpredictable(), unpredictable())
    }

    /// Returns the object's address, for messages.
    pub fn address(&self) -> String {
        let store = self.0.reading();
        format!("{KEY} in bucket {} at {}", store.bucket(), store.endpoint())
    }

    pub async fn read(&self) -> Result<SeenLease, StoreError> {
        read(self.0.reading()).await
    }

    /// Reads the object of the same key through the peer's address.
    pub async fn read_at(&self, peer: &Store) -> Result<SeenLease, StoreError> {
        read(peer).await
    }

    /// Returns whether the object came from another bucket by the provider's replication.
    pub async fn is_copy(&self) -> Result<bool, StoreError> {
        self.is_copy_at(self.0.reading()).await
    }

    /// Returns the same of the object at the peer's address.
    pub async fn is_copy_at(&self, peer: &Store) -> Result<bool, StoreError> {
        let source = peer.source(KEY).await?;
        Ok(source.is_some_and(|source| source.status == ReplicationStatus::Replica))
    }

    /// Writes the lease in place of that object; None: where no object is. An answer that was lost
    /// is found out by the nonce.
    pub async fn write(
        &self,
        lease: &Lease,
        replaced: Option<&FoundObject>,
    ) -> Result<WroteLease, StoreError> {
        let expected = match replaced {
            Some(FoundObject(etag)) => Expected::Etag(etag.clone()),
            None => Expected::Nothing,
        };
        match put(&self.0, KEY, lease.to_json(), &expected).await {
            Ok(Some(etag)) => Ok(WroteLease::Written(FoundObject(etag))),
            Ok(None) => Ok(self.own(lease).await?.unwrap_or(WroteLease::Lost)),
            // Written or not: only the object tells.
            Err(error) => match self.own(lease).await {
                Ok(Some(own)) => Ok(own),
                _ => Err(error),
            },
        }
    }

    /// Returns the object if it is this very write.
    async fn own(&self, lease: &Lease) -> Result<Option<WroteLease>, StoreError> {
        Ok(match self.read().await? {
            SeenLease::Found(found, at) if found.nonce == lease.nonce => {
                Some(WroteLease::Written(at))
            }
            _ => None,
        })
    }

    /// Proves that the store honours the conditions of writes: of several writers at once exactly
    /// one wins, and nothing replaces an object that is not there. Returns the fault in words; None:
    /// it does. The objects of the proof are deleted again.
    ///
    /// One proof holds for the life of the process: a bucket that keeps versions keeps its objects.
    pub async fn broken_conditions(&self) -> Result<Option<String>, StoreError> {
        let mut proved = PROVED.lock().await;
        if proved.as_ref() == Some(&self.address()) {
            return Ok(None);
        }
        let key = format!("{KEY}.proof-{:016x}", unpredictable());
        let broken = self.race(&key).await;
        let deleted = self.0.delete(&key).await;
        let broken = broken?;
        deleted?;
        if broken.is_none() {
            *proved = Some(self.address());
        }
        Ok(broken)
    }

    async fn race(&self, key: &str) -> Result<Option<String>, StoreError> {
        let absent = Expected::Etag("00000000000000000000000000000000".into());
        if put(&self.0, key, unique(0), &absent).await?.is_some() {
            return Ok(Some(
                "it accepts If-Match for an object that is not there".into(),
            ));
        }
        let mut condition = ("If-None-Match", Expected::Nothing);
        for next in [true, false] {
            let (name, expected) = &condition;
            let racers = (0..RACERS).map(|racer| put(&self.0, key, unique(racer), expected));
            let mut winners = Vec::new();
            for answer in join_all(racers).await {
                winners.extend(answer?);
            }
            if winners.len() != 1 {
                return Ok(Some(format!(
                    "of {RACERS} writers with the same {name}, {} were told that they won",
                    winners.len()
                )));
            }
            if next {
                condition = ("If-Match", Expected::Etag(winners.remove(0)));
            }
        }
        Ok(None)
    }
}

/// Returns a body that no other racer has: equal bytes have an equal ETag.
fn unique(racer: usize) -> String {
    format!("{racer} {:016x}", unpredictable())
}

/// Returns the ETag of what was written; None: the store refused the condition.
async fn put(
    store: &LocalStore,
    key: &str,
    body: String,
    expected: &Expected,
) -> Result<Option<String>, StoreError> {
    match store.put_once(key, Bytes::from(body), expected).await {
        Ok(Some(Stored { etag, .. })) => Ok(Some(etag)),
        // No such key is a refusal of If-Match.
        Ok(None) => Ok(None),
        Err(error) if error.fault == StoreFault::Changed || error.is_write_conflict() => Ok(None),
        Err(error) => Err(error),
    }
}

async fn read(store: &Store) -> Result<SeenLease, StoreError> {
    let mut last = None;
    for _ in 0..READS {
        let Some(mut body) = store.get(KEY).await? else {
            return Ok(SeenLease::Absent);
        };
        let at = FoundObject(body.stored.etag.clone());
        if body.stored.bytes > MAX_BYTES as u64 {
            let text = format!("it has {} bytes", body.stored.bytes);
            return Ok(SeenLease::Garbage(text, at));
        }
        let mut text = Vec::new();
        let whole = loop {
            match body.next().await {
                Ok(Some(bytes)) => text.extend_from_slice(&bytes),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        match whole {
            Ok(()) => {
                return Ok(match Lease::parse(&text) {
                    Ok(lease) => SeenLease::Found(Box::new(lease), at),
                    Err(why) => SeenLease::Garbage(why, at),
                });
            }
            // It was replaced while it was read.
            Err(error) if error.fault == StoreFault::Changed => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.expect("each try has failed"))
}
