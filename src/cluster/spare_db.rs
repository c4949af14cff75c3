//! Schema `warm_spare` in the spare's copy of Builder's database: the facts that change in one
//! transaction with the rows. It goes with the rows: a kept generation has its own.
//!
//! The holder of the working lock alone writes the recovery point. A former holder that was paused
//! finds another token there, and can commit nothing any more.

mod unavailable;

pub use unavailable::Unavailable;

use super::local::LocalCluster;
use super::postgres::datastore_error::DatastoreError;
use super::postgres::session::WriteSession;
use super::state_db::state::{RecoveryPoint, StateError};
use crate::domain::{Lsn, MissingReason};
use chrono::{DateTime, Utc};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};

/// The tables of a new copy.
const SCHEMA: &str = "
CREATE SCHEMA warm_spare;
CREATE TABLE warm_spare.recovery_point (
    lsn pg_lsn NOT NULL,
    commit_time timestamptz NOT NULL,
    system_id text NOT NULL,
    timeline int NOT NULL,
    token bigint NOT NULL,
    mark pg_lsn);
CREATE TABLE warm_spare.unavailable (
    key text PRIMARY KEY,
    checksum text NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL DEFAULT now());
";

/// Removes the schema, if it exists.
pub const DROP_SCHEMA: &str = "DROP SCHEMA IF EXISTS warm_spare CASCADE";

/// The table of the triggers that are disabled on a spare. Databases that an older program copied
/// do not have it.
const SILENCED: &str = "
CREATE TABLE IF NOT EXISTS warm_spare.silenced (
    named text PRIMARY KEY,
    place int NOT NULL,
    wake text NOT NULL);
";

/// A condition that is true for one transaction of the holder of token `$5`, for statements that
/// must not run for a former one. The lock on the row makes the next holder wait until then.
pub(super) const HELD_BY_TOKEN_5: &str =
    "SELECT 1 FROM warm_spare.recovery_point WHERE token = $5::int8 FOR UPDATE";

/// The position up to which the spare has applied the primary's transactions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ApplyPosition {
    pub lsn: Lsn,
    pub commit_time: DateTime<Utc>,
    /// Position at which the commit record of the last applied transaction begins. The stream is
    /// requested from this position: the same commit at the same position proves that the primary's
    /// history is the one that the spare has followed. None: nothing was applied since the copy, or
    /// since the point was moved over log without changes for the spare.
    pub last_commit_lsn: Option<Lsn>,
}

impl ApplyPosition {
    /// Returns the position from which the stream is requested.
    pub fn start_lsn(&self) -> Lsn {
        self.last_commit_lsn.unwrap_or(self.lsn)
    }
}

/// Returns a position in the form in which positions are compared as text: a server of version 19
/// writes leading zeros, and an older one does not.
fn in_one_form(lsn: String) -> String {
    lsn.parse::<Lsn>().map_or(lsn, |lsn| lsn.to_string())
}

/// Work in Builder's database that only the holder of the working lock may do has failed.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    /// It could not be shown that this process holds the lock.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A disabled trigger, event trigger or rule.
#[derive(Debug, Clone)]
pub struct Silenced<'a> {
    pub named: &'a str,
    /// Its place in the order in which they are enabled again, the highest first.
    pub place: i32,
    /// The statement that enables it again.
    pub wake: &'a str,
}

/// The schema, through a session on the database that it is in.
#[derive(Clone, Copy)]
pub struct SpareDb<'a>(&'a WriteSession);

impl<'a> SpareDb<'a> {
    /// Uses the schema of a database. In a database that was not copied here only those methods
    /// succeed that look for it themselves: `exists`, `lsn`, `point`, `lsn_at_rest` and `waking`.
    pub fn of(session: &'a WriteSession) -> Self {
        SpareDb(session)
    }

    /// Makes the schema in a database that nobody sees yet.
    pub async fn create(self) -> Result<(), DatastoreError> {
        self.0
            .batch("making our schema", &format!("{SCHEMA}{SILENCED}"))
            .await
    }

    /// Returns whether this database has the schema, of any form.
    pub async fn has_schema(self) -> Result<bool, DatastoreError> {
        let sql = "SELECT to_regnamespace('warm_spare') IS NOT NULL";
        let doing = "looking for schema warm_spare";
        self.0.row(doing, sql, &[]).await?.get(0)
    }

    /// Drops the schema. It need not exist.
    pub async fn drop_schema(self) -> Result<(), DatastoreError> {
        self.0
            .batch("dropping schema warm_spare", DROP_SCHEMA)
            .await
    }

    /// Returns whether this database was copied here.
    pub async fn exists(self) -> Result<bool, DatastoreError> {
        let sql = "SELECT to_regclass('warm_spare.recovery_point') IS NOT NULL";
        let doing = "looking for the recovery point";
        Ok(self.0.query_one(doing, sql, &[]).await?.get(0))
    }

