//! Duties of an old primary that another cluster has replaced: it keeps its own fence, and takes
//! its role back only by force.

use super::{LOOKS_PER_PROOF, Primary, forces};
use crate::cluster::{
    ClusterRecord, FenceError, FenceRecord, Promotion, State, clear_out, enforce_fence, is_fenced,
    prove_fence,
};
use crate::config::{Config, WantedRole};
use crate::domain::HoldReason;
use crate::domain::{ErrorCode, EventKind, PromotionKind, Step, Transition, TransitionKind};
use crate::replication::{PassError, has_database};
use crate::service::complaint::Pace;
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
    ) -> Result<(), PassError> {
        self.see_peer(config).await?;
        if config.role == WantedRole::Primary {
            let epoch = self.next_epoch(cluster);
            if forces(config, epoch) {
                return self.take_back(config, cluster, epoch).await;
            }
            self.say_what_takes_it_back(fence, epoch);
        } else {
            self.desk
                .release(|hold| hold.reason == HoldReason::ForceNeeded);
        }
        let local = &config.local.datastore;
        let session = self.tenure.state.session();
        if !has_database(session, &local.database).await? {
            return Ok(());
        }
        let was_set = is_fenced(session, &local.database).await?;
        if !was_set {
            self.tenure.state.fence_if_recorded(&local.database).await?;
            if !is_fenced(session, &local.database).await? {
                return Ok(());
            }
            let text = format!(
                "the fence on {} had been lifted; it was set again. Rows written in between will be searched when this cluster comes back",
                local.database
            );
            log::warn!("local: {text}");
            self.desk.note(EventKind::Fence, &text);
        }
        // We have set this fence ourselves, and it is not known to be complete: older sessions may
        // still write. A fence that the other cluster sets is also enforced by that cluster.
        let started = self.desk.read(|state| state.started);
        let begun = self.desk.read(|state| state.fence_begun)
            || (self.unproven.is_none() && fence.settled && fence.since < started);
        let proven = match self.unproven {
            Some(looks) if was_set && !begun && looks < LOOKS_PER_PROOF => {
                self.unproven = Some(looks + 1);
                return Ok(());
            }
            _ if begun || !was_set => enforce_fence(session, local, &local.database).await,
            _ => prove_fence(session, local, &local.database).await,
        };
        self.desk
            .update(|state| state.local.fenced = Some(proven.is_ok()));
        match proven {
            Ok(()) => {
                self.unproven = Some(0);
                self.desk.update(|state| state.fence_begun = false);
                self.fencing.over(self.desk.now());
            }
            Err(FenceError::Datastore(error)) if error.is_transient() => log::debug!("{error}"),
            Err(error) => {
                let now = self.desk.now();
                self.fencing
                    .failed(now, ErrorCode::Fence, &error.to_string(), Pace::Operator);
            }
        }
        Ok(())
    }

    pub(super) fn next_epoch(&self, cluster: &ClusterRecord) -> i64 {
        let known = self.desk.read(|state| state.next_epoch());
        known.unwrap_or(cluster.epoch.saturating_add(1))
    }

    pub(super) fn say_what_takes_it_back(&self, fence: &FenceRecord, epoch: i64) {
        let detail = format!(
            "role is primary, but cluster {} replaced this cluster under epoch {}",
            fence.by_cluster, fence.epoch
        );
        let step = format!(
            "set role = \"spare\" to come back as the spare (docs/failback.md); or set force_epoch = {epoch} to take the role back from that cluster (docs/failover.md)"
        );
        self.desk
            .hold(HoldReason::ForceNeeded, &detail, &step, false);
    }

    /// Makes this cluster, a fenced primary or one of two primaries, the primary of the next epoch,
    /// by force.
    pub(super) async fn take_back(
        &mut self,
        config: &Arc<Config>,
        cluster: &ClusterRecord,
        epoch: i64,
    ) -> Result<(), PassError> {
        let local = &config.local.datastore;
        let state = State::open(local).await?;
        let by = Promotion {
            epoch,
            id: state.new_promotion_id().await?,
            kind: PromotionKind::TakenBack,
            time: self.desk.now(),
            lsn: String::new(),
            commit_time: None,
            system_id: String::new(),
            timeline: 0,
            peer_cluster: String::new(),
            slot: String::new(),
            publication: String::new(),
            peer_fenced: false,
            settled: true,
        };
        let from = cluster.role;
        // A process that is killed between the two steps leaves the rest to the next process.
        let entry = Transition {
            kind: TransitionKind::TakenBack,
            epoch,
            step: Some(Step::Promote),
            started: self.desk.now(),
            asked: String::new(),
            undone: None,
        };
        state.journal(self.tenure.lock, &entry).await?;
        let text =
            format!("taken back by force_epoch: this cluster is the primary of epoch {epoch}");
        let note = (text.as_str(), config.change.as_str());
        state
            .promote(self.tenure.lock, &local.database, &by, from, note)
            .await?;
        if let Err(error) = clear_out(state.session(), &local.database).await {
            log::warn!("{error}");
        }
        state.close_journal(self.tenure.lock).await?;
        log::warn!("local: {text}");
        self.unproven = None;
        self.desk.release(|hold| hold.reason != HoldReason::Config);
        Ok(())
    }
}
