//! One run of following: the checks before the stream is asked for, the task that reads it, the applier, and the question
//! every ten seconds.

use super::super::descent::{Here, There, doubt, left_at};
use super::super::error::{PassError, Policy};
use super::super::fuse::Shrinkage;
use super::Told;
use super::apply::{Applier, Point};
use super::changes::Changes;
use super::effects::Settling;
use super::error::Gap;
use super::gate::Gate;
use super::lookahead::{Ahead, Lookahead};
use super::primary_status::{self, Seen};
use super::proof::Proof;
use super::pump::Pump;
use super::spool::{SpoolError, spool};
use crate::cluster::preparation::Names;
use crate::cluster::{
    Applying, CopiedPoint, DatastoreError, LocalSession, Lock, State, StateError,
    end_former_writers, peers_record,
};
use crate::config::Config;
use crate::domain::Lsn;
use crate::observe::Clock;
use crate::replication::artifact::courier::Courier;
use crate::replication::artifact::retention::{Swept, sweep};
use crate::replication::artifact::retry::retry_unavailable;
use crate::replication::artifact::round::Swap;
use crate::replication::baseline::silenced;
use crate::replication::change_probe::told_of_standby;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

/// The shortest and the longest pause between two looks for artifacts that may go.
const SWEEP: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
/// When the stream has ended, what has arrived may take so long to be applied.
const DRAIN: Duration = Duration::from_secs(60);

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
    /// Tables that a comparison found different, and when.
    pub differed: Differed,
}

pub type Differed = Arc<Mutex<HashMap<String, Instant>>>;

/// What the applier and the questions beside it tell each other.
pub(super) struct Channels<'a> {
    /// Known only when nothing is left to be compared.
    pub until: &'a watch::Sender<Option<Lsn>>,
    pub advance: &'a watch::Sender<Lsn>,
    /// Everything before it is applied.
    pub applied: watch::Receiver<Lsn>,
    /// The history is the one that the spare stands in.
    pub proven: watch::Receiver<bool>,
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
        Err(Gap::Failed(error)) => Err(Gap::Failed(told_of_standby(follow.config, error).await)),
        ended => ended,
    }
}

