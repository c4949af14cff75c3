//! The commit of a promotion.

use super::lease::TakenLease;
use super::{Handover, Reached};
use crate::cluster::preparation::Names;
use crate::cluster::{
    LocalCluster, RecoveryPoint, SpareDb, end_sessions_from_before, wake_triggers,
};
use crate::domain::Role;
use crate::replication::ReplicationError;

impl Handover<'_> {
    /// Enables the triggers that a spare keeps disabled because they would act while changes are
    /// applied. If this handover is undone, following disables them again. Returns the point of the
    /// promotion, which includes the last copy or transactions.
    pub(super) async fn wake_triggers(
        &self,
        before: RecoveryPoint,
    ) -> Result<RecoveryPoint, ReplicationError> {
        let inside = LocalCluster::of(self.config).builder().await?;
        self.state.still_ours(self.lock).await?;
        wake_triggers(&inside, self.lock.token).await?;
        Ok(match self.state.recovery_point().await? {
            Some(copied) => SpareDb::of(&inside).point(copied).await?,
            None => before,
        })
    }

    /// Commits the promotion. After this commit only another promotion changes the primary.
    pub(super) async fn promote(
        &self,
        point: &RecoveryPoint,
        reached: &Reached,
    ) -> Result<(), ReplicationError> {
        let id = self.state.cluster().await?.id;
        let mut promotion = self.promotion(point, reached);
        promotion.id = match &reached.lease {
            Some(lease) => lease.promotion.clone(),
            None => self.state.new_promotion_id().await?,
        };
        if point.is_followed() {
            promotion.publication = Names::of(&id, &self.config.replication).publication;
        }
        let database = &self.config.local.datastore.database;
        let by_lease = reached.lease.as_ref().map(TakenLease::text);
        let text = format!(
            "promoted by {} to epoch {} at {}, commit time {}{}",
            promotion.kind,
            self.epoch,
            point.lsn,
            point.commit_time,
            by_lease.unwrap_or_default()
        );
        let note = (text.as_str(), self.config.change.as_str());
        self.state
            .promote(self.lock, database, &promotion, Some(Role::Spare), note)
            .await?;
        log::warn!("local: {text}");
        // Older sessions stay read-only for as long as they live; a pool that held them opens new
        // ones.
        if let Err(error) = end_sessions_from_before(self.state.session(), database).await {
            log::warn!("{error}");
        }
        Ok(())
    }
}
