//! Looks whether a store has the artifacts of the local rows: is it the shared file system, with its
//! newest files?

use super::courier::hash;
use crate::cluster::{BuilderDb, LocalCluster, SpareDb, Store};
use crate::config::Config;
use crate::package::PackageRow;
use crate::replication::error::ReplicationError;
use futures_util::{StreamExt, TryStreamExt};
use std::collections::HashSet;

/// Number of the newest rows whose artifacts must all be there.
const NEWEST: i64 = 1000;
/// Number of artifacts, drawn by chance, that are read and hashed.
const HASHED: i64 = 200;
/// Number of requests at once.
const MAX_REQUESTS: usize = 8;

/// Returns what the store has not, in words. None: it has the artifacts.
pub async fn absent_from(
    config: &Config,
    store: &Store,
) -> Result<Option<String>, ReplicationError> {
    let session = LocalCluster::of(config).builder().await?;
    let rows = BuilderDb::of(&session);
    let unavailable = SpareDb::of(&session).unavailable_reasons().await?;
    let unavailable: HashSet<String> = unavailable.into_iter().map(|(key, _)| key).collect();
    let named = |rows: Vec<PackageRow>| {
        let artifacts = rows.into_iter().filter_map(|row| row.artifact());
        artifacts
            .filter(|(key, _)| !unavailable.contains(key))
            .collect::<Vec<_>>()
    };
    let newest = named(rows.newest_packages(NEWEST).await?);
    let looked_for = newest.len();
    let absent: Vec<String> = futures_util::stream::iter(newest)
        .map(|(key, _)| async move {
            let there = store.head(&key).await?;
            Ok::<_, ReplicationError>(there.is_none().then_some(key))
        })
        .buffer_unordered(MAX_REQUESTS)
        .try_filter_map(|absent| async move { Ok(absent) })
        .try_collect()
        .await?;
    if let Some(key) = absent.first() {
        return Ok(Some(format!(
            "{} of the newest {looked_for} artifacts are not there, for example {key}",
            absent.len()
        )));
    }
    // An artifact that was never hashed may be damaged for another reason.
    let mut drawn = named(rows.draw_packages(HASHED).await?);
    let keys: Vec<String> = drawn.iter().map(|(key, _)| key.clone()).collect();
    let state = LocalCluster::of(config).state().await?;
    let unproven = state.unproven_among(&keys).await?;
    drawn.retain(|(key, _)| !unproven.contains(key));
    let wrong: Vec<String> = futures_util::stream::iter(drawn)
        .map(|(key, checksum)| async move {
            let found = hash(store, &key, None).await?;
            let is_right = found.is_some_and(|(found, _)| found == checksum);
            Ok::<_, ReplicationError>((!is_right).then_some(key))
        })
        .buffer_unordered(MAX_REQUESTS)
        .try_filter_map(|wrong| async move { Ok(wrong) })
        .try_collect()
        .await?;
    Ok(wrong.first().map(|key| {
        format!(
            "{} artifacts have other bytes than their rows say, for example {key}",
            wrong.len()
        )
    }))
}
