//! Notices another bucket, or another way in which artifacts come into it. Records about the objects
//! of a former bucket are never carried out in the new one.

use super::courier::Courier;
use super::replacements;
use crate::cluster::{ArtifactPlace, FormerRecords, LocalCluster, Lock, StateDb, Store, Throttle};
use crate::config::Config;
use crate::domain::EventKind;
use crate::replication::error::ReplicationError;
use std::time::Duration;

/// Number of known objects that are looked for under another address.
const SAMPLE: i64 = 20;
/// Time to wait for an answer about one of them, and number of tries: the check is made again soon.
const PATIENCE: Duration = Duration::from_secs(5);
const TRIES: usize = 2;

/// Compares the configured place with the recorded one. Returns whether its artifacts are not
/// proved: then a pass must prove all of them.
pub async fn has_unproved_place(
    config: &Config,
    state: &StateDb,
    lock: Lock,
) -> Result<bool, ReplicationError> {
    let now = configured(config);
    let before = state.artifact_place().await?;
    if let Some((recorded, proved)) = &before
        && *recorded == now
    {
        return Ok(!proved);
    }
    let local = LocalCluster::of(config);
    // Before the place was recorded, this program brought all artifacts.
    let mode = before
        .as_ref()
        .map_or("replicate", |(b, _)| b.mode.as_str());
    let has_other_name = before.as_ref().is_some_and(|(b, _)| b.bucket != now.bucket);
    let is_same_bucket = match &before {
        _ if has_other_name => false,
        Some((recorded, _)) if recorded.endpoint == now.endpoint => true,
        // A bucket of this name, under another address.
        _ => has_known_objects(state, &local.reading_store()?.with_limits(PATIENCE, TRIES)).await?,
    };
    // Under another address only a sample says that the bucket is the same one. That is not enough
    // to write over objects that are not ours.
    let is_certain = now.mode != "shared"
        || before
            .as_ref()
            .is_some_and(|(b, _)| b.endpoint == now.endpoint);
    if is_same_bucket
        && is_certain
        && mode == "replicate"
        && !state.replacements().await?.is_empty()
    {
        undo_what_was_begun(config, state, lock).await?;
    }
    let records = match (&before, is_same_bucket && mode == now.mode) {
        (None, true) => FormerRecords::Right,
        (Some(_), true) => FormerRecords::Hold,
        (_, false) => FormerRecords::Void,
    };
    let own = local.state().await?;
    own.move_artifacts(lock, &now, records).await?;
    if records != FormerRecords::Void {
        return Ok(records == FormerRecords::Hold);
    }
    let text = format!(
        "the artifacts are in bucket {} at {} now ({}); all of them are proved, and nothing that was planned for a former bucket is carried out",
        now.bucket, now.endpoint, now.mode
    );
    log::info!("local: {text}");
    if before.is_some() {
        own.event(EventKind::Artifacts, &text, &config.change)
            .await?;
    }
    Ok(true)
}

fn configured(config: &Config) -> ArtifactPlace {
    let mode = config.artifacts.mode.as_str();
    let s3 = &config.local.s3;
    ArtifactPlace {
        mode: mode.into(),
        endpoint: s3.endpoint.trim_end_matches('/').to_string(),
        bucket: s3.bucket_name.clone(),
    }
}

/// Returns whether the bucket has the objects that are recorded: most of them, because any one may
/// have been changed since. Nothing is recorded of a new cluster.
async fn has_known_objects(state: &StateDb, store: &Store) -> Result<bool, ReplicationError> {
    let known = state.some_artifacts(SAMPLE).await?;
    let mut same = 0;
    for object in &known {
        if store.head(&object.key).await?.as_ref() == Some(&object.stored) {
            same += 1;
        }
    }
    Ok(same * 2 >= known.len())
}

/// Restores the bytes that a killed process had begun to replace: nobody would know of them any
/// more. Returns the number of artifacts. The peer is not asked.
pub(crate) async fn undo_what_was_begun(
    config: &Config,
    state: &StateDb,
    lock: Lock,
) -> Result<usize, ReplicationError> {
    let local = LocalCluster::of(config);
    let courier = Courier::within(config, local.store_to_restore()?, &Throttle::new(None));
    let reached = local.lsn_at_rest().await?;
    replacements::undo((state, lock), &courier, reached).await
}
