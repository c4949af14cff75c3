//! The wait for the working lock while another process is at work.

use super::{StatusWriter, pair};
use crate::cluster::{Holder, LocalCluster, Lock, StateDb, StateError, Turn, Watch};
use crate::config::{Config, Direction};
use crate::domain::HoldReason;
use crate::observe::Work;
use crate::replication::ReplicationError;
use std::time::Duration;

/// Number of looks without an act of the lock's holder before the holder is reported, and before
/// its session is ended. A holder acts every 3 s; a look takes 3 s, and so does the wait for the
/// next one.
const LOOKS_UNTIL_REPORTED: u32 = 2;
const LOOKS_UNTIL_ENDED: u32 = 4;
/// Time of one look in the queue.
const QUEUE_LOOK: Duration = Duration::from_secs(3);
/// Time in which the lock is handed over after its holder's session was ended.
const HANDED_OVER_WITHIN: Duration = Duration::from_secs(10);

type Taken = Option<(StateDb, Lock)>;

/// What a waiting process remembers from look to look.
#[derive(Default)]
pub(super) struct Waiting {
    watch: Watch,
    /// The place in the queue of the lock. Only a process that pushes, or that forces a promotion,
    /// waits there: the others leave the lock to these.
    turn: Option<Turn>,
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
        writer
            .release(|hold| !matches!(hold.reason, HoldReason::Config | HoldReason::WishesDiffer));
        let silent = self.watch.see(holder.cloned());
        writer.update(|state| {
            state.work = Work::Standby;
            state.lock.holder = holder.map(ToString::to_string);
            state.lock.holder_is_silent = silent >= LOOKS_UNTIL_REPORTED;
        });
        let pushes = config.replication.direction == Direction::Push;
        let pushed = !pushes && state.holder_pushes().await?;
        if pushes || pushed {
            pair::tell(writer, config, state).await?;
            pair::look(writer, config, state).await?;
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
        let forces = pushed && pair::forces_promotion(writer, config);
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
