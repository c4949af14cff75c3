//! The acting primary's part: renews the lease, answers a question by its fence, and gives way.

use super::decide::{HolderAct, Own, holder_act};
use super::hand::{Done, Hand};
use super::spare;
use super::{FENCE_BOUND, boot_time};
use crate::cluster::{
    LeaseRecord, LeaseStore, LocalCluster, PeerCluster, Record, SeenLease, StateDb,
    end_sessions_from_before, raise_fence,
};
use crate::config::Config;
use crate::domain::{Isolated, Lease, LeaseTerms, Role, Side};
use crate::replication::ReplicationError;
use std::time::Duration;

/// Number of looks at a lease that another cluster writes at the same moment.
const TRIES: usize = 4;

/// The facts that an acting primary remembers between two looks at the lease.
#[derive(Debug, Default)]
pub struct Holder {
    /// Time since the start of the machine until which the lease is ours. None: this process was
    /// never granted it.
    permit: Option<Duration>,
    /// Number of looks of this process that were granted nothing.
    refused: u32,
    fences: Fences,
    /// True: the store was seen to honour the conditions of writes.
    store_is_proved: bool,
}

/// The fences that this process has set.
#[derive(Debug, Default)]
pub(super) struct Fences {
    /// Epoch of the fence that this process has enforced. A killed process may have recorded one
    /// and ended no session.
    pub enforced: Option<i64>,
    /// Time since the start of the machine before which no failed fence is tried again.
    pub not_before: Option<Duration>,
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
    /// True: a statement was given up, so the session must not be used again.
    pub is_cut: bool,
}

impl Tended {
    pub(super) fn told(&mut self, text: String) {
        log::warn!("local: {text}");
        self.acts.push(text);
    }
}

