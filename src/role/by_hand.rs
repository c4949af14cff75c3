//! A promotion by hand: where the service cannot run, and the primary is lost. It asks nobody but the
//! local servers, and makes none of the checks of a takeover.

use super::handover::wait_for_clock;
use crate::cluster::preparation::Names;
use crate::cluster::{
    ClusterRecord, FenceRecord, LocalCluster, Lock, Promotion, RecoveryPoint, StateDb,
    end_sessions_from_before, wake_triggers,
};
use crate::config::{ArtifactsMode, Config};
use crate::domain::{ErrorCode, PromotionKind, Role};
use crate::replication::{ReplicationError, has_unproved_place, mend, next_sequences};
use chrono::Utc;

/// A promotion that was made by hand.
#[derive(Debug)]
pub struct PromotedByHand {
    pub epoch: i64,
    pub outcome: ByHand,
}

/// What the promotion has made of this cluster.
#[derive(Debug)]
pub enum ByHand {
    /// A spare became the primary, at this position of the old primary's history.
    AtPoint(Box<RecoveryPoint>),
    /// A fenced old primary took its role back, with the rows that it had.
    TakenBack,
    /// It was the primary of this epoch already: the rest of an interrupted promotion was done.
    Finished,
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
        return Err(was_never_a_spare());
    };
    let recorded = state.artifact_place().await?;
    let was_shared =
        recorded.is_some_and(|(place, _)| place.mode == ArtifactsMode::Shared.as_str());
    if was_shared || config.artifacts.mode == ArtifactsMode::Shared {
        return Err(refused(
            ErrorCode::LeaseHeld,
            "artifacts.mode is shared, or was when the service worked here last: the lease of the bucket must be taken, and only the service does that".into(),
            "run the service with role = \"primary\" and force_epoch; takeover.force_lease where the holder is gone".into(),
        ));
    }
    let lock = state.lock(config.replication.direction).await?;
    let cluster = state.cluster().await?;
    let fence = state.fence_record().await?;
    if cluster.role == Some(Role::Primary) && fence.is_none() {
        return finish(config, &state, lock, &cluster, epoch).await;
    }
    let is_spare = match (cluster.role, &fence, state.recovery_point().await?) {
        (_, Some(_), _) => false,
        (Some(Role::Spare), None, Some(_)) => true,
        (Some(Role::Spare), None, None) => return Err(has_copied_nothing()),
        (_, None, _) => return Err(was_never_a_spare()),
    };
    check_epoch(&cluster, fence.as_ref(), epoch, witnessed)?;
    // Records about another bucket are not carried out in this one. An interrupted replacement
    // would leave bytes under a key that its row does not name.
    has_unproved_place(config, &state, lock).await?;
    mend(config, lock).await?;
    let mut point = None;
    if is_spare {
        // A former process may still have a commit on its way.
        if local.lsn_at_rest().await?.is_none() {
            return Err(is_not_the_copy(config));
        }
        if let Some(copied) = state.recovery_point().await? {
            point = Some(local.point(copied).await?);
        }
        let inside = local.builder().await?;
        wake_triggers(&inside, lock.token).await?;
        next_sequences(config).await?;
        if let Err(error) = wait_for_clock(&inside, None).await {
            log::warn!("{error}");
        }
    }
    commit(config, &state, lock, &cluster, epoch as i64, point.as_ref()).await?;
    Ok(PromotedByHand {
        epoch: epoch as i64,
        outcome: point.map_or(ByHand::TakenBack, |point| ByHand::AtPoint(Box::new(point))),
    })
}

/// Does the rest of a promotion that was committed and then interrupted. It may be done again.
async fn finish(
    config: &Config,
    state: &StateDb,
    lock: Lock,
    cluster: &ClusterRecord,
    epoch: u64,
) -> Result<PromotedByHand, ReplicationError> {
    if i64::try_from(epoch) != Ok(cluster.epoch) {
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
    end_and_close(config, state, lock).await?;
    Ok(PromotedByHand {
        epoch: cluster.epoch,
        outcome: ByHand::Finished,
    })
}

/// Sessions from before stay read-only for as long as they live, so they are ended.
async fn end_and_close(
    config: &Config,
    state: &StateDb,
    lock: Lock,
) -> Result<(), ReplicationError> {
    let database = &config.local.datastore.database;
    if let Err(error) = end_sessions_from_before(state.session(), database).await {
        log::warn!("{error}");
    }
    Ok(state.close_journal(lock).await?)
}

/// Refuses an epoch that is not the next one. A takeover of this cluster that was not committed does
/// not count: its number is still to be taken.
fn check_epoch(
    cluster: &ClusterRecord,
    fence: Option<&FenceRecord>,
    epoch: u64,
    witnessed: Option<i64>,
) -> Result<(), ReplicationError> {
    let known = [
        Some(cluster.epoch),
        fence.map(|fence| fence.epoch),
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

fn was_never_a_spare() -> ReplicationError {
    refused(
        ErrorCode::RoleUnset,
        "no role of this cluster is on record, and no fence of another cluster".into(),
        "check local.datastore; a cluster that never was a spare needs no promotion".into(),
    )
}

fn is_not_the_copy(config: &Config) -> ReplicationError {
    let database = &config.local.datastore.database;
    refused(
        ErrorCode::NoRecoveryPoint,
        format!(
            "database {database} is not the database that was copied here, or it does not exist"
        ),
        format!(
            "find the copy among the databases of this server, and give it the name {database} again; docs/takeover.md, \"without the service\", has the way by psql"
        ),
    )
}

fn has_copied_nothing() -> ReplicationError {
    refused(
        ErrorCode::NoRecoveryPoint,
        "this spare has copied nothing yet: it has no recovery point, and rows of a former time at most".into(),
        "docs/takeover.md, \"without the service\": by psql, if these rows are better than none".into(),
    )
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
    end_and_close(config, state, lock).await
}

fn refused(rule: ErrorCode, text: String, next_step: String) -> ReplicationError {
    ReplicationError::Refused {
        rule,
        text,
        next_step,
    }
}
