//! The acting primary's part: renews the lease, answers a question by its fence, and gives way.

use super::decide::{HolderAct, Own, holder_act};
use super::{FENCE_BOUND, boot_time};
use crate::cluster::{
    FoundObject, LeaseRecord, LeaseStore, LocalCluster, PeerCluster, Record, SeenLease, StateDb,
    WroteLease, end_sessions_from_before, raise_fence,
};
use crate::config::Config;
use crate::domain::{Isolated, Lease, LeaseLine, LeaseState, LeaseTerms, Role, Side};
use crate::replication::ReplicationError;
use chrono::Utc;
use std::time::Duration;

/// Number of looks at a lease that another cluster writes at the same moment.
const TRIES: usize = 4;

/// What an acting primary remembers between two looks at the lease.
#[derive(Debug, Default)]
pub struct Holder {
    /// Time since the start of the machine until which the lease is ours. None: this process was
    /// never granted it.
    permit: Option<Duration>,
    /// Number of looks since the start of this process that were granted nothing, until the first
    /// one that was.
    refused: u32,
    /// Epoch of the fence that this process has set or enforced. A killed process may have recorded
    /// one and ended no session.
    enforced: Option<i64>,
    /// True: the store was seen to honour the conditions of writes.
    store_is_proved: bool,
}

/// The lease after a look at it.
#[derive(Debug, Clone, Default)]
pub struct Tended {
    pub lease: Option<Lease>,
    /// Why the lease cannot be read, written or believed.
    pub trouble: Option<String>,
    /// True: the lease grants this cluster live traffic now. None: it is not the primary.
    pub permitted: Option<bool>,
    /// Acts for the history.
    pub acts: Vec<String>,
}

impl Tended {
    fn told(&mut self, text: String) {
        log::warn!("local: {text}");
        self.acts.push(text);
    }
}

impl Holder {
    /// Looks at the lease once, and does what the rules demand. The session of `state` must be the
    /// caller's own, because it gets transactions.
    pub async fn tend(
        &mut self,
        config: &Config,
        state: &StateDb,
    ) -> Result<Tended, ReplicationError> {
        let mut tended = Tended::default();
        let Some(store) = LocalCluster::of(config).lease_store()? else {
            return Ok(tended);
        };
        let record = state.own_record().await?;
        if record.role != Some(Role::Primary) {
            look(config, &store, state, &mut tended).await?;
            return Ok(tended);
        }
        let began = boot_time();
        let ttl = config.artifacts.lease.ttl;
        match self.act(config, &store, state, &record, &mut tended).await {
            Ok(true) => self.permit = Some(began + ttl),
            Ok(false) => self.refused += 1,
            Err(ReplicationError::Store(error)) => {
                tended.trouble = Some(error.to_string());
                self.refused += 1;
                // A spare that has begun no takeover takes none within this time.
                if config.artifacts.lease.fences_isolated && spare_waits(config, &record).await {
                    self.permit = Some(began + ttl);
                }
            }
            Err(error) => return Err(error),
        }
        let permitted = self.permit.is_some_and(|until| boot_time() < until);
        tended.permitted = Some(permitted);
        self.keep_promise(config, state, permitted, &mut tended)
            .await?;
        Ok(tended)
    }

    /// Returns the time until the next look.
    pub fn pause(&self, config: &Config) -> Duration {
        let third = config.artifacts.lease.ttl / 3;
        let left = self.permit.map(|until| until.saturating_sub(boot_time()));
        left.map_or(third, |left| third.min(left))
            .max(Duration::from_millis(100))
    }

    /// Returns whether the lease was granted by this look.
    async fn act(
        &mut self,
        config: &Config,
        store: &LeaseStore,
        state: &StateDb,
        record: &Record,
        tended: &mut Tended,
    ) -> Result<bool, ReplicationError> {
        if !self.store_is_proved {
            if let Some(broken) = store.broken_conditions().await? {
                tended.trouble = Some(format!(
                    "the store of the lease does not honour conditional writes: {broken}; set artifacts.lease to a store that does"
                ));
                return Ok(false);
            }
            self.store_is_proved = true;
        }
        let began = boot_time();
        let mut tries = 0;
        // The promise is looked at in time, whatever the store does.
        while tries < TRIES && boot_time().saturating_sub(began) < config.artifacts.lease.ttl / 3 {
            tries += 1;
            let (lease, at) = match store.read().await? {
                SeenLease::Absent => (None, None),
                SeenLease::Found(lease, at) => (Some(*lease), Some(at)),
                SeenLease::Garbage(why, _) => {
                    tended.trouble = Some(format!("{} is no lease: {why}", store.address()));
                    return Ok(false);
                }
            };
            tended.lease.clone_from(&lease);
            let seen = state.lease_record().await?;
            let own = own(record, seen.as_ref());
            let act = holder_act(&own, lease.as_ref());
            let mut hand = Hand {
                enforced: &mut self.enforced,
                config,
                store,
                state,
                record,
            };
            match hand.carry_out(&act, lease, at.as_ref(), tended).await? {
                Done::Granted => return Ok(true),
                Done::Not => return Ok(false),
                Done::Overtaken => {}
            }
        }
        tended.trouble = Some("the lease is written by others all the time".into());
        Ok(false)
    }

