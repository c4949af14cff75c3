//! The fence: a database is read-only for everybody but us, on a spare until it is promoted, on an
//! old primary for good.
//!
//! A read-only default applies to every client that does not set the transaction mode itself, as
//! Builder's clients do not.

use super::proof::prove_fence;
use crate::cluster::postgres::datastore_error::{DatastoreError, printable};
use crate::cluster::postgres::provider::{SUPERUSERS, is_providers_own};
use crate::cluster::postgres::session::{WriteSession, quote_ident};
use crate::config::Datastore;
use crate::domain::Side;
use chrono::{DateTime, Utc};
use std::time::Duration;
use tokio::time::Instant;

/// Maximum time for sessions to end. Clients that reconnect for ever come again, but read-only.
const SESSION_EXIT_TIMEOUT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

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
        "{left} sessions on the {side} database {database} can still write, {} s after the server was asked to end them{who}",
        SESSION_EXIT_TIMEOUT.as_secs()
    )]
    Staying {
        side: Side,
        database: String,
        left: i64,
        /// The sessions, in words; empty if none of them is visible.
        who: String,
    },
}

/// The roles of a provider whose sessions from before the fence were not ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use]
pub struct Waived(Vec<String>);

impl Waived {
    /// Describes the roles for the log and the events. None: there are none.
    pub fn describe(&self, side: Side, database: &str) -> Option<String> {
        (!self.0.is_empty()).then(|| {
            format!(
                "the fence on the {side} database {database} waives the sessions of {}: the role belongs to the server's provider, and our user may not end its sessions. A session from before the fence may write until it ends",
                self.0.join(", ")
            )
        })
    }
}

impl FenceError {
    pub fn side(&self) -> Side {
        match self {
            FenceError::Datastore(error) => error.side,
            FenceError::Open { side, .. } | FenceError::Staying { side, .. } => *side,
        }
    }
}

/// The SQL expression, for a statement's text, that returns whether the fence's setting is set on
/// the database in `$name`. The setting is stored as it was written: `on`, `true`, `1`, …
macro_rules! fenced {
    ($name:literal) => {
        concat!(
            "EXISTS (SELECT 1 FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase, ",
            "pg_catalog.unnest(s.setconfig) c WHERE d.datname = ",
            $name,
            " AND s.setrole = 0 AND CASE pg_catalog.split_part(c, '=', 1) WHEN 'default_transaction_read_only' ",
            "THEN pg_catalog.split_part(c, '=', 2)::pg_catalog.bool END)"
        )
    };
}

pub(crate) use fenced;

/// Returns whether the fence's setting is set on `database`.
pub async fn is_fenced(session: &WriteSession, database: &str) -> Result<bool, DatastoreError> {
    let sql = concat!("SELECT ", fenced!("$1"));
    let row = session
        .row("looking for the fence", sql, &[&database])
        .await?;
    row.get(0)
}

/// Sets the fence's setting; existing sessions keep their own.
pub async fn set_fence(session: &WriteSession, database: &str) -> Result<(), DatastoreError> {
    session
        .batch("setting the fence", &fence_statement(database))
        .await
}

pub(in crate::cluster) fn fence_statement(database: &str) -> String {
    format!(
        "ALTER DATABASE {} SET default_transaction_read_only = 'on'",
        quote_ident(database)
    )
}

/// Returns the statement that lifts a fence.
pub fn lift_statement(database: &str) -> String {
    format!(
        "ALTER DATABASE {} RESET default_transaction_read_only",
        quote_ident(database)
    )
}

/// Sets the fence on a database that clients may be using, ends their sessions, and proves that
/// none can write.
pub async fn raise_fence(
    session: &WriteSession,
    local: &Datastore,
    database: &str,
) -> Result<Waived, FenceError> {
    set_fence(session, database).await?;
    enforce_fence(session, local, database).await
}

/// Does the same where the setting is set already: sessions from before it may still exist, and may
/// still write.
pub async fn enforce_fence(
    session: &WriteSession,
    local: &Datastore,
    database: &str,
) -> Result<Waived, FenceError> {
    let waived = end_sessions_from_before(session, database).await?;
    prove_fence(session, local, database).await?;
    Ok(waived)
}

