//! The state database: the small database `warm_spare` on the local server.
//!
//! It is a separate database because `builder` is renamed and dumped. Facts that must change
//! together with the rename (the copied point, the replaced generation, the bytes put in place) are
//! written in the same transaction.

use super::DATABASE;
use super::migrations::{FORMAT, migrate, oldest_format};
use super::working_lock::Holder;
use crate::cluster::postgres::datastore_error::{DatastoreError, DatastoreFault};
use crate::cluster::postgres::maintenance::{has_database, is_of_the_database};
use crate::cluster::postgres::session::{WriteSession, quote_ident};
use crate::config::Datastore;
use crate::domain::{Role, Side};
use chrono::{DateTime, Utc};
use tokio_postgres::types::{ToSql, Type};

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    #[error(
        "{side} database warm_spare has format {found}, this program knows up to {FORMAT}: use the newer warm-spare that wrote it"
    )]
    Newer { side: Side, found: i32 },
    #[error(
        "another warm-spare is at work on this cluster ({})",
        .holder.as_ref().map_or("since a moment ago".into(), ToString::to_string)
    )]
    Locked {
        /// None: the holder has just released it.
        holder: Option<Box<Holder>>,
    },
    #[error(
        "another warm-spare has taken over since this one began; this one stops without touching anything"
    )]
    Superseded,
    /// The epoch is too low: another cluster was promoted in the meantime.
    #[error("{text}")]
    Overtaken { side: Side, text: String },
}

impl StateError {
    /// Returns the side whose state it is about.
    pub fn side(&self) -> Side {
        match self {
            StateError::Datastore(error) => error.side,
            StateError::Newer { side, .. } | StateError::Overtaken { side, .. } => *side,
            StateError::Locked { .. } | StateError::Superseded => Side::Local,
        }
    }
}

/// Facts about an object in the local bucket whose bytes were hashed here.
#[derive(Debug, Clone)]
pub struct Artifact {
    pub key: String,
    pub checksum: String,
    pub bytes: u64,
    pub etag: String,
}

/// The point of the primary's history at which the spare's rows and artifacts are. The fields
/// beside the position and the server show whether the primary has changed since then.
#[derive(Debug, Clone)]
pub struct RecoveryPoint {
    pub lsn: String,
    pub commit_time: DateTime<Utc>,
    pub system_id: String,
    pub timeline: i32,
    /// The primary's transactions at the snapshot, and the start of its server: while both are
    /// unchanged, nothing has been committed since then.
    pub transactions: String,
    pub server_started: String,
    pub sequences: String,
    /// None: no stream continues from here, only another copy does.
    pub stream: Option<StreamSource>,
    /// The peer's own cluster id. None: it keeps no state of ours.
    pub peer_cluster: Option<String>,
}

/// The stream that continues from a recovery point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamSource {
    /// The slot on the primary.
    pub slot: String,
    /// The form of the primary's tables when they were copied, as one number.
    pub schema: String,
}

impl RecoveryPoint {
    /// Returns whether a stream continues from here.
    pub fn is_followed(&self) -> bool {
        self.stream.is_some()
    }

    /// Returns the slot that continues from here; an empty text if none does.
    pub fn slot(&self) -> &str {
        self.stream.as_ref().map_or("", |stream| &stream.slot)
    }

    /// Returns the form of the tables that the stream continues; an empty text if none does.
    pub fn schema(&self) -> &str {
        self.stream.as_ref().map_or("", |stream| &stream.schema)
    }

    /// Returns whether a database that records position `found` is the one that was copied here. A
    /// followed one moves on from there.
    pub fn is_of(&self, found: Option<&String>) -> bool {
        match self.is_followed() {
            true => found.is_some(),
            false => found == Some(&self.lsn),
        }
    }

    /// Returns a point for tests: a snapshot, which no stream continues.
    #[cfg(test)]
    pub(crate) fn sample() -> Self {
        RecoveryPoint {
            lsn: "0/10".into(),
            commit_time: Utc::now(),
            system_id: "7000000000000000001".into(),
            timeline: 1,
            transactions: String::new(),
            server_started: String::new(),
            sequences: String::new(),
            stream: None,
            peer_cluster: None,
        }
    }
}

/// Rows and content hash of one table, as the primary sent them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableContent {
    pub table: String,
    pub rows: i64,
    pub hash: String,
}

/// A whole replaced database that is kept.
#[derive(Debug, Clone)]
pub struct Generation {
    pub name: String,
    pub created: DateTime<Utc>,
    pub pinned: bool,
}

