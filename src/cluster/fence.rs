//! The fence: a database is read-only for everybody but us, on a spare until it is promoted, on an old primary for good.
//!
//! A read-only default holds every client that does not set the transaction mode itself, as Builder's do not.

use super::Side;
use super::datastore::{self, DatastoreError};
use super::session::{LocalSession, Session, quote_ident};
use crate::config::Datastore;
use chrono::{DateTime, Utc};
use std::time::Duration;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

/// For sessions to leave. Those that connect for ever come again, but read-only.
const LEAVING: Duration = Duration::from_secs(10);
const LEAVING_STEP: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    #[error(
        "the {side} database {database} is not fenced: user {user} can write in it, \
         although its default_transaction_read_only is on. Look for a setting of that role: \
         ALTER ROLE {user} RESET default_transaction_read_only, or \
         ALTER ROLE {user} IN DATABASE {database} RESET default_transaction_read_only"
    )]
    Open {
        side: Side,
        database: String,
        user: String,
    },
    #[error(
        "sessions on the {side} database {database} that may still write do not end: {left} are left after {} s",
        LEAVING.as_secs()
    )]
    Staying {
        side: Side,
        database: String,
        left: i64,
    },
}

impl FenceError {
    pub fn side(&self) -> Side {
        match self {
            FenceError::Datastore(error) => error.side,
            FenceError::Open { side, .. } | FenceError::Staying { side, .. } => *side,
        }
    }
}

/// The expression of SQL, for a statement's text, that tells whether the fence's setting stands on the database that
/// `$name` gives.
macro_rules! fenced {
    ($name:literal) => {
        concat!(
            "EXISTS (SELECT 1 FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase WHERE d.datname = ",
            $name,
            " AND s.setrole = 0 AND EXISTS (SELECT 1 FROM unnest(s.setconfig) c WHERE \
               CASE split_part(c, '=', 1) WHEN 'default_transaction_read_only' THEN split_part(c, '=', 2)::bool END))"
        )
    };
}

pub(crate) use fenced;

/// Whether the fence's setting stands on `database`.
pub async fn is_fenced(session: &LocalSession, database: &str) -> Result<bool, DatastoreError> {
    let sql = concat!("SELECT ", fenced!("$1"));
    let row = session
        .query_one("looking for the fence", sql, &[&database])
        .await?;
    Ok(row.get(0))
}

/// Sets the fence's setting; sessions that are there already keep their own.
pub async fn set_fence(session: &LocalSession, database: &str) -> Result<(), DatastoreError> {
    session
        .batch("setting the fence", &fence_statement(database))
        .await
}

pub(super) fn fence_statement(database: &str) -> String {
    format!(
        "ALTER DATABASE {} SET default_transaction_read_only = 'on'",
        quote_ident(database)
    )
}

pub(super) fn lift_statement(database: &str) -> String {
    format!(
        "ALTER DATABASE {} RESET default_transaction_read_only",
        quote_ident(database)
    )
}

/// Sets the fence on a database that clients may be using, ends their sessions, and proves that none can write.
pub async fn raise_fence(
    session: &LocalSession,
    local: &Datastore,
    database: &str,
) -> Result<(), FenceError> {
    set_fence(session, database).await?;
    enforce_fence(session, local, database).await
}

/// The same, where the setting stands: sessions from before it may still be there, and may still write.
pub async fn enforce_fence(
    session: &LocalSession,
    local: &Datastore,
    database: &str,
) -> Result<(), FenceError> {
    clear_out(session, database).await?;
    prove_fence(session, local, database).await
}

/// Ends every session from before the fence, and waits until none is left: only the new ones are held by it.
pub async fn clear_out(session: &LocalSession, database: &str) -> Result<(), FenceError> {
    let sql = "SELECT clock_timestamp()";
    let since = session.query_one("asking for the time", sql, &[]).await?;
    let former = Former {
        session,
        database,
        since: since.get(0),
        // Whoever begins later reads the fence's setting.
        starting: starting(session, database).await?,
    };
    let deadline = Instant::now() + LEAVING;
    loop {
        former.end().await?;
        let left = former.left().await?;
        if left == 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(FenceError::Staying {
                side: session.side(),
                database: database.to_string(),
                left,
            });
        }
        tokio::time::sleep(LEAVING_STEP).await;
    }
}

