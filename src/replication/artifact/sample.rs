//! Looks in the local bucket for a sample of the artifacts that the visible rows name: the newest,
//! the oldest, and some at random. The cost does not grow with the number of artifacts, and a
//! bucket that was emptied, replaced or thinned out is noticed. An artifact that was found absent
//! is looked for each time until it is seen again, or no row names it any more, so that two samples
//! do not contradict each other because chance chose other rows.

use crate::cluster::{AbsentArtifact, BuilderDb, LocalCluster, SpareDb, StoreError, StoreFault};
use crate::config::Config;
use crate::domain::{Sampled, Side};
use crate::package::PackageRow;
use crate::replication::error::ReplicationError;
use futures_util::StreamExt;
use std::collections::HashSet;
use std::time::Duration;

/// Number of HEAD requests at once.
const MAX_REQUESTS: usize = 8;
/// Number of tries for each artifact. It is small, because the next sample comes soon.
const TRIES: usize = 2;

/// Takes a sample. None: the visible database has none of our tables.
pub async fn sample(
    config: &Config,
    patience: Duration,
) -> Result<Option<Sampled>, ReplicationError> {
    let Some(session) = LocalCluster::of(config).builder_if_there().await? else {
        return Ok(None);
    };
    let rows = BuilderDb::of(&session);
    if !rows.has_packages().await? || !SpareDb::of(&session).exists().await? {
        return Ok(None);
    }
    let sample = rows.sample_packages().await?;
    let state = LocalCluster::of(config).existing_state().await?;
    let known = match &state {
        Some(state) => state.absent().await?,
        None => Vec::new(),
    };
    let idents: Vec<&str> = known.iter().map(|absent| absent.ident.as_str()).collect();
    let targets: Vec<&str> = known.iter().map(|absent| absent.target.as_str()).collect();
    let mut chosen = rows.packages_named(&idents, &targets).await?;
    chosen.extend(sample);
    let mut twice = HashSet::new();
    // A row that names no possible artifact is reported elsewhere.
    let chosen = chosen.into_iter().filter_map(|row| {
        let (key, _) = row.artifact()?;
        twice.insert(key.clone()).then_some((row, key))
    });
    let chosen: Vec<(PackageRow, String)> = chosen.collect();
    let store = LocalCluster::of(config)
        .reading_store()?
        .with_limits(patience, TRIES);
    let looked_for = chosen.len();
    let mut looks = futures_util::stream::iter(chosen)
        .map(|(row, key)| async {
            let there = store.head(&key).await;
            (row, key, there)
        })
        .buffer_unordered(MAX_REQUESTS);
    let mut absent = Vec::new();
    while let Some((row, key, there)) = looks.next().await {
        if there?.is_none() {
            absent.push((row, key));
        }
    }
    drop(looks);
    let mut sampled = Sampled {
        looked_for,
        absent: Vec::new(),
    };
    let mut still_absent = Vec::new();
    for (row, key) in absent {
        if SpareDb::of(&session).is_expected(&row, &key).await? {
            sampled.absent.push(key.clone());
            still_absent.push(AbsentArtifact {
                key,
                ident: row.ident,
                target: row.target,
            });
        }
    }
    sampled.absent.sort();
    let gone = known.into_iter().map(|absent| absent.key);
    let gone: Vec<String> = gone.filter(|key| !sampled.absent.contains(key)).collect();
    if let Some(state) = &state {
        state.note_absent(&still_absent, &gone).await?;
    }
    Ok(Some(sampled))
}

/// Returns the error for a sample of the local bucket that did not end in time.
pub fn not_in_time(config: &Config, limit: Duration) -> ReplicationError {
    ReplicationError::Store(StoreError {
        side: Side::Local,
        endpoint: config.local.s3.endpoint.clone(),
        proxy: None,
        doing: "looking for a sample of the artifacts".into(),
        fault: StoreFault::Unreachable,
        text: format!("not done within {}", humantime::format_duration(limit)),
        wait: None,
    })
}
