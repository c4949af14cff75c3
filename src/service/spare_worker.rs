//! The duties of the holder of the working lock: looks, passes, retries and verifications, each
//! when it is due.

mod following;
mod interrupts;
mod passes;
mod proving;
mod stream_listener;
mod takeover;
mod verification;
mod waiting;

use super::failure_tracker::FailureTracker;
use super::guard::{ask_store, see_local_store};
use super::leadership::{End, Leadership};
use super::pair::until_agreed;
use super::plan::{LONGEST_WAIT, Next, Plan, Rules};
use super::{Configs, StatusWriter, next};
use crate::cluster::{Confirmation, RecoveryPoint, StateError};
use crate::config::Config;
use crate::domain::{ErrorCode, HoldReason, Role, Side};
use crate::replication::stream::Differed;
use crate::replication::{Beside, ChangeProbe, ReplicationError, has_unproved_place, mend, probe};
use crate::verify::Verification;
use chrono::TimeDelta;
use interrupts::unless_other;
use proving::{Proving, proving_ended};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::Notify;
use verification::finished;

type Verifying = Pin<Box<dyn Future<Output = Result<Verification, ReplicationError>>>>;

pub(super) struct SpareWorker<'a> {
    writer: &'a StatusWriter,
    leadership: &'a Leadership,
    configs: Configs,
    plan: Plan,
    failures: FailureTracker,
    /// Seconds by which the primary's clock is ahead, as last seen.
    clock_offset: f64,
    /// The configuration that decided the last duty.
    in_force: Option<Arc<Config>>,
    /// True: a pass may have left something behind: a pass of an earlier process, or one that was
    /// given up or failed.
    unsettled: bool,
    /// True: the current failure came from a pass, and not from the question before it.
    failed_in_pass: bool,
    /// The running verification, beside the looks. It ends with this struct.
    verification: Option<Verifying>,
    /// The hashing of unproven artifacts, beside the looks and the stream.
    proving: Option<Proving>,
    /// Time of its next try after a failure, by the steady clock.
    prove_again: Option<chrono::DateTime<chrono::Utc>>,
    /// It has recorded an artifact as unavailable.
    found_unavailable: Arc<Notify>,
    /// The part of the hashing that the stream and the passes share.
    beside: Beside,
    /// True: local rows differ from the rows that were sent, so they are copied although the
    /// primary has not changed.
    rows_differ: bool,
    /// True: the next or running verification follows a repair.
    rechecking: bool,
    /// Times of the recent gaps of the stream.
    gaps: Vec<Instant>,
    /// Time of the last retry of unavailable artifacts beside a stream.
    retried: Arc<Mutex<Instant>>,
    /// Tables that a comparison found different, each with the time.
    differed: Differed,
    /// Time at which artifacts were last found missing in the local bucket, by the steady clock.
    missing_since: Option<chrono::DateTime<chrono::Utc>>,
    /// Time of the next try of a failed duty. This time and the next two are of the steady clock,
    /// which no change of the system's clock delays.
    wait_until: Option<chrono::DateTime<chrono::Utc>>,
    /// Time of the next try of a failed verification.
    verify_again: Option<chrono::DateTime<chrono::Utc>>,
    /// True: a takeover is asked for here, and the process at the spare's site asks for another role.
    contradicted: bool,
    /// Time of the next try of a handover that was held, or that could not be undone.
    handover_at: Option<chrono::DateTime<chrono::Utc>>,
}

impl<'a> SpareWorker<'a> {
    pub(super) fn new(
        writer: &'a StatusWriter,
        leadership: &'a Leadership,
        configs: Configs,
    ) -> Self {
        let now = writer.now();
        let mut plan = Plan::new(now);
        writer.read(|state| {
            plan.copied = state.spare.point.is_some();
            plan.unavailable = state.waits_for_artifacts();
            if let Some(verified) = &state.checks.verified {
                plan.verified = verified.record.time;
            }
        });
        SpareWorker {
            writer,
            leadership,
            configs,
            plan,
            failures: FailureTracker::new("replication works"),
            verification: None,
            proving: None,
            prove_again: None,
            found_unavailable: Arc::default(),
            beside: Beside::default(),
            wait_until: None,
            missing_since: None,
            verify_again: None,
            handover_at: None,
            contradicted: false,
            gaps: Vec::new(),
            retried: Arc::new(Mutex::new(Instant::now())),
            differed: Differed::default(),
            rows_differ: false,
            rechecking: false,
            failed_in_pass: false,
            unsettled: true,
            clock_offset: writer.read(|state| {
                state
                    .spare
                    .confirmation
                    .map_or(0.0, |c| c.clock_offset_seconds)
            }),
            in_force: None,
        }
    }

    /// Returns the configuration in force. It has the role and the servers of this leadership,
    /// because otherwise the leadership would be over.
    fn config(&mut self) -> Arc<Config> {
        let current = self.configs.borrow_and_update().clone();
        current.unwrap_or_else(|| self.leadership.config.clone())
    }

