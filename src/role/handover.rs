//! A spare becomes the primary: planned (a switchover, nothing is lost) or not (a failover, at the recovery point).
//!
//! Both go the same way. What a switchover must have, a failover tries, for as long as an unplanned moment allows.

use super::epoch::is_recorded;
use super::preflight::{Purpose, preflight};
use super::steps::Walk;
use super::watch::{PeerSeen, another_server, look_at_peer, open_fence};
use crate::cluster::preparation::Names;
use crate::cluster::{
    CopiedPoint, EPOCH_STEP_MAX, LocalSession, Lock, PeerFence, Promotion, Record, State,
    clear_out, system_id,
};
use crate::config::{Config, WantedRole};
use crate::domain::Verdict;
use crate::domain::{ErrorCode, PromotionKind, Role, Side, Step, Transition, TransitionKind};
use crate::observe::{Check, Clock};
use crate::replication::stream::Told as Heard;
use crate::replication::{Courier, PassError, end_appliers, mend, next_sequences, stands_at, wake};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// For the peer of a failover to answer: when it is gone it may not even refuse.
const UNPLANNED_PATIENCE: Duration = Duration::from_millis(400);
/// For one that answered lately: a lost first packet is sent again after 1 s, and after 2 s more.
const KNOCKING: Duration = Duration::from_millis(3500);
/// Between two knocks; the former ones go on.
const KNOCK_AGAIN: Duration = Duration::from_millis(500);
/// For one that is there to say who it is.
const UNPLANNED_ANSWER: Duration = Duration::from_secs(3);
/// For one that answers then to be fenced.
const UNPLANNED_FENCE: Duration = Duration::from_secs(15);
const PLANNED_PATIENCE: Duration = Duration::from_secs(10);

/// How a handover ended.
#[derive(Debug)]
pub enum Outcome {
    Promoted,
    /// Nothing was done: what stands in the way.
    Held(PassError),
    /// The primary is as it was; why it was not finished.
    Undone(String),
    /// The same, but its fence could not be withdrawn yet.
    Undoing(String, PassError),
    /// A failover that goes on as soon as this is over.
    Again(PassError),
}

/// What of the configuration asks for a handover: another one is another wish.
pub fn asked(config: &Config) -> String {
    format!(
        "force_epoch {} change {:?}",
        config.force_epoch, config.change
    )
}

pub struct Handover<'a> {
    pub config: &'a Config,
    pub state: &'a State,
    pub lock: Lock,
    /// Opens the stores: what asks for none of them must not fail for one.
    pub courier: Box<dyn Fn() -> Result<Courier, PassError> + Send + Sync>,
    pub spool: Arc<Path>,
    pub clock: Clock,
    pub told: Box<dyn Fn(Transition) + Send + Sync>,
    /// Hears of the stream while it is drained.
    pub heard: Arc<dyn Heard>,
    /// The one that is to be taken.
    pub epoch: i64,
    /// The peer answered a moment ago: silence now may be a single lost packet.
    pub heard_lately: bool,
}

/// What was reached on the way.
#[derive(Debug, Default, Clone, Copy)]
struct Reached {
    fenced: bool,
    /// Everything that the primary had committed is here, and its sequences' values.
    complete: bool,
}

mod complete;
mod living;
mod undo;

pub use undo::may_have_fenced;