    /// Fences this cluster if it promised so and is granted the lease no more, and lifts that fence
    /// when it is granted again.
    async fn keep_promise(
        &mut self,
        config: &Config,
        state: &StateDb,
        permitted: bool,
        tended: &mut Tended,
    ) -> Result<(), ReplicationError> {
        let local = &config.local.datastore;
        let promised = config.artifacts.lease.fences_isolated;
        let fence = state.fence_record().await?;
        let id = state.cluster().await?.id;
        match &fence {
            Some(fence) if fence.by_cluster != id || fence.settled => {}
            Some(fence) if permitted || !promised => {
                state
                    .withdraw_fence(&local.database, fence.epoch, &id)
                    .await?;
                let waived = end_sessions_from_before(state.session(), &local.database).await?;
                state
                    .note_waived(Side::Local, &waived, &local.database)
                    .await?;
                tended.told("the lease is granted again; the own fence was lifted".into());
            }
            Some(fence) if self.enforced != Some(fence.epoch) => {
                enforce(config, state).await?;
                self.enforced = Some(fence.epoch);
            }
            // One lost answer at the start of this process is no reason.
            None if !permitted && promised && (self.permit.is_some() || self.refused > 1) => {
                self.fence_alone(config, state, tended).await?;
            }
            _ => {}
        }
        Ok(())
    }

    async fn fence_alone(
        &mut self,
        config: &Config,
        state: &StateDb,
        tended: &mut Tended,
    ) -> Result<(), ReplicationError> {
        let local = &config.local.datastore;
        self.enforced = None;
        if let Some(epoch) = state.record_own_fence(&local.database).await? {
            tended.told(
                "the lease could not be renewed in its time, and artifacts.isolated is fence: this cluster fences itself".into(),
            );
            enforce(config, state).await?;
            self.enforced = Some(epoch);
        }
        Ok(())
    }
}

/// Enforces and proves the fence that is recorded. It names the sessions of a provider that stay.
async fn enforce(config: &Config, state: &StateDb) -> Result<(), ReplicationError> {
    let local = &config.local.datastore;
    let waived = raise_fence(state.session(), local, &local.database).await?;
    Ok(state
        .note_waived(Side::Local, &waived, &local.database)
        .await?)
}

/// Reads the lease on a cluster that is no primary, and records it.
async fn look(
    config: &Config,
    store: &LeaseStore,
    state: &StateDb,
    tended: &mut Tended,
) -> Result<(), ReplicationError> {
    let read = match config.artifacts.are_detached() {
        true => store.read_at(&PeerCluster::of(config).store()?).await,
        false => store.read().await,
    };
    match read {
        Ok(SeenLease::Found(lease, _)) => {
            let record = state.own_record().await?;
            let seen = state.lease_record().await?;
            match super::decide::belongs(&own(&record, seen.as_ref()), &lease) {
                Ok(()) => state.saw_lease(&lease).await?,
                Err(stranger) => tended.trouble = Some(stranger.to_string()),
            }
            if seen.is_some_and(|seen| seen.fenced_for.is_some()) {
                state.fences_for(None).await?;
            }
            tended.lease = Some(*lease);
        }
        Ok(SeenLease::Absent) => {
            tended.trouble = Some(format!("there is no lease ({})", store.address()));
        }
        Ok(SeenLease::Garbage(why, _)) => {
            tended.trouble = Some(format!("{} is no lease: {why}", store.address()));
        }
        Err(error) => tended.trouble = Some(error.to_string()),
    }
    Ok(())
}

/// Returns whether the spare of this cluster answers, and has begun no takeover.
async fn spare_waits(config: &Config, own: &Record) -> bool {
    let limit = config.artifacts.lease.ttl / 6;
    let asked = tokio::time::timeout(limit, async {
        PeerCluster::of(config).record().await.ok().flatten()
    });
    let Ok(Some(peer)) = asked.await else {
        return false;
    };
    peer.role == Some(Role::Spare)
        && peer.copied_from.as_deref() == Some(own.system_id.as_str())
        && peer.handover.is_none()
}

