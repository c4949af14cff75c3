//! Do no harm: while we copy, no session on the primary waits for us longer than a second, and its
//! shutdown not much longer.

use crate::cluster::{DatastoreError, PeerSession};
use crate::config::Datastore;
use crate::replication::error::PassError;
use std::collections::HashMap;
use std::time::{Duration, Instant};

const CHECK_INTERVAL: Duration = Duration::from_millis(250);
const MAX_WAIT: Duration = Duration::from_secs(1);
/// Number of checks between two connection attempts. A server that shuts down accepts no session,
/// and waits for the existing ones.
const CHECKS_PER_CONNECT: u32 = 8;

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

/// Runs `work`, and stops it as soon as a session on the primary has waited for one of ours for
/// over a second. Dropping the work closes its sessions, which releases their locks.
pub(crate) async fn guarded<T>(
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
        tokio::time::sleep(CHECK_INTERVAL).await;
        if look.is_multiple_of(CHECKS_PER_CONNECT)
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
            // Without this watch, we must not hold locks.
            Err(error) => return DatastoreError::into(error),
        };
        since.retain(|pid, _| waiting.contains(pid));
        for pid in waiting {
            if since.entry(pid).or_insert_with(Instant::now).elapsed() > MAX_WAIT {
                return PassError::InTheWay { pid };
            }
        }
    }
    unreachable!("the loop has no end but its returns")
}