    /// Works until the leadership must end, and returns the reason.
    pub(super) async fn perform(mut self) -> End {
        loop {
            let config = self.config();
            let same = self
                .in_force
                .as_ref()
                .is_none_or(|old| Arc::ptr_eq(old, &config));
            if !same {
                // The new configuration may allow what was refused, also if it came while a duty
                // was running.
                self.wait_no_more();
                self.handover_at = None;
                self.failures.begin_anew();
            }
            self.in_force = Some(config.clone());
            if let Err(error) = self.mend(&config).await {
                if ends_tenure(&error) {
                    return End::Failed(error);
                }
                self.fail(&error);
            }
            match Box::pin(self.take_over(&config)).await {
                Ok(true) => return End::RoleChanged,
                Ok(false) => {}
                // Usually the leadership's own session is gone, which the guard would find a moment
                // later.
                Err(error) if ends_tenure(&error) || local_datastore_failed(&error) => {
                    return End::Failed(error);
                }
                Err(error) => self.fail(&error),
            }
            let rules = Rules::of(&config);
            self.show_pause(&config, &rules);
            let now = self.writer.now();
            self.mind_the_clock();
            let due = match self.follows(&config) {
                true => Next::Follow,
                false => self.plan.next(&rules, now),
            };
            let configs = self.configs.clone();
            let done = match due {
                Next::Follow => Box::pin(self.follow(&config)).await,
                Next::Probe => unless_other(configs, Box::pin(self.probe(&config))).await,
                Next::Pass => Box::pin(self.pass(&config)).await,
                Next::Retry => unless_other(configs, self.retry(&config)).await,
                Next::Verify => {
                    self.begin_verification(&config);
                    Ok(())
                }
                Next::Sleep(until) => {
                    self.rest(until).await;
                    Ok(())
                }
            };
            match done {
                Ok(()) => {}
                Err(error) if ends_tenure(&error) => return End::Failed(error),
                Err(error) if error.code() == ErrorCode::WasPrimary => return End::WasPrimary,
                Err(error) => {
                    self.failed_in_pass = due != Next::Probe;
                    self.fail(&error);
                }
            }
        }
    }

    /// Notices another place of the artifacts, and repairs what an interrupted pass has left. This
    /// comes before every other duty, paused or not.
    async fn mend(&mut self, config: &Config) -> Result<(), ReplicationError> {
        self.mind_the_clock();
        let now = self.writer.now();
        let steady = self.writer.clock.steady();
        let spare = self
            .writer
            .read(|state| state.cluster.role == Some(Role::Spare));
        if !spare {
            return Ok(());
        }
        let leadership = self.leadership;
        let place = has_unproved_place(config, &leadership.state, leadership.lock).await;
        match &place {
            // A pass proves the artifacts of all rows.
            Ok(unproved) => self.plan.repair |= unproved,
            // A handover is undone although a store does not answer, if no bytes are half replaced.
            Err(error)
                if error.is_of_a_store() && leadership.state.replacements().await?.is_empty() => {}
            Err(_) => return place.map(drop),
        }
        if !self.unsettled {
            return place.map(drop);
        }
        let handover = self.handover_at.is_some_and(|at| at <= steady);
        if handover || self.plan.not_before.is_none_or(|earliest| earliest <= now) {
            let mended = mend(config, self.leadership.lock).await;
            if mended.is_err() && handover {
                self.handover_at = Some(steady + takeover::RETRY_AFTER);
            }
            mended?;
            self.unsettled = false;
        }
        place.map(drop)
    }

    async fn rest(&mut self, until: chrono::DateTime<chrono::Utc>) {
        let until = self.soonest(until);
        let clock = self.writer.clock.clone();
        let config = self.in_force.clone();
        let config = config.unwrap_or_else(|| self.leadership.config.clone());
        self.prove_if_due(&config);
        let found_unavailable = self.found_unavailable.clone();
        tokio::select! {
            () = clock.sleep_until(until) => {}
            () = next(&mut self.configs) => {}
            () = until_agreed(self.writer, &config), if self.contradicted => {}
            ended = finished(&mut self.verification) => self.verified(ended).await,
            ended = proving_ended(&mut self.proving) => self.proved(ended),
            () = found_unavailable.notified() => {
                if let Err(error) = self.recount(&config).await {
                    log::debug!("{error}");
                }
            }
        }
        self.verify_if_due();
    }

    fn show_pause(&self, config: &Config, rules: &Rules) {
        let now = self.writer.now();
        if !rules.is_paused(now) {
            self.writer
                .release(|hold| hold.reason == HoldReason::Paused);
        } else if !self.failures.stands() {
            let (detail, next_step) = match config.paused_until {
                Some(until) if !config.paused => (
                    format!("paused until {}", until.format("%Y-%m-%d %H:%M:%S UTC")),
                    "wait, or remove paused_until".to_string(),
                ),
                _ => (
                    "paused by configuration: the primary is asked for changes, but they are not applied".to_string(),
                    "set paused = false to continue".to_string(),
                ),
            };
            self.writer
                .hold(HoldReason::Paused, &detail, &next_step, false);
        }
    }

