//! The facts that a server tells about itself.

use super::rows::Row;
use super::session::{BEGIN_SNAPSHOT, Session, Snapshot};
use super::timeline::timeline;
use crate::cluster::fence::setting::fenced;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::domain::Lsn;
use chrono::{DateTime, Utc};

/// A server's version, and whether our session with it is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub version: String,
    pub tls: bool,
}

/// The state of a server and of the session's database, at one instant.
#[derive(Debug, Clone)]
pub struct ServerState {
    /// Start of the transaction by the server's clock, before it read anything.
    pub time: DateTime<Utc>,
    /// Its clock while it collected the answer.
    pub clock: DateTime<Utc>,
    /// Its transactions, as a snapshot in text form: the next number, and the open ones. Every
    /// transaction that had ended by then is in its log before `wal`.
    pub transactions: String,
    /// End of its log. None: it is a standby.
    pub wal: Option<Lsn>,
    /// The timeline that it writes on. None: it is a standby.
    pub timeline: Option<i32>,
    pub system_id: String,
    pub started: String,
    pub server: Server,
    /// True: the database is read-only, as a spare's is.
    pub fenced: bool,
}

/// SQL: the columns of [`ServerState`]. They are part of one statement, so that everything is read
/// at one instant.
macro_rules! server_state {
    () => {
        concat!(
            "now(), clock_timestamp(), txid_current_snapshot()::text, \
             CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_lsn()::text END, ",
            timeline!(),
            ", (SELECT system_identifier::text FROM pg_control_system()), pg_postmaster_start_time()::text, \
             current_setting('server_version'), coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false), ",
            fenced!("current_database()")
        )
    };
}
pub(in crate::cluster) use server_state;

/// The session's database, as the server has it on record.
#[derive(Debug, Clone)]
pub struct DatabaseFacts {
    pub bytes: i64,
    pub encoding: String,
    /// Its row of `pg_database`, as JSON: its columns differ from version to version.
    pub properties: String,
}

impl ServerState {
    /// Number of its columns. A longer row goes on after them.
    pub(in crate::cluster) const COLUMNS: usize = 10;

    pub(in crate::cluster) fn of(row: &Row) -> Result<Self, DatastoreError> {
        let wal: Option<String> = row.get(3)?;
        Ok(ServerState {
            time: row.get(0)?,
            clock: row.get(1)?,
            transactions: row.get(2)?,
            wal: wal.and_then(|wal| wal.parse().ok()),
            timeline: row.get(4)?,
            system_id: row.get(5)?,
            started: row.get(6)?,
            server: Server {
                version: row.get(7)?,
                tls: row.get(8)?,
            },
            fenced: row.get(9)?,
        })
    }

    /// Returns whether the server is a physical standby, which writes no log of its own.
    pub fn is_standby(&self) -> bool {
        self.timeline.is_none()
    }

    /// Returns the seconds by which its clock is ahead of ours, as exactly as one question and
    /// answer can show. The times are ours, before the question and after the answer.
    pub fn clock_offset_seconds(&self, asked: DateTime<Utc>, answered: DateTime<Utc>) -> f64 {
        let between = asked + (answered - asked) / 2;
        let offset = (self.clock - between).num_microseconds();
        offset.unwrap_or_default() as f64 / 1e6
    }
}

impl Session {
    /// Returns the position of the server's log. Empty: the server is a standby.
    pub async fn wal_position(&self) -> Result<String, DatastoreError> {
        let sql = "SELECT CASE WHEN NOT pg_catalog.pg_is_in_recovery() \
                   THEN pg_catalog.pg_current_wal_lsn()::text ELSE '' END";
        let doing = "reading the position of the log";
        self.row(doing, sql, &[]).await?.get(0)
    }

    /// Asks the server for its state. Within a transaction `time` is the start of that.
    pub async fn server_state(&self, doing: &str) -> Result<ServerState, DatastoreError> {
        let sql = concat!("SELECT ", server_state!());
        ServerState::of(&self.row(doing, sql, &[]).await?)
    }

    /// Reads the server's clock.
    pub async fn clock(&self) -> Result<DateTime<Utc>, DatastoreError> {
        let sql = "SELECT clock_timestamp()";
        self.row("reading the clock", sql, &[]).await?.get(0)
    }

    /// Returns the major version of the server.
    pub async fn major(&self) -> Result<u32, DatastoreError> {
        let sql = "SELECT current_setting('server_version_num')::int4 / 10000";
        let row = self.row("reading the version", sql, &[]).await?;
        Ok(row.get::<i32>(0)?.unsigned_abs())
    }

    pub async fn database_facts(&self) -> Result<DatabaseFacts, DatastoreError> {
        let sql = "SELECT pg_database_size(oid), pg_encoding_to_char(encoding), to_jsonb(d)::text \
                   FROM pg_database d WHERE datname = current_database()";
        let row = self.row("reading the database's facts", sql, &[]).await?;
        Ok(DatabaseFacts {
            bytes: row.get(0)?,
            encoding: row.get(1)?,
            properties: row.get(2)?,
        })
    }

    /// Starts a read-only transaction in which every statement sees the same instant.
    pub async fn begin_snapshot(&self, doing: &str) -> Result<(), DatastoreError> {
        self.batch(doing, BEGIN_SNAPSHOT).await
    }

    /// Starts such a transaction, and lets other sessions see the same instant.
    pub async fn export_snapshot(&self) -> Result<Snapshot, DatastoreError> {
        self.begin_snapshot("starting the snapshot").await?;
        let sql = "SELECT pg_catalog.pg_export_snapshot()";
        let row = self.row("exporting the snapshot", sql, &[]).await?;
        Ok(Snapshot::named(row.get(0)?))
    }
}
