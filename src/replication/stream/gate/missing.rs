//! Decides whether an artifact is missing on the primary, for the gate of the stream: the store must
//! prove to be the right one first.

use super::Shared;
use crate::cluster::{BuilderDb, StoreError};
use crate::package::PackageRow;
use crate::replication::artifact::missing;
use crate::replication::error::ReplicationError;

impl Shared {
    /// Returns whether the fault is of the object: the primary's store refuses this object
    /// permanently and serves others, or a store can hold no such key. Then it is not a fault of
    /// the store.
    pub(super) async fn is_of_the_object(&self, error: &StoreError) -> bool {
        error.is_of_the_key()
            || error.may_be_of_the_object() && self.serves_others().await.unwrap_or_default()
    }

    async fn serves_others(&self) -> Result<bool, ReplicationError> {
        let served = self.known_keys().await?;
        Ok(missing::serves_others(self.carrier.peer(), &served).await?)
    }

    /// Checks, before "no such key" is believed, that the bucket still serves, and has one of the
    /// artifacts that local rows name.
    pub(super) async fn believe(&self) -> Result<(), ReplicationError> {
        let served = self.known_keys().await?;
        missing::bucket_is_right(self.carrier.peer(), &served).await
    }

    /// Returns artifacts that local rows name, and that the primary has served once.
    async fn known_keys(&self) -> Result<Vec<String>, ReplicationError> {
        let rows = BuilderDb::of(&self.rows).some_packages().await?;
        let keys = rows.iter().filter_map(PackageRow::artifact);
        let keys = keys.map(|(key, _)| key);
        Ok(keys.collect())
    }
}
