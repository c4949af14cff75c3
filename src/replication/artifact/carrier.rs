//! The ways in which artifacts come into the local bucket: this program copies them, the provider of
//! the bucket does, or both sites use one bucket.

use super::courier::Courier;
use super::inventory::Todo;
use super::provider::Provider;
use super::round::{ArtifactOutcome, ensure_artifact};
use super::shared::SharedBucket;
use crate::cluster::{Store, StoreError, Throttle};
use crate::config::{ArtifactsMode, Config};
use crate::domain::MissingReason;
use crate::replication::error::ReplicationError;

/// One way for `artifacts.mode`.
#[derive(Clone)]
pub enum Carrier {
    /// `replicate`: this program copies.
    Courier(Box<Courier>),
    /// `external`: the provider copies, and this program waits.
    Provider(Box<Provider>),
    /// `shared`: the artifacts of the primary are in the same bucket, and this program looks.
    Shared(Box<SharedBucket>),
}

impl Carrier {
    /// Opens both stores. No request is sent.
    pub fn open(config: &Config, throttle: &Throttle) -> Result<Carrier, StoreError> {
        if let Some(courier) = Courier::open(config, throttle)? {
            return Ok(Carrier::Courier(Box::new(courier)));
        }
        Ok(match config.artifacts.mode {
            ArtifactsMode::Shared => {
                Carrier::Shared(Box::new(SharedBucket::open(config, throttle)?))
            }
            ArtifactsMode::External | ArtifactsMode::Replicate => {
                Carrier::Provider(Box::new(Provider::open(config, throttle)?))
            }
        })
    }

    /// Returns the courier, which alone may replace and delete. None: the objects are not
    /// ours to write.
    pub fn courier(&self) -> Option<&Courier> {
        match self {
            Carrier::Courier(courier) => Some(courier),
            Carrier::Provider(_) | Carrier::Shared(_) => None,
        }
    }

    pub fn local(&self) -> &Store {
        match self {
            Carrier::Courier(courier) => courier.local.reading(),
            Carrier::Provider(provider) => &provider.local,
            Carrier::Shared(shared) => &shared.store,
        }
    }

    pub fn peer(&self) -> &Store {
        match self {
            Carrier::Courier(courier) => &courier.peer,
            Carrier::Provider(provider) => &provider.peer,
            Carrier::Shared(shared) => &shared.store,
        }
    }

    pub fn throttle(&self) -> &Throttle {
        match self {
            Carrier::Courier(courier) => &courier.throttle,
            Carrier::Provider(provider) => &provider.throttle,
            Carrier::Shared(shared) => &shared.throttle,
        }
    }

    /// Returns how many of `copies` artifacts at once both stores shall serve now.
    pub fn at_once(&self, copies: usize) -> usize {
        let peer = self.peer().at_once(copies);
        peer.min(self.local().at_once(copies))
    }

    /// Proves that one artifact is here, or brings it.
    pub(crate) async fn ensure(&self, todo: &Todo) -> Result<ArtifactOutcome, ReplicationError> {
        match self {
            Carrier::Courier(courier) => ensure_artifact(courier, todo).await,
            Carrier::Provider(provider) => provider.ensure(todo, false).await,
            Carrier::Shared(shared) => shared.ensure(todo).await,
        }
    }

    /// Does the same for an artifact that is recorded as unavailable.
    pub(crate) async fn ensure_again(
        &self,
        todo: &Todo,
        recorded: MissingReason,
    ) -> Result<ArtifactOutcome, ReplicationError> {
        match self {
            Carrier::Courier(courier) => ensure_artifact(courier, todo).await,
            Carrier::Provider(provider) => {
                let is_given_up = recorded == MissingReason::NotReplicated;
                provider.ensure(todo, is_given_up).await
            }
            Carrier::Shared(shared) => shared.ensure(todo).await,
        }
    }
}