#[derive(Debug, Clone)]
pub struct ClusterRecord {
    pub id: String,
    /// None: the role of this cluster was never set.
    pub role: Option<Role>,
    pub epoch: i64,
    pub since: DateTime<Utc>,
    /// True: a spare that was a primary, before its first copy. Changes that only it has are
    /// recorded, and may go.
    pub coming_back: bool,
    /// True: the fence was set again here, and sessions from before that may still exist.
    pub fence_begun: bool,
    /// The id of an operator's approval for the next copy to replace the local data; empty: there
    /// is none. That copy pins the replaced database.
    pub approved: String,
}

pub struct StateDb {
    pub(in crate::cluster) session: WriteSession,
}

impl StateDb {
    /// Opens the database, or creates it.
    pub(in crate::cluster) async fn open(to: &Datastore) -> Result<StateDb, StateError> {
        if let Some(state) = StateDb::open_existing(to).await? {
            return Ok(state);
        }
        StateDb::create(&WriteSession::open_for_maintenance(to).await?, to).await
    }

    /// Opens the database if it exists and is complete.
    pub(in crate::cluster) async fn open_existing(
        to: &Datastore,
    ) -> Result<Option<StateDb>, StateError> {
        let refused = match WriteSession::open_on(Side::Local, to, DATABASE).await {
            Ok(session) => return Ok(Some(StateDb::on(session).await?)),
            Err(error) => error,
        };
        if !is_of_the_database(&refused) && refused.fault != DatastoreFault::Pooler {
            return Err(refused.into());
        }
        // A pooler refuses each database that its own configuration does not name, and
        // `pg_hba.conf` may have a line only for Builder's database. Neither says whether this one
        // exists.
        let maintenance = WriteSession::open_for_maintenance(to).await?;
        match exists_on(&maintenance).await? {
            true => Err(refused.into()),
            false => Ok(None),
        }
    }

    /// Opens the database, or creates it, on the server of a maintenance session: a fenced peer
    /// keeps the record of its fence there. A server writes each session that it refuses into its
    /// log, so the peer is asked first.
    pub(in crate::cluster) async fn open_from(
        maintenance: &WriteSession,
        to: &Datastore,
    ) -> Result<StateDb, StateError> {
        if !exists_on(maintenance).await? {
            return StateDb::create(maintenance, to).await;
        }
        StateDb::on(WriteSession::open_on(maintenance.side(), to, DATABASE).await?).await
    }

    async fn create(maintenance: &WriteSession, to: &Datastore) -> Result<StateDb, StateError> {
        let sql = format!(
            // Locale C is valid with every encoding. The server's own locale may not be valid with
            // UTF-8.
            "CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'",
            quote_ident(DATABASE)
        );
        match maintenance
            .batch("creating database warm_spare", &sql)
            .await
        {
            // Two processes at once: the other one created it.
            Err(e) if e.sql_state == Some(tokio_postgres::error::SqlState::DUPLICATE_DATABASE) => {}
            other => other?,
        }
        let session = WriteSession::open_on(maintenance.side(), to, DATABASE).await?;
        migrate(&session, FORMAT).await?;
        Ok(StateDb { session })
    }

    /// Uses the database that this session is in.
    async fn on(session: WriteSession) -> Result<StateDb, StateError> {
        let side = session.side();
        // An older program made the tables, or a kill came between the database and its tables.
        let found = migrate(&session, oldest_format(side)).await?;
        if found > FORMAT {
            return Err(StateError::Newer { side, found });
        }
        Ok(StateDb { session })
    }

    /// Returns the session, for working tables of a run, and for the transaction in which databases
    /// are renamed.
    pub fn session(&self) -> &WriteSession {
        &self.session
    }

    pub async fn cluster(&self) -> Result<ClusterRecord, StateError> {
        let sql = "SELECT id, role, epoch, since, coming_back, fence_begun, approved FROM cluster";
        let row = self.session.row("reading our role", sql, &[]).await?;
        Ok(ClusterRecord {
            id: row.get(0)?,
            role: row.get(1)?,
            epoch: row.get(2)?,
            since: row.get(3)?,
            coming_back: row.get(4)?,
            fence_begun: row.get(5)?,
            approved: row.get(6)?,
        })
    }

    /// Records an approval: the next copy replaces the data that an operator has given up.
    pub async fn approve_next_copy(&self, id: &str) -> Result<(), StateError> {
        let sql = "UPDATE cluster SET approved = $1 WHERE coalesce(role, 'spare') = 'spare'";
        self.session
            .execute("recording the approval", sql, &[&id])
            .await?;
        Ok(())
    }

    pub async fn recovery_point(&self) -> Result<Option<RecoveryPoint>, StateError> {
        let sql = "SELECT lsn, commit_time, system_id, timeline, transactions, server_started, sequences, schema, \
                     nullif(slot, ''), nullif(peer_cluster, '') FROM copied";
        let rows = self
            .session
            .query("reading the recovery point", sql, &[])
            .await?;
        Ok(rows.first().map(|row| RecoveryPoint {
            lsn: row.get(0),
            commit_time: row.get(1),
            system_id: row.get(2),
            timeline: row.get(3),
            transactions: row.get(4),
            server_started: row.get(5),
            sequences: row.get(6),
            stream: row.get::<_, Option<String>>(8).map(|slot| StreamSource {
                slot,
                schema: row.get(7),
            }),
            peer_cluster: row.get(9),
        }))
    }

