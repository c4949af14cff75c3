//! Follows the stream for as long as it continues, with the other due duties beside it.

use super::Duties;
use super::interrupts::another_stream;
use super::passes::note_brought;
use super::verification::finished;
use crate::cluster::preparation::Names;
use crate::cluster::{Confirmation, LocalSession, PeerSession, State};
use crate::config::{Config, Mode};
use crate::domain::{EventKind, Lsn, Side};
use crate::observe::{Held, Mode as Shown};
use crate::replication::stream::{self, Applied, Follow, Followed, Gap, Seen, Told};
use crate::replication::{Chosen, Courier, PassError, approve, decide};
use crate::service::desk::Desk;
use crate::service::next;
use crate::service::plan::{Next, Rules};
use chrono::{DateTime, TimeDelta, Utc};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// Maximum number of gaps within `GAPS_KEPT` that are closed without a wait.
const GAPS_AT_ONCE: usize = 5;
const GAPS_KEPT: Duration = Duration::from_secs(600);
/// Time limit for the peer's report of the cluster that has fenced it.
const PEER_RECORD_TIMEOUT: Duration = Duration::from_secs(15);

/// Receiver of the stream's reports. It puts them into the state at once, and leaves everything
/// that must be written down to the chores.
pub(super) struct Ear {
    desk: Desk,
    /// The stream makes progress: a change was applied, or no changes wait.
    gets_on: Notify,
    progress_reported: AtomicBool,
    lacking: Notify,
    /// The primary was seen read-only.
    fenced: Notify,
    confirmed: watch::Sender<Option<Confirmation>>,
}

impl Ear {
    pub(super) fn of(desk: &Desk) -> Arc<Ear> {
        Arc::new(Ear {
            desk: desk.clone(),
            gets_on: Notify::new(),
            progress_reported: AtomicBool::new(false),
            lacking: Notify::new(),
            fenced: Notify::new(),
            confirmed: watch::Sender::new(None),
        })
    }

    /// Reports the first progress. The start of sending does not count, because a failure would
    /// then end and begin again at every try.
    fn gets_on(&self) {
        if !self.progress_reported.swap(true, Ordering::Relaxed) {
            self.gets_on.notify_one();
        }
    }
}

impl Told for Ear {
    fn following(&self) {
        self.desk.see_datastore(Side::Peer, None);
    }

    fn applied(&self, applied: Applied) {
        self.gets_on();
        let counter = &self.desk.counters.transactions_applied;
        counter.inc_by(applied.transactions);
        self.desk.update(|state| {
            if let Some(point) = &mut state.point {
                point.lsn = applied.point.lsn.to_string();
                point.commit_time = applied.point.commit_time;
            }
            state.gate_waiting = Some(applied.waiting);
            if applied.waiting == 0 {
                state.waiting = Some(false);
                state.lag_bytes = Some(0);
            }
        });
        if applied.lacking {
            self.lacking.notify_one();
        }
    }

    fn waiting(&self, transactions: u64) {
        self.desk.update(|state| {
            state.gate_waiting = Some(transactions);
            if state.waiting != Some(true) {
                state.waiting = Some(true);
                // Unknown until the primary is asked again.
                state.lag_bytes = None;
            }
        });
    }

    fn waited(&self, time: Duration) {
        self.desk.counters.gate_wait.observe(time.as_secs_f64());
    }

    fn trouble(&self, trouble: Option<&Arc<PassError>>) {
        match trouble {
            Some(error) => {
                self.desk.hold_for(error);
            }
            None => self.desk.release(|hold| !hold.reason.stays()),
        }
    }

    fn copied(&self, bytes: u64) {
        self.desk.counters.artifacts_copied.inc();
        self.desk.counters.artifact_bytes_copied.inc_by(bytes);
    }

    fn brought(&self, artifacts: usize) {
        note_brought(&self.desk, artifacts);
        self.lacking.notify_one();
    }

    fn seen(&self, seen: &Seen) {
        self.desk.see_datastore(Side::Peer, None);
        self.desk.update(|state| {
            state.peer.version = Some(seen.server.version.clone());
            state.peer.tls = Some(seen.server.tls);
            state.peer.fenced = Some(seen.fenced);
            state.held = held(seen);
            let reached = state.point.as_ref().and_then(|p| p.lsn.parse::<Lsn>().ok());
            if state.waiting == Some(true) {
                state.lag_bytes = reached.map(|lsn| seen.wal.0.saturating_sub(lsn.0));
            }
        });
        if seen.fenced {
            self.fenced.notify_one();
        }
    }

    fn compared(&self, server_started: &str) {
        self.desk.update(|state| {
            if let Some(point) = &mut state.point {
                point.server_started = server_started.to_string();
            }
        });
    }

