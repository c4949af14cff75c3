//! Promotion of a spare, if the configuration asks for it, and the completion of a handover that an
//! earlier process began.

use super::Duties;
use super::following::Ear;
use super::interrupts::called_off;
use crate::cluster::{PeerFence, Record, State, peers_record};
use crate::config::Config;
use crate::domain::HoldReason;
use crate::domain::{EventKind, Role, Transition};
use crate::replication::{Courier, PassError, end_appliers};
use crate::role::{Handover, Outcome, asked, is_asked_for, may_have_fenced};
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

impl Duties<'_> {
    /// Takes over if the configuration asks for it. True: this cluster is the primary now.
    pub(super) async fn take_over(&mut self, config: &Arc<Config>) -> Result<bool, PassError> {
        let role = self.tenure.state.cluster().await?.role;
        if role == Some(Role::Primary) {
            // The commit of the promotion may have been reported to nobody.
            self.desk.release(|hold| hold.reason != HoldReason::Config);
            return Ok(true);
        }
        // Half replaced bytes come first.
        if role.is_none() || self.unsettled {
            return Ok(false);
        }
        let entry = self.tenure.state.transition().await?;
        let steady = self.desk.clock.steady();
        let due = self.handover_at.is_none_or(|at| at <= steady);
        if !is_asked_for(config) {
            return self.not_asked(config, entry, due).await;
        }
        // A request that was undone is not started again by itself, because it cost the primary its
        // writers for a while.
        if let Some(entry) = entry
            .as_ref()
            .filter(|entry| entry.undone.is_some() && entry.asked == asked(config))
        {
            let why = entry.undone.clone();
            self.desk.update(|state| state.undone = why);
            if may_have_fenced(entry) && due {
                return self.undo(config, entry.clone()).await;
            }
            return Ok(false);
        }
        if !due {
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
    ) -> Result<bool, PassError> {
        if let Some(entry) = entry {
            if may_have_fenced(&entry) {
                if due && self.undo(config, entry).await? {
                    return Ok(true);
                }
                if self.handover_at.is_some() {
                    return Ok(false);
                }
            }
            self.tenure.state.close_journal(self.tenure.lock).await?;
        }
        self.nothing_asked();
        Ok(false)
    }

    fn nothing_asked(&mut self) {
        self.handover_at = None;
        if self.desk.read(|state| state.undone.is_some()) {
            self.desk.update(|state| state.undone = None);
        }
        self.desk
            .release(|hold| hold.reason == HoldReason::ForceNeeded);
    }

    async fn hand_over(&mut self, config: &Arc<Config>) -> Result<bool, PassError> {
        // The tenure's own session has other users, and a handover uses transactions.
        let state = State::open(&config.local.datastore).await?;
        let outcome = match self.begin_handover(config, &state).await {
            Ok(handover) => {
                let called_off = called_off(self.desk, self.configs.clone(), config);
                tokio::select! {
                    outcome = Box::pin(handover.run()) => outcome.map(Some),
                    () = called_off => Ok(None),
                }
            }
            Err(error) => Err(error),
        };
        self.desk.update(|state| state.transition = None);
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
                end_appliers(config).await?;
                Ok(false)
            }
        }
    }

    /// Undoes a handover. True: there was nothing to undo, because this cluster is the primary.
    async fn undo(&mut self, config: &Arc<Config>, entry: Transition) -> Result<bool, PassError> {
        let state = State::open(&config.local.datastore).await?;
        let handover = self.begin_handover(config, &state).await?;
        let outcome = Box::pin(handover.undo_now(entry)).await?;
        drop(handover);
        self.ended(config, outcome).await
    }

    async fn begin_handover<'s>(
        &self,
        config: &'s Arc<Config>,
        state: &'s State,
    ) -> Result<Handover<'s>, PassError> {
        let mut epoch = self.epoch_to_take(state).await?;
        if i64::try_from(config.force_epoch) != Ok(epoch) {
            // A forced takeover may have no peer to ask, and no time for it.
            let heard = tokio::time::timeout(PEER_RECORD_TIMEOUT, self.hear_of_peer(config)).await;
            if let Ok(Err(error)) = heard {
                log::debug!("{error}");
            }
            epoch = self.epoch_to_take(state).await?;
        }
        let desk = self.desk.clone();
        let (stores, throttle) = (config.clone(), desk.throttle.clone());
        Ok(Handover {
            config,
            state,
            lock: self.tenure.lock,
            courier: Box::new(move || Ok(Courier::open(&stores, &throttle)?)),
            spool: self.tenure.data.clone(),
            clock: self.desk.clock.clone(),
            told: Box::new(move |shown| desk.update(|state| state.transition = Some(shown))),
            heard: Ear::of(self.desk),
            epoch,
            heard_lately: self
                .desk
                .read(|state| state.peer_answered_within(RECENT_ANSWER)),
        })
    }

    /// Returns the epoch that the status shows, and that the operator may have typed.
    async fn epoch_to_take(&self, state: &State) -> Result<i64, PassError> {
        let recorded = state.cluster().await?.epoch.max(1).saturating_add(1);
        let shown = self.desk.read(|state| state.next_epoch());
        Ok(shown.map_or(recorded, |shown| shown.max(recorded)))
    }

    async fn ended(&mut self, config: &Arc<Config>, outcome: Outcome) -> Result<bool, PassError> {
        self.desk.update(|state| state.transition = None);
        let (now, steady) = (self.desk.now(), self.desk.clock.steady());
        match outcome {
            Outcome::Promoted => {
                self.desk.update(|state| state.undone = None);
                self.desk.release(|hold| hold.reason != HoldReason::Config);
                return Ok(true);
            }
            Outcome::Held(error) => {
                self.handover_at = Some(steady + RETRY_AFTER);
                let (text, next_step) = (error.to_string(), error.next_step());
                let text = text.strip_prefix("force_needed: ").unwrap_or(&text);
                let already_logged = self
                    .desk
                    .read(|state| state.hold.as_ref().is_some_and(|hold| hold.detail == text));
                if !already_logged {
                    log::warn!("{text}; next step: {next_step}");
                }
                self.desk
                    .hold(HoldReason::ForceNeeded, text, &next_step, false);
            }
            Outcome::Again(error) => {
                let pace = self.desk.hold_for(&error);
                let code = error.code();
                self.complaint.failed(now, code, &error.to_string(), pace);
                let retry = TimeDelta::from_std(config.takeover.fence_retry);
                self.handover_at = Some(steady + retry.unwrap_or(RETRY_AFTER));
            }
            Outcome::Undone(why) => {
                self.handover_at = None;
                self.desk.update(|state| {
                    state.undone = Some(why);
                    // The peer has the fence state from before our own fence.
                    state.peer.fenced = None;
                    state.peer_fenced_by = None;
                });
                self.desk
                    .release(|hold| hold.reason == HoldReason::ForceNeeded);
            }
            Outcome::Undoing(why, error) => {
                let retry = TimeDelta::from_std(config.takeover.fence_retry);
                self.handover_at = Some(steady + retry.unwrap_or(RETRY_AFTER));
                let text = format!(
                    "the handover was given up ({why}), and it is not known whether the primary is still fenced: {error}. The fence is withdrawn as soon as the primary answers"
                );
                let next_step = format!(
                    "make the primary's datastore reachable: it may be read-only until then; or, if the primary is lost, set force_epoch = {}",
                    self.desk.read(|state| state.next_epoch()).unwrap_or(2)
                );
                self.desk
                    .hold(HoldReason::ForceNeeded, &text, &next_step, false);
                self.desk.update(|state| state.undone = Some(why));
            }
        }
        self.desk.settle_events(&self.tenure.state).await;
        Ok(false)
    }

    /// Reads the primary's record. The next epoch must be higher than the primary's epoch.
    pub(super) async fn hear_of_peer(&self, config: &Config) -> Result<(), PassError> {
        let state = &self.tenure.state;
        let record = peers_record(&config.peer.datastore).await?;
        let record = record.unwrap_or_default();
        self.withdraw_forgotten(config, &record).await?;
        let own = state.own_record().await?;
        if own.goes_on_with(&record) {
            let lock = self.tenure.lock;
            state.heard_of_epoch(lock, record.epoch).await?;
            if record.lineage != own.lineage && !record.lineage.is_empty() {
                state.adopt_lineage(lock, &record.lineage).await?;
            }
        }
        let epoch = state.cluster().await?.epoch;
        self.desk.update(|state| {
            state.epoch = Some(epoch);
            state.peer_role = record.role;
            let fence = record.fence.as_ref();
            state.peer_fenced_by = fence.map(|fence| (fence.epoch, fence.by_cluster.clone()));
            state.peer_epoch = (!record.cluster_id.is_empty()).then_some(record.epoch);
        });
        Ok(())
    }

    /// Withdraws a fence of our own that no journal knows. Its maker was superseded, or looked for
    /// it elsewhere.
    async fn withdraw_forgotten(&self, config: &Config, record: &Record) -> Result<(), PassError> {
        let state = &self.tenure.state;
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
        let Some(point) = state.copied_point().await? else {
            return Ok(());
        };
        let hand = PeerFence::open(&config.peer.datastore, &point.system_id).await?;
        state.still_ours(self.tenure.lock).await?;
        if let Some(hand) = hand
            && hand.withdraw(fence.epoch, &cluster.id).await?
        {
            hand.refresh().await?;
            let text = format!("a forgotten fence of epoch {} was withdrawn", fence.epoch);
            log::warn!("peer: {text}");
            self.desk.note(EventKind::Fence, &text);
        }
        Ok(())
    }
}
