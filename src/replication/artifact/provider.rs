//! Waits for the artifacts that the provider of the bucket replicates: S3's or MinIO's own rules,
//! or a replicated file system. Nothing is written here, but with `artifacts.fill` the artifacts
//! that the provider never brings.

use super::courier::{Courier, hash};
use super::hashed::Hashed;
use super::inventory::Todo;
use super::round::{ArtifactOutcome, deliver};
use crate::cluster::{
    Expected, LocalCluster, PeerCluster, ReplicationStatus, Source, Store, StoreError, Stored,
    Throttle,
};
use crate::config::Config;
use crate::package::Checksum;
use crate::replication::error::ReplicationError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Clone)]
pub struct Provider {
    pub local: Store,
    pub peer: Store,
    pub throttle: Throttle,
    /// Copies the artifacts that the provider never brings. None: they are listed.
    filler: Option<Courier>,
    arrival_limit: Duration,
    /// True: the primary's bucket has a rule, because some object had a status of it.
    has_rule: Arc<AtomicBool>,
    /// Objects that were hashed, so that an older version is not read at every look.
    hashed: Hashed,
    opened: Instant,
}

impl Provider {
    pub(super) fn open(config: &Config, throttle: &Throttle) -> Result<Provider, StoreError> {
        Ok(Provider {
            local: LocalCluster::of(config).reading_store()?,
            peer: PeerCluster::of(config).store()?,
            throttle: throttle.clone(),
            filler: Courier::to_fill(config, throttle)?,
            arrival_limit: config.artifacts.arrival_limit,
            has_rule: Arc::default(),
            hashed: Hashed::within(throttle),
            opened: Instant::now(),
        })
    }

    /// Looks for the artifact in the local bucket. It is read and hashed once. `is_given_up`: it was
    /// decided before that the provider never brings it.
    pub(super) async fn ensure(
        &self,
        todo: &Todo,
        is_given_up: bool,
    ) -> Result<ArtifactOutcome, ReplicationError> {
        let here = self.look(todo).await?;
        if let Some((found, stored)) = &here
            && *found == todo.checksum
        {
            return Ok(ArtifactOutcome::Verified(stored.clone()));
        }
        let Some(source) = self.peer.source(&todo.key).await? else {
            return Ok(ArtifactOutcome::Missing);
        };
        let is_replicated = here
            .as_ref()
            .is_some_and(|(_, stored)| *stored == source.stored);
        if is_replicated {
            // The provider has done its part, so the bytes are wrong on the primary, or were
            // changed here.
            match hash(&self.peer, &todo.key, Some(&self.throttle)).await? {
                Some((found, _)) if found != todo.checksum => {
                    return Ok(ArtifactOutcome::Damaged(found));
                }
                Some(_) => {}
                None => return Ok(ArtifactOutcome::Missing),
            }
        }
        if !is_replicated && !is_given_up && !self.never_arrives(&source) {
            return Ok(ArtifactOutcome::Awaited);
        }
        // Bytes that the visible row names stay until the row of the new ones is visible: then the
        // artifact is tried again.
        let in_place = here.is_none() || todo.visible == Some(todo.checksum);
        match self.filler.as_ref().filter(|_| in_place) {
            Some(courier) => {
                let expected = Expected::as_found(here.as_ref().map(|(_, stored)| stored));
                deliver(courier, todo, &todo.key, &expected).await
            }
            None => Ok(ArtifactOutcome::NotReplicated),
        }
    }

    /// Returns the present object and its checksum. The object may have arrived since the listing,
    /// so the store is asked once more.
    async fn look(&self, todo: &Todo) -> Result<Option<(Checksum, Stored)>, StoreError> {
        let stored = match self.local.source(&todo.key).await {
            Ok(Some(source)) => {
                if source.status == ReplicationStatus::Replica {
                    self.has_rule.store(true, Ordering::Relaxed);
                }
                source.stored
            }
            Ok(None) => return Ok(None),
            // The status is of no use here, and a proxy may refuse the question for it.
            Err(_) => match self.local.head(&todo.key).await? {
                Some(stored) => stored,
                None => return Ok(None),
            },
        };
        self.hashed.checksum(&self.local, todo, stored).await
    }

    /// Returns whether the provider will not bring the object: its rule failed, or is not for this
    /// object, or has had enough time.
    fn never_arrives(&self, source: &Source) -> bool {
        use ReplicationStatus::{Absent, Completed, Failed, Pending, Replica};
        // A store that tells no age has had the time since this wait began.
        let age = source.age.unwrap_or_else(|| self.opened.elapsed());
        let late = age > self.arrival_limit;
        match source.status {
            Pending | Completed => {
                self.has_rule.store(true, Ordering::Relaxed);
                late
            }
            Failed => true,
            Absent | Replica => late || self.has_rule.load(Ordering::Relaxed),
        }
    }
}
