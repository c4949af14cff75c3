//! Drops our slot on the primary: a slot that nobody reads must not hold log.
//!
//! It is dropped when the stream is left (another slot, a gap, snapshot mode, too much log), when a
//! full copy is made without it or fails, and after a switchover. `release` drops it as a step of
//! its plan. A slot that an administrator made is never dropped: it has another name.

use crate::cluster::preparation::Names;
use crate::cluster::{Lock, PeerCluster, StateDb};
use crate::domain::ErrorCode;
use crate::killpoint;
use crate::replication::error::ReplicationError;
use std::time::Duration;

const DROP_TRIES: u32 = 50;
const DROP_PAUSE: Duration = Duration::from_millis(100);

/// Drops a slot if it has the name that the cluster with this id gives its own one. Returns whether
/// it has. The slot need not exist. A process that has lost the working lock drops nothing: the next
/// one reads that slot.
pub async fn drop_our_slot(
    peer: &PeerCluster<'_>,
    (state, lock): (&StateDb, Lock),
    cluster_id: &str,
    slot: &str,
) -> Result<bool, ReplicationError> {
    killpoint::reach("slot.before_drop");
    if slot != Names::of_cluster(cluster_id).slot {
        return Ok(false);
    }
    let mut session = peer.replication().await?;
    for attempt in 0..DROP_TRIES {
        state.still_ours(lock).await?;
        if session.drop_idle_slot(slot).await? {
            return Ok(true);
        }
        // Either the reader has just ended and the server will notice it soon, or the reader's
        // connection was lost and the server will not notice it.
        if attempt == DROP_TRIES / 5 {
            session.end_reader(slot).await?;
        }
        tokio::time::sleep(DROP_PAUSE).await;
    }
    Err(ReplicationError::Precondition {
        check: ErrorCode::SlotActive,
        text: format!("slot {slot} on the primary is being read by another session"),
        next_step: "stop the session that reads it".into(),
    })
}