    fn compared_tables(&self, oldest: Option<DateTime<Utc>>) {
        self.desk.update(|state| state.compared = oldest);
    }

    fn confirmed(&self, confirmation: Confirmation) {
        self.gets_on();
        self.desk.update(|state| {
            if state.gate_waiting.unwrap_or_default() == 0 {
                state.waiting = Some(false);
                state.lag_bytes = Some(0);
            }
        });
        self.confirmed.send_replace(Some(confirmation));
    }
}

fn held(seen: &Seen) -> Option<Held> {
    seen.slot.as_ref().map(|slot| Held {
        bytes: slot.held_bytes,
        bound: seen.wal_bound,
        unconfirmed: slot.unconfirmed_bytes,
        oldest_writer: seen.oldest_writer.clone(),
    })
}

enum Ended {
    Stream(Result<Followed, Gap>),
    Other(Result<&'static str, PassError>),
}

impl Duties<'_> {
    /// Returns whether the last copy was made for a stream, and the stream may continue now.
    pub(super) fn follows(&self, config: &Config) -> bool {
        let now = self.desk.now();
        let slot = self
            .desk
            .read(|state| state.point.as_ref().is_some_and(|p| !p.slot.is_empty()));
        slot && !self.plan.repair
            && !self.rows_differ
            && !Rules::of(config).is_paused(now)
            && self.plan.not_before.is_none_or(|earliest| earliest <= now)
    }

