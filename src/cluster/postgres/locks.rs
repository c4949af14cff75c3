//! Sessions of others that wait for one of ours.

use super::session::ReadSession;
use crate::cluster::postgres::datastore_error::DatastoreError;

/// Reads from `pg_locks`, which every user can read completely: `pg_stat_activity` hides what other
/// roles' sessions wait for.
const WAITING_FOR_US: &str = "
WITH ours AS (
    SELECT pid FROM pg_stat_activity WHERE application_name = 'warm-spare' AND usename = current_user)
SELECT DISTINCT waiting.pid
FROM pg_locks waiting
CROSS JOIN LATERAL unnest(pg_blocking_pids(waiting.pid)) AS blocking (pid)
WHERE NOT waiting.granted
  AND blocking.pid IN (SELECT pid FROM ours)
  AND waiting.pid NOT IN (SELECT pid FROM ours)";

impl ReadSession {
    /// Returns the server processes of the sessions that wait for a session of ours.
    pub async fn waiting_for_us(&self) -> Result<Vec<i32>, DatastoreError> {
        let doing = "looking for sessions that wait for us";
        let rows = self.rows(doing, WAITING_FOR_US, &[]).await?;
        rows.iter().map(|row| row.get(0)).collect()
    }
}