impl Handover<'_> {
    fn forced(&self) -> bool {
        i64::try_from(self.config.force_epoch) == Ok(self.epoch)
    }

    pub async fn run(&self) -> Result<Outcome, PassError> {
        let before = self.state.transition().await?;
        let fenced_before = before.as_ref().is_some_and(may_have_fenced);
        if let Some(entry) = before.clone()
            && fenced_before
            && entry.epoch != self.epoch
        {
            // Somebody was promoted since: that wish is over.
            return self.undo_now(entry).await;
        }
        let mut walk = self.walk(before);
        // A fence that may stand stays on the journal until it is known not to.
        if !fenced_before {
            walk.step(Step::Preflight).await?;
        }
        let point = match self.ready().await {
            Ok(point) => point,
            Err(error) if fenced_before && !self.forced() => {
                return self.undo(walk, error.to_string()).await;
            }
            Err(error) if fenced_before => return Ok(Outcome::Again(error)),
            Err(error) => {
                self.state.close_journal(self.lock).await?;
                return Ok(Outcome::Held(error));
            }
        };
        let reached = match self.forced() {
            true => match self.unplanned(&mut walk, &point).await {
                Ok(reached) => reached,
                // A passing fault is no reason to give a failover up.
                Err(error) => return Ok(Outcome::Again(error)),
            },
            false => match self.planned(&mut walk, &point).await {
                Ok(reached) => reached,
                Err(error) if is_our_own(&error) => return Err(error),
                Err(error) => {
                    let why = format!("{}: {error}", walk.entry.step_name());
                    return self.undo(walk, why).await;
                }
            },
        };
        if let Err(error) = self.wake_triggers().await {
            return match self.forced() {
                true => Ok(Outcome::Again(error)),
                false if is_our_own(&error) => Err(error),
                false => {
                    let why = format!("{}: {error}", walk.entry.step_name());
                    self.undo(walk, why).await
                }
            };
        }
        walk.step(Step::Promote).await?;
        self.promote(&point, reached).await?;
        // From here on nothing may fail: what is left undone, the primary does when it begins.
        if let Err(error) = self.state.close_journal(self.lock).await {
            log::warn!("{error}");
        }
        Ok(Outcome::Promoted)
    }

    fn walk(&self, before: Option<Transition>) -> Walk<'_> {
        let kind = match self.forced() {
            true => TransitionKind::Failover,
            false => TransitionKind::Switchover,
        };
        let asked = asked(self.config);
        let mut walk = Walk::new(
            self.state,
            self.lock,
            &*self.told,
            kind,
            (self.epoch, &asked),
        );
        if let Some(before) = before.filter(|entry| entry.undone.is_none()) {
            walk.entry.started = before.started;
        }
        walk
    }

    /// The promotion's checks, the same that `preflight` runs on any day.
    async fn ready(&self) -> Result<CopiedPoint, PassError> {
        let (purpose, patience) = match self.forced() {
            true => (Purpose::Unplanned, UNPLANNED_PATIENCE),
            false => (Purpose::Planned, PLANNED_PATIENCE),
        };
        let checks = preflight(self.config, purpose, patience).await;
        let refused: Vec<&Check> = checks
            .iter()
            .filter(|check| check.result == Verdict::Refuse)
            .collect();
        if let Some(first) = refused.first() {
            // Force is for a primary that is lost.
            let lives = refused.iter().any(|check| check.primary_lives);
            let advise = !self.forced() && !lives;
            return Err(self.refusal(&in_words(&refused), &first.next_step, advise));
        }
        match self.state.copied_point().await? {
            Some(copied) => stands_at(self.config, copied).await,
            None => Err(self.refusal(
                "nothing was copied yet",
                "wait for the first copy",
                !self.forced(),
            )),
        }
    }

    /// `advise_force`: with the number by which it is overridden.
    fn refusal(&self, text: &str, next_step: &str, advise_force: bool) -> PassError {
        let force = match advise_force {
            false => String::new(),
            true => format!(
                "; if the primary is lost, or this must be overridden, set force_epoch = {}",
                self.epoch
            ),
        };
        PassError::Refused {
            rule: ErrorCode::ForceNeeded,
            text: format!("not promoted: {text}"),
            next_step: format!("{next_step}{force}"),
        }
    }

    /// Every step must succeed, or all of it is undone.
    async fn planned(
        &self,
        walk: &mut Walk<'_>,
        point: &CopiedPoint,
    ) -> Result<Reached, PassError> {
        let lacked = self.lacking().await?;
        let seen = self.known_peer(point).await?;
        walk.step(Step::Fence).await?;
        let fence = self.raise(point).await?;
        walk.step(Step::Drain).await?;
        let limit = self.config.takeover.drain_timeout;
        self.drain(&fence, point, limit).await?;
        walk.step(Step::Compare).await?;
        let sequences = self.compare(point, &lacked).await?;
        let clock = self.peers_clock().await?;
        walk.step(Step::Sequences).await?;
        self.set_sequences(&sequences).await?;
        self.wait_for_clock(Some(clock)).await?;
        log::debug!("the peer was at PostgreSQL {}", seen.version);
        Ok(Reached {
            fenced: true,
            complete: true,
        })
    }

    /// What can be had is taken; what cannot be had does not stop it.
    async fn unplanned(
        &self,
        walk: &mut Walk<'_>,
        point: &CopiedPoint,
    ) -> Result<Reached, PassError> {
        let mut reached = Reached::default();
        let mut clock = None;
        let lacked = self.lacking().await?;
        walk.step(Step::Fence).await?;
        if let Some(fence) = self.fence_if_it_answers(point).await? {
            reached.fenced = true;
            walk.step(Step::Drain).await?;
            let limit = self.config.takeover.drain_timeout;
            let drained = async {
                self.drain(&fence, point, limit).await?;
                let sequences = self.compare(point, &lacked).await?;
                clock = Some(self.peers_clock().await?);
                self.set_sequences(&sequences).await
            };
            match drained.await {
                Ok(()) => reached.complete = true,
                Err(error) => {
                    log::warn!("not everything that the old primary has could be brought: {error}");
                    // What was cut off may be half done, and a commit of it still on its way.
                    end_appliers(self.config).await?;
                    mend(self.config, self.lock).await?;
                }
            }
        }
        walk.step(Step::Sequences).await?;
        if !reached.complete {
            next_sequences(self.config).await?;
        }
        if let Err(error) = self.wait_for_clock(clock).await {
            log::warn!("{error}");
        }
        Ok(reached)
    }

    /// None: it is out of reach. One that was promoted itself meanwhile is an error: nobody is promoted over it.
    async fn fence_if_it_answers(
        &self,
        point: &CopiedPoint,
    ) -> Result<Option<PeerFence>, PassError> {
        let to = &self.config.peer.datastore;
        // Whether there is anybody at all is known soon; one that is there may be far away.
        let patience = match self.heard_lately {
            true => KNOCKING,
            false => UNPLANNED_PATIENCE,
        };
        let fenced = match tokio::time::timeout(patience, knock(&to.host, to.port)).await {
            Ok(Ok(())) => {
                let looking = self.with_room(point, || self.known_peer(point));
                let seen = tokio::time::timeout(UNPLANNED_ANSWER, looking).await;
                let raising = self.with_room(point, || self.raise(point));
                match seen {
                    Ok(Ok(_)) => tokio::time::timeout(UNPLANNED_FENCE, raising).await,
                    Ok(Err(error)) => Ok(Err(error)),
                    Err(silent) => Err(silent),
                }
            }
            Ok(Err(error)) => {
                told_of(&error.to_string());
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
                told_of(&error.to_string());
                Ok(None)
            }
            Err(_) => {
                told_of("it does not answer in time");
                Ok(None)
            }
        }
    }

    /// Only the server that was followed is ever fenced.
    async fn known_peer(&self, point: &CopiedPoint) -> Result<PeerSeen, PassError> {
        let seen = look_at_peer(self.config).await?;
        let record = seen.theirs.record.clone().unwrap_or_default();
        let ours = system_id(self.state.session()).await?;
        // Whatever its role: whoever bears that epoch, or a later one, knows of a promotion that is not on record here.
        if record.epoch > self.epoch.saturating_add(EPOCH_STEP_MAX) {
            return Err(PassError::Refused {
                rule: ErrorCode::EpochOutOfRange,
                text: format!(
                    "the peer says that its epoch is {}, and this promotion would take epoch {}: no line of promotions jumps so far, and it is not believed",
                    record.epoch, self.epoch
                ),
                next_step: "look into table cluster of database warm_spare on the peer; a promotion by force_epoch goes on without it".into(),
            });
        }
        if record.role.is_some() && record.epoch >= self.epoch {
            return Err(self.newer(
                &record,
                record.copied_from.as_deref() == Some(ours.as_str()),
            ));
        }
        let followed = Promotion {
            system_id: point.system_id.clone(),
            peer_cluster: point.peer_cluster.clone(),
            ..self.promotion(point, Reached::default())
        };
        if record.role == Some(Role::Spare) || !is_recorded(&followed, &seen.theirs) {
            return Err(another_server());
        }
        Ok(seen)
    }

    /// The peer bears the epoch that is to be taken, or a later one. A spare that has copied from this very server proves
    /// that this cluster was a primary, and that its state was set back since.
    fn newer(&self, record: &Record, copied_from_here: bool) -> PassError {
        let (rule, why) = match copied_from_here {
            true => (
                ErrorCode::StateWentBack,
                "the peer has copied from this very server: this cluster was a primary, and its state was set back to an older copy; ",
            ),
            false => (ErrorCode::NewerPrimary, ""),
        };
        PassError::Refused {
            rule,
            text: format!(
                "{why}the peer is a {} of epoch {} by now, and this promotion would take epoch {}",
                record.role.map_or("cluster", Into::into),
                record.epoch,
                self.epoch
            ),
            next_step: format!(
                "set role = \"spare\" here, and promote the peer if it is a spare; or, to promote this one all the same, set force_epoch = {}",
                record.epoch.saturating_add(1)
            ),
        }
    }

    async fn raise(&self, point: &CopiedPoint) -> Result<PeerFence, PassError> {
        let id = self.state.cluster().await?.id;
        let fence = open_fence(&self.config.peer.datastore, &point.system_id).await?;
        // Whoever was paused, and lost the lock meanwhile, fences nobody.
        self.state.still_ours(self.lock).await?;
        fence.raise(self.epoch, &id, false).await?;
        Ok(fence)
    }

    fn promotion(&self, point: &CopiedPoint, reached: Reached) -> Promotion {
        let complete = reached.fenced && reached.complete;
        Promotion {
            epoch: self.epoch,
            id: String::new(),
            kind: match complete {
                true => PromotionKind::Switchover,
                false => PromotionKind::Failover,
            },
            time: self.clock.now(),
            lsn: point.lsn.clone(),
            commit_time: Some(point.commit_time),
            system_id: point.system_id.clone(),
            timeline: point.timeline,
            peer_cluster: point.peer_cluster.clone(),
            slot: point.slot.clone(),
            publication: String::new(),
            peer_fenced: reached.fenced,
            settled: false,
        }
    }

    /// A spare keeps those silent that would be at work while changes are applied. If this is undone, following silences
    /// them again.
    async fn wake_triggers(&self) -> Result<(), PassError> {
        let local = &self.config.local.datastore;
        let inside = LocalSession::open(local, &local.database).await?;
        self.state.still_ours(self.lock).await?;
        wake(&inside, self.lock.token).await
    }

    /// The commit after which there is no way back but another promotion.
    async fn promote(&self, before: &CopiedPoint, reached: Reached) -> Result<(), PassError> {
        // Where it stands now, the last copy or transactions included.
        let copied = self.state.copied_point().await?;
        let point = match copied {
            Some(copied) => stands_at(self.config, copied).await?,
            None => before.clone(),
        };
        let id = self.state.cluster().await?.id;
        let mut promotion = self.promotion(&point, reached);
        promotion.id = self.state.new_promotion_id().await?;
        if !point.slot.is_empty() {
            promotion.publication = Names::of(&id, &self.config.replication).publication;
        }
        let database = &self.config.local.datastore.database;
        let text = format!(
            "promoted by {} to epoch {} at {}, commit time {}",
            promotion.kind, self.epoch, point.lsn, point.commit_time
        );
        let told = (text.as_str(), self.config.change.as_str());
        self.state
            .promote(self.lock, database, &promotion, Some(Role::Spare), told)
            .await?;
        log::warn!("local: {text}");
        // Sessions from before stay read-only for as long as they live; whoever pools them connects anew.
        if let Err(error) = clear_out(self.state.session(), database).await {
            log::warn!("{error}");
        }
        Ok(())
    }
}

