//! Reads artifacts of the clone's packages from the local bucket: some at random, or all.

use crate::cluster::{BuilderDb, LocalCluster, WriteSession};
use crate::config::Config;
use crate::domain::MissingReason;
use crate::observe::{Phase, Progress, Silent};
use crate::package::{PackageRow, package_of_key};
use crate::replication::ReplicationError;
use crate::verify::{ComparedArtifacts, Difference, Reading};
use std::collections::HashSet;
use std::sync::Arc;

const PAGE_ROWS: i64 = 1000;

/// Reads the artifacts. `unavailable` lists the artifacts that were known to be missing or damaged
/// on the primary when the clone was made.
pub(super) async fn read(
    config: &Config,
    inside: &WriteSession,
    unavailable: &[(String, MissingReason)],
    sample: Option<usize>,
) -> Result<(bool, String), ReplicationError> {
    let unavailable: HashSet<&str> = unavailable.iter().map(|(key, _)| key.as_str()).collect();
    let store = LocalCluster::of(config).reading_store()?;
    let step = Progress::new(Arc::new(Silent)).begin(Phase::Artifacts, 0);
    let mut reading = Reading::begin(config, inside, &store, step).await?;
    match sample {
        Some(number) => {
            // Unavailable artifacts may be among the drawn ones, so that number is drawn in
            // addition.
            let draw = number.saturating_add(unavailable.len());
            let draw = i64::try_from(draw).unwrap_or(i64::MAX);
            let rows = BuilderDb::of(inside).draw_packages(draw).await?;
            let drawn = rows.iter().filter_map(PackageRow::artifact);
            let drawn = drawn.filter(|(key, _)| !unavailable.contains(key.as_str()));
            for (key, checksum) in drawn.take(number) {
                reading.add(key, checksum).await?;
            }
        }
        None => read_all(inside, &unavailable, &mut reading).await?,
    }
    let mut compared = reading.finish().await?;
    if !compared.differences.is_empty() {
        compared.differences = still_named(config, inside, compared.differences).await?;
    }
    Ok(summary(&compared))
}

async fn read_all(
    inside: &WriteSession,
    unavailable: &HashSet<&str>,
    reading: &mut Reading,
) -> Result<(), ReplicationError> {
    let mut after = i64::MIN;
    while let Some((rows, last)) = BuilderDb::of(inside)
        .packages_after(after, PAGE_ROWS)
        .await?
    {
        after = last;
        // A row that names no possible artifact is recorded where it was copied.
        for (key, checksum) in rows.iter().filter_map(PackageRow::artifact) {
            if !unavailable.contains(key.as_str()) {
                reading.add(key, checksum).await?;
            }
        }
    }
    Ok(())
}

/// Keeps the differences that are real. The stream continues during a drill: if the visible
/// database no longer names an artifact, names it with other bytes, or has it as unavailable, a
/// difference from the clone's rows is right.
async fn still_named(
    config: &Config,
    inside: &WriteSession,
    differences: Vec<Difference>,
) -> Result<Vec<Difference>, ReplicationError> {
    let visible = LocalCluster::of(config).builder().await?;
    let unavailable = LocalCluster::of(config)
        .unavailable()
        .await?
        .unwrap_or_default();
    let mut remaining = Vec::new();
    for difference in differences {
        let known = unavailable.iter().any(|(key, _)| *key == difference.name);
        if !known && checksum(&visible, &difference).await? == checksum(inside, &difference).await?
        {
            remaining.push(difference);
        }
    }
    Ok(remaining)
}

async fn checksum(
    session: &WriteSession,
    difference: &Difference,
) -> Result<Option<String>, ReplicationError> {
    let Some((ident, target)) = package_of_key(&difference.name) else {
        return Ok(None);
    };
    let (ident, target) = (ident.to_string(), target.to_string());
    let checksums = BuilderDb::of(session).checksums_of(&ident, &target);
    Ok(checksums.await?.into_iter().next())
}

fn summary(compared: &ComparedArtifacts) -> (bool, String) {
    if compared.differences.is_empty() {
        let text = format!(
            "{} read, by checksum and signature ({} good, {} by keys that the database does not hold)",
            compared.checked, compared.signatures_good, compared.signatures_unknown
        );
        return (true, text);
    }
    let each = |d: &Difference| format!("{} {}", d.name, d.text);
    let lines: Vec<String> = compared.differences.iter().map(each).collect();
    (false, lines.join("; "))
}
