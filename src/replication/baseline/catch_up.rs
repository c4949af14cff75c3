//! Joins the copy and the stream without a gap and without overlap. The copy is made at the
//! snapshot with which a temporary slot begins, a permanent slot is copied from that slot, and its
//! changes are applied into the incoming database until few are left. A server on which no slot may
//! be copied gets the permanent slot at the beginning.

use super::copy::Baseline;
use crate::cluster::preparation::Names;
use crate::cluster::{
    DatastoreFault, NewSlot, PeerCluster, RecoveryPoint, Snapshot, WalSession, WriteSession,
};
use crate::config::Mode;
use crate::domain::Lsn;
use crate::killpoint;
use crate::observe::{Clock, Phase};
use crate::replication::artifact::round::Round;
use crate::replication::error::ReplicationError;
use crate::replication::fuse::Shrinkage;
use crate::replication::mode::select;
use crate::replication::stream::{self, Follow, Followed, Gap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Maximum time to make a slot, which waits for every open writing transaction.
const SLOT_TIMEOUT: Duration = Duration::from_secs(15);
/// Duration of a round: a shorter one means that the copy has caught up.
const CATCH_UP_ROUND_TARGET: Duration = Duration::from_secs(3);
const MAX_ROUNDS: usize = 20;
/// Bytes of log that may be left. Written log is sent only when it is flushed and a whole record:
/// an idle primary may take ten seconds for the rest.
const CATCH_UP_SLACK_BYTES: u64 = 64 * 1024;

/// A slot that ends with its session, unless it is copied.
pub(crate) struct BeginningSlot {
    /// None: the permanent slot has replaced it.
    session: Option<WalSession>,
    /// None: it is the permanent slot itself.
    temporary: Option<String>,
    new: NewSlot,
    names: Names,
}

impl BeginningSlot {
    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.new.snapshot
    }

    pub(crate) fn from(&self) -> Lsn {
        self.new.consistent_point
    }

    pub(crate) fn name(&self) -> &str {
        &self.names.slot
    }

    pub(crate) fn publication(&self) -> &str {
        &self.names.publication
    }

    /// Releases the snapshot, because the rows are copied and nobody reads by it any more. The
    /// server would keep it, with every row deleted since, until the session's next command.
    pub(crate) async fn let_snapshot_go(&mut self) -> Result<(), ReplicationError> {
        if let Some(session) = &mut self.session {
            session.release_snapshot().await?;
        }
        Ok(())
    }

    /// Makes the slot permanent. Any earlier slot of ours cannot continue this copy. The temporary
    /// slot ends with its session.
    async fn keep(&mut self) -> Result<(), ReplicationError> {
        let Some(mut session) = self.session.take() else {
            return Ok(());
        };
        killpoint::reach("slot.before_copy");
        // A slot that a database administrator made exists already, and we never drop it.
        if self.names.slot_is_premade {
            return Ok(());
        }
        if let Some(temporary) = &self.temporary {
            session.keep_slot(temporary, &self.names.slot).await?;
        }
        killpoint::reach("slot.after_copy");
        Ok(())
    }
}

