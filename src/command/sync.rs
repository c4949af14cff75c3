//! `sync`: makes one pass, then exits. It retries after a transient fault, because no supervisor
//! would repeat a single run.

use super::{exit, show};
use crate::cluster::RecoveryPoint;
use crate::config::Config;
use crate::observe::Progress;
use crate::replication::{Options, Outcome, Policy, ReplicationError, Report, sync};
use backon::{BackoffBuilder, ExponentialBuilder};
use bytesize::ByteSize;
use serde_json::json;
use std::time::Duration;

/// Maximum number of passes that one run begins.
const MAX_ATTEMPTS: usize = 6;

pub(super) async fn run(config: &Config, baseline: bool, as_json: bool) -> u8 {
    let progress = show::progress();
    match sync_with_retries(config, baseline, &progress).await {
        Ok(report) => {
            drop(progress);
            if as_json {
                show::json(&document(&report));
            } else {
                print(config, &report);
            }
            exit::DONE
        }
        Err(error) => {
            drop(progress);
            show::failure(&error, as_json)
        }
    }
}

async fn sync_with_retries(
    config: &Config,
    baseline: bool,
    progress: &Progress,
) -> Result<Report, ReplicationError> {
    let mut waits = ExponentialBuilder::default()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(Duration::from_secs(15))
        .with_max_times(MAX_ATTEMPTS - 1)
        .with_jitter()
        .build();
    loop {
        let options = Options {
            baseline,
            ..Options::default()
        };
        let error = match sync(config, options, progress).await {
            Ok(report) => return Ok(report),
            Err(error) => error,
        };
        let wait = waits.next().filter(|_| error.policy() == Policy::Retry);
        let Some(wait) = wait else { return Err(error) };
        log::warn!(
            "{error}; the pass starts again in {:.0} s",
            wait.as_secs_f32()
        );
        tokio::time::sleep(wait).await;
    }
}

fn print(config: &Config, report: &Report) {
    let point = match &report.outcome {
        Outcome::Copied(copied) => {
            say!(
                "Copied {} ({} in {}).",
                show::count(report.packages, "package"),
                show::count(copied.rows, "row"),
                show::count(copied.tables, "table")
            );
            &copied.point
        }
        Outcome::Unchanged(point) => {
            say!(
                "Nothing new on the primary: {} as before.",
                show::count(report.packages, "package")
            );
            point
        }
        Outcome::Followed(point) => {
            say!(
                "Followed the primary's transactions: {} now.",
                show::count(report.packages, "package")
            );
            point
        }
    };
    say!(
        "Artifacts: {} ({}) copied, {} found in the bucket and checked; all others were known to be there.",
        report.artifacts.copied,
        ByteSize(report.artifacts.copied_bytes),
        report.artifacts.verified
    );
    say!("Recovery point: {}", describe(point));
    if let Outcome::Copied(copied) = &report.outcome {
        if let Some(generation) = &copied.generation {
            say!("The replaced database is kept as {generation}.");
        }
        for name in &copied.dropped {
            say!(
                "Dropped {name}: replication.keep_generations = {}.",
                config.replication.keep_generations
            );
        }
        if copied.vanished > 0 {
            say!(
                "{} deleted on the primary since the last copy.",
                show::count(copied.vanished, "package")
            );
        }
    }
    say!(
        "Fence: database {} is read-only for everybody but warm-spare.",
        config.local.datastore.database
    );
    if report.fence_reset {
        say!("WARNING: the fence had been lifted by somebody; warm-spare set it again.");
    }
    if report.unavailable.is_empty() {
        say!("Missing or damaged on the primary: none.");
    } else {
        say!(
            "WARNING: {} missing or damaged on the primary:",
            show::count(report.unavailable.len() as u64, "artifact")
        );
        for (key, reason) in &report.unavailable {
            say!("  {reason} {key}");
        }
    }
}

pub(super) fn describe(point: &RecoveryPoint) -> String {
    format!(
        "{} at {} by the primary's clock (system {}, timeline {})",
        point.lsn,
        point.commit_time.format("%Y-%m-%d %H:%M:%S%.3f UTC"),
        point.system_id,
        point.timeline
    )
}

pub(super) fn point_document(point: &RecoveryPoint) -> serde_json::Value {
    json!({
        "lsn": point.lsn,
        "commit_time": point.commit_time.to_rfc3339(),
        "system_id": point.system_id,
        "timeline": point.timeline,
    })
}

fn document(report: &Report) -> serde_json::Value {
    let (outcome, point, copied) = match &report.outcome {
        Outcome::Copied(copied) => ("copied", &copied.point, Some(copied)),
        Outcome::Unchanged(point) => ("unchanged", point, None),
        Outcome::Followed(point) => ("followed", point, None),
    };
    json!({
        "format": 1,
        "outcome": outcome,
        "recovery_point": point_document(point),
        "packages": report.packages,
        "rows": copied.map(|c| c.rows),
        "tables": copied.map(|c| c.tables),
        "generation": copied.and_then(|c| c.generation.clone()),
        "dropped_generations": copied.map(|c| c.dropped.clone()).unwrap_or_default(),
        "vanished_packages": copied.map(|c| c.vanished),
        "artifacts": {
            "copied": report.artifacts.copied,
            "copied_bytes": report.artifacts.copied_bytes,
            "verified": report.artifacts.verified,
            "unavailable": report.unavailable.iter()
                .map(|(key, reason)| json!({ "key": key, "reason": reason.to_string() })).collect::<Vec<_>>(),
        },
        "fence_reset": report.fence_reset,
        "replacements_undone": report.undone,
    })
}
