//! Promotion of a spare, if the configuration asks for it, and the completion of a handover that an
//! earlier process began.

use super::SpareWorker;
use super::interrupts::called_off;
use super::stream_listener::StreamListener;
use crate::cluster::{LocalCluster, PeerCluster, Record, StateDb};
use crate::config::Config;
use crate::domain::{EventKind, HoldReason, Role, Transition};
use crate::replication::{Carrier, ReplicationError};
use crate::role::{Handover, Outcome, may_have_fenced, request_id, wants_promotion};
use crate::service::pair::{has_pusher, is_contradicted};
use chrono::TimeDelta;
use std::sync::Arc;
use std::time::Duration;

/// Interval between two tries of a held handover: the obstacle may be gone.
pub(super) const RETRY_AFTER: TimeDelta = TimeDelta::seconds(30);
/// Time limit for the peer to report its epoch before a handover begins. A peer that is gone may
/// not even refuse the connection.
const PEER_RECORD_TIMEOUT: Duration = Duration::from_millis(400);

/// Time after an answer of the peer in which one silence does not mean that the peer is gone.
const RECENT_ANSWER: Duration = Duration::from_secs(60);

impl SpareWorker<'_> {
    /// Takes over if the configuration asks for it. True: this cluster is the primary now.
    pub(super) async fn take_over(
        &mut self,
        config: &Arc<Config>,
    ) -> Result<bool, ReplicationError> {
        let role = self.leadership.state.cluster().await?.role;
        if role == Some(Role::Primary) {
            // The commit of the promotion may have been reported to nobody.
            self.writer
                .release(|hold| hold.reason != HoldReason::Config);
            return Ok(true);
        }
        // Half replaced bytes come first.
        if role.is_none() || self.unsettled {
            return Ok(false);
        }
        let entry = self.leadership.state.transition().await?;
        let steady = self.writer.clock.steady();
        let due = self.handover_at.is_none_or(|at| at <= steady);
        if !wants_promotion(config) {
            return self.not_asked(config, entry, due).await;
        }
        // A request that was undone is not started again by itself, because it cost the primary its
        // writers for a while.
        if let Some(entry) = entry
            .as_ref()
            .filter(|entry| entry.undone.is_some() && entry.asked == request_id(config))
        {
            let why = entry.undone.clone();
            self.writer.update(|state| state.handover.undone = why);
            if may_have_fenced(entry) && due {
                return self.undo(config, entry.clone()).await;
            }
            return Ok(false);
        }
        if !due {
            return Ok(false);
        }
        // A handover that may have fenced the primary goes on.
        let begun = entry.as_ref().is_some_and(may_have_fenced);
        let state = &self.leadership.state;
        self.contradicted = !begun && is_contradicted(self.writer, config, state).await?;
        if self.contradicted {
            return Ok(false);
        }
        self.hand_over(config).await
    }

    /// Undoes a handover that is no longer asked for, and forgets it. A later request counts as a
    /// new one.
    async fn not_asked(
        &mut self,
        config: &Arc<Config>,
        entry: Option<Transition>,
        due: bool,
    ) -> Result<bool, ReplicationError> {
        if let Some(entry) = entry {
            if may_have_fenced(&entry) {
                if due && self.leaves_it_to_the_pusher(config, &entry).await? {
                    return Ok(false);
                }
                if due && self.undo(config, entry).await? {
                    return Ok(true);
                }
                if self.handover_at.is_some() {
                    return Ok(false);
                }
            }
            self.leadership
                .state
                .close_journal(self.leadership.lock)
                .await?;
        }
        self.nothing_asked();
        Ok(false)
    }

    /// Returns whether a process that pushes began this handover, and only it reaches the primary
    /// whose fence must be withdrawn. It may still finish the handover, so nothing is undone here.
    async fn leaves_it_to_the_pusher(
        &mut self,
        config: &Config,
        entry: &Transition,
    ) -> Result<bool, ReplicationError> {
        if entry.undone.is_some() || !has_pusher(config, &self.leadership.state).await? {
            return Ok(false);
        }
        let asked = tokio::time::timeout(PEER_RECORD_TIMEOUT, self.refresh_peer_record(config));
        if matches!(asked.await, Ok(Ok(()))) {
            return Ok(false);
        }
        let steady = self.writer.clock.steady();
        let retry = TimeDelta::from_std(config.takeover.fence_retry);
        self.handover_at = Some(steady + retry.unwrap_or(RETRY_AFTER));
        let text = format!(
            "the warm-spare at the primary's site has begun a handover (step {}) and is gone: the primary may still be fenced, and it does not answer here",
            entry.step_name()
        );
        let step = format!(
            "start warm-spare at the primary's site, which finishes the handover or withdraws it; or, if the primary is lost, set role = \"primary\" and force_epoch = {} here",
            self.writer.read(|state| state.next_epoch()).unwrap_or(2)
        );
        self.writer
            .hold(HoldReason::ForceNeeded, &text, &step, false);
        Ok(true)
    }

    fn nothing_asked(&mut self) {
        self.handover_at = None;
        self.contradicted = false;
        if self.writer.read(|state| state.handover.undone.is_some()) {
            self.writer.update(|state| state.handover.undone = None);
        }
        // The other process may still ask for it.
        self.writer.release(|hold| {
            hold.reason.is_of_a_takeover() && hold.reason != HoldReason::WishesDiffer
        });
    }

    async fn hand_over(&mut self, config: &Arc<Config>) -> Result<bool, ReplicationError> {
        self.proving = None;
        // The leadership's own session has other users, and a handover uses transactions.
        let state = LocalCluster::of(config).state().await?;
        let outcome = match self.begin_handover(config, &state).await {
            Ok(handover) => {
                let called_off = called_off(self.writer, self.configs.clone(), config);
                tokio::select! {
                    outcome = Box::pin(handover.run()) => outcome.map(Some),
                    () = called_off => Ok(None),
                }
            }
            Err(error) => Err(error),
        };
        self.writer.update(|state| state.handover.transition = None);
        match outcome? {
            Some(outcome) => self.ended(config, outcome).await,
            None => {
                // This is like a kill: the journal says how far the handover came, and a process
                // that is no longer asked for it undoes it.
                log::warn!(
                    "the running handover is called off: the configuration asks for another role"
                );
                self.unsettled = true;
                self.handover_at = None;
                LocalCluster::of(config).lsn_at_rest().await?;
                Ok(false)
            }
        }
    }

    /// Undoes a handover. True: there was nothing to undo, because this cluster is the primary.
    async fn undo(
        &mut self,
        config: &Arc<Config>,
        entry: Transition,
    ) -> Result<bool, ReplicationError> {
        let state = LocalCluster::of(config).state().await?;
        let handover = self.begin_handover(config, &state).await?;
        let outcome = Box::pin(handover.roll_back(entry)).await?;
        drop(handover);
        self.ended(config, outcome).await
    }

    async fn begin_handover<'s>(
        &self,
        config: &'s Arc<Config>,
        state: &'s StateDb,
    ) -> Result<Handover<'s>, ReplicationError> {
        let mut epoch = self.epoch_to_take(state).await?;
        if i64::try_from(config.force_epoch) != Ok(epoch) {
            // A forced takeover may have no peer to ask, and no time for it.
            let heard =
                tokio::time::timeout(PEER_RECORD_TIMEOUT, self.refresh_peer_record(config)).await;
            if let Ok(Err(error)) = heard {
                log::debug!("{error}");
            }
            epoch = self.epoch_to_take(state).await?;
        }
        let (writer, waits) = (self.writer.clone(), self.writer.clone());
        let (stores, throttle) = (config.clone(), writer.throttle.clone());
        Ok(Handover {
            config,
            state,
            peer: PeerCluster::of(config),
            lock: self.leadership.lock,
            carrier: Box::new(move || Ok(Carrier::open(&stores, &throttle)?)),
            spool: self.leadership.data.clone(),
            clock: self.writer.clock.clone(),
            on_step: Box::new(move |shown| {
                writer.update(|state| state.handover.transition = Some(shown))
            }),
            observer: StreamListener::of(self.writer),
            epoch,
            heard_lately: self
                .writer
                .read(|state| state.peer_answered_within(RECENT_ANSWER)),
            on_wait: Box::new(move |why, next_step| {
                waits.hold(HoldReason::NotAttached, why, next_step, false);
            }),
        })
    }

    /// Returns the epoch that the status shows, and that the operator may have typed.
    async fn epoch_to_take(&self, state: &StateDb) -> Result<i64, ReplicationError> {
        let recorded = state.cluster().await?.epoch.max(1).saturating_add(1);
        let shown = self.writer.read(|state| state.next_epoch());
        Ok(shown.map_or(recorded, |shown| shown.max(recorded)))
    }

    async fn ended(
        &mut self,
        config: &Arc<Config>,
        outcome: Outcome,
    ) -> Result<bool, ReplicationError> {
        self.writer.update(|state| state.handover.transition = None);
        let (now, steady) = (self.writer.now(), self.writer.clock.steady());
        match outcome {
            Outcome::Promoted => {
                self.writer.update(|state| {
                    state.handover.undone = None;
                    // The takeover has asked it, or has found nobody there.
                    state.cluster.peer_asked = true;
                });
                self.writer
                    .release(|hold| hold.reason != HoldReason::Config);
                return Ok(true);
            }
            Outcome::Held(error) => {
                self.handover_at = Some(steady + RETRY_AFTER);
                let (text, next_step) = (error.to_string(), error.next_step());
                let text = text.strip_prefix("force_needed: ").unwrap_or(&text);
                let already_logged = self
                    .writer
                    .read(|state| state.hold.as_ref().is_some_and(|hold| hold.detail == text));
                if !already_logged {
                    log::warn!("{text}; next step: {next_step}");
                }
                self.writer
                    .hold(HoldReason::ForceNeeded, text, &next_step, false);
            }
            Outcome::Retry(error) => {
                let pace = self.writer.hold_for(&error);
                let code = error.code();
                self.failures.failed(now, code, &error.to_string(), pace);
                let retry = TimeDelta::from_std(config.takeover.fence_retry);
                self.handover_at = Some(steady + retry.unwrap_or(RETRY_AFTER));
            }
            Outcome::RolledBack(why) => {
                self.handover_at = None;
                self.writer.update(|state| {
                    state.handover.undone = Some(why);
                    // The peer has the fence state from before our own fence.
                    state.peer.fenced = None;
                    state.peer_record.fenced_by = None;
                });
                self.writer.release(|hold| hold.reason.is_of_a_takeover());
            }
            Outcome::RollbackPending(why, error) => {
                let retry = TimeDelta::from_std(config.takeover.fence_retry);
                self.handover_at = Some(steady + retry.unwrap_or(RETRY_AFTER));
                let text = format!(
                    "the handover was given up ({why}), and it is not known whether the primary is still fenced: {error}. The fence is withdrawn as soon as the primary answers"
                );
                let first = match error.is_of_a_store() {
                    true => error.next_step(),
                    false => "make the primary's datastore reachable".into(),
                };
                let next_step = format!(
                    "{first}: the primary may be read-only until then; or, if the primary is lost, set force_epoch = {}",
                    self.writer.read(|state| state.next_epoch()).unwrap_or(2)
                );
                self.writer
                    .hold(HoldReason::ForceNeeded, &text, &next_step, false);
                self.writer
                    .update(|state| state.handover.undone = Some(why));
            }
        }
        self.writer.settle_events(&self.leadership.state).await;
        Ok(false)
    }

    /// Reads the primary's record. The next epoch must be higher than the primary's epoch.
    pub(super) async fn refresh_peer_record(
        &self,
        config: &Config,
    ) -> Result<(), ReplicationError> {
        let state = &self.leadership.state;
        let record = PeerCluster::of(config).record().await?;
        let record = record.unwrap_or_default();
        self.withdraw_forgotten(config, &record).await?;
        let own = state.own_record().await?;
        if own.goes_on_with(&record) {
            let lock = self.leadership.lock;
            state.raise_known_epoch(lock, record.epoch).await?;
            if record.lineage != own.lineage && !record.lineage.is_empty() {
                state.adopt_lineage(lock, &record.lineage).await?;
            }
        }
        let epoch = state.cluster().await?.epoch;
        self.writer.update(|state| {
            state.cluster.epoch = Some(epoch);
            state.peer_record.role = record.role;
            let fence = record.fence.as_ref();
            state.peer_record.fenced_by =
                fence.map(|fence| (fence.epoch, fence.by_cluster.clone()));
            state.peer_record.epoch = (!record.cluster_id.is_empty()).then_some(record.epoch);
        });
        Ok(())
    }

    /// Withdraws a fence of our own that no journal knows. Its maker was superseded, or looked for
    /// it elsewhere.
    async fn withdraw_forgotten(
        &self,
        config: &Config,
        record: &Record,
    ) -> Result<(), ReplicationError> {
        let state = &self.leadership.state;
        let cluster = state.cluster().await?;
        let own_fence = record.fence.as_ref();
        let own_fence = own_fence.filter(|fence| fence.by_cluster == cluster.id && !fence.settled);
        let Some(fence) = own_fence else {
            return Ok(());
        };
        let known = state.transition().await?;
        if known.is_some_and(|entry| may_have_fenced(&entry)) {
            return Ok(());
        }
        let Some(point) = state.recovery_point().await? else {
            return Ok(());
        };
        if let Some(lease) = &state.lease_record().await?
            && lease.touched
        {
            // The lease may still say that the primary is fenced.
            return Ok(());
        }
        let hand = PeerCluster::of(config).fence(&point.system_id).await?;
        state.still_ours(self.leadership.lock).await?;
        if let Some(hand) = hand
            && hand.withdraw(fence.epoch, &cluster.id).await?
        {
            hand.refresh().await?;
            let text = format!("a forgotten fence of epoch {} was withdrawn", fence.epoch);
            log::warn!("peer: {text}");
            self.writer.note(EventKind::Fence, &text);
        }
        Ok(())
    }
}