/// The result of a look of the acting primary.
enum Looked {
    Granted,
    /// Another cluster asks for the lease, or has it.
    Refused,
    /// The lease is not believed, or its store does not answer.
    Doubted,
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
            spare::look(config, &store, state, &mut tended).await?;
            return Ok(tended);
        }
        let promised = promise(state).await?;
        if promised.is_some() && self.permit.is_some() && !self.is_permitted() {
            // The fence comes first, whatever the store does.
            self.keep_promise(config, state, &mut tended).await?;
        }
        let began = boot_time();
        let left = self.permit.map(|until| until.saturating_sub(began));
        let left = left.filter(|left| promised.is_some() && !left.is_zero());
        let acting = Box::pin(self.act(config, &store, state, &record, &mut tended));
        let looked = match left {
            None => acting.await,
            Some(left) => match tokio::time::timeout(left, acting).await {
                Ok(looked) => looked,
                Err(_) => return self.end_of_permit(config, tended).await,
            },
        };
        let looked = match looked {
            Err(ReplicationError::Store(error)) => {
                tended.trouble = Some(error.to_string());
                Looked::Doubted
            }
            looked => looked?,
        };
        match (looked, promised) {
            (Looked::Granted, _) => self.permit = Some(began + config.artifacts.lease.ttl),
            // A spare that has begun no takeover takes none within this time.
            (Looked::Doubted, Some(ttl)) if spare_waits(config, &record, ttl).await => {
                self.permit = Some(began + ttl);
            }
            _ => self.refused = self.refused.saturating_add(1),
        }
        tended.permitted = Some(self.is_permitted());
        self.keep_promise(config, state, &mut tended).await?;
        Ok(tended)
    }

    /// Keeps the promise although the look is not over: its session may be within a transaction.
    async fn end_of_permit(
        &mut self,
        config: &Config,
        mut tended: Tended,
    ) -> Result<Tended, ReplicationError> {
        tended.is_cut = true;
        tended.permitted = Some(false);
        tended.trouble = Some("the lease was not renewed in its time".into());
        let state = LocalCluster::of(config).state().await?;
        self.keep_promise(config, &state, &mut tended).await?;
        Ok(tended)
    }

    fn is_permitted(&self) -> bool {
        self.permit.is_some_and(|until| boot_time() < until)
    }

    /// Lifts the fence that this cluster has set by its own promise, because `artifacts.mode` is
    /// another one now. Others may rely on the promise, so an operator must consent. Returns the
    /// reason why the fence stays; None: there is none any more.
    pub async fn lift_own_fence(
        config: &Config,
        state: &StateDb,
    ) -> Result<Option<String>, ReplicationError> {
        let id = state.cluster().await?.id;
        let fence = state.fence_record().await?;
        let Some(fence) = fence.filter(|fence| fence.by_cluster == id && !fence.settled) else {
            return Ok(None);
        };
        let seen = state.lease_record().await?;
        let nonce = seen.map(|seen| seen.nonce).unwrap_or_default();
        if config.takeover.force_lease != nonce {
            return Ok(Some(format!(
                "this cluster has fenced itself because it could not renew the lease, and artifacts.mode is not shared any more. If no other cluster takes uploads, takeover.force_lease = \"{nonce}\" lifts the fence"
            )));
        }
        lift(config, state, fence.epoch, &id).await?;
        Ok(None)
    }

    /// Returns the time until the next look.
    pub fn pause(&self, config: &Config) -> Duration {
        let third = config.artifacts.lease.ttl / 3;
        let left = self.permit.map(|until| until.saturating_sub(boot_time()));
        left.filter(|left| !left.is_zero())
            .map_or(third, |left| third.min(left))
    }

    /// Returns whether the lease was granted by this look.
    async fn act(
        &mut self,
        config: &Config,
        store: &LeaseStore,
        state: &StateDb,
        record: &Record,
        tended: &mut Tended,
    ) -> Result<Looked, ReplicationError> {
        if !self.store_is_proved {
            if let Some(broken) = store.broken_conditions().await? {
                tended.trouble = Some(format!(
                    "the store of the lease does not honour conditional writes: {broken}; set artifacts.lease to a store that does"
                ));
                return Ok(Looked::Doubted);
            }
            self.store_is_proved = true;
        }
        let began = boot_time();
        let mut tries = 0;
        while tries < TRIES && boot_time().saturating_sub(began) < config.artifacts.lease.ttl / 3 {
            tries += 1;
            let (lease, at, garbage) = match store.read().await? {
                SeenLease::Absent => (None, None, None),
                SeenLease::Found(lease, at) => (Some(*lease), Some(at), None),
                SeenLease::Garbage(why, at) => {
                    let why = format!("{} is no lease: {why}", store.address());
                    (None, Some(at), Some(why))
                }
            };
            tended.lease.clone_from(&lease);
            let seen = state.lease_record().await?;
            let own = own(record, seen.as_ref());
            let act = match garbage {
                Some(why) => HolderAct::Doubt(why),
                None => holder_act(&own, lease.as_ref()),
            };
            let mut hand = Hand {
                fences: &mut self.fences,
                config,
                store,
                state,
                record,
            };
            match hand.carry_out(&act, lease, at.as_ref(), tended).await? {
                Done::Granted => return Ok(Looked::Granted),
                Done::Not if matches!(act, HolderAct::Doubt(_)) => return Ok(Looked::Doubted),
                Done::Not => return Ok(Looked::Refused),
                Done::Overtaken => {}
            }
        }
        tended.trouble = Some("the lease is written by others all the time".into());
        Ok(Looked::Refused)
    }

    /// Fences this cluster if it promised so and is granted the lease no more, and lifts that fence
    /// when it is granted again. A fence for another cluster is enforced if a killed process had
    /// only recorded it.
    async fn keep_promise(
        &mut self,
        config: &Config,
        state: &StateDb,
        tended: &mut Tended,
    ) -> Result<(), ReplicationError> {
        let permitted = self.is_permitted();
        let known = state.lease_record().await?;
        let promised = known.as_ref().and_then(|known| known.promised).is_some();
        let fenced_for = known.and_then(|known| known.fenced_for);
        let id = state.cluster().await?.id;
        match state.fence_record().await? {
            Some(fence) if fence.by_cluster == id && !fence.settled && permitted => {
                lift(config, state, fence.epoch, &id).await?;
                tended.told("the lease is granted again; the own fence was lifted".into());
            }
            Some(fence) => {
                let is_ours = fence.by_cluster == id || fenced_for == Some(fence.epoch);
                let is_new = self.fences.enforced != Some(fence.epoch);
                if is_ours && is_new && !fence.settled {
                    enforce(config, state).await?;
                    self.fences.enforced = Some(fence.epoch);
                }
            }
            // One lost answer at the start of this process is no reason.
            None if promised && !permitted && (self.permit.is_some() || self.refused > 1) => {
                self.fences.enforced = None;
                let database = &config.local.datastore.database;
                if let Some(epoch) = state.record_own_fence(database).await? {
                    tended.told(
                        "the lease could not be renewed in its time, and the lease says artifacts.isolated = \"fence\": this cluster fences itself".into(),
                    );
                    enforce(config, state).await?;
                    self.fences.enforced = Some(epoch);
                }
            }
            None => {}
        }
        Ok(())
    }
}

/// Returns the life of the last lease that promises, in this cluster's name, that it fences itself.
async fn promise(state: &StateDb) -> Result<Option<Duration>, ReplicationError> {
    let known = state.lease_record().await?;
    Ok(known.and_then(|known| known.promised))
}

/// Withdraws a fence, and ends the sessions that began under it. False: there is no such fence, or
/// it is final.
pub(super) async fn lift(
    config: &Config,
    state: &StateDb,
    epoch: i64,
    by: &str,
) -> Result<bool, ReplicationError> {
    let database = &config.local.datastore.database;
    let lifted = state.withdraw_fence(database, epoch, by).await?;
    if lifted {
        let waived = end_sessions_from_before(state.session(), database).await?;
        state.note_waived(Side::Local, &waived, database).await?;
    }
    Ok(lifted)
}

/// Enforces and proves the fence that is recorded. It names the sessions of a provider that stay.
pub(super) async fn enforce(config: &Config, state: &StateDb) -> Result<(), ReplicationError> {
    let local = &config.local.datastore;
    let waived = raise_fence(state.session(), local, &local.database).await?;
    Ok(state
        .note_waived(Side::Local, &waived, &local.database)
        .await?)
}

/// Returns whether the spare of this cluster answers, and has begun no takeover.
async fn spare_waits(config: &Config, own: &Record, ttl: Duration) -> bool {
    let limit = ttl / 6;
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