impl Baseline<'_> {
    /// Begins a slot. Some: the copy is made so that the stream can continue it.
    pub(in crate::replication) async fn begin_slot(
        &self,
    ) -> Result<Option<BeginningSlot>, ReplicationError> {
        let Some(names) = self.facts.chosen.stream.clone() else {
            return Ok(None);
        };
        self.work.progress.begin(Phase::Snapshot, 0);
        let config = self.work.config;
        let peer = PeerCluster::of(config);
        select::extend(&peer, &self.facts.chosen.extension).await?;
        let mut session = peer.replication().await?;
        // The working lock is ours, so no other process makes or keeps a slot of ours.
        let temporary = self.temporary_name(&mut session).await?;
        let is_temporary = self.facts.chosen.copies_slots || names.slot_is_premade;
        let temporary = is_temporary.then_some(temporary);
        let made = match &temporary {
            Some(temporary) => session.temporary_slot(temporary, SLOT_TIMEOUT).await,
            None => {
                // A copy that fails from here on drops it again.
                self.kept.store(true, Ordering::Relaxed);
                session.lasting_slot(&names.slot, SLOT_TIMEOUT).await
            }
        };
        let new = match made {
            Err(error) if error.fault == DatastoreFault::Unreachable => {
                let busy = self.busy().await.unwrap_or(error.into());
                if !self.may_do_without_slot().await? {
                    return Err(busy);
                }
                log::warn!("{busy}; the first copy is made at a snapshot, without a slot");
                return Ok(None);
            }
            made => made?,
        };
        Ok(Some(BeginningSlot {
            session: Some(session),
            temporary,
            new,
            names,
        }))
    }

    /// Returns whether a copy without a slot is allowed: a spare without any copy gets one, and the
    /// next copy is made for the stream.
    async fn may_do_without_slot(&self) -> Result<bool, ReplicationError> {
        let auto = self.work.config.replication.mode == Mode::Auto;
        Ok(auto && self.work.state.recovery_point().await?.is_none())
    }

    /// Returns a name that no other try has used. Sessions that still make or keep a slot of ours
    /// belong to a process that is gone, because we hold the working lock; the server would wait
    /// for their transactions as for any other.
    async fn temporary_name(&self, session: &mut WalSession) -> Result<String, ReplicationError> {
        static TRY: AtomicU64 = AtomicU64::new(1);
        let id = self.work.state.cluster().await?.id;
        let ours = format!("{}_", Names::of_cluster(&id).slot);
        session.end_temporary_slots(&ours).await?;
        let number = TRY.fetch_add(1, Ordering::Relaxed);
        Ok(format!("{ours}{}_{number}", self.work.lock.token))
    }

    /// Drops the slot of a failed copy, as a best effort.
    pub(in crate::replication) async fn give_up_slot(&self) {
        let Some(names) = &self.facts.chosen.stream else {
            return;
        };
        let peer = PeerCluster::of(self.work.config);
        let holder = (self.work.state, self.work.lock);
        if self.kept.load(Ordering::Relaxed)
            && let Err(error) = stream::drop_our_slot(&peer, holder, &names.id, &names.slot).await
        {
            log::debug!("{error}");
        }
    }

    /// Returns the transaction that the slot waited for, if that was the reason. A user without the
    /// right to see them sees no transactions of others.
    async fn busy(&self) -> Option<ReplicationError> {
        let session = PeerCluster::of(self.work.config).builder().await.ok()?;
        let waits_for = session.oldest_writer().await.ok()??;
        Some(ReplicationError::Busy {
            what: "a slot could not be made".into(),
            seconds: SLOT_TIMEOUT.as_secs(),
            waits_for,
        })
    }

    /// Applies the transactions committed since the snapshot into the incoming database.
    pub(in crate::replication) async fn catch_up(
        &self,
        slot: &mut BeginningSlot,
        incoming: &str,
        point: &mut RecoveryPoint,
    ) -> Result<Followed, ReplicationError> {
        self.work.progress.begin(Phase::CatchUp, 0);
        slot.keep().await?;
        self.kept
            .store(!slot.names.slot_is_premade, Ordering::Relaxed);
        killpoint::reach("catch_up.begin");
        let work = self.work;
        let mut all: Option<Followed> = None;
        for _ in 0..MAX_ROUNDS {
            let begun = Instant::now();
            let clock = Clock::real();
            let names = &slot.names;
            let seen = stream::query(&PeerCluster::of(work.config), names, &clock).await?;
            let follow = Follow {
                database: incoming,
                incoming: true,
                until: Some(Lsn(seen.wal.0.saturating_sub(CATCH_UP_SLACK_BYTES))),
                ..Follow::new(work.to_follow(&self.spool), names.clone(), point.clone())
            };
            let mut followed = stream::follow(&follow).await.map_err(not_met)?;
            if let Some(mut earlier) = all.take() {
                followed.absorb(&mut earlier);
            }
            all = Some(followed);
            if begun.elapsed() < CATCH_UP_ROUND_TARGET {
                break;
            }
        }
        // The loop has run at least once.
        let followed =
            all.ok_or_else(|| not_met(Gap::Decoding("no transaction was followed".into())))?;
        point.lsn = followed.point.lsn.to_string();
        point.commit_time = followed.point.commit_time;
        Ok(followed)
    }

    /// Adds the changes since the rows were copied to the copy.
    pub(in crate::replication) async fn absorb(
        &self,
        mut caught: Followed,
        inside: &WriteSession,
        round: &mut Round,
        shrinkage: &mut Shrinkage,
    ) -> Result<(), ReplicationError> {
        let inventory = self.work.inventory;
        inventory.load_wanted_from(inside).await?;
        shrinkage.packages = inventory.vanishing().await?;
        shrinkage.artifacts_before = inventory.wanted().await?;
        shrinkage.artifacts.append(&mut caught.shrinkage.artifacts);
        round
            .staged
            .retain(|swap| !caught.swaps.iter().any(|later| later.key == swap.key));
        round.staged.append(&mut caught.swaps);
        let wanted = inventory.named(&round.staged).await?;
        round.staged.retain(|swap| wanted.contains(&swap.key));
        Ok(())
    }
}

impl Followed {
    fn absorb(&mut self, earlier: &mut Followed) {
        let later = std::mem::take(&mut self.swaps);
        self.swaps = std::mem::take(&mut earlier.swaps);
        self.swaps
            .retain(|swap| !later.iter().any(|other| other.key == swap.key));
        self.swaps.extend(later);
        let earlier = &mut earlier.shrinkage.artifacts;
        self.shrinkage.artifacts.append(earlier);
    }
}

/// Returns the error for a copy that the stream cannot continue: the next copy starts from the
/// beginning.
fn not_met(gap: Gap) -> ReplicationError {
    match gap.failure() {
        Ok(error) => error,
        Err(gap) => ReplicationError::NotMet {
            text: gap.to_string(),
        },
    }
}
