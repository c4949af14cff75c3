//! Do no harm: while we copy, no session on the primary waits for us longer than a second, and its
//! shutdown not much longer.

use crate::cluster::{DatastoreError, PeerCluster};
use crate::replication::error::ReplicationError;
use std::collections::HashMap;
use std::time::{Duration, Instant};

const CHECK_INTERVAL: Duration = Duration::from_millis(250);
const MAX_WAIT: Duration = Duration::from_secs(1);
/// Number of checks between two connection attempts. A server that shuts down accepts no session,
/// and waits for the existing ones.
const CHECKS_PER_CONNECT: u32 = 8;

/// Runs `work`, and stops it as soon as a session on the primary has waited for one of ours for
/// over a second. Dropping the work closes its sessions, which releases their locks.
pub(crate) async fn with_lock_watchdog<T>(
    peer: PeerCluster<'_>,
    work: impl Future<Output = Result<T, ReplicationError>>,
) -> Result<T, ReplicationError> {
    tokio::select! {
        done = work => done,
        harm = watch(peer) => Err(harm),
    }
}

async fn watch(peer: PeerCluster<'_>) -> ReplicationError {
    let session = match peer.connect().await {
        Ok(session) => session,
        Err(error) => return error.into(),
    };
    let mut since: HashMap<i32, Instant> = HashMap::new();
    for look in 1_u32.. {
        tokio::time::sleep(CHECK_INTERVAL).await;
        if look.is_multiple_of(CHECKS_PER_CONNECT)
            && let Err(error) = peer.connect().await
        {
            return error.into();
        }
        let waiting = match session.waiting_for_us().await {
            Ok(waiting) => waiting,
            // Without this watch, we must not hold locks.
            Err(error) => return DatastoreError::into(error),
        };
        since.retain(|pid, _| waiting.contains(pid));
        for pid in waiting {
            if since.entry(pid).or_insert_with(Instant::now).elapsed() > MAX_WAIT {
                return ReplicationError::InTheWay { pid };
            }
        }
    }
    unreachable!("the loop has no end but its returns")
}
