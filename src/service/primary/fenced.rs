//! The work of an old primary that another cluster has replaced: it keeps its own fence, and takes
//! its role back only by force.

use super::{LOOKS_PER_PROOF, Primary, forces};
use crate::cluster::{
    ClusterRecord, FenceCheck, FenceError, FenceReason, FenceRecord, KeepError, KeptFence,
    LocalCluster, Promotion, StateDb, end_sessions_from_before,
};
use crate::config::{ArtifactsMode, Config, WantedRole};
use crate::domain::{
    ErrorCode, EventKind, HoldReason, PromotionKind, Step, Transition, TransitionKind,
};
use crate::replication::ReplicationError;
use crate::role::{LeaseTaker, Proof, run_fence_command};
use crate::service::failure_tracker::Pace;
use std::sync::Arc;

impl Primary<'_> {
    /// Keeps the fence: checks it at every look, and proves it at some. While the cluster that set
    /// the fence may still withdraw it, no session is ended, because that cluster still copies the
    /// last writes.
    pub(super) async fn stay_fenced(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
        fence: &FenceRecord,
    ) -> Result<(), ReplicationError> {
        self.see_peer(config).await?;
        if config.role == WantedRole::Primary {
            let epoch = self.next_epoch(cluster);
            if forces(config, epoch) {
                return self.take_back(config, cluster, epoch).await;
            }
            self.say_what_takes_it_back(fence, epoch);
        } else {
            self.writer
                .release(|hold| hold.reason == HoldReason::ForceNeeded);
        }
        // We have set this fence ourselves, and it is not known to be complete: older sessions may
        // still write. A fence that the other cluster sets is also enforced by that cluster.
        let started = self.writer.read(|state| state.started);
        let begun = self.writer.read(|state| state.cluster.fence_begun)
            || (self.unproven.is_none() && fence.settled && fence.since < started);
        let check = match self.unproven {
            _ if begun => FenceCheck::Enforcement,
            Some(looks) if looks < LOOKS_PER_PROOF => FenceCheck::Setting,
            _ => FenceCheck::Proof,
        };
        let local = &config.local.datastore;
        let state = &self.leadership.state;
        let kept = state
            .keep_fence(local, FenceReason::Replaced, check, || ())
            .await;
        let set_again = matches!(
            kept,
            Ok(KeptFence::SetAgain) | Err(KeepError::Proof { was_set: false, .. })
        );
        if set_again {
            let text = format!(
                "{}. Rows written in between will be searched when this cluster comes back",
                KeptFence::set_again(&local.database)
            );
            log::warn!("local: {text}");
            self.writer.note(EventKind::Fence, &text);
        }
        let open = match kept {
            Ok(KeptFence::NoDatabase | KeptFence::NotSet) => return Ok(()),
            Ok(KeptFence::Holds) if check == FenceCheck::Setting => {
                self.unproven = self.unproven.map(|looks| looks + 1);
                return Ok(());
            }
            Ok(KeptFence::Holds | KeptFence::SetAgain) => None,
            Err(KeepError::Proof { error, .. }) => Some(error),
            Err(error) => return Err(error.into()),
        };
        self.writer
            .update(|state| state.local.fenced = Some(open.is_none()));
        match open {
            None => {
                self.unproven = Some(0);
                self.writer
                    .update(|state| state.cluster.fence_begun = false);
                self.fencing.over(self.writer.now());
            }
            Some(FenceError::Datastore(error)) if error.is_transient() => log::debug!("{error}"),
            Some(error) => {
                let now = self.writer.now();
                self.fencing
                    .failed(now, ErrorCode::Fence, &error.to_string(), Pace::Operator);
            }
        }
        Ok(())
    }

    pub(super) fn next_epoch(&self, cluster: &ClusterRecord) -> i64 {
        let known = self.writer.read(|state| state.next_epoch());
        known.unwrap_or(cluster.epoch.saturating_add(1))
    }

    pub(super) fn say_what_takes_it_back(&self, fence: &FenceRecord, epoch: i64) {
        let own = self.writer.read(|state| state.cluster.id.clone());
        if own.as_deref() == Some(fence.by_cluster.as_str()) && !fence.settled {
            // It is lifted as soon as the lease is granted again; health says what is the matter.
            return;
        }
        let detail = format!(
            "role is primary, but cluster {} replaced this cluster under epoch {}",
            fence.by_cluster, fence.epoch
        );
        let step = format!(
            "set role = \"spare\" to come back as the spare (docs/failback.md); or set force_epoch = {epoch} to take the role back from that cluster (docs/two-primaries.md)"
        );
        self.writer
            .hold(HoldReason::ForceNeeded, &detail, &step, false);
    }

    /// Makes this cluster, a fenced primary or one of two primaries, the primary of the next epoch,
    /// by force.
    pub(super) async fn take_back(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
        epoch: i64,
    ) -> Result<(), ReplicationError> {
        let local = &config.local.datastore;
        let state = LocalCluster::of(config).state().await?;
        // A process that is killed between the two steps leaves the rest to the next process.
        let mut entry = Transition {
            kind: TransitionKind::TakenBack,
            epoch,
            step: Some(Step::Lease),
            started: self.writer.now(),
            asked: String::new(),
            undone: None,
        };
        let id = state.new_promotion_id().await?;
        if config.artifacts.mode == ArtifactsMode::Shared {
            state.journal(self.leadership.lock, &entry).await?;
            if let Err(error) = self.take_lease_back(config, &state, epoch, &id).await {
                self.writer.hold_for(&error);
                return Ok(());
            }
        }
        let by = Promotion {
            id,
            settled: true,
            ..Promotion::new(epoch, PromotionKind::TakenBack, self.writer.now())
        };
        let from = cluster.role;
        entry.step = Some(Step::Promote);
        state.journal(self.leadership.lock, &entry).await?;
        let text =
            format!("taken back by force_epoch: this cluster is the primary of epoch {epoch}");
        let note = (text.as_str(), config.change.as_str());
        state
            .promote(self.leadership.lock, &local.database, &by, from, note)
            .await?;
        if let Err(error) = end_sessions_from_before(state.session(), &local.database).await {
            log::warn!("{error}");
        }
        state.close_journal(self.leadership.lock).await?;
        log::warn!("local: {text}");
        self.unproven = None;
        self.writer
            .release(|hold| hold.reason != HoldReason::Config);
        Ok(())
    }

    /// Takes the lease of the shared bucket from the cluster that has replaced this one.
    async fn take_lease_back(
        &self,
        config: &Arc<Config>,
        state: &StateDb,
        epoch: i64,
        promotion: &str,
    ) -> Result<(), ReplicationError> {
        let taker = LeaseTaker {
            config,
            state,
            epoch,
            promotion,
            peer_cluster: "",
        };
        let fenced = run_fence_command(config, epoch).await?;
        let taken = taker.take(Proof::of(fenced)).await?;
        log::warn!("local: the lease was taken: {}", taken.text());
        Ok(())
    }

    /// Gives the lease back that was asked for to take the role back, if nobody wants that any more.
    pub(super) async fn forget_taking_back(
        &self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
    ) -> Result<(), ReplicationError> {
        let state = LocalCluster::of(config).state().await?;
        let Some(entry) = state.transition().await? else {
            return Ok(());
        };
        let is_wanted =
            config.role == WantedRole::Primary && forces(config, self.next_epoch(cluster));
        if entry.kind != TransitionKind::TakenBack || is_wanted {
            return Ok(());
        }
        let taker = LeaseTaker {
            config,
            state: &state,
            epoch: entry.epoch,
            promotion: "",
            peer_cluster: "",
        };
        taker.give_back().await?;
        state.close_journal(self.leadership.lock).await?;
        self.writer.release(|hold| hold.reason.is_of_a_takeover());
        Ok(())
    }
}
