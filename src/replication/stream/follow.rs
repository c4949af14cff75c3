//! One run of following: the checks before the stream is asked for, the task that reads it, the applier, and the question
//! every ten seconds.

use super::super::artifacts::Swap;
use super::super::both_sides::compare_both;
use super::super::courier::Courier;
use super::super::error::{PassError, Policy};
use super::super::fuse::Shrinkage;
use super::super::retention::{Swept, sweep};
use super::super::retry::retry_unavailable;
use super::Told;
use super::ahead::{Ahead, Lookahead};
use super::apply::{Applier, Point};
use super::changes::Changes;
use super::error::Gap;
use super::gate::Gate;
use super::pump::Pump;
use super::question::{self, Seen};
use super::settle::Settling;
use super::spool::{SpoolError, spool};
use crate::cluster::preparation::Names;
use crate::cluster::{
    Applying, Confirmation, CopiedPoint, LocalSession, Lock, Lsn, State, StateError, WalSession,
    end_former_writers,
};
use crate::config::Config;
use crate::observe::Clock;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

const QUESTION: Duration = Duration::from_secs(10);
/// The shortest and the longest pause between two looks for artifacts that may go.
const SWEEP: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
/// An idle primary may hold so much for us before the recovery point is moved over it, and its proof given up.
const IDLE_HOLD: u64 = 64 << 20;
/// When the stream has ended, what has arrived may take so long to be applied.
const DRAIN: Duration = Duration::from_secs(60);
/// Answers that wait for the spare to come so far.
const MOST_PENDING: usize = 360;

pub struct Follow<'a> {
    pub config: &'a Config,
    pub state: &'a State,
    pub lock: Lock,
    pub courier: &'a Courier,
    pub names: Names,
    /// What the copy was made from, and with which slot.
    pub recorded: CopiedPoint,
    /// The database that the changes go into, and whether Builder does not see it yet.
    pub database: &'a str,
    pub incoming: bool,
    /// Ends when everything before it is applied.
    pub until: Option<Lsn>,
    pub told: Arc<dyn Told>,
    pub spool: Arc<Path>,
    pub clock: Clock,
    /// When the primary was last asked again for what it lacked.
    pub retried: Arc<Mutex<Instant>>,
}

/// Where it ended, and what waits for the switch.
#[derive(Debug)]
pub struct Followed {
    pub point: Point,
    pub swaps: Vec<Swap>,
    pub shrinkage: Shrinkage,
}

/// Follows until the end that is wanted, or until it cannot go on.
pub async fn follow(follow: &Follow<'_>) -> Result<Followed, Gap> {
    match Box::pin(follow.run(false)).await {
        // Which transaction the fuse means is found by taking them one by one.
        Err(Gap::Careful) => Box::pin(follow.run(true)).await,
        ended => ended,
    }
}

fn why(ended: Option<Result<Gap, JoinError>>) -> Gap {
    match ended {
        Some(Ok(gap)) => gap,
        _ => Gap::Decoding("the task that reads the stream ended".into()),
    }
}