/// Ends those sessions that we may end: only a superuser may end another one's, or the server's own workers, which
/// leave by themselves.
pub async fn end_sessions(session: &LocalSession, database: &str) -> Result<(), DatastoreError> {
    let sql = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity a WHERE {ENDABLE}");
    session
        .query("ending other sessions", &sql, &[&database])
        .await?;
    Ok(())
}

const ENDABLE: &str = "datname = $1 AND pid <> pg_backend_pid() \
     AND ((SELECT rolsuper FROM pg_roles WHERE rolname = current_user) \
       OR EXISTS (SELECT 1 FROM pg_roles r WHERE r.oid = a.usesysid AND NOT r.rolsuper))";

/// A session that began after the fence reads its setting, and so cannot write: clients that connect for ever do not keep
/// the fence from standing. What we may not be told of a session counts as the worst. A walsender writes nothing, and one of ours is to bring what was written last.
const FORMER: &str = "coalesce(backend_start <= $2, true) AND coalesce(backend_type, '') NOT IN ('walsender', 'autovacuum worker')";

struct Former<'a> {
    session: &'a LocalSession,
    database: &'a str,
    since: DateTime<Utc>,
    starting: Vec<i32>,
}

impl Former<'_> {
    async fn end(&self) -> Result<(), DatastoreError> {
        let sql = format!(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity a WHERE {ENDABLE} AND {FORMER}"
        );
        let doing = "ending other sessions";
        self.session
            .query(doing, &sql, &[&self.database, &self.since])
            .await?;
        Ok(())
    }

    /// Those that are seen, those that are still about to be, and prepared transactions: whoever commits one later writes.
    /// What starts is looked at first, or it could pass between the two.
    async fn left(&self) -> Result<i64, DatastoreError> {
        let mut starting = starting(self.session, self.database).await?;
        starting.retain(|pid| self.starting.contains(pid));
        let sql = format!(
            "SELECT cardinality($3::int4[]) + (SELECT count(*) FROM pg_prepared_xacts WHERE database = $1) + count(*) \
             FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid() AND pid <> ALL ($3) AND {FORMER}"
        );
        let doing = "counting sessions";
        let row = self
            .session
            .query_one(doing, &sql, &[&self.database, &self.since, &starting])
            .await?;
        Ok(row.get(0))
    }
}

/// A backend on its way in holds a lock on the database object until it shows in `pg_stat_activity`; it may have read the
/// database's settings by then.
async fn starting(session: &LocalSession, database: &str) -> Result<Vec<i32>, DatastoreError> {
    let sql = "SELECT array_agg(l.pid) FROM pg_locks l JOIN pg_database d ON d.oid = l.objid \
               WHERE l.locktype = 'object' AND l.classid = 'pg_database'::regclass AND d.datname = $1 \
                 AND l.pid <> pg_backend_pid()";
    let doing = "looking for sessions that start";
    let row = session.query_one(doing, sql, &[&database]).await?;
    Ok(row.get::<_, Option<Vec<i32>>>(0).unwrap_or_default())
}

/// A role with a setting of its own, which goes before the database's.
pub async fn exempt_role(
    session: &Session,
    database: &str,
) -> Result<Option<String>, DatastoreError> {
    // Kept as it was written: `off`, `false`, `0`, …
    let sql = "SELECT min(r.rolname)::text FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) c \
               WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = $1)) \
                 AND CASE split_part(c, '=', 1) WHEN 'default_transaction_read_only' THEN NOT split_part(c, '=', 2)::bool END";
    let doing = "looking for roles that the fence does not hold";
    let row = session.query_one(doing, sql, &[&database]).await?;
    Ok(row.get(0))
}

/// Connects as a plain client does and tries to write; being refused is the proof. It covers our own user; of others it
/// is enough that none has a setting that goes before the database's.
pub async fn prove_fence(
    session: &LocalSession,
    to: &Datastore,
    database: &str,
) -> Result<(), FenceError> {
    let side = session.side();
    let open = |user: &str| FenceError::Open {
        side,
        database: database.to_string(),
        user: user.to_string(),
    };
    if let Some(role) = exempt_role(session, database).await? {
        return Err(open(&role));
    }
    let (plain, _wire) = datastore::connect_plainly(side, to, database).await?;
    let sql = "BEGIN; CREATE TABLE warm_spare_fence_probe (); ROLLBACK";
    match plain.batch_execute(sql).await {
        Err(e) if e.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => Ok(()),
        Err(e) => {
            Err(DatastoreError::of(side, &datastore::address(to), "proving the fence", &e).into())
        }
        Ok(()) => Err(open(&to.user)),
    }
}
