//! The way back, for as long as the new epoch is not committed.

use super::super::steps::Walk;
use super::super::watch::look_at_peer;
use super::{Handover, Outcome};
use crate::cluster::{PeerFence, Transition};
use crate::killpoint;
use crate::replication::PassError;

impl Handover<'_> {
    /// The primary may write again, and the spare follows as before.
    pub(super) async fn undo(&self, mut walk: Walk<'_>, why: String) -> Result<Outcome, PassError> {
        walk.entry.undone = Some(why.clone());
        walk.step("undo").await?;
        self.undo_now(walk.entry).await
    }

    /// Also for what an earlier process had to leave.
    pub async fn undo_now(&self, mut entry: Transition) -> Result<Outcome, PassError> {
        killpoint::reach("undo.begin");
        let why = entry.undone.clone().unwrap_or_else(|| {
            "the process was ended, and the configuration does not ask for it any more".into()
        });
        entry.undone = Some(why.clone());
        entry.step = "undo".into();
        self.state.journal(self.lock, &entry).await?;
        let id = self.state.cluster().await?.id;
        let withdrawn = async {
            let seen = look_at_peer(self.config).await?;
            // Where no state of ours is, no fence of ours is.
            if seen.theirs.record.is_none() {
                return Ok(false);
            }
            let fence = PeerFence::open(&self.config.peer.datastore).await?;
            Ok::<bool, PassError>(fence.withdraw(entry.epoch, &id).await?)
        };
        match withdrawn.await {
            Ok(_) => {
                entry.step = "undone".into();
                self.state.journal(self.lock, &entry).await?;
                let text = format!("{} undone: {why}", entry.kind);
                log::warn!("{text}; the primary is as it was");
                self.state
                    .event("handover_undone", &text, &self.config.change)
                    .await?;
                Ok(Outcome::Undone(why))
            }
            Err(error) => Ok(Outcome::Undoing(why, error)),
        }
    }
}

/// Whether whoever left this entry may have fenced the peer by then.
pub fn may_have_fenced(entry: &Transition) -> bool {
    !matches!(entry.step.as_str(), "" | "preflight" | "undone") && entry.kind != "failback"
}
