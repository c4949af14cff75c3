//! Removes clones left by killed drills. A running drill holds an advisory lock, so its clone is
//! kept.

use crate::cluster::{LocalSession, State};
use crate::domain::ErrorCode;
use crate::replication::{PassError, drop_database};
use std::time::Duration;

/// Key of the advisory lock in database `warm_spare`: "dril" in ASCII.
const LOCK_KEY: i64 = 0x6472_696c;
/// Maximum number of tries to take the lock. The server may take a moment to notice that a killed
/// drill is gone.
const MAX_ATTEMPTS: u32 = 15;
const RETRY_AFTER: Duration = Duration::from_millis(200);
const PREFIX: &str = "warm_spare_drill_";

/// Returns the name of a clone that no other process uses.
pub(super) fn new_name() -> String {
    let now = chrono::Utc::now().format("%Y%m%dt%H%M%S%3fz");
    format!("{PREFIX}{}_{now}", std::process::id())
}

/// Takes the lock of the only drill on this cluster. It is held as long as the session lives.
pub(super) async fn claim(state: &State) -> Result<(), PassError> {
    for tried in 1.. {
        let sql = "SELECT pg_try_advisory_lock($1)";
        let doing = "taking the drill's lock";
        let row = state.session().query_one(doing, sql, &[&LOCK_KEY]).await?;
        if row.get(0) {
            break;
        }
        if tried == MAX_ATTEMPTS {
            return Err(PassError::Refused {
                rule: ErrorCode::DrillRuns,
                text: "another drill is running on this cluster".into(),
                next_step: "wait until it has ended".into(),
            });
        }
        tokio::time::sleep(RETRY_AFTER).await;
    }
    Ok(())
}

/// Drops the clones of earlier drills. Only the holder of the lock may call this.
pub(super) async fn remove(state: &State) -> Result<(), PassError> {
    let names = clones(state.session()).await?;
    drop_all(state.session(), &names).await
}

/// Drops the clones of killed drills, and returns their names. The clone of a running drill is left
/// alone.
pub async fn remove_drill_leftovers(state: &State) -> Result<Vec<String>, PassError> {
    let session = state.session();
    // The order matters: a drill holds the lock before it makes a clone. So if nobody holds the
    // lock after the list was read, the clones belong to dead drills.
    let names = clones(session).await?;
    let sql = "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1 \
                 AND classid = 0 AND objid::bigint = $1 \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
    let doing = "looking for a drill under way";
    if names.is_empty() || session.query_one(doing, sql, &[&LOCK_KEY]).await?.get(0) {
        return Ok(Vec::new());
    }
    drop_all(session, &names).await?;
    Ok(names)
}

async fn drop_all(session: &LocalSession, names: &[String]) -> Result<(), PassError> {
    for name in names {
        drop_database(session, name).await?;
        log::info!("local: database {name} of a killed drill was dropped");
    }
    Ok(())
}

async fn clones(session: &LocalSession) -> Result<Vec<String>, PassError> {
    let sql =
        "SELECT datname::text FROM pg_database WHERE starts_with(datname::text, $1) ORDER BY 1";
    let rows = session
        .query("looking for clones of drills", sql, &[&PREFIX])
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
