//! Reads artifacts of the clone's packages from the local bucket: some at random, or all.

use crate::cluster::{LocalSession, LocalStore, RawRow};
use crate::config::Config;
use crate::observe::{Phase, Progress, Silent};
use crate::package::{Checksum, Ident, Target, object_key, package_of_key};
use crate::replication::{PassError, unavailable_here};
use crate::verify::{ComparedArtifacts, Difference, Reading};
use std::collections::HashSet;
use std::sync::Arc;

const PAGE_ROWS: i64 = 1000;

/// An artifact, as a row names it.
struct Named {
    key: String,
    checksum: Checksum,
}

/// Reads the artifacts. `unavailable` lists the artifacts that were known to be missing or damaged
/// on the primary when the clone was made.
pub(super) async fn read(
    config: &Config,
    inside: &LocalSession,
    unavailable: &[(String, String)],
    sample: Option<usize>,
) -> Result<(bool, String), PassError> {
    let unavailable: HashSet<&str> = unavailable.iter().map(|(key, _)| key.as_str()).collect();
    let store = LocalStore::open(&config.local.s3)?;
    let step = Progress::new(Arc::new(Silent)).begin(Phase::Artifacts, 0);
    let mut reading = Reading::begin(config, inside, &store, step).await?;
    match sample {
        Some(number) => {
            // Unavailable artifacts may be among the drawn ones, so that number is drawn in
            // addition.
            let draw = number.saturating_add(unavailable.len());
            let sql = "SELECT ident::text, target::text, checksum::text FROM public.origin_packages \
                       ORDER BY random() LIMIT $1";
            let draw = i64::try_from(draw).unwrap_or(i64::MAX);
            let rows = inside.query("drawing packages", sql, &[&draw]).await?;
            let drawn = rows.iter().filter_map(named);
            let drawn = drawn.filter(|one| !unavailable.contains(one.key.as_str()));
            for one in drawn.take(number) {
                reading.add(one.key, one.checksum).await?;
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
    inside: &LocalSession,
    unavailable: &HashSet<&str>,
    reading: &mut Reading,
) -> Result<(), PassError> {
    let sql = "SELECT ident::text, target::text, checksum::text, id FROM public.origin_packages \
               WHERE id > $1 ORDER BY id LIMIT $2";
    let mut after = i64::MIN;
    loop {
        let rows = inside
            .query("reading package rows", sql, &[&after, &PAGE_ROWS])
            .await?;
        let Some(last) = rows.last() else {
            return Ok(());
        };
        after = last.get(3);
        for one in rows.iter().filter_map(named) {
            if !unavailable.contains(one.key.as_str()) {
                reading.add(one.key, one.checksum).await?;
            }
        }
    }
}

/// Returns the artifact of a row. None: the row names no possible artifact, which is recorded where
/// it was copied.
fn named(row: &RawRow) -> Option<Named> {
    let ident: Ident = row.get::<_, &str>(0).parse().ok()?;
    let target: Target = row.get::<_, &str>(1).parse().ok()?;
    Some(Named {
        key: object_key(&ident, &target),
        checksum: row.get::<_, &str>(2).parse().ok()?,
    })
}

/// Keeps the differences that are real. The stream continues during a drill: if the visible
/// database no longer names an artifact, names it with other bytes, or has it as unavailable, a
/// difference from the clone's rows is right.
async fn still_named(
    config: &Config,
    inside: &LocalSession,
    differences: Vec<Difference>,
) -> Result<Vec<Difference>, PassError> {
    let local = &config.local.datastore;
    let visible = LocalSession::open(local, &local.database).await?;
    let unavailable = unavailable_here(config).await?.unwrap_or_default();
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
    session: &LocalSession,
    difference: &Difference,
) -> Result<Option<String>, PassError> {
    let Some((ident, target)) = package_of_key(&difference.name) else {
        return Ok(None);
    };
    let (ident, target) = (ident.to_string(), target.to_string());
    let sql = "SELECT checksum::text FROM public.origin_packages WHERE ident = $1 AND target = $2";
    let doing = "looking at a package again";
    let rows = session.query(doing, sql, &[&ident, &target]).await?;
    Ok(rows.first().map(|row| row.get(0)))
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
