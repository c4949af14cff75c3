//! Proves the artifacts in the one bucket of both sites. Builder stores an object before it inserts
//! the row, so the object of a new row is there. Nothing is written.

use super::hashed::Hashed;
use super::inventory::Todo;
use super::round::ArtifactOutcome;
use crate::cluster::{LocalCluster, Store, StoreError, Throttle};
use crate::config::Config;
use crate::replication::error::ReplicationError;

#[derive(Clone)]
pub struct SharedBucket {
    pub store: Store,
    pub throttle: Throttle,
    hashed: Hashed,
}

impl SharedBucket {
    pub(super) fn open(config: &Config, throttle: &Throttle) -> Result<SharedBucket, StoreError> {
        Ok(SharedBucket {
            store: LocalCluster::of(config).reading_store()?,
            throttle: throttle.clone(),
            hashed: Hashed::within(throttle),
        })
    }

    /// Looks for the artifact. It is read and hashed once.
    pub(super) async fn ensure(&self, todo: &Todo) -> Result<ArtifactOutcome, ReplicationError> {
        let Some(stored) = self.store.head(&todo.key).await? else {
            return Ok(ArtifactOutcome::Missing);
        };
        Ok(
            match self.hashed.checksum(&self.store, todo, stored).await? {
                None => ArtifactOutcome::Missing,
                Some((found, stored)) if found == todo.checksum => {
                    ArtifactOutcome::Verified(stored)
                }
                Some((found, _)) => ArtifactOutcome::Damaged(found),
            },
        )
    }
}
