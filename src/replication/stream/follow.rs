//! Runs following once: the checks before the stream is requested, the task that reads it, the
//! applier, and the question every ten seconds.

use super::StreamObserver;
use super::apply::Applier;
use super::changes::Changes;
use super::effects::TransactionEffects;
use super::error::Gap;
use super::gate::Gate;
use super::history_proof::Proof;
use super::lookahead::{Ahead, Lookahead};
use super::primary_status;
use super::pump::Pump;
use super::spool::{SpoolError, spool};
use crate::cluster::preparation::Names;
use crate::cluster::{
    ApplyPosition, DatastoreError, LocalCluster, Lock, PeerCluster, PrimaryStatus, RecoveryPoint,
    SpareDb, StateDb, StateError, WriteSession, silence_triggers,
};
use crate::config::Config;
use crate::domain::Lsn;
use crate::observe::Clock;
use crate::replication::artifact::carrier::Carrier;
use crate::replication::artifact::recording::Recording;
use crate::replication::artifact::retention::{Swept, sweep};
use crate::replication::artifact::retry::retry_unavailable;
use crate::replication::artifact::round::Swap;
use crate::replication::change_probe::told_of_standby;
use crate::replication::descent::{Here, There, doubt, left_at};
use crate::replication::error::{Policy, ReplicationError};
use crate::replication::fuse::Shrinkage;
use crate::replication::stream::Unheard;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};

/// Shortest and longest pause between two searches for artifacts that may be deleted.
const SWEEP_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
/// Maximum time for applying the changes that had arrived when the stream ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

pub struct Follow<'a> {
    pub config: &'a Config,
    pub state: &'a StateDb,
    pub lock: Lock,
    pub carrier: &'a Carrier,
    pub names: Names,
    /// The recovery point of the copy, with the slot that was used for it.
    pub recorded: RecoveryPoint,
    /// The database that the changes are written to, and whether it is not visible to Builder yet.
    pub database: &'a str,
    pub incoming: bool,
    /// Following ends when every transaction before this position is applied.
    pub until: Option<Lsn>,
    pub observer: Arc<dyn StreamObserver>,
    pub spool: Arc<Path>,
    pub clock: Clock,
    /// Time at which the primary was last asked again for unavailable artifacts.
    pub retried: Arc<Mutex<Instant>>,
    /// Tables in which a comparison found a difference, with the time.
    pub differed: Differed,
    /// Tells that another task records unavailable artifacts.
    pub recording: Recording,
}

/// The means of the process that follows.
pub struct FollowContext<'a> {
    pub config: &'a Config,
    pub state: &'a StateDb,
    pub lock: Lock,
    pub carrier: &'a Carrier,
    /// Directory of the spool.
    pub spool: Arc<Path>,
}

impl<'a> Follow<'a> {
    /// Follows into the visible database, without an end, and reports to nobody.
    pub fn new(context: FollowContext<'a>, names: Names, recorded: RecoveryPoint) -> Self {
        let FollowContext {
            config,
            state,
            lock,
            carrier,
            spool,
        } = context;
        Follow {
            config,
            state,
            lock,
            carrier,
            names,
            recorded,
            database: &config.local.datastore.database,
            incoming: false,
            until: None,
            observer: Arc::new(Unheard),
            spool,
            clock: Clock::real(),
            retried: Arc::new(Mutex::new(Instant::now())),
            differed: Differed::default(),
            recording: Recording::default(),
        }
    }
}

pub type Differed = Arc<Mutex<HashMap<String, Instant>>>;

/// Channels between the applier and the questions beside it.
pub(super) struct Channels<'a> {
    /// Set only when no table is left to be compared.
    pub until: &'a watch::Sender<Option<Lsn>>,
    pub advance: &'a watch::Sender<Lsn>,
    /// Every transaction before this position is applied.
    pub applied: watch::Receiver<Lsn>,
    /// True: the primary's history is proven to continue the spare's.
    pub proven: watch::Receiver<bool>,
}

/// The final position, and the changes that wait for the switch.
#[derive(Debug)]
pub struct Followed {
    pub point: ApplyPosition,
    pub swaps: Vec<Swap>,
    pub shrinkage: Shrinkage,
}