    /// Shows and logs a failure that does not end the leadership, and sets the time of the next
    /// try.
    fn fail(&mut self, error: &ReplicationError) {
        let pace = self.writer.hold_for(error);
        let now = self.writer.now();
        let wait = self
            .failures
            .failed(now, error.code(), &error.to_string(), pace);
        self.wait_for(TimeDelta::from_std(wait).unwrap_or(LONGEST_WAIT));
        // The next try begins with the cheapest question.
        self.plan.looked = None;
    }

    fn point(&self) -> Option<RecoveryPoint> {
        self.writer.read(|state| state.spare.point.clone())
    }

    async fn probe(&mut self, config: &Config) -> Result<(), ReplicationError> {
        let point = self.point();
        let clock = self.writer.clock.clone();
        let (found, peers_store, ()) = tokio::join!(
            probe(config, point.as_ref(), &clock),
            ask_store(Side::Peer, config),
            // A spare whose bucket does not answer is not complete, whatever its rows are.
            see_local_store(self.writer, config),
        );
        self.writer.see_store(Side::Peer, peers_store);
        let found = found?;
        self.plan.looked = Some(self.writer.now());
        self.wait_no_more();
        let now = self.writer.now();
        self.plan.waiting = found.changed.map(|_| self.plan.waiting.unwrap_or(now));
        if let Some(why) = found.changed
            && self.writer.read(|state| state.spare.waiting == Some(false))
        {
            log::info!("peer: {why}; the new changes are copied");
        }
        self.plan.repair |= found.unknown_database;
        self.look_at_mode(config, point.as_ref()).await?;
        self.clock_offset = found.clock_offset_seconds;
        self.show_probe(&found);
        if found.fenced {
            self.mind_the_fence(config).await;
        }
        if found.changed.is_none() {
            self.confirm(found.confirmation()).await?;
            self.settled();
        } else {
            self.give_up_verification_if_late(config);
            let tried_now = self.plan.next(&Rules::of(config), now) == Next::Pass;
            let peer_up = self.writer.read(|state| {
                let reach = state.peer.s3.as_ref();
                reach.is_some_and(|reach| reach.error.is_none())
            });
            // The question is answered again. If a pass failed, only the next pass shows whether
            // that fault is over, if a pass may run.
            if peer_up && (!self.failed_in_pass || !tried_now) {
                self.failures.over(now);
                self.writer.release(|hold| hold.passing);
            }
        }
        Ok(())
    }

    /// Checks whether the stream has become possible.
    async fn look_at_mode(
        &mut self,
        config: &Config,
        point: Option<&RecoveryPoint>,
    ) -> Result<(), ReplicationError> {
        match point {
            Some(point) if point.is_followed() => self.look_at_slot(config).await,
            Some(_) if self.choose(config).await? => {
                log::info!(
                    "peer: the stream is possible now; a copy is made from which the stream continues"
                );
                self.plan.repair = true;
                self.rows_differ = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Ends the failure and the hold, because replication works again.
    fn settled(&mut self) {
        self.failures.over(self.writer.now());
        self.writer.release(|hold| !hold.reason.stays());
    }

    fn show_probe(&self, found: &ChangeProbe) {
        self.writer.see_datastore(Side::Peer, None);
        self.writer.update(|state| {
            state.spare.waiting = Some(found.changed.is_some());
            state.spare.unknown_database = found.unknown_database;
            state.spare.lag_bytes = found.lag_bytes;
            state.peer.version = Some(found.server.version.clone());
            state.peer.tls = Some(found.server.tls);
            state.peer.fenced = Some(found.fenced);
        });
    }

    /// Records that no changes wait: the spare is complete as of now, if the local side is sound.
    async fn confirm(&mut self, confirmation: Confirmation) -> Result<(), ReplicationError> {
        self.clock_offset = confirmation.clock_offset_seconds;
        let sound = self.writer.read(|state| {
            let bucket = state.local.s3.as_ref();
            // A bucket that was not asked yet counts as sound, because the gate has asked it.
            bucket.is_none_or(|reach| reach.error.is_none()) && state.local.fenced != Some(false)
        });
        if sound {
            self.leadership.state.confirm(confirmation).await?;
            self.writer.update(|state| {
                state.spare.confirmation = Some(confirmation);
                state.spare.confirmed = Some(Instant::now());
            });
        }
        Ok(())
    }
}

fn local_datastore_failed(error: &ReplicationError) -> bool {
    error.side() == Some(Side::Local) && error.is_unreachable() && !error.is_of_a_store()
}

/// Returns whether another process works here now, or the leadership's own session is gone. The
/// lock must then be taken again.
fn ends_tenure(error: &ReplicationError) -> bool {
    matches!(
        error,
        ReplicationError::State(StateError::Superseded | StateError::Locked { .. })
    )
}
