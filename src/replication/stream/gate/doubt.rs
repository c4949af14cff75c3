//! Answers of the primary's store about one object are believed only if the store proves to be the
//! right one.

use super::{Shared, item_of, named};
use crate::cluster::StoreError;
use crate::domain::ErrorCode;
use crate::replication::error::PassError;

impl Shared {
    /// Returns whether the fault is of the object: the primary's store refuses this object
    /// permanently and serves others, or a store can hold no such key. Then it is not a fault of
    /// the store.
    pub(super) async fn is_of_the_object(&self, error: &StoreError) -> bool {
        error.is_of_the_key()
            || error.may_be_of_the_object() && self.serves_others().await.unwrap_or_default()
    }

    async fn serves_others(&self) -> Result<bool, PassError> {
        for key in &self.known_keys().await? {
            match self.courier.peer.get(key).await {
                Ok(Some(_)) => return Ok(true),
                Ok(None) => {}
                // Any single object may be refused too.
                Err(error) if error.may_be_of_the_object() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }

    /// Checks, before "no such key" is believed, that the bucket still serves, and has one of the
    /// artifacts that local rows name.
    pub(super) async fn believe(&self) -> Result<(), PassError> {
        let peer = &self.courier.peer;
        peer.check_bucket().await?;
        let keys = self.known_keys().await?;
        for key in &keys {
            // Any single artifact may have been deleted since.
            if peer.head(key).await?.is_some() {
                return Ok(());
            }
        }
        let Some(example) = keys.first() else {
            return Ok(());
        };
        Err(PassError::Unfit {
            check: ErrorCode::MissingArtifacts,
            text: format!(
                "the peer's bucket {} does not have an artifact, nor {} others that it served before (for example {example})",
                peer.bucket(),
                keys.len(),
            ),
            next_step: "check peer.s3.endpoint and peer.s3.bucket_name; if the primary really lost them, remove their rows there".into(),
        })
    }

    /// Returns artifacts that local rows name, and that the primary has served once.
    async fn known_keys(&self) -> Result<Vec<String>, PassError> {
        let doing = "choosing known artifacts";
        let columns = "SELECT ident, target, checksum FROM public.origin_packages";
        let some = format!("{columns} TABLESAMPLE SYSTEM (10) LIMIT 20");
        let mut rows = self.rows.query(doing, &some, &[]).await?;
        if rows.is_empty() {
            let latest = format!("{columns} ORDER BY id DESC LIMIT 20");
            rows = self.rows.query(doing, &latest, &[]).await?;
        }
        let keys = rows
            .iter()
            .filter_map(|row| item_of(&named(row, 0)).map(|item| item.key));
        Ok(keys.collect())
    }
}