    pub async fn content(&self) -> Result<Vec<TableContent>, StateError> {
        let sql = "SELECT table_name, rows, hash FROM content ORDER BY table_name";
        let rows = self
            .session
            .query("reading the copied tables' hashes", sql, &[])
            .await?;
        Ok(rows
            .iter()
            .map(|row| TableContent {
                table: row.get(0),
                rows: row.get(1),
                hash: row.get(2),
            })
            .collect())
    }

    pub async fn record_artifacts(&self, artifacts: &[Artifact]) -> Result<(), StateError> {
        Ok(record_artifacts(&self.session, artifacts).await?)
    }

    pub async fn generations(&self) -> Result<Vec<Generation>, StateError> {
        let sql = "SELECT g.name, g.created, g.pinned FROM generation g JOIN pg_database d ON d.datname = g.name \
                   ORDER BY g.created DESC, g.name DESC";
        let rows = self
            .session
            .query("reading the generations", sql, &[])
            .await?;
        Ok(rows
            .iter()
            .map(|row| Generation {
                name: row.get(0),
                created: row.get(1),
                pinned: row.get(2),
            })
            .collect())
    }

    /// Returns the server's version, and whether our session with it is encrypted.
    pub async fn server(&self) -> Result<(String, bool), StateError> {
        let sql = "SELECT current_setting('server_version'), \
                     coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false)";
        let row = self
            .session
            .query_one("asking for the version", sql, &[])
            .await?;
        Ok((row.get(0), row.get(1)))
    }

    /// Returns the disk space of all of them.
    pub async fn generations_bytes(&self) -> Result<u64, StateError> {
        let sql = "SELECT coalesce(sum(pg_database_size(d.oid)), 0)::int8 FROM generation g \
                   JOIN pg_database d ON d.datname = g.name";
        let row = self
            .session
            .query_one("measuring the generations", sql, &[])
            .await?;
        Ok(row.get::<_, i64>(0).unsigned_abs())
    }
}

/// Returns whether the state database exists on the server of a maintenance session.
async fn exists_on(maintenance: &WriteSession) -> Result<bool, DatastoreError> {
    has_database(maintenance, DATABASE, "looking for database warm_spare").await
}

/// Records objects whose bytes were hashed here and found right. `session` is a session on the
/// state database.
pub async fn record_artifacts(
    session: &WriteSession,
    artifacts: &[Artifact],
) -> Result<(), DatastoreError> {
    let keys: Vec<&str> = artifacts.iter().map(|a| a.key.as_str()).collect();
    let checksums: Vec<&str> = artifacts.iter().map(|a| a.checksum.as_str()).collect();
    let bytes: Vec<i64> = artifacts.iter().map(|a| a.bytes as i64).collect();
    let etags: Vec<&str> = artifacts.iter().map(|a| a.etag.as_str()).collect();
    let sql = "INSERT INTO artifact AS a (key, checksum, bytes, etag, state, verified_at) \
               SELECT k, c, b, e, 'good', now() FROM unnest($1::text[], $2::text[], $3::int8[], $4::text[]) u(k, c, b, e) \
               ON CONFLICT (key) DO UPDATE SET checksum = excluded.checksum, bytes = excluded.bytes, \
                 etag = excluded.etag, state = excluded.state, verified_at = excluded.verified_at";
    let params: [(&(dyn ToSql + Sync), Type); 4] = [
        (&keys, Type::TEXT_ARRAY),
        (&checksums, Type::TEXT_ARRAY),
        (&bytes, Type::INT8_ARRAY),
        (&etags, Type::TEXT_ARRAY),
    ];
    let doing = "recording checked artifacts";
    session.rows_typed(doing, sql, &params).await?;
    Ok(())
}

/// Returns the record of an object whose bytes were found right. `session` is a session on the
/// state database.
pub async fn recorded_artifact(
    session: &WriteSession,
    key: &str,
) -> Result<Option<Artifact>, DatastoreError> {
    let sql = "SELECT checksum, bytes, etag FROM artifact WHERE key = $1 AND state = 'good'";
    let doing = "looking for an artifact";
    let rows = session.rows_for(doing, sql, &[key]).await?;
    let Some(row) = rows.first() else {
        return Ok(None);
    };
    Ok(Some(Artifact {
        key: key.to_string(),
        checksum: row.get(0)?,
        bytes: row.get::<i64>(1)?.unsigned_abs(),
        etag: row.get(2)?,
    }))
}
