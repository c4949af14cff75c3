//! Asks whether the primary has committed anything since the recovery point, without reading a row.

use super::baseline::sequences::{self, Sequence};
use super::error::PassError;
use crate::cluster::SqlState;
use crate::cluster::timeline;
use crate::cluster::{Confirmation, CopiedPoint, PeerSession, fenced};
use crate::config::Config;
use crate::domain::Side;
use crate::observe::Clock;
use crate::replication::baseline::visible::{open_visible, recovery_point};
use chrono::{DateTime, Utc};

/// The primary's answer.
#[derive(Debug, Clone)]
pub struct Look {
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
    pub astray: bool,
    /// Bytes of write-ahead log written since the recovery point. None: there is no recovery point
    /// here, or it is of another server.
    pub lag_bytes: Option<u64>,
    pub server: Server,
    /// True: its database is read-only, as a spare's is.
    pub fenced: bool,
}

/// A server's facts about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub version: String,
    pub tls: bool,
}

impl Look {
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
pub async fn look(
    config: &Config,
    point: Option<&CopiedPoint>,
    clock: &Clock,
) -> Result<Look, PassError> {
    let ours = match point {
        Some(point) => stands_at(config, point).await?,
        None => false,
    };
    let peer = PeerSession::open(&config.peer.datastore).await?;
    let mut look = look_at(&peer, point, clock).await?;
    look.astray = point.is_some() && !ours;
    if look.astray {
        // The recovery point is not here, so its distance has no meaning.
        look.lag_bytes = None;
        look.changed
            .get_or_insert("the local database is not the one that was copied");
    }
    Ok(look)
}

async fn stands_at(config: &Config, point: &CopiedPoint) -> Result<bool, PassError> {
    let Some(session) = open_visible(config).await? else {
        return Ok(false);
    };
    Ok(recovery_point(&session).await?.as_ref() == Some(&point.lsn))
}

/// The question is one statement, so that everything is read at one instant; `now()` is the start
/// of its transaction, before it reads.
const QUESTION: &str = concat!(
    "
SELECT now(), clock_timestamp(), txid_current_snapshot()::text,
       CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_lsn()::text END,
       (SELECT system_identifier::text FROM pg_control_system()),
       ",
    timeline!(),
    ",
       pg_postmaster_start_time()::text,
       current_setting('server_version'),
       coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false),
       ",
    fenced!("current_database()"),
    ",
       CASE WHEN pg_is_in_recovery() OR $1::text = '' THEN NULL
            ELSE pg_wal_lsn_diff(pg_current_wal_lsn(), nullif($1::text, '')::pg_lsn)::int8 END"
);

/// Compares the primary with the recovery point. Every change of rows or tables takes a transaction
/// number before it becomes visible. So while the text of the snapshot (the next number, and the
/// open transactions) is the same, nothing was committed. Facts that the snapshot does not show
/// count as a change: another server, timeline or start of it (after a crash it may lose the last
/// numbers and use them again), a log position before the point, and sequences, which move outside
/// of transactions.
pub(super) async fn look_at(
    peer: &PeerSession,
    point: Option<&CopiedPoint>,
    clock: &Clock,
) -> Result<Look, PassError> {
    let lsn = point.map_or("", |point| point.lsn.as_str());
    let asked = clock.now();
    let row = peer
        .row("asking for committed transactions", QUESTION, &[&lsn])
        .await?;
    let answered = clock.now();
    let between = asked + (answered - asked) / 2;
    let theirs: DateTime<Utc> = row.get(1)?;
    let ahead = row.get::<Option<i64>>(10)?;
    let changed = match point {
        None => Some("nothing was copied yet"),
        Some(point) if row.get::<String>(4)? != point.system_id => Some("it is another server"),
        Some(point) if row.get::<Option<i32>>(5)? != Some(point.timeline) => {
            Some("it is on another timeline")
        }
        Some(point) if row.get::<String>(6)? != point.server_started => {
            Some("its server was restarted")
        }
        Some(_) if ahead.is_none_or(|bytes| bytes < 0) => Some("it is before that point"),
        Some(point) if row.get::<String>(2)? != point.transactions => {
            Some("it has had transactions")
        }
        Some(point) if sequences::digest(&moved(peer).await?) != point.sequences => {
            Some("its sequences have moved")
        }
        Some(_) => None,
    };
    Ok(Look {
        time: row.get(0)?,
        clock_offset_seconds: (theirs - between).num_microseconds().unwrap_or_default() as f64
            / 1e6,
        changed,
        astray: false,
        lag_bytes: ahead.and_then(|bytes| u64::try_from(bytes).ok()),
        server: Server {
            version: row.get(7)?,
            tls: row.get(8)?,
        },
        fenced: row.get(9)?,
    })
}

async fn moved(peer: &PeerSession) -> Result<Vec<Sequence>, PassError> {
    let names = sequences::sequence_names(peer).await?;
    sequences::read_sequences(peer, names).await
}

/// Replaces the error if the peer is a physical standby. An address that leads to one for a moment,
/// as a virtual one may, causes a statement that the server refuses. The server is asked for its
/// state, because its messages may be in any language.
pub(super) async fn told_of_standby(config: &Config, error: PassError) -> PassError {
    let states = [
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
        SqlState::READ_ONLY_SQL_TRANSACTION,
        SqlState::FEATURE_NOT_SUPPORTED,
        // A standby does not have our slot.
        SqlState::UNDEFINED_OBJECT,
    ];
    let may_be = match &error {
        PassError::Datastore(e) => {
            e.side == Side::Peer && states.iter().any(|s| e.sql_state.as_ref() == Some(s))
        }
        _ => false,
    };
    if !may_be {
        return error;
    }
    let asked = async {
        let peer = PeerSession::open(&config.peer.datastore).await?;
        let sql = "SELECT pg_is_in_recovery()";
        let row = peer
            .row("asking whether the peer is a standby", sql, &[])
            .await?;
        row.get::<bool>(0)
    };
    match asked.await {
        Ok(true) => PassError::standby(),
        _ => error,
    }
}
