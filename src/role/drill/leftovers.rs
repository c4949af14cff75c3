//! Removes clones left by killed drills. A running drill holds an advisory lock, so its clone is
//! kept.

use crate::cluster::{StateDb, WriteSession};
use crate::domain::ErrorCode;
use crate::replication::ReplicationError;
use std::time::Duration;

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
pub(super) async fn claim(state: &StateDb) -> Result<(), ReplicationError> {
    for tried in 1.. {
        if state.lock_drill().await? {
            break;
        }
        if tried == MAX_ATTEMPTS {
            return Err(ReplicationError::Refused {
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
pub(super) async fn remove(state: &StateDb) -> Result<(), ReplicationError> {
    let names = state.session().databases_named(PREFIX).await?;
    drop_all(state.session(), &names).await
}

/// Drops the clones of killed drills, and returns their names. The clone of a running drill is left
/// alone.
pub async fn remove_drill_leftovers(state: &StateDb) -> Result<Vec<String>, ReplicationError> {
    let session = state.session();
    // The order matters: a drill holds the lock before it makes a clone. So if nobody holds the
    // lock after the list was read, the clones belong to dead drills.
    let names = session.databases_named(PREFIX).await?;
    if names.is_empty() || state.a_drill_runs().await? {
        return Ok(Vec::new());
    }
    drop_all(session, &names).await?;
    Ok(names)
}

async fn drop_all(session: &WriteSession, names: &[String]) -> Result<(), ReplicationError> {
    for name in names {
        session.drop_database(name).await?;
        log::info!("local: database {name} of a killed drill was dropped");
    }
    Ok(())
}
