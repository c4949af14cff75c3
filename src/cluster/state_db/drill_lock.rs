//! The lock of a drill: an advisory lock in our state database, held as long as its session lives.

use super::state::StateDb;
use crate::cluster::postgres::datastore_error::DatastoreError;

/// Key of the lock: "dril" in ASCII.
const LOCK_KEY: i64 = 0x6472_696c;

impl StateDb {
    /// Takes the lock of the only drill on this cluster. False: another session holds it.
    pub async fn lock_drill(&self) -> Result<bool, DatastoreError> {
        let sql = "SELECT pg_try_advisory_lock($1)";
        let doing = "taking the drill's lock";
        self.session.row(doing, sql, &[&LOCK_KEY]).await?.get(0)
    }

    /// Returns whether a drill holds the lock.
    pub async fn a_drill_runs(&self) -> Result<bool, DatastoreError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1 \
                     AND classid = 0 AND objid::bigint = $1 \
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
        let doing = "looking for a drill under way";
        self.session.row(doing, sql, &[&LOCK_KEY]).await?.get(0)
    }
}