impl Follow<'_> {
    async fn run(&self, careful: bool) -> Result<Followed, Gap> {
        let local = &self.config.local.datastore;
        let session = Applying::open(local, self.database)
            .await
            .map_err(PassError::from)?;
        end_former_writers(&session)
            .await
            .map_err(PassError::from)?;
        let point = self.take_over(&session).await?;
        let seen = self.ask().await?;
        let database = &self.config.peer.datastore.database;
        question::joins(&seen, &self.recorded, point.lsn, database).map_err(Gap::Broken)?;
        self.told.seen(&seen);
        let settling = Settling::open(
            self.config,
            self.state,
            self.courier,
            &session,
            self.incoming,
        )
        .await?;
        let gate = Gate::open(
            self.config,
            self.courier.clone(),
            self.database,
            self.told.clone(),
        )
        .await?;
        let (ours, gates) = (session.ended(), gate.ended());
        let states = self.state.session().ended();
        // Who keeps a session for as long as this run hears of its end, and the next run opens another.
        let ended = async {
            tokio::select! {
                error = ours => error,
                error = gates => error,
                error = states => error,
            }
        };
        let stream = WalSession::open(&self.config.peer.datastore)
            .await
            .map_err(PassError::from)?
            .start(&self.names.slot, &self.names.publication, point.resume())
            .await
            .map_err(PassError::from)?;
        self.told.following();
        let memory = usize::try_from(self.config.replication.buffer / 4).unwrap_or(usize::MAX);
        let disk = self.config.replication.wal_hold_limit;
        let (sender, receiver) = spool(memory, disk, &self.spool);
        let (durable, durable_seen) = watch::channel(point.resume());
        let (reached, reached_seen) = watch::channel(Lsn(0));
        let (advance, mut advance_seen) = watch::channel(Lsn(0));
        // Known only when nothing is left to be compared.
        let (until, mut until_seen) = watch::channel(None);
        let (ahead, keys) = (Ahead::default(), gate.clone());
        let pump = Pump {
            stream,
            spool: sender,
            lookahead: Lookahead::new(gate.clone(), ahead.clone(), point.mark),
            durable: durable_seen,
            received: point.resume(),
        };
        let mut applier = Applier {
            changes: Changes::new(session),
            gate,
            ahead,
            spool: receiver,
            settling,
            told: self.told.as_ref(),
            point,
            durable,
            careful,
            reached,
            token: self.lock.token,
            unproven: point.mark,
        };
        // On another thread, so that the socket is read whatever the applier does. It ends with us.
        let mut reading = JoinSet::new();
        reading.spawn(pump.run());
        let mut applying = Box::pin(applier.run(&mut until_seen, &mut advance_seen));
        let ended = tokio::select! {
            biased;
            applied = &mut applying => match applied {
                // It came to the end before we heard of it.
                Err(Gap::Spool(SpoolError::Failed(_))) => Err(why(reading.join_next().await)),
                applied => applied,
            },
            ended = reading.join_next() => {
                let why = why(ended);
                // A primary that is gone for good has sent this before; what it still has to bring it cannot.
                match tokio::time::timeout(DRAIN, &mut applying).await {
                    Ok(Ok(point)) => Ok(point),
                    Ok(Err(gap)) if gap.needs_baseline() => Err(gap),
                    Ok(Err(Gap::Spool(SpoolError::Failed(_)))) | Err(_) => Err(why),
                    Ok(Err(gap)) => {
                        log::warn!("what had arrived before the stream ended is not all applied: {gap}");
                        Err(why)
                    }
                }
            }
            gap = self.keep_asking(seen, point, (&until, &advance), reached_seen) => Err(gap),
            error = self.keep_sweeping(&keys) => Err(error.into()),
            error = self.keep_retrying(&keys) => Err(error.into()),
            error = ended => Err(error.into()),
        };
        drop(applying);
        let point = ended?;
        Ok(Followed {
            point,
            swaps: std::mem::take(&mut applier.settling.swaps),
            shrinkage: std::mem::take(&mut applier.settling.shrinkage),
        })
    }

    /// Only a spare deletes, and only what Builder's own database and the kept ones do not name.
    async fn keep_sweeping(&self, gate: &Gate) -> PassError {
        if self.incoming {
            return std::future::pending().await;
        }
        let pause = (self.config.replication.artifact_retention / 4).clamp(SWEEP.0, SWEEP.1);
        loop {
            tokio::time::sleep(pause).await;
            let local = &self.courier.local;
            let claim = |key: &str| gate.claim(key);
            match sweep(self.config, self.state, local, claim).await {
                Ok(Swept { deleted: 0, .. }) => {}
                Ok(swept) => log::info!(
                    "local: {} artifacts deleted whose packages went long ago",
                    swept.deleted
                ),
                // Deleting is never urgent.
                Err(error) if error.policy() == Policy::Retry => log::debug!("{error}"),
                Err(error) => return error,
            }
        }
    }

    /// What the primary lacked may be there again. It is brought under a key that nobody in the stream is at.
    async fn keep_retrying(&self, gate: &Gate) -> PassError {
        if self.incoming {
            return std::future::pending().await;
        }
        let pause = self.config.replication.retry_missing;
        loop {
            // A stream that begins again does not begin the wait again.
            let since = *self.retried.lock().expect("no holder panics");
            tokio::time::sleep_until((since + pause).into()).await;
            *self.retried.lock().expect("no holder panics") = Instant::now();
            let claim = |key: &str| gate.claim(key);
            match retry_unavailable(self.config, self.lock, self.courier, claim).await {
                Ok(0) => {}
                Ok(brought) => self.told.brought(brought),
                Err(error @ PassError::State(StateError::Superseded)) => return error,
                Err(error) => log::warn!("{error}; it is tried again later"),
            }
        }
    }

    async fn ask(&self) -> Result<Seen, PassError> {
        question::ask(
            self.config,
            &self.names.slot,
            &self.names.publication,
            &self.clock,
        )
        .await
    }

    /// Ours from now on: whoever held it before us fails at his next commit.
    async fn take_over(&self, session: &LocalSession) -> Result<Point, Gap> {
        self.state.still_ours(self.lock).await?;
        let sql = "UPDATE warm_spare.recovery_point SET token = $1 WHERE token <= $1 \
                   RETURNING lsn::text, commit_time, mark::text";
        let token = self.lock.token;
        let rows = session
            .query("taking the recovery point over", sql, &[&token])
            .await?;
        let Some(row) = rows.first() else {
            return Err(StateError::Superseded.into());
        };
        let lsn: String = row.get(0);
        Ok(Point {
            lsn: lsn
                .parse()
                .map_err(|_| Gap::Broken(format!("the recovery point is {lsn}")))?,
            commit_time: row.get(1),
            mark: row
                .get::<_, Option<String>>(2)
                .and_then(|mark| mark.parse().ok()),
        })
    }

    async fn keep_asking(
        &self,
        first: Seen,
        point: Point,
        (until, advance): (&watch::Sender<Option<Lsn>>, &watch::Sender<Lsn>),
        mut applied: watch::Receiver<Lsn>,
    ) -> Gap {
        let mut pending: VecDeque<(Lsn, Confirmation)> = VecDeque::new();
        let mut sequences = Vec::new();
        let mut started = self.recorded.server_started.clone();
        let mut next = Some(first);
        let mut timer = tokio::time::interval(QUESTION);
        timer.tick().await;
        loop {
            if let Some(seen) = next.take() {
                if let Err(gap) = self.look(&seen, &mut sequences).await {
                    return gap;
                }
                // An idle primary must not keep for us what holds nothing of ours.
                if seen
                    .slot
                    .as_ref()
                    .is_some_and(|slot| slot.held_bytes > IDLE_HOLD)
                {
                    let _ = advance.send(seen.wal);
                }
                match self.compare_after_restart(&seen, point, &mut started).await {
                    Ok(()) => {
                        until.send_replace(self.until);
                    }
                    Err(gap) if gap.needs_baseline() => return gap,
                    Err(error) => {
                        log::debug!("{error}");
                        timer.tick().await;
                        next = self.ask().await.ok();
                        continue;
                    }
                }
                if pending.len() == MOST_PENDING {
                    pending.pop_front();
                }
                let confirmation = Confirmation {
                    time: seen.time,
                    clock_offset_seconds: seen.clock_offset_seconds,
                };
                pending.push_back((seen.wal, confirmation));
            }
            let reached = *applied.borrow_and_update();
            let mut confirmed = None;
            while let Some((_, confirmation)) = pending.front().filter(|(lsn, _)| *lsn <= reached) {
                confirmed = Some(*confirmation);
                pending.pop_front();
            }
            if let Some(confirmation) = confirmed {
                self.told.confirmed(confirmation);
            }
            tokio::select! {
                _ = timer.tick() => match self.ask().await {
                    Ok(seen) => next = Some(seen),
                    // The stream itself may well go on; what is not confirmed makes the lag grow.
                    Err(error) => log::debug!("{error}"),
                },
                changed = applied.changed() => if changed.is_err() {
                    std::future::pending::<()>().await;
                },
            }
        }
    }

    /// A server that was set back to an older copy, and has written past our recovery point since, shows nothing of it
    /// in its log's positions. It was started anew for that, so then the rows are compared.
    async fn compare_after_restart(
        &self,
        seen: &Seen,
        point: Point,
        started: &mut String,
    ) -> Result<(), Gap> {
        if seen.server_started == *started {
            return Ok(());
        }
        // Where there is a mark, nothing is applied or told as complete before the history is proven by it.
        if point.mark.is_none() && !self.incoming {
            log::info!("peer: its server was started anew; the rows of both sides are compared");
            let compared = compare_both(self.config, None).await?;
            if let Some((table, rows)) = compared.differing.first() {
                return Err(Gap::Broken(format!(
                    "since the primary's server was started anew, {rows} rows of {table} are on one side only: it was set back to an older copy"
                )));
            }
        }
        if !self.incoming {
            self.state.server_started(&seen.server_started).await?;
        }
        self.told.compared(&seen.server_started);
        started.clone_from(&seen.server_started);
        Ok(())
    }

    async fn look(&self, seen: &Seen, sequences: &mut Vec<String>) -> Result<(), Gap> {
        let database = &self.config.peer.datastore.database;
        question::stands(seen, &self.recorded, database).map_err(|text| {
            match seen.schema == self.recorded.schema {
                true => Gap::Broken(text),
                false => Gap::Schema(text),
            }
        })?;
        let held = seen.slot.as_ref().map_or(0, |slot| slot.held_bytes);
        let limit = self.config.replication.wal_hold_limit;
        // One that was made by hand is not ours to give up.
        if held > limit && !self.names.slot_is_premade {
            return Err(Gap::Held { held, limit });
        }
        self.told.seen(seen);
        if *sequences != seen.sequences {
            let local = LocalSession::open(&self.config.local.datastore, self.database)
                .await
                .map_err(PassError::from)?;
            for statement in &seen.sequences {
                // One that is not here any more, or not yet, shows in the form of the tables.
                if let Err(error) = local.batch("setting a sequence", statement).await {
                    log::debug!("{error}");
                }
            }
            sequences.clone_from(&seen.sequences);
        }
        Ok(())
    }
}
