//! A promotion by hand: where the service cannot run, and the primary is lost. It asks nobody but the
//! local servers, and makes none of the checks of a takeover.

use crate::cluster::preparation::Names;
use crate::cluster::{
    ClusterRecord, LocalCluster, Lock, Promotion, RecoveryPoint, StateDb, end_sessions_from_before,
    wake_triggers,
};
use crate::config::{ArtifactsMode, Config};
use crate::domain::{ErrorCode, PromotionKind, Role};
use crate::replication::{ReplicationError, mend, next_sequences};
use chrono::Utc;

/// A promotion that was made by hand.
#[derive(Debug)]
pub struct PromotedByHand {
    pub epoch: i64,
    /// The position of the old primary's history. None: nothing was copied, or this cluster was
    /// itself the primary.
    pub point: Option<RecoveryPoint>,
}

/// Makes this cluster the primary of `epoch`, which must be the next one. `witnessed` is the epoch
/// that is on record outside PostgreSQL. The service must not be at work.
pub async fn promote_by_hand(
    config: &Config,
    epoch: u64,
    witnessed: Option<i64>,
) -> Result<PromotedByHand, ReplicationError> {
    let local = LocalCluster::of(config);
    let Some(state) = local.existing_state().await? else {
        return Err(refused(
            ErrorCode::RoleUnset,
            "this cluster has no database warm_spare, so it has no role that could change".into(),
            "check local.datastore; a cluster that never was a spare needs no promotion".into(),
        ));
    };
    if config.artifacts.mode == ArtifactsMode::Shared {
        return Err(refused(
            ErrorCode::LeaseHeld,
            "artifacts.mode is shared: the lease of the bucket must be taken, and only the service does that".into(),
            "run the service with role = \"primary\" and force_epoch; takeover.force_lease where the holder is gone".into(),
        ));
    }
    let lock = state.lock(config.replication.direction).await?;
    let cluster = state.cluster().await?;
    check_epoch(&state, &cluster, epoch, witnessed).await?;
    let point = match (cluster.role, state.recovery_point().await?) {
        (Some(Role::Spare), Some(copied)) => Some(local.point(copied).await?),
        _ => None,
    };
    // An interrupted replacement would leave bytes under a key that its row does not name.
    mend(config, lock).await?;
    if point.is_some() {
        wake_triggers(&local.builder().await?, lock.token).await?;
        next_sequences(config).await?;
    }
    commit(config, &state, lock, &cluster, epoch as i64, point.as_ref()).await?;
    Ok(PromotedByHand {
        epoch: epoch as i64,
        point,
    })
}

/// Refuses an epoch that is not the next one, and a cluster that is the primary already.
async fn check_epoch(
    state: &StateDb,
    cluster: &ClusterRecord,
    epoch: u64,
    witnessed: Option<i64>,
) -> Result<(), ReplicationError> {
    let fence = state.fence_record().await?;
    if cluster.role == Some(Role::Primary) && fence.is_none() {
        return Err(refused(
            ErrorCode::Role,
            format!(
                "this cluster is the primary of epoch {} already",
                cluster.epoch
            ),
            "nothing is to be done; `warm-spare fence` shows whether its database takes writes"
                .into(),
        ));
    }
    let known = [
        Some(cluster.epoch),
        fence.map(|fence| fence.epoch),
        state.transition().await?.map(|entry| entry.epoch),
        witnessed,
    ];
    let highest = known.into_iter().flatten().max().unwrap_or_default();
    let next = highest.max(1).saturating_add(1);
    if i64::try_from(epoch) != Ok(next) {
        return Err(refused(
            ErrorCode::ForceNeeded,
            format!("epoch {epoch} is not the next one of this cluster, which is {next}"),
            format!(
                "if the primary is lost, and the service cannot run here: warm-spare promote --epoch {next}"
            ),
        ));
    }
    Ok(())
}

async fn commit(
    config: &Config,
    state: &StateDb,
    lock: Lock,
    cluster: &ClusterRecord,
    epoch: i64,
    point: Option<&RecoveryPoint>,
) -> Result<(), ReplicationError> {
    let database = &config.local.datastore.database;
    let mut by = match point {
        Some(point) => Promotion::new(epoch, PromotionKind::Failover, Utc::now()).at(point),
        // Nothing of ours is on a server that was not followed.
        None => Promotion {
            settled: true,
            ..Promotion::new(epoch, PromotionKind::TakenBack, Utc::now())
        },
    };
    by.id = state.new_promotion_id().await?;
    if point.is_some_and(RecoveryPoint::is_followed) {
        by.publication = Names::of(&cluster.id, &config.replication).publication;
    }
    let at = match point {
        Some(point) => format!("at {}, commit time {}", point.lsn, point.commit_time),
        None => "at no recovery point".to_string(),
    };
    let text = format!("promoted by hand to epoch {epoch} {at}");
    let note = (text.as_str(), config.change.as_str());
    state
        .promote(lock, database, &by, cluster.role, note)
        .await?;
    log::warn!("local: {text}");
    if let Err(error) = end_sessions_from_before(state.session(), database).await {
        log::warn!("{error}");
    }
    Ok(state.close_journal(lock).await?)
}

fn refused(rule: ErrorCode, text: String, next_step: String) -> ReplicationError {
    ReplicationError::Refused {
        rule,
        text,
        next_step,
    }
}
