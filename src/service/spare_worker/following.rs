//! Follows the stream for as long as it continues, with the other due duties beside it.

use super::SpareWorker;
use super::interrupts::another_stream;
use super::proving::proving_ended;
use super::stream_listener::{StreamListener, held};
use super::verification::finished;
use crate::cluster::preparation::Names;
use crate::cluster::{LocalCluster, PeerCluster};
use crate::config::{Config, Mode};
use crate::domain::EventKind;
use crate::observe::Mode as Shown;
use crate::replication::stream::{self, Follow, FollowContext, Followed, Gap};
use crate::replication::{Carrier, Chosen, ReplicationError, approve, decide};
use crate::service::next;
use crate::service::pair::until_agreed;
use crate::service::plan::{Next, Rules};
use chrono::TimeDelta;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum number of gaps within `GAPS_KEPT` that are closed without a wait.
const GAPS_AT_ONCE: usize = 5;
const GAPS_KEPT: Duration = Duration::from_secs(600);
/// Time limit for the peer's report of the cluster that has fenced it.
const PEER_RECORD_TIMEOUT: Duration = Duration::from_secs(15);

enum Ended {
    Stream(Result<Followed, Gap>),
    Other(Result<&'static str, ReplicationError>),
}

impl SpareWorker<'_> {
    /// Returns whether the last copy was made for a stream, and the stream may continue now.
    pub(super) fn follows(&self, config: &Config) -> bool {
        let now = self.writer.now();
        let slot = self
            .writer
            .read(|state| state.spare.point.as_ref().is_some_and(|p| p.is_followed()));
        slot && !self.plan.repair
            && !self.rows_differ
            && !Rules::of(config).is_paused(now)
            && self.plan.not_before.is_none_or(|earliest| earliest <= now)
    }

    pub(super) async fn follow(&mut self, config: &Arc<Config>) -> Result<(), ReplicationError> {
        if config.replication.mode == Mode::Snapshot || !self.chosen_or_bounded(config).await? {
            return self.leave_stream(config).await;
        }
        let Some(recorded) = self.point() else {
            return Ok(());
        };
        let leadership = self.leadership;
        let state = LocalCluster::of(config).state().await?;
        let carrier = Carrier::open(config, &self.writer.throttle)?;
        let ear = StreamListener::of(self.writer);
        let cluster = state.cluster().await?;
        let names = Names::of(&cluster.id, &config.replication);
        if names.slot != recorded.slot() {
            let text = format!(
                "slot {} must be used instead of {}; a new baseline is made",
                names.slot,
                recorded.slot()
            );
            log::info!("peer: {text}");
            self.writer.note(EventKind::Gap, &text);
            self.drop_our_slot(config).await;
            self.plan.repair = true;
            self.rows_differ = true;
            return Ok(());
        }
        self.writer.update(|state| {
            state.spare.gate_waiting = None;
            state.spare.waiting = None;
            state.spare.lag_bytes = None;
        });
        let context = FollowContext {
            config,
            state: &state,
            lock: leadership.lock,
            carrier: &carrier,
            spool: leadership.data.clone(),
        };
        let follow = Follow {
            observer: ear.clone(),
            clock: self.writer.clock.clone(),
            retried: self.retried.clone(),
            differed: self.differed.clone(),
            recording: self.beside.recording.clone(),
            ..Follow::new(context, names, recorded)
        };
        // Bytes may be half replaced when the stream ends.
        self.unsettled = true;
        let ended = tokio::select! {
            ended = stream::follow(&follow) => Ended::Stream(ended),
            why = self.chores(config, &ear) => Ended::Other(why),
        };
        self.writer.update(|state| {
            state.spare.gate_waiting = None;
            state.spare.waiting = None;
        });
        match ended {
            Ended::Other(why) => {
                log::info!("the stream starts again: {}", why?);
                Ok(())
            }
            // The stream has no end position here.
            Ended::Stream(Ok(_)) => Ok(()),
            Ended::Stream(Err(gap)) => self.followed(config, gap).await,
        }
    }

