//! Proves the fence: a plain client's write must fail.

use super::setting::FenceError;
use crate::cluster::postgres::datastore;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::session::{Session, WriteSession};
use crate::config::Datastore;
use tokio_postgres::error::SqlState;

/// Returns a role with its own setting, which has precedence over the database's.
pub async fn exempt_role(
    session: &Session,
    database: &str,
) -> Result<Option<String>, DatastoreError> {
    // The setting is stored as it was written: `off`, `false`, `0`, …
    let sql = "SELECT min(r.rolname)::text FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) c \
               WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = $1)) \
                 AND CASE split_part(c, '=', 1) WHEN 'default_transaction_read_only' THEN NOT split_part(c, '=', 2)::bool END";
    let doing = "looking for roles that the fence does not hold";
    let row = session.row(doing, sql, &[&database]).await?;
    row.get(0)
}

/// Connects as a plain client does and tries to write; the refusal is the proof. It covers our own
/// user. For other users it is enough that none has a setting with precedence over the database's.
pub async fn prove_fence(
    session: &WriteSession,
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
        Err(e) => Err(DatastoreError::of(side, &to.address(), "proving the fence", &e).into()),
        Ok(()) => Err(open(&to.user)),
    }
}
