//! Do no harm: while we copy, nobody on the primary waits for us longer than a second, and its shutdown not much longer.

use crate::cluster::{DatastoreError, PeerSession};
use crate::config::Datastore;
use crate::replication::error::PassError;
use std::collections::HashMap;
use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_millis(250);
const LIMIT: Duration = Duration::from_secs(1);
/// A server that shuts down lets in nobody, and waits for who is there.
const LOOKS_PER_KNOCK: u32 = 8;

/// From `pg_locks`, which everybody may read whole: of other roles' sessions `pg_stat_activity` hides what they wait for.
const WAITING_FOR_US: &str = "
WITH ours AS (
    SELECT pid FROM pg_stat_activity WHERE application_name = 'warm-spare' AND usename = current_user)
SELECT DISTINCT waiting.pid
FROM pg_locks waiting
CROSS JOIN LATERAL unnest(pg_blocking_pids(waiting.pid)) AS blocking (pid)
WHERE NOT waiting.granted
  AND blocking.pid IN (SELECT pid FROM ours)
  AND waiting.pid NOT IN (SELECT pid FROM ours)";

/// Runs `work`; gives it up as soon as a session on the primary has waited for one of ours for over a second.
/// Dropping the work closes its sessions, and with them go their locks.
pub async fn guarded<T>(
    peer: &Datastore,
    work: impl Future<Output = Result<T, PassError>>,
) -> Result<T, PassError> {
    tokio::select! {
        done = work => done,
        harm = watch(peer) => Err(harm),
    }
}

async fn watch(peer: &Datastore) -> PassError {
    let session = match PeerSession::open(peer).await {
        Ok(session) => session,
        Err(error) => return error.into(),
    };
    let mut since: HashMap<i32, Instant> = HashMap::new();
    for look in 1_u32.. {
        tokio::time::sleep(LOOK).await;
        if look.is_multiple_of(LOOKS_PER_KNOCK)
            && let Err(error) = PeerSession::open(peer).await
        {
            return error.into();
        }
        let asked = async {
            let doing = "looking for sessions that wait for us";
            let rows = session.rows(doing, WAITING_FOR_US, &[]).await?;
            rows.iter().map(|row| row.get(0)).collect()
        };
        let waiting: Vec<i32> = match asked.await {
            Ok(waiting) => waiting,
            // Unwatched, we must not hold locks.
            Err(error) => return DatastoreError::into(error),
        };
        since.retain(|pid, _| waiting.contains(pid));
        for pid in waiting {
            if since.entry(pid).or_insert_with(Instant::now).elapsed() > LIMIT {
                return PassError::InTheWay { pid };
            }
        }
    }
    unreachable!("the loop has no end but its returns")
}