pub(super) fn own<'a>(record: &'a Record, seen: Option<&'a LeaseRecord>) -> Own<'a> {
    Own {
        cluster: &record.cluster_id,
        epoch: record.epoch,
        lineage: &record.lineage,
        seen,
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

/// Returns the terms of this cluster as a holder.
pub(super) fn terms(config: &Config) -> LeaseTerms {
    let plan = &config.artifacts.lease;
    LeaseTerms {
        ttl: plan.ttl,
        fence_bound: FENCE_BOUND,
        isolated: match plan.fences_isolated {
            true => Isolated::Fence,
            false => Isolated::GoOn,
        },
    }
}

/// The end of one act.
enum Done {
    /// The lease is ours for its time.
    Granted,
    Not,
    /// Another cluster has written in the meantime.
    Overtaken,
}

struct Hand<'a> {
    enforced: &'a mut Option<i64>,
    config: &'a Config,
    store: &'a LeaseStore,
    state: &'a StateDb,
    record: &'a Record,
}

impl Hand<'_> {
    async fn carry_out(
        &mut self,
        act: &HolderAct,
        lease: Option<Lease>,
        at: Option<&FoundObject>,
        tended: &mut Tended,
    ) -> Result<Done, ReplicationError> {
        let database = &self.config.local.datastore.database;
        let line = line(self.config, self.record);
        let terms = terms(self.config);
        let (nonce, now) = (LeaseStore::nonce(), Utc::now());
        match (act, lease) {
            (HolderAct::Doubt(why), _) => {
                tended.trouble = Some(why.clone());
                Ok(Done::Not)
            }
            (HolderAct::Create, _) | (_, None) => {
                let first = Lease::first(line, terms, nonce, now);
                self.write(first, at, tended).await
            }
            (HolderAct::Lift, Some(lease)) => {
                self.lift(tended).await?;
                let own = lease.next(nonce, now).held_by(line, terms);
                self.write(own, at, tended).await
            }
            (HolderAct::Renew | HolderAct::Claim, Some(lease)) => {
                let mut own = lease.next(nonce, now).held_by(line, terms);
                own.last_lsn = self.state.session().wal_position().await?;
                self.write(own, at, tended).await
            }
            (HolderAct::Answer { epoch, by }, Some(lease)) => {
                self.state.saw_lease(&lease).await?;
                let fenced = self.fence(*epoch, by, tended).await;
                let mut answer = lease.next(nonce, now);
                match fenced {
                    Ok(()) => {
                        answer.state = LeaseState::Fenced;
                        answer.reason = String::new();
                        answer.last_lsn = self.state.session().wal_position().await?;
                    }
                    Err(error) => {
                        let why = format!("cannot fence: {error}");
                        log::warn!("local: {why}");
                        answer.state = LeaseState::Held;
                        answer.reason = why.chars().take(500).collect();
                    }
                }
                Ok(match self.write(answer, at, tended).await? {
                    // The time of a lease that another cluster asks for is not extended.
                    Done::Granted => Done::Not,
                    other => other,
                })
            }
            (HolderAct::GiveWay { epoch, by }, Some(lease)) => {
                self.state.saw_lease(&lease).await?;
                let fence = self.state.fence_record().await?;
                // Its fence may be set by the other cluster through the datastore.
                let is_fenced =
                    fence.is_some_and(|fence| fence.epoch == *epoch && fence.by_cluster == *by);
                if !is_fenced {
                    self.fence(*epoch, by, tended).await?;
                }
                Ok(Done::Not)
            }
            (HolderAct::Wait, Some(lease)) => {
                self.state.saw_lease(&lease).await?;
                log::debug!("local: {database} is fenced, and the lease waits for its next holder");
                Ok(Done::Not)
            }
        }
    }

    async fn write(
        &self,
        lease: Lease,
        at: Option<&FoundObject>,
        tended: &mut Tended,
    ) -> Result<Done, ReplicationError> {
        match self.store.write(&lease, at).await? {
            WroteLease::Written(_) => {
                self.state.saw_lease(&lease).await?;
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
        enforce(self.config, self.state).await?;
        *self.enforced = Some(epoch);
        Ok(())
    }

    /// Lifts the fence that was set for a takeover, which was undone.
    async fn lift(&self, tended: &mut Tended) -> Result<(), ReplicationError> {
        let database = &self.config.local.datastore.database;
        let asked = self.state.lease_record().await?;
        let asked = asked.and_then(|seen| seen.fenced_for);
        if let Some(fence) = self.state.fence_record().await?
            && asked == Some(fence.epoch)
            && self
                .state
                .withdraw_fence(database, fence.epoch, &fence.by_cluster)
                .await?
        {
            let waived = end_sessions_from_before(self.state.session(), database).await?;
            self.state
                .note_waived(Side::Local, &waived, database)
                .await?;
            tended.told(format!(
                "the takeover of epoch {} was undone; its fence was lifted",
                fence.epoch
            ));
        }
        Ok(self.state.fences_for(None).await?)
    }
}