    /// Returns the recorded position as text. None: the database was not copied here.
    pub async fn lsn(self) -> Result<Option<String>, DatastoreError> {
        if !self.exists().await? {
            return Ok(None);
        }
        let sql = "SELECT lsn::text FROM warm_spare.recovery_point";
        let rows = self.0.rows("reading the recovery point", sql, &[]).await?;
        let lsn: Option<String> = rows.first().map(|row| row.get(0)).transpose()?;
        Ok(lsn.map(in_one_form))
    }

    /// Returns the point of this database: the copied one, or a later one to which the stream has
    /// brought it.
    pub async fn point(self, copied: RecoveryPoint) -> Result<RecoveryPoint, DatastoreError> {
        if !copied.is_followed() || !self.exists().await? {
            return Ok(copied);
        }
        let sql = "SELECT lsn::text, commit_time FROM warm_spare.recovery_point";
        let doing = "reading the recovery point";
        let row = self.0.query_one(doing, sql, &[]).await?;
        Ok(RecoveryPoint {
            lsn: in_one_form(row.get(0)),
            commit_time: row.get(1),
            ..copied
        })
    }

    /// Returns the point at which this copy stands: position, time of the last commit, system id and
    /// timeline of the primary.
    pub async fn stands_at(self) -> Result<(String, DateTime<Utc>, String, i32), DatastoreError> {
        let sql =
            "SELECT lsn::text, commit_time, system_id, timeline FROM warm_spare.recovery_point";
        let doing = "reading the recovery point";
        let row = self.0.query_one(doing, sql, &[]).await?;
        Ok((in_one_form(row.get(0)), row.get(1), row.get(2), row.get(3)))
    }

    /// Ends our sessions that may still write here, and returns the position when no commit is in
    /// progress any more. None: the database was not copied here.
    pub async fn lsn_at_rest(self) -> Result<Option<Lsn>, DatastoreError> {
        if !self.exists().await? {
            return Ok(None);
        }
        self.end_former_writers().await?;
        let sql = "SELECT lsn::text FROM warm_spare.recovery_point FOR UPDATE";
        let doing = "reading the recovery point";
        let row = self.0.query_one(doing, sql, &[]).await?;
        Ok(row.get::<_, String>(0).parse().ok())
    }

    /// Ends our sessions that hold the recovery point. Only the holder of the working lock may
    /// write it, so these sessions belong to a process that lost the lock, or to a run that has
    /// ended. A hung session would keep its row locked for ever.
    pub async fn end_former_writers(self) -> Result<(), DatastoreError> {
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity a USING (pid)
               WHERE relation = 'warm_spare.recovery_point'::regclass AND a.datname = current_database()
                 AND mode IN ('RowShareLock', 'RowExclusiveLock') AND a.usename = current_user
                 AND pid <> pg_backend_pid()";
        self.0.batch("ending a former holder's sessions", sql).await
    }

    /// Records the point of a new copy.
    pub async fn record_point(
        self,
        point: &RecoveryPoint,
        token: i64,
    ) -> Result<(), DatastoreError> {
        let sql = "INSERT INTO warm_spare.recovery_point (lsn, commit_time, system_id, timeline, token) \
                   VALUES ($1::text::pg_lsn, $2, $3, $4, $5)";
        let values: &[&(dyn ToSql + Sync)] = &[
            &point.lsn,
            &point.commit_time,
            &point.system_id,
            &point.timeline,
            &token,
        ];
        self.0
            .execute("recording the recovery point", sql, values)
            .await?;
        Ok(())
    }

    /// Writes our token into the recovery point: the next commit of a former holder fails.
    pub async fn claim(self, token: i64) -> Result<ApplyPosition, StateError> {
        let sql = "UPDATE warm_spare.recovery_point SET token = $1 WHERE token <= $1 \
                   RETURNING lsn, commit_time, mark";
        let doing = "taking the recovery point over";
        let rows = self.0.query(doing, sql, &[&token]).await?;
        let row = rows.first().ok_or(StateError::Superseded)?;
        let lsn = |lsn: tokio_postgres::types::PgLsn| Lsn(lsn.into());
        Ok(ApplyPosition {
            lsn: lsn(row.get(0)),
            commit_time: row.get(1),
            last_commit_lsn: row.get::<_, Option<_>>(2).map(lsn),
        })
    }

    /// Begins a transaction as the holder of this token.
    pub async fn begin_as_holder(self, token: i64) -> Result<(), StateError> {
        let doing = "checking our token";
        self.0.batch(doing, "BEGIN").await?;
        let sql = "UPDATE warm_spare.recovery_point SET token = $1 WHERE token <= $1";
        if self.0.execute(doing, sql, &[&token]).await? == 0 {
            self.0.batch(doing, "ROLLBACK").await?;
            return Err(StateError::Superseded);
        }
        Ok(())
    }

