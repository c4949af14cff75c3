//! Completes the spare: every row that the primary has committed is here, the tables have the same
//! form, and the artifacts and the values of the sequences are here too.

use super::Handover;
use crate::cluster::preparation::Names;
use crate::cluster::{CopiedPoint, LocalSession, PeerFence, PeerSession};
use crate::domain::{ErrorCode, Lsn};
use crate::observe::{Listener, Phase, Progress};
use crate::replication::stream::{self, Follow};
use crate::replication::{
    Options, PassError, Sequence, newest_id, set_all_as_holder, sync, unavailable_here,
};
use crate::role::preflight::{CLOCK_WAIT, ID_SLACK};
use crate::role::watch::{another_server, look_at_peer};
use chrono::{DateTime, Utc};
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;

impl Handover<'_> {
    /// Applies the stream until a message that was written behind the fence has arrived, and with
    /// it everything before.
    pub(super) async fn drain(
        &self,
        fence: &PeerFence,
        point: &CopiedPoint,
        limit: Duration,
    ) -> Result<(), PassError> {
        if point.slot.is_empty() {
            return match self.forced() {
                true => self.last_copy(("takeover.drain_timeout", limit)).await,
                // The preflight estimates its duration.
                false => {
                    let limit = self.config.takeover.read_only_limit;
                    self.last_copy(("takeover.read_only_limit", limit)).await
                }
            };
        }
        let mark = fence.mark(self.epoch).await?;
        let draining = Box::pin(self.follow_to(mark, point));
        match tokio::time::timeout(limit, draining).await {
            Ok(drained) => drained,
            Err(_) => Err(PassError::Unfit {
                check: ErrorCode::Drain,
                text: format!(
                    "the last transactions of the primary were not applied within takeover.drain_timeout = {}",
                    humantime::format_duration(limit)
                ),
                next_step: "find out what the gate waits for, or raise takeover.drain_timeout"
                    .into(),
            }),
        }
    }

    pub(super) async fn follow_to(&self, mark: Lsn, point: &CopiedPoint) -> Result<(), PassError> {
        let id = self.state.cluster().await?.id;
        let courier = (self.courier)()?;
        let follow = Follow {
            config: self.config,
            state: self.state,
            lock: self.lock,
            courier: &courier,
            names: Names::of(&id, &self.config.replication),
            recorded: point.clone(),
            database: &self.config.local.datastore.database,
            incoming: false,
            until: Some(mark),
            told: self.heard.clone(),
            spool: self.spool.clone(),
            clock: self.clock.clone(),
            retried: Arc::new(Mutex::new(Instant::now())),
            differed: stream::Differed::default(),
        };
        match stream::follow(&follow).await {
            Ok(_) => Ok(()),
            Err(gap) => Err(gap.failure().unwrap_or_else(|gap| PassError::NotMet {
                text: gap.to_string(),
            })),
        }
    }

    /// Makes one more copy in snapshot mode, of a primary to which nobody writes.
    async fn last_copy(&self, (key, limit): (&str, Duration)) -> Result<(), PassError> {
        let options = Options {
            lock: Some(self.lock),
            throttle: Some((self.courier)()?.throttle),
            spool: Some(self.spool.clone()),
            fenced_by_us: true,
            ..Options::default()
        };
        let (phase, seen) = watch::channel(None);
        let progress = Progress::new(Arc::new(Phases(phase)));
        let copying = Box::pin(sync(self.config, options, &progress));
        tokio::select! {
            copied = copying => copied.map(drop),
            () = too_late(limit, seen) => Err(PassError::Unfit {
                check: ErrorCode::Drain,
                text: format!(
                    "the last copy was not made within {key} = {}",
                    humantime::format_duration(limit)
                ),
                next_step: match self.forced() {
                    true => "the primary's changes after the recovery point are listed when it comes back".into(),
                    false => format!("raise {key}, or replicate by the stream: `warm-spare prepare`"),
                },
            }),
        }
    }

    pub(super) async fn lacking(&self) -> Result<HashSet<String>, PassError> {
        let lacking = unavailable_here(self.config).await?.unwrap_or_default();
        Ok(lacking.into_iter().map(|(key, _)| key).collect())
    }

    /// Checks that the primary is still fenced, that its tables have the form that was followed,
    /// and that no row has passed the gate without its artifact since. Returns the primary's
    /// sequences: a copy has them from its snapshot, and the stream carries none.
    pub(super) async fn compare(
        &self,
        point: &CopiedPoint,
        lacked: &HashSet<String>,
    ) -> Result<Vec<Sequence>, PassError> {
        let (fenced, sequences) = if point.slot.is_empty() {
            let seen = look_at_peer(self.config).await?;
            (seen.theirs.fenced, Vec::new())
        } else {
            let seen = self.ask(point).await?;
            if seen.system_id != point.system_id {
                return Err(another_server());
            }
            stream::stands(&seen, point, &self.config.peer.datastore.database).map_err(unequal)?;
            (seen.fenced, seen.sequences)
        };
        if !fenced {
            return Err(unequal("somebody lifted the primary's fence".into()));
        }
        let now = self.lacking().await?;
        match now.difference(lacked).next() {
            None => Ok(sequences),
            Some(key) => Err(unequal(format!(
                "{} artifacts could not be copied, for example {key}",
                now.difference(lacked).count()
            ))),
        }
    }

    async fn ask(&self, point: &CopiedPoint) -> Result<stream::Seen, PassError> {
        let id = self.state.cluster().await?.id;
        let names = Names::of(&id, &self.config.replication);
        stream::ask(self.config, &point.slot, &names.publication, &self.clock).await
    }

    pub(super) async fn set_sequences(&self, values: &[Sequence]) -> Result<(), PassError> {
        let local = &self.config.local.datastore;
        let inside = LocalSession::open(local, &local.database).await?;
        // A holder that was paused, and has lost the lock, finds that out before it sets anything.
        self.state.still_ours(self.lock).await?;
        set_all_as_holder(&inside, values, self.lock.token).await
    }

    /// Reads the primary's clock, behind its fence. It is the last question to the primary.
    pub(super) async fn peers_clock(&self) -> Result<DateTime<Utc>, PassError> {
        let peer = PeerSession::open(&self.config.peer.datastore).await?;
        let sql = "SELECT clock_timestamp()";
        let row = peer.row("reading the clock", sql, &[]).await?;
        Ok(row.get(0)?)
    }

    /// Waits until the local clock is past the newest id. Ids are made of the server's time, and
    /// none may be given twice. If the primary answered, its clock shows which ids are of a time in
    /// the future, from which no others continue, and how far it may have given ids.
    pub(super) async fn wait_for_clock(
        &self,
        peer_clock: Option<DateTime<Utc>>,
    ) -> Result<(), PassError> {
        let local = &self.config.local.datastore;
        let inside = LocalSession::open(local, &local.database).await?;
        let sql = "SELECT clock_timestamp()";
        let until = peer_clock.map(|clock| clock + ID_SLACK);
        let Some(newest) = newest_id(&inside, until).await? else {
            return Ok(());
        };
        let clock = inside.query_one("reading the clock", sql, &[]).await?;
        let clock: DateTime<Utc> = clock.get(0);
        let wait = (newest - clock).to_std().unwrap_or_default();
        if wait > CLOCK_WAIT {
            return Err(PassError::Unfit {
                check: ErrorCode::Clocks,
                text: format!(
                    "the local datastore's clock is {} behind Builder's newest id: ids are made of time, and would be given twice",
                    humantime::format_duration(Duration::from_secs(wait.as_secs()))
                ),
                next_step: "set this node's clock".into(),
            });
        }
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

fn unequal(text: String) -> PassError {
    PassError::Unfit {
        check: ErrorCode::Compare,
        text,
        next_step: "let the spare follow again, and hand over when it is complete".into(),
    }
}

/// Receives each phase of a copy.
struct Phases(watch::Sender<Option<Phase>>);

impl Listener for Phases {
    fn phase(&self, phase: Phase, _: u64) {
        self.0.send_replace(Some(phase));
    }

    fn step(&self, _: Phase, _: u64, _: u64) {}
}

/// Returns when the limit is over, but not while bytes are being replaced: half of that would be
/// neither the old nor the new state.
async fn too_late(limit: Duration, mut seen: watch::Receiver<Option<Phase>>) {
    tokio::time::sleep(limit).await;
    let late = |phase: &Option<Phase>| matches!(phase, Some(Phase::Replacements | Phase::Switch));
    if seen.wait_for(|phase| !late(phase)).await.is_err() {
        // The copy is over, and its result is reported.
        std::future::pending::<()>().await;
    }
}