    pub(super) async fn follow(&mut self, config: &Arc<Config>) -> Result<(), PassError> {
        if config.replication.mode == Mode::Snapshot || !self.chosen_or_bounded(config).await? {
            return self.leave_stream(config).await;
        }
        let Some(recorded) = self.point() else {
            return Ok(());
        };
        let tenure = self.tenure;
        let state = State::open(&config.local.datastore).await?;
        let courier = Courier::open(config, &self.desk.throttle)?;
        let ear = Ear::of(self.desk);
        let cluster = state.cluster().await?;
        let names = Names::of(&cluster.id, &config.replication);
        if names.slot != recorded.slot {
            let text = format!(
                "slot {} must be used instead of {}; a new baseline is made",
                names.slot, recorded.slot
            );
            log::info!("peer: {text}");
            self.desk.note(EventKind::Gap, &text);
            self.drop_slot(config).await;
            self.plan.repair = true;
            self.rows_differ = true;
            return Ok(());
        }
        self.desk.update(|state| {
            state.gate_waiting = None;
            state.waiting = None;
            state.lag_bytes = None;
        });
        let follow = Follow {
            config,
            state: &state,
            lock: tenure.lock,
            courier: &courier,
            names,
            recorded,
            database: &config.local.datastore.database,
            incoming: false,
            until: None,
            told: ear.clone(),
            spool: tenure.data.clone(),
            clock: self.desk.clock.clone(),
            retried: self.retried.clone(),
            differed: self.differed.clone(),
        };
        // Bytes may be half replaced when the stream ends.
        self.unsettled = true;
        let ended = tokio::select! {
            ended = stream::follow(&follow) => Ended::Stream(ended),
            why = self.chores(config, &ear) => Ended::Other(why),
        };
        self.desk.update(|state| {
            state.gate_waiting = None;
            state.waiting = None;
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
    async fn followed(&mut self, config: &Config, gap: Gap) -> Result<(), PassError> {
        match gap.failure() {
            Ok(error) => Err(error),
            Err(gap) => {
                if let Gap::WentBack(doubt) = &gap {
                    approve(&self.tenure.state, &doubt.ask(config)?, config).await?;
                }
                let text = format!("{gap}; a new baseline is made");
                log::warn!("peer: {text}");
                self.desk.note(EventKind::Gap, &text);
                self.plan.repair = true;
                self.rows_differ = true;
                self.pace_gaps();
                // The slot fits nothing any more, and would keep log until the next copy is made.
                self.drop_slot(config).await;
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
    async fn chosen_or_bounded(&mut self, config: &Config) -> Result<bool, PassError> {
        let chosen = self.choose(config).await;
        if chosen.is_err()
            && let Err(error) = self.look_at_slot(config).await
        {
            log::debug!("{error}");
        }
        chosen
    }

    /// Returns whether the stream is the mode to use, from the present state of both sides.
    pub(super) async fn choose(&self, config: &Config) -> Result<bool, PassError> {
        let id = self.desk.read(|state| state.cluster_id.clone());
        let local = LocalSession::open_for_maintenance(&config.local.datastore).await?;
        let peer = PeerSession::open(&config.peer.datastore).await?;
        let chosen = decide(config, &id.unwrap_or_default(), &local, &peer).await?;
        self.hear_of_peer(config).await?;
        self.show_mode(&chosen);
        Ok(chosen.stream.is_some())
    }

    pub(super) fn show_mode(&self, chosen: &Chosen) {
        let shown = Shown {
            stream: chosen.stream.is_some(),
            reason: chosen.reason.clone(),
        };
        if self.desk.read(|state| state.mode.as_ref() != Some(&shown)) {
            let name = if shown.stream { "stream" } else { "snapshots" };
            log::info!("replication by {name}: {}", shown.reason);
        }
        self.desk.update(|state| {
            state.mode = Some(shown);
            state.ours = Some(chosen.ours.clone());
            state.orphans = Some(chosen.orphans.clone());
        });
    }

    /// Switches to full copies. The primary then need not keep any log for us.
    pub(super) async fn leave_stream(&mut self, config: &Config) -> Result<(), PassError> {
        self.drop_slot(config).await;
        let lsn = self
            .desk
            .read(|state| Some(state.point.as_ref()?.lsn.clone()));
        let lsn = lsn.unwrap_or_default();
        self.tenure.state.leave_stream(&lsn).await?;
        self.desk
            .note(EventKind::Mode, "full copies are made from now on");
        self.desk.update(|state| state.held = None);
        super::super::tenure::recall(self.desk, config, &self.tenure.state).await
    }

    /// Checks how much log the primary keeps for our slot. While nothing is followed, no other task
    /// checks it.
    pub(super) async fn look_at_slot(&mut self, config: &Config) -> Result<(), PassError> {
        let id = self.desk.read(|state| state.cluster_id.clone());
        let names = Names::of(&id.unwrap_or_default(), &config.replication);
        let clock = self.desk.clock.clone();
        let seen = stream::ask(config, &names.slot, &names.publication, &clock).await?;
        let held = held(&seen);
        let limit = config.replication.wal_hold_limit;
        let too_much = held.as_ref().is_some_and(|held| held.unconfirmed > limit);
        self.desk.update(|state| state.held = held);
        if !names.slot_is_premade && too_much {
            log::warn!(
                "peer: the primary keeps more log for our slot than replication.wal_hold_limit; the slot is dropped, and a new baseline follows"
            );
            self.drop_slot(config).await;
        }
        Ok(())
    }

    /// Drops the slot, because a slot without a reader must keep no log. A failure here is ignored:
    /// the server has its own limit.
    pub(super) async fn drop_slot(&self, config: &Config) {
        let Some(slot) = self
            .desk
            .read(|state| Some(state.point.as_ref()?.slot.clone()))
        else {
            return;
        };
        let id = self.desk.read(|state| state.cluster_id.clone());
        // A slot that an administrator has made is left to the administrator.
        if id.is_none_or(|id| slot != Names::of_cluster(&id).slot) {
            return;
        }
        match stream::drop_slot(&config.peer.datastore, &slot).await {
            Ok(()) => self
                .desk
                .note(EventKind::Slot, &format!("slot {slot} was dropped")),
            Err(error) => log::warn!("{error}; slot {slot} stays on the primary"),
        }
    }

    /// Does the due duties beside the stream. Ends when a configuration needs another stream.
    async fn chores(&mut self, config: &Arc<Config>, ear: &Ear) -> Result<&'static str, PassError> {
        let mut confirmations = ear.confirmed.subscribe();
        let mut rules = Rules::of(config);
        loop {
            let now = self.desk.now();
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
            let clock = self.desk.clock.clone();
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
                () = ear.gets_on.notified() => self.gets_on(),
                () = ear.lacking.notified() => self.recount(config).await?,
                () = ear.fenced.notified() => self.mind_the_fence(config).await,
                changed = confirmations.changed() => {
                    let confirmation = *confirmations.borrow_and_update();
                    if let (Ok(()), Some(confirmation)) = (changed, confirmation) {
                        self.confirm(confirmation).await?;
                    }
                }
            }
            self.verify_if_due();
            let steady = self.desk.clock.steady();
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
        match tokio::time::timeout(PEER_RECORD_TIMEOUT, self.hear_of_peer(config)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::debug!("{error}"),
            Err(_) => log::debug!("peer: did not report in time which cluster has fenced it"),
        }
    }

    /// Counts the artifacts that are unavailable on the primary, as recorded beside the rows.
    async fn recount(&mut self, config: &Config) -> Result<(), PassError> {
        super::super::tenure::recall(self.desk, config, &self.tenure.state).await?;
        self.plan.lacking = self.desk.read(crate::observe::State::waits_for_artifacts);
        Ok(())
    }
}
