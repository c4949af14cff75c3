//! Judges the primary's status: may the stream begin, and may it go on?

use crate::cluster::preparation::{Names, why_lost};
use crate::cluster::{PeerCluster, PrimaryStatus, RecoveryPoint, StatusError};
use crate::domain::Lsn;
use crate::observe::Clock;
use crate::replication::baseline::tables::changed_in_form;
use crate::replication::error::ReplicationError;

/// Asks the primary for its status.
pub async fn query(
    peer: &PeerCluster<'_>,
    names: &Names,
    clock: &Clock,
) -> Result<PrimaryStatus, ReplicationError> {
    let status = peer.status(names, || clock.now()).await;
    let status = status.map_err(|error| match error {
        StatusError::Datastore(error) => error.into(),
        StatusError::Sequences(error) => changed_in_form(error.into(), "its sequences"),
    })?;
    status.ok_or_else(ReplicationError::standby)
}

/// Returns an error if the stream would not continue the spare's history, though the primary's
/// history continues it. A server that is asked for a position before its slot's sends the changes
/// that it has, and does not report the ones that it left out.
pub(super) fn check_resumable(
    seen: &PrimaryStatus,
    recorded: &RecoveryPoint,
    point: Lsn,
    database: &str,
) -> Result<(), String> {
    if seen.timeline != recorded.timeline {
        return Err(format!(
            "the primary is on timeline {} instead of {}",
            seen.timeline, recorded.timeline
        ));
    }
    check_intact(seen, recorded, database)?;
    let confirmed = seen.slot.as_ref().and_then(|slot| slot.confirmed);
    match confirmed {
        Some(confirmed) if confirmed <= point => Ok(()),
        Some(confirmed) => Err(format!(
            "slot {} is at {confirmed}, past the spare ({point}): it was created again or moved by hand",
            recorded.slot()
        )),
        None => Err(format!("slot {} has no position", recorded.slot())),
    }
}

/// Checks the conditions that must be true at every moment of following.
pub fn check_intact(
    seen: &PrimaryStatus,
    recorded: &RecoveryPoint,
    database: &str,
) -> Result<(), String> {
    let Some(slot) = &seen.slot else {
        return Err(format!("slot {} is gone", recorded.slot()));
    };
    if slot.plugin != "pgoutput" || slot.database != database {
        return Err(format!(
            "slot {} is of plugin {} on database {}",
            recorded.slot(),
            slot.plugin,
            slot.database
        ));
    }
    if slot.wal_status == "lost" {
        return Err(format!(
            "the primary invalidated slot {}: {}",
            recorded.slot(),
            why_lost(slot.lost_for.as_deref())
        ));
    }
    if let Some(table) = &seen.unpublished {
        return Err(format!("table {table} is not in the publication"));
    }
    if seen.schema != recorded.schema() {
        return Err("the form of the primary's tables has changed".into());
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cluster::{Server, SlotStatus};
    use chrono::Utc;
    use std::collections::BTreeMap;

    /// Returns an answer of a server that was started at this time, with a slot confirmed up to
    /// this position.
    pub(crate) fn seen_at(started: &str, confirmed: Lsn) -> PrimaryStatus {
        PrimaryStatus {
            time: Utc::now(),
            clock_offset_seconds: 0.0,
            wal: Lsn(0x1000),
            system_id: "1".into(),
            timeline: 1,
            server_started: started.into(),
            transactions: String::new(),
            schema: String::new(),
            files: BTreeMap::new(),
            unpublished: None,
            slot: Some(SlotStatus {
                plugin: "pgoutput".into(),
                database: "builder".into(),
                confirmed: Some(confirmed),
                wal_status: "reserved".into(),
                lost_for: None,
                held_bytes: 0,
                unconfirmed_bytes: 0,
                active: false,
            }),
            wal_bound: None,
            oldest_writer: None,
            server: Server {
                version: "15.0".into(),
                tls: false,
            },
            fenced: false,
            sequences: Vec::new(),
        }
    }
}
