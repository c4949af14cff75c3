//! The way back, for as long as the new epoch is not committed.

use super::super::steps::Walk;
use super::super::watch::{another_server, look_at_peer, open_fence};
use super::{Handover, Outcome};
use crate::domain::{EventKind, Role, Step, Transition, TransitionKind};
use crate::killpoint;
use crate::replication::PassError;

impl Handover<'_> {
    /// The primary may write again, and the spare follows as before.
    pub(super) async fn undo(&self, mut walk: Walk<'_>, why: String) -> Result<Outcome, PassError> {
        walk.entry.undone = Some(why.clone());
        if walk.entry.step == Some(Step::Preflight) {
            // Nothing was done at the peer yet, and nobody's session there is ended for it.
            walk.entry.step = Some(Step::Undone);
            self.state.journal(self.lock, &walk.entry).await?;
            return self.told_undone(&walk.entry, why).await;
        }
        walk.step(Step::Undo).await?;
        self.undo_now(walk.entry).await
    }

    /// Also for what an earlier process had to leave.
    pub async fn undo_now(&self, mut entry: Transition) -> Result<Outcome, PassError> {
        killpoint::reach("undo.begin");
        let cluster = self.state.cluster().await?;
        if cluster.role == Some(Role::Primary) {
            // Committed, whatever was heard of it.
            self.state.close_journal(self.lock).await?;
            return Ok(Outcome::Promoted);
        }
        if cluster.epoch >= entry.epoch {
            // Whoever was promoted since has lifted its fence itself.
            // Or another cluster's epoch was heard of, and it still stands.
            if let Err(error) = self.withdraw(entry.epoch).await {
                log::warn!(
                    "{error}; a fence of ours that still stands is withdrawn as soon as the peer answers"
                );
            }
            let why = format!(
                "the primary is of epoch {} by now, and this would have taken {}",
                cluster.epoch, entry.epoch
            );
            entry.undone = Some(why.clone());
            entry.step = Some(Step::Undone);
            self.state.journal(self.lock, &entry).await?;
            log::warn!("{} undone: {why}", entry.kind);
            return Ok(Outcome::Undone(why));
        }
        let why = entry.undone.clone().unwrap_or_else(|| {
            "the process was ended, and the configuration does not ask for it any more".into()
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
            Err(error) => Ok(Outcome::Undoing(why, error)),
        }
    }

    async fn told_undone(&self, entry: &Transition, why: String) -> Result<Outcome, PassError> {
        let text = format!("{} undone: {why}", entry.kind);
        log::warn!("{text}; the primary is as it was");
        self.state
            .event(EventKind::HandoverUndone, &text, &self.config.change)
            .await?;
        Ok(Outcome::Undone(why))
    }

    /// On that one server, and with it what began while the fence stood.
    async fn withdraw(&self, epoch: i64) -> Result<(), PassError> {
        let id = self.state.cluster().await?.id;
        let followed = self.state.copied_point().await?;
        let system_id = followed.map(|point| point.system_id).unwrap_or_default();
        let seen = look_at_peer(self.config).await?;
        if seen.theirs.system_id != system_id {
            return Err(another_server());
        }
        // Where no state of ours is, no fence of ours is.
        if seen.theirs.record.is_none() {
            return Ok(());
        }
        let fence = open_fence(&self.config.peer.datastore, &system_id).await?;
        self.state.still_ours(self.lock).await?;
        fence.withdraw(epoch, &id).await?;
        if let Err(error) = fence.refresh().await {
            log::warn!("{error}; sessions from before stay read-only until they end");
        }
        Ok(())
    }
}

/// Whether whoever left this entry may have fenced the peer by then.
pub fn may_have_fenced(entry: &Transition) -> bool {
    !matches!(entry.step, None | Some(Step::Preflight | Step::Undone))
        && entry.kind != TransitionKind::Failback
}