    /// Handles the end of the stream: a failure, or a gap that only a new baseline closes.
    async fn followed(&mut self, config: &Config, gap: Gap) -> Result<(), ReplicationError> {
        match gap.failure() {
            Ok(error) => Err(error),
            Err(gap) => {
                if let Gap::WentBack(doubt) = &gap {
                    approve(&self.leadership.state, &doubt.ask(config)?, config).await?;
                }
                let text = format!("{gap}; a new baseline is made");
                log::warn!("peer: {text}");
                self.writer.note(EventKind::Gap, &text);
                self.plan.repair = true;
                self.rows_differ = true;
                self.pace_gaps();
                // The slot fits nothing any more, and would keep log until the next copy is made.
                self.drop_our_slot(config).await;
                Ok(())
            }
        }
    }

    /// Delays the next copy if gaps are frequent. One gap is closed at once; frequent gaps would
    /// mean copies without end.
    fn pace_gaps(&mut self) {
        self.gaps.retain(|gap| gap.elapsed() < GAPS_KEPT);
        self.gaps.push(Instant::now());
        let times = self.gaps.len().saturating_sub(GAPS_AT_ONCE);
        if times > 0 {
            let seconds = 1_i64 << times.min(8);
            log::warn!(
                "peer: {} recent gaps; the next copy waits {seconds} s",
                self.gaps.len()
            );
            self.wait_for(TimeDelta::seconds(seconds));
        }
    }

    /// Chooses the mode. If that fails, nobody reads the slot, so this checks how much log the
    /// primary keeps for it.
    async fn chosen_or_bounded(&mut self, config: &Config) -> Result<bool, ReplicationError> {
        let chosen = self.choose(config).await;
        if chosen.is_err()
            && let Err(error) = self.look_at_slot(config).await
        {
            log::debug!("{error}");
        }
        chosen
    }

    /// Returns whether the stream is the mode to use, from the present state of both sides.
    pub(super) async fn choose(&self, config: &Config) -> Result<bool, ReplicationError> {
        let id = self.writer.read(|state| state.cluster.id.clone());
        let local = LocalCluster::of(config).maintenance().await?;
        let peer = PeerCluster::of(config).builder().await?;
        let chosen = decide(config, &id.unwrap_or_default(), &local, &peer).await?;
        self.refresh_peer_record(config).await?;
        self.show_mode(&chosen);
        Ok(chosen.stream.is_some())
    }

    pub(super) fn show_mode(&self, chosen: &Chosen) {
        let shown = Shown {
            stream: chosen.stream.is_some(),
            reason: chosen.reason.clone(),
        };
        if self
            .writer
            .read(|state| state.spare.mode.as_ref() != Some(&shown))
        {
            let name = if shown.stream { "stream" } else { "snapshots" };
            log::info!("replication by {name}: {}", shown.reason);
        }
        self.writer.update(|state| {
            state.spare.mode = Some(shown);
            state.on_primary.ours = Some(chosen.ours.clone());
            state.on_primary.orphans = Some(chosen.orphans.clone());
        });
    }

    /// Switches to full copies. The primary then need not keep any log for us.
    pub(super) async fn leave_stream(&mut self, config: &Config) -> Result<(), ReplicationError> {
        self.drop_our_slot(config).await;
        let lsn = self
            .writer
            .read(|state| Some(state.spare.point.as_ref()?.lsn.clone()));
        let lsn = lsn.unwrap_or_default();
        self.leadership.state.leave_stream(&lsn).await?;
        self.writer
            .note(EventKind::Mode, "full copies are made from now on");
        self.writer.update(|state| state.on_primary.held = None);
        super::super::load_state::recall(self.writer, config, &self.leadership.state).await
    }

    /// Checks how much log the primary keeps for our slot. While nothing is followed, no other task
    /// checks it.
    pub(super) async fn look_at_slot(&mut self, config: &Config) -> Result<(), ReplicationError> {
        let id = self.writer.read(|state| state.cluster.id.clone());
        let names = Names::of(&id.unwrap_or_default(), &config.replication);
        let clock = self.writer.clock.clone();
        let seen = stream::query(&PeerCluster::of(config), &names, &clock).await?;
        let held = held(&seen);
        let limit = config.replication.wal_hold_limit;
        let too_much = held.as_ref().is_some_and(|held| held.unconfirmed > limit);
        self.writer.update(|state| state.on_primary.held = held);
        if !names.slot_is_premade && too_much {
            log::warn!(
                "peer: the primary keeps more log for our slot than replication.wal_hold_limit; the slot is dropped, and a new baseline follows"
            );
            self.drop_our_slot(config).await;
        }
        Ok(())
    }

