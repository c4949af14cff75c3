//! The first write after a takeover, tried on a clone.

use super::setting::lift_statement;
use crate::cluster::postgres::datastore;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::cluster::postgres::session::WriteSession;
use crate::config::Datastore;

/// Lifts the fence of `database`, and writes in it as any client would: the write is committed when
/// this returns.
pub async fn lift_and_write(
    session: &WriteSession,
    to: &Datastore,
    database: &str,
) -> Result<(), DatastoreError> {
    let lift = lift_statement(database);
    session.batch("lifting the clone's fence", &lift).await?;
    let side = session.side();
    let (plain, _wire) = datastore::connect_plainly(side, to, database).await?;
    let sql = "BEGIN; CREATE TABLE warm_spare_drill (at timestamptz NOT NULL); \
               INSERT INTO warm_spare_drill VALUES (now()); COMMIT";
    plain
        .batch_execute(sql)
        .await
        .map_err(|e| DatastoreError::of(side, &to.address(), "writing in the clone", &e))
}