pub(super) fn why(ended: Option<Result<Gap, JoinError>>) -> Gap {
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
        silenced::silence(&session, self.lock.token).await?;
        let seen = self.joined(point).await?;
        let proof = Proof::wanted(&seen, &self.recorded, point, self.incoming);
        let proof = proof.map_err(Gap::Broken)?;
        let seen = match proof {
            Proof::Comparison => {
                self.compare_history(&seen, point).await?;
                let now = self.joined(point).await?;
                self.is_of_the_stream(&now, &seen.server_started)?;
                now
            }
            _ => seen,
        };
        let (proven, proven_seen) = watch::channel(proof != Proof::Mark);
        let settling = Settling::open(
            self.config,
            (self.state, self.lock),
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
            proven_seen.clone(),
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
        let stream = self.stream(point).await?;
        self.told.following();
        let (sender, receiver) = spool(self.memory(), self.disk(), &self.spool);
        let (durable, durable_seen) = watch::channel(point.resume());
        let (reached, reached_seen) = watch::channel(Lsn(0));
        let (advance, mut advance_seen) = watch::channel(Lsn(0));
        let (until, mut until_seen) = watch::channel(None);
        let (ahead, keys) = (Ahead::default(), gate.clone());
        let pump = Pump {
            stream,
            spool: sender,
            lookahead: Some(Lookahead::new(gate.clone(), ahead.clone(), point.mark)),
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
            recorded: &self.recorded,
            point,
            durable,
            careful,
            reached,
            token: self.lock.token,
            unproven: point.mark,
            proven,
        };
        // On another thread, so that the socket is read whatever the applier does. It ends with us.
        let mut reading = JoinSet::new();
        reading.spawn(pump.run());
        let mut applying = Box::pin(applier.run(&mut until_seen, &mut advance_seen));
        let channels = Channels {
            until: &until,
            advance: &advance,
            applied: reached_seen,
            proven: proven_seen.clone(),
        };
        let mut beside = Box::pin(self.beside(seen, channels, &keys, proven_seen, ended));
        // All that may wait does: what it holds is applied, however long that takes, and the rest is asked for again.
        let mut full = None;
        let ended = loop {
            tokio::select! {
                biased;
                applied = &mut applying => break match (applied, full) {
                    (Err(Gap::Spool(SpoolError::Failed(_))), Some(full)) => Err(full),
                    // It came to the end before we heard of it.
                    (Err(Gap::Spool(SpoolError::Failed(_))), None) => Err(why(reading.join_next().await)),
                    (applied, _) => applied,
                },
                ended = reading.join_next(), if full.is_none() => {
                    let why = why(ended);
                    if matches!(why, Gap::Spool(SpoolError::Full { .. })) {
                        log::info!("{why}: it is applied before the primary is asked for more");
                        full = Some(why);
                        continue;
                    }
                    // A primary that is gone for good has sent this before; what it still has to bring it cannot.
                    break match tokio::time::timeout(DRAIN, &mut applying).await {
                        Ok(Ok(point)) => Ok(point),
                        Ok(Err(gap)) if gap.needs_baseline() => Err(gap),
                        Ok(Err(Gap::Spool(SpoolError::Failed(_)))) | Err(_) => Err(why),
                        Ok(Err(gap)) => {
                            log::warn!("what had arrived before the stream ended is not all applied: {gap}");
                            Err(why)
                        }
                    };
                }
                gap = &mut beside => break Err(gap),
            }
        };
        drop(beside);
        drop(applying);
        let point = ended?;
        Ok(Followed {
            point,
            swaps: std::mem::take(&mut applier.settling.swaps),
            shrinkage: std::mem::take(&mut applier.settling.shrinkage),
        })
    }

    /// What goes on beside the stream, and may end it.
    async fn beside(
        &self,
        seen: Seen,
        channels: Channels<'_>,
        keys: &Gate,
        mut proven: watch::Receiver<bool>,
        ended: impl Future<Output = DatastoreError>,
    ) -> Gap {
        let upkeep = async {
            // Neither deletes nor brings anything before the history is proven.
            if proven.wait_for(|proven| *proven).await.is_err() {
                return std::future::pending().await;
            }
            tokio::select! {
                error = self.keep_sweeping(keys) => error,
                error = self.keep_retrying(keys) => error,
            }
        };
        tokio::select! {
            gap = self.keep_asking(seen, channels) => gap,
            error = upkeep => error.into(),
            error = ended => error.into(),
        }
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
            match sweep(self.config, self.state, self.lock, local, claim).await {
                Ok(Swept { deleted: 0, .. }) => {}
                Ok(swept) => log::info!(
                    "local: {} artifacts deleted whose packages went long ago",
                    swept.deleted
                ),
                Err(error @ PassError::State(StateError::Superseded)) => return error,
                // Deleting is never urgent.
                Err(error) if error.policy() == Policy::Retry => log::debug!("{error}"),
                Err(error) => {
                    log::warn!("{error}; artifacts whose packages went are deleted later")
                }
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

    /// Before anything of the primary is applied: it is of our line, and was not set back behind the point.
    async fn same_history(&self, seen: &Seen, point: &Point) -> Result<(), Gap> {
        let record = peers_record(&self.config.peer.datastore)
            .await
            .map_err(PassError::from)?;
        let ours = CopiedPoint {
            lsn: point.lsn.to_string(),
            commit_time: point.commit_time,
            ..self.recorded.clone()
        };
        let here = match self.incoming {
            // Its baseline has asked for the record of this cluster; the point is the incoming database's own.
            true => Here {
                point: Some(ours),
                ..Here::default()
            },
            false => Here {
                record: self.state.own_record().await?,
                point: Some(ours),
            },
        };
        let there = There {
            record: record.as_ref().filter(|_| !self.incoming),
            system_id: &seen.system_id,
            timeline: seen.timeline,
            wal: Some(seen.wal),
            transactions: String::new(),
            left_at: left_at(self.config, here.point.as_ref(), seen.timeline).await?,
        };
        match doubt(&here, &there) {
            Some(doubt) => Err(Gap::WentBack(doubt)),
            None => Ok(()),
        }
    }

    /// Asked, and the stream would join what is here.
    async fn joined(&self, point: Point) -> Result<Seen, Gap> {
        let seen = self.ask().await?;
        let database = &self.config.peer.datastore.database;
        self.same_history(&seen, &point).await?;
        primary_status::joins(&seen, &self.recorded, point.lsn, database).map_err(Gap::Broken)?;
        self.told.seen(&seen);
        Ok(seen)
    }

    pub(super) async fn ask(&self) -> Result<Seen, PassError> {
        primary_status::ask(
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
}
