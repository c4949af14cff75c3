//! Completes the spare: every row that the primary has committed is here, the tables have the same
//! form, and the artifacts and the values of the sequences are here too.

use super::Handover;
use crate::cluster::preparation::Names;
use crate::cluster::{
    BuilderDb, LocalCluster, PeerFence, PrimaryStatus, RecoveryPoint, Sequence, SpareDb,
    WriteSession,
};
use crate::domain::{ErrorCode, Lsn};
use crate::observe::{Listener, Phase, Progress};
use crate::replication::stream::{self, Follow, FollowContext};
use crate::replication::{Options, ReplicationError, set_all_as_holder, sync};
use crate::role::preflight::{CLOCK_WAIT, ID_SLACK};
use crate::role::watch::{another_server, look_at_peer};
use chrono::{DateTime, Utc};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

impl Handover<'_> {
    /// Applies the stream until a message that was written behind the fence has arrived, and with
    /// it everything before.
    pub(super) async fn drain(
        &self,
        fence: &PeerFence,
        point: &RecoveryPoint,
        limit: Duration,
    ) -> Result<(), ReplicationError> {
        if !point.is_followed() {
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
            Err(_) => Err(ReplicationError::Precondition {
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

    pub(super) async fn follow_to(
        &self,
        mark: Lsn,
        point: &RecoveryPoint,
    ) -> Result<(), ReplicationError> {
        let id = self.state.cluster().await?.id;
        let carrier = (self.carrier)()?;
        let names = Names::of(&id, &self.config.replication);
        let context = FollowContext {
            config: self.config,
            state: self.state,
            lock: self.lock,
            carrier: &carrier,
            spool: self.spool.clone(),
        };
        let follow = Follow {
            until: Some(mark),
            observer: self.observer.clone(),
            clock: self.clock.clone(),
            ..Follow::new(context, names, point.clone())
        };
        match stream::follow(&follow).await {
            Ok(_) => Ok(()),
            Err(gap) => Err(gap
                .failure()
                .unwrap_or_else(|gap| ReplicationError::NotMet {
                    text: gap.to_string(),
                })),
        }
    }

    /// Makes one more copy in snapshot mode, of a primary to which nobody writes.
    async fn last_copy(&self, (key, limit): (&str, Duration)) -> Result<(), ReplicationError> {
        let options = Options {
            lock: Some(self.lock),
            throttle: Some((self.carrier)()?.throttle().clone()),
            spool: Some(self.spool.clone()),
            fenced_by_us: true,
            ..Options::default()
        };
        let (phase, seen) = watch::channel(None);
        let progress = Progress::new(Arc::new(Phases(phase)));
        let copying = Box::pin(sync(self.config, options, &progress));
        tokio::select! {
            copied = copying => copied.map(drop),
            () = too_late(limit, seen) => Err(ReplicationError::Precondition {
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

    pub(super) async fn unavailable(&self) -> Result<HashSet<String>, ReplicationError> {
        let unavailable = LocalCluster::of(self.config)
            .unavailable()
            .await?
            .unwrap_or_default();
        Ok(unavailable.into_iter().map(|(key, _)| key).collect())
    }

    /// Checks that the primary is still fenced, that its tables have the form that was followed,
    /// and that no row has passed the gate without its artifact since. Returns the primary's
    /// sequences: a copy has them from its snapshot, and the stream carries none.
    pub(super) async fn compare(
        &self,
        inside: &WriteSession,
        point: &RecoveryPoint,
        unavailable_before: &HashSet<String>,
    ) -> Result<Vec<Sequence>, ReplicationError> {
        let (fenced, sequences) = if !point.is_followed() {
            let seen = look_at_peer(self.config, &self.peer).await?;
            (seen.theirs.fenced, Vec::new())
        } else {
            let seen = self.ask(point).await?;
            if seen.system_id != point.system_id {
                return Err(another_server());
            }
            stream::check_intact(&seen, point, &self.config.peer.datastore.database)
                .map_err(unequal)?;
            (seen.fenced, seen.sequences)
        };
        if !fenced {
            return Err(unequal("somebody lifted the primary's fence".into()));
        }
        let now = SpareDb::of(inside).unavailable_reasons().await?;
        let now: HashSet<String> = now.into_iter().map(|(key, _)| key).collect();
        match now.difference(unavailable_before).next() {
            None => Ok(sequences),
            Some(key) => Err(unequal(format!(
                "{} artifacts could not be copied, for example {key}",
                now.difference(unavailable_before).count()
            ))),
        }
    }

    async fn ask(&self, point: &RecoveryPoint) -> Result<PrimaryStatus, ReplicationError> {
        let id = self.state.cluster().await?.id;
        let names = Names {
            slot: point.slot().to_string(),
            ..Names::of(&id, &self.config.replication)
        };
        stream::query(&self.peer, &names, &self.clock).await
    }

    pub(super) async fn set_sequences(
        &self,
        inside: &WriteSession,
        values: &[Sequence],
    ) -> Result<(), ReplicationError> {
        // A holder that was paused, and has lost the lock, finds that out before it sets anything.
        self.state.still_ours(self.lock).await?;
        set_all_as_holder(inside, values, self.lock.token).await
    }

    /// Reads the primary's clock, behind its fence. It is the last question to the primary.
    pub(super) async fn peers_clock(&self) -> Result<DateTime<Utc>, ReplicationError> {
        let peer = self.peer.builder().await?;
        Ok(peer.clock().await?)
    }
}

/// Waits until the local clock is past the newest id. Ids are made of the server's time, and
/// none may be given twice. If the primary answered, its clock shows which ids are of a time in
/// the future, from which no others continue, and how far it may have given ids.
pub(in crate::role) async fn wait_for_clock(
    inside: &WriteSession,
    peer_clock: Option<DateTime<Utc>>,
) -> Result<(), ReplicationError> {
    let until = peer_clock.map(|clock| clock + ID_SLACK);
    let Some(newest) = BuilderDb::of(inside).newest_id(until).await? else {
        return Ok(());
    };
    let clock = inside.clock().await?;
    let wait = (newest - clock).to_std().unwrap_or_default();
    if wait > CLOCK_WAIT {
        return Err(ReplicationError::Precondition {
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

fn unequal(text: String) -> ReplicationError {
    ReplicationError::Precondition {
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
