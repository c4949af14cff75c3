//! The check of a bucket that its provider replicates: is there a rule for the way back?

use super::facts::Facts;
use super::{ok, warn};
use crate::cluster::LocalCluster;
use crate::config::{ArtifactsMode, Config};
use crate::domain::PreflightCheck;
use crate::observe::Check;
use crate::replication::ReplicationError;
use std::time::Duration;

/// Number of questions to the store, because an operator waits for the answer.
const MAX_ATTEMPTS: usize = 1;

/// Returns whether a rule copies the objects of the local bucket. None: nobody asks for it.
pub(super) async fn look_at_rule(
    config: &Config,
    patience: Duration,
) -> Option<Result<bool, ReplicationError>> {
    if config.artifacts.mode != ArtifactsMode::External {
        return None;
    }
    let asked = async {
        let store = LocalCluster::of(config).reading_store()?;
        store
            .with_limits(patience, MAX_ATTEMPTS)
            .is_replicated()
            .await
    };
    Some(asked.await.map_err(ReplicationError::from))
}

pub(super) fn bucket(facts: &Facts) -> Check {
    const NAME: PreflightCheck = PreflightCheck::Bucket;
    let bucket = &facts.config.local.s3.bucket_name;
    let written = match facts.config.artifacts.fill {
        true => "only artifacts that the provider never brings are written, which was not tried",
        false => "no artifact is written",
    };
    let written = match &facts.config.artifacts.own_prefix {
        Some(prefix) => format!("{written}; a probe was, under {prefix}"),
        None => written.into(),
    };
    let text = format!("{bucket} can be read; artifacts.mode is external: {written}");
    match &facts.rule {
        // A replicated file system has no rule of a store.
        Some(Ok(false)) => warn(
            NAME,
            format!("{text}. The store has no rule that copies {bucket} to another bucket"),
            "before the other site comes back, give the store a rule of that direction; a replicated file system needs none",
        ),
        Some(Ok(true)) => ok(
            NAME,
            format!("{text}. A rule copies {bucket} to another bucket"),
        ),
        Some(Err(error)) => ok(
            NAME,
            format!("{text}. It is not known whether a rule copies {bucket}: {error}"),
        ),
        None => ok(NAME, text),
    }
}
