//! The wait for the working lock while another process is at work.

use super::StatusWriter;
use super::pair::{self, Teller};
use crate::cluster::{Holder, LocalCluster, Lock, PeerCluster, StateDb, StateError, Turn, Watch};
use crate::config::{Config, Direction};
use crate::domain::{HoldReason, Verdict};
use crate::observe::{Hold, Work};
use crate::replication::ReplicationError;
use crate::role::{Purpose, preflight, request_id};
use std::time::{Duration, Instant};

/// Number of looks without an act of the lock's holder before the holder is reported, and before
/// its session is ended. A holder acts every 3 s; a look takes 3 s, and so does the wait for the
/// next one.
const LOOKS_UNTIL_REPORTED: u32 = 2;
const LOOKS_UNTIL_ENDED: u32 = 4;
/// Time of one look in the queue.
const QUEUE_LOOK: Duration = Duration::from_secs(3);
/// Time in which the lock is handed over after its holder's session was ended.
const HANDED_OVER_WITHIN: Duration = Duration::from_secs(10);

/// Time after which a forced promotion that was refused is tried again.
const TRIED_AGAIN_AFTER: Duration = Duration::from_secs(30);
/// Time limit for the peer, which usually cannot be reached from here.
const PEER_PATIENCE: Duration = Duration::from_secs(1);

type Taken = Option<(StateDb, Lock)>;

/// The memory of a waiting process from look to look.
#[derive(Default)]
pub(super) struct Waiting {
    watch: Watch,
    /// The place in the queue of the lock. Only a process that pushes, or that forces a promotion,
    /// waits there: the others leave the lock to these.
    turn: Option<Turn>,
    teller: Teller,
    /// The refusal of a forced promotion, with its time: the process that pushes goes on meanwhile.
    refused: Option<(Instant, Refusal)>,
}

/// Why a forced promotion would be refused here, and the next step.
struct Refusal {
    text: String,
    next_step: String,
}

