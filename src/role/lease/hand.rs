//! The acts of an acting primary on the lease.

use super::boot_time;
use super::decide::HolderAct;
use super::holder::{Fences, Tended, enforce, lift, terms};
use crate::cluster::{FoundObject, LeaseRecord, LeaseStore, Record, StateDb, WroteLease};
use crate::config::Config;
use crate::domain::{Lease, LeaseLine, LeaseState};
use crate::killpoint;
use crate::replication::ReplicationError;
use chrono::Utc;
use std::time::Duration;

/// Pause after a fence that failed: each try ends sessions.
const FENCE_RETRY: Duration = Duration::from_secs(30);

/// The end of one act.
pub(super) enum Done {
    /// The lease is ours for its time.
    Granted,
    Not,
    /// Another cluster has written in the meantime.
    Overtaken,
}

pub(super) struct Hand<'a> {
    pub fences: &'a mut Fences,
    pub config: &'a Config,
    pub store: &'a LeaseStore,
    pub state: &'a StateDb,
    pub record: &'a Record,
}

impl Hand<'_> {
    pub(super) async fn carry_out(
        &mut self,
        act: &HolderAct,
        lease: Option<Lease>,
        at: Option<&FoundObject>,
        tended: &mut Tended,
    ) -> Result<Done, ReplicationError> {
        let line = line(self.config, self.record);
        let terms = terms(self.config);
        let (nonce, now) = (LeaseStore::nonce(), Utc::now());
        match (act, lease) {
            (HolderAct::Doubt(why), lease) => {
                let seen = self.state.lease_record().await?;
                let Some(begins) = self.consented(why, lease, seen, tended).await? else {
                    return Ok(Done::Not);
                };
                let mut first = Lease::first(line, terms, nonce, now);
                (first.series, first.number) = begins;
                tended.told("the lease was overridden by takeover.force_lease".into());
                self.write(first, at, tended).await
            }
            (HolderAct::Create, _) | (_, None) => {
                let first = Lease::first(line, terms, nonce, now);
                self.write(first, at, tended).await
            }
            (HolderAct::Lift, Some(lease)) => {
                let began = boot_time();
                let own = lease.next(nonce, now).held_by(line, terms);
                let done = self.write(own, at, tended).await?;
                // Nothing is lifted before the store has confirmed the lease, nor after its life.
                if matches!(done, Done::Granted) && boot_time() < began + terms.ttl {
                    self.lift(tended).await?;
                }
                Ok(done)
            }
            (HolderAct::Renew | HolderAct::Claim, Some(lease)) => {
                if self.is_replaced().await? {
                    // The other cluster takes the lease, or withdraws its fence.
                    return Ok(Done::Not);
                }
                let mut own = lease.next(nonce, now).held_by(line, terms);
                own.last_lsn = self.state.session().wal_position().await?;
                self.write(own, at, tended).await
            }
            (HolderAct::Answer { epoch, by }, Some(lease)) => {
                self.answer(*epoch, by, lease, at, tended).await
            }
            (HolderAct::GiveWay { epoch, by }, Some(lease)) => {
                self.state.saw_lease(&lease).await?;
                if self.fences.enforced != Some(*epoch) {
                    self.fence(*epoch, by, tended).await?;
                }
                Ok(Done::Not)
            }
            (HolderAct::Wait, Some(lease)) => {
                self.state.saw_lease(&lease).await?;
                // The lease says that this cluster is fenced, so it is.
                if let (LeaseState::Fenced, Some(asker)) = (lease.state, &lease.asked_by)
                    && !self.is_replaced().await?
                {
                    self.fence(asker.epoch, &asker.cluster, tended).await?;
                }
                Ok(Done::Not)
            }
        }
    }

    /// Returns whether another cluster has fenced this one.
    async fn is_replaced(&self) -> Result<bool, ReplicationError> {
        let fence = self.state.fence_record().await?;
        Ok(fence.is_some_and(|fence| fence.by_cluster != self.record.cluster_id))
    }

    /// Fences this cluster for the one that asks, and writes that it is done, or why it cannot be
    /// done.
    async fn answer(
        &mut self,
        epoch: i64,
        by: &str,
        lease: Lease,
        at: Option<&FoundObject>,
        tended: &mut Tended,
    ) -> Result<Done, ReplicationError> {
        if self
            .fences
            .not_before
            .is_some_and(|until| boot_time() < until)
        {
            return Ok(Done::Not);
        }
        self.state.saw_lease(&lease).await?;
        let fenced = self.fence(epoch, by, tended).await;
        let mut answer = lease.next(LeaseStore::nonce(), Utc::now());
        match fenced {
            Ok(()) => {
                answer.state = LeaseState::Fenced;
                answer.reason = String::new();
                answer.last_lsn = self.state.session().wal_position().await?;
            }
            Err(error) => {
                self.fences.not_before = Some(boot_time() + FENCE_RETRY);
                // Half a fence is none.
                lift(self.config, self.state, epoch, by).await?;
                self.state.fences_for(None).await?;
                let why = format!("cannot fence: {error}");
                log::warn!("local: {why}");
                answer.state = LeaseState::Held;
                answer.reason = why.chars().take(500).collect();
                if (lease.state, &lease.reason) == (LeaseState::Held, &answer.reason) {
                    return Ok(Done::Not);
                }
            }
        }
        Ok(match self.write(answer, at, tended).await? {
            // The time of a lease that another cluster asks for is not extended.
            Done::Granted => Done::Not,
            other => other,
        })
    }

    /// Returns series and number of a lease that takes the place of one that is not believed, if an
    /// operator consents. A primary that another cluster has fenced takes its role back first.
    async fn consented(
        &self,
        why: &str,
        lease: Option<Lease>,
        seen: Option<LeaseRecord>,
        tended: &mut Tended,
    ) -> Result<Option<(String, u64)>, ReplicationError> {
        let nonces = [
            lease.as_ref().map(|lease| lease.nonce.clone()),
            seen.as_ref().map(|seen| seen.nonce.clone()),
        ];
        let Some(nonce) = nonces.into_iter().flatten().next() else {
            tended.trouble = Some(why.to_string());
            return Ok(None);
        };
        if self.is_replaced().await? || self.config.takeover.force_lease != nonce {
            tended.trouble = Some(format!(
                "{why}. If this cluster is the only one that takes uploads, takeover.force_lease = \"{nonce}\" makes a new lease"
            ));
            return Ok(None);
        }
        let number = [
            lease.as_ref().map(|lease| lease.number),
            seen.as_ref().map(|seen| seen.number),
        ];
        let number = number.into_iter().flatten().max().unwrap_or_default();
        let series = seen
            .map(|seen| seen.series)
            .or(lease.map(|lease| lease.series));
        Ok(Some((series.unwrap_or_default(), number.saturating_add(1))))
    }

    async fn write(
        &self,
        lease: Lease,
        at: Option<&FoundObject>,
        tended: &mut Tended,
    ) -> Result<Done, ReplicationError> {
        match self.store.write(&lease, at).await? {
            WroteLease::Written(_) => {
                self.state.wrote_lease(&lease).await?;
                tended.lease = Some(lease);
                Ok(Done::Granted)
            }
            WroteLease::Lost => Ok(Done::Overtaken),
        }
    }

    /// Fences this cluster for the one that takes the epoch, and proves the fence. It stays
    /// withdrawable: the takeover may be undone.
    async fn fence(
        &mut self,
        epoch: i64,
        by: &str,
        tended: &mut Tended,
    ) -> Result<(), ReplicationError> {
        let local = &self.config.local.datastore;
        self.state.fences_for(Some(epoch)).await?;
        let before = self.state.fence_record().await?;
        if before.is_none_or(|fence| fence.epoch != epoch || fence.by_cluster != by) {
            tended.told(format!(
                "cluster {by} takes epoch {epoch} by the lease; this cluster fences itself"
            ));
        }
        self.state
            .record_fence(&local.database, epoch, by, false)
            .await?;
        killpoint::reach("lease.fence_recorded");
        enforce(self.config, self.state).await?;
        self.fences.enforced = Some(epoch);
        Ok(())
    }

    /// Lifts the fence that was set for a takeover, which was undone.
    async fn lift(&mut self, tended: &mut Tended) -> Result<(), ReplicationError> {
        let asked = self.state.lease_record().await?;
        let asked = asked.and_then(|seen| seen.fenced_for);
        if let Some(fence) = self.state.fence_record().await?
            && asked == Some(fence.epoch)
            && lift(self.config, self.state, fence.epoch, &fence.by_cluster).await?
        {
            self.fences.enforced = None;
            tended.told(format!(
                "the takeover of epoch {} was undone; its fence was lifted",
                fence.epoch
            ));
        }
        Ok(self.state.fences_for(None).await?)
    }
}

/// Returns the place of this cluster in its line of promotions.
fn line(config: &Config, record: &Record) -> LeaseLine {
    let head = record.lineage.head();
    LeaseLine {
        holder: record.cluster_id.clone(),
        site: config.site.clone(),
        epoch: record.epoch.max(1),
        promotion: head.map(|head| head.id.clone()).unwrap_or_default(),
        parent: head.map(|head| head.parent.clone()).unwrap_or_default(),
    }
}