/// Whether anybody accepts a connection there, at any of the name's addresses. A refusal by all of them is an answer; silence
/// is knocked at again, for as long as the caller waits.
async fn knock(host: &str, port: u16) -> std::io::Result<()> {
    let mut knocks = JoinSet::new();
    let mut refused = None;
    loop {
        let addresses = tokio::net::lookup_host((host, port)).await?;
        for address in addresses {
            knocks.spawn(TcpStream::connect(address));
        }
        let again = tokio::time::sleep(KNOCK_AGAIN);
        tokio::pin!(again);
        loop {
            tokio::select! {
                knocked = knocks.join_next() => match knocked {
                    Some(Ok(Ok(_))) => return Ok(()),
                    Some(Ok(Err(error))) => refused = Some(error),
                    Some(Err(_)) => {}
                    None => {
                        let nobody = || std::io::ErrorKind::HostUnreachable.into();
                        return Err(refused.unwrap_or_else(nobody));
                    }
                },
                () = &mut again => break,
            }
        }
    }
}

fn told_of(why: &str) {
    log::warn!("the old primary is not fenced: {why}; it is as soon as it answers");
}

/// Of our own server, or another process at work: nothing can be undone now, and all of it is begun again.
fn is_our_own(error: &PassError) -> bool {
    matches!(error, PassError::State(_)) && error.side() == Some(Side::Local)
}

/// One reason is told once, whatever it keeps from being known.
fn in_words(refused: &[&Check]) -> String {
    let mut told: Vec<(&str, Vec<&str>)> = Vec::new();
    for check in refused {
        match told.iter_mut().find(|(reason, _)| *reason == check.reason) {
            Some((_, names)) => names.push(check.name.into_str()),
            None => told.push((&check.reason, vec![check.name.into_str()])),
        }
    }
    let told = told
        .iter()
        .map(|(reason, names)| format!("{}: {reason}", names.join(", ")));
    told.collect::<Vec<_>>().join("; ")
}

/// Whether the configuration asks for this cluster's promotion.
pub fn is_asked_for(config: &Config) -> bool {
    config.role == WantedRole::Primary
}
