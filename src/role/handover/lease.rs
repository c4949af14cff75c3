//! The steps of a shared bucket: the file system is attached, and the lease is taken.

use super::Handover;
use crate::cluster::{PeerFence, RecoveryPoint};
use crate::config::ArtifactsMode;
use crate::domain::{ErrorCode, EventKind, Step};
use crate::replication::{ReplicationError, prove_once_more};
use crate::role::lease::{LeaseTaker, Proof, Taken, attach, run_fence_command};
use crate::role::step_journal::StepJournal;
use std::time::Duration;

/// Time limit for the last look at the artifacts of the newest rows: clients wait.
const PROOF_LIMIT: Duration = Duration::from_secs(20);

/// The lease that names this promotion.
#[derive(Debug, Clone)]
pub(super) struct TakenLease {
    /// Id of the promotion.
    pub promotion: String,
    taken: Taken,
}

impl TakenLease {
    /// Returns the way in which it was taken, as the end of a sentence.
    pub(super) fn text(&self) -> String {
        let last = match &self.taken {
            Taken::Proved(lsn) if !lsn.is_empty() => format!(" at {lsn}"),
            _ => String::new(),
        };
        format!("; the lease was taken: {}{last}", self.taken.text())
    }
}

impl Handover<'_> {
    /// Runs the operator's command that fences the other site, waits for the shared file system,
    /// and takes the lease. `fence`: the fence that was set through the peer's datastore. None: the
    /// bucket is not shared.
    pub(super) async fn take_lease(
        &self,
        walk: &mut StepJournal<'_>,
        point: &RecoveryPoint,
        fence: Option<&PeerFence>,
    ) -> Result<Option<TakenLease>, ReplicationError> {
        if self.config.artifacts.mode != ArtifactsMode::Shared {
            run_fence_command(self.config, self.epoch).await?;
            return Ok(None);
        }
        let mut proved = fence.is_some();
        if self.config.artifacts.are_detached() {
            walk.step(Step::Attach).await?;
            attach(self.config, self.state, &*self.on_wait).await?;
            // The file system is here alone.
            proved = true;
        }
        proved |= run_fence_command(self.config, self.epoch).await?;
        walk.step(Step::Lease).await?;
        self.state.still_ours(self.lock).await?;
        let promotion = self.state.new_promotion_id().await?;
        let taker = self.taker(&promotion, point.peer_cluster.as_deref());
        let taken = taker.take(Proof::of(proved)).await?;
        if let Some(fence) = fence {
            self.still_fenced(fence).await?;
        }
        Ok(Some(TakenLease { promotion, taken }))
    }

    /// Checks that the fence which was the proof still stands. The holder may have lifted it for an
    /// earlier takeover, and does so no more now that the lease is ours.
    async fn still_fenced(&self, fence: &PeerFence) -> Result<(), ReplicationError> {
        let id = self.state.cluster().await?.id;
        match fence.stands(self.epoch, &id).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(ReplicationError::Precondition {
                check: ErrorCode::Compare,
                text: "somebody lifted the primary's fence while the lease was taken".into(),
                next_step: "find out who lifted it; the takeover begins again".into(),
            }),
            // It has vanished since its last answer, and the lease is ours.
            Err(error) if self.forced() => {
                log::warn!("{error}; the old primary's fence was not looked at once more");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Looks once more at the artifacts of the newest rows, and lists those that are gone: the
    /// primary or the provider may have changed them since their rows came here.
    pub(super) async fn prove_artifacts(&self, point: &RecoveryPoint) {
        if self.config.artifacts.mode == ArtifactsMode::Replicate {
            return;
        }
        let proving = Box::pin(prove_once_more(self.config, self.state, point));
        let text = match tokio::time::timeout(PROOF_LIMIT, proving).await {
            Ok(Ok(gone)) => match gone.first() {
                None => return,
                Some((key, reason)) => format!(
                    "{} artifacts of the newest rows are not in the bucket any more as their rows say, for example {key} ({reason}); they are listed as unavailable",
                    gone.len()
                ),
            },
            // Nothing is as bad as no Builder at all.
            Ok(Err(error)) => {
                format!("the artifacts of the newest rows were not looked at once more: {error}")
            }
            Err(_) => format!(
                "not all artifacts of the newest rows were looked at once more within {} s",
                PROOF_LIMIT.as_secs()
            ),
        };
        log::warn!("local: {text}");
        let change = &self.config.change;
        let told = self.state.event(EventKind::Artifacts, &text, change).await;
        if let Err(error) = told {
            log::warn!("{error}");
        }
    }

    /// Gives the lease back, because this handover is undone.
    pub(super) async fn give_lease_back(&self, epoch: i64) -> Result<(), ReplicationError> {
        if self.config.artifacts.mode != ArtifactsMode::Shared {
            return Ok(());
        }
        let taker = LeaseTaker {
            epoch,
            ..self.taker("", None)
        };
        let given = taker.give_back().await;
        match given {
            // The file system may never have come here.
            Err(error) if self.config.artifacts.are_detached() => {
                log::warn!("{error}; if this site has taken the lease, it is not given back");
                Ok(())
            }
            given => given,
        }
    }

    fn taker<'t>(&'t self, promotion: &'t str, peer_cluster: Option<&'t str>) -> LeaseTaker<'t> {
        LeaseTaker {
            config: self.config,
            state: self.state,
            epoch: self.epoch,
            promotion,
            peer_cluster: peer_cluster.unwrap_or_default(),
        }
    }
}
