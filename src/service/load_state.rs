//! Loads what the databases of this cluster have on record into the state that is shown.

use super::StatusWriter;
use crate::cluster::{LocalCluster, StateDb};
use crate::config::Config;
use crate::domain::{MissingReason, Role};
use crate::observe::{Artifacts, Verified};
use crate::replication::ReplicationError;

/// Reads the state database and the visible database into the state.
pub(super) async fn recall(
    writer: &StatusWriter,
    config: &Config,
    database: &StateDb,
) -> Result<(), ReplicationError> {
    let cluster = database.cluster().await?;
    let fence = database.fence_record().await?;
    let spare = cluster.role == Some(Role::Spare);
    let point = match database.recovery_point().await? {
        // The copy from which a primary once came is not its position.
        Some(copied) if spare => Some(LocalCluster::of(config).point(copied).await?),
        _ => None,
    };
    let confirmation = database.confirmation().await?;
    let generations = database.generations().await?;
    let bytes = database.generations_bytes().await?;
    let verified = database.last_verification().await?;
    let drill = database.last_drill().await?;
    let (version, tls) = database.server().await?;
    let unavailable = match &point {
        Some(_) => LocalCluster::of(config).unavailable().await?,
        None => None,
    };
    let unproven = match spare {
        true => database.count_unproven().await?,
        false => 0,
    };
    writer.update(|state| {
        state.spare.unproven.count(unproven);
        state.cluster.id = Some(cluster.id);
        state.cluster.role = cluster.role;
        state.cluster.epoch = Some(cluster.epoch);
        state.cluster.since = Some(cluster.since);
        state.spare.point = point;
        state.cluster.fenced_by = fence.map(|fence| (fence.epoch, fence.by_cluster));
        state.checks.drill = drill;
        state.spare.confirmation = match spare {
            true => confirmation.or(state.spare.confirmation),
            false => None,
        };
        state.generations.kept = Some(generations);
        state.generations.bytes = Some(bytes);
        state.local.version = Some(version);
        state.local.tls = Some(tls);
        if let Some(record) = verified
            && state
                .checks
                .verified
                .as_ref()
                .is_none_or(|known| known.record.time < record.time)
        {
            state.checks.verified = Some(Verified {
                record,
                examples: Vec::new(),
            });
        }
        if let Some(unavailable) = unavailable {
            let count =
                |reason| unavailable.iter().filter(|(_, why)| *why == reason).count() as u64;
            let of = |reason| {
                let first = unavailable.iter().find(|(_, why)| *why == reason);
                first.map(|(key, _)| (count(reason), key.clone()))
            };
            state.spare.unreadable = of(MissingReason::Unreadable);
            state.spare.unstorable = of(MissingReason::Unstorable);
            state.spare.not_replicated = of(MissingReason::NotReplicated);
            let known = state.spare.artifacts.take().unwrap_or_default();
            state.spare.artifacts = Some(Artifacts {
                missing: count(MissingReason::Missing),
                damaged: count(MissingReason::Damaged),
                examples: unavailable.iter().take(5).cloned().collect(),
                ..known
            });
        }
    });
    writer.settle_events(database).await;
    Ok(())
}