    /// Drops the slot, because a slot without a reader must keep no log. A failure here is ignored:
    /// the server has its own limit.
    pub(super) async fn drop_our_slot(&self, config: &Config) {
        let Some(slot) = self
            .writer
            .read(|state| Some(state.spare.point.as_ref()?.stream.as_ref()?.slot.clone()))
        else {
            return;
        };
        let Some(id) = self.writer.read(|state| state.cluster.id.clone()) else {
            return;
        };
        let holder = (&self.leadership.state, self.leadership.lock);
        match stream::drop_our_slot(&PeerCluster::of(config), holder, &id, &slot).await {
            Ok(true) => self
                .writer
                .note(EventKind::Slot, &format!("slot {slot} was dropped")),
            Ok(false) => {}
            Err(error) => log::warn!("{error}; slot {slot} stays on the primary"),
        }
    }

    /// Does the due duties beside the stream. Ends when a configuration needs another stream.
    async fn chores(
        &mut self,
        config: &Arc<Config>,
        ear: &StreamListener,
    ) -> Result<&'static str, ReplicationError> {
        let mut confirmations = ear.confirmed.subscribe();
        let mut rules = Rules::of(config);
        let found_unavailable = self.found_unavailable.clone();
        loop {
            self.prove_if_due(config);
            let now = self.writer.now();
            self.mind_the_clock();
            let until = match self.plan.beside(&rules, now) {
                Next::Verify => {
                    self.begin_verification(config);
                    continue;
                }
                Next::Sleep(until) => until,
                // The stream does all other duties.
                _ => now + TimeDelta::seconds(1),
            };
            let clock = self.writer.clock.clone();
            let until = self.soonest(until);
            tokio::select! {
                () = clock.sleep_until(until) => {}
                () = next(&mut self.configs) => {
                    let new = self.config();
                    if another_stream(&new, config) {
                        return Ok("another configuration");
                    }
                    rules = Rules::of(&new);
                }
                ended = finished(&mut self.verification) => {
                    self.verified(ended).await;
                    if self.rows_differ || self.plan.repair {
                        return Ok("a verification found differences");
                    }
                }
                () = until_agreed(self.writer, config), if self.contradicted => {
                    return Ok("both sites ask for the takeover");
                }
                () = ear.gets_on.notified() => self.gets_on(),
                ended = proving_ended(&mut self.proving) => self.proved(ended),
                () = found_unavailable.notified() => self.recount(config).await?,
                () = ear.unavailable_changed.notified() => self.recount(config).await?,
                () = ear.fenced.notified() => self.mind_the_fence(config).await,
                changed = confirmations.changed() => {
                    let confirmation = *confirmations.borrow_and_update();
                    if let (Ok(()), Some(confirmation)) = (changed, confirmation) {
                        self.confirm(confirmation).await?;
                    }
                }
            }
            self.verify_if_due();
            let steady = self.writer.clock.steady();
            if self.handover_at.is_some_and(|at| at <= steady) {
                return Ok("a handover is tried again");
            }
        }
    }

    fn gets_on(&mut self) {
        log::info!("following the primary's transactions");
        self.wait_no_more();
        self.plan.waiting = None;
        self.settled();
    }

    /// Finds out which cluster has made the primary read-only while no handover runs, and whether
    /// it is a forgotten fence of our own.
    pub(super) async fn mind_the_fence(&self, config: &Config) {
        match tokio::time::timeout(PEER_RECORD_TIMEOUT, self.refresh_peer_record(config)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::debug!("{error}"),
            Err(_) => log::debug!("peer: did not report in time which cluster has fenced it"),
        }
    }

    /// Counts the artifacts that are unavailable on the primary, as recorded beside the rows.
    pub(super) async fn recount(&mut self, config: &Config) -> Result<(), ReplicationError> {
        super::super::load_state::recall(self.writer, config, &self.leadership.state).await?;
        self.plan.unavailable = self
            .writer
            .read(crate::observe::ServiceState::waits_for_artifacts);
        Ok(())
    }
}
