//! The commit of a promotion.

use super::{Handover, Reached};
use crate::cluster::preparation::Names;
use crate::cluster::{CopiedPoint, LocalSession, clear_out};
use crate::domain::Role;
use crate::replication::{PassError, stands_at, wake};

impl Handover<'_> {
    /// Enables the triggers that a spare keeps disabled because they would act while changes are
    /// applied. If this handover is undone, following disables them again.
    pub(super) async fn wake_triggers(&self) -> Result<(), PassError> {
        let local = &self.config.local.datastore;
        let inside = LocalSession::open(local, &local.database).await?;
        self.state.still_ours(self.lock).await?;
        wake(&inside, self.lock.token).await
    }

    /// Commits the promotion. After this commit only another promotion changes the primary.
    pub(super) async fn promote(
        &self,
        before: &CopiedPoint,
        reached: Reached,
    ) -> Result<(), PassError> {
        // The point of now, which includes the last copy or transactions.
        let copied = self.state.copied_point().await?;
        let point = match copied {
            Some(copied) => stands_at(self.config, copied).await?,
            None => before.clone(),
        };
        let id = self.state.cluster().await?.id;
        let mut promotion = self.promotion(&point, reached);
        promotion.id = self.state.new_promotion_id().await?;
        if !point.slot.is_empty() {
            promotion.publication = Names::of(&id, &self.config.replication).publication;
        }
        let database = &self.config.local.datastore.database;
        let text = format!(
            "promoted by {} to epoch {} at {}, commit time {}",
            promotion.kind, self.epoch, point.lsn, point.commit_time
        );
        let note = (text.as_str(), self.config.change.as_str());
        self.state
            .promote(self.lock, database, &promotion, Some(Role::Spare), note)
            .await?;
        log::warn!("local: {text}");
        // Older sessions stay read-only for as long as they live; a pool that held them opens new
        // ones.
        if let Err(error) = clear_out(self.state.session(), database).await {
            log::warn!("{error}");
        }
        Ok(())
    }
}