/// Ends every session from before the fence, and waits until none is left: only newer sessions are
/// read-only by it. A provider's own sessions, which we may not end, are not waited for: they do
/// not write Builder's rows, and one that stays would make every fence impossible.
///
/// The fence's setting is committed. A session that is seen after that may be older, and is ended.
/// A session that begins later reads the setting, so it need not end. No clock is used, because a
/// server's clock may be set back.
pub async fn end_sessions_from_before(
    session: &WriteSession,
    database: &str,
) -> Result<Waived, FenceError> {
    let former = OldSessions::look(session, database).await?;
    let deadline = Instant::now() + SESSION_EXIT_TIMEOUT;
    loop {
        former.end().await?;
        let left = former.left().await?;
        if left.number == 0 {
            return Ok(left.waived);
        }
        if Instant::now() > deadline {
            return Err(FenceError::Staying {
                side: session.side(),
                database: database.to_string(),
                left: left.number,
                who: left.who,
            });
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Ends those sessions that we may end. Only a superuser may end another superuser's sessions, or
/// the server's own workers, which end by themselves.
pub async fn end_sessions(session: &WriteSession, database: &str) -> Result<(), DatastoreError> {
    let sql = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity a WHERE {ENDABLE}");
    session
        .rows("ending other sessions", &sql, &[&database])
        .await?;
    Ok(())
}

const ENDABLE: &str = "a.datname = $1 AND a.pid <> pg_backend_pid() \
     AND ((SELECT rolsuper FROM pg_roles WHERE rolname = current_user) \
       OR EXISTS (SELECT 1 FROM pg_roles r WHERE r.oid = a.usesysid AND NOT r.rolsuper))";

/// A walsender writes nothing, and one of ours must send the last changes. The server's own workers
/// end by themselves.
const WRITES: &str = "coalesce(a.backend_type, '') NOT IN ('walsender', 'autovacuum worker')";

const IS_PROVIDERS_OWN: &str = concat!(is_providers_own!("$6"), " AS own");

/// Identifies one of the sessions that were seen first, by process id and start together. If we may
/// not see the start of a session, the process id must do. A process that was still starting is
/// known only by its id.
const SEEN_FIRST: &str = "(a.pid = ANY ($2::int4[]) OR EXISTS (SELECT 1 FROM unnest($3::int4[], $4::timestamptz[]) f(pid, start) \
     WHERE f.pid = a.pid AND (f.start IS NULL OR a.backend_start IS NULL OR f.start = a.backend_start)))";

/// The sessions from before the fence that exist still.
struct Left {
    number: i64,
    /// Some of the sessions in words, after a colon.
    who: String,
    /// Not among the number.
    waived: Waived,
}

/// The sessions that exist when the fence's setting has just been committed.
struct OldSessions<'a> {
    session: &'a WriteSession,
    database: &'a str,
    /// Backends that were still starting, and may have read the database's settings before the
    /// fence.
    starting: Vec<i32>,
    pids: Vec<i32>,
    /// None: we may not see it.
    starts: Vec<Option<DateTime<Utc>>>,
}

impl<'a> OldSessions<'a> {
    /// Reads the starting sessions first. In the other order a session could start between the two
    /// reads and be missed.
    async fn look(session: &'a WriteSession, database: &'a str) -> Result<Self, DatastoreError> {
        let starting = starting(session, database).await?;
        let sql = format!(
            "SELECT a.pid, a.backend_start FROM pg_stat_activity a \
             WHERE a.datname = $1 AND a.pid <> pg_backend_pid() AND {WRITES}"
        );
        let doing = "looking for sessions from before the fence";
        let rows = session.rows(doing, &sql, &[&database]).await?;
        Ok(OldSessions {
            session,
            database,
            starting,
            pids: rows
                .iter()
                .map(|row| row.get(0))
                .collect::<Result<_, _>>()?,
            starts: rows
                .iter()
                .map(|row| row.get(1))
                .collect::<Result<_, _>>()?,
        })
    }

    async fn end(&self) -> Result<(), DatastoreError> {
        let sql = format!(
            "SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a WHERE {ENDABLE} AND {WRITES} AND {SEEN_FIRST}"
        );
        let doing = "ending other sessions";
        self.session
            .rows(
                doing,
                &sql,
                &[&self.database, &self.starting, &self.pids, &self.starts],
            )
            .await?;
        Ok(())
    }

    /// Counts visible sessions, sessions that are about to become visible, and prepared
    /// transactions: committing one later is a write.
    async fn left(&self) -> Result<Left, DatastoreError> {
        let mut starting = starting(self.session, self.database).await?;
        starting.retain(|pid| self.starting.contains(pid));
        let sql = format!(
            "SELECT cardinality($5::int4[]) + (SELECT count(*) FROM pg_prepared_xacts WHERE database = $1) \
               + count(*) FILTER (WHERE NOT own), \
               coalesce(': ' || array_to_string((array_agg(format('process %s of %s (%s)', pid, usename, application_name)) \
                 FILTER (WHERE NOT own))[1:3], ', '), ''), \
               coalesce(array_agg(DISTINCT usename::text) FILTER (WHERE own), '{{}}') \
             FROM (SELECT a.*, {IS_PROVIDERS_OWN} FROM pg_stat_activity a \
               WHERE a.datname = $1 AND a.pid <> pg_backend_pid() AND a.pid <> ALL ($5) \
                 AND {WRITES} AND {SEEN_FIRST}) a"
        );
        let doing = "counting sessions";
        let row = self
            .session
            .row(
                doing,
                &sql,
                &[
                    &self.database,
                    &self.starting,
                    &self.pids,
                    &self.starts,
                    &starting,
                    &SUPERUSERS.as_slice(),
                ],
            )
            .await?;
        Ok(Left {
            number: row.get(0)?,
            who: printable(&row.get::<String>(1)?),
            waived: Waived(row.get(2)?),
        })
    }
}

/// Returns the starting backends. A starting backend holds a lock on the database object until it
/// is listed in `pg_stat_activity`; it may have read the database's settings by then.
async fn starting(session: &WriteSession, database: &str) -> Result<Vec<i32>, DatastoreError> {
    let sql = "SELECT array_agg(l.pid) FROM pg_locks l JOIN pg_database d ON d.oid = l.objid \
               WHERE l.locktype = 'object' AND l.classid = 'pg_database'::regclass AND d.datname = $1 \
                 AND l.pid <> pg_backend_pid()";
    let doing = "looking for sessions that start";
    let row = session.row(doing, sql, &[&database]).await?;
    Ok(row.get::<Option<Vec<i32>>>(0)?.unwrap_or_default())
}