/// Follows until the wanted end, or until it cannot go on.
pub async fn follow(follow: &Follow<'_>) -> Result<Followed, Gap> {
    match Box::pin(follow.run(false)).await {
        // The transactions are applied one by one to find the one that the fuse means.
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
        let session = LocalCluster::of(self.config)
            .applying(self.database)
            .await
            .map_err(ReplicationError::from)?;
        SpareDb::of(&session)
            .end_former_writers()
            .await
            .map_err(ReplicationError::from)?;
        let point = self.take_over(&session).await?;
        silence_triggers(&session, self.lock.token).await?;
        session
            .write_only_in_transactions()
            .await
            .map_err(ReplicationError::from)?;
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
        let settling = TransactionEffects::open(
            self.config,
            (self.state, self.lock),
            self.carrier,
            &session,
            self.recording.clone(),
            self.incoming,
        )
        .await?;
        let gate = Gate::open(
            self.config,
            self.carrier.clone(),
            self.database,
            self.observer.clone(),
            proven_seen.clone(),
        )
        .await?;
        let (ours, gates) = (session.ended(), gate.ended());
        let states = self.state.session().ended();
        // A session that is kept for the whole run reports its end here, and the next run opens
        // another.
        let ended = async {
            tokio::select! {
                error = ours => error,
                error = gates => error,
                error = states => error,
            }
        };
        let stream = self.stream(point).await?;
        self.observer.following();
        let (sender, receiver) = spool(self.memory(), self.disk(), &self.spool);
        let (durable, durable_seen) = watch::channel(point.start_lsn());
        let (reached, reached_seen) = watch::channel(Lsn(0));
        let (advance, mut advance_seen) = watch::channel(Lsn(0));
        let (until, mut until_seen) = watch::channel(None);
        let (ahead, keys) = (Ahead::default(), gate.clone());
        let pump = Pump {
            stream,
            spool: sender,
            lookahead: Some(Lookahead::new(
                gate.clone(),
                ahead.clone(),
                point.last_commit_lsn,
            )),
            durable: durable_seen,
            received: point.start_lsn(),
        };
        let mut applier = Applier {
            changes: Changes::new(session, self.lock.token),
            gate,
            ahead,
            spool: receiver,
            settling,
            observer: self.observer.as_ref(),
            recorded: &self.recorded,
            point,
            durable,
            careful,
            reached,
            token: self.lock.token,
            unproven: point.last_commit_lsn,
            proven,
        };
        // The reader runs on another thread, so that the socket is read whatever the applier does.
        // The thread ends with this run.
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
        // Changes that can wait in the spool do so. They are applied, however long that takes, and
        // then the rest is requested again.
        let mut full = None;
        let ended = loop {
            tokio::select! {
                biased;
                applied = &mut applying => break match (applied, full) {
                    (Err(Gap::Spool(SpoolError::Failed(_))), Some(full)) => Err(full),
                    // The applier reached the end of the queue before the error arrived here.
                    (Err(Gap::Spool(SpoolError::Failed(_))), None) => Err(why(reading.join_next().await)),
                    (applied, _) => applied,
                },
                ended = reading.join_next(), if full.is_none() => {
                    let why = why(ended);
                    if matches!(why, Gap::Spool(SpoolError::Full { .. })) {
                        log::info!(
                            "{why}: these changes are applied before the primary is asked for more"
                        );
                        full = Some(why);
                        continue;
                    }
                    // A primary that is gone for good has sent these changes before its end.
                    // Changes that still need its artifacts cannot be applied.
                    break match tokio::time::timeout(DRAIN_TIMEOUT, &mut applying).await {
                        Ok(Ok(point)) => Ok(point),
                        Ok(Err(gap)) if gap.needs_baseline() => Err(gap),
                        Ok(Err(Gap::Spool(SpoolError::Failed(_)))) | Err(_) => Err(why),
                        Ok(Err(gap)) => {
                            log::warn!(
                                "not all changes that had arrived before the stream ended could be applied: {gap}"
                            );
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

    /// Runs the tasks beside the stream, each of which may end it.
    async fn beside(
        &self,
        seen: PrimaryStatus,
        channels: Channels<'_>,
        keys: &Gate,
        mut proven: watch::Receiver<bool>,
        ended: impl Future<Output = DatastoreError>,
    ) -> Gap {
        let upkeep = async {
            // No task deletes or copies anything before the history is proven.
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

    /// Deletes artifacts again and again. Only a spare deletes, and only artifacts that neither
    /// Builder's own database nor a kept generation names.
    async fn keep_sweeping(&self, gate: &Gate) -> ReplicationError {
        let Some(courier) = self.carrier.courier().filter(|_| !self.incoming) else {
            return std::future::pending().await;
        };
        let pause =
            (self.config.replication.artifact_retention / 4).clamp(SWEEP_PAUSE.0, SWEEP_PAUSE.1);
        loop {
            tokio::time::sleep(pause).await;
            let local = &courier.local;
            let claim = |key: &str| gate.claim(key);
            match sweep(self.config, self.state, self.lock, local, claim).await {
                Ok(Swept { deleted: 0, .. }) => {}
                Ok(swept) => log::info!(
                    "local: {} artifacts deleted whose packages were removed longer ago than replication.artifact_retention",
                    swept.deleted
                ),
                Err(error @ ReplicationError::State(StateError::Superseded)) => return error,
                // Deleting is never urgent.
                Err(error) if error.policy() == Policy::Retry => log::debug!("{error}"),
                Err(error) => {
                    log::warn!("{error}; artifacts of removed packages are deleted later")
                }
            }
        }
    }

    /// Tries again to copy unavailable artifacts. Each is copied under a key that no row in the
    /// stream names at that moment.
    async fn keep_retrying(&self, gate: &Gate) -> ReplicationError {
        if self.incoming {
            return std::future::pending().await;
        }
        let pause = self.config.replication.retry_missing;
        loop {
            // A stream that begins again does not restart the wait.
            let since = *self.retried.lock().expect("no holder panics");
            tokio::time::sleep_until((since + pause).into()).await;
            *self.retried.lock().expect("no holder panics") = Instant::now();
            let claim = |key: &str| gate.claim(key);
            match retry_unavailable(self.config, self.lock, self.carrier, claim).await {
                Ok(0) => {}
                Ok(brought) => self.observer.brought(brought),
                Err(error @ ReplicationError::State(StateError::Superseded)) => return error,
                Err(error) => log::warn!(
                    "copying unavailable artifacts failed, and is tried again later: {error}"
                ),
            }
        }
    }

    /// Checks, before any change of the primary is applied, that the primary is of the spare's
    /// lineage and was not set back to a position before the spare's.
    async fn same_history(&self, seen: &PrimaryStatus, point: &ApplyPosition) -> Result<(), Gap> {
        let record = PeerCluster::of(self.config)
            .record()
            .await
            .map_err(ReplicationError::from)?;
        let ours = RecoveryPoint {
            lsn: point.lsn.to_string(),
            commit_time: point.commit_time,
            ..self.recorded.clone()
        };
        let here = match self.incoming {
            // The baseline has checked the record of this cluster already; the point belongs to the
            // incoming database.
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

    /// Asks the primary, and fails if its stream would not continue the spare's history.
    async fn joined(&self, point: ApplyPosition) -> Result<PrimaryStatus, Gap> {
        let seen = self.ask().await?;
        let database = &self.config.peer.datastore.database;
        self.same_history(&seen, &point).await?;
        primary_status::check_resumable(&seen, &self.recorded, point.lsn, database)
            .map_err(Gap::Broken)?;
        self.observer.seen(&seen);
        Ok(seen)
    }

    pub(super) async fn ask(&self) -> Result<PrimaryStatus, ReplicationError> {
        primary_status::query(&PeerCluster::of(self.config), &self.names, &self.clock).await
    }

    /// Writes our lock token into the recovery point. The next commit of a previous holder then
    /// fails.
    async fn take_over(&self, session: &WriteSession) -> Result<ApplyPosition, Gap> {
        self.state.still_ours(self.lock).await?;
        Ok(SpareDb::of(session).claim(self.lock.token).await?)
    }
}
