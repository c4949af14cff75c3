//! The duties on a cluster that is no spare. A primary checks its peer and keeps its old primary
//! fenced. An old primary keeps its own fence, and comes back when role = "spare" is set.

use super::failure_tracker::{FailureTracker, Pace};
use super::guard::{keep_seeing, keep_tidy};
use super::leadership::{End, Leadership};
use super::pair::is_contradicted;
use super::{Configs, StatusWriter, next};
use crate::cluster::{
    ClusterRecord, FenceRecord, LocalCluster, PeerCluster, end_sessions_from_before,
};
use crate::config::{ArtifactsMode, Config, WantedRole};
use crate::domain::{ErrorCode, HoldReason, Role, Side, Transition, TransitionKind};
use crate::observe::Work;
use crate::replication::ReplicationError;
use crate::role::{PeerSeen, come_back, look_at_peer};
use chrono::{DateTime, Utc};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time limit for all answers of the peer to one look.
const PEER_TIMEOUT: Duration = Duration::from_secs(15);
/// Number of looks for each proof of our own fence. The proof needs a connection of its own.
const LOOKS_PER_PROOF: u32 = 12;

mod fenced;
mod standing;

pub(super) struct Primary<'a> {
    writer: &'a StatusWriter,
    leadership: &'a Leadership,
    configs: Configs,
    /// Failures of the questions to the peer.
    failures: FailureTracker,
    /// Failures of a fence, on either side.
    fencing: FailureTracker,
    /// Failures of coming back as the spare.
    returning: FailureTracker,
    /// The last confirmation of the spare, and the time at which it was first seen, by a clock that
    /// nobody sets.
    confirmed: Option<(DateTime<Utc>, Instant)>,
    /// Number of looks since the last proof of our own fence; None: this process has not proven it.
    unproven: Option<u32>,
    /// True: this look found something that an operator must decide.
    conflicting: bool,
}

impl<'a> Primary<'a> {
    pub(super) fn new(
        writer: &'a StatusWriter,
        leadership: &'a Leadership,
        configs: Configs,
    ) -> Self {
        Primary {
            writer,
            leadership,
            configs,
            failures: FailureTracker::new("peer: answers"),
            fencing: FailureTracker::new("the fence holds"),
            returning: FailureTracker::new("local: may come back"),
            confirmed: None,
            unproven: None,
            conflicting: false,
        }
    }

    pub(super) async fn perform(self) -> End {
        let (writer, leadership) = (self.writer, self.leadership);
        tokio::select! {
            end = Box::pin(self.keep_looking()) => end,
            never = keep_seeing(writer, &leadership.config) => match never {},
            never = keep_tidy(leadership) => match never {},
        }
    }

    async fn keep_looking(mut self) -> End {
        if let Err(error) = self.take_up().await {
            return End::Failed(error);
        }
        loop {
            let config = self.config();
            match Box::pin(self.look(&config)).await {
                Ok(None) => {}
                Ok(Some(end)) => return end,
                Err(error) => return End::Failed(error),
            }
            tokio::select! {
                () = tokio::time::sleep(config.takeover.fence_retry) => {}
                () = next(&mut self.configs) => {}
            }
        }
    }

    fn config(&mut self) -> Arc<Config> {
        let current = self.configs.borrow_and_update().clone();
        current.unwrap_or_else(|| self.leadership.config.clone())
    }

    /// Finishes a promotion that is on record, if a killed process did not reach its last steps.
    async fn take_up(&mut self) -> Result<(), ReplicationError> {
        let state = &self.leadership.state;
        let open = state.transition().await?;
        let epoch = state.cluster().await?.epoch;
        // A role that was not taken back gives its lease back first.
        let is_over = |entry: &Transition| match entry.kind {
            TransitionKind::Failback => false,
            TransitionKind::TakenBack => epoch >= entry.epoch,
            TransitionKind::Switchover | TransitionKind::Failover => true,
        };
        if open.as_ref().is_some_and(is_over) && state.cluster().await?.role == Some(Role::Primary)
        {
            let database = &self.leadership.config.local.datastore.database;
            // Sessions from before the promotion are read-only for as long as they live.
            if let Err(error) = end_sessions_from_before(state.session(), database).await {
                log::warn!("{error}");
            }
            state.close_journal(self.leadership.lock).await?;
        }
        Ok(())
    }

    async fn look(&mut self, config: &Arc<Config>) -> Result<Option<End>, ReplicationError> {
        let state = &self.leadership.state;
        state.still_ours(self.leadership.lock).await?;
        self.writer.see_datastore(Side::Local, None);
        self.writer.settle_events(state).await;
        let cluster = state.cluster().await?;
        let fence = state.fence_record().await?;
        self.show(&cluster, fence.as_ref());
        if cluster.role == Some(Role::Spare) {
            return Ok(Some(End::RoleChanged));
        }
        self.conflicting = false;
        if config.role == WantedRole::Spare && !is_contradicted(self.writer, config, state).await? {
            if self.come_back(config).await? {
                return Ok(Some(End::RoleChanged));
            }
        } else {
            self.returning.over(self.writer.now());
        }
        if config.artifacts.mode == ArtifactsMode::Shared
            && let Err(error) = self.forget_taking_back(config, &cluster).await
        {
            log::warn!("{error}; the lease is given back as soon as its store answers");
        }
        if fence.is_none() {
            self.unproven = None;
            self.writer
                .release(|hold| hold.reason == HoldReason::ForceNeeded);
        }
        match (fence, cluster.role) {
            (Some(fence), _) => self.stay_fenced(config, &cluster, &fence).await?,
            (None, Some(_)) => self.stand(config, &cluster).await?,
            (None, None) if config.role == WantedRole::Primary => self.declare(config).await?,
            // The peer reports that it was the primary. Nothing is done as long as the peer does
            // not answer.
            (None, None) => {}
        }
        if config.role != WantedRole::Spare && !self.conflicting {
            self.writer
                .release(|hold| matches!(hold.reason, HoldReason::Conflict | HoldReason::Failed));
        }
        Ok(None)
    }

