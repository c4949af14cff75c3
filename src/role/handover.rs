//! A spare becomes the primary: planned (a switchover, without a loss) or not (a failover, at the
//! recovery point).
//!
//! Both use the same steps. A step that a switchover requires, a failover tries, for as long as an
//! unplanned moment allows.

use super::epoch::is_recorded;
use super::knock::{KNOCK_TIMEOUT, knock};
use super::preflight::{Purpose, preflight};
use super::step_journal::StepJournal;
use super::watch::{PeerSeen, another_server, look_at_peer, open_fence};
use crate::cluster::{
    EPOCH_STEP_MAX, LocalCluster, Lock, PeerCluster, PeerFence, Promotion, Record, RecoveryPoint,
    StateDb, system_id,
};
use crate::config::{Config, WantedRole};
use crate::domain::{
    ErrorCode, PromotionKind, Role, Side, Step, Transition, TransitionKind, Verdict,
};
use crate::observe::{Check, Clock};
use crate::replication::stream::StreamObserver;
use crate::replication::{Carrier, ReplicationError, mend, next_sequences};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Time limit for the peer's answer in a failover. A peer that is gone may not even refuse the
/// connection.
const UNPLANNED_TIMEOUT: Duration = Duration::from_millis(400);
/// Time limit for a peer that accepts connections to report its identity.
const IDENTITY_TIMEOUT: Duration = Duration::from_secs(3);
/// Time limit for fencing a peer that has answered.
const FENCE_TIMEOUT: Duration = Duration::from_secs(15);
/// Time limit for the peer's answers in a planned handover.
const PLANNED_TIMEOUT: Duration = Duration::from_secs(10);

/// The end of a handover.
#[derive(Debug)]
pub enum Outcome {
    Promoted,
    /// Nothing was done, because of this obstacle.
    Held(ReplicationError),
    /// The primary is as before, with the reason why the handover was not finished.
    RolledBack(String),
    /// The handover was undone, but the primary's fence could not be withdrawn yet.
    RollbackPending(String, ReplicationError),
    /// A failover that continues as soon as this error is over.
    Retry(ReplicationError),
}

/// Returns the part of the configuration that identifies a request for a handover. Another text is
/// another request.
pub fn request_id(config: &Config) -> String {
    format!(
        "force_epoch {} change {:?}",
        config.force_epoch, config.change
    )
}

pub struct Handover<'a> {
    pub config: &'a Config,
    pub state: &'a StateDb,
    /// Its sessions are used for all the questions of this handover.
    pub peer: PeerCluster<'a>,
    pub lock: Lock,
    /// Opens the artifact stores on first use, so that a handover that copies no artifact cannot
    /// fail because a store is down.
    pub carrier: Box<dyn Fn() -> Result<Carrier, ReplicationError> + Send + Sync>,
    pub spool: Arc<Path>,
    pub clock: Clock,
    pub on_step: Box<dyn Fn(Transition) + Send + Sync>,
    /// Receives the reports of the stream during the drain.
    pub observer: Arc<dyn StreamObserver>,
    /// The epoch that this promotion takes.
    pub epoch: i64,
    /// True: the peer answered recently, so silence may be a single lost packet.
    pub heard_lately: bool,
    /// Receives the reason why the takeover waits for the operator, and the next step.
    pub on_wait: OnWait,
}

/// Receiver of the reason why a takeover waits for the operator, and of the next step.
pub(super) type OnWait = Box<dyn Fn(&str, &str) + Send + Sync>;

/// The results so far.
#[derive(Debug, Default, Clone)]
struct Reached {
    fenced: bool,
    /// True: everything that the primary has committed is here, with the values of its sequences.
    complete: bool,
    /// The lease of a shared bucket, which was taken for this promotion.
    lease: Option<TakenLease>,
}

mod complete;
mod lease;
mod living;
mod promote;
mod undo;

pub(in crate::role) use complete::wait_for_clock;
use lease::TakenLease;

pub use undo::may_have_fenced;

