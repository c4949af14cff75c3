//! Undoes a handover, which is possible as long as the new epoch is not committed.

use super::{Handover, Outcome};
use crate::domain::{EventKind, Role, Step, Transition, TransitionKind};
use crate::killpoint;
use crate::replication::ReplicationError;
use crate::role::step_journal::StepJournal;
use crate::role::watch::{another_server, look_at_peer, open_fence};

impl Handover<'_> {
    /// Undoes the handover: clients may write to the primary again, and the spare follows as
    /// before.
    pub(super) async fn undo(
        &self,
        mut walk: StepJournal<'_>,
        why: String,
    ) -> Result<Outcome, ReplicationError> {
        walk.entry.undone = Some(why.clone());
        if walk.entry.step == Some(Step::Preflight) {
            // Nothing was done on the peer yet, so no session there must be ended.
            walk.entry.step = Some(Step::Undone);
            self.state.journal(self.lock, &walk.entry).await?;
            return self.told_undone(&walk.entry, why).await;
        }
        walk.step(Step::Undo).await?;
        self.roll_back(walk.entry).await
    }

    /// Undoes the handover of the journal's entry, also for an earlier process.
    pub async fn roll_back(&self, mut entry: Transition) -> Result<Outcome, ReplicationError> {
        killpoint::reach("undo.begin");
        let cluster = self.state.cluster().await?;
        if cluster.role == Some(Role::Primary) {
            // The promotion is committed, even if that was not reported.
            self.state.close_journal(self.lock).await?;
            return Ok(Outcome::Promoted);
        }
        if cluster.epoch >= entry.epoch {
            // A cluster that was promoted since has withdrawn its fence itself. If only the epoch
            // of another cluster was heard of, our fence is still set.
            if let Err(error) = self.withdraw(entry.epoch).await {
                log::warn!(
                    "{error}; if our fence is still set, it is withdrawn as soon as the peer answers"
                );
            }
            let why = format!(
                "the primary is of epoch {} by now, and this handover would have taken epoch {}",
                cluster.epoch, entry.epoch
            );
            entry.undone = Some(why.clone());
            entry.step = Some(Step::Undone);
            self.state.journal(self.lock, &entry).await?;
            log::warn!("{} undone: {why}", entry.kind);
            return Ok(Outcome::RolledBack(why));
        }
        let why = entry.undone.clone().unwrap_or_else(|| {
            "the process ended, and the configuration no longer asks for this handover".into()
        });
        entry.undone = Some(why.clone());
        entry.step = Some(Step::Undo);
        self.state.journal(self.lock, &entry).await?;
        match self.withdraw(entry.epoch).await {
            Ok(()) => {
                entry.step = Some(Step::Undone);
                self.state.journal(self.lock, &entry).await?;
                self.told_undone(&entry, why).await
            }
            Err(error) => Ok(Outcome::RollbackPending(why, error)),
        }
    }

    async fn told_undone(
        &self,
        entry: &Transition,
        why: String,
    ) -> Result<Outcome, ReplicationError> {
        let text = format!("{} undone: {why}", entry.kind);
        log::warn!("{text}; the primary is as before");
        self.state
            .event(EventKind::HandoverUndone, &text, &self.config.change)
            .await?;
        Ok(Outcome::RolledBack(why))
    }

    /// Withdraws the fence on that one server, and ends the sessions that began while it was set.
    async fn withdraw(&self, epoch: i64) -> Result<(), ReplicationError> {
        self.give_lease_back(epoch).await?;
        let id = self.state.cluster().await?.id;
        let followed = self.state.recovery_point().await?;
        let system_id = followed.map(|point| point.system_id).unwrap_or_default();
        let seen = look_at_peer(self.config, &self.peer).await?;
        if seen.theirs.system_id != system_id {
            return Err(another_server());
        }
        // A server without our state has no fence that we set.
        if seen.theirs.record.is_none() {
            return Ok(());
        }
        let fence = open_fence(&self.peer, &system_id).await?;
        self.state.still_ours(self.lock).await?;
        self.peer.close_idle();
        fence.withdraw(epoch, &id).await?;
        if let Err(error) = fence.refresh().await {
            log::warn!("{error}; older sessions stay read-only until they end");
        }
        Ok(())
    }
}

/// Returns whether the process that left this entry may have fenced the peer.
pub fn may_have_fenced(entry: &Transition) -> bool {
    !matches!(entry.step, None | Some(Step::Preflight | Step::Undone))
        && entry.kind != TransitionKind::Failback
}