    /// Shows a conflict that an operator must decide. Nothing else is done here.
    fn conflict(&mut self, detail: &str, next_step: &str) {
        self.conflicting = true;
        self.writer
            .hold(HoldReason::Conflict, detail, next_step, false);
    }

    fn show(&self, cluster: &ClusterRecord, fence: Option<&FenceRecord>) {
        self.writer.update(|state| {
            state.cluster.role = cluster.role;
            state.cluster.epoch = Some(cluster.epoch);
            state.cluster.since = Some(cluster.since);
            state.spare.point = None;
            state.cluster.fenced_by = fence.map(|fence| (fence.epoch, fence.by_cluster.clone()));
            state.work = match fence {
                Some(_) => Work::Fenced,
                None if cluster.role.is_some() => Work::Primary,
                None => Work::Starting,
            };
            // For a fenced cluster the last proof counts.
            state.local.fenced = match (fence, state.local.fenced) {
                (Some(_), Some(false)) => Some(false),
                (fence, _) => Some(fence.is_some()),
            };
        });
    }

    /// Tries to come back, and returns whether this cluster is a spare now. An obstacle is shown,
    /// and the cluster stays in its role.
    async fn come_back(&mut self, config: &Arc<Config>) -> Result<bool, ReplicationError> {
        let leadership = self.leadership;
        let writer = self.writer;
        let state = LocalCluster::of(config).state().await?;
        let on_step = |shown| writer.update(|state| state.handover.transition = Some(shown));
        let came = come_back(config, &state, leadership.lock, &on_step).await;
        writer.update(|state| state.handover.transition = None);
        match came {
            Ok(()) => {
                writer.release(|hold| hold.reason != HoldReason::Config);
                Ok(true)
            }
            // The local server failed, or another process works here.
            Err(error @ ReplicationError::State(_)) => Err(error),
            Err(error) => {
                if matches!(error, ReplicationError::Fence(_)) {
                    // The fence was set, but not enforced completely.
                    writer.update(|state| state.cluster.fence_begun = true);
                }
                let pace = writer.hold_for(&error);
                let now = writer.now();
                self.returning
                    .failed(now, error.code(), &error.to_string(), pace);
                Ok(false)
            }
        }
    }

    /// Returns the peer's report; None: the peer does not answer.
    async fn see_peer(&mut self, config: &Config) -> Result<Option<PeerSeen>, ReplicationError> {
        let looked =
            tokio::time::timeout(PEER_TIMEOUT, look_at_peer(config, &PeerCluster::of(config)))
                .await;
        let error = match looked {
            Ok(Ok(seen)) => {
                self.failures.over(self.writer.now());
                self.writer.see_datastore(Side::Peer, None);
                self.writer.release(|hold| {
                    matches!(
                        hold.reason,
                        HoldReason::PeerUnreachable | HoldReason::SameServer
                    )
                });
                let record = seen.theirs.record.as_ref();
                self.writer.update(|state| {
                    state.peer.version = Some(seen.version.clone());
                    state.peer.tls = Some(seen.tls);
                    state.peer.fenced = Some(seen.theirs.fenced);
                    state.peer_record.role = record.and_then(|record| record.role);
                    state.peer_record.epoch = record.map(|record| record.epoch);
                });
                return Ok(Some(seen));
            }
            Ok(Err(error)) if error.side() == Some(Side::Local) => return Err(error),
            Ok(Err(error)) => error,
            Err(_) => ReplicationError::Precondition {
                check: ErrorCode::PeerUnreachable,
                text: format!(
                    "the peer does not answer within {} s",
                    PEER_TIMEOUT.as_secs()
                ),
                next_step: "check that the peer's server runs".into(),
            },
        };
        self.make_room(config, &error).await;
        let now = self.writer.now();
        let text = error.to_string();
        self.failures
            .failed(now, error.code(), &text, Pace::Passing);
        if error.code() == ErrorCode::SameServer {
            let step = error.next_step();
            self.writer
                .hold(HoldReason::SameServer, &text, &step, false);
        } else {
            self.writer.see_datastore(Side::Peer, Some(text));
        }
        Ok(None)
    }
}

impl Primary<'_> {
    /// Makes room for a session on an old primary that has no free connections, because it must be
    /// fenced even then.
    async fn make_room(&self, config: &Config, error: &ReplicationError) {
        if !error
            .datastore()
            .is_some_and(|error| error.is_for_want_of_room())
        {
            return;
        }
        let Ok(Some(promotion)) = self.leadership.state.promotion().await else {
            return;
        };
        if promotion.peer_fenced {
            return;
        }
        let peer = PeerCluster::of(config);
        if let Err(error) = peer.make_room(&promotion.system_id).await {
            log::debug!("{error}");
        }
    }
}

fn forces(config: &Config, epoch: i64) -> bool {
    i64::try_from(config.force_epoch) == Ok(epoch)
}
