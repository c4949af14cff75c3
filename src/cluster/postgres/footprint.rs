//! Reads our sessions, locks and slots on the peer's server at present, and how much they hold back
//! there. The server is asked; nothing is assumed.

use super::session::ReadSession;
use crate::cluster::postgres::datastore_error::DatastoreError;
use crate::config::Datastore;

/// Our sessions, and the things that they hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Footprint {
    pub sessions: i64,
    /// Readers of a slot, and sessions that create one.
    pub walsenders: i64,
    /// Age of our oldest open transaction; None: none is open.
    pub transaction_seconds: Option<f64>,
    /// Number of transactions for which no deleted row is vacuumed because of us; None: we hold
    /// none back.
    pub xmin_age: Option<i32>,
    /// Locks on tables.
    pub locks: i64,
    pub temporary_slots: i64,
}

const QUESTION: &str = "
WITH ours AS (
    SELECT * FROM pg_stat_activity
    WHERE application_name = 'warm-spare' AND usename = current_user AND pid <> pg_backend_pid()
      -- Another spare's are not ours.
      AND client_addr IS NOT DISTINCT FROM (SELECT client_addr FROM pg_stat_activity WHERE pid = pg_backend_pid()))
SELECT count(*), count(*) FILTER (WHERE backend_type = 'walsender'),
       extract(epoch FROM clock_timestamp() - min(xact_start)
         FILTER (WHERE backend_xmin IS NOT NULL OR state LIKE 'idle in transaction%'))::float8,
       max(age(backend_xmin)),
       (SELECT count(*) FROM pg_locks JOIN ours USING (pid) JOIN pg_class c ON c.oid = relation
        WHERE locktype = 'relation' AND c.oid >= 16384),
       (SELECT count(*) FROM pg_replication_slots WHERE temporary AND starts_with(slot_name, $1))
FROM ours";

/// Asks in its own session, which does not count.
pub(in crate::cluster) async fn footprint(
    to: &Datastore,
    cluster_id: &str,
) -> Result<Footprint, DatastoreError> {
    let session = ReadSession::open(to).await?;
    let slots = format!("warm_spare_{cluster_id}_");
    let doing = "looking for our sessions on the primary";
    let row = session.row(doing, QUESTION, &[&slots]).await?;
    Ok(Footprint {
        sessions: row.get(0)?,
        walsenders: row.get(1)?,
        transaction_seconds: row.get(2)?,
        xmin_age: row.get(3)?,
        locks: row.get(4)?,
        temporary_slots: row.get(5)?,
    })
}
