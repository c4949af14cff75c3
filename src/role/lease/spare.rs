//! The part of a cluster that is no primary: it looks at the lease, and returns one that a takeover
//! has left behind.

use super::decide::belongs;
use super::holder::{Tended, own};
use crate::cluster::{
    FoundObject, LeaseRecord, LeaseStore, PeerCluster, Record, SeenLease, StateDb, WroteLease,
};
use crate::config::Config;
use crate::domain::{Lease, Role};
use crate::replication::ReplicationError;
use chrono::Utc;

/// Reads the lease, and records it.
pub(super) async fn look(
    config: &Config,
    store: &LeaseStore,
    state: &StateDb,
    tended: &mut Tended,
) -> Result<(), ReplicationError> {
    let read = match config.artifacts.are_detached() {
        true => store.read_at(&PeerCluster::of(config).store()?).await,
        false => store.read().await,
    };
    let (lease, at) = match read {
        Ok(SeenLease::Found(lease, at)) => (*lease, at),
        Ok(SeenLease::Absent) => {
            tended.trouble = Some(format!("there is no lease ({})", store.address()));
            return Ok(());
        }
        Ok(SeenLease::Garbage(why, _)) => {
            tended.trouble = Some(format!("{} is no lease: {why}", store.address()));
            return Ok(());
        }
        Err(error) => {
            tended.trouble = Some(error.to_string());
            return Ok(());
        }
    };
    // After the lease: a takeover is on record before it writes the lease.
    let record = state.own_record().await?;
    let seen = state.lease_record().await?;
    match belongs(&own(&record, seen.as_ref()), &lease) {
        Ok(()) => {
            state.saw_lease(&lease).await?;
            if !config.artifacts.are_detached() {
                let known = (&record, seen.as_ref());
                give_back_leftover(store, state, known, (&lease, &at), tended).await?;
            }
        }
        Err(stranger) => tended.trouble = Some(stranger.to_string()),
    }
    if record.role == Some(Role::Spare) && seen.is_some_and(|seen| seen.fenced_for.is_some()) {
        state.fences_for(None).await?;
    }
    tended.lease = Some(lease);
    Ok(())
}

/// Gives a lease back that this spare holds or asks for although no takeover is under way: a write
/// that had no answer may have come late. Only that very object is replaced, so a takeover that
/// begins in the meantime loses nothing.
async fn give_back_leftover(
    store: &LeaseStore,
    state: &StateDb,
    (record, seen): (&Record, Option<&LeaseRecord>),
    (lease, at): (&Lease, &FoundObject),
    tended: &mut Tended,
) -> Result<(), ReplicationError> {
    if record.role != Some(Role::Spare) || record.handover.is_some() {
        return Ok(());
    }
    let us = record.cluster_id.as_str();
    let asks = lease
        .asked_by
        .as_ref()
        .is_some_and(|asker| asker.cluster == us);
    let line = match (lease.line.holder == us, &lease.former) {
        (true, Some(former)) if lease.line.epoch > record.epoch => former.clone(),
        (false, _) if asks => lease.line.clone(),
        _ => {
            if seen.is_some_and(|seen| seen.touched) {
                state.touches_lease(false).await?;
            }
            return Ok(());
        }
    };
    let back = lease.given_back(line, LeaseStore::nonce(), Utc::now());
    if let WroteLease::Written(_) = store.write(&back, Some(at)).await? {
        state.saw_lease(&back).await?;
        state.touches_lease(false).await?;
        tended.told(
            "the lease said that this spare takes over, and no takeover is under way: it was given back".into(),
        );
    }
    Ok(())
}