impl Waiting {
    /// Takes the lock if it can be had. None: another process is at work.
    pub(super) async fn take(
        &mut self,
        writer: &StatusWriter,
        config: &Config,
        state: StateDb,
    ) -> Result<Taken, ReplicationError> {
        let direction = config.replication.direction;
        if let Some(turn) = &mut self.turn {
            match turn.wait(QUEUE_LOOK).await {
                None => {
                    let holder = state.holder().await.map_err(StateError::from)?;
                    return self.stand_by(writer, config, state, holder).await;
                }
                Some(ended) => {
                    self.turn = None;
                    return Ok(Some(ended?));
                }
            }
        }
        match state.lock(direction).await {
            Ok(lock) => Ok(Some((state, lock))),
            Err(StateError::Locked { holder }) => {
                self.stand_by(writer, config, state, holder.map(|holder| *holder))
                    .await
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Leaves the queue of the lock. A process that cannot work must not get the lock there.
    pub(super) fn leave_the_queue(&mut self) {
        self.turn = None;
    }

    /// Shows who works, and tells the other process what it needs, if one of the two pushes. Returns
    /// whether the holder pushes, and the number of looks since its last sign of life.
    async fn show(
        &mut self,
        writer: &StatusWriter,
        config: &Config,
        state: &StateDb,
        holder: Option<&Holder>,
    ) -> Result<(bool, u32), ReplicationError> {
        let who = holder.map(ToString::to_string).unwrap_or_default();
        if writer.read(|state| state.work != Work::Standby) {
            log::info!("local: another warm-spare is at work on this cluster ({who}); standing by");
        }
        let refused = self.refused.is_some();
        writer.release(|hold| match hold.reason {
            HoldReason::Config | HoldReason::WishesDiffer => false,
            HoldReason::ForceNeeded => !refused,
            _ => true,
        });
        let silent = self.watch.see(holder.cloned());
        writer.update(|state| {
            state.work = Work::Standby;
            state.cluster.peer_asked = false;
            state.lock.holder = holder.map(ToString::to_string);
            state.lock.holder_is_silent = silent >= LOOKS_UNTIL_REPORTED;
        });
        let pushes = config.replication.direction == Direction::Push;
        let pushed = !pushes && state.holder_pushes().await?;
        if pushes || pushed {
            // The look first: it finds the process that pushes, for which this one makes its checks.
            pair::look(writer, config, state).await?;
            self.teller.tell(writer, config, state).await?;
        } else {
            // The last word of a process that pushed does not hold any more.
            pair::look_at_the_worker(writer, state).await?;
            writer.release(|hold| hold.reason == HoldReason::WishesDiffer);
        }
        Ok((pushed, silent))
    }

    /// Stands by beside a process that pushes, on a cluster whose role is not set yet. True: there
    /// is such a process.
    pub(super) async fn accompany(
        &mut self,
        writer: &StatusWriter,
        config: &Config,
        state: &StateDb,
    ) -> Result<bool, ReplicationError> {
        let holder = state.holder().await.map_err(StateError::from)?;
        if holder.is_none() || !state.holder_pushes().await? {
            return Ok(false);
        }
        self.show(writer, config, state, holder.as_ref()).await?;
        Ok(true)
    }

    /// Shows who works, and takes the lock where this process may.
    async fn stand_by(
        &mut self,
        writer: &StatusWriter,
        config: &Config,
        state: StateDb,
        holder: Option<Holder>,
    ) -> Result<Taken, ReplicationError> {
        let who = holder.as_ref().map(ToString::to_string).unwrap_or_default();
        let pushes = config.replication.direction == Direction::Push;
        let shown = self.show(writer, config, &state, holder.as_ref()).await?;
        let (pushed, silent) = shown;
        let forces = pushed && self.may_force(writer, config, &state).await?;
        if (pushes || forces) && self.turn.is_none() {
            let waiting = LocalCluster::of(config).state().await?;
            let turn = waiting.queue(config.replication.direction, &state).await?;
            self.turn = Some(turn);
        }
        if !pushes && !forces {
            self.turn = None;
        }
        let Some(holder) = holder else {
            return Ok(None);
        };
        if silent >= LOOKS_UNTIL_ENDED {
            log::warn!(
                "local: the warm-spare at work ({who}) gives no sign of life; its session is ended, and this process takes over"
            );
        } else if forces {
            log::warn!(
                "local: this cluster is promoted by force_epoch = {}; the session of the warm-spare that pushes ({who}) is ended",
                config.force_epoch
            );
        } else {
            return Ok(None);
        }
        state.end_holder(&holder).await?;
        self.after_the_holder(config, state).await
    }

    /// Returns whether the configuration forces a promotion here that nothing refuses. The process
    /// that pushes works until then.
    async fn may_force(
        &mut self,
        writer: &StatusWriter,
        config: &Config,
        state: &StateDb,
    ) -> Result<bool, ReplicationError> {
        let entry = state.transition().await?;
        let undone =
            entry.is_some_and(|entry| entry.undone.is_some() && entry.asked == request_id(config));
        if undone || !pair::forces_promotion(writer, config) {
            if self.refused.take().is_some() {
                writer.release(|hold| hold.reason == HoldReason::ForceNeeded);
            }
            return Ok(false);
        }
        let is_fresh = |then: &Instant| then.elapsed() < TRIED_AGAIN_AFTER;
        if !self
            .refused
            .as_ref()
            .is_some_and(|(then, _)| is_fresh(then))
        {
            let found = Box::pin(refusal(config)).await;
            self.refused = found.map(|found| (Instant::now(), found));
        }
        let Some((_, found)) = &self.refused else {
            writer.release(|hold| hold.reason == HoldReason::ForceNeeded);
            return Ok(true);
        };
        let (text, step) = (&found.text, &found.next_step);
        writer.hold(HoldReason::ForceNeeded, text, step, false);
        Ok(false)
    }

    /// Notes that this process left the lock to one that pushes. The hold of a forced promotion that
    /// was tried here stays, and it is tried again later.
    pub(super) fn left_the_lock(&mut self, held: Option<Hold>) {
        let held = held.filter(|hold| hold.reason == HoldReason::ForceNeeded);
        self.refused = held.map(|hold| {
            let refusal = Refusal {
                text: hold.detail,
                next_step: hold.next_step,
            };
            (Instant::now(), refusal)
        });
    }

    /// Takes the lock after its holder's session was ended.
    async fn after_the_holder(
        &mut self,
        config: &Config,
        state: StateDb,
    ) -> Result<Taken, ReplicationError> {
        if let Some(turn) = &mut self.turn {
            let Some(ended) = turn.wait(HANDED_OVER_WITHIN).await else {
                return Ok(None);
            };
            self.turn = None;
            return Ok(Some(ended?));
        }
        match state.lock(config.replication.direction).await {
            Ok(lock) => Ok(Some((state, lock))),
            // Another waiting process was faster, or the session has not ended yet.
            Err(StateError::Locked { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Returns why a promotion without the primary would be refused. None: it would not.
async fn refusal(config: &Config) -> Option<Refusal> {
    let peer = PeerCluster::of(config);
    let checks = preflight(config, &peer, Purpose::Unplanned, PEER_PATIENCE).await;
    let refused = checks
        .into_iter()
        .find(|check| check.result == Verdict::Refuse)?;
    Some(Refusal {
        text: format!("not promoted: {}: {}", refused.name, refused.reason),
        next_step: refused.next_step,
    })
}
