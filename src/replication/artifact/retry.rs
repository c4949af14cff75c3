//! Tries again to copy artifacts that the primary did not have or had damaged: they may have been
//! uploaded again.

use super::carrier::Carrier;
use super::inventory::Todo;
use super::round::ArtifactOutcome;
use crate::cluster::{Artifact, LocalCluster, Lock, SpareDb, Unavailable};
use crate::config::Config;
use crate::domain::MissingReason;
use crate::package::Checksum;
use crate::replication::error::ReplicationError;

/// Returns how many are here now. The visible database names these bytes under these keys, so they
/// are stored in place. `claim` reserves a key in the meantime; None: another task works on the
/// key.
pub async fn retry_unavailable<C>(
    config: &Config,
    lock: Lock,
    carrier: &Carrier,
    claim: impl Fn(&str) -> Option<C>,
) -> Result<usize, ReplicationError> {
    let state = LocalCluster::of(config).state().await?;
    let session = LocalCluster::of(config).builder().await?;
    let (mut brought, mut failed) = (0, None);
    let spare = SpareDb::of(&session);
    for item in spare.unavailable().await?.iter().filter_map(Recorded::of) {
        let Some(_claim) = claim(&item.key) else {
            continue;
        };
        // Before the key was reserved, its row may have been removed, or changed to name other
        // bytes.
        let now = spare.unavailable_at(&item.key).await?;
        if now.as_ref().and_then(Recorded::of).as_ref() != Some(&item) {
            continue;
        }
        let todo = Todo {
            key: item.key.clone(),
            checksum: item.checksum,
            present: carrier.local().head(&item.key).await?,
            known: None,
            visible: Some(item.checksum),
        };
        state.still_ours(lock).await?;
        let stored = match carrier.ensure_again(&todo, item.reason).await {
            Ok(ArtifactOutcome::Copied(stored) | ArtifactOutcome::Verified(stored)) => stored,
            Ok(_) => continue,
            // An object that is recorded as refused is still refused; others may be available
            // again.
            Err(ReplicationError::Store(error)) if error.may_be_of_the_object() && item.refused => {
                continue;
            }
            // An object that always fails does not keep the others waiting.
            Err(error) => {
                failed.get_or_insert(error);
                continue;
            }
        };
        state.still_ours(lock).await?;
        state
            .record_artifacts(&[Artifact {
                key: item.key.clone(),
                checksum: item.checksum.to_string(),
                bytes: stored.bytes,
                etag: stored.etag,
            }])
            .await?;
        spare
            .forget_unavailable_bytes(&item.key, &item.checksum)
            .await?;
        brought += 1;
    }
    match failed {
        Some(error) if brought == 0 => Err(error),
        Some(error) => {
            log::warn!("copying an unavailable artifact failed, and is tried again later: {error}");
            Ok(brought)
        }
        None => Ok(brought),
    }
}

#[derive(PartialEq, Eq)]
struct Recorded {
    key: String,
    checksum: Checksum,
    reason: MissingReason,
    /// True: a store refused to give it out or to take it.
    refused: bool,
}

impl Recorded {
    /// None: its row names no possible artifact.
    fn of(item: &Unavailable) -> Option<Recorded> {
        if item.reason == MissingReason::Unsound {
            return None;
        }
        Some(Recorded {
            key: item.key.clone(),
            checksum: item.checksum.parse().ok()?,
            reason: item.reason,
            refused: [MissingReason::Unreadable, MissingReason::Unstorable].contains(&item.reason),
        })
    }
}