impl Handover<'_> {
    fn forced(&self) -> bool {
        i64::try_from(self.config.force_epoch) == Ok(self.epoch)
    }

    pub async fn run(&self) -> Result<Outcome, ReplicationError> {
        let before = self.state.transition().await?;
        let fenced_before = before.as_ref().is_some_and(may_have_fenced);
        if let Some(entry) = before.clone()
            && fenced_before
            && entry.epoch != self.epoch
        {
            // Another promotion has happened since: that request is over.
            return self.roll_back(entry).await;
        }
        let mut walk = self.step_journal(before);
        // A fence that may be set stays in the journal until it is known to be withdrawn.
        if !fenced_before {
            walk.step(Step::Preflight).await?;
        }
        let point = match self.ready().await {
            Ok(point) => point,
            Err(error) if fenced_before && !self.forced() => {
                return self.undo(walk, error.to_string()).await;
            }
            Err(error) if fenced_before => return Ok(Outcome::Retry(error)),
            Err(error) => {
                self.state.close_journal(self.lock).await?;
                return Ok(Outcome::Held(error));
            }
        };
        let reached = match self.forced() {
            true => match self.unplanned(&mut walk, &point).await {
                Ok(reached) => reached,
                // A transient fault is no reason to give a failover up.
                Err(error) => return Ok(Outcome::Retry(error)),
            },
            false => match self.planned(&mut walk, &point).await {
                Ok(reached) => reached,
                Err(error) if local_state_failed(&error) => return Err(error),
                Err(error) => {
                    let why = format!("{}: {error}", walk.entry.step_name());
                    return self.undo(walk, why).await;
                }
            },
        };
        let point = match self.wake_triggers(point).await {
            Ok(point) => point,
            Err(error) if self.forced() => return Ok(Outcome::Retry(error)),
            Err(error) if local_state_failed(&error) => return Err(error),
            Err(error) => {
                let why = format!("{}: {error}", walk.entry.step_name());
                return self.undo(walk, why).await;
            }
        };
        self.prove_artifacts(&point).await;
        walk.step(Step::Promote).await?;
        self.promote(&point, &reached).await?;
        // From here on nothing may fail: the primary completes the remaining steps when it begins.
        if let Err(error) = self.state.close_journal(self.lock).await {
            log::warn!("{error}");
        }
        Ok(Outcome::Promoted)
    }

    fn step_journal(&self, before: Option<Transition>) -> StepJournal<'_> {
        let kind = match self.forced() {
            true => TransitionKind::Failover,
            false => TransitionKind::Switchover,
        };
        let asked = request_id(self.config);
        let mut walk = StepJournal::new(
            self.state,
            self.lock,
            &*self.on_step,
            kind,
            (self.epoch, &asked),
        );
        if let Some(before) = before.filter(|entry| entry.undone.is_none()) {
            walk.entry.started = before.started;
        }
        walk
    }

    /// Runs the checks of the promotion, the same checks as `preflight`.
    async fn ready(&self) -> Result<RecoveryPoint, ReplicationError> {
        let (purpose, patience) = match self.forced() {
            true => (Purpose::Unplanned, UNPLANNED_TIMEOUT),
            false => (Purpose::Planned, PLANNED_TIMEOUT),
        };
        let checks = preflight(self.config, &self.peer, purpose, patience).await;
        let refused: Vec<&Check> = checks
            .iter()
            .filter(|check| check.result == Verdict::Refuse)
            .collect();
        if let Some(first) = refused.first() {
            // Force is meant for a primary that is lost.
            let lives = refused.iter().any(|check| check.primary_lives);
            let advise = !self.forced() && !lives;
            return Err(self.refusal(&in_words(&refused), &first.next_step, advise));
        }
        match self.state.recovery_point().await? {
            Some(copied) => Ok(LocalCluster::of(self.config).point(copied).await?),
            None => Err(self.refusal(
                "nothing was copied yet",
                "wait for the first copy",
                !self.forced(),
            )),
        }
    }

    /// Makes the refusal. `advise_force` adds the epoch that overrides it.
    fn refusal(&self, text: &str, next_step: &str, advise_force: bool) -> ReplicationError {
        let force = match advise_force {
            false => String::new(),
            true => format!(
                "; if the primary is lost, or this must be overridden, set force_epoch = {}",
                self.epoch
            ),
        };
        ReplicationError::Refused {
            rule: ErrorCode::ForceNeeded,
            text: format!("not promoted: {text}"),
            next_step: format!("{next_step}{force}"),
        }
    }

    /// Runs the planned steps. If one fails, all of them are undone.
    async fn planned(
        &self,
        walk: &mut StepJournal<'_>,
        point: &RecoveryPoint,
    ) -> Result<Reached, ReplicationError> {
        let unavailable_before = self.unavailable().await?;
        let seen = self.known_peer(point).await?;
        walk.step(Step::Fence).await?;
        let fence = self.raise(point).await?;
        walk.step(Step::Drain).await?;
        let limit = self.config.takeover.drain_timeout;
        self.drain(&fence, point, limit).await?;
        walk.step(Step::Compare).await?;
        // The drain may have replaced the database.
        let inside = LocalCluster::of(self.config).builder().await?;
        let sequences = self.compare(&inside, point, &unavailable_before).await?;
        let clock = self.peers_clock().await?;
        let lease = self.take_lease(walk, point, Some(&fence)).await?;
        walk.step(Step::Sequences).await?;
        self.set_sequences(&inside, &sequences).await?;
        wait_for_clock(&inside, Some(clock)).await?;
        log::debug!("the peer was at PostgreSQL {}", seen.version);
        Ok(Reached {
            fenced: true,
            complete: true,
            lease,
        })
    }

    /// Runs the unplanned steps. A part that cannot be had does not stop the promotion.
    async fn unplanned(
        &self,
        walk: &mut StepJournal<'_>,
        point: &RecoveryPoint,
    ) -> Result<Reached, ReplicationError> {
        let mut reached = Reached::default();
        let mut clock = None;
        let unavailable_before = self.unavailable().await?;
        walk.step(Step::Fence).await?;
        let fence = self.fence_if_it_answers(point).await?;
        if let Some(fence) = &fence {
            reached.fenced = true;
            walk.step(Step::Drain).await?;
            let limit = self.config.takeover.drain_timeout;
            let drained = async {
                self.drain(fence, point, limit).await?;
                let inside = LocalCluster::of(self.config).builder().await?;
                let sequences = self.compare(&inside, point, &unavailable_before).await?;
                clock = Some(self.peers_clock().await?);
                self.set_sequences(&inside, &sequences).await
            };
            match drained.await {
                Ok(()) => reached.complete = true,
                Err(error) => {
                    log::warn!("not all changes of the old primary could be applied here: {error}");
                    // The interrupted work may be half done, and one of its commits may still be
                    // running.
                    LocalCluster::of(self.config).lsn_at_rest().await?;
                    mend(self.config, self.lock).await?;
                }
            }
        }
        // A hold here is tried again, and each try of the next step moves the sequences.
        reached.lease = self.take_lease(walk, point, fence.as_ref()).await?;
        walk.step(Step::Sequences).await?;
        if !reached.complete {
            next_sequences(self.config).await?;
        }
        let inside = LocalCluster::of(self.config).builder().await?;
        if let Err(error) = wait_for_clock(&inside, clock).await {
            log::warn!("{error}");
        }
        Ok(reached)
    }

    /// Fences the peer if it answers. None: the peer is out of reach. A peer that was itself
    /// promoted since is an error, because nobody is promoted over it.
    async fn fence_if_it_answers(
        &self,
        point: &RecoveryPoint,
    ) -> Result<Option<PeerFence>, ReplicationError> {
        let to = &self.config.peer.datastore;
        // A server that accepts connections is found soon, but it may be far away.
        let patience = match self.heard_lately {
            true => KNOCK_TIMEOUT,
            false => UNPLANNED_TIMEOUT,
        };
        let fenced = match tokio::time::timeout(patience, knock(&to.host, to.port)).await {
            Ok(Ok(())) => {
                let looking = self.with_room(point, || self.known_peer(point));
                let seen = tokio::time::timeout(IDENTITY_TIMEOUT, looking).await;
                let raising = self.with_room(point, || self.raise(point));
                match seen {
                    Ok(Ok(_)) => tokio::time::timeout(FENCE_TIMEOUT, raising).await,
                    Ok(Err(error)) => Ok(Err(error)),
                    Err(silent) => Err(silent),
                }
            }
            Ok(Err(error)) => {
                warn_not_fenced(&error.to_string());
                return Ok(None);
            }
            Err(silent) => Err(silent),
        };
        match fenced {
            Ok(Ok(fence)) => Ok(Some(fence)),
            Ok(Err(error))
                if matches!(
                    error.code(),
                    ErrorCode::NewerPrimary
                        | ErrorCode::StateWentBack
                        | ErrorCode::Overtaken
                        | ErrorCode::Superseded
                ) =>
            {
                Err(error)
            }
            Ok(Err(error)) => {
                self.ask_about_living(point, &error)?;
                warn_not_fenced(&error.to_string());
                Ok(None)
            }
            Err(_) => {
                warn_not_fenced("the peer does not answer in time");
                Ok(None)
            }
        }
    }

    /// Returns the peer if it is the server that was followed. Only that server is ever fenced.
    async fn known_peer(&self, point: &RecoveryPoint) -> Result<PeerSeen, ReplicationError> {
        let seen = look_at_peer(self.config, &self.peer).await?;
        let record = seen.theirs.record.clone().unwrap_or_default();
        let local_id = system_id(self.state.session()).await?;
        // The role does not matter: a peer with that epoch, or a later one, knows of a promotion
        // that is not on record here.
        if record.epoch > self.epoch.saturating_add(EPOCH_STEP_MAX) {
            return Err(ReplicationError::Refused {
                rule: ErrorCode::EpochOutOfRange,
                text: format!(
                    "the peer reports epoch {}, and this promotion would take epoch {}: no line of promotions has such a gap, so this is not believed",
                    record.epoch, self.epoch
                ),
                next_step: "check table cluster of database warm_spare on the peer; a promotion by force_epoch continues without the peer".into(),
            });
        }
        if record.role.is_some() && record.epoch >= self.epoch {
            return Err(self.newer(
                &record,
                record.copied_from.as_deref() == Some(local_id.as_str()),
            ));
        }
        let followed = Promotion {
            system_id: point.system_id.clone(),
            peer_cluster: point.peer_cluster.clone().unwrap_or_default(),
            ..self.promotion(point, &Reached::default())
        };
        if record.role == Some(Role::Spare) || !is_recorded(&followed, &seen.theirs) {
            return Err(another_server());
        }
        Ok(seen)
    }

    /// Makes the refusal for a peer that has the epoch of this promotion, or a later one. A spare
    /// that has copied from this very server proves that this cluster was a primary, and that its
    /// state was set back since.
    fn newer(&self, record: &Record, copied_from_here: bool) -> ReplicationError {
        let (rule, why) = match copied_from_here {
            true => (
                ErrorCode::StateWentBack,
                "the peer has copied from this very server: this cluster was a primary, and its state was set back to an older copy; ",
            ),
            false => (ErrorCode::NewerPrimary, ""),
        };
        ReplicationError::Refused {
            rule,
            text: format!(
                "{why}the peer is a {} of epoch {} by now, and this promotion would take epoch {}",
                record.role.map_or("cluster", Into::into),
                record.epoch,
                self.epoch
            ),
            next_step: format!(
                "set role = \"spare\" here, and promote the peer if it is a spare; or, to promote this cluster anyway, set force_epoch = {}",
                record.epoch.saturating_add(1)
            ),
        }
    }

    async fn raise(&self, point: &RecoveryPoint) -> Result<PeerFence, ReplicationError> {
        let id = self.state.cluster().await?.id;
        let fence = open_fence(&self.peer, &point.system_id).await?;
        // A process that was paused, and has lost the lock, must fence nobody.
        self.state.still_ours(self.lock).await?;
        // The fence ends every session from before it.
        self.peer.close_idle();
        let waived = fence.raise(self.epoch, &id, false).await?;
        let database = &self.config.peer.datastore.database;
        self.state
            .note_waived(Side::Peer, &waived, database)
            .await?;
        Ok(fence)
    }

    fn promotion(&self, point: &RecoveryPoint, reached: &Reached) -> Promotion {
        let complete = reached.fenced && reached.complete;
        let kind = match complete {
            true => PromotionKind::Switchover,
            false => PromotionKind::Failover,
        };
        Promotion {
            peer_fenced: reached.fenced,
            ..Promotion::new(self.epoch, kind, self.clock.now()).at(point)
        }
    }
}

fn warn_not_fenced(why: &str) {
    log::warn!("could not fence the old primary: {why}; it will be fenced as soon as it answers");
}

/// Returns whether the local server failed, or another process works here: nothing can be undone
/// now, and all steps start again.
fn local_state_failed(error: &ReplicationError) -> bool {
    matches!(error, ReplicationError::State(_)) && error.side() == Some(Side::Local)
}

/// Returns the refusals as text. Checks with the same reason share one entry.
fn in_words(refused: &[&Check]) -> String {
    let mut entries: Vec<(&str, Vec<&str>)> = Vec::new();
    for check in refused {
        match entries
            .iter_mut()
            .find(|(reason, _)| *reason == check.reason)
        {
            Some((_, names)) => names.push(check.name.into_str()),
            None => entries.push((&check.reason, vec![check.name.into_str()])),
        }
    }
    let entries = entries
        .iter()
        .map(|(reason, names)| format!("{}: {reason}", names.join(", ")));
    entries.collect::<Vec<_>>().join("; ")
}

/// Returns whether the configuration asks for this cluster's promotion.
pub fn wants_promotion(config: &Config) -> bool {
    config.role == WantedRole::Primary
}
