//! Asks whether the primary has committed anything since the recovery point, without reading a row.

use super::baseline::sequences::sequences;
use super::error::ReplicationError;
use crate::cluster::{
    Confirmation, DatastoreError, LocalCluster, PeerCluster, ReadSession, RecoveryPoint, Sequence,
    Server, SpareDb, SqlState,
};
use crate::config::Config;
use crate::domain::{Lsn, Side};
use crate::observe::Clock;
use chrono::{DateTime, Utc};

/// The primary's answer.
#[derive(Debug, Clone)]
pub struct ChangeProbe {
    /// Time by the primary's clock, just before it read its transactions: the answer is valid for
    /// this time.
    pub time: DateTime<Utc>,
    /// Seconds by which the primary's clock is ahead of ours, as exactly as one question and answer
    /// can show.
    pub clock_offset_seconds: f64,
    /// The reason why the primary may have changed since the recovery point; None: it has not
    /// changed.
    pub changed: Option<&'static str>,
    /// True: the visible database is not the one that was copied here, or there is none.
    pub unknown_database: bool,
    /// Bytes of write-ahead log written since the recovery point. None: there is no recovery point
    /// here, or it is of another server.
    pub lag_bytes: Option<u64>,
    pub server: Server,
    /// True: its database is read-only, as a spare's is.
    pub fenced: bool,
}

impl ChangeProbe {
    /// Returns the confirmation that may be recorded if no change waits.
    pub fn confirmation(&self) -> Confirmation {
        Confirmation {
            time: self.time,
            clock_offset_seconds: self.clock_offset_seconds,
        }
    }
}

/// Asks the primary, for a spare at `point`. A visible database that is not at that point counts as
/// a change.
pub async fn probe(
    config: &Config,
    point: Option<&RecoveryPoint>,
    clock: &Clock,
) -> Result<ChangeProbe, ReplicationError> {
    let ours = match point {
        Some(point) => is_at(config, point).await?,
        None => false,
    };
    let peer = PeerCluster::of(config).builder().await?;
    let mut probe = probe_at(&peer, point, clock).await?;
    probe.unknown_database = point.is_some() && !ours;
    if probe.unknown_database {
        // The recovery point is not here, so its distance has no meaning.
        probe.lag_bytes = None;
        probe
            .changed
            .get_or_insert("the local database is not the one that was copied");
    }
    Ok(probe)
}

/// Returns whether the visible database is at this very point.
async fn is_at(config: &Config, point: &RecoveryPoint) -> Result<bool, ReplicationError> {
    let Some(session) = LocalCluster::of(config).builder_if_there().await? else {
        return Ok(false);
    };
    Ok(SpareDb::of(&session).lsn().await?.as_ref() == Some(&point.lsn))
}

/// Compares the primary with the recovery point. Every change of rows or tables takes a transaction
/// number before it becomes visible. So while the text of the snapshot (the next number, and the
/// open transactions) is the same, nothing was committed. Facts that the snapshot does not show
/// count as a change: another server, timeline or start of it (after a crash it may lose the last
/// numbers and use them again), a log position before the point, and sequences, which move outside
/// of transactions.
pub(super) async fn probe_at(
    peer: &ReadSession,
    point: Option<&RecoveryPoint>,
    clock: &Clock,
) -> Result<ChangeProbe, ReplicationError> {
    let doing = "asking for committed transactions";
    let asked = clock.now();
    let state = peer.server_state(doing).await?;
    let answered = clock.now();
    let from: Option<Lsn> = point.and_then(|point| point.lsn.parse().ok());
    let ahead = from.zip(state.wal);
    let ahead = ahead.and_then(|(from, wal)| wal.0.checked_sub(from.0));
    let changed = match point {
        None => Some("nothing was copied yet"),
        Some(point) if state.system_id != point.system_id => Some("it is another server"),
        Some(point) if state.timeline != Some(point.timeline) => Some("it is on another timeline"),
        Some(point) if state.started != point.server_started => Some("its server was restarted"),
        Some(_) if ahead.is_none() => Some("it is before that point"),
        Some(point) if state.transactions != point.transactions => Some("it has had transactions"),
        Some(point) if Sequence::digest(&sequences(peer).await?) != point.sequences => {
            Some("its sequences have moved")
        }
        Some(_) => None,
    };
    Ok(ChangeProbe {
        time: state.time,
        clock_offset_seconds: state.clock_offset_seconds(asked, answered),
        changed,
        unknown_database: false,
        lag_bytes: ahead,
        server: state.server,
        fenced: state.fenced,
    })
}

/// Replaces the error if the peer is a physical standby. An address that leads to one for a moment,
/// as a virtual one may, causes a statement that the server refuses. The server is asked for its
/// state, because its messages may be in any language.
pub(super) async fn told_of_standby(config: &Config, error: ReplicationError) -> ReplicationError {
    let states = [
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        SqlState::READ_ONLY_SQL_TRANSACTION,
        SqlState::FEATURE_NOT_SUPPORTED,
        // A standby does not have our slot.
        SqlState::UNDEFINED_OBJECT,
    ];
    let may_be = match &error {
        ReplicationError::Datastore(e) => {
            e.side == Side::Peer && states.iter().any(|s| e.sql_state.as_ref() == Some(s))
        }
        _ => false,
    };
    if !may_be {
        return error;
    }
    let asked = async {
        let peer = PeerCluster::of(config).builder().await?;
        let state = peer.server_state("asking whether the peer is a standby");
        Ok::<bool, DatastoreError>(state.await?.is_standby())
    };
    match asked.await {
        Ok(true) => ReplicationError::standby(),
        _ => error,
    }
}
