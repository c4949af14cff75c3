//! The last look at the artifacts of the newest rows, before a takeover lifts the fence. Where this
//! program does not bring the artifacts, the primary or the provider may have replaced or deleted an
//! object whose row was not applied here any more.

use super::courier::hash;
use crate::cluster::{BuilderDb, LocalCluster, RecoveryPoint, SpareDb, StateDb, recorded_artifact};
use crate::config::Config;
use crate::domain::MissingReason;
use crate::package::Checksum;
use crate::replication::error::ReplicationError;
use chrono::TimeDelta;
use futures_util::{StreamExt, TryStreamExt};

/// Maximum number of rows that are looked at: clients wait for the takeover.
const ROWS: i64 = 1000;
/// Number of requests at once.
const MAX_REQUESTS: usize = 8;

/// Looks at the artifacts of the rows that were changed within `replication.rpo` before the recovery
/// point, and records those that are gone or changed as unavailable. Returns their keys.
pub async fn prove_once_more(
    config: &Config,
    state: &StateDb,
    point: &RecoveryPoint,
) -> Result<Vec<(String, MissingReason)>, ReplicationError> {
    let session = LocalCluster::of(config).builder().await?;
    let store = LocalCluster::of(config).store_at_this_site()?;
    let rpo = TimeDelta::from_std(config.replication.rpo).unwrap_or_default();
    let rows = BuilderDb::of(&session)
        .packages_changed_since(point.commit_time - rpo, ROWS)
        .await?;
    let spare = SpareDb::of(&session);
    let unavailable = spare.unavailable_bytes().await?;
    let artifacts = rows.iter().filter_map(|row| row.artifact());
    let artifacts: Vec<(String, Checksum)> = artifacts
        .filter(|(key, checksum)| !unavailable.contains(&(key.clone(), checksum.to_string())))
        .collect();
    let store = &store;
    let gone: Vec<(String, Checksum, MissingReason)> = futures_util::stream::iter(artifacts)
        .map(|(key, checksum)| async move {
            let Some(stored) = store.head(&key).await? else {
                return Ok::<_, ReplicationError>(Some((key, checksum, MissingReason::Missing)));
            };
            let known = recorded_artifact(state.session(), &key).await?;
            let is_known = known.is_some_and(|known| {
                known.checksum == checksum.to_string()
                    && (known.bytes, &known.etag) == (stored.bytes, &stored.etag)
            });
            if is_known {
                return Ok(None);
            }
            Ok(match hash(store, &key, None).await? {
                Some((found, _)) if found == checksum => None,
                Some(_) => Some((key, checksum, MissingReason::Damaged)),
                None => Some((key, checksum, MissingReason::Missing)),
            })
        })
        .buffer_unordered(MAX_REQUESTS)
        .try_filter_map(|gone| async move { Ok(gone) })
        .try_collect()
        .await?;
    let mut listed = Vec::new();
    for (key, checksum, reason) in gone {
        spare.record_unavailable(&key, &checksum, reason).await?;
        listed.push((key, reason));
    }
    Ok(listed)
}