    /// Fails if another process has taken the recovery point over.
    pub async fn still_held(self, token: i64) -> Result<(), StateError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM warm_spare.recovery_point WHERE token = $1)";
        let row = self
            .0
            .query_one("checking our token", sql, &[&token])
            .await?;
        row.get::<_, bool>(0)
            .then_some(())
            .ok_or(StateError::Superseded)
    }

    /// Begins a transaction in which changes are applied. Its lock blocks nobody; by it
    /// [`SpareDb::end_former_writers`] finds the session of a process that hangs. Changes are sent
    /// behind it before its answer. So it fails, and they with it, if another process has written
    /// its token: they could arrive late, and lock rows that the other one writes.
    pub async fn begin_to_apply(self, token: i64) -> Result<(), StateError> {
        let sql = format!(
            "BEGIN READ WRITE; LOCK TABLE warm_spare.recovery_point IN ROW SHARE MODE; \
             SELECT 1 / count(*) FROM warm_spare.recovery_point WHERE token = {token}"
        );
        match self.0.batch("beginning to apply", &sql).await {
            Err(error) if error.sql_state == Some(SqlState::DIVISION_BY_ZERO) => {
                Err(StateError::Superseded)
            }
            begun => Ok(begun?),
        }
    }

    /// Moves the recovery point in the open transaction. It fails if another process moved the
    /// point or wrote another token. It has no time limit, because it may be sent behind changes
    /// that have none, before their answers.
    pub async fn advance(
        self,
        from: Lsn,
        to: &ApplyPosition,
        token: i64,
    ) -> Result<(), StateError> {
        let sql = "UPDATE warm_spare.recovery_point SET lsn = $1::text::pg_lsn, commit_time = $2, \
                     mark = $5::text::pg_lsn WHERE lsn = $3::text::pg_lsn AND token = $4";
        let (lsn, from) = (to.lsn.to_string(), from.to_string());
        let mark = to.last_commit_lsn.map(|lsn| lsn.to_string());
        let values: [(&(dyn ToSql + Sync), Type); 5] = [
            (&lsn, Type::TEXT),
            (&to.commit_time, Type::TIMESTAMPTZ),
            (&from, Type::TEXT),
            (&token, Type::INT8),
            (&mark, Type::TEXT),
        ];
        let stored = self.0.client().execute_typed(sql, &values);
        let doing = "storing the recovery point";
        match self.0.unlimited(doing, stored).await? {
            1 => Ok(()),
            _ => Err(StateError::Superseded),
        }
    }

    /// Makes the table of the silenced triggers, if an older program copied this database.
    pub async fn make_silenced(self) -> Result<(), DatastoreError> {
        let doing = "making our table of silenced triggers";
        self.0.batch(doing, SILENCED).await
    }

    pub async fn record_silenced(self, trigger: &Silenced<'_>) -> Result<(), DatastoreError> {
        let sql = "INSERT INTO warm_spare.silenced (named, place, wake) VALUES ($1, $2, $3) \
                   ON CONFLICT (named) DO UPDATE SET wake = excluded.wake";
        let values: &[&(dyn ToSql + Sync)] = &[&trigger.named, &trigger.place, &trigger.wake];
        self.0.execute("disabling a trigger", sql, values).await?;
        Ok(())
    }

    /// Returns the statements that enable the silenced triggers. Event triggers come last.
    pub async fn waking(self) -> Result<Vec<String>, DatastoreError> {
        let doing = "reading which triggers are silenced";
        let sql = "SELECT to_regclass('warm_spare.silenced') IS NOT NULL";
        if !self.0.query_one(doing, sql, &[]).await?.get::<_, bool>(0) {
            return Ok(Vec::new());
        }
        let sql = "SELECT wake FROM warm_spare.silenced ORDER BY place DESC, named";
        let rows = self.0.query(doing, sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// Removes the record of the silenced triggers in the open transaction.
    pub async fn forget_silenced(self) -> Result<(), DatastoreError> {
        let doing = "forgetting what was silenced";
        self.0.batch(doing, "DELETE FROM warm_spare.silenced").await
    }
}

/// Questions about the database that Builder on the spare sees, each in a session of its own.
impl LocalCluster<'_> {
    /// Returns the point of that database. If it does not exist, or was not copied here, this is
    /// the copied point.
    pub async fn point(self, copied: RecoveryPoint) -> Result<RecoveryPoint, DatastoreError> {
        match self.builder_if_there().await? {
            Some(session) => SpareDb::of(&session).point(copied).await,
            None => Ok(copied),
        }
    }

    /// Returns its position when no commit is in progress any more. None: it does not exist, or
    /// was not copied here.
    pub async fn lsn_at_rest(self) -> Result<Option<Lsn>, DatastoreError> {
        match self.builder_if_there().await? {
            Some(session) => SpareDb::of(&session).lsn_at_rest().await,
            None => Ok(None),
        }
    }

    /// Returns its artifacts that are not there, with the reasons. None: it does not exist, or was
    /// not copied here.
    pub async fn unavailable(self) -> Result<Option<Vec<(String, MissingReason)>>, DatastoreError> {
        let Some(session) = self.builder_if_there().await? else {
            return Ok(None);
        };
        let spare = SpareDb::of(&session);
        match spare.exists().await? {
            true => Ok(Some(spare.unavailable_reasons().await?)),
            false => Ok(None),
        }
    }
}
