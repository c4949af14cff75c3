//! The fence: the spare's database is read-only for everybody but us, until it is promoted.
//!
//! A read-only default holds every client that does not set the transaction mode itself, as Builder's do not.

use super::Side;
use super::datastore::DatastoreError;
use super::session::{LocalSession, quote_ident};
use crate::config::Datastore;
use std::time::Duration;
use tokio_postgres::error::SqlState;

const LEAVING_TRIES: usize = 100;
const LEAVING_STEP: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    #[error(transparent)]
    Datastore(#[from] DatastoreError),
    #[error(
        "the local database {database} is not fenced: user {user} can write in it, \
         although its default_transaction_read_only is on. Look for a setting of that role: \
         ALTER ROLE {user} RESET default_transaction_read_only, or \
         ALTER ROLE {user} IN DATABASE {database} RESET default_transaction_read_only"
    )]
    Open { database: String, user: String },
    #[error("sessions on the local database {database} do not end: {left} are left after 10 s")]
    Staying { database: String, left: i64 },
}

/// Whether the fence's setting stands on `database`.
pub async fn is_fenced(session: &LocalSession, database: &str) -> Result<bool, DatastoreError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase \
               WHERE d.datname = $1 AND s.setrole = 0 AND 'default_transaction_read_only=on' = ANY (s.setconfig))";
    let row = session
        .query_one("looking for the fence", sql, &[&database])
        .await?;
    Ok(row.get(0))
}

/// Sets the fence's setting; sessions that are there already keep their own.
pub async fn set_fence(session: &LocalSession, database: &str) -> Result<(), DatastoreError> {
    let sql = format!(
        "ALTER DATABASE {} SET default_transaction_read_only = 'on'",
        quote_ident(database)
    );
    session.batch("setting the fence", &sql).await
}

/// Sets the fence on a database that clients may be using, ends their sessions, and proves that none can write.
pub async fn raise_fence(
    session: &LocalSession,
    local: &Datastore,
    database: &str,
) -> Result<(), FenceError> {
    set_fence(session, database).await?;
    for _ in 0..LEAVING_TRIES {
        end_sessions(session, database).await?;
        if sessions(session, database).await? == 0 {
            return prove_fence(session, local, database).await;
        }
        tokio::time::sleep(LEAVING_STEP).await;
    }
    Err(FenceError::Staying {
        database: database.to_string(),
        left: sessions(session, database).await?,
    })
}

/// Ends those sessions that we may end: only a superuser may end another one's, or the server's own workers, which
/// leave by themselves.
pub async fn end_sessions(session: &LocalSession, database: &str) -> Result<(), DatastoreError> {
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity a \
               WHERE datname = $1 AND pid <> pg_backend_pid() \
                 AND ((SELECT rolsuper FROM pg_roles WHERE rolname = current_user) \
                   OR EXISTS (SELECT 1 FROM pg_roles r WHERE r.oid = a.usesysid AND NOT r.rolsuper))";
    session.query("ending sessions", sql, &[&database]).await?;
    Ok(())
}

/// Sessions on the database, and those just starting. A backend on its way in holds a lock on the database object until it
/// shows in `pg_stat_activity`: the locks are read first, or it could pass between the two.
async fn sessions(session: &LocalSession, database: &str) -> Result<i64, DatastoreError> {
    let sql = "SELECT array_agg(l.pid) FROM pg_locks l JOIN pg_database d ON d.oid = l.objid \
               WHERE l.locktype = 'object' AND l.classid = 'pg_database'::regclass AND d.datname = $1 \
                 AND l.pid <> pg_backend_pid()";
    let row = session
        .query_one("looking for sessions that start", sql, &[&database])
        .await?;
    let starting: Vec<i32> = row.get::<_, Option<Vec<i32>>>(0).unwrap_or_default();
    let sql = "SELECT cardinality($2::int4[]) + count(*) FROM pg_stat_activity \
               WHERE datname = $1 AND pid <> pg_backend_pid() AND pid <> ALL ($2)";
    let row = session
        .query_one("counting sessions", sql, &[&database, &starting])
        .await?;
    Ok(row.get(0))
}

/// Connects as a plain client does and tries to write; being refused is the proof. It covers our own user; of others it
/// is enough that none has a setting that goes before the database's.
pub async fn prove_fence(
    session: &LocalSession,
    local: &Datastore,
    database: &str,
) -> Result<(), FenceError> {
    let open = |user: &str| FenceError::Open {
        database: database.to_string(),
        user: user.to_string(),
    };
    let sql = "SELECT r.rolname::text FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole \
               WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = $1)) \
                 AND 'default_transaction_read_only=off' = ANY (s.setconfig)";
    let exempt = session
        .query(
            "looking for roles that the fence does not hold",
            sql,
            &[&database],
        )
        .await?;
    if let Some(row) = exempt.first() {
        return Err(open(row.get(0)));
    }
    let (plain, _wire) = super::datastore::connect_plainly(Side::Local, local, database).await?;
    let sql = "BEGIN; CREATE TABLE warm_spare_fence_probe (); ROLLBACK";
    match plain.batch_execute(sql).await {
        Err(e) if e.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) => Ok(()),
        Err(e) => Err(DatastoreError::of(
            Side::Local,
            &super::datastore::address(local),
            "proving the fence",
            &e,
        )
        .into()),
        Ok(()) => Err(open(&local.user)),
    }
}
